"""A guest's console: one stream from the VMM, a bounded log, and any number of readers.

Nobody slows anybody else: a reader whose socket is full loses its own data, never the guest's or
another's, and keeps nothing in our memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_CHUNK = 64 * 1024


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
        try:
            for start in range(0, len(data), self._half):
                self._append(data[start : start + self._half])
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s: %s; part of it is lost", self._newer, error.strerror)

    def snapshot(self) -> int:
        """A read-only descriptor, the caller's to close, of all that is kept now."""
        copy = os.memfd_create("console-log", os.MFD_CLOEXEC)
        try:
            for path in (self._older, self._newer):
                if path.exists():
                    os.write(copy, path.read_bytes())
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
    """The console of one VM."""

    def __init__(self, log: BoundedLog) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._vmm: socket.socket | None = None
        self._readers: set[socket.socket] = set()
        self._closed: dict[socket.socket, Callable[[], None]] = {}
        self._silent: set[socket.socket] = set()
        self._input = b""

    def plug(self) -> socket.socket:
        """Make the stream to the VMM. Returns the VMM's end, the caller's to close."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._vmm = ours
        self._loop.add_reader(ours.fileno(), self._from_guest)
        return theirs

    def attach(self, closed: Callable[[], None] = lambda: None) -> socket.socket:
        """A stream joined to the console, both ways. Returns the reader's end, to be closed.

        closed: called when the stream has ended, or could not be made.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            closed()
            raise
        ours.setblocking(False)
        for reader in list(self._silent):
            # One that only listened and has left is noticed nowhere else while the guest is quiet.
            if _hung_up(reader):
                self._detach(reader)
        self._readers.add(ours)
        self._closed[ours] = closed
        if not self._input:
            self._loop.add_reader(ours.fileno(), self._from_reader, ours)
        return theirs

    def open_log(self) -> int:
        """See BoundedLog.snapshot."""
        return self._log.snapshot()

    def close(self) -> None:
        """Take what the VMM left behind, then end the stream for everybody."""
        if self._vmm is not None:
            while self._from_guest():
                pass
            self._unplug()
        for reader in list(self._readers):
            self._detach(reader)
        self._log.close()

    def _from_guest(self) -> bool:
        if self._vmm is None:
            return False
        try:
            data = self._vmm.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._unplug()
            return False
        self._log.write(data)
        for reader in list(self._readers):
            self._give(reader, data)
        return True

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
        if self._vmm is None:
            return
        self._input += data
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
        if self._vmm is None:
            return
        try:
            self._input = self._input[self._vmm.send(self._input) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._input = b""
        if self._input:
            self._loop.add_writer(self._vmm.fileno(), self._to_guest)
            for reader in self._readers:
                self._loop.remove_reader(reader.fileno())
        elif self._loop.remove_writer(self._vmm.fileno()):
            for reader in self._readers - self._silent:
                self._loop.add_reader(reader.fileno(), self._from_reader, reader)

    def _detach(self, reader: socket.socket) -> None:
        self._readers.discard(reader)
        self._silent.discard(reader)
        self._loop.remove_reader(reader.fileno())
        reader.close()
        self._closed.pop(reader)()

    def _unplug(self) -> None:
        if self._vmm is not None:
            self._loop.remove_reader(self._vmm.fileno())
            self._loop.remove_writer(self._vmm.fileno())
            self._vmm.close()
            self._vmm = None


def _hung_up(stream: socket.socket) -> bool:
    """Whether the other end is closed altogether, not only for what it would say."""
    poll = select.poll()
    poll.register(stream, 0)
    return bool(poll.poll(0))
