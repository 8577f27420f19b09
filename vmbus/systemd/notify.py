"""The service manager that started us: what it is told, and the descriptors it keeps for us.

The protocol is spoken here because the C binding of libsystemd can't be had as a wheel.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import re
import socket
from collections import deque

from ..text import clean

log = logging.getLogger(__name__)

_FIRST_INHERITED = 3
#: What systemd takes for the name of a descriptor: printable ASCII without a colon.
_FD_NAME = re.compile(r"[ -9;-~]{1,255}")


class Manager:
    """The service manager at a socket; with no address, nobody, and everything here does nothing.

    Nothing here blocks, and nothing raises because of a manager that is gone or does not listen:
    what it has no room for waits until it has.
    """

    def __init__(self, address: str = "") -> None:
        # Of other kinds, vsock for one, we'd have no use: they take no descriptors.
        self._address = address if address[:1] in ("/", "@") else ""
        if address.startswith("@"):
            self._address = "\0" + address[1:]
        self._sock: socket.socket | None = None
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._told_when_writable: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_environment(cls) -> Manager:
        """The one that started us. Its address goes, so that no child speaks in our name."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    def ready(self) -> None:
        """Say that the service is up."""
        self._say("READY=1")

    def status(self, text: str) -> None:
        """Say in one line what the service is doing, for people."""
        self._say(f"STATUS={clean(text)}")

    def stopping(self) -> None:
        """Say that the service is about to end."""
        self._say("STOPPING=1")

    def store(self, name: str, fd: int) -> None:
        """Have a duplicate of a descriptor kept until `forget`, over restarts too.

        Several may have one name. Raises ValueError for a name that systemd does not take.
        """
        # Without FDPOLL=0 it drops what its peer has hung up: a pipe with words in it still, or
        # the pidfd of a process that ended while nobody of ours was there to see it.
        self._say(f"FDSTORE=1\nFDNAME={_checked(name)}\nFDPOLL=0", fd)

    def forget(self, name: str) -> None:
        """Have all descriptors of this name kept no more. Raises ValueError as `store` does."""
        self._say(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}")

    def close(self) -> None:
        """Give up what still waits."""
        self._disconnect()
        while self._waiting:
            _close_all(self._waiting.popleft()[1])

    def _say(self, text: str, fd: int | None = None) -> None:
        fds = [] if fd is None else [fd]
        if not self._address or (not self._waiting and self._post(text.encode(), fds)):
            return
        try:
            # The caller's own may be closed long before there is room.
            self._waiting.append((text.encode(), [os.dup(each) for each in fds]))
        except OSError as error:
            log.warning("the service manager was not told %r: %s", text, error.strerror)
        self._continue_when_writable()

    def _post(self, text: bytes, fds: list[int]) -> bool:
        """Send it. False if there is no room; what nobody listens for counts as sent."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        for _ in range(2):  # a manager that began anew has a new socket
            try:
                self._connected().sendmsg([text], rights)
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                self._disconnect()
                failure = error
        log.debug("the service manager can't be told %r: %s", text, failure.strerror)
        return True

    def _connected(self) -> socket.socket:
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                sock.setblocking(False)
                # Only of a socket that is connected can be told when its peer has room again.
                sock.connect(self._address)
            except OSError:
                sock.close()
                raise
            self._sock = sock
        return self._sock

    def _disconnect(self) -> None:
        if self._sock is None:
            return
        if self._told_when_writable is not None:
            self._told_when_writable.remove_writer(self._sock)
            self._told_when_writable = None
        self._sock.close()
        self._sock = None

    def _continue_when_writable(self) -> None:
        if self._told_when_writable is None and self._sock is not None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                return  # what is said next tries again
            loop.add_writer(self._sock, self._continue)
            self._told_when_writable = loop

    def _continue(self) -> None:
        while self._waiting and self._post(*self._waiting[0]):
            _close_all(self._waiting.popleft()[1])
        if self._waiting:
            self._continue_when_writable()
        else:
            self._disconnect()


def inherited() -> dict[str, list[int]]:
    """The descriptors that the service manager handed over, by name, from now on ours.

    Those of a socket unit and those that were stored come alike. A second call finds none.
    """
    ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[int]] = {}
    if not ours or not (count.isascii() and count.isdigit()):
        return found
    for index in range(int(count)):
        fd = _FIRST_INHERITED + index
        try:
            os.set_inheritable(fd, False)
        except OSError:
            log.warning("of %s descriptors that were handed over, %d are there", count, index)
            break
        name = names[index] if index < len(names) else ""
        found.setdefault(name or "unknown", []).append(fd)
    return found


def _checked(name: str) -> str:
    if not _FD_NAME.fullmatch(name):
        raise ValueError(f"no name for a descriptor: {name!r}")
    return name


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
