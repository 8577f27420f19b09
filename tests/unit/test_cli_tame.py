"""What vmbusctl prints of what a guest printed."""

from __future__ import annotations

import json

import pytest

from vmbus.cli.tame import AsIs, Lines, Printer, Tame

#: What a guest prints, and what a terminal gets of it.
TEXTS = [
    ("plain\r\n\ttext", "plain\r\n\ttext"),
    ("\u00fc \u65e5 \U0001f600", "\u00fc \u65e5 \U0001f600"),
    ("\x1b[1;31mred\x1b[m", "\x1b[1;31mred\x1b[m\x1b[0m"),
    ("\x1b[38:2:1:2:3mred", "\x1b[38:2:1:2:3mred\x1b[0m"),
    ("\x1b[2J", "\\x1b[2J"),
    ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
    ("\x1b[" + "1;" * 40 + "m", "\\x1b[" + "1;" * 40 + "m"),
    ("\x9b2J\x85\x7f\x00", "\\x9b2J\\x85\\x7f\\x00"),
    ("\u202edrawkcab", "\\u202edrawkcab"),
    ("\x1b", "\\x1b"),
    ("\x1b[0;3", "\\x1b[0;3"),
]


def _printed(printer: Printer, data: bytes, size: int) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(map(printer.feed, pieces)) + printer.end()


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_terminal_gets_text_and_colours_and_the_rest_written_out(
    text: str, shown: str, size: int
) -> None:
    """However the text is cut into pieces."""
    assert _printed(Tame(), text.encode(), size).decode() == shown


def test_terminal_gets_no_byte_that_is_no_text() -> None:
    assert _printed(Tame(), b"a\xff\x9bb\xc3", 1).decode() == "a\ufffd\ufffdb\ufffd"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_pipe_gets_every_byte(size: int) -> None:
    data = bytes(range(256))
    assert _printed(AsIs(), data, size) == data


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_program_gets_a_document_for_every_line(size: int) -> None:
    """A line that has no end yet is told at the end, and one that never ends in parts."""
    text = "one\r\n\n\x1b[2J \u00fc\nlast"
    lines = [json.loads(line) for line in _printed(Lines(), text.encode(), size).splitlines()]
    assert [line["line"] for line in lines] == ["one", "", "\x1b[2J \u00fc", "last"]


def test_line_without_end_is_not_kept_without_bound() -> None:
    lines = Lines()
    printed = b"".join(lines.feed(b"x" * 1000) for _ in range(1000))
    assert len(printed) > 900_000


def test_bytes_that_are_no_text_are_escaped_for_programs() -> None:
    assert json.loads(_printed(Lines(), b"a\xffb\n", 1)) == {"line": "a\\xffb"}
