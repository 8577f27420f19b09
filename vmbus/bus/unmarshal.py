"""What came, made into values: as wary as marshal.py is strict.

A bus lets valid messages through only, yet the libraries trust that more than a service should:
garbage makes dbus-fast read through null pointers, and both remember every type they ever saw. Here
each step checks that what it reads is there. Reading raises LayoutError, or else struct.error,
IndexError or UnicodeDecodeError.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .layout import (
    FIXED_HEADER,
    HEADER_TYPES,
    MAX_DEPTH,
    MAX_NAME,
    NUMBERS,
    REQUIRED,
    SIGNATURE,
    LayoutError,
    Type,
    Variant,
    alignment,
    nesting,
    remembered,
    types_of,
)

#: Bytes that the signatures of a message's variants may have, each counted once. A call needs some
#: tens.
_MAX_VARIETY = 1024
#: Variants that a call may have, those of its header among them. The fullest config has some 80;
#: a call that is full of them would hold everybody else up.
_MAX_VARIANTS = 1024
_CALL = 1
_UNREADABLE = (LayoutError, struct.error, IndexError, UnicodeDecodeError)


class TooMuch(LayoutError):
    """A message that may well be valid, but would take too long to be read. Says what can be."""


#: Reads a value that may begin at a place, or after its padding; gives it, and where it ends.
_Read = Callable[["_Source", int], tuple[Any, int]]


class _Source:
    """The bytes of a message, and what its variants have been and may still be."""

    __slots__ = ("_known", "_left", "_room", "data", "depth", "order")

    def __init__(self, data: bytes) -> None:
        if len(data) < FIXED_HEADER or data[0] not in b"lB":
            raise LayoutError("not the head of a message")
        self.data = data
        self.order = "<" if data[0] == ord("l") else ">"
        self.depth = 0
        self._known: dict[str, tuple[_Read, int]] = {}
        self._room = _MAX_VARIETY
        self._left = _MAX_VARIANTS if data[1] == _CALL else sys.maxsize

    def number(self, at: int) -> int:
        """The u that is there, aligned."""
        return int(_UINT[self.order](self.data, at)[0])

    def type_at(self, at: int) -> tuple[str, int, _Read, int]:
        """A variant's signature, where its value begins, what reads that, and how deep it is."""
        signature, at = _short_text(self, at)
        self._left -= 1
        if self._left < 0:
            raise TooMuch(f"a call can have at most {_MAX_VARIANTS} variants")
        known = self._known.get(signature)
        if known is None:
            self._room -= len(signature)
            if self._room < 0:
                raise LayoutError("variants of too many types")
            known = self._known[signature] = _reader(signature, self.order)
        return signature, at, *known


_UINT = {order: struct.Struct(order + "I").unpack_from for order in "<>"}


def read(data: bytes) -> tuple[dict[int, Any], list[Any]]:
    """Read one whole message: its header fields, as `header_fields` has them, and its values.

    A b is a bool, an ay bytes, an array or a struct a list, a dict a dict, and a v a Variant.
    """
    source = _Source(data)
    fields: dict[int, Any] = {0: source.number(8)}
    fields.update(_header(source))
    required = REQUIRED.get(data[1])
    if required is None or not required <= fields.keys():
        raise LayoutError("a header field is missing, or the kind of message is not known")
    at = FIXED_HEADER + source.number(FIXED_HEADER - 4)
    at += -at & 7
    if at + source.number(4) != len(data):
        raise LayoutError("not as long as it says")
    values = []
    for each in _readers(fields.get(SIGNATURE, ""), source.order):
        value, at = each(source, at)
        values.append(value)
    if at != len(data):
        raise LayoutError("a body that is longer than its signature")
    return fields, values


def header_fields(data: bytes) -> dict[int, Any]:
    """The header fields by their code, as far as they can be understood; the serial as 0.

    Needed before a message is read, and also when it can't be: how many descriptors are its own,
    and who is to be told that it was refused.
    """
    fields: dict[int, Any] = {}
    try:
        source = _Source(data)
        fields[0] = source.number(8)
        fields.update(_header(source))
    except _UNREADABLE:
        pass
    return fields


def long_text(data: bytes) -> tuple[int, int] | None:
    """Where, in the beginning of a header, the size of a text without measure lies, and that size.

    Only a path can be as long as a whole message.
    """
    at = FIXED_HEADER
    try:
        source = _Source(data)
        while True:
            at += -at & 7
            signature, at, reader, _ = source.type_at(at + 1)
            if signature in ("s", "o"):
                at += -at & 3
                if (size := source.number(at)) > MAX_NAME:
                    return at, size
            _, at = reader(source, at)
    except _UNREADABLE:
        return None


