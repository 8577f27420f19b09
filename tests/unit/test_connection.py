"""Calls out and their replies, whatever comes instead of one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from tests import frames
from tests.rig import DEADLINE, refused
from vmbus.bus.connection import Connection, RemoteError
from vmbus.bus.layout import MAX_MESSAGE
from vmbus.bus.unmarshal import header_fields, read
from vmbus.bus.wire import Kind, Message, WireError

pytestmark = pytest.mark.usefixtures("files_closed")


class Bus:
    """A connection, and the bus' end of it in our hands."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.connection = Connection(ours, ":1.1")
        self.came: asyncio.Queue[Message] = asyncio.Queue()
        self.connection.handler = self.came.put_nowait

    def call(self, timeout: float = DEADLINE) -> asyncio.Task[Message]:
        calling: Coroutine[Any, Any, Message] = self.connection.call(
            "a.b", "/a", "a.b", "M", timeout=timeout
        )
        return asyncio.create_task(calling)

    async def receive(self) -> dict[int, Any]:
        """The header fields of what the connection sent last."""
        async with asyncio.timeout(DEADLINE):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        read(data)
        return header_fields(data)

    async def until_handled(self) -> None:
        """Wait until all that was sent has been dealt with, by a signal behind it."""
        signal = frames.frame(frames.SIGNAL, [(1, "/a"), (2, "a.b"), (3, "End")])
        self.sock.send(signal)
        async with asyncio.timeout(DEADLINE):
            while (await self.came.get()).member != "End":
                pass


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    bus = Bus()
    yield bus
    bus.sock.close()
    await bus.connection.aclose()


def reply(serial: int, text: str = "", *, fds: int = 0, order: str = "l") -> bytes:
    fields: list[tuple[int, Any]] = [(5, serial), (8, "s")] + ([(9, fds)] if fds else [])
    return frames.frame(frames.RETURN, fields, frames.body_of("s", [text], order), order=order)


@pytest.mark.parametrize("order", frames.ORDERS)
async def test_replies_find_their_calls_in_any_order(bus: Bus, order: str) -> None:
    first = bus.call()
    one = (await bus.receive())[0]
    second = bus.call()
    two = (await bus.receive())[0]
    bus.sock.send(reply(two, "second", order=order) + reply(one, "first", order=order))
    assert [list((await each).body) for each in (first, second)] == [["first"], ["second"]]


async def test_an_error_reply_is_raised(bus: Bus) -> None:
    calling = bus.call()
    serial = (await bus.receive())[0]
    body = frames.body_of("s", ["why"])
    bus.sock.send(frames.frame(frames.ERROR, [(4, "a.b.Bad"), (5, serial), (8, "s")], body))
    async with refused("a.b.Bad") as texts:
        await calling
    assert texts == ["why"]


async def test_an_error_reply_needs_no_text(bus: Bus) -> None:
    calling = bus.call()
    serial = (await bus.receive())[0]
    bus.sock.send(frames.frame(frames.ERROR, [(4, "a.b.Bad"), (5, serial)]))
    with pytest.raises(RemoteError) as caught:
        await calling
    assert (caught.value.name, caught.value.text) == ("a.b.Bad", "")


async def test_a_reply_that_can_not_be_understood_ends_its_call(bus: Bus) -> None:
    calling = bus.call()
    serial = (await bus.receive())[0]
    bus.sock.send(frames.frame(frames.RETURN, [(5, serial), (8, "s")], b"\xff" * 8))
    with pytest.raises(WireError):
        await calling


async def test_a_reply_that_is_too_large_ends_its_call(bus: Bus) -> None:
    calling = bus.call()
    serial = (await bus.receive())[0]
    head = bytearray(frames.frame(frames.RETURN, [(5, serial), (8, "ay")]))
    head[4:8] = MAX_MESSAGE.to_bytes(4, "little")
    bus.sock.send(bytes(head))
    with pytest.raises(WireError, match="larger than"):
        await calling


async def test_descriptors_of_a_reply_are_the_callers(bus: Bus) -> None:
    calling = bus.call()
    serial = (await bus.receive())[0]
    reading, writing = os.pipe()
    frames.send_with_fds(bus.sock, reply(serial, fds=1), [reading])
    (fd,) = (await calling).fds
    assert os.fstat(fd).st_ino == os.fstat(writing).st_ino
    for each in (fd, reading, writing):
        os.close(each)


