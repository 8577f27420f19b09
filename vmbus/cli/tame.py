"""How a guest's output is printed: as it is, as text that steers no terminal, or as JSON."""

from __future__ import annotations

import codecs
import json
import re
from typing import Protocol

from .text import clean

_COLOUR = r"\x1b\[[0-9;:]{0,32}m"
_UNUSUAL = re.compile(rf"({_COLOUR})|[^\t\r\n -~]")
_BEGUN = re.compile(r"\x1b(\[[0-9;:]{0,32})?\Z")
_NO_COLOUR = b"\x1b[0m"
#: Characters of a line that is taken for one before its end has come.
_MAX_LINE = 64 * 1024


class Printer(Protocol):
    """Makes of a guest's output what is printed, however it is cut into pieces."""

    def feed(self, data: bytes) -> bytes:
        """What to print for a piece; some of it may be kept until more comes."""

    def end(self) -> bytes:
        """What was kept, and what ends it all."""


class AsIs:
    """Byte by byte."""

    def feed(self, data: bytes) -> bytes:
        """See Printer.feed."""
        return data

    def end(self) -> bytes:
        """See Printer.end."""
        return b""


class Tame:
    """For a terminal: text and colours; all other control characters are written out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._kept = ""
        self._coloured = False

    def feed(self, data: bytes) -> bytes:
        """See Printer.feed."""
        text = self._kept + self._decoder.decode(data)
        begun = _BEGUN.search(text)
        at = begun.start() if begun else len(text)
        self._kept = text[at:]
        return self._tame(text[:at])

    def end(self) -> bytes:
        """See Printer.end."""
        rest = self._tame(self._kept + self._decoder.decode(b"", final=True))
        return rest + (_NO_COLOUR if self._coloured else b"")

    def _tame(self, text: str) -> bytes:
        return _UNUSUAL.sub(self._written_out, text).encode()

    def _written_out(self, match: re.Match[str]) -> str:
        if match[1]:
            self._coloured = True
            return match[0]
        return clean(match[0])


class Lines:
    """For programs: a JSON document for every line."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._kept = ""

    def feed(self, data: bytes) -> bytes:
        """See Printer.feed."""
        *lines, self._kept = (self._kept + self._decoder.decode(data)).split("\n")
        if len(self._kept) > _MAX_LINE:
            lines.append(self._kept)
            self._kept = ""
        return b"".join(map(_document, lines))

    def end(self) -> bytes:
        """See Printer.end."""
        self._kept += self._decoder.decode(b"", final=True)
        return _document(self._kept) if self._kept else b""


def _document(line: str) -> bytes:
    return json.dumps({"line": line.removesuffix("\r")}).encode() + b"\n"
