"""Texts for people and for programs: times, users, tables, JSON."""

from __future__ import annotations

import json
import os
import pwd
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..reasons import ORDERLY, Reason

if TYPE_CHECKING:
    from rich.table import Table

_STATES = {"running": "green", "failed": "red", "dead": "dim", "suspended": "yellow"}
_REASONS = {str(each): "dim" if each in ORDERLY else "red" for each in Reason}
#: How what is in a column looks, by the column's name.
_STYLES: dict[str, Mapping[str, str]] = {"STATE": _STATES, "REASON": _REASONS}
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def clean(text: str) -> str:
    """Text that can't steer a terminal: what isn't printable is shown as its escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def moment(usec: int) -> str:
    """A time in the contract's microseconds, as people here write it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(usec // 1_000_000))


def ago(usec: int) -> str:
    """How long a time is past, in its two largest units."""
    seconds = max(0, int(time.time()) - usec // 1_000_000)
    parts = []
    for name, size in _UNITS:
        count, seconds = divmod(seconds, size)
        parts.append(f"{count}{name}" if count else "")
    first = next((at for at, part in enumerate(parts) if part), len(parts))
    return " ".join([*filter(None, parts[first : first + 2] or ["0s"]), "ago"])


def user_name(uid: int) -> str:
    """A user's name, or the uid where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def print_json_line(value: Any) -> None:
    """Print one JSON document as a line of a stream."""
    click.echo(json.dumps(value))
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, legend: bool) -> None:
    """Print rows, coloured at a terminal. What isn't a terminal gets plain, whole columns."""
    if os.isatty(1):
        from rich.console import Console

        Console().print(coloured_table(header, rows, legend=legend))
        return
    rows = [[clean(cell) for cell in row] for row in rows]
    shown = [list(header), *rows] if legend else rows
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def coloured_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, legend: bool) -> Table:
    """Rows for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=legend)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = zip(header, row, strict=True)
        styles = [_STYLES.get(name, {}).get(cell, "") for name, cell in cells]
        table.add_row(*map(Text, map(clean, row), styles))
    return table
