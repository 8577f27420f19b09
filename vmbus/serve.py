"""Where the parts of the service are put together, served, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import __version__
from .bus.authority import Authority, Polkit, SameUser
from .bus.connection import Connection, RemoteError, bus_address
from .bus.contract import BUS_NAME
from .bus.gate import Gate
from .bus.methods import Service
from .bus.objects import Objects
from .bus.peers import Peers
from .bus.wire import Message
from .idle import Idle
from .model.limits import Limits
from .model.record import Store
from .model.registry import Registry
from .model.surroundings import Surroundings
from .settings import Settings
from .systemd.citizen import Citizen
from .vmm.host import Host

log = logging.getLogger("vmbusd")

_DO_NOT_QUEUE = 4
_PRIMARY_OWNER = 1


class Failure(Exception):
    """Why the service can't serve, for people."""


async def serve(
    settings: Settings, directory: Path, *, user: bool, exit_on_idle: float | None = None
) -> None:
    """Own the bus name and serve until SIGTERM, SIGINT, or the end of the bus. Raises Failure.

    exit_on_idle: end, too, when nothing was asked for so many seconds and no VM runs.
    """
    address = bus_address(user=user)
    try:
        connection = await Connection.open(address)
    except (OSError, TimeoutError) as error:
        raise Failure(f"can't connect to the bus at {address}: {error}") from error
    async with contextlib.aclosing(connection):
        with _alone_in(directory):
            server = Server(connection, settings, directory, user=user)
            try:
                await server.begin()
                await server.run(exit_on_idle)
            except (OSError, RemoteError) as error:
                raise Failure(f"the connection to the bus is gone: {error}") from error
            finally:
                await server.aclose()


class Server:
    """The service on one connection, from its name to its end."""

    def __init__(
        self, connection: Connection, settings: Settings, directory: Path, *, user: bool
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._told = _told_to_end()
        self._host = Host(settings)
        self._objects = Objects(connection, __version__)
        self._systemd = Citizen(connection, user=user)
        limits = Limits(settings.limits)
        self._registry = Registry(
            Surroundings(
                settings,
                self._objects,
                Store(directory / "vm"),
                self._systemd.keep,
                self._systemd.placement,
            ),
            self._host,
            limits,
            image_directories=None if user else settings.image_directories,
        )
        self._peers = Peers(connection)
        authority: Authority = SameUser(self._peers) if user else Polkit(connection, self._peers)
        self._gate = Gate(
            connection,
            Service(self._objects, self._registry, settings),
            authority,
            self._peers,
            limits,
            self._systemd.on_signal,
        )
        self._finding: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Own the name, and take over what the service before us left. Raises Failure."""
        # Who calls in the moment between the name and the VMs is answered when they are there.
        early: list[Message] = []
        self._connection.handler = early.append
        await self._peers.watch()
        await self._own_name()
        await self._restore()
        self._registry.go_on()
        self._connection.handler = self._gate.handle
        for message in early:
            self._gate.handle(message)
        self._systemd.keep.ready()
        self._finding = asyncio.create_task(self._find_vmms(), name="find-vmms")
        await self._systemd.watch(self._end_vms)
        await self._watch_requesters()

    async def run(self, exit_on_idle: float | None) -> None:
        """Serve, until there is a reason not to. Raises Failure."""
        idle = Idle(exit_on_idle or 0, self._may_go)
        if exit_on_idle is not None:
            self._connection.used = idle.touch
            idle.touch()
        try:
            while not await self._ends(idle):
                # A call may have come in the moment before the name was given back.
                await self._connection.call_bus("ReleaseName", "s", [BUS_NAME])
                if self._may_go():
                    log.info("nothing to do")
                    return
                await self._own_name()
                idle.over.clear()
        finally:
            idle.close()

    async def _ends(self, idle: Idle) -> bool:
        """Wait for the end: true if we were told to, false if there is nothing to do."""
        waits = [asyncio.create_task(event.wait()) for event in (self._told, idle.over)]
        either: set[asyncio.Future[Any]] = {*waits, self._connection.closed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._connection.closed.done():
            why = self._connection.closed.result()
            raise Failure(f"the connection to the bus is gone: {why}")
        if self._told.is_set():
            log.info("told to end")
        return self._told.is_set()

    async def aclose(self) -> None:
        """Let go of everything. The VMs go on, and the next service finds them."""
        self._systemd.keep.stopping()
        self._registry.close()
        await self._gate.aclose()
        await self._registry.let_go()
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.wait({self._finding})
        await self._host.aclose()
        await self._systemd.aclose()

    def _may_go(self) -> bool:
        return not self._gate.busy and not self._registry.needs_us

    async def _own_name(self) -> None:
        try:
            (answer,) = await self._connection.call_bus(
                "RequestName", "su", [BUS_NAME, _DO_NOT_QUEUE]
            )
        except RemoteError as error:
            raise Failure(f"the bus does not let us own {BUS_NAME}: {error.text}") from error
        if answer != _PRIMARY_OWNER:
            raise Failure(f"{BUS_NAME} is owned by another process already")

    async def _restore(self) -> None:
        """Take over what the service before us left. Nothing is awaited once it is there."""
        (bus,) = await self._connection.call_bus("GetId", "", [])
        kept = self._systemd.inherited()
        try:
            self._registry.restore(bus, kept)
        except OSError as error:
            raise Failure(f"can't take over the VMs of a service before us: {error}") from error
        finally:
            self._systemd.drop(kept)

    async def _watch_requesters(self) -> None:
        """VMs that go with the connection that created them still do, or have to go now."""
        for vm in self._registry:
            if vm.config.kill_on_disconnect and not vm.over:
                connection = vm.identity.requester.connection
                self._registry.goes_with(vm, await self._peers.leaves(connection))

    async def _find_vmms(self) -> None:
        self._objects.available_vmms(await self._host.available())

    async def _end_vms(self) -> None:
        """The host goes down, and no VM is to be started any more."""
        self._registry.close()
        await self._registry.stop_all(self._settings.shutdown_timeout)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Have the runtime directory to ourselves, whatever bus another service may be on."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failure(f"can't use the runtime directory {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Failure(f"the runtime directory {directory} is used by another vmbusd") from error
        yield
    finally:
        os.close(lock)


def _told_to_end() -> asyncio.Event:
    """Set by SIGTERM and SIGINT. In place before the name is owned: who sees that may send them."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told
