"""polkit's text agent, by which whoever sits at the terminal is asked for a password."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator


def is_needed() -> bool:
    """Whether there is somebody to be asked who isn't allowed everything anyway."""
    return os.isatty(0) and os.geteuid() != 0


@contextlib.asynccontextmanager
async def text_agent() -> AsyncIterator[None]:
    """Have polkit ask at the terminal what it asks about this process, unless a desktop does."""
    program = shutil.which("pkttyagent")
    if program is None:
        yield
        return
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = _spawn(program, theirs.fileno())
        try:
            ours.setblocking(False)
            # Its end closes when it is registered, or when it has ended.
            await asyncio.get_running_loop().sock_recv(ours, 1)
            yield
        finally:
            process.terminate()
            # One that reads the terminal in the background is stopped, and can't hear.
            process.send_signal(signal.SIGCONT)
            process.wait()


def _spawn(program: str, notify: int) -> subprocess.Popen[bytes]:
    """It takes what is typed from the terminal, not from stdin; and it ends with us, however."""
    me = ["--process", str(os.getpid())]
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", program, f"--notify-fd={notify}", "--fallback", *me],  # noqa: S607
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(notify,),
    )
