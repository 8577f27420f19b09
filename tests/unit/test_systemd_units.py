"""Scopes, at a service manager that the test plays, and where there is none."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator

import pytest

from tests.rig import STANDARD_ERROR, Rig, client
from tests.standin import job_removed, systemd
from vmbus.bus.connection import Connection
from vmbus.bus.wire import Kind
from vmbus.systemd import units as module
from vmbus.systemd.units import Bounds, Units, scope_name

pytestmark = pytest.mark.usefixtures("nothing_left")
SCOPE = "vmbus-7.scope"


@pytest.fixture
async def units(rig: Rig, nothing_left: None) -> AsyncIterator[Units]:
    """Those of a service on the bus."""
    connection = await Connection.open(rig.address)
    units = Units(connection)
    connection.handler = units.on_signal
    await units.watch()
    yield units
    await connection.aclose()


async def test_a_vm_gets_a_scope_with_its_bounds(rig: Rig, units: Units) -> None:
    """All that systemd is told of it; it is there when the job is done."""
    bounds = Bounds(memory=1 << 30, cpu_weight=400, cpu_quota=2.5, tasks=100)
    async with systemd(rig) as (manager, _):
        assert await units.scope(scope_name(7), "Virtual machine web", [11, 12], bounds)
        (call,) = manager.calls
    member, name, mode, properties, others = call
    assert (member, name, mode, others) == ("StartTransientUnit", SCOPE, "fail", [])
    assert dict(properties) == {
        "PIDs": [11, 12],
        "Description": "Virtual machine web",
        "Slice": "vmbus.slice",
        "Before": ["vmbusd.service"],
        "CollectMode": "inactive-or-failed",
        "TimeoutStopUSec": 5_000_000,
        "MemoryMax": 1 << 30,
        "CPUWeight": 400,
        "CPUQuotaPerSecUSec": 2_500_000,
        "TasksMax": 100,
    }


async def test_what_is_not_bounded_is_left_to_the_host(rig: Rig, units: Units) -> None:
    """And a weight stays within what systemd takes."""
    async with systemd(rig) as (manager, _):
        assert await units.scope(SCOPE, "web", [11])
        assert await units.scope(SCOPE, "web", [11], Bounds(cpu_weight=51_200))
        first, second = (dict(call[3]) for call in manager.calls)
    assert first.keys().isdisjoint({"MemoryMax", "CPUWeight", "CPUQuotaPerSecUSec", "TasksMax"})
    assert second["CPUWeight"] == 10_000


async def test_a_scope_is_there_only_if_its_job_says_so(
    rig: Rig, units: Units, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the log has how it ended."""
    caplog.set_level(logging.INFO)
    async with systemd(rig) as (_, answers):
        answers.result = "failed"
        assert not await units.scope(SCOPE, "web", [11])
    assert caplog.messages == ["StartTransientUnit of vmbus-7.scope ended as 'failed'"]


async def test_only_the_manager_can_say_how_a_job_ended(rig: Rig, units: Units) -> None:
    """Not another who sends us the same signal before it does."""
    ours = units._manager._connection.unique_name
    async with systemd(rig) as (manager, answers), client(rig) as liar:
        answers.result = "failed"
        end = answers.end

        def end_after_the_lie(path: str, unit: str) -> None:
            lie = job_removed(path, unit, "done")
            lie.kind, lie.destination = Kind.SIGNAL, ours
            liar.connection.send(lie)
            asking = liar.connection.call_bus("GetId", "", [])  # the lie is through before this
            task = asyncio.ensure_future(asking)
            task.add_done_callback(lambda _: end(path, unit))

        answers.end = end_after_the_lie  # type: ignore[method-assign]
        assert not await units.scope(SCOPE, "web", [11])
        assert len(manager.calls) == 1


async def test_a_job_that_never_ends_is_waited_for_no_longer_than_that(
    rig: Rig,
    units: Units,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A VM runs without a scope rather than not at all."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "_JOB_TIMEOUT", 0.05)
    async with systemd(rig) as (_, answers):
        answers.ends = False
        assert not await units.scope(SCOPE, "web", [11])
        assert caplog.messages == [
            "StartTransientUnit of vmbus-7.scope failed: systemd took too long"
        ]
        answers.ends = True
        monkeypatch.undo()
        assert await units.scope(SCOPE, "web", [11])


@pytest.mark.parametrize("error", ["AccessDenied", "InteractiveAuthorizationRequired"])
async def test_where_it_is_not_allowed_there_are_none_and_the_log_says_so_once(
    rig: Rig, units: Units, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    """As it is for the service of a system: it is asked each time, since rules can change."""
    caplog.set_level(logging.INFO)
    async with systemd(rig) as (manager, answers):
        answers.error = STANDARD_ERROR + error
        for _ in range(3):
            assert not await units.scope(SCOPE, "web", [11])
        assert len(manager.calls) == 3
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "does not let this user" in caplog.text


async def test_where_there_is_no_systemd_nothing_happens(
    units: Units, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so once, and nobody tries to start one."""
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert not await units.scope(SCOPE, "web", [11])
        await units.stop(SCOPE)
        await units.kill(SCOPE, signal.SIGKILL)
    assert caplog.messages == ["there is no systemd on the bus; VMs get no units of their own"]


async def test_what_is_left_of_a_vm_is_ended(rig: Rig, units: Units) -> None:
    """Stopping returns when the job is over; killing is a signal to all in the scope."""
    async with systemd(rig) as (manager, _):
        await units.stop(SCOPE)
        await units.kill(SCOPE, signal.SIGKILL)
        assert manager.calls == [
            ("StopUnit", SCOPE, "replace"),
            ("KillUnit", SCOPE, "all", signal.SIGKILL),
        ]


async def test_ending_a_scope_that_is_gone_is_nothing_to_speak_of(
    rig: Rig, units: Units, caplog: pytest.LogCaptureFixture
) -> None:
    """systemd collects a scope as soon as it is empty."""
    caplog.set_level(logging.INFO)
    async with systemd(rig) as (_, answers):
        answers.error = "org.freedesktop.systemd1.NoSuchUnit"
        await units.stop(SCOPE)
        await units.kill(SCOPE, signal.SIGKILL)
    assert caplog.messages == []


async def test_a_scope_that_exists_is_left_as_it_is(
    rig: Rig, units: Units, caplog: pytest.LogCaptureFixture
) -> None:
    """It isn't ours to say what is in it, nor worth a line for each VM after a restart."""
    caplog.set_level(logging.INFO)
    async with systemd(rig) as (_, answers):
        answers.error = "org.freedesktop.systemd1.UnitExists"
        assert not await units.scope(SCOPE, "web", [11])
    assert caplog.messages == []


async def test_a_manager_may_come_later_and_begin_anew(rig: Rig, units: Units) -> None:
    """Its jobs are believed whoever of its name gives them."""
    for _ in range(2):
        async with systemd(rig):
            assert await units.scope(SCOPE, "web", [os.getpid()])
