"""One VM from Start to Remove, with a real process for its VMM and a driver that does as told."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import select
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.doubles import (
    DEADLINE,
    DEAF,
    OBEDIENT,
    FakeDriver,
    Recorder,
    a_config,
    machine,
    never,
)
from vmbus.errors import (
    ControlFailed,
    InvalidArgs,
    InvalidState,
    NoSuchVM,
    NotSupported,
    StartFailed,
    TimedOut,
    VMBusError,
)
from vmbus.model.machine import Machine
from vmbus.model.record import Record, Store
from vmbus.model.state import State
from vmbus.reasons import Reason
from vmbus.settings import Settings
from vmbus.spec import VMConfig
from vmbus.vmm.base import Helper

KILL = -signal.SIGKILL
LONG = 1000.0
SOON = 0.05


@pytest.fixture
def driver(nothing_left: None) -> Iterator[FakeDriver]:
    driver = FakeDriver()
    yield driver
    driver.may_go_on.set()
    driver.close()


@pytest.fixture
def observer() -> Recorder:
    return Recorder()


@pytest.fixture
def config(tmp_path: Path, nothing_left: None) -> Iterator[VMConfig]:
    with a_config(tmp_path) as config:
        yield config


@pytest.fixture
async def vm(
    tmp_path: Path, config: VMConfig, driver: FakeDriver, observer: Recorder
) -> AsyncIterator[Machine]:
    """A VM that may never take long to start."""
    vm = machine(tmp_path, config, driver, observer)
    yield vm
    async with asyncio.timeout(DEADLINE):
        await vm.kill()
        vm.remove()


def _with(vm: Machine, **settings: Any) -> None:
    vm._around = dataclasses.replace(vm._around, settings=Settings(**settings))


def _task(work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Do it in time, and not yet; errors are kept for the test to look at."""
    return asyncio.ensure_future(asyncio.wait_for(work, DEADLINE))


async def _end(vm: Machine) -> tuple[str, int]:
    async with asyncio.timeout(DEADLINE):
        reason, status = await vm.wait()
    return str(reason), status


async def _refused(start: Awaitable[None]) -> str:
    """What StartFailed says."""
    with pytest.raises(StartFailed) as failed:
        async with asyncio.timeout(DEADLINE):
            await start
    return str(failed.value)


STARTING = "changed state=starting"
PID = "changed pid"
RUNNING = "changed state=running started memory_actual payload"
STOPPING = "changed state=stopping"
DEAD = "changed state=dead reason status died last_words memory_actual pid"
FAILED = "changed state=failed reason status died last_words memory_actual pid"
#: Where there never was a process.
UNBORN = "changed state=failed reason status died last_words memory_actual"


# Life and death in order


async def test_new_vm_is_not_started_and_its_observer_not_told_anything(
    vm: Machine, observer: Recorder
) -> None:
    assert (vm.state, vm.pid, vm.started, vm.died, vm.reason) == (State.NOT_STARTED, 0, 0, 0, None)
    assert (vm.alive, vm.status, vm.last_words, observer.told) == (False, 0, "", [])
    assert vm.created > 0


