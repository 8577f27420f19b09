"""A shutdown of the host waits until the VMs have ended, as long as its administrator lets it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..bus.connection import Connection, RemoteError
from ..bus.wire import WireError
from .peer import Peer

log = logging.getLogger(__name__)

LOGIND = "org.freedesktop.login1"
_MANAGER = (LOGIND, "/org/freedesktop/login1", f"{LOGIND}.Manager")
_LOCK = ["shutdown", "vmbus", "ending virtual machines in an orderly way", "delay"]


class Inhibitor:
    """The lock at logind that delays a shutdown. Where there is no logind, nothing happens.

    on_shutdown: called when the host is about to go down; `release` lets it. If it stays up after
    all, the lock is taken anew. `on_signal` has to get every signal of the connection.
    """

    def __init__(self, connection: Connection, on_shutdown: Callable[[], None]) -> None:
        self._logind = Peer(connection, _MANAGER, self._prepare, self._look_again)
        self._on_shutdown = on_shutdown
        self._fd: int | None = None
        self._wanted = True
        self._look = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self.on_signal = self._logind.take

    @property
    def held(self) -> bool:
        """Whether a shutdown would wait for us."""
        return self._fd is not None

    async def watch(self) -> None:
        """Begin to hear of shutdowns, and to hold the lock. Raises RemoteError or OSError."""
        self._keeping = asyncio.create_task(self._keep(), name="shutdown-inhibitor")
        await self._logind.watch({"PrepareForShutdown": "b"})

    def release(self) -> None:
        """Let the shutdown go on."""
        self._wanted = False
        self._replace(None)

    async def aclose(self) -> None:
        """Release the lock, and take it no more."""
        self.release()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})

    def _look_again(self) -> None:
        self._look.set()

    def _prepare(self, _: str, body: Sequence[Any]) -> None:
        (begins,) = body
        if begins:
            log.info("the host is about to shut down")
            self._on_shutdown()
        elif not self._wanted:
            log.info("the host does not shut down after all")
            self._wanted = True
            self._look_again()

    async def _keep(self) -> None:
        """The one place that takes the lock: at logind's start and restart, and when it is due."""
        while True:
            await self._look.wait()
            self._look.clear()
            if self._logind.owner and self._wanted:
                fd = await self._take()
                if fd is not None and self._wanted:
                    # A logind that began anew may still count the old one, or not.
                    self._replace(fd)
                elif fd is not None:
                    os.close(fd)

    async def _take(self) -> int | None:
        try:
            reply = await self._logind.call("Inhibit", "ssss", _LOCK)
        except (RemoteError, OSError, WireError) as error:
            log.info("a shutdown won't wait for VMs to end: %s", error)
            return None
        for fd in reply.fds[1:]:
            os.close(fd)
        return reply.fds[0] if reply.fds else None

    def _replace(self, fd: int | None) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = fd
