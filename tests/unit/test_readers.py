"""Descriptors of VMs: few are called for in a turn, and none that is watched no more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial

import pytest

from vmbus.vmm.readers import PER_TURN, Readers, readers

pytestmark = pytest.mark.usefixtures("files_closed")


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    """More of them than are called for in one turn, each with something to read."""
    made = [os.pipe() for _ in range(3 * PER_TURN)]
    for _, writer in made:
        os.write(writer, b"x")
    yield made
    for each in made:
        for fd in each:
            os.close(fd)


class Log:
    """The turns of the loop, each with what was read in it."""

    def __init__(self, watched: Readers, wanted: int) -> None:
        self.turns: list[list[int]] = [[]]
        self._watched = watched
        self._wanted = wanted
        self._done = asyncio.Event()

    def take(self, fd: int) -> None:
        """Read one, which then has no more to say."""
        os.read(fd, 1)
        self._watched.remove(fd)
        self.turns[-1].append(fd)
        if sum(map(len, self.turns)) == self._wanted:
            self._done.set()

    async def all_taken(self) -> list[list[int]]:
        async with asyncio.timeout(20):
            while not self._done.is_set():
                await asyncio.sleep(0)
                self.turns.append([])
        return [turn for turn in self.turns if turn]


async def test_others_have_their_turn_between_any_few_that_are_ready(
    pipes: list[tuple[int, int]],
) -> None:
    watched = Readers(asyncio.get_running_loop())
    log = Log(watched, len(pipes))
    for reader, _ in pipes:
        watched.add(reader, partial(log.take, reader))
    turns = await log.all_taken()
    assert max(map(len, turns)) <= PER_TURN
    assert sorted(fd for turn in turns for fd in turn) == sorted(reader for reader, _ in pipes)


async def test_one_that_is_not_read_does_not_shut_others_out(pipes: list[tuple[int, int]]) -> None:
    watched = Readers(asyncio.get_running_loop())
    log = Log(watched, PER_TURN)
    for reader, _ in pipes[PER_TURN:]:
        watched.add(reader, lambda: None)
    for reader, _ in pipes[:PER_TURN]:
        watched.add(reader, partial(log.take, reader))
    await log.all_taken()
    for reader, _ in pipes:
        watched.remove(reader)


async def test_one_that_another_removes_is_not_called_any_more(
    pipes: list[tuple[int, int]],
) -> None:
    watched = Readers(asyncio.get_running_loop())
    (one, _), (other, _) = pipes[:2]
    called = []
    done = asyncio.Event()

    def remove_both(fd: int) -> None:
        called.append(fd)
        watched.remove(one)
        watched.remove(other)
        done.set()

    watched.add(one, lambda: remove_both(one))
    watched.add(other, lambda: remove_both(other))
    async with asyncio.timeout(20):
        await done.wait()
    assert len(called) == 1


async def test_one_that_can_not_be_watched_leaves_nothing_open() -> None:
    watched = Readers(asyncio.get_running_loop())
    with open("/proc/self/status") as file, pytest.raises(PermissionError):
        watched.add(file.fileno(), lambda: None)


async def test_each_loop_has_its_own() -> None:
    assert readers() is readers()
    ours = readers()

    async def theirs() -> bool:
        return readers() is ours

    assert not await asyncio.to_thread(lambda: asyncio.run(theirs()))
