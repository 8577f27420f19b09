"""A caller that costs little: frames made beforehand, one blocking socket, nothing decoded in time.

It is the same for every service that is measured.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from tests import frames
from vmbus.bus import wire

DRIVER = "org.freedesktop.DBus"
DRIVER_PATH = "/org/freedesktop/DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
_DEADLINE = 120.0
_CHUNK = 1 << 20
_SIGNAL = 4
T = TypeVar("T")
_ERROR = 3


class CallFailed(Exception):
    """An error reply, or none."""


class Stalled(CallFailed):
    """The service was not answered by polkitd.

    polkitd 122 now and then, some once in 5000 calls, misses that a rule has come to its end, and
    answers nobody until 15 seconds later it takes the rule for one that never ends.
    """


class Arrival(NamedTuple):
    """A signal, and when it came, by time.perf_counter()."""

    at: float
    message: wire.Message


def call_frame(
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    *values: Any,
    fds: int = 0,
) -> bytes:
    """A call that can be sent again and again, with so many descriptors."""
    return frames.call(path, interface, member, signature, values, destination=destination, fds=fds)


def get_frame(destination: str, path: str, interface: str, name: str) -> bytes:
    return call_frame(destination, path, PROPERTIES, "Get", "ss", interface, name)


GET_ID = call_frame(DRIVER, DRIVER_PATH, DRIVER, "GetId")


def patiently(function: Callable[[], T]) -> T:
    """Call it again while polkitd stalls: for what isn't timed."""
    while True:
        with contextlib.suppress(Stalled):
            return function()


class Client:
    """A connection to the bus at this path, as a user, if that is not our own."""

    def __init__(self, bus: str, uid: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(_DEADLINE)
        own = os.geteuid()
        # The bus asks the socket who connected; that is who we were then.
        if uid is not None:
            os.seteuid(uid)
        try:
            self.socket.connect(bus)
        finally:
            os.seteuid(own)
        self._authenticate(own if uid is None else uid)
        self._serial = 0
        self._data = bytearray()
        #: Signals that came between replies.
        self.arrivals: list[tuple[float, bytes]] = []
        self.name: str = self.ask(call_frame(DRIVER, DRIVER_PATH, DRIVER, "Hello"))[0]

    def _authenticate(self, uid: int) -> None:
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n")
        if not self.socket.recv(4096).startswith(b"OK "):
            raise CallFailed("the bus refused us")
        self.socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        self.socket.recv(4096)
        self.socket.sendall(b"BEGIN\r\n")

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send a call, numbered anew."""
        self._serial += 1
        data = frame[:8] + struct.pack("<I", self._serial) + frame[12:]
        if fds:
            frames.send_with_fds(self.socket, data, fds)
        else:
            self.socket.sendall(data)

    def call(self, frame: bytes, fds: Sequence[int] = ()) -> bytes:
        """Send a call and return its reply, undecoded. Raises CallFailed."""
        self.send(frame, fds)
        return self.reply()

    def reply(self) -> bytes:
        """The next reply; what else comes is kept. Raises CallFailed."""
        while True:
            message = self._take()
            if message is None:
                self._receive()
            elif message[1] == _SIGNAL:
                self.arrivals.append((time.perf_counter(), message))
            elif message[1] == _ERROR:
                error = wire.decode(message)
                text = f"{error.error_name}: {error.body}"
                raise (Stalled if "polkit can't be asked" in text else CallFailed)(text)
            else:
                return message

    def ask(self, frame: bytes, fds: Sequence[int] = ()) -> Sequence[Any]:
        """Send a call and return the values of its reply. Raises CallFailed."""
        return wire.decode(self.call(frame, fds)).body

    def listen(self, rule: str) -> None:
        """Have the bus send us the signals of a match rule."""
        self.call(call_frame(DRIVER, DRIVER_PATH, DRIVER, "AddMatch", "s", rule))

    def signals(self, timeout: float = _DEADLINE) -> Iterator[Arrival]:
        """Signals, past and to come, each once, until none came for `timeout` seconds."""
        while True:
            while self.arrivals:
                at, message = self.arrivals.pop(0)
                yield Arrival(at, wire.decode(message))
            if not select.select([self.socket], [], [], timeout)[0]:
                return
            self.read()

    def read(self) -> None:
        """Take what has come, where no reply is due."""
        self._receive()
        now = time.perf_counter()
        while message := self._take():
            if message[1] == _SIGNAL:
                self.arrivals.append((now, message))

    def until(self, member: str, path: str | None = None) -> Arrival:
        """The next signal of that name, by that object. Raises CallFailed when none comes."""
        for arrival in self.signals():
            if arrival.message.member == member and path in (None, arrival.message.path):
                return arrival
        raise CallFailed(f"no {member} came")

    def _receive(self) -> None:
        data = self.socket.recv(_CHUNK)
        if not data:
            raise CallFailed("the bus hung up")
        self._data += data

    def _take(self) -> bytes | None:
        if len(self._data) < 16:
            return None
        body, _, fields = struct.unpack_from("<III", self._data, 4)
        size = 16 + fields + (-fields & 7) + body
        if len(self._data) < size:
            return None
        message = bytes(self._data[:size])
        del self._data[:size]
        return message

    def close(self) -> None:
        self.socket.close()
