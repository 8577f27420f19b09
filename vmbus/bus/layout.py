"""What marshalled messages are made of: their headers' fields, their types, their bounds."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

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
MAX_DEPTH = 64
_MAX_SIGNATURE = 255
_ORDINARY = 32
#: Longest name in a header, in bytes; a path may be of any length.
MAX_NAME = 255

#: Numbers, as the module struct calls them.
NUMBERS = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "h": "I", "x": "q", "t": "Q", "d": "d"}
_BASIC = frozenset((*NUMBERS, "b", "s", "o", "g"))
#: The types of the header's fields, by their codes.
HEADER_TYPES = " osssussgu"
#: What a message of each kind must have: path, interface, member, error name, reply serial.
REQUIRED = {1: {1, 3}, 2: {5}, 3: {4, 5}, 4: {1, 2, 3}}
_T = TypeVar("_T")
#: A complete type: its letter, and for a container the types within.
Type = tuple[str, tuple[Any, ...]]
_SIMPLE: dict[str, Type] = {letter: (letter, ()) for letter in (*_BASIC, "v")}


class LayoutError(ValueError):
    """A message whose bytes are not what its signatures and lengths say."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A value that brings its type along."""

    signature: str
    value: Any


def alignment(letter: str) -> int:
    """What a value of that type begins at a multiple of, in bytes."""
    if letter in "({":
        return 8
    return 1 if letter in "gv" else struct.calcsize(NUMBERS.get(letter, "I"))


def nesting(kind: Type) -> int:
    """How deep the containers of a type stand in each other, not counting variants."""
    _, inner = kind
    return 1 + max(map(nesting, inner)) if inner else 0


def remembered(make: Callable[..., _T]) -> Callable[..., _T]:
    """Remember what is made of a signature, unless it is longer than any that vmbus needs.

    Others' signatures come and go without end, and what is made of them takes memory.
    """
    known = functools.lru_cache(maxsize=256)(make)

    @functools.wraps(make)
    def get(signature: str, *rest: str) -> _T:
        return (known if len(signature) <= _ORDINARY else make)(signature, *rest)

    return get


@remembered
def types_of(signature: str) -> tuple[Type, ...]:
    """The complete types of a signature. Raises LayoutError."""
    if len(signature) > _MAX_SIGNATURE:
        raise LayoutError("a signature that is too long")
    letters = iter(signature)
    return tuple(_type(letter, letters, 0) for letter in letters)


def _type(letter: str, rest: Iterator[str], depth: int) -> Type:
    if letter in _SIMPLE:
        return _SIMPLE[letter]
    if depth == MAX_DEPTH:
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
