"""Fixtures of the unit tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest


def open_files() -> Counter[str]:
    """What this process' descriptors are open on; inodes and numbers left out."""
    found: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was what listdir had open
            found[os.readlink(f"/proc/self/fd/{entry}").partition(":[")[0]] += 1
    return found


def children() -> set[str]:
    """The pids of this process' children, zombies among them."""
    found: set[str] = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found |= set((thread / "children").read_text().split())
    return found


@pytest.fixture
def files_closed() -> Iterator[None]:
    """Fails a test that leaves a descriptor open."""
    before = open_files()
    yield
    assert open_files() == before


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Fails a test that leaves a descriptor, a child process or a task behind."""
    files, processes = open_files(), children()
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert open_files() == files
    assert children() == processes
