"""Both ends of a bus made by hand: a client that sends any bytes, and a bus of one client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from vmbus.bus.connection import BUS_NAME, BUS_PATH, RemoteError
from vmbus.bus.stream import Frame, MessageStream
from vmbus.bus.unmarshal import header_fields
from vmbus.bus.wire import Kind, Message, decode, join

from . import frames
from .rig import BUS, DEADLINE, Client, Rig


class Raw:
    """A client of a real bus. What it sends is not looked at before the bus does."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self.came: list[Message] = []
        self._replies: dict[int | None, Message] = {}
        self.closed = asyncio.Event()
        self._news = asyncio.Event()
        self._serial = 1
        self._stream = MessageStream(sock, self._take, self._gone)

    def _gone(self, _: Exception | None) -> None:
        self.closed.set()
        self._news.set()

    def _take(self, frame: Frame) -> None:
        message = decode(frame.data)
        message.fds = frame.fds
        self.came.append(message)
        self._replies[message.reply_serial] = message
        self._news.set()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self._stream.write(data, fds)

    def send_call(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        values: Sequence[Any] = (),
        *,
        destination: str = BUS,
        fds: Sequence[int] = (),
        flags: int = 0,
        order: str = "l",
    ) -> int:
        """Send a call; gives its serial."""
        self._serial += 1
        data = frames.call(
            path,
            interface,
            member,
            signature,
            values,
            destination=destination,
            fds=len(fds),
            serial=self._serial,
            flags=flags,
            order=order,
        )
        self.send(data, fds)
        return self._serial

    async def reply(self, serial: int) -> Message:
        """The reply to a call. Raises RemoteError, or ConnectionError when the bus hangs up."""
        async with asyncio.timeout(DEADLINE):
            while (message := self._replies.get(serial)) is None:
                if self.closed.is_set():
                    raise ConnectionResetError("the bus hung up")
                self._news.clear()
                await self._news.wait()
        if message.kind is Kind.ERROR:
            raise RemoteError(message.error_name or "", message.body[0])
        return message

    async def call(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        values: Sequence[Any] = (),
        **options: Any,
    ) -> Sequence[Any]:
        """Call; gives the values of the reply. Raises RemoteError."""
        serial = self.send_call(path, interface, member, signature, values, **options)
        message = await self.reply(serial)
        for fd in message.fds:
            os.close(fd)
        return message.body

    async def call_bus(self, member: str, signature: str = "", values: Sequence[Any] = ()) -> Any:
        return await self.call(BUS_PATH, BUS_NAME, member, signature, values, destination=BUS_NAME)

    def stop_reading(self) -> None:
        """Leave what comes to the bus; only while little is left to be sent."""
        self._stream._pause_reading()

    def go_on_reading(self) -> None:
        self._stream._resume_reading()

    async def sent(self) -> None:
        """Wait until the bus has taken everything."""
        async with asyncio.timeout(DEADLINE):
            await self._stream.flush()

    def close(self) -> None:
        self._stream.close()


@contextlib.asynccontextmanager
async def raw(rig: Rig, uid: int | None = None) -> AsyncIterator[Raw]:
    """A client of the bus; of the user `uid`, if that is given."""
    client = Raw(*(await join(rig.address) if uid is None else await _join_as(rig, uid)))
    try:
        if uid is not None:
            (client.name,) = await client.call_bus("Hello")
        yield client
    finally:
        client.close()


async def _join_as(rig: Rig, uid: int) -> tuple[socket.socket, str]:
    """Connect as another user, as far as Hello. The bus takes us for who we are at that moment."""
    sock = socket.socket(socket.AF_UNIX)
    ourselves = os.geteuid()
    os.seteuid(uid)
    try:
        sock.connect(str(rig.directory / "bus"))
    finally:
        os.seteuid(ourselves)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    for asked in (b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode(), b"NEGOTIATE_UNIX_FD"):
        await loop.sock_sendall(sock, asked + b"\r\n")
        answer = await loop.sock_recv(sock, 4096)
        assert answer.startswith((b"OK ", b"AGREE_UNIX_FD")), answer
    await loop.sock_sendall(sock, b"BEGIN\r\n")
    return sock, ""


