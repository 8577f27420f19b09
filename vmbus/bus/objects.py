"""What is exported: the properties of every object, and every signal there is.

What a VM looks like on the wire is marshalled once a change and kept, so that telling everything of
a thousand VMs is joining a thousand pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import UnknownInterface, UnknownProperty
from ..model.machine import Machine
from . import wire
from .connection import Connection
from .contract import (
    INTROSPECTABLE,
    MANAGER,
    OBJECT_MANAGER,
    PEER,
    PROPERTIES,
    ROOT_PATH,
    VIRTUAL_MACHINE,
    VM_ROOT,
    interfaces,
)
from .marshal import Entries, entries
from .wire import Kind, Message, Variant

log = logging.getLogger(__name__)

_MANAGED_OBJECTS = "a{oa{sa{sv}}}"
_DOCTYPE = """<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
"""
_STANDARD = (INTROSPECTABLE, PEER, PROPERTIES)

_VM_PROPERTIES: Mapping[str, Callable[[Machine], Any]] = {
    "Id": lambda vm: vm.identity.id,
    "Name": lambda vm: vm.identity.name,
    "CID": lambda vm: vm.identity.cid,
    "VMM": lambda vm: vm.vmm,
    "Protected": lambda vm: vm.config.protected,
    "MemoryMiB": lambda vm: vm.config.memory_mib,
    "CPUs": lambda vm: vm.config.cpus,
    "State": lambda vm: str(vm.state),
    "PayloadState": lambda vm: str(vm.payload),
    "PayloadExitStatus": lambda vm: vm.payload_status,
    "StatusText": lambda vm: vm.status_text,
    "RequesterUid": lambda vm: vm.identity.requester.uid,
    "RequesterSid": lambda vm: vm.identity.requester.sid,
    "RequesterPid": lambda vm: vm.identity.requester.pid,
    "Pid": lambda vm: vm.pid,
    "CreatedTimestamp": lambda vm: vm.created,
    "StartedTimestamp": lambda vm: vm.started,
    "DiedTimestamp": lambda vm: vm.died,
    "DeathReason": lambda vm: str(vm.reason or ""),
    "ExitStatus": lambda vm: vm.status,
    "LastWords": lambda vm: vm.last_words,
    "MemoryActual": lambda vm: vm.memory_actual,
}
#: Attributes of a VM that change, and the properties that show them.
_SHOWN_AS = {
    "state": "State",
    "payload": "PayloadState",
    "payload_status": "PayloadExitStatus",
    "status_text": "StatusText",
    "pid": "Pid",
    "started": "StartedTimestamp",
    "died": "DiedTimestamp",
    "reason": "DeathReason",
    "status": "ExitStatus",
    "last_words": "LastWords",
    "memory_actual": "MemoryActual",
}


class _Exported:
    """One object: its properties as they are now, and as they were last marshalled."""

    __slots__ = ("_all", "_entry", "_values", "interface", "path", "vm")

    def __init__(
        self, path: str, interface: str, values: Mapping[str, Callable[[], Any]], vm: Machine | None
    ) -> None:
        self.path = path
        self.interface = interface
        self.vm = vm
        self._values = values
        self._all: Entries | None = None
        self._entry: bytes | None = None

    def get(self, name: str) -> Variant:
        """One property, as a Variant. Raises UnknownProperty."""
        kind = interfaces()[self.interface].properties.get(name)
        if kind is None:
            raise UnknownProperty(f"{self.interface} has no property {name[:100]!r}")
        return Variant(kind.signature, self._values[name]())

    def some(self, names: Iterable[str]) -> Entries:
        """Some of the properties, as they are now."""
        kinds = interfaces()[self.interface].properties
        return entries((name, kinds[name].signature, self._values[name]()) for name in names)

    def all(self) -> Entries:
        """All of them."""
        if self._all is None:
            self._all = self.some(self._values)
        return self._all

    def every(self) -> bytes:
        """The body of an answer to GetAll."""
        return wire.encode_body("a{sv}", [self.all()])

    def entry(self) -> bytes:
        """This object's entry of an answer to GetManagedObjects."""
        if self._entry is None:
            one = {self.path: {self.interface: self.all()}}
            self._entry = wire.encode_body(_MANAGED_OBJECTS, [one])[8:]
        return self._entry

    def changed(self) -> None:
        self._all = self._entry = None


