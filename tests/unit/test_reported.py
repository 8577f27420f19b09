"""What becomes of a VM by what its guest says, and by what it doesn't say in time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.unit.doubles import DEADLINE, FakeDriver, Recorder, a_config, machine
from vmbus.errors import ControlFailed, InvalidArgs, InvalidState, NotSupported
from vmbus.guest.report import Payload, Report
from vmbus.guest.vsock import Family
from vmbus.model.machine import Machine
from vmbus.model.reported import TEXT_PAUSE
from vmbus.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_left")

Make = Callable[..., Machine]


@pytest.fixture
async def observer() -> Recorder:
    return Recorder()


@pytest.fixture
async def make(tmp_path: Path, observer: Recorder) -> AsyncIterator[Make]:
    """Makes one VM; it is killed in the end."""
    with contextlib.ExitStack() as stack:
        made: list[Machine] = []

        def make(driver: FakeDriver | None = None, **config: object) -> Machine:
            driver = driver or FakeDriver()
            stack.callback(driver.close)
            directory = tmp_path / "vms"
            directory.mkdir()
            parsed = stack.enter_context(a_config(tmp_path, **config))
            made.append(machine(directory, parsed, driver, observer))
            return made[0]

        yield make
        for vm in made:
            await vm.kill()
            vm._around.watch.close()


def _texts(observer: Recorder) -> int:
    return sum("status_text" in each.split() for each in observer.told)


async def test_payload_goes_forward_only(make: Make, observer: Recorder) -> None:
    """Every step is told, and what would be a step back, or none, is not."""
    vm = make()
    assert (vm.payload, vm.payload_status, vm.status_text) == ("none", -1, "")
    await vm.start()
    assert vm.payload == "starting"
    observer.told.clear()
    for step in ("started", "started", "ready", "started", "none", "finished", "ready"):
        vm.reported(Report(Payload(step)))
    assert vm.payload == "finished"
    assert observer.told == ["changed payload"] * 3


async def test_steps_that_are_reported_at_once_are_told_one_by_one(
    make: Make, observer: Recorder
) -> None:
    """A guest that is ready and done in one breath was ready all the same."""
    vm = make()
    await vm.start()
    observer.told.clear()
    seen: list[str] = []
    observer.look = lambda vm: seen.append(vm.payload)
    vm.reported(Report(Payload.FINISHED, passed=(Payload.STARTED, Payload.READY)))
    vm.reported(Report(Payload.FINISHED, passed=(Payload.READY,)))
    assert seen == ["started", "ready", "finished"]


async def test_guest_that_is_quicker_than_its_vmm(make: Make, observer: Recorder) -> None:
    """What it said before the VMM answered holds when that does."""
    driver = FakeDriver()
    answer = asyncio.Event()
    driver.before_answer = answer.wait
    vm = make(driver, ready_timeout_usec=1)
    starting = asyncio.create_task(vm.start())
    await observer.until("changed pid")
    vm.reported(Report(Payload.READY))
    assert vm.payload == "ready"
    answer.set()
    await starting
    assert vm.payload == "ready"
    assert vm.state == "running"


async def test_first_exit_status_counts(make: Make) -> None:
    vm = make()
    await vm.start()
    vm.reported(Report(Payload.FINISHED, exit_status=0))
    vm.reported(Report(Payload.FINISHED, exit_status=5))
    assert vm.payload_status == 0


async def test_error_takes_the_place_of_a_text(make: Make) -> None:
    """Only where the guest had no words of its own."""
    vm = make()
    await vm.start()
    vm.reported(Report(error="error 2: No such file or directory"))
    assert vm.status_text == "error 2: No such file or directory"
    vm.reported(Report(status="disk is missing", error="error 5: Input/output error"))
    vm.reported(Report(error="error 1: Operation not permitted"))
    vm._tell_last_text()
    assert vm.status_text == "disk is missing"


async def test_flood_of_texts_is_told_slowly(make: Make, observer: Recorder) -> None:
    """The first at once, of the rest the last after a while: so is what is written down."""
    vm = make()
    await vm.start()
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(10_000):
        vm.reported(Report(status=f"text {number}"))
    assert vm.status_text == "text 0"
    assert _texts(observer) == 1
    async with asyncio.timeout(DEADLINE):
        while vm.status_text != "text 9999":
            observer._news.clear()
            await observer._news.wait()
    assert loop.time() - began >= TEXT_PAUSE * 0.9
    assert _texts(observer) == 2
    vm._tell_last_text()


async def test_flood_does_not_hold_up_what_counts(make: Make) -> None:
    vm = make()
    await vm.start()
    vm.reported(Report(status="one"))
    vm.reported(Report(Payload.READY, exit_status=3, status="two"))
    assert (vm.payload, vm.payload_status, vm.status_text) == ("ready", 3, "one")


async def test_last_text_is_told_before_death(make: Make, observer: Recorder) -> None:
    """And nothing that is said after it changes anything."""
    vm = make()
    await vm.start()
    vm.reported(Report(status="one"))
    vm.reported(Report(status="two"))
    await vm.kill()
    assert vm.status_text == "two"
    told = [each for each in observer.told if "status_text" in each or each.startswith("died")]
    assert told == ["changed status_text", "changed status_text", "died killed -9"]
    vm.reported(Report(Payload.READY, exit_status=3, status="three"))
    assert (vm.payload, vm.payload_status, vm.status_text) == ("starting", -1, "two")


async def test_what_a_guest_said_is_written_down(make: Make) -> None:
    vm = make(ready_timeout_usec=10**12)
    await vm.start()
    by = vm.ready_by
    assert by > asyncio.get_running_loop().time() + 1e5
    vm.reported(Report(Payload.STARTED, exit_status=3, status="so far"))
    record = json.loads((vm.identity.directory / "record.json").read_text())
    assert record["payload"] == "started"
    assert (record["payload_status"], record["status_text"]) == (3, "so far")
    assert record["ready_by"] == pytest.approx(by)


# In time


async def test_guest_that_is_not_ready_in_time_hangs(make: Make) -> None:
    vm = make(ready_timeout_usec=50_000)
    await vm.start()
    vm.reported(Report(Payload.STARTED, status="nearly"))
    async with asyncio.timeout(DEADLINE):
        assert await vm.wait() == (Reason.HANGUP, -9)


@pytest.mark.parametrize("payload", ["ready", "finished"])
async def test_guest_that_was_ready_in_time_is_left_alone(make: Make, payload: str) -> None:
    """It may have come to its end as well, without having been ready."""
    vm = make(ready_timeout_usec=100_000)
    await vm.start()
    vm.reported(Report(Payload(payload)))
    assert not vm._around.watch._due
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await vm.wait()


async def test_guest_that_stands_still_is_not_waited_for(make: Make) -> None:
    """When it goes on it has all the time anew."""
    vm = make(ready_timeout_usec=150_000)
    await vm.start()
    await vm.suspend()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await vm.wait()
    loop = asyncio.get_running_loop()
    resumed = loop.time()
    await vm.resume()
    async with asyncio.timeout(DEADLINE):
        assert await vm.wait() == (Reason.HANGUP, -9)
    assert loop.time() - resumed > 0.1


async def test_guest_that_is_being_stopped_does_not_hang(make: Make) -> None:
    driver = FakeDriver()
    driver.on_power_button = None
    vm = make(driver, ready_timeout_usec=100_000)
    await vm.start()
    stopping = asyncio.create_task(vm.stop(0.3))
    assert (await vm.wait())[0] is Reason.KILLED
    await stopping


async def test_without_a_deadline_nothing_is_watched(make: Make) -> None:
    vm = make()
    await vm.start()
    assert not vm._around.watch._due


# Connections to the guest


def _with_vsock(vm: Machine, address: str) -> Machine:
    """The VM, on a host whose vsock is made of Unix sockets."""
    vm.vsock = True
    family = Family(1, address=lambda cid, port: f"\0{address}-{cid}-{port}")
    vm._around = dataclasses.replace(vm._around, vsock=family)
    return vm


@pytest.mark.parametrize("port", [0, 22, 1023, 0xFFFFFFFF])
async def test_ports_that_are_refused(make: Make, port: int) -> None:
    """Those of the guest's system, and the one that stands for any."""
    vm = _with_vsock(make(), "x")
    with pytest.raises(InvalidArgs, match="1024"):
        await vm.connect_vsock(port)


async def test_vm_without_vsock_is_not_connected_to(make: Make) -> None:
    vm = make()
    await vm.start()
    with pytest.raises(NotSupported):
        await vm.connect_vsock(1024)


async def test_only_a_vm_that_runs_is_connected_to(make: Make, tmp_path: Path) -> None:
    vm = _with_vsock(make(), str(tmp_path))
    with pytest.raises(InvalidState):
        await vm.connect_vsock(1024)
    await vm.start()
    with pytest.raises(ControlFailed):
        await vm.connect_vsock(1024)
    await vm.suspend()
    with pytest.raises(InvalidState):
        await vm.connect_vsock(1024)
