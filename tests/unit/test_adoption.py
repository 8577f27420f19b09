"""VMs that outlive a service: what the next one makes of them, and what it tells of those gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.doubles import (
    DEADLINE,
    DEAF,
    OBEDIENT,
    FakeDriver,
    FakeKeep,
    Recorder,
    Services,
    Silent,
    never,
)
from vmbus.errors import (
    ControlFailed,
    LimitExceeded,
    NameExists,
    NotSupported,
    StartFailed,
    TimedOut,
)
from vmbus.model.identity import Requester
from vmbus.model.ledger import Ledger, since_boot
from vmbus.model.machine import Machine
from vmbus.model.registry import FIRST_CID
from vmbus.model.state import State
from vmbus.reasons import Reason
from vmbus.settings import LimitSettings, Settings
from vmbus.vmm.base import Helper
from vmbus.vmm.process import Process

KILL = -signal.SIGKILL
LONG, SOON = 1000.0, 0.05
MIB = 1 << 20
AWAY = "it ended while the service was away"


@pytest.fixture
def driver(nothing_left: None) -> Iterator[FakeDriver]:
    driver = FakeDriver()
    yield driver
    driver.may_go_on.set()
    driver.close()


@pytest.fixture
async def services(tmp_path: Path, driver: FakeDriver) -> AsyncIterator[Services]:
    services = Services(tmp_path, driver)
    yield services
    await services.close()


async def _end(vm: Machine) -> tuple[str, int]:
    async with asyncio.timeout(DEADLINE):
        reason, status = await vm.wait()
    return str(reason), status


def _reap(pid: int, number: signal.Signals | None = signal.SIGKILL) -> None:
    """End a process that was let go, as init does it: nobody knows its status any more."""
    if number is not None:
        os.kill(pid, number)
    os.waitpid(pid, 0)


def _facts(vm: Machine) -> tuple[object, ...]:
    facts = (vm.identity, vm.vmm, vm.kvm, vm.vsock, vm.state, vm.pid, vm.created, vm.started)
    ending = (vm.died, vm.reason, vm.status, vm.last_words)
    return (*facts, *ending, vm.memory_actual, vm.config.model_dump())


STARTING = "changed state=starting"
RUNNING = "changed state=running started memory_actual payload"
STOPPING = "changed state=stopping"
DEAD = "changed state=dead reason status died last_words memory_actual pid"
FAILED = "changed state=failed reason status died last_words memory_actual"
RESTORED = "restored guest"


# Those that run


@pytest.mark.parametrize("end", ["stop", "kill", "exit"])
async def test_vm_that_runs_runs_on_and_ends_as_ever(
    services: Services, driver: FakeDriver, end: str
) -> None:
    """Through as many services as there are."""
    vm = await services.started()
    before = _facts(vm)
    for _ in range(3):
        vm = await services.next()
        assert (_facts(vm), services.observer.told) == (before, [RESTORED])
        os.kill(vm.pid, 0)
    if end == "exit":
        driver.control.exit(3)
    else:
        await (vm.stop(LONG) if end == "stop" else vm.kill())
    expected = {"stop": ("stopped", 0), "kill": ("killed", KILL), "exit": ("crash", 3)}[end]
    assert await _end(vm) == expected
    died = [DEAD, f"died {expected[0]} {expected[1]}"]
    assert services.observer.told[1:] == ([STOPPING] if end == "stop" else []) + died


async def test_waiting_for_a_vm_of_another_service(services: Services, driver: FakeDriver) -> None:
    await services.started()
    vm = await services.next()
    waiting = asyncio.ensure_future(vm.wait())
    driver.control.exit(0)
    assert await asyncio.wait_for(waiting, DEADLINE) == (Reason.SHUTDOWN, 0)


async def test_vm_can_be_asked_as_ever(services: Services, driver: FakeDriver) -> None:
    await services.started()
    vm = await services.next()
    await vm.suspend()
    await vm.resume()
    await vm.set_memory_target(64 * MIB)
    driver.control.memory_changed(64 * MIB)
    assert vm.memory_actual == 64 * MIB
    assert driver.control.requests == ["suspend", "resume", f"set_memory {64 * MIB}"]


async def test_last_words_are_those_said_to_nobody_and_those_said_later(
    services: Services, driver: FakeDriver
) -> None:
    driver.argv[2] = 'read -r line <"$1"; echo one >&2; read -r line <"$1"; echo two >&2; exit 1'
    vm = await services.started()
    stderr = vm.identity.directory / "tmp" / "stderr.0"
    await services.end()
    os.write(driver.orders, b"\n")
    look = os.open(stderr, os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([look], [], [], DEADLINE)[0]
    os.close(look)
    vm = await services.next()
    os.write(driver.orders, b"\n")
    assert await _end(vm) == ("crash", 1)
    assert vm.last_words == "one two"


async def test_helpers_are_ended_with_a_vm_of_another_service(
    services: Services, driver: FakeDriver
) -> None:
    """`nothing_left` sees those that are not, and where they are not reaped."""
    driver.helpers = [Helper(["/bin/sleep", "1000"], []) for _ in range(2)]
    await services.started()
    vm = await services.next()
    assert len(vm.traces) == 3
    driver.control.exit(0)
    assert await _end(vm) == ("shutdown", 0)


async def test_vmm_that_does_not_answer_any_more_runs_on_and_can_be_killed(
    services: Services, driver: FakeDriver
) -> None:
    await services.started()
    driver.before_answer = never
    vm = await services.next(settings=Settings(control_timeout=SOON, start_timeout=SOON))
    says = "the VMM has not answered since the service was restarted"
    for request in (vm.suspend(), vm.set_memory_target(64 * MIB)):
        with pytest.raises(TimedOut, match=says):
            await asyncio.wait_for(request, DEADLINE)
    assert (vm.state, await vm.ask_memory()) == (State.RUNNING, 256 * MIB)
    await asyncio.wait_for(vm.stop(SOON), DEADLINE)
    assert await _end(vm) == ("killed", KILL)


async def test_vmm_that_cannot_be_connected_to_runs_on_and_can_be_killed(
    services: Services, driver: FakeDriver
) -> None:
    async def refuse() -> None:
        raise ControlFailed("no")

    await services.started()
    driver.before_answer = refuse
    vm = await services.next(settings=Settings(control_timeout=SOON))
    with pytest.raises(TimedOut):
        await asyncio.wait_for(vm.suspend(), DEADLINE)
    assert vm.state is State.RUNNING
    await vm.kill()
    assert await _end(vm) == ("killed", KILL)


# Those about to do something


async def test_suspended_vm_stays_so_and_can_be_resumed(
    services: Services, driver: FakeDriver
) -> None:
    """It is told once more, since nobody knows whether it did."""
    await (await services.started()).suspend()
    vm = await services.next()
    await vm.resume()
    assert driver.control.requests == ["suspend", "suspend", "resume"]
    assert services.observer.told == [RESTORED, "changed state=running"]


async def test_vm_that_may_have_been_suspended_after_all_is_resumed(
    services: Services, driver: FakeDriver
) -> None:
    """Who asked for it has had no answer, and it is said to be running."""
    vm = await services.started()
    driver.before_reply = never
    services.do(vm.suspend())
    await asyncio.to_thread(int)
    assert driver.control.requests == ["suspend"]
    await services.end()
    driver.before_reply = _at_once
    vm = await services.next()
    await vm.set_memory_target(64 * MIB)
    assert driver.control.requests[:2] == ["suspend", "resume"]
    assert vm.state is State.RUNNING
    assert services.observer.told == [RESTORED, "changed memory_actual"]


async def _at_once() -> None:
    pass


async def test_stop_goes_on_and_counts_as_one(services: Services, driver: FakeDriver) -> None:
    driver.on_power_button = None
    vm = await services.started()
    services.do(vm.stop(LONG))
    await services.observer.until(STOPPING)
    await services.end()
    driver.on_power_button = 0
    vm = await services.next()
    assert await _end(vm) == ("stopped", 0)
    assert driver.control.requests == ["power_button", "power_button"]
    assert services.observer.told == [RESTORED, DEAD, "died stopped 0"]


async def test_stop_has_the_time_that_it_had_left(services: Services, driver: FakeDriver) -> None:
    driver.on_power_button = driver.on_quit = None
    vm = await services.started()
    services.do(vm.stop(LONG))
    await services.observer.until(STOPPING)
    ends_by = vm.ends_by
    assert since_boot() < ends_by <= since_boot() + LONG
    vm = await services.next()
    assert (vm.ends_by, vm.state) == (ends_by, State.STOPPING)
    # The time is over while nobody is there.
    vm._change(ends_by=since_boot() - 1)
    driver.on_quit = 0
    vm = await services.next()
    assert (await _end(vm))[0] == "killed"
    assert driver.control.requests[-1] == "quit"


async def test_stop_that_runs_out_of_time_kills_a_vmm_that_does_not_answer(
    services: Services, driver: FakeDriver
) -> None:
    driver.on_power_button, driver.argv[2] = None, DEAF
    vm = await services.started()
    services.do(vm.stop(SOON, Reason.HOST_SHUTDOWN))
    await services.observer.until(STOPPING)
    await services.end()
    driver.before_answer = never
    vm = await services.next()
    assert await _end(vm) == ("host-shutdown", KILL)


async def test_kill_that_was_decided_is_done(services: Services) -> None:
    """The service ended in the moment between writing it down and doing it."""
    vm = await services.started()
    vm._change(killed_for=Reason.REQUESTER_GONE)
    vm = await services.next()
    assert await _end(vm) == ("requester-gone", KILL)


async def _starting(services: Services, driver: FakeDriver) -> None:
    """A VM whose VMM has not answered yet, in a first service."""
    driver.before_answer = never
    services.begin()
    services.do((await services.create()).start())
    await services.observer.until("changed pid")


async def test_start_goes_on(services: Services, driver: FakeDriver) -> None:
    await _starting(services, driver)
    await services.end()
    driver.before_answer = _at_once
    vm = await services.next()
    await services.observer.until(RUNNING)
    assert (vm.state, vm.memory_actual) == (State.RUNNING, 256 * MIB)
    await vm.kill()
    assert services.observer.told == [RESTORED, RUNNING, DEAD, f"died killed {KILL}"]


async def test_start_that_goes_on_has_an_end(services: Services, driver: FakeDriver) -> None:
    await _starting(services, driver)
    vm = await services.next(settings=Settings(start_timeout=SOON))
    assert await _end(vm) == ("start-failed", KILL)
    assert vm.last_words == "did not answer in 0.05 s"


async def test_vmm_at_the_gate_never_runs_without_the_service_that_made_it(
    services: Services, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is written down by then or not; who lives on is told that it failed to start."""
    ran = services.directory / "ran"
    driver.argv[2] = f"touch {ran}; {OBEDIENT}"
    monkeypatch.setattr(Process, "release", lambda _: None)
    await _starting(services, driver)
    vm = await services.next()
    reason, _ = await _end(vm)
    assert (reason, vm.state, ran.exists()) == ("start-failed", State.FAILED, False)
    assert services.observer.told[1:] == [f"{FAILED} pid", f"died start-failed {vm.status}"]


