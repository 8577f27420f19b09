"""D-Bus messages made by hand: either byte order, any header field, wrong where a test wants it.

No library is asked, so that what one of them reads can be compared with what stands here.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL = 1, 2, 3, 4, 5
DESTINATION, SENDER, SIGNATURE, UNIX_FDS = 6, 7, 8, 9
FIELD_TYPES = dict(zip(range(1, 10), "osssussgu", strict=True))
ORDERS = ("l", "B")
_FIXED = {"y": "B", "n": "h", "q": "H", "b": "I", "i": "i", "u": "I", "h": "I"}
_FIXED |= {"x": "q", "t": "Q", "d": "d"}


class Var(NamedTuple):
    """A variant."""

    signature: str
    value: Any


def split(signature: str) -> list[str]:
    """The complete types of a signature."""
    found: list[str] = []
    start = 0
    while start < len(signature):
        end = start
        while signature[end] == "a":
            end += 1
        depth = 0
        while True:
            depth += (signature[end] in "({") - (signature[end] in ")}")
            end += 1
            if depth == 0:
                break
        found.append(signature[start:end])
        start = end
    return found


class Writer:
    """Marshals values one behind the other."""

    def __init__(self, order: str) -> None:
        self.out = bytearray()
        self.order = "<" if order == "l" else ">"

    def align(self, size: int) -> None:
        self.out += bytes(-len(self.out) % size)

    def pack(self, code: str, value: Any) -> None:
        self.align(struct.calcsize(code))
        self.out += struct.pack(self.order + code, value)

    def put(self, kind: str, value: Any) -> None:
        """Marshal one value of a complete type."""
        if kind in _FIXED:
            self.pack(_FIXED[kind], value)
        elif kind in ("s", "o"):
            self.pack("I", len(value.encode()))
            self.out += value.encode() + b"\0"
        elif kind == "g":
            self.out += bytes([len(value)]) + value.encode() + b"\0"
        elif kind == "v":
            self.put("g", value.signature)
            self.put(value.signature, value.value)
        elif kind[0] == "a":
            self._put_array(kind[1:], value)
        else:
            self.align(8)
            for each, item in zip(split(kind[1:-1]), value, strict=True):
                self.put(each, item)

    def _put_array(self, kind: str, value: Any) -> None:
        self.pack("I", 0)
        length_at = len(self.out) - 4
        self.align(8 if kind[0] in "xtd({" else 1)
        start = len(self.out)
        if kind == "y":
            self.out += bytes(value)
            value = ()
        for item in value.items() if kind[0] == "{" else value:
            self.put(kind, item)
        struct.pack_into(self.order + "I", self.out, length_at, len(self.out) - start)


def body_of(signature: str, values: Sequence[Any], order: str = "l") -> bytes:
    writer = Writer(order)
    for kind, value in zip(split(signature), values, strict=True):
        writer.put(kind, value)
    return bytes(writer.out)


def frame(
    kind: int,
    fields: Sequence[tuple[int, Any]],
    body: bytes = b"",
    *,
    serial: int = 1,
    flags: int = 0,
    order: str = "l",
) -> bytes:
    """One message. A field is a plain value, or a Var where it is to have a type of its own."""
    header = [
        (code, value if isinstance(value, Var) else Var(FIELD_TYPES[code], value))
        for code, value in fields
    ]
    writer = Writer(order)
    fixed = [ord(order), kind, flags, 1, len(body), serial, header]
    for each, value in zip(split("yyyyuua(yv)"), fixed, strict=True):
        writer.put(each, value)
    writer.align(8)
    return bytes(writer.out) + body


def call(
    path: str,
    interface: str | None,
    member: str,
    signature: str = "",
    values: Sequence[Any] = (),
    *,
    destination: str | None = None,
    sender: str | None = None,
    fds: int = 0,
    serial: int = 1,
    flags: int = 0,
    order: str = "l",
) -> bytes:
    """A method call."""
    fields: list[tuple[int, Any]] = [(PATH, path), (MEMBER, member)]
    fields += [(INTERFACE, interface)] if interface is not None else []
    fields += [(DESTINATION, destination)] if destination is not None else []
    fields += [(SENDER, sender)] if sender is not None else []
    fields += [(SIGNATURE, signature)] if signature else []
    fields += [(UNIX_FDS, fds)] if fds else []
    body = body_of(signature, values, order)
    return frame(CALL, fields, body, serial=serial, flags=flags, order=order)


def send_with_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send all of it in one system call, with the descriptors."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    assert sock.sendmsg([data], [rights] if fds else []) == len(data)


# What is better not sent


def nested(depth: int) -> Var:
    """A text in a variant in so many variants."""
    value = Var("s", "core")
    for _ in range(depth):
        value = Var("v", value)
    return value


#: Bodies of a message that is to have one string, and that no bus lets through.
NOT_A_STRING: dict[str, bytes] = {
    "NUL": body_of("s", ["a0b"]).replace(b"0", b"\0"),
    "not UTF-8": body_of("s", ["a0b"]).replace(b"0", b"\xff"),
    "cut off": body_of("s", ["a0b"])[:-1],
    "length that wraps": b"\xff\xff\xff\xff",
    "more than its signature": body_of("ss", ["a", "b"]),
}

#: Configs for Create that are wrong, and as large as a call can be.
HUGE_CONFIGS: dict[str, dict[str, Any]] = {
    "many keys": {f"key{number}": Var("y", 1) for number in range(4000)},
    "long key": {"k" * 100_000: Var("s", "")},
    "long value": {"name": Var("s", "n" * 100_000)},
    "many disks": {"disks": Var("aa{sv}", [{}] * 10_000)},
    "bytes": {"kernel": Var("ay", bytes(100_000))},
    "structs": {"kernel": Var("a(yv)", [[1, Var("s", "x")]] * 5000)},
    "numbers as keys": {
        "disks": Var("aa{tv}", [{number: Var("d", 0.5)} for number in range(1000)])
    },
}
#: Those of them that have more variants than a call may.
FULL_OF_VARIANTS = ("many keys", "structs")
