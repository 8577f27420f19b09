"""A typed client of the service, for programs that use asyncio.

async with VMBus.connect(user=True) as bus:
    vm = await bus.create(kernel="vmlinuz", memory_mib=256)
    await vm.start()
    print(await vm.wait())

An error reply is raised as the class of `vmbus.errors` that has its name, and as RemoteError where
there is none. Besides, any call may raise ConnectionError, and TimeoutError unless it may last.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, BinaryIO, Self, Unpack

from .bus import connection as bus_connection
from .bus.connection import Connection, RemoteError
from .bus.contract import (
    BUS_NAME,
    MANAGER,
    OBJECT_MANAGER,
    PROPERTIES,
    ROOT_PATH,
    VIRTUAL_MACHINE,
    VM_ROOT,
)
from .bus.wire import Flag, Kind, Message
from .calls import call, close_all, refusal
from .errors import InvalidArgs, NoSuchVM, UnknownInterface, UnknownObject
from .events import Death, Event, Events, ServiceChanged, Snapshot, event_of, snapshot
from .request import Config, Disk, Files, Net, SharedDir, encode_config

__all__ = [
    "VM",
    "Config",
    "Death",
    "Disk",
    "Event",
    "Events",
    "Net",
    "RemoteError",
    "SharedDir",
    "Snapshot",
    "VMBus",
]

#: Seconds in which a call is answered, unless it waits for a VMM: that the service bounds.
TIMEOUT = 25.0

_SIGNALS = f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT_PATH}'"
_OWNERS = (
    f"type='signal',sender='{bus_connection.BUS_NAME}',member='NameOwnerChanged',arg0='{BUS_NAME}'"
)


class VMBus:
    """The service, as one connection to its bus sees it. Made by `connect`."""

    def __init__(self, connection: Connection, *, interactive: bool = False) -> None:
        self._connection = connection
        self._flags = Flag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        self._owner = ""
        self._events: set[Events] = set()
        connection.handler = self._on_message
        connection.closed.add_done_callback(lambda _: self._end_events())

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, *, user: bool = False, interactive: bool = False) -> AsyncIterator[Self]:
        """Join the session bus (`user`) or the system bus, and leave it at the end.

        interactive: a call may ask the user for a password, for as long as the user takes.
        Raises OSError or TimeoutError.
        """
        connection = await Connection.open(bus_connection.bus_address(user=user))
        try:
            yield cls(connection, interactive=interactive)
        finally:
            await connection.aclose()

    async def running(self) -> bool:
        """Whether the service is on the bus. Unlike any other call, this doesn't start it."""
        (answer,) = await self._connection.call_bus("NameHasOwner", "s", [BUS_NAME])
        return bool(answer)

    async def create(self, **config: Unpack[Config]) -> VM:
        """Create a VM. Files given by path are opened here, with the rights of this process."""
        with Files() as files:
            body = encode_config(files, config)
            reply = await self._call(ROOT_PATH, MANAGER, "Create", body, fds=files.fds)
        return VM(self, str(reply.body[0]))

    async def vms(self) -> list[Snapshot]:
        """Every VM, by id."""
        reply = await self._call(ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
        found = [
            snapshot(path, every[VIRTUAL_MACHINE])
            for path, every in reply.body[0].items()
            if VIRTUAL_MACHINE in every
        ]
        return sorted(found, key=lambda vm: vm.id)

    async def vm(self, which: str) -> VM:
        """The VM with that name, or else with that id, or at that object path. Raises NoSuchVM."""
        if which.startswith("/"):
            return await self._existing(which, which)
        try:
            reply = await self._call(ROOT_PATH, MANAGER, "GetVM", which)
        except NoSuchVM:
            if not (which.isascii() and which.isdigit()):
                raise
            return await self._existing(f"{VM_ROOT}/{which}", f"with the name or the id {which}")
        return VM(self, str(reply.body[0]))

    async def _existing(self, path: str, called: str) -> VM:
        vm = VM(self, path)
        try:
            await vm.properties()
        except (InvalidArgs, UnknownInterface, UnknownObject):
            raise NoSuchVM(f"there is no VM {called}") from None
        return vm

    async def events(self, *, end_with_service: bool = False) -> Events:
        """All that happens to VMs from now on, until its `aclose`. See Events."""
        events = Events(self._forget, with_service=end_with_service)
        if not self._events:
            self._owner = ""
        self._events.add(events)
        try:
            for rule in (_OWNERS, _SIGNALS):
                await self._connection.call_bus("AddMatch", "s", [rule])
            # Anybody may send us a signal; only the owner's are believed.
            with contextlib.suppress(RemoteError):
                (owner,) = await self._connection.call_bus("GetNameOwner", "s", [BUS_NAME])
                self._owner = self._owner or owner
        except BaseException:
            self._events.discard(events)
            raise
        return events

    async def _forget(self, events: Events) -> None:
        if events in self._events:
            self._events.discard(events)
            with contextlib.suppress(RemoteError, OSError):
                for rule in (_SIGNALS, _OWNERS):
                    await self._connection.call_bus("RemoveMatch", "s", [rule])

    def _end_events(self) -> None:
        for events in self._events:
            events.end()

    def _on_message(self, message: Message) -> None:
        close_all(message.fds)
        if message.kind is Kind.SIGNAL:
            event = self._event(message)
            if event is not None:
                for events in self._events:
                    events.put(event)
        elif message.kind is Kind.CALL and not message.flags & Flag.NO_REPLY_EXPECTED:
            self._connection.send(refusal(message))

    def _event(self, message: Message) -> Event | None:
        if message.sender == bus_connection.BUS_NAME:
            if message.member != "NameOwnerChanged" or message.body[0] != BUS_NAME:
                return None
            self._owner = message.body[2]
            return ServiceChanged(running=bool(self._owner))
        return event_of(message) if message.sender == self._owner else None

    async def _call(
        self,
        path: str,
        interface: str,
        member: str,
        *args: Any,
        fds: Sequence[int] = (),
        lasts: bool = False,
    ) -> Message:
        timeout = None if lasts or self._flags else TIMEOUT
        target = (path, interface, member)
        return await call(
            self._connection, target, args, fds=fds, flags=self._flags, timeout=timeout
        )


class VM:
    """A VM by its object path. Every method may raise UnknownObject when the VM is gone."""

    def __init__(self, bus: VMBus, path: str) -> None:
        self._bus = bus
        self.path = path

    async def properties(self) -> Snapshot:
        """What the VM is like now."""
        reply = await self._bus._call(self.path, PROPERTIES, "GetAll", VIRTUAL_MACHINE)
        return snapshot(self.path, reply.body[0])

    async def start(self) -> None:
        """Start it; return when it runs. Raises InvalidState or StartFailed."""
        await self._call("Start", lasts=True)

    async def stop(self, timeout: float | None = None) -> None:
        """End it in good order, by force after `timeout` seconds; None: as the service is set."""
        if timeout is not None and not (math.isfinite(timeout) and 0 <= timeout < 1e12):
            raise InvalidArgs(f"the time-out can't be {timeout} s")
        # On the wire 0 is the service's own time-out.
        usec = 0 if timeout is None else max(1, int(timeout * 1e6))
        await self._call("Stop", usec, lasts=True)

    async def kill(self) -> None:
        """End it at once; return when it is dead."""
        await self._call("Kill", lasts=True)

    async def suspend(self) -> None:
        """Stop its vCPUs. Raises InvalidState, ControlFailed or TimedOut."""
        await self._call("Suspend", lasts=True)

    async def resume(self) -> None:
        """Let its vCPUs go on. Raises InvalidState, ControlFailed or TimedOut."""
        await self._call("Resume", lasts=True)

    async def memory_actual(self) -> int:
        """How many bytes its guest has now, as the VMM says; 0 when it isn't running."""
        reply = await self._bus._call(self.path, PROPERTIES, "Get", VIRTUAL_MACHINE, "MemoryActual")
        return int(reply.body[0].value)

    async def set_memory_target(self, size: int) -> None:
        """Have the balloon leave its guest `size` bytes; the guest takes its time to follow.

        Raises InvalidState, NotSupported, InvalidArgs, ControlFailed or TimedOut.
        """
        await self._call("SetMemoryTarget", size, lasts=True)

    async def resize_disk(self, index: int, size: int) -> None:
        """Grow the config's disk `index`, from 0, to `size` bytes.

        Raises InvalidState, NotSupported, InvalidArgs, ControlFailed or TimedOut.
        """
        await self._call("ResizeDisk", index, size, lasts=True)

    async def wait(self) -> Death:
        """Wait until it has died. Raises NoSuchVM if it is removed before it was started."""
        reply = await self._call("Wait", lasts=True)
        return Death(*reply.body)

    async def remove(self) -> None:
        """Forget it. Raises InvalidState if it is running."""
        await self._call("Remove")

    async def open_console(self) -> socket.socket:
        """A stream joined to the guest's console, both ways. Raises InvalidState when it's dead."""
        return socket.socket(fileno=(await self._call("OpenConsole")).fds[0])

    async def connect_vsock(self, port: int) -> socket.socket:
        """A stream to a vsock port of its guest, 1024 or above.

        Raises NotSupported, InvalidState, InvalidArgs, ControlFailed or TimedOut.
        """
        return socket.socket(fileno=(await self._call("ConnectVsock", port, lasts=True)).fds[0])

    async def open_log(self) -> BinaryIO:
        """What the guest's console has printed until now."""
        return os.fdopen((await self._call("OpenLog")).fds[0], "rb")

    async def _call(self, member: str, *args: Any, lasts: bool = False) -> Message:
        return await self._bus._call(self.path, VIRTUAL_MACHINE, member, *args, lasts=lasts)
