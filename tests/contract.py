"""The contract, read from its files by the tests themselves."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

from . import frames
from .rig import MANAGER, MANAGER_PATH, OBJECT_MANAGER, PROPERTIES, ROOT

INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"


def documented() -> dict[str, ElementTree.Element]:
    """Each interface's element, by its name."""
    directory = ROOT / "data" / "dbus-1" / "interfaces"
    roots = [ElementTree.parse(file).getroot() for file in directory.glob("org.vmbus1.*.xml")]
    return {each.attrib["name"]: each for root in roots for each in root.iterfind("interface")}


def types_of(element: ElementTree.Element, direction: str = "in") -> str:
    return "".join(
        each.attrib["type"]
        for each in element.iterfind("arg")
        if each.get("direction", "in") == direction
    )


#: Every method there is: its interface, its name, and the types it takes.
METHODS: list[tuple[str, str, str]] = [
    (name, method.attrib["name"], types_of(method))
    for name, interface in documented().items()
    for method in interface.iterfind("method")
] + [
    (PROPERTIES, "Get", "ss"),
    (PROPERTIES, "GetAll", "s"),
    (PROPERTIES, "Set", "ssv"),
    (INTROSPECTABLE, "Introspect", ""),
    (PEER, "Ping", ""),
    (PEER, "GetMachineId", ""),
    (OBJECT_MANAGER, "GetManagedObjects", ""),
]

#: A value of each type that methods take, and of one that none takes.
_SAMPLES: dict[str, Any] = {
    "s": "org.vmbus1.VirtualMachine",
    "t": 0,
    "u": 0,
    "v": frames.Var("s", "x"),
    "a{sv}": {},
    "d": 0.0,
}


def samples(signature: str) -> list[Any]:
    """Values of these types."""
    return [_SAMPLES[each] for each in frames.split(signature)]


def wrong_types(right: str) -> list[str]:
    """Signatures that a method isn't to be called with."""
    shorter = right[:-1] if right[-1:] != "}" else "t"
    return sorted({"", "s", "d", f"{right}d", "a{sv}a{sv}", shorter} - {right})


def home_of(interface: str, vm: str) -> str:
    """The path of an object that has this interface."""
    return MANAGER_PATH if interface in (MANAGER, OBJECT_MANAGER) else vm
