"""Every method there is: who may call it, and what it does. Nothing else can be called."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AccessDenied, InvalidArgs, PropertyReadOnly, UnknownProperty
from ..files import Handle
from ..model.identity import Requester
from ..model.machine import Machine
from ..model.registry import Registry
from ..settings import Settings
from .authority import Access
from .contract import (
    INTROSPECTABLE,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    VIRTUAL_MACHINE,
    interfaces,
)
from .objects import Objects, path_of
from .wire import Variant

_MAX_DEPTH = 4
_MACHINE_ID = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


@dataclass(frozen=True, slots=True)
class Service:
    """What methods work on."""

    objects: Objects
    registry: Registry
    settings: Settings


@dataclass(slots=True)
class Call:
    """One call, decoded. `caller` is known where the method isn't a read, `vm` on a VM's object.

    gone: resolved when the caller leaves the bus.
    """

    service: Service
    path: str
    args: Sequence[Any]
    fds: Sequence[int]
    gone: asyncio.Future[None]
    vm: Machine | None = None
    caller: Requester | None = None

    @property
    def machine(self) -> Machine:
        assert self.vm is not None
        return self.vm


@dataclass(frozen=True, slots=True)
class Marshalled:
    """A reply whose body is on the wire's form already."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor to reply with; it is closed when it is sent."""

    fd: int


