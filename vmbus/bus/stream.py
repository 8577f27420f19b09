"""Whole messages in and out of the bus socket, on the event loop, with bounds.

Reading cuts the byte stream into messages and gives each its own file descriptors; writing keeps
what the socket doesn't take and goes on when it does. While more than `HIGH_WATER` bytes wait to be
written nothing is read, so that a caller who never reads its replies can't make us grow.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from .layout import FIXED_HEADER, MAX_ARRAY, MAX_MESSAGE, UNIX_FDS
from .unmarshal import header_fields, long_text

#: Largest call or signal that is taken from the bus, in bytes: nothing in the contract needs more,
#: and decoding may take two hundred times that in memory. Replies are what somebody asked for.
MAX_INCOMING = 128 * 1024
#: Most file descriptors that may come with one message.
MAX_FDS = 16
HIGH_WATER = 4 * 1024 * 1024
LOW_WATER = 1024 * 1024
#: Bytes that may wait to be written before a bus that doesn't read counts as gone.
OVERFLOW = 128 * 1024 * 1024
_CHUNK = 64 * 1024
_FRAMES_PER_TURN = 32
_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)
_REPLIES = (2, 3)


class Frame:
    """One message as it came: its bytes, its descriptors, and whether its body was left out."""

    __slots__ = ("data", "fds", "oversized")

    def __init__(self, data: bytes, fds: list[int], oversized: bool) -> None:
        self.data = data
        self.fds = fds
        self.oversized = oversized

    def close_fds(self) -> None:
        """Close the descriptors that nobody claimed."""
        while self.fds:
            os.close(self.fds.pop())


class MessageStream:
    """The socket of one connection, as messages. `on_frame` owns the frames it is given."""

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[Frame], None],
        on_close: Callable[[Exception | None], None],
    ) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._on_close = on_close
        self._closed = False
        self._in = bytearray()
        self._in_fds: deque[int] = deque()
        self._skip = 0
        self._shortened = False
        self._reading = False
        self._delivering = False
        self._out: deque[tuple[bytes, Sequence[int], Callable[[], None] | None]] = deque()
        self._out_offset = 0
        self._out_bytes = 0
        self._flushing = False
        self._stuck = False
        self._full = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._resume_reading()

    @property
    def closed(self) -> bool:
        """Whether it is, on either side."""
        return self._closed

    # Reading

    def _resume_reading(self) -> None:
        if not self._reading and not self._full and not self._closed:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def _pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                _CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error)
            return
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._in_fds.extend(fds)
        if not data:
            self.close(ConnectionResetError("the bus closed the connection"))
            return
        if flags & socket.MSG_CTRUNC:
            self.close(ConnectionError("descriptors from the bus were lost: too many are open"))
            return
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._in += data
        self._deliver()

    def _deliver(self) -> None:
        """Hand over what is complete, a few messages a turn, so that others get theirs."""
        self._delivering = False
        for _ in range(_FRAMES_PER_TURN):
            if self._closed or self._full:
                return
            frame = self._next_frame()
            if frame is None:
                self._resume_reading()
                return
            self._on_frame(frame)
        self._pause_reading()
        self._deliver_later()

    def _deliver_later(self) -> None:
        if not self._delivering:
            self._delivering = True
            self._loop.call_soon(self._deliver)

    def _next_frame(self) -> Frame | None:
        if len(self._in) < FIXED_HEADER:
            return None
        order = "<" if self._in[0] == ord("l") else ">"
        (body,) = struct.unpack_from(order + "I", self._in, 4)
        (fields,) = struct.unpack_from(order + "I", self._in, 12)
        head = FIXED_HEADER + fields + (-fields & 7)
        size = head + body
        if head > MAX_INCOMING:
            return self._next_frame() if self._shorten_header(order, fields) else None
        oversized = size > (MAX_MESSAGE if self._in[1] in _REPLIES else MAX_INCOMING)
        oversized = oversized or self._shortened
        wanted = head if oversized else size
        if len(self._in) < wanted:
            return None
        data = bytes(self._in[:wanted])
        self._shortened = False
        if oversized:
            self._skip = size - min(size, len(self._in))
            del self._in[:size]
        else:
            del self._in[:wanted]
        return Frame(data, self._fds_of(data), oversized)

    def _shorten_header(self, order: str, fields: int) -> bool:
        """Cut a path out that makes the header large: the rest says whose message is refused.

        False: not yet, or not possible, and then the stream is closed.
        """
        known = bytes(self._in[:MAX_INCOMING])
        found = long_text(known)
        if found is None and len(known) < MAX_INCOMING and fields <= MAX_ARRAY:
            return False
        at, size = found or (0, 0)
        cut = size & ~7  # so that all behind it stays aligned
        if not 0 < cut <= fields:
            head = FIXED_HEADER + fields
            self.close(ConnectionError(f"the bus sent a message header of {head} bytes"))
            return False
        struct.pack_into(order + "I", self._in, 12, fields - cut)
        struct.pack_into(order + "I", self._in, at, size - cut)
        text = at + 4
        self._skip = max(0, text + cut - len(self._in))
        del self._in[text : text + cut]
        self._shortened = True
        return True

    def _fds_of(self, data: bytes) -> list[int]:
        if not self._in_fds:
            return []
        count = header_fields(data).get(UNIX_FDS, 0)
        return [self._in_fds.popleft() for _ in range(min(count, len(self._in_fds)))]

    # Writing

    def write(
        self, data: bytes, fds: Sequence[int] = (), sent: Callable[[], None] | None = None
    ) -> None:
        """Queue one encoded message; `sent` is called once, when it is written or lost."""
        if self._closed:
            if sent is not None:
                sent()
            return
        self._out.append((data, fds, sent))
        self._out_bytes += len(data)
        self._empty.clear()
        if self._out_bytes > OVERFLOW:
            self.close(ConnectionError("the bus has stopped reading"))
            return
        if self._out_bytes > HIGH_WATER:
            self._full = True
            self._pause_reading()
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    async def flush(self) -> None:
        """Wait until everything queued is written, or the connection is gone."""
        await self._empty.wait()

    def _flush(self) -> None:
        if self._closed:
            return
        try:
            while self._out:
                self._write_some()
        except (BlockingIOError, InterruptedError):
            if not self._stuck:
                self._stuck = True
                self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        except OSError as error:
            self.close(error)
            return
        if self._stuck:
            self._stuck = False
            self._loop.remove_writer(self._sock.fileno())
        self._flushing = False

    def _write_some(self) -> None:
        """One system call: as many messages as go together, or one that carries descriptors."""
        data, fds, _ = self._out[0]
        if fds and self._out_offset == 0:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            self._account(self._sock.sendmsg([data], [rights]))
            return
        batch: list[bytes | memoryview] = [memoryview(data)[self._out_offset :]]
        size = len(batch[0])
        for position in range(1, len(self._out)):
            data, fds, _ = self._out[position]
            if fds or size > _CHUNK or len(batch) >= 64:
                break
            batch.append(data)
            size += len(data)
        self._account(self._sock.sendmsg(batch))

    def _account(self, written: int) -> None:
        self._out_bytes -= written
        written += self._out_offset
        while self._out and written >= len(self._out[0][0]):
            data, _, sent = self._out.popleft()
            written -= len(data)
            if sent is not None:
                sent()
        self._out_offset = written
        if not self._out:
            self._empty.set()
        if self._full and self._out_bytes < LOW_WATER:
            self._full = False
            self._deliver_later()

    # The end

    def close(self, error: Exception | None = None) -> None:
        """Close the socket and every descriptor still queued, and say so once."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        while self._in_fds:
            os.close(self._in_fds.popleft())
        self._in.clear()
        queued, self._out = self._out, deque()
        for _, _, sent in queued:
            if sent is not None:
                sent()
        self._empty.set()
        self._on_close(error)
