"""What one user can take, and what goes when its connection does."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.polkit import agent, caller, polkit
from tests.rig import (
    CROSVM,
    ERROR,
    MANAGER_PATH,
    Client,
    Rig,
    Service,
    client,
    guest,
    listening,
    refused,
)

OWNER, GREEDY = 5, 6


@pytest.fixture
async def tight() -> AsyncIterator[tuple[Client, Service]]:
    """A client of a service that gives little away."""
    rig = Rig(system=False)
    limits = {
        "vms": {"per_user": 3, "in_all": 10},
        "memory": {"per_user": 512, "in_all": 1024},
        "calls": {"per_user": 5, "in_all": 10},
        "consoles": {"per_user": 2, "in_all": 10},
        "files": {"per_user": 4, "in_all": 10},
    }
    service = Service(rig, {"crosvm": str(CROSVM), "kvm": "on", "limits": limits})
    async with listening(rig) as connected:
        yield connected, service
    rig.close()


async def test_vms(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, service = tight
    paths = [await bus.create(kernel=guest(tmp_path)) for _ in range(3)]
    fds = service.fds()
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.create(kernel=guest(tmp_path))
    assert "3 VMs" in text[0]
    assert service.fds() == fds
    assert await bus.get(MANAGER_PATH, "VMCount") == 3
    await bus.vm(paths[0], "Remove")
    assert await bus.create(kernel=guest(tmp_path))


async def test_memory_counts_while_a_vm_runs(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, _ = tight
    first, second = [await bus.create(kernel=guest(tmp_path), memory_mib=300) for _ in range(2)]
    await bus.vm(first, "Start")
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.vm(second, "Start")
    assert "512 MiB" in text[0]
    assert await bus.get(second, "State") == "not-started"
    await bus.vm(first, "Kill")
    await bus.vm(second, "Start")
    await bus.vm(second, "Kill")


async def test_files_count_until_start(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, _ = tight
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    disks = [{"image": str(disk)} for _ in range(3)]
    first = await bus.create(kernel=guest(tmp_path), disks=disks)
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.create(kernel=guest(tmp_path))
    assert "4 open files" in text[0]
    await bus.vm(first, "Start")
    second = await bus.create(kernel=guest(tmp_path))
    await bus.vm(second, "Remove")
    await bus.vm(first, "Kill")


async def test_consoles(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, _ = tight
    path = await bus.create(kernel=guest(tmp_path))
    streams = [(await bus.vm(path, "OpenConsole"))[0] for _ in range(2)]
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.vm(path, "OpenConsole")
    assert "2 open consoles" in text[0]
    os.close(streams.pop())
    # That it is closed reaches the service by another way than the call.
    async with asyncio.timeout(10):
        while True:
            try:
                streams += await bus.vm(path, "OpenConsole")
                break
            except Exception as error:
                assert "2 open consoles" in str(error)
    for stream in streams:
        os.close(stream)
    await bus.vm(path, "Remove")


async def test_calls(tight: tuple[Client, Service], tmp_path: Path) -> None:
    """Calls that wait are counted, and given back when their caller leaves."""
    bus, service = tight
    path = await bus.create(kernel=guest(tmp_path))
    async with client(service.rig) as other:
        await other.get(path, "State")
        waits = [asyncio.create_task(other.vm(path, "Wait")) for _ in range(5)]
        await other.get(path, "State")
        async with refused(ERROR + "LimitExceeded"):
            await other.vm(path, "Wait")
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
        name = other.connection.unique_name
        await bus.listen(f"type='signal',member='NameOwnerChanged',arg0='{name}'")
    await bus.until(lambda m: m.member == "NameOwnerChanged" and m.body[0] == name)
    # When this is answered the service has heard of it, too.
    await bus.get(path, "State")
    await bus.vm(path, "Start")
    await bus.vm(path, "Kill")
    await bus.vm(path, "Remove")


@pytest.fixture
def shared() -> Iterator[Service]:
    """On a system bus, with polkit, a service that takes eight calls of one user and twelve in all.

    Its user games may create VMs.
    """
    rig = Rig(system=True)
    images = rig.directory / "images"
    images.mkdir()
    settings = {
        "crosvm": str(CROSVM),
        "kvm": "on",
        "control_timeout": 60,
        "image_directories": [str(images)],
        "limits": {"calls": {"per_user": 8, "in_all": 12}},
    }
    rule = """polkit.addRule(function(action, subject) {
        if (subject.user == "games") return polkit.Result.YES;
    });"""
    with polkit(rig, rule):
        try:
            yield Service(rig, settings, user="vmbus")
        finally:
            rig.close()


async def test_one_user_with_many_connections_shuts_nobody_out(shared: Service) -> None:
    """Open dialogs, Waits and a VMM that doesn't answer count for the user, not the connection."""
    images = shared.rig.directory / "images"
    async with caller(shared.rig, OWNER) as owner, client(shared.rig) as root:
        path = await owner.create(kernel=guest(images))
        slow = await owner.create(
            kernel=guest(images, on={"BalloonCommand.Stats": {"silent": True}})
        )
        await owner.vm(slow, "Start")
        async with contextlib.AsyncExitStack() as stack:
            calls: list[asyncio.Task[Any]] = []
            greedy = []
            for _ in range(3):
                one = await stack.enter_async_context(caller(shared.rig, GREEDY, interactive=True))
                desktop = await stack.enter_async_context(agent(shared.rig, one))
                greedy.append((one, desktop))
            first, second, third = [one for one, _ in greedy]
            calls += [asyncio.create_task(first.vm(path, "Start")) for _ in range(3)]
            calls += [asyncio.create_task(second.vm(path, "Wait")) for _ in range(2)]
            calls += [asyncio.create_task(second.vm(path, "Start"))]
            calls += [asyncio.create_task(third.get(slow, "MemoryActual")) for _ in range(2)]
            await greedy[0][1].asked(3)
            await greedy[1][1].asked()
            # What was sent on a connection before is taken before.
            await third.get(path, "State")
            newcomer = await stack.enter_async_context(caller(shared.rig, GREEDY, interactive=True))
            for one in (first, second, third, newcomer):
                for method in ("Start", "Wait"):
                    async with refused(ERROR + "LimitExceeded") as texts:
                        await one.vm(path, method)
                    assert texts == ["a user can have no more than 8 calls under way"]
                async with refused(ERROR + "LimitExceeded"):
                    await one.get(slow, "MemoryActual")
                assert await one.get(path, "State") == "not-started"
            assert sum(len(desktop.requests) for _, desktop in greedy) == 4
            # Others, on connections old and new, notice nothing.
            fresh = await stack.enter_async_context(caller(shared.rig, OWNER))
            other = await owner.create(kernel=guest(images))
            waiting = asyncio.create_task(fresh.vm(other, "Wait"))
            await fresh.vm(other, "Start")
            await root.vm(other, "Kill")
            assert (await waiting)[0] == "killed"
            await owner.vm(other, "Remove")
            assert not any(call.done() for call in calls)
            for one in (first, second, third, newcomer):
                await one.connection.aclose()
            for _, desktop in greedy:
                for request in desktop.requests:
                    await desktop.gave_up(request)
            for ended in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(ended, ConnectionError)
        assert await owner.get(path, "State") == "not-started"
        await root.vm(slow, "Kill")
        # All of it is given back: the same user may have as much again.
        async with caller(shared.rig, GREEDY) as again:
            waits = [asyncio.create_task(again.vm(path, "Wait")) for _ in range(8)]
            await again.get(path, "State")
            async with refused(ERROR + "LimitExceeded"):
                await again.vm(path, "Wait")
            await owner.vm(path, "Start")
            await owner.vm(path, "Kill")
            assert await asyncio.gather(*waits) == [["killed", -9]] * 8


