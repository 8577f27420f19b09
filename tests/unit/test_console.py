"""A guest's console: the bounded log, the fan-out to readers, and the way back."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from vmbus.guest.console import BoundedLog, Console

pytestmark = pytest.mark.usefixtures("nothing_left")

DEADLINE = 20.0
LIMIT = 4096


def _content(fd: int) -> bytes:
    """All that a descriptor has; closes it."""
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))


# The log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.fixture
async def log(path: Path, nothing_left: None) -> AsyncIterator[BoundedLog]:
    log = BoundedLog(path, LIMIT)
    yield log
    log.close()


def test_log_of_nothing_is_empty(log: BoundedLog, path: Path) -> None:
    assert _content(log.snapshot()) == b""
    assert not path.exists()


@pytest.mark.parametrize("size", [1, 100, LIMIT // 2, LIMIT // 2 + 1, LIMIT, 10 * LIMIT])
def test_log_is_bounded_and_keeps_the_newest(log: BoundedLog, path: Path, size: int) -> None:
    written = b""
    for number in range(100):
        piece = (b"%06d;" % number * (size // 7 + 1))[-size:]
        written += piece
        log.write(piece)
        kept = _content(log.snapshot())
        assert len(kept) == _on_disk(path) <= LIMIT
        assert written.endswith(kept)
        # Half of the bound at the least, or all that there was.
        assert len(kept) >= min(len(written), LIMIT // 2)


def test_log_drops_the_older_half_when_it_is_full(log: BoundedLog) -> None:
    half = LIMIT // 2
    for letter in b"abc":
        log.write(bytes([letter]) * half)
    assert _content(log.snapshot()) == b"b" * half + b"c" * half
    log.write(b"d")
    assert _content(log.snapshot()) == b"c" * half + b"d"


def test_log_is_readable_by_its_owner_only(log: BoundedLog, path: Path) -> None:
    log.write(b"secret")
    assert path.stat().st_mode & 0o777 == 0o600


def test_log_goes_on_after_close(log: BoundedLog) -> None:
    log.write(b"before, ")
    log.close()
    log.close()
    log.write(b"after")
    assert _content(log.snapshot()) == b"before, after"


def test_snapshot_is_read_only_and_at_its_beginning(log: BoundedLog) -> None:
    log.write(b"text")
    fd = log.snapshot()
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert not os.get_inheritable(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    assert os.read(fd, 100) == b"text"
    os.close(fd)


def test_snapshot_does_not_change_any_more(log: BoundedLog) -> None:
    log.write(b"then")
    fd = log.snapshot()
    log.write(b"now" * LIMIT)
    assert _content(fd) == b"then"


def test_log_that_cannot_be_written_is_lost_and_said_to_be_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "missing"
    log = BoundedLog(directory / "console.log", LIMIT)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            log.write(b"lost")
    assert [record.message for record in caplog.records] == [
        f"{directory}/console.log: No such file or directory; part of it is lost"
    ]
    assert _content(log.snapshot()) == b""
    directory.mkdir()
    log.write(b"found")
    assert _content(log.snapshot()) == b"found"
    log.close()


def test_full_disk_loses_the_newest_only(
    log: BoundedLog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write(b"kept, ")
    with monkeypatch.context() as patched, open("/dev/full", "wb", buffering=0) as full:
        patched.setattr(log, "_fd", full.fileno())
        log.write(b"lost, ")
    assert "No space left on device" in caplog.text
    log.write(b"kept again")
    assert _content(log.snapshot()) == b"kept, kept again"


# The console


@pytest.fixture
async def console(log: BoundedLog) -> AsyncIterator[Console]:
    console = Console(log)
    yield console
    console.close()


@pytest.fixture
async def guest(console: Console) -> AsyncIterator[socket.socket]:
    """The VMM's end."""
    with console.plug() as end:
        end.setblocking(False)
        yield end


@pytest.fixture
def readers(console: Console) -> Iterator[list[socket.socket]]:
    """Three readers."""
    ends = [console.attach() for _ in range(3)]
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


