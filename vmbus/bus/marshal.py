"""What is sent, made into bytes: values by a signature, and the header before them.

The libraries can do it, but look at each value several times; and to send is most of what a busy
service does. Here a writer is made of each signature once.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import layout
from .layout import (
    HEADER_TYPES,
    MAX_NAME,
    NUMBERS,
    REQUIRED,
    Type,
    Variant,
    alignment,
    remembered,
    types_of,
)

_LITTLE_ENDIAN, _PROTOCOL = ord("l"), 1
_PADDING = tuple(map(bytes, range(8)))
_UINT = struct.Struct("<I")
_HEAD = struct.Struct("<4B3I")
_NUMBER_FIELD = struct.Struct("<B3sI")
_PART = "[A-Za-z_][A-Za-z0-9_]*"
_PATH = re.compile("/|(/[A-Za-z0-9_]+)+")
_INTERFACE = re.compile(rf"{_PART}(\.{_PART})+")
#: What the text of a header field is to be.
_TEXTS = {
    layout.PATH: _PATH,
    layout.INTERFACE: _INTERFACE,
    layout.MEMBER: re.compile(_PART),
    layout.ERROR_NAME: _INTERFACE,
    layout.DESTINATION: re.compile(
        r":[^\0]+|[A-Za-z_-][A-Za-z0-9_-]*(\.[A-Za-z_-][A-Za-z0-9_-]*)+"
    ),
}

_Write = Callable[[bytearray, Any], None]


def header(
    kind: int, flags: int, serial: int, size: int, fields: Iterable[tuple[int, str | int]]
) -> bytes:
    """The header of a message with so many bytes behind it. Raises ValueError or struct.error.

    fields: their codes and values, in the order in which they are to stand.
    """
    pieces = []
    codes = set()
    length = 0
    for code, value in fields:
        codes.add(code)
        piece = _number_field(code, value) if isinstance(value, int) else _text_field(code, value)
        length += -length % 8 + len(piece)
        pieces.append(piece + _PADDING[-len(piece) % 8])
    if not REQUIRED[kind] <= codes:
        raise ValueError("a header field is missing")
    head = _HEAD.pack(_LITTLE_ENDIAN, kind, flags, _PROTOCOL, size, serial, length)
    return head + b"".join(pieces)


def _number_field(code: int, value: int) -> bytes:
    return _NUMBER_FIELD.pack(code, b"\1u\0", value)


# The same names stand in most of what is sent. Others' names come and go, so it is bounded.
@functools.lru_cache(maxsize=512)
def _text_field(code: int, text: str) -> bytes:
    letter = HEADER_TYPES[code]
    pattern = _TEXTS.get(code)
    if pattern is not None:
        too_long = len(text) > MAX_NAME and pattern is not _PATH
        if too_long or not pattern.fullmatch(text):
            raise ValueError(f"a header field {code} that is not valid: {text[:MAX_NAME]!r}")
    out = bytearray((code, 1, ord(letter), 0))
    _writers(letter)[0](out, text)
    return bytes(out)


class Entries(bytes):
    """A dict's entries, marshalled already; it may stand wherever the dict may."""


@functools.lru_cache(maxsize=512)
def _entry(key: str, signature: str, value: Any) -> bytes:
    return body("sv", (key, Variant(signature, value)))


def entries(values: Iterable[tuple[str, str, Any]]) -> Entries:
    """The entries of an a{sv}: each a key, and the signature and value of its variant.

    VMs are alike, and so is most of what is told of them: what was marshalled is remembered. So
    values must be hashable, and all values of one key of one type. Raises as `body` does.
    """
    out = bytearray()
    for key, signature, value in values:
        out += _PADDING[-len(out) & 7]
        out += _entry(key, signature, value)
    return Entries(out)


def body(signature: str, values: Sequence[Any]) -> bytes:
    """Values as they stand in a message of that signature. Raises ValueError, struct.error, …"""
    out = bytearray()
    for write, value in zip(_writers(signature), values, strict=True):
        write(out, value)
    return bytes(out)


@remembered
def _writers(signature: str) -> tuple[_Write, ...]:
    return tuple(map(_writer, types_of(signature)))


def _writer(kind: Type) -> _Write:
    letter, inner = kind
    if letter in NUMBERS:
        return _number(NUMBERS[letter])
    if letter == "a" and inner[0][0] == "{":
        return _dict(*map(_writer, inner[0][1]))
    if letter == "a":
        return _bytes if inner[0][0] == "y" else _list(_writer(inner[0]), alignment(inner[0][0]))
    return _struct(tuple(map(_writer, inner))) if letter == "(" else _SIMPLE[letter]


@functools.cache
def _number(code: str) -> _Write:
    packer = struct.Struct("<" + code)
    pack, last = packer.pack, packer.size - 1

    def write(out: bytearray, value: Any) -> None:
        out += _PADDING[-len(out) & last]
        out += pack(value)

    return write


def _boolean(out: bytearray, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError("not a boolean")
    out += _PADDING[-len(out) & 3]
    out += _UINT.pack(value)


def _text(out: bytearray, value: Any) -> None:
    data = value.encode()
    if b"\0" in data:
        raise ValueError("a string with a NUL in it")
    out += _PADDING[-len(out) & 3]
    out += _UINT.pack(len(data))
    out += data
    out.append(0)


def _path(out: bytearray, value: Any) -> None:
    if not _PATH.fullmatch(value):
        raise ValueError("not an object path")
    _text(out, value)


def _signature(out: bytearray, value: Any) -> None:
    types_of(value)
    data = value.encode()
    out.append(len(data))
    out += data
    out.append(0)


def _variant(out: bytearray, value: Any) -> None:
    (write,) = _writers(value.signature)
    _signature(out, value.signature)
    write(out, value.value)


def _bytes(out: bytearray, value: Any) -> None:
    if not isinstance(value, (bytes, bytearray)):
        raise TypeError("not bytes")
    out += _PADDING[-len(out) & 3]
    out += _UINT.pack(len(value))
    out += value


def _list(element: _Write, first: int) -> _Write:
    def write(out: bytearray, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise TypeError("not a list")
        start = _begin(out, first)
        for item in value:
            element(out, item)
        _UINT.pack_into(out, start[0], len(out) - start[1])

    return write


def _dict(write_key: _Write, write_value: _Write) -> _Write:
    def write(out: bytearray, value: Any) -> None:
        start = _begin(out, 8)
        if isinstance(value, Entries):
            out += value
        elif isinstance(value, dict):
            for key, item in value.items():
                out += _PADDING[-len(out) & 7]
                write_key(out, key)
                write_value(out, item)
        else:
            raise TypeError("not a dict")
        _UINT.pack_into(out, start[0], len(out) - start[1])

    return write


def _begin(out: bytearray, first: int) -> tuple[int, int]:
    """Begin an array; gives where its size stands, and where its elements begin."""
    out += _PADDING[-len(out) & 3]
    out += bytes(4)
    at = len(out) - 4
    out += _PADDING[-len(out) & (first - 1)]
    return at, len(out)


def _struct(members: tuple[_Write, ...]) -> _Write:
    def write(out: bytearray, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise TypeError("not a struct")
        out += _PADDING[-len(out) & 7]
        for member, item in zip(members, value, strict=True):
            member(out, item)

    return write


_SIMPLE: dict[str, _Write] = {
    "b": _boolean,
    "s": _text,
    "o": _path,
    "g": _signature,
    "v": _variant,
}
