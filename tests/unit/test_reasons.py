"""Why a VM died, from all that can be known of its end."""

from __future__ import annotations

import signal

import pytest

from vmbus.reasons import Reason, death_reason, obituary

KILL, TERM = -signal.SIGKILL, -signal.SIGTERM
OWN_FAULTS = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGSYS", "SIGTRAP")
SENT = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGPIPE", "SIGXFSZ")
R = Reason


def test_names_are_those_of_the_contract() -> None:
    names = (
        "shutdown reboot crash guest-panic watchdog stopped killed start-failed hangup "
        "requester-gone host-shutdown signal unknown"
    )
    assert [str(reason) for reason in Reason] == names.split()


@pytest.mark.parametrize(
    ("status", "told", "asked_for", "killed_for", "expected"),
    [
        # Nobody wanted it to end: what the VMM said, and else what its exit code means to anybody.
        (0, None, None, None, "shutdown"),
        (1, None, None, None, "crash"),
        (255, None, None, None, "crash"),
        (0, R.SHUTDOWN, None, None, "shutdown"),
        (32, R.REBOOT, None, None, "reboot"),
        (0, R.REBOOT, None, None, "reboot"),
        (34, R.GUEST_PANIC, None, None, "guest-panic"),
        (0, R.GUEST_PANIC, None, None, "guest-panic"),
        (36, R.WATCHDOG, None, None, "watchdog"),
        (0, R.SIGNAL, None, None, "signal"),
        # Stop was asked, and it ended in good order.
        (0, None, R.STOPPED, None, "stopped"),
        (0, R.SHUTDOWN, R.STOPPED, None, "stopped"),
        (32, R.REBOOT, R.STOPPED, None, "stopped"),
        (0, R.SHUTDOWN, R.HOST_SHUTDOWN, None, "host-shutdown"),
        # Stop was asked, but that isn't how it ended.
        (1, None, R.STOPPED, None, "crash"),
        (34, R.GUEST_PANIC, R.STOPPED, None, "guest-panic"),
        (36, R.WATCHDOG, R.STOPPED, None, "watchdog"),
        (0, R.GUEST_PANIC, R.HOST_SHUTDOWN, None, "guest-panic"),
        (-signal.SIGSEGV, None, R.STOPPED, None, "crash"),
        # It said how the VM ended, and then killed itself with its own children.
        (KILL, R.SHUTDOWN, None, None, "shutdown"),
        (KILL, R.GUEST_PANIC, None, None, "guest-panic"),
        (KILL, R.SHUTDOWN, R.STOPPED, None, "stopped"),
        # Somebody else, the OOM killer say, was quicker than the power button.
        (KILL, None, R.STOPPED, None, "signal"),
        (TERM, None, R.STOPPED, None, "signal"),
        # Kill was asked.
        (KILL, None, None, R.KILLED, "killed"),
        (KILL, R.SHUTDOWN, None, R.KILLED, "killed"),
        # Stop was out of time: by SIGKILL, or by the VMM's own stop just before it.
        (KILL, None, R.STOPPED, R.KILLED, "killed"),
        (0, None, R.STOPPED, R.KILLED, "killed"),
        (0, R.SHUTDOWN, R.STOPPED, R.KILLED, "killed"),
        (KILL, None, R.HOST_SHUTDOWN, R.HOST_SHUTDOWN, "host-shutdown"),
        (0, R.SHUTDOWN, R.HOST_SHUTDOWN, R.HOST_SHUTDOWN, "host-shutdown"),
        (34, R.GUEST_PANIC, R.STOPPED, R.KILLED, "guest-panic"),
        (TERM, None, R.STOPPED, R.KILLED, "signal"),
        (-signal.SIGABRT, None, R.STOPPED, R.KILLED, "crash"),
        # Other causes than a caller's Kill keep their names.
        (KILL, None, None, R.HANGUP, "hangup"),
        (KILL, None, None, R.REQUESTER_GONE, "requester-gone"),
    ],
)
def test_reason_of_a_vm_that_ran(
    status: int,
    told: Reason | None,
    asked_for: Reason | None,
    killed_for: Reason | None,
    expected: str,
) -> None:
    reason = death_reason(status, told=told, ran=True, asked_for=asked_for, killed_for=killed_for)
    assert reason == expected


@pytest.mark.parametrize("told", [None, R.SHUTDOWN, R.CRASH, R.GUEST_PANIC, R.REBOOT])
@pytest.mark.parametrize("status", [0, 1, 32, 34, 35, 127, KILL, TERM, -signal.SIGSEGV])
def test_vmm_that_ended_before_the_vm_ran_failed_to_start(status: int, told: Reason | None) -> None:
    reason = death_reason(status, told=told, ran=False, asked_for=None, killed_for=None)
    assert reason == "start-failed"


@pytest.mark.parametrize("why", [R.KILLED, R.STOPPED, R.HOST_SHUTDOWN, R.REQUESTER_GONE])
def test_vm_killed_before_it_ran_did_not_fail_to_start(why: Reason) -> None:
    assert death_reason(KILL, told=None, ran=False, asked_for=None, killed_for=why) is why


@pytest.mark.parametrize("status", [0, 1, 127, TERM])
def test_vmm_that_failed_to_start_by_itself_just_before_it_was_killed(status: int) -> None:
    reason = death_reason(status, told=None, ran=False, asked_for=None, killed_for=R.KILLED)
    assert reason == "start-failed"


@pytest.mark.parametrize("ran_asked", [None, R.STOPPED, R.HOST_SHUTDOWN])
@pytest.mark.parametrize("name", OWN_FAULTS)
def test_own_fault_is_a_crash(name: str, ran_asked: Reason | None) -> None:
    status = -signal.Signals[name]
    assert (
        death_reason(status, told=None, ran=True, asked_for=ran_asked, killed_for=None) == "crash"
    )


@pytest.mark.parametrize("name", SENT)
def test_signal_that_nobody_here_sent_is_a_signal(name: str) -> None:
    status = -signal.Signals[name]
    assert death_reason(status, told=None, ran=True, asked_for=None, killed_for=None) == "signal"


@pytest.mark.parametrize(
    ("told", "asked_for", "killed_for", "expected"),
    [
        (None, None, None, "unknown"),
        (R.REBOOT, None, None, "reboot"),
        (R.GUEST_PANIC, R.STOPPED, R.KILLED, "guest-panic"),
        (None, R.STOPPED, None, "stopped"),
        (None, R.HOST_SHUTDOWN, None, "host-shutdown"),
        (None, R.STOPPED, R.KILLED, "killed"),
        (None, None, R.REQUESTER_GONE, "requester-gone"),
    ],
)
def test_end_that_nobody_saw_is_what_was_under_way(
    told: Reason | None, asked_for: Reason | None, killed_for: Reason | None, expected: str
) -> None:
    reason = death_reason(None, told=told, ran=True, asked_for=asked_for, killed_for=killed_for)
    assert reason == expected


def test_vm_that_never_ran_and_whose_end_nobody_saw_failed_to_start() -> None:
    reason = death_reason(None, told=None, ran=False, asked_for=None, killed_for=None)
    assert reason == "start-failed"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (None, "it ended while the service was away"),
        (0, ""),
        (3, "exit status 3"),
        (KILL, "killed by signal 9"),
    ],
)
def test_what_is_said_of_a_vmm_that_said_nothing(status: int | None, says: str) -> None:
    assert obituary(status) == says
