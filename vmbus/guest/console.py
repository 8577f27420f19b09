"""A guest's console: one stream from the VMM, a bounded log, and any number of readers.

Nobody slows anybody else: a reader whose socket is full loses its own data, never the guest's or
another's, and keeps nothing in our memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

#: The FIFOs' names in a VM's directory of temporary files, as QEMU calls a pair of them.
CONSOLE = "console"
INPUT, OUTPUT = f"{CONSOLE}.in", f"{CONSOLE}.out"
#: Bytes that the output's FIFO holds: what may be printed between two reads, or while the service
#: is away. The kernel grants a user 64 MiB in all FIFOs; so there is room for about 500 VMs, and
#: those beyond have smaller ones.
_ROOM = 128 * 1024
#: Seconds between two reads of a console. So a guest that prints without end costs 100 reads a
#: second and no more, and its FIFO isn't full below 12 MB/s, which no serial port reaches.
_PAUSE = 0.01
_CHUNK = 64 * 1024
#: Both ways, so that neither end has to have another, or ever comes to one.
_BOTH = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
_LOST = b"\r\n[vmbus: while the service was away, some of the output was lost]\r\n"


class BoundedLog:
    """A log of at most `limit` bytes in two files; when the newer is full it becomes the older."""

    def __init__(self, path: Path, limit: int) -> None:
        self._newer = path
        self._older = path.with_suffix(".old")
        self._half = limit // 2
        self._fd = -1
        self._size = 0
        self._failed = False

    def write(self, data: bytes) -> None:
        """Append, dropping the oldest. Where the disk is full, the new is dropped."""
        newest = data[-2 * self._half :]
        try:
            for start in range(0, len(newest), self._half):
                self._append(newest[start : start + self._half])
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s: %s; part of it is lost", self._newer, error.strerror)

    def snapshot(self) -> int:
        """A read-only descriptor, the caller's to close, of all that is kept now."""
        copy = os.memfd_create("console-log", os.MFD_CLOEXEC)
        try:
            for path in (self._older, self._newer):
                with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
                    while os.sendfile(copy, file.fileno(), None, 1 << 30):
                        pass
            return os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(copy)

    def close(self) -> None:
        """Close the file; what is in it stays, and a later write goes on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, data: bytes) -> None:
        if self._fd < 0:
            self._open()
        if self._size + len(data) > self._half:
            self.close()
            os.replace(self._newer, self._older)
            self._open()
        self._size += os.write(self._fd, data)

    def _open(self) -> None:
        self._fd = os.open(
            self._newer, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._size = os.fstat(self._fd).st_size


class Console:
    """The console of one VM. It comes and goes by two FIFOs in `directory`, which outlive us."""

    def __init__(self, log: BoundedLog, directory: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._directory = directory
        self._output = -1
        self._input = -1
        self._is_held = False
        self._readers: set[socket.socket] = set()
        self._closed: dict[socket.socket, Callable[[], None]] = {}
        self._silent: set[socket.socket] = set()
        self._typed = b""
        self._pause: asyncio.TimerHandle | None = None

    def plug(self) -> None:
        """Make the FIFOs and open our ends. Raises OSError."""
        for name in (INPUT, OUTPUT):
            os.mkfifo(self._directory / name, 0o600)
        self._open()
        self._open_input()
        # Refused where the user has too much in FIFOs already; what they have will do then.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._input, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, _ROOM)

    def plug_again(self) -> None:
        """Open our end of a FIFO that was there before us. Raises OSError."""
        self._open()
        if _is_full(self._output):
            self._take()
            self._log.write(_LOST)

    def answered(self) -> None:
        """The VMM has its own ends open by now: what nobody types into need not be open here."""
        self._is_held = True
        self._rest()

    def _rest(self) -> None:
        if self._is_held and self._input >= 0 and not self._readers and not self._typed:
            os.close(self._input)
            self._input = -1

    def _open(self) -> None:
        self._output = os.open(self._directory / OUTPUT, _BOTH)
        self._loop.add_reader(self._output, self._from_guest)
        if self._readers:
            self._open_input()

    def _open_input(self) -> None:
        if self._output >= 0 and self._input < 0:
            self._input = os.open(self._directory / INPUT, _BOTH)

    def attach(self, closed: Callable[[], None] = lambda: None) -> socket.socket:
        """A stream joined to the console, both ways. Returns the reader's end, to be closed.

        closed: called when the stream has ended, or could not be made.
        """
        for reader in list(self._silent):
            # One that only listened and has left is noticed nowhere else while the guest is quiet.
            if _hung_up(reader):
                self._detach(reader)
        try:
            self._open_input()
            ours, theirs = socket.socketpair()
        except OSError:
            self._rest()
            closed()
            raise
        ours.setblocking(False)
        self._readers.add(ours)
        self._closed[ours] = closed
        if not self._typed:
            self._loop.add_reader(ours.fileno(), self._from_reader, ours)
        return theirs

    def open_log(self) -> int:
        """See BoundedLog.snapshot."""
        return self._log.snapshot()

    def close(self) -> None:
        """Take what the VMM left behind, then end the stream for everybody."""
        if self._output >= 0:
            self._take()
        self._unplug()
        for reader in list(self._readers):
            self._detach(reader)
        self._log.close()

    def _from_guest(self) -> None:
        """Take what there is, and then let some gather: a byte costs as much as thousands do."""
        self._take()
        self._loop.remove_reader(self._output)
        self._pause = self._loop.call_later(_PAUSE, self._listen)

    def _listen(self) -> None:
        self._loop.add_reader(self._output, self._from_guest)

    def _take(self) -> None:
        """Read all that the FIFO can hold, and hand it on."""
        try:
            data = os.read(self._output, _ROOM)
        except BlockingIOError:
            return
        self._log.write(data)
        for reader in list(self._readers):
            self._give(reader, data)

    def _give(self, reader: socket.socket, data: bytes) -> None:
        try:
            reader.send(data)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._detach(reader)

    def _from_reader(self, reader: socket.socket) -> None:
        try:
            data = reader.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._no_more_input(reader)
            return
        if self._input < 0:
            return
        self._typed += data
        self._to_guest()

    def _no_more_input(self, reader: socket.socket) -> None:
        """A reader that has nothing more to say may still want to listen."""
        if _hung_up(reader):
            self._detach(reader)
        else:
            self._silent.add(reader)
            self._loop.remove_reader(reader.fileno())

    def _to_guest(self) -> None:
        """Write what readers typed; while the guest doesn't take it, nobody's typing is read."""
        if self._input < 0:
            return
        with contextlib.suppress(BlockingIOError):
            self._typed = self._typed[os.write(self._input, self._typed) :]
        if self._typed:
            self._loop.add_writer(self._input, self._to_guest)
            for reader in self._readers:
                self._loop.remove_reader(reader.fileno())
        elif self._loop.remove_writer(self._input):
            for reader in self._readers - self._silent:
                self._loop.add_reader(reader.fileno(), self._from_reader, reader)
            self._rest()

    def _detach(self, reader: socket.socket) -> None:
        self._readers.discard(reader)
        self._silent.discard(reader)
        self._loop.remove_reader(reader.fileno())
        reader.close()
        self._rest()
        self._closed.pop(reader)()

    def _unplug(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        for fd in (self._output, self._input):
            if fd >= 0:
                self._loop.remove_reader(fd)
                self._loop.remove_writer(fd)
                os.close(fd)
        self._output = self._input = -1


def _is_full(fifo: int) -> bool:
    """Whether a FIFO holds so much that something may not have fitted in any more."""
    poll = select.poll()
    poll.register(fifo, select.POLLOUT)
    return not poll.poll(0)


def _hung_up(stream: socket.socket) -> bool:
    """Whether the other end is closed altogether, not only for what it would say."""
    poll = select.poll()
    poll.register(stream, 0)
    return bool(poll.poll(0))
