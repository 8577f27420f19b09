"""A guest that prints without end: what it costs, what it loses, and who is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from vmbus.guest.console import OUTPUT, BoundedLog, Console

pytestmark = pytest.mark.usefixtures("nothing_left")

DEADLINE = 20.0
#: What this console may be read at most, in reads a second and in bytes between two reads.
READS, ROOM = 100, 128 * 1024


class CountingLog(BoundedLog):
    """A log that knows how often it was written to, and how much at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1 << 20)
        self.sizes: list[int] = []

    def write(self, data: bytes) -> None:
        self.sizes.append(len(data))
        super().write(data)

    def content(self) -> bytes:
        with os.fdopen(self.snapshot(), "rb") as file:
            return file.read()


@pytest.fixture
async def log(tmp_path: Path, nothing_left: None) -> CountingLog:
    return CountingLog(tmp_path / "console.log")


@pytest.fixture
async def console(log: CountingLog, tmp_path: Path) -> AsyncIterator[Console]:
    console = Console(log, tmp_path)
    console.plug()
    yield console
    console.close()


@pytest.fixture
def output(console: Console, tmp_path: Path) -> Iterator[int]:
    """The VMM's end of what the guest prints."""
    fd = os.open(tmp_path / OUTPUT, os.O_RDWR | os.O_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def flood(console: Console, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A guest that prints as fast as it can, until the deadline; it waits where nothing fits in."""
    with (tmp_path / OUTPUT).open("wb", buffering=0) as output:
        process = subprocess.Popen(["timeout", str(DEADLINE), "yes"], stdout=output)
    yield process
    process.terminate()
    process.wait()


async def _read(stream: socket.socket, size: int) -> bytes:
    data = b""
    async with asyncio.timeout(DEADLINE):
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(stream, size - len(data))
    return data


async def test_flood_costs_a_bounded_number_of_reads(
    console: Console, flood: subprocess.Popen[bytes], log: CountingLog
) -> None:
    """Whoever prints, and however much: the loop is free in between."""
    loop = asyncio.get_running_loop()
    with console.attach() as reader:
        reader.setblocking(False)
        await _read(reader, 1)
        began, before = loop.time(), len(log.sizes)
        while loop.time() < began + 0.5:
            await _read(reader, 1000)
        assert 1 < len(log.sizes) - before <= (loop.time() - began) * READS + 1
    assert max(log.sizes) <= ROOM
    assert flood.poll() is None


async def test_many_small_pieces_are_written_as_few(
    console: Console, output: int, log: CountingLog
) -> None:
    """A serial port prints byte by byte; it is not logged so."""
    with console.attach() as reader:
        reader.setblocking(False)
        os.write(output, b"#")
        assert await _read(reader, 1) == b"#"
        for _ in range(1000):
            os.write(output, b".")
            await asyncio.sleep(0)
        assert await _read(reader, 1000) == b"." * 1000
    assert len(log.sizes) < 500
    assert log.content() == b"#" + b"." * 1000


def test_quiet_console_costs_no_wake_up(tmp_path: Path) -> None:
    """Once what was printed is taken, nothing is done until more is printed."""

    class Counting(selectors.EpollSelector):
        wake_ups = 0

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            self.wake_ups += 1
            return super().select(timeout)

    selector = Counting()

    async def live() -> int:
        console = Console(BoundedLog(tmp_path / "console.log", 4096), tmp_path)
        console.plug()
        output = os.open(tmp_path / OUTPUT, os.O_RDWR | os.O_NONBLOCK)
        with console.attach() as reader:
            reader.setblocking(False)
            for _ in range(2):
                os.write(output, b"login: ")
                assert await _read(reader, 7) == b"login: "
            quiet = asyncio.get_running_loop().create_future()
            before = selector.wake_ups
            asyncio.get_running_loop().call_later(0.5, quiet.set_result, None)
            await quiet
        os.close(output)
        console.close()
        return selector.wake_ups - before

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        # The end of the last pause, and that of this wait; each may come a little early.
        assert runner.run(live()) <= 5


async def test_burst_as_large_as_a_boot_log_loses_nothing(
    console: Console, output: int, log: CountingLog
) -> None:
    """As fast as it can be, as long as what comes between two reads fits in."""
    printed = b""
    async with asyncio.timeout(DEADLINE):
        for number in range(40):
            piece = b"%06d\n" % number * 1024
            assert os.write(output, piece) == len(piece)
            printed += piece
            while sum(log.sizes) < len(printed) - ROOM // 2:
                await asyncio.sleep(0)
        while sum(log.sizes) < len(printed):
            await asyncio.sleep(0)
    assert log.content() == printed


async def test_sleeping_readers_cost_the_guest_and_the_others_nothing(
    console: Console, output: int, log: CountingLog
) -> None:
    """What they don't take is dropped; what they took is the guest's, from its beginning."""
    with contextlib.ExitStack() as stack:
        sleepers = [stack.enter_context(console.attach()) for _ in range(5)]
        awake = stack.enter_context(console.attach())
        awake.setblocking(False)
        printed = b""
        for number in range(40):
            piece = b"%07d\n" % number * 8192
            assert os.write(output, piece) == len(piece)
            assert await _read(awake, len(piece)) == piece
            printed += piece
        assert log.content() == printed[-len(log.content()) :]
        for sleeper in sleepers:
            sleeper.setblocking(False)
            kept = sleeper.recv(1 << 22)
            assert 0 < len(kept) < len(printed)
            assert printed.startswith(kept[: len(piece)])


async def test_flood_does_not_hold_up_the_end_of_the_service(
    console: Console, output: int, flood: subprocess.Popen[bytes], log: CountingLog
) -> None:
    """What the FIFO holds at that moment is taken, and the rest is the next service's."""
    with console.attach() as reader:
        reader.setblocking(False)
        await _read(reader, 1000)
    log.sizes.clear()
    console.close()
    assert len(log.sizes) <= 1
    assert flood.poll() is None
