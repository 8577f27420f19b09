"""A guest's console: the bounded log, the fan-out to readers, and the way back."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from vmbus.guest.console import _LOST, INPUT, OUTPUT, BoundedLog, Console

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


class Guest:
    """The VMM's ends of a console, open as VMMs have them: both ways."""

    def __init__(self, directory: Path) -> None:
        self.output = os.open(directory / OUTPUT, os.O_RDWR | os.O_NONBLOCK)
        self.input = os.open(directory / INPUT, os.O_RDWR | os.O_NONBLOCK)

    def say(self, data: bytes) -> None:
        """Print what fits in at once."""
        assert os.write(self.output, data) == len(data)

    async def hear(self, size: int) -> bytes:
        """So many bytes of what was typed."""
        loop, data = asyncio.get_running_loop(), b""
        async with asyncio.timeout(DEADLINE):
            while len(data) < size:
                readable = asyncio.Event()
                loop.add_reader(self.input, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self.input)
                with contextlib.suppress(BlockingIOError):
                    data += os.read(self.input, size - len(data))
        return data

    def close(self) -> None:
        """Once or twice."""
        for fd in (self.output, self.input):
            if fd >= 0:
                os.close(fd)
        self.output = self.input = -1


@pytest.fixture
async def console(log: BoundedLog, tmp_path: Path) -> AsyncIterator[Console]:
    console = Console(log, tmp_path)
    yield console
    console.close()


@pytest.fixture
async def guest(console: Console, tmp_path: Path) -> AsyncIterator[Guest]:
    console.plug()
    guest = Guest(tmp_path)
    yield guest
    guest.close()


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
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    guest.say(b"hello\n")
    for reader in readers:
        assert await _receive(reader, 6) == b"hello\n"
    assert _content(console.open_log()) == b"hello\n"


