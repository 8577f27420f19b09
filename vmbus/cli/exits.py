"""The exit status of `run` and `wait`: how the VM ended."""

from __future__ import annotations

from collections.abc import Mapping

from ..reasons import Reason

#: vmbusctl itself failed, or was used wrongly. A signal that ends it gives 128 and its number.
FAILED = 1
MISUSED = 2
BY_SIGNAL = 128

#: By the reason of death: 0 is the end that somebody wished for, tens group the others.
BY_REASON: Mapping[Reason, int] = {
    Reason.SHUTDOWN: 0,
    Reason.STOPPED: 0,
    # The guest wanted to go on, and a VM starts only once: whoever calls may run it again.
    Reason.REBOOT: 3,
    # The guest's or the VMM's own failure.
    Reason.CRASH: 10,
    Reason.GUEST_PANIC: 11,
    Reason.WATCHDOG: 12,
    Reason.HANGUP: 13,
    # It never ran.
    Reason.START_FAILED: 20,
    # Somebody ended it.
    Reason.KILLED: 30,
    Reason.SIGNAL: 31,
    Reason.REQUESTER_GONE: 32,
    Reason.HOST_SHUTDOWN: 33,
    Reason.UNKNOWN: 40,
}


def exit_status(reason: str) -> int:
    """The exit status for a reason; a newer service may have reasons that are not known here."""
    known = Reason(reason) if reason in list(Reason) else Reason.UNKNOWN
    return BY_REASON[known]


def table() -> str:
    """The exit statuses, for help texts."""
    by_status: dict[int, list[str]] = {}
    for reason, status in BY_REASON.items():
        by_status.setdefault(status, []).append(reason)
    lines = [f"  {status:>3}  {', '.join(reasons)}" for status, reasons in by_status.items()]
    lines.insert(1, f"  {FAILED:>3}  vmbusctl could not do its work")
    lines.insert(2, f"  {MISUSED:>3}  wrong usage")
    lines.append(f"  {BY_SIGNAL}+N  vmbusctl was ended by signal N")
    return "\n".join(["Exit status, by the reason why the VM ended:", *lines])
