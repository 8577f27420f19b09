"""Text from VMMs and guests, made fit for any bus and any terminal."""

from __future__ import annotations

_MAX = 500


def clean(text: str) -> str:
    """One line of it, without control characters and what UTF-8 can't have; at most 500 long."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * _MAX])
    return shown.encode("utf-8", "replace").decode().strip()[:_MAX]