async def test_kill_on_disconnect(bus: Client, service: Service, tmp_path: Path) -> None:
    async with client(service.rig) as creator:
        kept = await creator.create(kernel=guest(tmp_path))
        taken = await creator.create(kernel=guest(tmp_path), kill_on_disconnect=True)
        never_started = await creator.create(kernel=guest(tmp_path), kill_on_disconnect=True)
        for path in (kept, taken):
            await creator.vm(path, "Start")
    assert (await bus.died(taken))[1:] == ["requester-gone", -9]
    await bus.until(lambda m: m.member == "InterfacesRemoved" and m.body[0] == never_started)
    assert not any(m.member == "Died" for m in bus.of(never_started))
    assert await bus.get(kept, "State") == "running"
    await bus.vm(kept, "Kill")


async def test_a_creator_that_leaves_before_the_vm_runs(
    bus: Client, service: Service, tmp_path: Path
) -> None:
    async with client(service.rig) as creator:
        path = await creator.create(
            kernel=guest(tmp_path, boot={"hang": True}), kill_on_disconnect=True
        )
        starting = asyncio.create_task(creator.vm(path, "Start"))
        await bus.until_state(path, "starting")
        starting.cancel()
    assert (await bus.died(path))[1:] == ["requester-gone", -9]
    assert await bus.get(path, "State") == "failed"