async def _send(sock: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(DEADLINE):
        await asyncio.get_running_loop().sock_sendall(sock, data)


async def _receive(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer at the end of the stream."""
    data = b""
    async with asyncio.timeout(DEADLINE):
        while len(data) < size:
            piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
            if not piece:
                break
            data += piece
    return data


async def _all_read() -> None:
    """When it returns, the console has read what was sent before, as the loop sees both at once."""
    await asyncio.to_thread(int)


ALL = 1 << 30


async def test_every_reader_and_the_log_get_what_the_guest_prints(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    await _send(guest, b"hello\n")
    for reader in readers:
        assert await _receive(reader, 6) == b"hello\n"
    assert _content(console.open_log()) == b"hello\n"


async def test_reader_gets_what_comes_after_it_came(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    await _send(guest, b"early,")
    await _receive(readers[0], 6)
    with console.attach() as late:
        late.setblocking(False)
        await _send(guest, b"late")
        assert await _receive(late, 4) == b"late"
    assert await _receive(readers[0], 4) == b"late"


async def test_reader_may_come_before_the_guest(console: Console) -> None:
    with console.attach() as reader, console.plug() as guest:
        for end in (reader, guest):
            end.setblocking(False)
        await _send(guest, b"first words")
        assert await _receive(reader, 11) == b"first words"


async def test_slow_reader_loses_only_its_own(
    guest: socket.socket, readers: list[socket.socket]
) -> None:
    """The guest prints far more than a socket holds; one reads along, the others don't."""
    quick, slow, _ = readers
    pieces = [b"%06d\n" % number * 1024 for number in range(200)]
    for piece in pieces:
        await _send(guest, piece)
        assert await _receive(quick, len(piece)) == piece
    kept = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            kept += slow.recv(1 << 20)
    assert pieces[0] == kept[: len(pieces[0])]
    assert len(kept) < len(b"".join(pieces))
    await _send(guest, b"now it keeps up")
    assert await _receive(slow, 15) == b"now it keeps up"


async def test_reader_that_goes_is_forgotten(
    guest: socket.socket, readers: list[socket.socket]
) -> None:
    readers[0].close()
    for _ in range(3):
        await _send(guest, b"hello\n")
        assert await _receive(readers[1], 6) == b"hello\n"


async def test_guest_gets_what_any_reader_types(
    guest: socket.socket, readers: list[socket.socket]
) -> None:
    for reader, text in zip(readers, (b"one", b"two", b"3rd"), strict=True):
        await _send(reader, text)
        assert await _receive(guest, 3) == text


async def test_typing_before_there_is_a_guest_goes_nowhere(
    console: Console, readers: list[socket.socket]
) -> None:
    await _send(readers[0], b"lost")
    await _all_read()
    with console.plug() as guest:
        guest.setblocking(False)
        await _send(readers[0], b"found")
        assert await _receive(guest, 5) == b"found"


async def test_guest_that_does_not_read_holds_up_typing_and_loses_none_of_it(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    """More is typed than the sockets between hold; the typist waits until the guest reads."""
    text = bytes(range(256)) * (16 * 1024)
    typing = asyncio.create_task(_send(readers[0], text))
    # Printing goes on meanwhile: enough rounds for everything that fits to have been taken.
    for _ in range(100):
        await _send(guest, b".")
        assert await _receive(readers[1], 1) == b"."
    assert not typing.done()
    assert len(console._input) <= 64 * 1024
    assert await _receive(guest, len(text)) == text
    await typing
    # And afterwards everybody can type again.
    for reader in readers:
        await _send(reader, b"again")
        assert await _receive(guest, 5) == b"again"


async def test_reader_that_comes_while_typing_is_held_up_makes_nobody_lose_any(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    text = bytes(range(256)) * (16 * 1024)
    typing = asyncio.create_task(_send(readers[0], text))
    for _ in range(100):
        await _send(guest, b".")
        await _receive(readers[1], 1)
    with console.attach() as late:
        late.setblocking(False)
        await _send(late, b"late")
        await _all_read()
        received = await _receive(guest, len(text) + 4)
    assert received.replace(b"late", b"", 1) == text
    await typing


async def test_guest_that_never_reads_does_not_hold_up_the_end(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    typing = asyncio.create_task(_send(readers[0], bytes(1 << 22)))
    await _send(guest, b".")
    await _receive(readers[1], 1)
    console.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await typing
    assert await _receive(readers[1], ALL) == b""


async def test_close_gives_what_is_left_and_then_the_end(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    """All that the VMM had printed when it died, though nobody has read any of it yet."""
    left = bytes(range(256)) * 12
    guest.send(left)
    guest.close()
    console.close()
    for reader in readers:
        assert await _receive(reader, ALL) == left
    assert _content(console.open_log()) == left


async def test_end_of_the_guest_alone_leaves_the_readers_be(
    console: Console, guest: socket.socket, readers: list[socket.socket]
) -> None:
    """A VMM may close its console and live on; what it printed is still read."""
    guest.send(b"bye")
    guest.close()
    assert await _receive(readers[0], 3) == b"bye"
    await _send(readers[1], b"anybody?")
    console.close()
    assert await _receive(readers[0], ALL) == b""


async def test_close_without_guest_and_twice(
    console: Console, readers: list[socket.socket]
) -> None:
    console.close()
    console.close()
    for reader in readers:
        assert await _receive(reader, ALL) == b""
