"""The virtio port's end in the service: two FIFOs that outlive it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.rig import DEADLINE
from vmbus.guest.port import CHUNK, NOTIFY_INPUT, NOTIFY_OUTPUT, PAUSE, Port
from vmbus.guest.report import Payload, Report

pytestmark = pytest.mark.usefixtures("nothing_left")


class Heard:
    """What was heard, and when."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.times: list[float] = []
        self._news = asyncio.Event()

    def __call__(self, report: Report) -> None:
        self.reports.append(report)
        self.times.append(asyncio.get_running_loop().time())
        self._news.set()

    async def until(self, count: int) -> list[Report]:
        async with asyncio.timeout(DEADLINE):
            while len(self.reports) < count:
                self._news.clear()
                await self._news.wait()
        return self.reports


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[int]:
    """The guest's end, as a VMM has it: open both ways, before ours and after."""
    for name in (NOTIFY_INPUT, NOTIFY_OUTPUT):
        os.mkfifo(tmp_path / name)
    fd = os.open(tmp_path / NOTIFY_OUTPUT, os.O_RDWR | os.O_NONBLOCK)
    yield fd
    os.close(fd)


async def test_port_makes_its_fifos(tmp_path: Path) -> None:
    """A pair of them, for nobody else to read."""
    heard = Heard()
    port = Port(tmp_path, heard)
    port.plug()
    assert {(tmp_path / name).stat().st_mode & 0o177777 for name in os.listdir(tmp_path)} == {
        0o010600
    }
    guest = os.open(tmp_path / NOTIFY_OUTPUT, os.O_WRONLY)
    os.write(guest, b"READY=1\n")
    os.close(guest)
    assert await heard.until(1) == [Report(Payload.READY)]
    port.close()
    port.close()


async def test_what_was_said_meanwhile_is_heard_at_once(tmp_path: Path, guest: int) -> None:
    """However much it is, before anything else can happen."""
    os.write(guest, b"STATUS=old\n" * 3000 + b"READY=1\n")
    heard = Heard()
    port = Port(tmp_path, heard)
    port.plug_again()
    assert heard.reports[-1].payload is Payload.READY
    port.close()


async def test_what_is_not_heard_is_left_to_the_next(tmp_path: Path, guest: int) -> None:
    first, second = Heard(), Heard()
    port = Port(tmp_path, first)
    port.plug_again()
    port.close()
    os.write(guest, b"READY=1\n")
    port = Port(tmp_path, second)
    port.plug_again()
    port.close()
    assert (first.reports, second.reports) == ([], [Report(Payload.READY)])


async def test_last_words_are_heard_however_they_are_cut(tmp_path: Path, guest: int) -> None:
    heard = Heard()
    port = Port(tmp_path, heard)
    port.plug_again()
    os.write(guest, b"STATUS=bye\nEXIT_STATUS=7")
    port.drain()
    port.close()
    assert heard.reports == [Report(status="bye"), Report(Payload.FINISHED, exit_status=7)]


async def test_flood_is_heard_in_small_pieces_with_pauses(tmp_path: Path, guest: int) -> None:
    """What a guest can cost is bounded, whatever it sends."""
    heard = Heard()
    port = Port(tmp_path, heard)
    port.plug_again()
    os.write(guest, b"STATUS=flood\n" * (5 * CHUNK // 13))
    await heard.until(4)
    port.close()
    gaps = [b - a for a, b in pairwise(heard.times)]
    assert min(gaps) > PAUSE / 2


async def test_nothing_is_drained_where_nothing_was_plugged(tmp_path: Path) -> None:
    heard = Heard()
    port = Port(tmp_path, heard)
    port.drain()
    port.close()
    assert heard.reports == []
