"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

import click

_SIZE = re.compile(r"(\d{1,20})(?:([KMGT])(?:iB)?)?", re.ASCII | re.IGNORECASE)
_UNITS = " KMGT"
_MIB = 1 << 20
_MOST = (1 << 64) - 1


def parse_size(text: str) -> int:
    """Take a number of bytes, or with K, M, G or T (also KiB, ...) of powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size such as 512M, 2GiB or 1048576")
    number, unit = match.groups(" ")
    size = int(number) << 10 * _UNITS.index(unit.upper())
    if size > _MOST:
        raise click.BadParameter(f"{text} is more than any size can be")
    return size


def size_text(size: int) -> str:
    """A size in MiB, for people."""
    return f"{round(size / _MIB, 1):.15g} MiB"
