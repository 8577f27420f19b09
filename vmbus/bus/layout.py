"""Where the values of a marshalled message lie: what can be told of it without a library.

A bus lets valid messages through only, yet the libraries trust that more than a service should:
garbage makes dbus-fast read through null pointers. So every message is walked here before any
library sees it. What belongs to its header is needed before it is decoded, and also when it can't
be: how many descriptors are its own, and who is to be told that it was refused.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Any

#: Largest message that is sent, or read as a reply: what the reference bus takes by default.
MAX_MESSAGE = 32 * 1024 * 1024
#: Largest array, as D-Bus has it, and so the largest header.
MAX_ARRAY = 64 * 1024 * 1024
FIXED_HEADER = 16
PATH, INTERFACE, MEMBER, ERROR_NAME = 1, 2, 3, 4
REPLY_SERIAL = 5
DESTINATION = 6
SENDER = 7
SIGNATURE = 8
UNIX_FDS = 9
#: How deep containers may stand in each other, in a signature and in values, as the bus has it.
_MAX_DEPTH = 64
_MAX_SIGNATURE = 255
#: Longest text of a header, in bytes, but for a path: names and signatures have no more.
_MAX_NAME = 255
#: Bytes that the signatures of a message's variants may have, each counted once. A call needs some
#: tens, and each byte may cost a library three hundred that it doesn't give back.
_MAX_VARIETY = 1024

#: Numbers, as the module struct calls them.
NUMBERS = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "h": "I", "x": "q", "t": "Q", "d": "d"}
_SIZES = {"b": 4, **{letter: struct.calcsize(code) for letter, code in NUMBERS.items()}}
_PLAIN = frozenset((*NUMBERS, "s", "o"))
_BASIC = frozenset((*_SIZES, "s", "o", "g"))
#: The types of the header's fields, by their codes.
HEADER_TYPES = " osssussgu"
#: What a message of each kind must have: path, interface, member, error name, reply serial.
REQUIRED = {1: {1, 3}, 2: {5}, 3: {4, 5}, 4: {1, 2, 3}}
#: A complete type: its letter, and for a container the types within.
Type = tuple[str, tuple[Any, ...]]
_SIMPLE: dict[str, Type] = {letter: (letter, ()) for letter in (*_BASIC, "v")}


class LayoutError(ValueError):
    """A message whose bytes are not what its signatures and lengths say."""


class _Walker:
    """A place in a message. Every step checks that what it steps over is there."""

    def __init__(self, data: bytes) -> None:
        if len(data) < FIXED_HEADER or data[0] not in b"lB":
            raise LayoutError("not the head of a message")
        self.data = data
        self.order = "<" if data[0] == ord("l") else ">"
        self.at = 0
        self._variety: set[str] = set()
        self._room = _MAX_VARIETY

    def align(self, size: int) -> None:
        self.skip(-self.at & (size - 1))

    def skip(self, size: int) -> int:
        """Step over some bytes; gives where they began."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise LayoutError("a value goes beyond the end")
        return start

    def number(self) -> int:
        """Step over an u and give its value."""
        self.align(4)
        (value,) = struct.unpack_from(self.order + "I", self.data, self.skip(4))
        return int(value)

    def text(self, size: int) -> str:
        """Step over so many bytes of text and the NUL behind them."""
        start = self.skip(size + 1)
        return self.data[start : start + size].decode("utf-8", "replace")

    def signature(self) -> str:
        return self.text(self.data[self.skip(1)])

    def variant(self) -> Type:
        """Step over a variant's signature, of one complete type, and give that."""
        signature = self.signature()
        if signature not in self._variety:
            self._variety.add(signature)
            self._room -= len(signature)
            if self._room < 0:
                raise LayoutError("variants of too many types")
        kinds = types_of(signature)
        if len(kinds) != 1:
            raise LayoutError("a variant that is not of one type")
        return kinds[0]

    def value(self, kind: Type, depth: int = 0) -> None:
        """Step over one value."""
        letter, inner = kind
        size = _SIZES.get(letter)
        if size is not None:
            self.align(size)
            self.skip(size)
        elif letter in "so":
            self.skip(self.number() + 1)
        elif letter == "g":
            types_of(self.signature())
        elif depth == _MAX_DEPTH:
            raise LayoutError("containers stand too deep in each other")
        elif letter == "v":
            self.value(self.variant(), depth + 1)
        elif letter == "a":
            self._array(inner[0], depth)
        else:
            self.align(8)
            for each in inner:
                self.value(each, depth + 1)

    def plain(self, letter: str) -> Any:
        """Step over one number or text, and give it. Raises UnicodeDecodeError, too."""
        code = NUMBERS.get(letter)
        if code is None:
            size = self.number()
            start = self.skip(size + 1)
            return str(self.data[start : start + size], "utf-8")
        size = _SIZES[letter]
        self.align(size)
        return struct.unpack_from(self.order + code, self.data, self.skip(size))[0]

    def _array(self, element: Type, depth: int) -> None:
        length = self.number()
        size = _SIZES.get(element[0])
        self.align(8 if element[0] in "({" else size or 1)
        if size is not None and length % size == 0:
            self.skip(length)
            return
        end = self.at + length
        while self.at < end:
            self.value(element, depth + 1)
        if self.at != end:
            raise LayoutError("an array that ends within an element")

    def header(self) -> Iterator[tuple[int, Any]]:
        """Step over the header, giving its fields that are known, and their codes."""
        self.at = FIXED_HEADER - 4
        end = self.number() + FIXED_HEADER
        while self.at < end:
            self.align(8)
            code = self.data[self.skip(1)]
            kind = self.variant()
            start = self.at
            self.value(kind)
            if 0 < code < len(HEADER_TYPES):
                after, self.at = self.at, start
                yield code, self._field(kind[0], HEADER_TYPES[code])
                self.at = after
        if self.at != end:
            raise LayoutError("a header that ends within a field")

    def _field(self, letter: str, right: str) -> Any:
        if letter != right:
            raise LayoutError("a header field of the wrong type")
        if letter == "g":
            return self.signature()
        number = self.number()
        return number if letter == "u" else self.text(number)