def _header(source: _Source) -> Iterator[tuple[int, Any]]:
    """The header's fields that are known, and their codes."""
    at = FIXED_HEADER
    end = at + source.number(at - 4)
    while at < end:
        at += -at & 7
        code = source.data[at]
        signature, at, reader, _ = source.type_at(at + 1)
        value, at = reader(source, at)
        if 0 < code < len(HEADER_TYPES):
            if signature != HEADER_TYPES[code]:
                raise LayoutError("a header field of the wrong type")
            yield code, value
    if at != end:
        raise LayoutError("a header that ends within a field")


@remembered
def _readers(signature: str, order: str) -> tuple[_Read, ...]:
    return tuple(_make(kind, order) for kind in types_of(signature))


@remembered
def _reader(signature: str, order: str) -> tuple[_Read, int]:
    """What reads a variant's value, and how deep that may be."""
    kinds = types_of(signature)
    if len(kinds) != 1:
        raise LayoutError("a variant that is not of one type")
    return _make(kinds[0], order), nesting(kinds[0])


def _make(kind: Type, order: str) -> _Read:
    letter, inner = kind
    if letter in NUMBERS:
        return _number(NUMBERS[letter], order)
    if letter == "a":
        return _array(inner[0], order)
    if letter == "(":
        return _struct(tuple(_make(each, order) for each in inner))
    return _text(order) if letter in "so" else _SIMPLE[letter]


# One for all that read it: a signature may have hundreds.
@functools.cache
def _number(code: str, order: str) -> _Read:
    number = struct.Struct(order + code)
    unpack, size = number.unpack_from, number.size

    def read(source: _Source, at: int) -> tuple[Any, int]:
        at += -at & (size - 1)
        return unpack(source.data, at)[0], at + size

    return read


def _boolean(source: _Source, at: int) -> tuple[bool, int]:
    at += -at & 3
    return source.number(at) != 0, at + 4


@functools.cache
def _text(order: str) -> _Read:
    unpack = _UINT[order]

    def read(source: _Source, at: int) -> tuple[str, int]:
        at += -at & 3
        end = at + 4 + unpack(source.data, at)[0]
        if end >= len(source.data):
            raise LayoutError("a text goes beyond the end")
        return str(source.data[at + 4 : end], "utf-8"), end + 1

    return read


def _short_text(source: _Source, at: int) -> tuple[str, int]:
    end = at + 1 + source.data[at]
    if end >= len(source.data):
        raise LayoutError("a signature goes beyond the end")
    return str(source.data[at + 1 : end], "utf-8"), end + 1


def _signature(source: _Source, at: int) -> tuple[str, int]:
    signature, at = _short_text(source, at)
    types_of(signature)
    return signature, at


def _variant(source: _Source, at: int) -> tuple[Variant, int]:
    signature, at, reader, deeper = source.type_at(at)
    source.depth += 1 + deeper
    if source.depth > MAX_DEPTH:
        raise LayoutError("containers stand too deep in each other")
    value, at = reader(source, at)
    source.depth -= 1 + deeper
    return Variant(signature, value), at


_SIMPLE: dict[str, _Read] = {"b": _boolean, "g": _signature, "v": _variant}


def _array(element: Type, order: str) -> _Read:
    letter, inner = element
    first = alignment(letter) - 1
    if letter == "{":
        elements = _dict(*(_make(each, order) for each in inner))
    else:
        elements = _bytes if letter == "y" else _list(_make(element, order))

    def read(source: _Source, at: int) -> tuple[Any, int]:
        at += -at & 3
        size = source.number(at)
        at += 4
        at += -at & first
        end = at + size
        if end > len(source.data):
            raise LayoutError("an array goes beyond the end")
        found, at = elements(source, at, end)
        if at != end:
            raise LayoutError("an array that ends within an element")
        return found, at

    return read


#: Reads what lies between two places; gives it, and where it ends.
_Elements = Callable[[_Source, int, int], tuple[Any, int]]


def _bytes(source: _Source, at: int, end: int) -> tuple[bytes, int]:
    return source.data[at:end], end


def _list(element: _Read) -> _Elements:
    def read(source: _Source, at: int, end: int) -> tuple[list[Any], int]:
        found = []
        while at < end:
            value, at = element(source, at)
            found.append(value)
        return found, at

    return read


def _dict(read_key: _Read, read_value: _Read) -> _Elements:
    def read(source: _Source, at: int, end: int) -> tuple[dict[Any, Any], int]:
        found = {}
        while at < end:
            key, at = read_key(source, at + (-at & 7))
            found[key], at = read_value(source, at)
        return found, at

    return read


def _struct(members: tuple[_Read, ...]) -> _Read:
    def read(source: _Source, at: int) -> tuple[list[Any], int]:
        at += -at & 7
        values = []
        for member in members:
            value, at = member(source, at)
            values.append(value)
        return values, at

    return read
