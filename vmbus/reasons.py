"""Why a VM died: the names, and the pure functions that tell them apart."""

from __future__ import annotations

import enum
import signal


class Reason(enum.StrEnum):
    """The values of DeathReason and of Died."""

    SHUTDOWN = "shutdown"
    REBOOT = "reboot"
    CRASH = "crash"
    GUEST_PANIC = "guest-panic"
    WATCHDOG = "watchdog"
    STOPPED = "stopped"
    KILLED = "killed"
    START_FAILED = "start-failed"
    HANGUP = "hangup"
    REQUESTER_GONE = "requester-gone"
    HOST_SHUTDOWN = "host-shutdown"
    SIGNAL = "signal"
    UNKNOWN = "unknown"


#: Signals that a process brings on itself; anything else was sent by somebody.
_OWN_FAULTS = frozenset(
    {
        -signal.SIGABRT,
        -signal.SIGSEGV,
        -signal.SIGBUS,
        -signal.SIGILL,
        -signal.SIGFPE,
        -signal.SIGSYS,
        -signal.SIGTRAP,
    }
)
#: Ways to end that a guest chooses in good order.
_CHOSEN = frozenset({Reason.SHUTDOWN, Reason.REBOOT})
#: Ways to end that leave nothing to explain.
ORDERLY = frozenset({Reason.SHUTDOWN, Reason.REBOOT, Reason.STOPPED})


def death_reason(
    status: int | None,
    *,
    told: Reason | None,
    ran: bool,
    asked_for: Reason | None,
    killed_for: Reason | None,
) -> Reason:
    """Tell why a VMM ended.

    status: its exit code, or minus the signal that ended it; None where nobody knows. told: what
    the VMM said of its end, by its exit code or its own protocol. ran: whether the VM ever ran.
    asked_for: why it was asked to end in good order, if it was. killed_for: why it was, or was
    about to be, sent SIGKILL.
    """
    if status is None:
        # What was begun with it has most likely come to its end.
        unseen = asked_for or (Reason.UNKNOWN if ran else Reason.START_FAILED)
        return told or killed_for or unseen
    if killed_for is not None and status == -signal.SIGKILL:
        return killed_for
    if not ran:
        return Reason.START_FAILED
    if status < 0 and told is None:
        return Reason.CRASH if status in _OWN_FAULTS else Reason.SIGNAL
    reason = told or (Reason.SHUTDOWN if status == 0 else Reason.CRASH)
    if asked_for is not None and reason in _CHOSEN:
        # Out of time, it may still have gone by the VMM's own stop, in the moment before SIGKILL.
        return killed_for or asked_for
    return reason


def obituary(status: int | None) -> str:
    """What to say of a VMM that said nothing itself."""
    if status is None:
        return "it ended while the service was away"
    if status == 0:
        return ""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