async def until_gone(bus: Client, name: str) -> None:
    """Wait until a name has no owner."""
    rule = f"type='signal',member='NameOwnerChanged',arg0='{name}'"
    await bus.connection.call_bus("AddMatch", "s", [rule])
    (owned,) = await bus.connection.call_bus("NameHasOwner", "s", [name])
    if owned:
        await bus.until(lambda m: m.member == "NameOwnerChanged" and m.body[0] == name)


class FakeBus:
    """A bus with one client, that does what a test says, and reads when a test does."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:path={path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen()
        self._sock: socket.socket | None = None
        self._data = bytearray()

    def close(self) -> None:
        self._listener.close()
        if self._sock is not None:
            self._sock.close()

    async def accept(self) -> None:
        """Let the client in, as far as its Hello."""
        async with asyncio.timeout(DEADLINE):
            self._sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        for asked, answer in (
            (b"\0AUTH EXTERNAL ", b"OK 0123456789abcdef0123456789abcdef\r\n"),
            (b"NEGOTIATE_UNIX_FD", b"AGREE_UNIX_FD\r\n"),
            (b"BEGIN", b""),
        ):
            line = await self._until(b"\r\n")
            assert line.startswith(asked)
            await self.send(answer)
        await self.answer("Hello", "s", [":1.0"])

    async def begin(self) -> None:
        """Let a service in, and have it own its name, as far as it asks by itself."""
        await self.accept()
        answers: dict[str, tuple[str, list[Any]]] = {
            "AddMatch": ("", []),
            "RequestName": ("u", [1]),
            "GetId": ("s", ["0" * 32]),
        }
        while (call := await self._call()).member in answers:
            await self._reply(call, *answers[call.member])
        # The last it wants to know is whether there is a systemd on the bus, and there is none.
        assert call.member == "GetNameOwner"
        await self._reply(call, "s", ["nobody"], error="org.freedesktop.DBus.Error.NameHasNoOwner")

    async def answer(self, member: str, signature: str, values: Sequence[Any]) -> None:
        """Wait for this call to the bus, which must come next but for signals, and answer it."""
        call = await self._call()
        assert call.member == member
        await self._reply(call, signature, values)

    async def _call(self) -> Message:
        while (message := await self.receive()).kind is Kind.SIGNAL:
            pass
        return message

    async def _reply(
        self, call: Message, signature: str, values: Sequence[Any], *, error: str = ""
    ) -> None:
        fields = [(frames.REPLY_SERIAL, call.serial), (frames.SIGNATURE, signature)]
        if error:
            fields.append((frames.ERROR_NAME, error))
        body = frames.body_of(signature, values)
        kind = frames.ERROR if error else frames.RETURN
        await self.send(frames.frame(kind, [*fields, (frames.SENDER, BUS_NAME)], body))

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        assert self._sock is not None
        if fds:
            frames.send_with_fds(self._sock, data, fds)
        else:
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def receive(self) -> Message:
        """The next message that the client sent."""
        await self._more(16)
        body, _, fields = struct.unpack_from("<III", self._data, 4)
        size = 16 + fields + -fields % 8 + body
        await self._more(size)
        data = bytes(self._data[:size])
        del self._data[:size]
        assert 0 not in header_fields(data) or header_fields(data)[0] > 0
        return decode(data)

    async def _more(self, size: int) -> None:
        assert self._sock is not None
        async with asyncio.timeout(DEADLINE):
            while len(self._data) < size:
                chunk = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
                assert chunk, "the client hung up"
                self._data += chunk

    async def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            await self._more(len(self._data) + 1)
        line, _, rest = bytes(self._data).partition(end)
        self._data[:] = rest
        return line
