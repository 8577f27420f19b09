"""A typed client of the service, for programs that use asyncio.

async with VMBus.session() as bus, await bus.create(kernel="vmlinuz", memory_mib=256) as vm:
    await vm.start()
    print(await vm.wait())

An error reply is raised as the class of `vmbus.errors` that has its name, and as RemoteError where
there is none. Besides, any call may raise ServiceGone, a RemoteError, where the service isn't
there; ConnectionError where the bus isn't; and TimeoutError unless it may last.

VMs outlive the service, and so do listeners and `VM.wait`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, BinaryIO, Self, TypeVar, Unpack

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
from .bus.wire import Flag, Message
from .calls import ServiceGone, call
from .errors import InvalidArgs, NoSuchVM, UnknownInterface, UnknownObject, VMBusError
from .events import (
    About,
    Added,
    Changed,
    Death,
    Deaths,
    Died,
    Event,
    Events,
    EventsLost,
    Removed,
    ServiceChanged,
    Snapshot,
    snapshot,
)
from .listening import Listening
from .request import Config, Disk, Files, Net, SharedDir, encode_config

__all__ = [
    "VM",
    "About",
    "Added",
    "Changed",
    "Config",
    "Death",
    "Deaths",
    "Died",
    "Disk",
    "Event",
    "Events",
    "EventsLost",
    "Net",
    "RemoteError",
    "Removed",
    "ServiceChanged",
    "ServiceGone",
    "SharedDir",
    "Snapshot",
    "VMBus",
]

#: Seconds in which a call is answered, unless it waits for a VMM: that the service bounds.
TIMEOUT = 25.0

_T = TypeVar("_T")


class VMBus:
    """The service, as one connection to its bus sees it. Made by `system` or `session`."""

    def __init__(self, connection: Connection, *, interactive: bool = False) -> None:
        self._connection = connection
        self._flags = Flag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
        self._listening = Listening(connection, lambda: self._vms(Flag.NO_AUTOSTART))

    @classmethod
    def system(cls, *, interactive: bool = False) -> AbstractAsyncContextManager[Self]:
        """Join the system bus, as `connect` does."""
        return cls.connect(user=False, interactive=interactive)

    @classmethod
    def session(cls) -> AbstractAsyncContextManager[Self]:
        """Join the session bus, as `connect` does."""
        return cls.connect(user=True)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, *, user: bool = False, interactive: bool = False) -> AsyncIterator[Self]:
        """Join the session bus (`user`) or the system bus, and leave it at the end.

        interactive: a call may ask the user for a password, for as long as the user takes.
        Raises OSError or TimeoutError.
        """
        connection = await Connection.open(bus_connection.bus_address(user=user))
        try:
            bus = cls(connection, interactive=interactive)
            async with contextlib.aclosing(bus._listening):
                await bus._listening.begin()
                yield bus
        finally:
            await connection.aclose()

    async def running(self) -> bool:
        """Whether the service is on the bus. Unlike any other call, this doesn't start it."""
        (answer,) = await self._connection.call_bus("NameHasOwner", "s", [BUS_NAME])
        return bool(answer)

    async def about(self) -> About:
        """The version of the service, the VMMs that it can use, and how many VMs there are."""
        reply = await self._call(ROOT_PATH, PROPERTIES, "GetAll", MANAGER)
        found = {name: value.value for name, value in reply.body[0].items()}
        return About(found["Version"], tuple(found["AvailableVMMs"]), found["VMCount"])

    async def create(self, **config: Unpack[Config]) -> VM:
        """Create a VM; with `async with` it is killed and removed at the end.

        Files given by path are opened here, with the rights of this process.
        """
        with Files() as files:
            body = encode_config(files, config)
            reply = await self._call(ROOT_PATH, MANAGER, "Create", body, fds=files.fds)
        return VM(self, str(reply.body[0]))

    async def vms(self) -> list[Snapshot]:
        """Every VM, by id."""
        return await self._vms(self._flags)

    async def _vms(self, flags: int) -> list[Snapshot]:
        target = (ROOT_PATH, OBJECT_MANAGER, "GetManagedObjects")
        reply = await call(self._connection, target, (), fds=(), flags=flags, timeout=TIMEOUT)
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

    async def vm_by_cid(self, cid: int) -> VM:
        """The VM with that vsock context id. Raises NoSuchVM."""
        reply = await self._call(ROOT_PATH, MANAGER, "GetVMByCID", cid)
        return VM(self, str(reply.body[0]))

    async def _existing(self, path: str, called: str) -> VM:
        vm = VM(self, path)
        try:
            await vm.properties()
        except (InvalidArgs, UnknownInterface, UnknownObject):
            raise NoSuchVM(f"there is no VM {called}") from None
        return vm

    async def stop_all(self, timeout: float | None = None) -> None:
        """End all VMs, whoever created them, each as VM.stop does; return when all are dead.

        timeout: as VM.stop has it.
        """
        await self._call(ROOT_PATH, MANAGER, "StopAll", _usec(timeout), lasts=True)

    async def events(self, *, end_with_service: bool = False) -> Events:
        """All that happens to VMs from now on, until its `aclose`. See Events.

        Raises RemoteError, ConnectionError or TimeoutError.
        """
        return await self._listening.events(with_service=end_with_service)

    def deaths(self) -> Deaths:
        """Every death of a VM, once. See Deaths for when listening begins."""
        return Deaths(self._listening.deaths)

    async def _outlasting(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do what may be done anew with each service that goes away over it."""
        while True:
            asked = self._listening.owner
            try:
                return await work()
            except ServiceGone:
                await self._listening.until_other_than(asked)
            except VMBusError as error:
                if type(error) is not VMBusError:
                    raise
                # It says so of all that waits when it is about to leave.
                try:
                    async with asyncio.timeout(TIMEOUT):
                        await self._listening.until_other_than(asked)
                except TimeoutError:
                    raise error from None

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
    """A VM by its object path. Every method may raise UnknownObject when the VM is gone.

    With `async with` it is discarded at the end.
    """

    def __init__(self, bus: VMBus, path: str) -> None:
        self._bus = bus
        self.path = path

    def __repr__(self) -> str:
        return f"<VM {self.path}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.discard()

    async def discard(self) -> None:
        """Leave nothing of it, whether it runs or is gone already.

        Lasts over a restart of the service. Raises TimeoutError where that takes too long.
        """
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(UnknownObject):
                await self._bus._outlasting(self.kill)
                await self._bus._outlasting(self.remove)

    async def properties(self) -> Snapshot:
        """What the VM is like now."""
        reply = await self._bus._call(self.path, PROPERTIES, "GetAll", VIRTUAL_MACHINE)
        return snapshot(self.path, reply.body[0])

    async def start(self) -> None:
        """Start it; return when it runs. Raises InvalidState or StartFailed."""
        with self._bus._listening.starting(self.path):
            await self._call("Start", lasts=True)

    async def stop(self, timeout: float | None = None) -> None:
        """End it in good order, by force after `timeout` seconds; None: as the service is set."""
        await self._call("Stop", _usec(timeout), lasts=True)

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
        """Wait until it has died, whatever becomes of the service meanwhile.

        Raises NoSuchVM if it is removed before it was started.
        """
        async with self._bus._listening.death_of(self.path) as died:
            try:
                reply = await self._bus._outlasting(lambda: self._call("Wait", lasts=True))
                return Death(*reply.body)
            except (NoSuchVM, UnknownObject):
                # One that is collected may be gone before the next service could be asked.
                if died.done():
                    return died.result()
                raise

    async def remove(self) -> None:
        """Forget it. Raises InvalidState if it is running."""
        await self._call("Remove")
        self._bus._listening.told(self.path)

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


def _usec(timeout: float | None) -> int:
    """A time-out as it is on the wire, where 0 is the service's own."""
    if timeout is not None and not (math.isfinite(timeout) and 0 <= timeout < 1e12):
        raise InvalidArgs(f"the time-out can't be {timeout} s")
    return 0 if timeout is None else max(1, int(timeout * 1e6))
