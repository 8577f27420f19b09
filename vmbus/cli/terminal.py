"""The standard streams, never blocking; and a terminal while it is the guest's, and afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Any

STDIN, STDOUT = 0, 1
#: What a pipe that is ready for writing takes at once.
_PIPE_BUF = 4096
_CHUNK = 64 * 1024
_OTHER_SCREEN = re.compile(rb"\x1b\[\?(?:47|1047|1049)([hl])")
_LEAVE_OTHER_SCREEN = b"\x1b[?1049l"
# A soft reset, which shows the cursor and ends colours; lines wrap; no reports of the mouse, of the
# focus, or of what is pasted.
_SET_RIGHT = b"\x1b[!p\x1b[?7h\x1b[?1000;1002;1003;1004;1006;2004l"


def takes_keys() -> bool:
    """Whether stdin is a terminal, which then is the guest's."""
    return os.isatty(STDIN)


def in_foreground() -> bool:
    """Whether the terminal is ours to read; a job in the background would be stopped by it."""
    try:
        return os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError:
        return True


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Hand the terminal's keys on as they are typed. It is set back however this ends."""
    before = termios.tcgetattr(STDIN)
    # Waiting for output to be shown, as TCSADRAIN does, would last as long as nobody looks.
    tty.setraw(STDIN, termios.TCSANOW)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSANOW, before)


async def read() -> bytes:
    """What comes next on stdin; nothing at its end."""
    loop = asyncio.get_running_loop()
    await _ready(STDIN, loop.add_reader, loop.remove_reader)
    try:
        return os.read(STDIN, _CHUNK)
    except OSError:
        return b""


async def write(data: bytes) -> None:
    """Write to stdout without ever holding up the event loop, so that signals are heard."""
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        await _ready(STDOUT, loop.add_writer, loop.remove_writer)
        view = view[os.write(STDOUT, view[:_PIPE_BUF]) :]


async def _ready(fd: int, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
    """Wait until a descriptor can be read or written; what epoll refuses always can."""
    ready = asyncio.Event()
    try:
        add(fd, ready.set)
    except PermissionError:
        await asyncio.sleep(0)
        return
    try:
        await ready.wait()
    finally:
        remove(fd)


class Screen:
    """What a guest, all of whose output is shown, has done to the terminal."""

    def __init__(self) -> None:
        self._steered = False
        self._on_other = False
        self._tail = b""
        self._column_0 = True

    async def show(self, data: bytes) -> None:
        """Show what the guest printed."""
        await write(data)
        self._column_0 = data.endswith(b"\n")
        if self._steered or b"\x1b" in data:
            self._steered = True
            recent = self._tail + data
            for match in _OTHER_SCREEN.finditer(recent):
                self._on_other = match[1] == b"h"
            self._tail = recent[-len(_LEAVE_OTHER_SCREEN) :]

    async def leave(self) -> None:
        """Undo what the guest did, if this is a terminal at all."""
        if os.isatty(STDOUT):
            await write(
                (_LEAVE_OTHER_SCREEN if self._on_other else b"")
                + (_SET_RIGHT if self._steered else b"")
                + (b"" if self._column_0 else b"\r\n")
            )
