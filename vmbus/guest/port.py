"""The virtio port by which a guest says how it is, without a network or a vsock."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from .report import Decoder, Report

#: What the port is called in the guest.
NAME = "org.vmbus.notify"
#: The FIFOs' names in a VM's directory of temporary files, as QEMU calls a pair of them.
NOTIFY = "notify"
NOTIFY_INPUT, NOTIFY_OUTPUT = f"{NOTIFY}.in", f"{NOTIFY}.out"

#: A guest that never stops talking is heard so many bytes at once, and so many seconds apart.
CHUNK = 4096
PAUSE = 0.05


class Port:
    """Our end of one VM's port, by a FIFO in `directory` that outlives us. Nothing is answered.

    hear: called with what the guest said.
    """

    def __init__(self, directory: Path, hear: Callable[[Report], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._directory = directory
        self._hear = hear
        self._decoder = Decoder()
        self._fifo = -1
        self._pause: asyncio.TimerHandle | None = None

    def plug(self) -> None:
        """Make the FIFOs and open our end. Raises OSError."""
        for name in (NOTIFY_INPUT, NOTIFY_OUTPUT):
            os.mkfifo(self._directory / name, 0o600)
        self.plug_again()

    def plug_again(self) -> None:
        """Open our end of a FIFO that was there before us. Raises OSError."""
        # For writing too, so that it never comes to an end, whoever else goes.
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        self._fifo = os.open(self._directory / NOTIFY_OUTPUT, flags)
        self._catch_up()
        self._listen()

    def drain(self) -> None:
        """Hear what a guest that has ended left behind, however it is cut."""
        if self._fifo >= 0:
            self._catch_up()
            self._hear(self._decoder.end())

    def close(self) -> None:
        """Listen no more; what wasn't heard is left to the next service."""
        if self._fifo >= 0:
            self._loop.remove_reader(self._fifo)
            os.close(self._fifo)
            self._fifo = -1
        if self._pause is not None:
            self._pause.cancel()

    def _catch_up(self) -> None:
        # No more than it can hold, or who writes to it all the time would keep us here.
        for _ in range(fcntl.fcntl(self._fifo, fcntl.F_GETPIPE_SZ) // CHUNK):
            if not self._read():
                break

    def _listen(self) -> None:
        self._loop.add_reader(self._fifo, self._listen_later)

    def _listen_later(self) -> None:
        self._loop.remove_reader(self._fifo)
        self._pause = self._loop.call_later(PAUSE, self._listen)
        self._read()

    def _read(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._hear(self._decoder.feed(os.read(self._fifo, CHUNK)))
            return True
        return False