class Objects:
    """All objects of the service; the observer of every VM."""

    def __init__(self, connection: Connection, version: str) -> None:
        self._connection = connection
        self._available: list[str] = []
        self._version = version
        self._vms: dict[str, _Exported] = {}
        _check_complete(VIRTUAL_MACHINE, _VM_PROPERTIES)
        manager: dict[str, Callable[[], Any]] = {
            "Version": lambda: self._version,
            "AvailableVMMs": lambda: tuple(self._available),
            "VMCount": lambda: len(self._vms),
        }
        _check_complete(MANAGER, manager)
        self._manager = _Exported(ROOT_PATH, MANAGER, manager, None)

    # Looking things up

    def vm(self, path: str) -> Machine | None:
        """The VM at a path."""
        exported = self._vms.get(path)
        return exported.vm if exported is not None else None

    def interfaces_at(self, path: str) -> tuple[str, ...] | None:
        """The interfaces of an object, its own first; None where there is no object."""
        if path in self._vms:
            return (VIRTUAL_MACHINE, *_STANDARD)
        if path == ROOT_PATH:
            return (MANAGER, OBJECT_MANAGER, *_STANDARD)
        return (INTROSPECTABLE, PEER) if path in _parents() else None

    def exported(self, path: str, interface: str) -> _Exported | None:
        """The object whose properties of that interface are asked for; None if it has none."""
        here = self._manager if path == ROOT_PATH else self._vms.get(path)
        if here is not None and interface in ("", here.interface):
            return here
        if interface and interface not in (self.interfaces_at(path) or ()):
            raise UnknownInterface(f"{path} has no interface {interface[:255]!r}")
        return None

    def introspect(self, path: str) -> str:
        """The XML of an object that exists, with its children."""
        own = "".join(interfaces()[name].xml for name in self.interfaces_at(path) or ())
        nodes = "".join(f'  <node name="{child}"/>\n' for child in self._children(path))
        return f"{_DOCTYPE}<node>\n{own}{nodes}</node>\n"

    def _children(self, path: str) -> Iterator[str]:
        if path == VM_ROOT:
            yield from (each.rpartition("/")[2] for each in self._vms)
        elif path == "/" or path in _parents() or path == ROOT_PATH:
            rest = VM_ROOT[len(path.rstrip("/")) + 1 :]
            yield rest.partition("/")[0]

    def managed_objects(self) -> bytes:
        """The body of an answer to GetManagedObjects."""
        pieces = [exported.entry() for exported in self._vms.values()]
        aligned = b"".join(piece + bytes(-len(piece) % 8) for piece in pieces[:-1])
        entries = aligned + b"".join(pieces[-1:])
        return len(entries).to_bytes(4, "little") + bytes(4) + entries

    # Changes, as they come from the model

    def available_vmms(self, names: list[str]) -> None:
        """Say which VMMs can be used."""
        self._available = names
        self._properties_changed(self._manager, ["AvailableVMMs"])

    def added(self, vm: Machine) -> None:
        """See Observer.added."""
        exported = self._export(vm)
        body = [exported.path, {VIRTUAL_MACHINE: exported.all()}]
        self._signal(ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", body)
        self._properties_changed(self._manager, ["VMCount"])

    def restored(self, vm: Machine) -> None:
        """See Observer.restored. Who listens has seen the service come, and asks by itself."""
        self._export(vm)

    def _export(self, vm: Machine) -> _Exported:
        path = path_of(vm)
        values = {name: _bound(getter, vm) for name, getter in _VM_PROPERTIES.items()}
        exported = self._vms[path] = _Exported(path, VIRTUAL_MACHINE, values, vm)
        return exported

    def changed(self, vm: Machine, names: Sequence[str]) -> None:
        """See Observer.changed."""
        shown = [_SHOWN_AS[name] for name in names]
        self._properties_changed(self._vms[path_of(vm)], shown)

    def died(self, vm: Machine) -> None:
        """See Observer.died."""
        body = [vm.identity.cid, str(vm.reason), vm.status]

        def written() -> None:
            # Lost with the connection to the bus, it is the next service's to tell.
            if not self._connection.lost:
                vm.death_was_told()

        self._signal(path_of(vm), VIRTUAL_MACHINE, "Died", body, written)

    def removed(self, vm: Machine) -> None:
        """See Observer.removed."""
        path = path_of(vm)
        del self._vms[path]
        gone = [path, [VIRTUAL_MACHINE]]
        self._signal(ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", gone)
        self._properties_changed(self._manager, ["VMCount"])

    def _properties_changed(self, exported: _Exported, names: Sequence[str]) -> None:
        exported.changed()
        kinds = interfaces()[exported.interface].properties
        changed = exported.some(name for name in names if kinds[name].emits == "true")
        invalidated = [name for name in names if kinds[name].emits == "invalidates"]
        body = [exported.interface, changed, invalidated]
        self._signal(exported.path, PROPERTIES, "PropertiesChanged", body)

    def _signal(
        self,
        path: str,
        interface: str,
        member: str,
        body: Sequence[Any],
        sent: Callable[[], None] | None = None,
    ) -> None:
        try:
            self._connection.send(
                Message(
                    kind=Kind.SIGNAL,
                    path=path,
                    interface=interface,
                    member=member,
                    signature=interfaces()[interface].signals[member],
                    body=body,
                ),
                sent,
            )
        except wire.WireError:
            log.exception("signal %s of %s could not be sent", member, path)


def path_of(vm: Machine) -> str:
    """The object path of a VM."""
    return f"{VM_ROOT}/{vm.identity.id}"


def _parents() -> tuple[str, ...]:
    return ("/", "/org", VM_ROOT)


def _bound(getter: Callable[[Machine], Any], vm: Machine) -> Callable[[], Any]:
    return lambda: getter(vm)


def _check_complete(interface: str, properties: Mapping[str, Any]) -> None:
    documented = set(interfaces()[interface].properties)
    if documented != set(properties):
        raise RuntimeError(f"{interface}: code and XML differ: {documented ^ set(properties)}")
