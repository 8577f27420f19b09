"""Run the benchmark below a subreaper, so that whom anybody leaves behind is reaped at once.

Where the first process of a machine reaps late, a service that waits for an orphan to go would seem
slow. What is still there when the benchmark has ended, however it did, is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def under_a_reaper(main: Callable[[], None]) -> None:
    """Run `main` in a child, and exit as it does once nothing of it is left."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        main()
        sys.exit(0)
    # From the terminal it goes to the child, too, which knows what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pidfd = os.pidfd_open(child)
    signal.signal(signal.SIGTERM, lambda *_: signal.pidfd_send_signal(pidfd, signal.SIGKILL))
    ended, status = os.wait()
    while ended != child:
        ended, status = os.wait()
    _end_all()
    sys.exit(abs(os.waitstatus_to_exitcode(status)))


def _end_all() -> None:
    own = os.getpid()
    # Whose parent is killed comes to us, and is killed in the next round.
    while children := Path(f"/proc/{own}/task/{own}/children").read_text().split():
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.wait()