def header_fields(data: bytes) -> dict[int, Any]:
    """The header fields by their code, as far as they can be understood; the serial as 0."""
    fields: dict[int, Any] = {}
    try:
        walker = _Walker(data)
        walker.at = 8
        fields[0] = walker.number()
        fields.update(walker.header())
    except LayoutError:
        pass
    return fields


def long_text(data: bytes) -> tuple[int, int] | None:
    """Where, in the beginning of a header, the size of a text without measure lies, and that size.

    Only a path can be as long as a whole message.
    """
    walker = _Walker(data)
    walker.at = FIXED_HEADER
    try:
        while True:
            walker.align(8)
            walker.skip(1)
            kind = walker.variant()
            walker.align(4)
            at = walker.at
            if kind[0] in "so" and (size := walker.number()) > _MAX_NAME:
                return at, size
            walker.at = at
            walker.value(kind)
    except LayoutError:
        return None


def read(data: bytes) -> tuple[dict[int, Any], list[Any] | None]:
    """Walk one whole message. Raises LayoutError unless everything is where it should be.

    Returns its header fields as `header_fields` does, and its values, where all are plain: numbers
    and texts; None where not. Raises UnicodeDecodeError for one of these that is no text.
    """
    walker = _Walker(data)
    walker.at = 4
    body = walker.number()
    fields: dict[int, Any] = {0: walker.number()}
    fields.update(walker.header())
    required = REQUIRED.get(data[1])
    if required is None or not required <= fields.keys():
        raise LayoutError("a header field is missing, or the kind of message is not known")
    walker.align(8)
    if walker.at + body != len(data):
        raise LayoutError("not as long as it says")
    kinds = types_of(fields.get(SIGNATURE, ""))
    values: list[Any] | None = None
    if all(letter in _PLAIN for letter, _ in kinds):
        values = [walker.plain(letter) for letter, _ in kinds]
    else:
        for kind in kinds:
            walker.value(kind)
    if walker.at != len(data):
        raise LayoutError("a body that is longer than its signature")
    return fields, values


@functools.lru_cache(maxsize=256)
def types_of(signature: str) -> tuple[Type, ...]:
    """The complete types of a signature. Raises LayoutError."""
    if len(signature) > _MAX_SIGNATURE:
        raise LayoutError("a signature that is too long")
    letters = iter(signature)
    return tuple(_type(letter, letters, 0) for letter in letters)


def _type(letter: str, rest: Iterator[str], depth: int) -> Type:
    if letter in _SIMPLE:
        return _SIMPLE[letter]
    if depth == _MAX_DEPTH:
        raise LayoutError("containers stand too deep in each other")
    if letter == "a":
        element = next(rest, "")
        if element == "{":
            return "a", (("{", _entry(rest, depth + 2)),)
        return "a", (_type(element, rest, depth + 1),)
    if letter == "(":
        members = tuple(_type(each, rest, depth + 1) for each in iter(lambda: next(rest, ""), ")"))
        if members:
            return "(", members
    raise LayoutError("a signature that is not valid")


def _entry(rest: Iterator[str], depth: int) -> tuple[Type, ...]:
    key, value = next(rest, ""), _type(next(rest, ""), rest, depth)
    if key not in _BASIC or next(rest, "") != "}":
        raise LayoutError("a dict of something else than a basic type to one type")
    return _SIMPLE[key], value