async def test_descriptors_that_nobody_waits_for_are_closed(bus: Bus) -> None:
    with pytest.raises(TimeoutError, match=r"a\.b did not answer within 0 s"):
        await bus.call(timeout=0)
    late = (await bus.receive())[0]
    reading, writing = os.pipe()
    frames.send_with_fds(bus.sock, reply(late, fds=1), [reading])
    error = frames.frame(frames.ERROR, [(4, "a.b.Bad"), (5, 999), (9, 2)])
    frames.send_with_fds(bus.sock, error, [reading, reading])
    frames.send_with_fds(bus.sock, frames.frame(1, [(1, "/a"), (3, "M"), (8, "s"), (9, 1)]), [1])
    await bus.until_handled()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)


async def test_a_call_that_ends_with_the_connection_says_so_in_words(bus: Bus) -> None:
    """The kernel's error alone would not say what was reset."""
    calling = bus.call()
    await bus.receive()
    another = bus.call()
    async with asyncio.timeout(DEADLINE):
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(bus.sock, readable.set)
        await readable.wait()
        asyncio.get_running_loop().remove_reader(bus.sock)
    # What is unread when it is closed the other end is told of by an error.
    bus.sock.close()
    for each in (calling, another):
        with pytest.raises(ConnectionResetError, match="the bus is lost: Connection reset by peer"):
            await each


async def test_calls_end_with_the_connection(bus: Bus) -> None:
    calling = bus.call()
    await bus.receive()
    bus.sock.close()
    with pytest.raises(ConnectionResetError):
        await calling
    with pytest.raises(ConnectionResetError):
        await bus.call()
    assert isinstance(await bus.connection.closed, ConnectionResetError)


async def test_a_call_that_can_not_be_sent_leaves_nothing_behind(bus: Bus) -> None:
    with pytest.raises(WireError):
        await bus.connection.call("a.b", "no path", "a.b", "M")
    calling = bus.call()
    bus.sock.send(reply((await bus.receive())[0], "fine"))
    assert list((await calling).body) == ["fine"]


@pytest.mark.parametrize("order", frames.ORDERS)
@pytest.mark.parametrize(
    ("body", "name"),
    [
        pytest.param(b"\xff" * 8, "org.freedesktop.DBus.Error.InvalidArgs", id="garbage"),
        pytest.param(bytes(1 << 20), "org.vmbus1.Error.LimitExceeded", id="too large"),
    ],
)
async def test_a_call_that_can_not_be_taken_is_answered(
    bus: Bus, body: bytes, name: str, order: str
) -> None:
    fields = [(1, "/a"), (3, "M"), (7, ":1.7"), (8, "s")]
    data = frames.frame(frames.CALL, fields, body, serial=77, order=order)
    await asyncio.get_running_loop().sock_sendall(bus.sock, data)
    got = await bus.receive()
    assert (got[frames.ERROR_NAME], got[frames.REPLY_SERIAL]) == (name, 77)
    assert got[frames.DESTINATION] == ":1.7"


@pytest.mark.parametrize(
    ("kind", "flags", "fields"),
    [
        pytest.param(frames.CALL, 1, [(1, "/a"), (3, "M"), (7, ":1.7"), (8, "s")], id="no reply"),
        pytest.param(frames.CALL, 0, [(1, "/a"), (3, "M"), (8, "s")], id="no sender"),
        pytest.param(frames.CALL, 0, [(7, "\1")], id="sender that can't be"),
        pytest.param(frames.SIGNAL, 0, [(1, "/a"), (3, "M"), (7, ":1.7")], id="signal"),
        pytest.param(9, 0, [(1, "/a"), (3, "M"), (7, ":1.7")], id="kind 9"),
    ],
)
async def test_what_wants_no_answer_gets_none(
    bus: Bus, kind: int, flags: int, fields: list[tuple[int, Any]]
) -> None:
    bus.sock.send(frames.frame(kind, fields, b"\xff" * 8, flags=flags))
    await bus.until_handled()
    with pytest.raises(BlockingIOError):
        bus.sock.recv(1)


async def test_a_handler_that_fails_does_no_harm(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Message) -> None:
        raise RuntimeError("no")

    handler, bus.connection.handler = bus.connection.handler, fail
    bus.sock.send(frames.call("/a", "a.b", "M"))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DEADLINE):
            while not caplog.records:
                await asyncio.sleep(0)
    bus.connection.handler = handler
    await bus.until_handled()
    assert "could not be handled" in caplog.text


async def test_serials_wrap_and_are_never_zero(bus: Bus) -> None:
    bus.connection._serial = 0xFFFFFFFE
    assert [bus.connection.next_serial() for _ in range(3)] == [0xFFFFFFFF, 1, 2]


async def test_closing_sends_what_is_queued(bus: Bus) -> None:
    signal = Message(kind=Kind.SIGNAL, path="/a", interface="a.b", member="Last")
    bus.connection.send(signal)
    await bus.connection.aclose()
    assert (await bus.receive())[frames.MEMBER] == "Last"
