"""The contract, read from the XML files that document it: no name or type is written twice."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BUS_NAME = "org.vmbus1"
ROOT_PATH = "/org/vmbus1"
VM_ROOT = "/org/vmbus1/vm"
MANAGER = "org.vmbus1.Manager"
VIRTUAL_MACHINE = "org.vmbus1.VirtualMachine"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

_HERE = Path(__file__).parent
#: Where the files are when installed, and where in the project's own tree.
_DIRECTORIES = (_HERE / "interfaces", _HERE.parents[1] / "data" / "dbus-1" / "interfaces")
_EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"
_COMMENT = re.compile(r"[ \t]*<!--.*?-->\n*", re.DOTALL)
_ONE_INTERFACE = re.compile(r'[ \t]*<interface name="([^"]+)".*?</interface>\n', re.DOTALL)


@dataclass(frozen=True, slots=True)
class MethodType:
    """A method's signatures, in and out."""

    takes: str
    gives: str


@dataclass(frozen=True, slots=True)
class PropertyType:
    """A property's type, and what PropertiesChanged says of it: true, invalidates, const, false."""

    signature: str
    emits: str


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface. `xml` is its element as the file has it, without the prose."""

    name: str
    methods: Mapping[str, MethodType]
    signals: Mapping[str, str]
    properties: Mapping[str, PropertyType]
    xml: str


@functools.cache
def interfaces() -> Mapping[str, Interface]:
    """Every interface that vmbus speaks, by name."""
    directory = next(each for each in _DIRECTORIES if each.is_dir())
    files = [*sorted(directory.glob("org.vmbus1.*.xml")), _HERE / "standard.xml"]
    found = {}
    for file in files:
        text = _COMMENT.sub("", file.read_text())
        for match in _ONE_INTERFACE.finditer(text):
            found[match[1]] = _parse(match[0])
    return found


def _parse(xml: str) -> Interface:
    element = ElementTree.fromstring(xml)
    return Interface(
        name=element.attrib["name"],
        methods={
            each.attrib["name"]: MethodType(_signature(each, "in"), _signature(each, "out"))
            for each in element.iterfind("method")
        },
        signals={
            each.attrib["name"]: "".join(arg.attrib["type"] for arg in each.iterfind("arg"))
            for each in element.iterfind("signal")
        },
        properties={each.attrib["name"]: _property(each) for each in element.iterfind("property")},
        xml=xml,
    )


def _signature(method: ElementTree.Element, direction: str) -> str:
    return "".join(
        arg.attrib["type"]
        for arg in method.iterfind("arg")
        if arg.attrib.get("direction", "in") == direction
    )


def _property(element: ElementTree.Element) -> PropertyType:
    emits = "true"
    for annotation in element.iterfind("annotation"):
        if annotation.attrib["name"] == _EMITS:
            emits = annotation.attrib["value"]
    return PropertyType(element.attrib["type"], emits)