async def test_everybody_is_told_everything_in_the_promised_order(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    temporary = vm.identity.directory / "tmp"
    seen: list[tuple[str, bool, bool]] = []
    waiting = _task(vm.wait())
    observer.look = lambda vm: seen.append((str(vm.state), waiting.done(), temporary.exists()))
    vm.on_death = lambda: observer.told.append(f"over {temporary.exists()} {waiting.done()}")
    await vm.start()
    assert (temporary / "file").exists()
    driver.control.exit(0)
    assert await waiting == (Reason.SHUTDOWN, 0)
    died = "died shutdown 0"
    assert observer.told == [STARTING, PID, RUNNING, DEAD, died, "over False False"]
    assert seen == [
        ("starting", False, False),
        ("starting", False, True),
        ("running", False, True),
        ("dead", False, True),
        ("dead", False, True),
    ]


async def test_values_have_changed_when_the_observer_is_told(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    rows: list[tuple[object, ...]] = []
    observer.look = lambda vm: rows.append(
        (str(vm.state), vm.pid > 0, vm.started > 0, vm.died > 0, vm.reason, vm.status)
    )
    await vm.start()
    driver.control.exit(5)
    await _end(vm)
    assert rows == [
        ("starting", False, False, False, None, 0),
        ("starting", True, False, False, None, 0),
        ("running", True, True, False, None, 0),
        ("dead", False, True, True, Reason.CRASH, 5),
        ("dead", False, True, True, Reason.CRASH, 5),
    ]
    assert vm.created <= vm.started <= vm.died
    assert vm.last_words == "exit status 5"


async def test_pid_is_the_vmms(vm: Machine, driver: FakeDriver) -> None:
    driver.argv[2] = f"echo $$ >&2; {OBEDIENT}"
    await vm.start()
    pid = vm.pid
    driver.control.exit(1)
    await _end(vm)
    assert (vm.last_words, vm.pid) == (str(pid), 0)


async def test_files_are_let_go_when_the_vmm_has_them(vm: Machine) -> None:
    await vm.start()
    assert [file.fd for file in vm.config.files()] == [-1]


async def test_record_and_log_stay_until_remove(vm: Machine, driver: FakeDriver) -> None:
    await vm.start()
    driver.control.exit(0)
    await _end(vm)
    assert sorted(os.listdir(vm.identity.directory)) == ["record.json", "record.old", "told"]
    os.close(vm.open_log())
    vm.remove()
    assert not vm.identity.directory.exists()


@pytest.mark.parametrize(
    ("status", "told", "by_status", "expected"),
    [
        (0, None, {}, "shutdown"),
        (3, None, {}, "crash"),
        (32, None, {32: Reason.REBOOT}, "reboot"),
        (0, Reason.WATCHDOG, {}, "watchdog"),
        (32, Reason.GUEST_PANIC, {32: Reason.REBOOT}, "guest-panic"),
    ],
)
async def test_reason_is_what_the_vmm_said(
    vm: Machine,
    driver: FakeDriver,
    status: int,
    told: Reason | None,
    by_status: dict[int, Reason],
    expected: str,
) -> None:
    driver.told, driver.by_status = told, by_status
    await vm.start()
    driver.control.exit(status)
    assert await _end(vm) == (expected, status)
    assert driver.control.closed == 1


async def test_vmm_that_somebody_else_kills(vm: Machine, observer: Recorder) -> None:
    await vm.start()
    os.kill(vm.pid, signal.SIGTERM)
    assert await _end(vm) == ("signal", -signal.SIGTERM)
    assert vm.last_words == "killed by signal 15"


async def test_every_wait_is_answered_before_and_after_death(
    vm: Machine, driver: FakeDriver
) -> None:
    waits = [_task(vm.wait()) for _ in range(10)]
    await vm.start()
    driver.control.exit(0)
    assert await asyncio.gather(*waits) == [(Reason.SHUTDOWN, 0)] * 10
    assert await _end(vm) == ("shutdown", 0)


async def test_console_ends_with_the_vm(vm: Machine) -> None:
    fd = vm.open_console(1000)
    await vm.start()
    await vm.kill()
    assert os.read(fd, 100) == b""
    os.close(fd)
    with pytest.raises(InvalidState, match="a VM that is dead has no console; its log"):
        vm.open_console(1000)


# Start


async def test_of_two_starts_at_once_one_wins(vm: Machine, observer: Recorder) -> None:
    first, second = await asyncio.gather(vm.start(), vm.start(), return_exceptions=True)
    assert first is None
    assert isinstance(second, InvalidState)
    assert observer.told == [STARTING, PID, RUNNING]


async def test_vm_is_started_once(vm: Machine) -> None:
    await vm.start()
    with pytest.raises(InvalidState, match="that is running can't be started"):
        await vm.start()
    await vm.kill()
    with pytest.raises(InvalidState, match="that is dead can't be started"):
        await vm.start()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/none/vmm"], "could not be started: No such file or directory"),
        (["/etc/passwd"], "could not be started: Permission denied"),
    ],
)
async def test_vmm_that_cannot_be_executed(
    vm: Machine, driver: FakeDriver, observer: Recorder, argv: list[str], says: str
) -> None:
    driver.argv = argv
    assert await _refused(vm.start()) == f"fake: {says}"
    assert (vm.state, vm.last_words) == (State.FAILED, says)
    assert await _end(vm) == ("start-failed", 127)
    assert observer.told == [STARTING, UNBORN, "died start-failed 127"]


