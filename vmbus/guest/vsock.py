"""Vsock between host and guests: what guests report by it, and connections to their ports."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ControlFailed, TimedOut
from .port import CHUNK, PAUSE
from .report import Decoder, Report

log = logging.getLogger(__name__)

#: The number that is no port's, but stands for any.
ANY_PORT = socket.VMADDR_PORT_ANY & 0xFFFFFFFF
#: How many connections one guest can have to us, and how long each can last, in seconds.
MAX_CONNECTIONS = 16
LIFETIME = 10.0
#: Seconds until we try again where the host has no descriptor left for a connection.
_RETRY = 1.0
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Hear = Callable[[Report], None]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of sockets by which guests are reached: the kernel's, or one that stands in for it.

    address: that of a port at a CID. cid: whose an address is.
    """

    number: int = socket.AF_VSOCK
    address: Callable[[int, int], Any] = lambda cid, port: (cid, port)
    cid: Callable[[Any], int] = lambda address: int(address[0])


class Listener:
    """Hears all guests at one port. Who speaks is known by the CID, for which the kernel vouches.

    hearer: gives who hears the guest with a CID, or None for one that is to be sent away.
    """

    def __init__(self, family: Family, hearer: Callable[[int], Hear | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._family = family
        self._hearer = hearer
        self._sock: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._by_cid: Counter[int] = Counter()
        self._retry: asyncio.TimerHandle | None = None

    def adopt(self, fd: int) -> None:
        """Take over the socket that another of us had, with who has called at it since."""
        self._sock = socket.socket(fileno=fd)

    def open(self, port: int) -> int:
        """Begin to listen. Returns the socket's descriptor, which stays ours. Raises OSError."""
        if self._sock is None or self._sock.getsockname() != self._address(port):
            self.close()
            self._sock = self._bind(port)
        self._listen()
        return self._sock.fileno()

    def _address(self, port: int) -> Any:
        return self._family.address(socket.VMADDR_CID_ANY, port)

    def _bind(self, port: int) -> socket.socket:
        # What systemd sends by where there are no datagrams, and a vsock of KVM has none.
        sock = socket.socket(self._family.number, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            sock.bind(self._address(port))
            sock.listen(socket.SOMAXCONN)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Hear nobody any more."""
        if self._retry is not None:
            self._retry.cancel()
        for connection in list(self._connections):
            connection.close()
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None

    def _listen(self) -> None:
        assert self._sock is not None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        """Take one connection; those of others come in between, however many one guest makes."""
        assert self._sock is not None
        try:
            sock, address = self._sock.accept()
        except OSError as error:
            if error.errno in _FULL:
                log.warning("guests can't be heard for a while: %s", error.strerror)
                self._loop.remove_reader(self._sock)
                self._retry = self._loop.call_later(_RETRY, self._listen)
            return
        cid = self._family.cid(address)
        hear = self._hearer(cid)
        if hear is None or self._by_cid[cid] >= MAX_CONNECTIONS:
            sock.close()
            return
        self._by_cid[cid] += 1
        self._connections.add(_Connection(sock, hear, lambda gone: self._gone(cid, gone)))

    def _gone(self, cid: int, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._by_cid[cid] -= 1
        if not self._by_cid[cid]:
            del self._by_cid[cid]


class _Connection:
    """One guest's connection. A packet is a message, as a datagram would be."""

    def __init__(
        self, sock: socket.socket, hear: Hear, gone: Callable[[_Connection], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._hear = hear
        self._gone = gone
        sock.setblocking(False)
        self._end = self._loop.call_later(LIFETIME, self.close)
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        self._end.cancel()
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._gone(self)

    def _listen(self) -> None:
        self._loop.add_reader(self._sock, self._read)

    def _read(self) -> None:
        try:
            packet = self._sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.close()
            return
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(PAUSE, self._listen)
        self._hear(Decoder().feed(packet + b"\n"))


async def connect(family: Family, cid: int, port: int, timeout: float) -> socket.socket:
    """A stream to a guest's port, the caller's to close. Raises ControlFailed or TimedOut.

    timeout: in seconds.
    """
    sock = socket.socket(family.number, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(sock, family.address(cid, port))
            sock.setblocking(True)
            return sock
        raise TimedOut(f"the guest does not take a connection to its port {port}")
    except OSError as error:
        sock.close()
        why = os.strerror(error.errno or 0)
        raise ControlFailed(f"the guest's port {port}: {why}") from None
    except BaseException:
        sock.close()
        raise
