"""Processes that may not be our children: which one it is, whether it ended, and how.

A number is no proof of who a process is, since it is given again; a number with the time at which
the process began is, within one boot. A descriptor of a process stays true while it is open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
from pathlib import Path

#: From linux/pidfd.h: the first version of struct pidfd_info, and the flag for its exit_code.
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_SIGNAL_PROCESS_GROUP = 1 << 2
# Places in /proc/PID/stat, counted from what follows the name.
_STATE, _STARTED, _EXIT_CODE = 0, 19, 49


def began(pid: int) -> int:
    """When a process began, in clock ticks since boot. Raises OSError where there is none."""
    return int(_stat(pid)[_STARTED])


def find(pid: int, started: int) -> int | None:
    """A descriptor of the process with that number that began then; None if it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if began(pid) == started:
            return pidfd
    os.close(pidfd)
    return None


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def kill_group(pidfd: int, pid: int) -> None:
    """SIGKILL to the process and all that share its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL, None, _PIDFD_SIGNAL_PROCESS_GROUP)
        except OSError as error:
            if isinstance(error, (ProcessLookupError, PermissionError)):
                raise
            # Before Linux 6.9. While the leader isn't reaped its number is nobody else's.
            if Path(f"/proc/{pid}").exists():
                os.killpg(pid, signal.SIGKILL)


def status(pidfd: int, pid: int, started: int) -> int | None:
    """How a process ended: its exit code, or minus the signal. None where nobody knows any more.

    A child is reaped by this. Of others the kernel tells it until they are reaped, and from Linux
    6.15 on also later, to who had a descriptor of it by then.
    """
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        # It may be reaped between the two looks, and then the first has something to tell.
        for look in (_told_by_pidfd, _told_by_zombie, _told_by_pidfd):
            code = look(pidfd, pid, started)
            if code is not None:
                return os.waitstatus_to_exitcode(code)
        return None
    assert ended is not None
    exited = ended.si_code == os.CLD_EXITED
    return ended.si_status if exited else -ended.si_status


def _told_by_pidfd(pidfd: int, pid: int, started: int) -> int | None:
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, *_, code = _PIDFD_INFO.unpack(info)
    return int(code) if mask & _PIDFD_INFO_EXIT else None


def _told_by_zombie(pidfd: int, pid: int, started: int) -> int | None:
    try:
        fields = _stat(pid)
    except OSError:
        return None
    if fields[_STATE] != "Z" or int(fields[_STARTED]) != started:
        return None
    return int(fields[_EXIT_CODE])


def _stat(pid: int) -> list[str]:
    # The name may have anything in it, parentheses too.
    return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