async def test_reader_gets_what_comes_after_it_came(
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    guest.say(b"early,")
    await _receive(readers[0], 6)
    with console.attach() as late:
        late.setblocking(False)
        guest.say(b"late")
        assert await _receive(late, 4) == b"late"
    assert await _receive(readers[0], 4) == b"late"


async def test_reader_may_come_before_the_guest(console: Console, tmp_path: Path) -> None:
    with console.attach() as reader:
        reader.setblocking(False)
        console.plug()
        with contextlib.closing(Guest(tmp_path)) as guest:
            guest.say(b"first words")
            assert await _receive(reader, 11) == b"first words"


async def test_slow_reader_loses_only_its_own(guest: Guest, readers: list[socket.socket]) -> None:
    """The guest prints far more than a socket holds; one reads along, the others don't."""
    quick, slow, _ = readers
    pieces = [b"%06d\n" % number * 1024 for number in range(200)]
    for piece in pieces:
        guest.say(piece)
        assert await _receive(quick, len(piece)) == piece
    kept = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            kept += slow.recv(1 << 20)
    assert pieces[0] == kept[: len(pieces[0])]
    assert len(kept) < len(b"".join(pieces))
    guest.say(b"now it keeps up")
    assert await _receive(slow, 15) == b"now it keeps up"


async def test_reader_that_goes_is_forgotten(guest: Guest, readers: list[socket.socket]) -> None:
    readers[0].close()
    for _ in range(3):
        guest.say(b"hello\n")
        assert await _receive(readers[1], 6) == b"hello\n"


async def test_guest_gets_what_any_reader_types(guest: Guest, readers: list[socket.socket]) -> None:
    for reader, text in zip(readers, (b"one", b"two", b"3rd"), strict=True):
        await _send(reader, text)
        assert await guest.hear(3) == text


async def test_typing_before_there_is_a_guest_goes_nowhere(
    console: Console, readers: list[socket.socket], tmp_path: Path
) -> None:
    await _send(readers[0], b"lost")
    await _all_read()
    console.plug()
    with contextlib.closing(Guest(tmp_path)) as guest:
        await _send(readers[0], b"found")
        assert await guest.hear(5) == b"found"


async def test_guest_that_does_not_read_holds_up_typing_and_loses_none_of_it(
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    """More is typed than the sockets between hold; the typist waits until the guest reads."""
    text = bytes(range(256)) * (16 * 1024)
    typing = asyncio.create_task(_send(readers[0], text))
    # Printing goes on meanwhile: enough rounds for everything that fits to have been taken.
    for _ in range(100):
        guest.say(b".")
        assert await _receive(readers[1], 1) == b"."
    assert not typing.done()
    assert len(console._typed) <= 64 * 1024
    assert await guest.hear(len(text)) == text
    await typing
    # And afterwards everybody can type again.
    for reader in readers:
        await _send(reader, b"again")
        assert await guest.hear(5) == b"again"


async def test_reader_that_comes_while_typing_is_held_up_makes_nobody_lose_any(
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    text = bytes(range(256)) * (16 * 1024)
    typing = asyncio.create_task(_send(readers[0], text))
    for _ in range(100):
        guest.say(b".")
        await _receive(readers[1], 1)
    with console.attach() as late:
        late.setblocking(False)
        await _send(late, b"late")
        await _all_read()
        received = await guest.hear(len(text) + 4)
    assert received.replace(b"late", b"", 1) == text
    await typing


async def test_guest_that_never_reads_does_not_hold_up_the_end(
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    typing = asyncio.create_task(_send(readers[0], bytes(1 << 22)))
    guest.say(b".")
    await _receive(readers[1], 1)
    console.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await typing
    assert await _receive(readers[1], ALL) == b""


async def test_close_gives_what_is_left_and_then_the_end(
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    """All that the VMM had printed when it died, though nobody has read any of it yet."""
    left = bytes(range(256)) * 12
    guest.say(left)
    guest.close()
    console.close()
    for reader in readers:
        assert await _receive(reader, ALL) == left
    assert _content(console.open_log()) == left


async def test_end_of_the_guest_alone_leaves_the_readers_be(
    console: Console, guest: Guest, readers: list[socket.socket]
) -> None:
    """A VMM may close its console and live on; what it printed is still read."""
    guest.say(b"bye")
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


# From one service to the next


@pytest.fixture
async def next_console(
    console: Console, path: Path, tmp_path: Path
) -> AsyncIterator[Callable[[], Console]]:
    """Ends the service that has the console, and makes the next one's, yet to be plugged in."""
    consoles: list[Console] = []

    def end() -> Console:
        (consoles[-1] if consoles else console).close()
        consoles.append(Console(BoundedLog(path, 1 << 20), tmp_path))
        return consoles[-1]

    yield end
    for each in consoles:
        each.close()


async def test_console_goes_on_where_another_service_left_it(
    guest: Guest, readers: list[socket.socket], next_console: Callable[[], Console]
) -> None:
    """What is printed meanwhile is in the log, and nothing that fits is lost."""
    guest.say(b"one,")
    assert await _receive(readers[0], 4) == b"one,"
    console = next_console()
    assert await _receive(readers[0], ALL) == b""
    guest.say(b"two,")
    console.plug_again()
    with console.attach() as reader:
        reader.setblocking(False)
        assert await _receive(reader, 4) == b"two,"
        guest.say(b"three")
        assert await _receive(reader, 5) == b"three"
        await _send(reader, b"typed")
        assert await guest.hear(5) == b"typed"
    assert _content(console.open_log()) == b"one,two,three"


async def test_typing_that_the_guest_has_not_taken_is_there_when_another_service_comes(
    guest: Guest, readers: list[socket.socket], next_console: Callable[[], Console]
) -> None:
    await _send(readers[0], b"typed")
    await _all_read()
    console = next_console()
    console.plug_again()
    assert await guest.hear(5) == b"typed"


async def test_output_that_may_not_all_have_fitted_is_said_to_be_lost(
    guest: Guest, next_console: Callable[[], Console]
) -> None:
    console = next_console()
    kept = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            kept += os.write(guest.output, b"x" * 1000)
    console.plug_again()
    log = _content(console.open_log())
    assert log == b"x" * kept + _LOST
    assert b"the service was away, some of the output was lost" in log
    guest.say(b"now it keeps up")
    console.close()
    assert _content(console.open_log()) == log + b"now it keeps up"


async def test_guest_that_ended_while_no_service_was_there_leaves_what_it_said(
    guest: Guest, next_console: Callable[[], Console], tmp_path: Path
) -> None:
    """As long as anybody holds the FIFO, be it a child of the VMM."""
    console = next_console()
    guest.say(b"bye")
    with contextlib.closing(Guest(tmp_path)):
        guest.close()
        console.plug_again()
        console.close()
    assert _content(console.open_log()) == b"bye"


@pytest.mark.parametrize("missing", [[INPUT], [OUTPUT], [INPUT, OUTPUT]], ids=" ".join)
@pytest.mark.usefixtures("guest")
async def test_console_whose_fifos_are_gone_cannot_be_joined_again_and_can_be_closed(
    next_console: Callable[[], Console], tmp_path: Path, missing: list[str]
) -> None:
    console = next_console()
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError):
        console.plug_again()
        console.attach()
    console.close()
    assert _content(console.open_log()) == b""


def _ends(fifo: Path) -> int:
    """How many descriptors of it are open here."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += link.samefile(fifo)
    return found


async def test_input_is_open_while_somebody_may_type(
    console: Console, guest: Guest, tmp_path: Path
) -> None:
    """A thousand VMs to whom nobody says anything have a thousand descriptors less."""
    theirs = 1
    console.answered()
    assert _ends(tmp_path / INPUT) == theirs
    left = asyncio.Event()
    with console.attach(left.set) as reader:
        assert _ends(tmp_path / INPUT) == theirs + 1
        reader.send(b"hello")
        assert await guest.hear(5) == b"hello"
    async with asyncio.timeout(DEADLINE):
        await left.wait()
    assert _ends(tmp_path / INPUT) == theirs


async def test_who_comes_after_one_that_only_listened_has_left_can_type(
    console: Console, guest: Guest
) -> None:
    """That the only reader is gone is noticed in the moment in which the next one comes."""
    console.answered()
    with console.attach() as listener:
        listener.shutdown(socket.SHUT_WR)
        await _all_read()
    with console.attach() as reader:
        reader.send(b"hello")
        assert await guest.hear(5) == b"hello"


async def test_reader_that_cannot_be_let_in_leaves_nothing_open(
    console: Console, guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console.answered()
    theirs = _ends(tmp_path / INPUT)
    left = asyncio.Event()

    def out_of_them() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socketpair", out_of_them)
        with pytest.raises(OSError, match="Too many open files"):
            console.attach(left.set)
    assert left.is_set()
    assert _ends(tmp_path / INPUT) == theirs


async def test_what_is_typed_before_the_vmm_listens_is_kept_for_it(
    console: Console, tmp_path: Path
) -> None:
    console.plug()
    left = asyncio.Event()
    with console.attach(left.set) as reader:
        reader.send(b"early")
    async with asyncio.timeout(DEADLINE):
        await left.wait()
    with contextlib.closing(Guest(tmp_path)) as guest:
        console.answered()
        assert await guest.hear(5) == b"early"


async def test_console_that_cannot_be_opened_for_want_of_descriptors_can_be_closed(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def out_of_them(path: str | Path, *args: int) -> int:
        if Path(path).name == INPUT:
            raise OSError(24, "Too many open files")
        return really_open(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", out_of_them)
        with pytest.raises(OSError, match="Too many open files"):
            console.plug()
    console.close()


@pytest.fixture
def flood(guest: Guest, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A guest that prints without end, faster than anybody reads, until the deadline."""
    with (tmp_path / OUTPUT).open("wb", buffering=0) as output:
        argv = ["timeout", str(DEADLINE), "yes"]
        processes = [subprocess.Popen(argv, stdout=output) for _ in range(4)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


async def test_guest_that_prints_without_end_does_not_hold_up_the_end_of_the_service(
    console: Console, readers: list[socket.socket], flood: list[subprocess.Popen[bytes]]
) -> None:
    assert (await _receive(readers[0], 4)) == b"y\ny\n"
    console.close()
    assert [process.poll() for process in flood] == [None] * 4