@pytest.mark.parametrize("kept", [True, False])
async def test_vmm_at_the_gate_that_is_not_written_down_never_runs(
    services: Services, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """A descriptor of it may have been kept by then, and is closed."""
    keep = services.keep = FakeKeep()
    ran, pids = services.directory / "ran", asyncio.get_running_loop().create_future()
    driver.argv[2] = f"touch {ran}; {OBEDIENT}"

    async def put(self: object, vm: Ledger, those: list[int]) -> None:
        pids.set_result(those)
        await never()

    services.begin()
    monkeypatch.setattr("vmbus.model.surroundings.Anywhere.put", put)
    services.do((await services.create()).start())
    (pid,) = await asyncio.wait_for(pids, DEADLINE)
    if kept:
        pidfd = os.pidfd_open(pid)
        keep.store("vm-1-vmm", pidfd)
        os.close(pidfd)
    vm = await services.next(kept=keep.handed_on())
    assert await _end(vm) == ("start-failed", 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    assert not ran.exists()


# Those that are gone


@pytest.mark.parametrize(
    ("under_way", "reason", "words"),
    [
        ("", "unknown", AWAY),
        ("stop", "stopped", ""),
        ("kill", "killed", AWAY),
    ],
)
async def test_vm_that_ended_meanwhile_is_told_to_have_once(
    services: Services, driver: FakeDriver, under_way: str, reason: str, words: str
) -> None:
    driver.on_power_button = None
    vm = await services.started()
    if under_way == "stop":
        services.do(vm.stop(LONG))
        await services.observer.until(STOPPING)
    elif under_way == "kill":
        vm._change(killed_for=Reason.KILLED)
    pid = vm.pid
    await services.end()
    _reap(pid)
    vm = await services.next()
    assert await _end(vm) == (reason, 0)
    await services.observer.until("died")
    assert (vm.state, vm.last_words, vm.pid) == (State.DEAD, words, 0)
    assert vm.started < vm.died
    told = services.observer.told
    assert told == [RESTORED, DEAD, f"died {reason} 0"]
    before = _facts(vm)
    vm = await services.next()
    assert (_facts(vm), services.observer.told) == (before, [RESTORED])
    assert await _end(vm) == (reason, 0)


async def test_status_is_known_where_a_descriptor_of_the_vmm_was_kept(
    services: Services, driver: FakeDriver
) -> None:
    """It is a zombie, as if its parent hadn't come to reap it."""
    keep = services.keep = FakeKeep()
    vm = await services.started()
    pid = vm.pid
    await services.end()
    driver.control.exit(3)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    kept = keep.handed_on()
    vm = await services.next(kept=kept)
    assert await _end(vm) == ("crash", 3)
    assert (kept, keep.kept) == ({}, {})


async def test_vm_that_was_to_start_and_has_no_process_failed_to(
    services: Services, driver: FakeDriver
) -> None:
    """Its files were still made ready when the service ended."""
    services.begin()
    driver.may_go_on.clear()
    services.do((await services.create()).start())
    await asyncio.to_thread(driver.prepared.wait, DEADLINE)
    await services.end()
    driver.may_go_on.set()
    vm = await services.next()
    assert await _end(vm) == ("start-failed", 0)
    await services.observer.until("died")
    assert (vm.state, vm.last_words, vm.started) == (State.FAILED, AWAY, 0)
    assert services.observer.told == [RESTORED, FAILED, "died start-failed 0"]


async def test_death_that_nobody_was_told_of_is_told_once(
    services: Services, driver: FakeDriver
) -> None:
    services.begin(observer=Silent())
    vm = await services.create()
    await vm.start()
    driver.control.exit(5)
    await _end(vm)
    before = _facts(vm)
    for told in ([DEAD, "died crash 5"], []):
        vm = await services.next()
        await asyncio.sleep(0)
        assert (_facts(vm), services.observer.told) == (before, [RESTORED, *told])
        assert await _end(vm) == ("crash", 5)


@pytest.mark.parametrize("observer", [Recorder, Silent])
async def test_vm_to_be_collected_goes_when_its_death_is_told(
    services: Services, driver: FakeDriver, observer: type[Recorder]
) -> None:
    """Also where the service ended between the two."""
    services.begin(observer=observer())
    vm = await services.create(collect="on-death")
    vm.on_death = lambda: None
    await vm.start()
    driver.control.exit(0)
    await _end(vm)
    await services.end()
    registry = services.begin()
    await services.observer.until("removed")
    died = [DEAD, "died shutdown 0"] if observer is Silent else []
    assert (services.observer.told, len(registry)) == ([RESTORED, *died, "removed guest"], 0)
    await services.end()
    assert len(services.begin()) == 0


async def test_vm_that_is_removed_before_its_death_was_told_is_gone(
    services: Services, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    registry = services.begin(observer=Silent())
    vm = await services.create()
    await vm.start()
    driver.control.exit(0)
    await _end(vm)
    registry.remove(vm)
    vm.death_was_told()
    assert "internal error" not in caplog.text
    assert list((services.directory / "vm").glob("*/")) == []


# Those that were never started


async def test_vm_that_was_not_started_can_be_where_its_files_were_kept(
    services: Services, driver: FakeDriver
) -> None:
    keep = services.keep = FakeKeep()
    services.begin()
    vm = await services.create(initrd=str(services.directory / "kernel"))
    before = _facts(vm)
    for _ in range(2):
        kept = keep.handed_on() | {"other": os.open("/dev/null", os.O_RDONLY)}
        vm = await services.next(kept=kept)
        assert (_facts(vm), services.observer.told) == (before, [RESTORED])
        assert [*kept] == ["other"]
        os.close(kept["other"])
    assert all(file.is_still(str(services.directory / "kernel")) for file in vm.config.files())
    await vm.start()
    assert [*keep.kept] == ["vm-1-vmm"]


async def test_what_was_kept_for_a_vm_that_has_ended_is_closed(
    services: Services, driver: FakeDriver
) -> None:
    """The service ended before it could say that it is not needed any more."""
    keep = services.keep = FakeKeep()
    (services.directory / "disk").write_bytes(bytes(MIB))
    disk = {"image": str(services.directory / "disk"), "writable": True}
    vm = await services.started(disks=[disk])
    kept = keep.handed_on()
    driver.control.exit(0)
    await _end(vm)
    assert keep.kept == {}
    vm = await services.next(kept=kept)
    assert kept == {}
    assert await _end(vm) == ("shutdown", 0)


async def test_vm_whose_files_are_lost_cannot_be_started(services: Services) -> None:
    services.begin()
    await services.create()
    vm = await services.next()
    assert vm.state is State.NOT_STARTED
    says = f"{services.directory}/kernel is not open any more, since the service was restarted"
    with pytest.raises(StartFailed, match=f"^fake: could not be started: {says}$"):
        await vm.start()
    assert await _end(vm) == ("start-failed", 127)


async def test_vm_that_was_not_started_can_be_removed(services: Services) -> None:
    keep = services.keep = FakeKeep()
    services.begin()
    await services.create()
    vm = await services.next(kept=keep.handed_on())
    assert services.registry is not None
    services.registry.remove(vm)
    assert keep.kept == {}
    assert services.observer.told == [RESTORED, "removed guest"]


@pytest.mark.parametrize("kept", [True, False])
async def test_disk_can_be_grown_where_it_was_kept(
    services: Services, driver: FakeDriver, kept: bool
) -> None:
    keep = services.keep = FakeKeep()
    (services.directory / "disk").write_bytes(bytes(MIB))
    disk = {"image": str(services.directory / "disk"), "writable": True}
    await services.started(disks=[disk])
    vm = await services.next(kept=keep.handed_on() if kept else {})
    if kept:
        await vm.resize_disk(0, 2 * MIB)
        assert driver.control.requests == [f"resize_disk 0 {2 * MIB}"]
    else:
        with pytest.raises(NotSupported, match="the service was restarted, and does not hold"):
            await vm.resize_disk(0, 2 * MIB)
        assert driver.control.requests == []


# All of them


async def test_names_ids_and_cids_stay_taken_and_go_on(services: Services) -> None:
    first = await services.started()
    assert services.registry is not None
    services.registry.remove(await services.create(name="removed"))
    await services.next()
    with pytest.raises(NameExists):
        await services.create()
    second = await services.create(name=None)
    assert (second.identity.id, second.identity.cid) == (3, FIRST_CID + 2)
    for vm in (first, second):
        assert services.registry is not None
        found = services.registry.get(vm.identity.id)
        assert found is services.registry.by_name(vm.identity.name)
        assert found is services.registry.by_cid(vm.identity.cid)


@pytest.mark.parametrize(
    ("kind", "says"), [("vms", "1 VMs"), ("memory", "256 MiB"), ("files", "1 open files")]
)
async def test_what_vms_of_another_service_take_counts(
    services: Services, kind: str, says: str
) -> None:
    """Though they may be more than there can be by now."""
    await services.started()
    await services.create(name="another")
    await services.end()
    most = {"per_user": 256 if kind == "memory" else 1, "in_all": 1000}
    limits = LimitSettings.model_validate({kind: most})
    registry = services.begin(settings=Settings(limits=limits))
    runs, fresh = registry
    if kind == "memory":
        with pytest.raises(LimitExceeded, match=says):
            await registry.start(fresh)
        await runs.kill()
        with pytest.raises(StartFailed, match="is not open any more"):
            await registry.start(fresh)
        return
    with pytest.raises(LimitExceeded, match=says):
        await services.create(name="third")
    await runs.kill()
    registry.remove(runs)
    registry.remove(fresh)
    await services.create(name="third")


@pytest.mark.parametrize(("bus", "connection"), [("bus", ":1.5"), ("another", "")])
async def test_requester_is_somebody_on_the_same_bus_only(
    services: Services, bus: str, connection: str
) -> None:
    """Another bus gives the same names to others; who the user was stays known."""
    await services.started()
    for _ in range(2):
        vm = await services.next(bus=bus)
        assert vm.identity.requester == Requester(1000, 4711, "label", connection)


async def test_vm_goes_with_its_requester_also_in_the_next_service(services: Services) -> None:
    await services.started(kill_on_disconnect=True)
    vm = await services.next()
    assert services.registry is not None
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    gone.set_result(None)
    services.registry.goes_with(vm, gone)
    assert await _end(vm) == ("requester-gone", KILL)


async def test_vm_whose_record_is_damaged_is_left_alone_and_the_others_are_there(
    services: Services,
) -> None:
    pid = (await services.started()).pid
    await services.create(name="another")
    await services.end()
    directory = services.directory / "vm"
    for file in (directory / "1").glob("record.*"):
        file.write_text("junk")
    services.begin()
    assert services.observer.told == ["restored another"]
    assert (directory / "damaged-1").is_dir()
    os.kill(pid, 0)
    with contextlib.suppress(ChildProcessError):
        _reap(pid)
