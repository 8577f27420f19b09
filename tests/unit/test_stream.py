"""The socket as messages: cut anywhere, with descriptors, under pressure, and at its end."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import resource
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest

from tests import frames
from tests.frames import CALL, RETURN, UNIX_FDS, Var, send_with_fds
from tests.rig import DEADLINE
from vmbus.bus import layout, stream
from vmbus.bus.stream import Frame, MessageStream
from vmbus.bus.unmarshal import header_fields

pytestmark = pytest.mark.usefixtures("files_closed")
KIB = 1024


class Ends:
    """A stream, what came out of it, and the bus' end of its socket."""

    def __init__(self) -> None:
        ours, self.bus = socket.socketpair()
        ours.setblocking(False)
        self.bus.setblocking(False)
        self.frames: list[Frame] = []
        self.closed: list[Exception | None] = []
        self.on_frame: Callable[[Frame], None] = lambda _: None
        self._news = asyncio.Event()
        self.stream = MessageStream(ours, self._take, self._close)

    def _take(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._news.set()
        self.on_frame(frame)

    def _close(self, error: Exception | None) -> None:
        self.closed.append(error)
        self._news.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a frame or the end has made it true."""
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def all_read(self) -> None:
        """Wait until the stream has taken all that was sent."""
        async with asyncio.timeout(DEADLINE):
            while fcntl.ioctl(self.bus, termios.TIOCOUTQ, bytes(4)) != bytes(4):
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE):
            await asyncio.get_running_loop().sock_sendall(self.bus, data)

    async def receive(self, size: int) -> bytes:
        data = bytearray()
        async with asyncio.timeout(DEADLINE):
            while len(data) < size:
                data += await asyncio.get_running_loop().sock_recv(self.bus, size - len(data))
        return bytes(data)

    def data(self) -> list[bytes]:
        return [frame.data for frame in self.frames]


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    yield ends
    ends.stream.close()
    ends.bus.close()
    for frame in ends.frames:
        frame.close_fds()


@pytest.fixture
def pipes() -> Iterator[Callable[[], tuple[int, int]]]:
    """Makes pipes, and closes what of them is left."""
    made: list[int] = []

    def make() -> tuple[int, int]:
        made.extend(os.pipe())
        return made[-2], made[-1]

    yield make
    for fd in made:
        with contextlib.suppress(OSError):
            os.close(fd)


def numbered(number: int, size: int = 0, order: str = "l") -> bytes:
    return frames.call("/a", "a.b", "M", "ay", [bytes(size)], serial=number + 1, order=order)


def serials(frames: Sequence[bytes]) -> list[int]:
    return [
        struct.unpack_from("<I" if data[0] == ord("l") else ">I", data, 8)[0] for data in frames
    ]


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


# In


@pytest.mark.parametrize("order", frames.ORDERS)
async def test_a_message_may_be_cut_anywhere(ends: Ends, order: str) -> None:
    first, second = numbered(0, 9, order), numbered(1, 0, order)
    both = first + second
    for cut in range(1, len(both)):
        ends.frames.clear()
        await ends.send(both[:cut])
        await ends.all_read()
        assert ends.data() == [first][: cut // len(first)]
        await ends.send(both[cut:])
        await ends.until(lambda: len(ends.frames) == 2)
        assert ends.data() == [first, second]


async def test_many_messages_in_one_read_come_in_order_and_leave_turns_to_others(
    ends: Ends,
) -> None:
    many = [numbered(number) for number in range(500)]
    turns: list[int] = []

    def take_turns(_: Frame) -> None:
        if len(ends.frames) == 1:
            asyncio.get_running_loop().call_soon(lambda: turns.append(len(ends.frames)))

    ends.on_frame = take_turns
    await ends.send(b"".join(many))
    await ends.until(lambda: len(ends.frames) == 500)
    assert ends.data() == many
    assert turns and turns[0] < 100


async def test_descriptors_go_to_their_own_message(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    fds = [pipes()[0] for _ in range(6)]
    sent = [fds[:1], [], fds[1:4], [], [], fds[4:]]
    for number, mine in enumerate(sent):
        data = frames.call("/a", "a.b", "M", fds=len(mine), serial=number + 1)
        send_with_fds(ends.bus, data, mine)
    await ends.until(lambda: len(ends.frames) == len(sent))
    got = [[inode(fd) for fd in frame.fds] for frame in ends.frames]
    assert got == [[inode(fd) for fd in mine] for mine in sent]


async def test_descriptors_of_a_message_cut_anywhere_are_its_own(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    fd, other = pipes()
    data = frames.call("/a", "a.b", "M", "s", ["text"], fds=1)
    for cut in range(1, len(data)):
        ends.frames.clear()
        send_with_fds(ends.bus, data[:cut], [fd])
        await ends.all_read()
        await ends.send(data[cut:])
        send_with_fds(ends.bus, data, [other])
        await ends.until(lambda: len(ends.frames) == 2)
        assert [[inode(fd) for fd in frame.fds] for frame in ends.frames] == [
            [inode(fd)],
            [inode(other)],
        ]
        for frame in ends.frames:
            frame.close_fds()


@pytest.mark.parametrize("order", frames.ORDERS)
async def test_a_field_that_nobody_knows_takes_no_descriptors_away(
    ends: Ends, pipes: Callable[[], tuple[int, int]], order: str
) -> None:
    fds = list(pipes())
    fields = [(1, "/a"), (3, "M"), (200, Var("a(sv)", [["x", Var("t", 1)]])), (UNIX_FDS, 1)]
    strange = frames.frame(CALL, fields, order=order)
    send_with_fds(ends.bus, strange, fds[:1])
    send_with_fds(ends.bus, frames.call("/a", "a.b", "M", fds=1), fds[1:])
    await ends.until(lambda: len(ends.frames) == 2)
    assert [[inode(fd) for fd in frame.fds] for frame in ends.frames] == [[inode(fd)] for fd in fds]


async def test_received_descriptors_are_close_on_exec(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    send_with_fds(ends.bus, frames.call("/a", "a.b", "M", fds=2), pipes())
    await ends.until(lambda: ends.frames)
    flags = [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in ends.frames[0].fds]
    assert flags == [fcntl.FD_CLOEXEC] * 2


async def hung_up(fd: int) -> None:
    """Wait until no writing end of a pipe is open any more."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(DEADLINE):
            await ended.wait()
        assert os.read(fd, 1) == b""
    finally:
        loop.remove_reader(fd)


async def test_descriptors_that_nobody_claims_are_closed(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    reading, writing = pipes()
    send_with_fds(ends.bus, frames.call("/a", "a.b", "M", fds=1), [writing])
    os.close(writing)
    await ends.until(lambda: ends.frames)
    ends.frames[0].close_fds()
    await hung_up(reading)


async def test_descriptors_of_half_a_message_are_closed_with_the_stream(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    reading, writing = pipes()
    send_with_fds(ends.bus, frames.call("/a", "a.b", "M", fds=1)[:20], [writing])
    os.close(writing)
    await ends.all_read()
    ends.stream.close()
    await hung_up(reading)


async def test_lost_descriptors_end_the_stream(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    fds = pipes()
    free = os.dup(fds[0])
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        send_with_fds(ends.bus, frames.call("/a", "a.b", "M", fds=2), fds)
        await ends.until(lambda: ends.closed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "descriptors" in str(ends.closed[0])
    assert not ends.frames


@pytest.mark.parametrize("order", frames.ORDERS)
@pytest.mark.parametrize("size", [stream.MAX_INCOMING, 2 * KIB * KIB])
async def test_a_body_too_large_is_left_out_and_the_next_message_understood(
    ends: Ends, size: int, order: str
) -> None:
    large, after = numbered(0, size, order), numbered(1, 3, order)
    await ends.send(large + after)
    await ends.until(lambda: len(ends.frames) == 2)
    head = len(large) - size - 4
    assert [frame.oversized for frame in ends.frames] == [True, False]
    assert ends.data() == [large[:head], after]


async def test_a_body_just_small_enough_is_taken(ends: Ends) -> None:
    data = numbered(0, stream.MAX_INCOMING - len(numbered(0)))
    await ends.send(data)
    await ends.until(lambda: ends.frames)
    assert (ends.data(), ends.frames[0].oversized) == ([data], False)


async def test_a_reply_may_be_large(ends: Ends) -> None:
    body = frames.body_of("ay", [bytes(4 * KIB * KIB)])
    data = frames.frame(RETURN, [(5, 1), (8, "ay")], body)
    await ends.send(data)
    await ends.until(lambda: ends.frames)
    assert (ends.data(), ends.frames[0].oversized) == ([data], False)


async def test_a_reply_may_not_be_larger_than_a_message(ends: Ends) -> None:
    head = bytearray(frames.frame(RETURN, [(5, 1), (8, "ay")]))
    struct.pack_into("<I", head, 4, layout.MAX_MESSAGE)
    await ends.send(bytes(head))
    await ends.until(lambda: ends.frames)
    assert ends.frames[0].oversized


@pytest.mark.parametrize("order", frames.ORDERS)
@pytest.mark.parametrize("size", [stream.MAX_INCOMING, 3 * KIB * KIB + 5])
async def test_a_path_too_long_is_cut_out_and_the_next_message_understood(
    ends: Ends, size: int, order: str
) -> None:
    """Nothing bounds a path but the size of its message; whose it is must still be told."""
    path = "/" + "p" * size
    large = frames.call(path, "a.b", "M", "s", ["x"], sender=":1.7", serial=5, order=order)
    after = numbered(1, 3, order)
    await ends.send(large + after)
    await ends.until(lambda: len(ends.frames) == 2)
    assert [frame.oversized for frame in ends.frames] == [True, False]
    fields = header_fields(ends.frames[0].data)
    assert (fields[0], fields[layout.SENDER], fields[frames.MEMBER]) == (5, ":1.7", "M")
    assert len(ends.frames[0].data) < KIB
    assert ends.frames[1].data == after


async def test_descriptors_of_a_message_with_a_long_path_are_its_own(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    path = "/" + "p" * 2 * stream.MAX_INCOMING
    large = frames.call(path, "a.b", "M", fds=2)
    first = ends.bus.send(large[:16])
    assert first == 16
    send_with_fds(ends.bus, large[16:20], pipes())
    await ends.send(large[20:] + numbered(1))
    await ends.until(lambda: len(ends.frames) == 2)
    assert [len(frame.fds) for frame in ends.frames] == [2, 0]


async def test_a_large_header_of_nothing_known_ends_the_stream(ends: Ends) -> None:
    fields = [(77, Var("ay", bytes(2 * stream.MAX_INCOMING)))]
    with contextlib.suppress(ConnectionError):
        await ends.send(frames.frame(CALL, fields))
    await ends.until(lambda: ends.closed)
    assert "header" in str(ends.closed[0])


@pytest.mark.parametrize("order", b"lBx")
async def test_a_header_without_end_ends_the_stream(ends: Ends, order: int) -> None:
    """Also where it doesn't say in which order its bytes are."""
    await ends.send(struct.pack("<BBBBIII", order, 1, 0, 1, 0, 1, 0xFFFFFFFF))
    await ends.until(lambda: ends.closed)
    assert "header" in str(ends.closed[0])


# Out


async def test_what_the_socket_does_not_take_is_kept_in_order(
    ends: Ends, pipes: Callable[[], tuple[int, int]]
) -> None:
    fds = pipes()
    sent: list[int] = []
    data = [numbered(number, 700) for number in range(3000)]
    for number, each in enumerate(data):
        mine = [fds[number // 1000 % 2]] if number % 1000 == 500 else []
        ends.stream.write(each, mine, lambda number=number: sent.append(number))  # type: ignore[misc]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await ends.stream.flush()
    await ends.all_read()
    assert sent == list(range(len(sent)))
    assert len(sent) < 3000  # the bus has not read yet
    got, came = await drain(ends, len(b"".join(data)))
    assert got == b"".join(data)
    await ends.stream.flush()
    assert sent == list(range(3000))
    assert came == [inode(fds[0]), inode(fds[1]), inode(fds[0])]


async def drain(ends: Ends, size: int) -> tuple[bytes, list[int]]:
    """Read so many bytes at the bus' end, and the inodes of what came with them."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    data, inodes = bytearray(), []
    loop.add_reader(ends.bus, readable.set)
    try:
        async with asyncio.timeout(DEADLINE):
            while len(data) < size:
                await readable.wait()
                readable.clear()
                try:
                    chunk, ancillary, _, _ = ends.bus.recvmsg(64 * KIB, 1024)
                except BlockingIOError:
                    continue
                data += chunk
                for _, _, rights in ancillary:
                    for fd in array.array("i", rights):
                        inodes.append(inode(fd))
                        os.close(fd)
    finally:
        loop.remove_reader(ends.bus)
    return bytes(data), inodes


async def test_callers_who_do_not_read_are_not_read_either(ends: Ends) -> None:
    ends.stream.write(bytes(stream.HIGH_WATER + 1))
    await ends.send(numbered(0))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not ends.frames
    await ends.receive(stream.HIGH_WATER + 1)
    await ends.until(lambda: ends.frames)


async def test_calls_already_read_wait_while_their_answers_fill_the_queue(ends: Ends) -> None:
    """Or one read of small calls with large answers would make any amount of output."""
    answer = bytes(KIB * KIB)
    ends.on_frame = lambda _: ends.stream.write(answer)
    await ends.send(b"".join(numbered(number) for number in range(40)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(ends.frames) * len(answer) <= stream.HIGH_WATER + 2 * len(answer)
    await drain(ends, 40 * len(answer))
    assert serials(ends.data()) == list(range(1, 41))
    assert not ends.closed


async def test_a_bus_that_reads_nothing_at_all_counts_as_gone(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "OVERFLOW", 8 * KIB * KIB)
    sent: list[int] = []
    for number in range(20):
        ends.stream.write(bytes(KIB * KIB), (), lambda number=number: sent.append(number))  # type: ignore[misc]
    assert [str(error) for error in ends.closed] == ["the bus has stopped reading"]
    assert sorted(sent) == list(range(20))
    await ends.stream.flush()


async def test_closing_tells_of_everything_queued_once(ends: Ends) -> None:
    sent: list[str] = []
    ends.stream.write(b"queued", (), lambda: sent.append("queued"))
    ends.stream.close()
    ends.stream.close(OSError("again"))
    ends.stream.write(b"late", (), lambda: sent.append("late"))
    await ends.stream.flush()
    assert sent == ["queued", "late"]
    assert ends.closed == [None]


async def test_closing_in_a_callback_is_fine(ends: Ends) -> None:
    ends.stream.write(b"one", (), ends.stream.close)
    ends.stream.write(b"two")
    await ends.until(lambda: ends.closed)
    await ends.stream.flush()
    assert ends.closed == [None]


async def test_closing_on_a_message_leaves_the_rest_unread(ends: Ends) -> None:
    ends.on_frame = lambda _: ends.stream.close()
    await ends.send(numbered(0) + numbered(1))
    await ends.until(lambda: ends.closed)
    assert serials(ends.data()) == [1]


async def test_writing_in_a_callback_comes_last(ends: Ends) -> None:
    ends.stream.write(b"one", (), lambda: ends.stream.write(b"three"))
    ends.stream.write(b"two")
    assert await ends.receive(11) == b"onetwothree"


@pytest.mark.parametrize("unread", [b"", b"rest"])
async def test_a_bus_that_hangs_up_is_told_with_what_it_was(ends: Ends, unread: bytes) -> None:
    ends.stream.write(b"queued")
    await ends.receive(6)
    ends.stream.write(unread)
    await ends.stream.flush()
    ends.bus.close()  # with something unread it is a reset
    await ends.until(lambda: ends.closed)
    assert isinstance(ends.closed[0], ConnectionResetError)


async def test_writing_to_a_bus_that_is_gone_closes(ends: Ends) -> None:
    sent: list[Any] = []
    ends.bus.close()
    ends.stream.write(b"lost", (), lambda: sent.append(1))
    await ends.until(lambda: ends.closed)
    assert sent == [1]
    assert isinstance(ends.closed[0], OSError)