async def test_vmm_that_ends_before_it_answers(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    driver.argv[2] = "echo 'no such image' >&2; exit 3"
    driver.before_answer = never
    assert await _refused(vm.start()) == "fake: no such image"
    assert await _end(vm) == ("start-failed", 3)
    assert observer.told == [STARTING, PID, FAILED, "died start-failed 3"]


async def test_vmm_that_ends_in_silence(vm: Machine, driver: FakeDriver) -> None:
    driver.argv[2] = "exit 3"
    driver.before_answer = never
    assert await _refused(vm.start()) == "fake: exit status 3"


@pytest.mark.parametrize(
    ("script", "says", "status"),
    [
        ("echo 'my own words' >&2; exit 3", "my own words", 3),
        (DEAF, "it hung up", KILL),
    ],
)
async def test_vmm_that_hangs_up(
    vm: Machine, driver: FakeDriver, script: str, says: str, status: int
) -> None:
    """Its own last words are better than ours; if it stays, it is killed."""

    async def hang_up() -> None:
        raise ControlFailed("it hung up")

    driver.argv[2], driver.before_answer = script, hang_up
    assert await _refused(vm.start()) == f"fake: {says}"
    assert await _end(vm) == ("start-failed", status)


async def test_vmm_that_never_answers_is_killed(vm: Machine, driver: FakeDriver) -> None:
    _with(vm, start_timeout=SOON)
    driver.before_answer = never
    assert await _refused(vm.start()) == "fake: did not answer in 0.05 s"
    assert await _end(vm) == ("start-failed", KILL)


async def test_start_whose_caller_goes_away_goes_on(vm: Machine, observer: Recorder) -> None:
    starting = _task(vm.start())
    await observer.until(STARTING)
    starting.cancel()
    await observer.until(RUNNING)
    assert vm.state is State.RUNNING


# Kill


async def test_kill(vm: Machine, observer: Recorder) -> None:
    await vm.start()
    await vm.kill()
    assert await _end(vm) == ("killed", KILL)
    assert observer.told == [STARTING, PID, RUNNING, DEAD, f"died killed {KILL}"]


async def test_kill_of_a_vm_that_does_not_run_is_nothing(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    await vm.kill()
    assert (vm.state, observer.told) == (State.NOT_STARTED, [])
    await vm.start()
    driver.control.exit(0)
    await _end(vm)
    await vm.kill()
    assert await _end(vm) == ("shutdown", 0)


async def test_kill_twice_at_once(vm: Machine, observer: Recorder) -> None:
    await vm.start()
    await asyncio.gather(vm.kill(), vm.kill(Reason.REQUESTER_GONE))
    assert observer.told[-2:] == [DEAD, f"died killed {KILL}"]


async def test_kill_in_the_moment_after_death_is_not_why_it_died(
    vm: Machine, driver: FakeDriver
) -> None:
    """The VMM has ended, but the event loop has not been told of it yet."""
    await vm.start()
    driver.control.exit(0)
    os.waitid(os.P_PID, vm.pid, os.WEXITED | os.WNOWAIT)
    await vm.kill()
    assert await _end(vm) == ("shutdown", 0)


async def test_kill_while_files_are_made_ready(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    """There is no process yet, there never will be one, and nobody waits for the files."""
    driver.may_go_on.clear()
    starting = _task(vm.start())
    await asyncio.to_thread(driver.prepared.wait, DEADLINE)
    await _task(vm.kill())
    driver.may_go_on.set()
    assert await _refused(starting) == "fake: ended before it was started"
    assert observer.told == [STARTING, UNBORN, f"died killed {KILL}"]
    left_behind = asyncio.all_tasks() - {asyncio.current_task()}
    if left_behind:
        await asyncio.wait(left_behind, timeout=DEADLINE)


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        (Machine.kill, "killed"),
        (lambda vm: vm.kill(Reason.HANGUP), "hangup"),
        (lambda vm: vm.stop(LONG), "killed"),
        (lambda vm: vm.stop(LONG, Reason.HOST_SHUTDOWN), "host-shutdown"),
    ],
)
async def test_vm_that_starts_is_ended_at_once(
    vm: Machine,
    driver: FakeDriver,
    observer: Recorder,
    verb: Callable[[Machine], Awaitable[None]],
    reason: str,
) -> None:
    driver.before_answer = never
    starting = _task(vm.start())
    await observer.until(PID)
    await _task(verb(vm))
    assert await _refused(starting) == "fake: killed by signal 9"
    assert observer.told == [STARTING, PID, FAILED, f"died {reason} {KILL}"]
    assert driver.control.requests == []


# Stop


async def test_stop_presses_the_power_button_and_returns_after_death(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    await vm.start()
    await vm.stop(LONG)
    assert (vm.state, driver.control.requests) == (State.DEAD, ["power_button"])
    assert observer.told == [STARTING, PID, RUNNING, STOPPING, DEAD, "died stopped 0"]


async def test_stop_of_a_vm_that_was_never_started_is_refused(
    vm: Machine, observer: Recorder
) -> None:
    with pytest.raises(InvalidState, match="that is not-started can't be stopped"):
        await vm.stop(LONG)
    assert (vm.state, observer.told) == (State.NOT_STARTED, [])


async def test_stop_of_a_dead_vm_is_nothing(vm: Machine) -> None:
    await vm.start()
    await vm.kill()
    await vm.stop(LONG)
    assert await _end(vm) == ("killed", KILL)


@pytest.mark.parametrize("error", [NotSupported("none"), ControlFailed("no"), TimedOut("never")])
async def test_stop_without_a_power_button_asks_the_vmm_itself(
    vm: Machine, driver: FakeDriver, error: Exception
) -> None:
    driver.on_power_button = error
    await vm.start()
    await _task(vm.stop(LONG))
    assert driver.control.requests == ["power_button", "quit"]
    assert await _end(vm) == ("stopped", 0)


async def test_stop_out_of_time_first_asks_the_vmm_itself(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    """It ends in good order then, but not the guest: so it counts as killed."""
    driver.on_power_button = None
    await vm.start()
    await _task(vm.stop(SOON))
    assert driver.control.requests == ["power_button", "quit"]
    assert observer.told[-3:] == [STOPPING, DEAD, "died killed 0"]


@pytest.mark.parametrize("on_quit", [None, ControlFailed("no"), RuntimeError("driver")])
@pytest.mark.parametrize("reason", [Reason.STOPPED, Reason.HOST_SHUTDOWN])
async def test_stop_out_of_time_kills_a_vmm_that_does_not_obey(
    vm: Machine, driver: FakeDriver, on_quit: Exception | None, reason: Reason
) -> None:
    driver.on_power_button, driver.on_quit = None, on_quit
    await vm.start()
    await _task(vm.stop(SOON, reason))
    assert await _end(vm) == ("killed" if reason is Reason.STOPPED else "host-shutdown", KILL)


@pytest.mark.parametrize("status", [0, 1])
async def test_guest_that_ends_another_way_while_it_is_stopped(
    vm: Machine, driver: FakeDriver, status: int
) -> None:
    driver.on_power_button, driver.told = status, Reason.GUEST_PANIC
    await vm.start()
    await _task(vm.stop(LONG))
    assert await _end(vm) == ("guest-panic", status)


async def test_second_stop_waits_too(vm: Machine, driver: FakeDriver, observer: Recorder) -> None:
    driver.on_power_button = None
    await vm.start()
    first = _task(vm.stop(LONG))
    await observer.until(STOPPING)
    second = _task(vm.stop(LONG))
    await asyncio.to_thread(int)
    assert not first.done()
    assert not second.done()
    driver.control.exit(0)
    await first
    await second
    assert observer.told[2:] == [RUNNING, STOPPING, DEAD, "died stopped 0"]


async def test_shorter_second_stop_ends_both(vm: Machine, driver: FakeDriver) -> None:
    driver.on_power_button = None
    await vm.start()
    first = _task(vm.stop(LONG))
    await _task(vm.stop(SOON))
    await first
    assert await _end(vm) == ("killed", 0)


async def test_kill_ends_a_stop(vm: Machine, driver: FakeDriver, observer: Recorder) -> None:
    driver.on_power_button = None
    await vm.start()
    stopping = _task(vm.stop(LONG))
    await observer.until(STOPPING)
    await vm.kill()
    await stopping
    assert observer.told[2:] == [RUNNING, STOPPING, DEAD, f"died killed {KILL}"]


async def test_stop_and_kill_at_once_agree(vm: Machine, driver: FakeDriver) -> None:
    driver.on_power_button = None
    await vm.start()
    await asyncio.gather(_task(vm.kill()), _task(vm.stop(LONG)), _task(vm.kill()))
    assert await _end(vm) == ("killed", KILL)


async def test_stop_whose_caller_goes_away_goes_on_for_others(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    driver.on_power_button = None
    await vm.start()
    stopping = _task(vm.stop(LONG))
    await observer.until(STOPPING)
    stopping.cancel()
    await _task(vm.stop(SOON))
    assert vm.state is State.DEAD


# Remove


async def test_remove_of_a_vm_that_was_never_started(vm: Machine) -> None:
    waiting = _task(vm.wait())
    await asyncio.to_thread(int)
    vm.remove()
    with pytest.raises(NoSuchVM, match="guest was removed without having been started"):
        await waiting
    assert not vm.identity.directory.exists()
    assert [file.fd for file in vm.config.files()] == [-1]


async def test_remove_ends_an_open_console(vm: Machine) -> None:
    fd = vm.open_console(1000)
    vm.remove()
    assert os.read(fd, 100) == b""
    os.close(fd)


async def test_remove_of_a_vm_that_is_alive_is_refused(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    driver.on_power_button = None
    connected = asyncio.Event()
    driver.before_answer = connected.wait
    starting = _task(vm.start())
    await observer.until(PID)
    with pytest.raises(InvalidState, match="that is starting can't be removed"):
        vm.remove()
    connected.set()
    await starting
    with pytest.raises(InvalidState, match="that is running can't be removed"):
        vm.remove()
    stopping = _task(vm.stop(LONG))
    await observer.until(STOPPING)
    with pytest.raises(InvalidState, match="that is stopping can't be removed"):
        vm.remove()
    assert vm.identity.directory.exists()
    driver.control.exit(0)
    await stopping


async def test_remove_in_the_moment_of_death(vm: Machine, driver: FakeDriver) -> None:
    """As `collect` does it: nothing of the VM is left, and Wait answers all the same."""
    vm.on_death = vm.remove
    waiting = _task(vm.wait())
    await vm.start()
    driver.control.exit(0)
    assert await waiting == (Reason.SHUTDOWN, 0)
    assert not vm.identity.directory.exists()


# While it runs


SUSPENDED = "changed state=suspended"
RESUMED = "changed state=running"
MIB = 1 << 20


async def test_suspend_and_resume(vm: Machine, driver: FakeDriver, observer: Recorder) -> None:
    await vm.start()
    await vm.suspend()
    await vm.resume()
    assert driver.control.requests == ["suspend", "resume"]
    assert observer.told[3:] == [SUSPENDED, RESUMED]


async def test_suspend_twice_at_once_asks_the_vmm_once(vm: Machine, driver: FakeDriver) -> None:
    await vm.start()
    results = await asyncio.gather(vm.suspend(), vm.suspend(), return_exceptions=True)
    assert [type(each) for each in results] == [type(None), InvalidState]
    assert driver.control.requests == ["suspend"]


async def test_requests_are_made_one_after_the_other(vm: Machine, driver: FakeDriver) -> None:
    await vm.start()
    answered = asyncio.Event()
    driver.before_reply = answered.wait
    asked = [_task(vm.suspend()), _task(vm.resume()), _task(vm.suspend())]
    await asyncio.to_thread(int)
    assert driver.control.requests == ["suspend"]
    answered.set()
    await asyncio.gather(*asked)
    assert driver.control.requests == ["suspend", "resume", "suspend"]
    assert vm.state is State.SUSPENDED


async def test_request_that_fails_changes_nothing(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    driver.on_request = ControlFailed("no")
    await vm.start()
    with pytest.raises(ControlFailed, match="no"):
        await vm.suspend()
    assert (vm.state, observer.told[3:]) == (State.RUNNING, [])
    driver.on_request = None
    await vm.suspend()
    assert vm.state is State.SUSPENDED


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        (Machine.suspend, "can't be suspended; it must be running"),
        (Machine.resume, "can't be resumed; it must be suspended"),
        (
            lambda vm: vm.set_memory_target(64 * MIB),
            "can't have its memory changed; it must be running or suspended",
        ),
        (
            lambda vm: vm.resize_disk(0, 512),
            "can't have a disk resized; it must be running or suspended",
        ),
    ],
)
async def test_what_needs_a_vm_that_runs_is_refused_before_and_after(
    vm: Machine, driver: FakeDriver, verb: Callable[[Machine], Awaitable[None]], says: str
) -> None:
    with pytest.raises(InvalidState, match=f"that is not-started {says}"):
        await verb(vm)
    await vm.start()
    await vm.kill()
    with pytest.raises(InvalidState, match=f"that is dead {says}"):
        await verb(vm)
    assert driver.control.requests == []


async def test_stop_of_a_suspended_vm_first_lets_it_go_on(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    """A guest whose vCPUs stand still doesn't see its power button."""
    await vm.start()
    await vm.suspend()
    await _task(vm.stop(LONG))
    assert driver.control.requests == ["suspend", "resume", "power_button"]
    assert observer.told[3:] == [SUSPENDED, STOPPING, DEAD, "died stopped 0"]


async def test_suspended_vm_can_be_killed(vm: Machine) -> None:
    await vm.start()
    await vm.suspend()
    await _task(vm.kill())
    assert await _end(vm) == ("killed", KILL)


async def test_death_ends_a_request(vm: Machine, driver: FakeDriver) -> None:
    """Whatever the VMM answered, a VM that is dead isn't suspended."""
    await vm.start()
    answered = asyncio.Event()
    driver.before_reply = answered.wait
    suspending = _task(vm.suspend())
    await asyncio.to_thread(int)
    await vm.kill()
    answered.set()
    with pytest.raises(InvalidState, match="that is dead can't be suspended"):
        await suspending
    assert vm.state is State.DEAD


@pytest.mark.parametrize("size", [16 * MIB, 100 * MIB + 1, 256 * MIB])
async def test_memory_target_is_handed_on(vm: Machine, driver: FakeDriver, size: int) -> None:
    await vm.start()
    await vm.set_memory_target(size)
    assert driver.control.requests == [f"set_memory {size}"]


@pytest.mark.parametrize("size", [0, 16 * MIB - 1, 256 * MIB + 1, (1 << 64) - 1])
async def test_memory_target_out_of_range_is_refused(
    vm: Machine, driver: FakeDriver, size: int
) -> None:
    await vm.start()
    says = f"the guest can have {16 * MIB} to {256 * MIB} bytes, not {size}"
    with pytest.raises(InvalidArgs, match=says):
        await vm.set_memory_target(size)
    assert driver.control.requests == []


async def test_memory_of_a_vm_without_a_balloon_stays_as_it_is(
    tmp_path: Path, driver: FakeDriver, observer: Recorder
) -> None:
    with a_config(tmp_path, balloon=False) as config:
        vm = machine(tmp_path, config, driver, observer)
        await vm.start()
        with pytest.raises(NotSupported, match="created without a balloon"):
            await vm.set_memory_target(64 * MIB)
        await vm.kill()
        vm.remove()


async def test_memory_is_what_the_vmm_says(
    vm: Machine, driver: FakeDriver, observer: Recorder
) -> None:
    assert await vm.ask_memory() == 0
    await vm.start()
    assert vm.memory_actual == 256 * MIB
    driver.memory = 200 * MIB
    assert await vm.ask_memory() == 200 * MIB
    driver.control.memory_changed(100 * MIB)
    assert (vm.memory_actual, observer.told[3:]) == (100 * MIB, ["changed memory_actual"] * 2)
    await vm.kill()
    assert await vm.ask_memory() == 0


async def test_memory_is_what_was_last_known_where_the_vmm_does_not_say(
    vm: Machine, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.model.controls._ASK_MEMORY", SOON)
    await vm.start()
    driver.on_request = ControlFailed("no driver")
    assert await vm.ask_memory() == 256 * MIB
    driver.on_request, driver.before_reply = None, never
    assert await _task(vm.ask_memory()) == 256 * MIB


@pytest.fixture
async def vm_with_disks(
    tmp_path: Path, driver: FakeDriver, observer: Recorder
) -> AsyncIterator[Machine]:
    """One disk that is read-only, one of 1 MiB that isn't."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(MIB))
    disks = [
        {"image": str(tmp_path / "one")},
        {"image": str(tmp_path / "two"), "writable": True},
    ]
    with a_config(tmp_path, disks=disks) as config:
        vm = machine(tmp_path, config, driver, observer)
        yield vm
        await vm.kill()
        vm.remove()


async def test_disk_grows(vm_with_disks: Machine, driver: FakeDriver) -> None:
    await vm_with_disks.start()
    image = vm_with_disks.identity.directory.parent / "two"
    for size in (2 * MIB, 2 * MIB + 512):
        await vm_with_disks.resize_disk(1, size)
        os.truncate(image, size)
    with pytest.raises(InvalidArgs, match=f"can only grow; it has {2 * MIB + 512} bytes already"):
        await vm_with_disks.resize_disk(1, 2 * MIB)
    assert driver.control.requests == [
        f"resize_disk 1 {2 * MIB}",
        f"resize_disk 1 {2 * MIB + 512}",
    ]


@pytest.mark.parametrize(
    ("index", "size", "error", "says"),
    [
        (0, 2 * MIB, NotSupported, "disk 0 is read-only"),
        (2, 2 * MIB, InvalidArgs, "there is no disk 2; the VM has 2"),
        (1, 2 * MIB + 1, InvalidArgs, "must be a multiple of 512 bytes"),
        (1, MIB, InvalidArgs, f"a disk can only grow; it has {MIB} bytes already"),
        (1, 0, InvalidArgs, f"a disk can only grow; it has {MIB} bytes already"),
    ],
)
async def test_disk_does_not_grow(
    vm_with_disks: Machine,
    driver: FakeDriver,
    index: int,
    size: int,
    error: type[Exception],
    says: str,
) -> None:
    await vm_with_disks.start()
    with pytest.raises(error, match=says):
        await vm_with_disks.resize_disk(index, size)
    assert driver.control.requests == []


async def test_disk_that_could_not_grow_has_its_old_size(
    vm_with_disks: Machine, driver: FakeDriver
) -> None:
    await vm_with_disks.start()
    driver.on_request = ControlFailed("No space left on device")
    with pytest.raises(ControlFailed):
        await vm_with_disks.resize_disk(1, 4 * MIB)
    driver.on_request = None
    await vm_with_disks.resize_disk(1, 2 * MIB)
    assert driver.control.requests[-1] == f"resize_disk 1 {2 * MIB}"


# Programs beside the VMM; each holds a pipe, whose end says that they are all gone


@pytest.fixture
def helpers(driver: FakeDriver) -> Iterator[int]:
    """Two helpers; gives the reading end."""
    reader, writer = os.pipe()
    for _ in range(2):
        driver.helpers.append(Helper(["/bin/sleep", "1000"], [writer]))
    yield reader
    os.close(writer)
    assert select.select([reader], [], [], DEADLINE)[0]
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.usefixtures("helpers")
async def test_helpers_end_with_their_vmm(vm: Machine, driver: FakeDriver) -> None:
    await vm.start()
    driver.control.exit(0)
    assert await _end(vm) == ("shutdown", 0)


@pytest.mark.usefixtures("helpers")
async def test_helpers_end_where_there_is_no_vmm_after_all(vm: Machine, driver: FakeDriver) -> None:
    driver.argv = ["/none"]
    assert await _refused(vm.start()) == "fake: could not be started: No such file or directory"


@pytest.mark.usefixtures("helpers")
async def test_helpers_end_where_one_of_them_cannot_be_executed(
    vm: Machine, driver: FakeDriver
) -> None:
    driver.helpers.append(Helper(["/none"], []))
    assert await _refused(vm.start()) == "fake: could not be started: No such file or directory"
    assert await _end(vm) == ("start-failed", 127)


async def test_helper_has_the_last_word_where_the_vmm_says_nothing(
    vm: Machine, driver: FakeDriver
) -> None:
    """The helper tells the VMM to end, after what it has said itself."""
    script = "echo first >&2; echo 'no such directory' >&2; echo 1 >\"$1\""
    orders = f"/proc/self/fd/{driver.orders}"
    driver.helpers.append(Helper(["/bin/sh", "-c", script, "sh", orders], [driver.orders]))
    driver.before_answer = never
    assert await _refused(vm.start()) == "fake: no such directory"
    assert await _end(vm) == ("start-failed", 1)


# What fails outside must not leave a VM that is neither alive nor dead


TOLD = [STARTING, PID, RUNNING, DEAD, "died "]


@pytest.mark.parametrize("beginning", [*TOLD, ""], ids=[*TOLD, "everything"])
async def test_observer_that_fails(
    vm: Machine, driver: FakeDriver, observer: Recorder, beginning: str
) -> None:
    observer.fails = lambda what: what.startswith(beginning)
    over: list[State] = []
    vm.on_death = lambda: over.append(vm.state)
    await _task(vm.start())
    driver.control.exit(0)
    assert await _end(vm) == ("shutdown", 0)
    assert observer.told == [STARTING, PID, RUNNING, DEAD, "died shutdown 0"]
    assert over == [State.DEAD]
    assert not (vm.identity.directory / "tmp").exists()


async def test_prepare_that_fails_by_its_driver(vm: Machine, driver: FakeDriver) -> None:
    driver.failures["prepare"] = RuntimeError("secret")
    assert await _refused(vm.start()) == "fake: internal error"
    assert await _end(vm) == ("start-failed", 127)


async def test_prepare_that_fails_by_its_files(vm: Machine, driver: FakeDriver) -> None:
    driver.failures["prepare"] = OSError(28, "No space left on device")
    assert await _refused(vm.start()) == "fake: could not be started: No space left on device"


async def test_vm_that_cannot_be_written_down_is_not_started(
    vm: Machine, observer: Recorder
) -> None:
    """Nobody could find it again; it is as it was before, and may be started later."""
    vm.identity.directory.rmdir()
    says = r"^the VM can't be written down: No such file or directory$"
    with pytest.raises(VMBusError, match=says):
        await vm.start()
    assert (vm.state, observer.told) == (State.NOT_STARTED, [])
    vm.identity.directory.mkdir()
    await vm.start()
    assert observer.told == [STARTING, PID, RUNNING]


async def test_temporary_directory_that_cannot_be_made(vm: Machine) -> None:
    (vm.identity.directory / "tmp").touch()
    assert await _refused(vm.start()) == "fake: could not be started: File exists"
    assert await _end(vm) == ("start-failed", 127)


async def test_vmm_that_cannot_be_written_down_never_runs(
    vm: Machine, driver: FakeDriver, observer: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are there by then, and at the gate: none of them gets to its first line."""
    ran = vm.identity.directory.parent / "ran"
    driver.argv[2] = f"touch {ran}; {OBEDIENT}"
    driver.helpers.append(Helper(["/bin/sh", "-c", f"touch {ran}; exec sleep 1000"], []))
    save = Store.save

    def full(store: Store, record: Record) -> None:
        if record.traces and record.state is State.STARTING:
            raise OSError(28, "No space left on device")
        save(store, record)

    monkeypatch.setattr(Store, "save", full)
    says = "the VM can't be written down: No space left on device"
    assert await _refused(vm.start()) == f"fake: could not be started: {says}"
    assert await _end(vm) == ("start-failed", KILL)
    assert observer.told == [STARTING, UNBORN, f"died start-failed {KILL}"]
    assert not ran.exists()


async def test_vm_that_runs_goes_on_where_it_cannot_be_written_down(
    vm: Machine,
    driver: FakeDriver,
    observer: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is so is so, and told; that it could not be written is logged."""
    await vm.start()

    def full(store: Store, record: Record) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "save", full)
    await vm.suspend()
    await vm.resume()
    await _task(vm.stop(LONG))
    assert observer.told[3:] == [SUSPENDED, RESUMED, STOPPING, DEAD, "died stopped 0"]
    assert "VM guest: the VM can't be written down: No space left on device" in caplog.text


async def test_death_is_known_to_be_told_only_when_it_was(
    vm: Machine, driver: FakeDriver, observer: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observer that never got to tell it leaves it to the next service, and the VM there."""
    monkeypatch.setattr(Machine, "death_was_told", lambda vm: None)
    over: list[State] = []
    vm.on_death = lambda: over.append(vm.state)
    await vm.start()
    driver.control.exit(0)
    await _end(vm)
    told = vm.identity.directory / "told"
    assert (told.exists(), over) == (False, [])
    monkeypatch.undo()
    vm.death_was_told()
    assert (told.exists(), over) == (True, [State.DEAD])


@pytest.mark.parametrize("error", [RuntimeError("driver"), asyncio.CancelledError(), ValueError()])
async def test_connecting_that_fails(vm: Machine, driver: FakeDriver, error: BaseException) -> None:
    async def fail() -> None:
        raise error

    driver.argv[2], driver.before_answer = DEAF, fail
    await _refused(vm.start())
    assert await _end(vm) == ("start-failed", KILL)


@pytest.mark.parametrize("function", ["told_by", "last_words"])
async def test_driver_that_fails_at_the_end(
    vm: Machine, driver: FakeDriver, observer: Recorder, function: str
) -> None:
    driver.failures[function] = RuntimeError("driver")
    await vm.start()
    driver.control.exit(0)
    assert await _end(vm) == ("shutdown", 0)
    assert observer.told[-2:] == [DEAD, "died shutdown 0"]


async def test_control_that_fails_at_the_end(vm: Machine, driver: FakeDriver) -> None:
    driver.told = RuntimeError("driver")
    await vm.start()
    driver.control.exit(0)
    assert await _end(vm) == ("shutdown", 0)


async def test_power_button_that_fails(vm: Machine, driver: FakeDriver) -> None:
    driver.on_power_button = RuntimeError("driver")
    await vm.start()
    await _task(vm.stop(LONG))
    assert driver.control.requests == ["power_button", "quit"]
    assert await _end(vm) == ("stopped", 0)