Reply = tuple[Any, ...] | Marshalled | Descriptor


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table. `run` may answer at once, or later; `lasts`: perhaps much later."""

    access: Access
    run: Callable[[Call], Reply | Coroutine[Any, Any, Reply]]
    lasts: bool = False


# Manager


async def _create(call: Call) -> Reply:
    assert call.caller is not None
    config = {str(key): _plain(value, call.fds) for key, value in call.args[0].items()}
    registry = call.service.registry
    vm = await registry.create(config, call.caller)
    if vm.config.kill_on_disconnect:
        registry.goes_with(vm, call.gone)
    return (path_of(vm),)


async def _stop_all(call: Call) -> Reply:
    (timeout_usec,) = call.args
    default = call.service.settings.shutdown_timeout
    await call.service.registry.stop_all(timeout_usec / 1e6 or default)
    return ()


def _get_vm(call: Call) -> Reply:
    return (path_of(call.service.registry.by_name(call.args[0])),)


def _get_vm_by_cid(call: Call) -> Reply:
    return (path_of(call.service.registry.by_cid(call.args[0])),)


def _list(call: Call) -> Reply:
    return ([_row(vm) for vm in call.service.registry],)


def _row(vm: Machine) -> list[Any]:
    known = vm.identity
    return [known.id, known.name, str(vm.state), known.cid, known.requester.uid, path_of(vm)]


def _plain(value: Any, fds: Sequence[int], depth: int = 0) -> object:
    """A config value without its D-Bus clothes; open files as Handles. Raises InvalidArgs."""
    if depth > _MAX_DEPTH:
        raise InvalidArgs("the config is nested deeper than any config can be")
    if isinstance(value, Variant):
        if value.signature == "h":
            return _handle(value.value, fds)
        return _plain(value.value, fds, depth + 1)
    if isinstance(value, dict):
        return {str(key): _plain(item, fds, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, fds, depth + 1) for item in value]
    return value


def _handle(index: int, fds: Sequence[int]) -> Handle:
    if not 0 <= index < len(fds):
        raise InvalidArgs(f"file descriptor {index} is named, but only {len(fds)} came along")
    return Handle(fds[index])


# VirtualMachine


async def _start(call: Call) -> Reply:
    await call.service.registry.start(call.machine)
    return ()


async def _stop(call: Call) -> Reply:
    (timeout_usec,) = call.args
    await call.machine.stop(_seconds(call, timeout_usec))
    return ()


def _seconds(call: Call, timeout_usec: int) -> float:
    return timeout_usec / 1e6 or call.service.settings.stop_timeout


async def _kill(call: Call) -> Reply:
    await call.machine.kill()
    return ()


async def _suspend(call: Call) -> Reply:
    await call.machine.suspend()
    return ()


async def _resume(call: Call) -> Reply:
    await call.machine.resume()
    return ()


async def _set_memory_target(call: Call) -> Reply:
    await call.machine.set_memory_target(call.args[0])
    return ()


async def _resize_disk(call: Call) -> Reply:
    await call.machine.resize_disk(*call.args)
    return ()


async def _wait(call: Call) -> Reply:
    dying = asyncio.ensure_future(call.machine.wait())
    try:
        either: set[asyncio.Future[Any]] = {dying, call.gone}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not dying.done():
            raise AccessDenied("the caller left")
        reason, status = dying.result()
        return str(reason), status
    finally:
        dying.cancel()


def _remove(call: Call) -> Reply:
    call.service.registry.remove(call.machine)
    return ()


def _open_console(call: Call) -> Reply:
    assert call.caller is not None
    return Descriptor(call.machine.open_console(call.caller.uid))


def _open_log(call: Call) -> Reply:
    return Descriptor(call.machine.open_log())


async def _connect_vsock(call: Call) -> Reply:
    return Descriptor(await call.machine.connect_vsock(call.args[0]))


# The interfaces that every object has


def _property(call: Call, interface: str, name: str) -> Variant:
    exported = call.service.objects.exported(call.path, interface)
    if exported is None:
        raise UnknownProperty(f"{interface} has no property {name[:100]!r}")
    return exported.get(name)


def _get(call: Call) -> Reply | Coroutine[Any, Any, Reply]:
    interface, name = call.args
    value = _property(call, interface, name)
    return _ask_memory(call) if name == "MemoryActual" else (value,)


async def _ask_memory(call: Call) -> Reply:
    """The one property that only the VMM knows."""
    return (Variant("t", await call.machine.ask_memory()),)


def _get_all(call: Call) -> Reply:
    exported = call.service.objects.exported(call.path, call.args[0])
    return ({},) if exported is None else Marshalled(exported.every())


def _set(call: Call) -> Reply:
    interface, name, _ = call.args
    _property(call, interface, name)
    raise PropertyReadOnly(f"{name} can be read only")


def _introspect(call: Call) -> Reply:
    return (call.service.objects.introspect(call.path),)


def _managed_objects(call: Call) -> Reply:
    return Marshalled(call.service.objects.managed_objects())


def _ping(call: Call) -> Reply:
    return ()


def _machine_id(call: Call) -> Reply:
    found = next((path.read_text().strip() for path in _MACHINE_ID if path.exists()), "")
    return (found,)


TABLE: Mapping[tuple[str, str], Method] = {
    (MANAGER, "Create"): Method(Access.CREATE, _create),
    (MANAGER, "GetVM"): Method(Access.READ, _get_vm),
    (MANAGER, "GetVMByCID"): Method(Access.READ, _get_vm_by_cid),
    (MANAGER, "List"): Method(Access.READ, _list),
    (MANAGER, "StopAll"): Method(Access.MANAGE, _stop_all),
    (VIRTUAL_MACHINE, "Start"): Method(Access.MANAGE, _start),
    (VIRTUAL_MACHINE, "Stop"): Method(Access.MANAGE, _stop),
    (VIRTUAL_MACHINE, "Kill"): Method(Access.MANAGE, _kill),
    (VIRTUAL_MACHINE, "Suspend"): Method(Access.MANAGE, _suspend),
    (VIRTUAL_MACHINE, "Resume"): Method(Access.MANAGE, _resume),
    (VIRTUAL_MACHINE, "SetMemoryTarget"): Method(Access.MANAGE, _set_memory_target),
    (VIRTUAL_MACHINE, "ResizeDisk"): Method(Access.MANAGE, _resize_disk),
    (VIRTUAL_MACHINE, "Wait"): Method(Access.READ, _wait, lasts=True),
    (VIRTUAL_MACHINE, "Remove"): Method(Access.MANAGE, _remove),
    (VIRTUAL_MACHINE, "OpenConsole"): Method(Access.MANAGE, _open_console),
    (VIRTUAL_MACHINE, "OpenLog"): Method(Access.MANAGE, _open_log),
    (VIRTUAL_MACHINE, "ConnectVsock"): Method(Access.MANAGE, _connect_vsock),
    (PROPERTIES, "Get"): Method(Access.READ, _get),
    (PROPERTIES, "GetAll"): Method(Access.READ, _get_all),
    (PROPERTIES, "Set"): Method(Access.READ, _set),
    (INTROSPECTABLE, "Introspect"): Method(Access.READ, _introspect),
    (OBJECT_MANAGER, "GetManagedObjects"): Method(Access.READ, _managed_objects),
    (PEER, "Ping"): Method(Access.READ, _ping),
    (PEER, "GetMachineId"): Method(Access.READ, _machine_id),
}

_documented = {(name, method) for name, each in interfaces().items() for method in each.methods}
if _documented != set(TABLE):
    raise RuntimeError(f"method table and XML differ: {_documented ^ set(TABLE)}")
