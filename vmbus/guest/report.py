"""What a guest says of itself, in the format of sd_notify: decoded, bounded, never believed."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..text import clean

#: Longer lines are nothing that a guest would have to say.
MAX_LINE = 4096
_MAX_EXIT_STATUS = 255
_MAX_ERRNO = 4095


class Payload(enum.StrEnum):
    """The values of the PayloadState property, in the order in which they come."""

    NONE = "none"
    STARTING = "starting"
    STARTED = "started"
    READY = "ready"
    FINISHED = "finished"

    def then(self, other: Payload) -> Payload:
        """What follows when `other` is reported: there is no way back."""
        order = list(Payload)
        return max(self, other, key=order.index)

    @property
    def is_up(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self in (Payload.READY, Payload.FINISHED)


@dataclass(frozen=True, slots=True)
class Report:
    """What a guest said at once; None where it said nothing of that.

    passed: how far it said to be before it said to be as far as `payload`. error: an errno of the
    guest's, in words.
    """

    payload: Payload = Payload.NONE
    exit_status: int | None = None
    status: str | None = None
    error: str | None = None
    passed: tuple[Payload, ...] = ()


class Decoder:
    """Takes bytes as they come, cut anywhere, and holds no more of them than one line."""

    def __init__(self) -> None:
        self._line = b""
        self._overlong = False

    def feed(self, data: bytes) -> Report:
        """What is said by the lines that end in `data`."""
        *ended, rest = (self._line + data).split(b"\n")
        if ended and self._overlong:
            del ended[0]
            self._overlong = False
        self._overlong = self._overlong or len(rest) > MAX_LINE
        self._line = b"" if self._overlong else rest
        return _report(ended)

    def end(self) -> Report:
        """What is said by a last line that has no end of its own."""
        return self.feed(b"\n")


def _report(lines: Iterable[bytes]) -> Report:
    payload, exit_status, status, error = Payload.NONE, None, None, None
    passed: list[Payload] = []
    for line in lines:
        if len(line) > MAX_LINE:
            continue
        # What comes by way of a terminal has carriage returns.
        key, _, value = line.removesuffix(b"\r").partition(b"=")
        before = payload
        match key:
            case b"STATUS":
                status = clean(value.decode("utf-8", "replace"))
            case b"EXIT_STATUS":
                number = _number(value, _MAX_EXIT_STATUS)
                # It ends but once.
                exit_status = number if exit_status is None else exit_status
                payload = payload if number is None else Payload.FINISHED
            case b"ERRNO":
                number = _number(value, _MAX_ERRNO)
                error = f"error {number}: {os.strerror(number)}" if number else error
            case _:
                payload = payload.then(_SAYS.get((key, value), Payload.NONE))
        if payload is not before is not Payload.NONE:
            passed.append(before)
    return Report(payload, exit_status, status, error, tuple(passed))


_SAYS = {
    (b"X_VMBUS_PAYLOAD", b"started"): Payload.STARTED,
    (b"READY", b"1"): Payload.READY,
    (b"STOPPING", b"1"): Payload.FINISHED,
}


def _number(value: bytes, most: int) -> int | None:
    number = int(value) if value.isdigit() and len(value) <= len(str(most)) else most + 1
    return number if number <= most else None
