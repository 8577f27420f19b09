"""A connection to a bus: calls out and their replies, everything else to one handler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InvalidArgs, LimitExceeded, VMBusError
from . import wire
from .layout import MAX_MESSAGE, REPLY_SERIAL, SENDER
from .stream import MAX_INCOMING, Frame, MessageStream
from .unmarshal import header_fields
from .wire import Flag, Kind, Message, WireError

log = logging.getLogger(__name__)

BUS_NAME = "org.freedesktop.DBus"
BUS_PATH = "/org/freedesktop/DBus"
#: Seconds that the bus itself has to answer in.
BUS_TIMEOUT = 10.0


class RemoteError(Exception):
    """An error reply: its D-Bus name and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
        self.text = text


def bus_address(*, user: bool) -> str:
    """Where the session bus (`user`) or the system bus listens, as the environment says."""
    if user:
        given = os.environ.get("DBUS_SESSION_BUS_ADDRESS")
        runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
        return given or f"unix:path={runtime}/bus"
    given = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS")
    return given or "unix:path=/run/dbus/system_bus_socket"


class Connection:
    """One connection. `handler` gets every call and signal, and owns the descriptors in them."""

    def __init__(self, sock: socket.socket, unique_name: str) -> None:
        loop = asyncio.get_running_loop()
        self.unique_name = unique_name
        self.handler: Callable[[Message], None] = _ignore
        #: Called for every call that comes, and for everything that goes.
        self.used: Callable[[], None] = _nothing
        #: Resolved with None, or the error, when the connection is gone.
        self.closed: asyncio.Future[Exception | None] = loop.create_future()
        self._serial = 1
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._stream = MessageStream(sock, self._on_frame, self._on_close)

    @classmethod
    async def open(cls, address: str) -> Connection:
        """Join the bus at `address`. Raises OSError or TimeoutError."""
        return cls(*await wire.join(address))

    @property
    def lost(self) -> bool:
        """Whether nothing can be written any more."""
        return self._stream.closed

    # Out

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """Queue a message. Raises WireError, and sends nothing, when it can't be encoded.

        The descriptors in it must stay open until `sent` is called.
        """
        self.used()
        message.serial = self.next_serial()
        self._stream.write(wire.encode(message), message.fds, sent)

    def send_with_body(self, message: Message, body: bytes) -> None:
        """Queue a message whose body is marshalled already. Raises WireError."""
        message.serial = self.next_serial()
        self._stream.write(wire.encode_with_body(message, body))

    def next_serial(self) -> int:
        self._serial = self._serial % 0xFFFFFFFF + 1
        return self._serial

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        flags: int = 0,
        timeout: float | None = BUS_TIMEOUT,
    ) -> Message:
        """Call a method and return its reply, whose descriptors are then the caller's.

        Those that are sent may be closed as soon as this returns or raises, whatever the reason.
        Raises RemoteError for an error reply, TimeoutError, ConnectionError or WireError.
        """
        lent = [os.dup(fd) for fd in fds]
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body,
            flags=flags,
            fds=lent,
        )
        answer: Message | None = None
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        try:
            self._lend(message, lent)
            if self.closed.done():
                raise ConnectionResetError("the connection to the bus is closed")
            self._replies[message.serial] = reply
            async with asyncio.timeout(timeout):
                answer = await reply
        except TimeoutError:
            raise TimeoutError(f"{destination} did not answer within {timeout:g} s") from None
        finally:
            self._replies.pop(message.serial, None)
            if answer is None and reply.done() and not reply.cancelled() and not reply.exception():
                # It came in the very moment in which the call was given up.
                _close_all(reply.result().fds)
        if answer.kind is Kind.ERROR:
            _close_all(answer.fds)
            text = answer.body[0] if answer.body and isinstance(answer.body[0], str) else ""
            raise RemoteError(answer.error_name or "org.freedesktop.DBus.Error.Failed", text)
        return answer

    def _lend(self, message: Message, fds: Sequence[int]) -> None:
        try:
            self.send(message, sent=lambda: _close_all(fds))
        except WireError:
            _close_all(fds)
            raise

    async def call_bus(self, member: str, signature: str, body: Sequence[Any]) -> Sequence[Any]:
        """Call the bus itself and return what it answers."""
        reply = await self.call(BUS_NAME, BUS_PATH, BUS_NAME, member, signature, body)
        return reply.body

    # In

    def _on_frame(self, frame: Frame) -> None:
        try:
            if frame.data[1] in (Kind.RETURN, Kind.ERROR):
                self._on_reply(frame)
            else:
                self._on_call_or_signal(frame)
        except Exception:
            log.exception("a message could not be handled")
        finally:
            frame.close_fds()

    def _on_reply(self, frame: Frame) -> None:
        reply = self._replies.pop(header_fields(frame.data).get(REPLY_SERIAL, 0), None)
        if reply is None or reply.done():
            return
        try:
            if frame.oversized:
                raise WireError(f"the reply is larger than {MAX_MESSAGE} bytes")
            message = wire.decode(frame.data)
        except WireError as error:
            reply.set_exception(error)
            return
        message.fds, frame.fds = frame.fds, []
        reply.set_result(message)

    def _on_call_or_signal(self, frame: Frame) -> None:
        if frame.data[1] == Kind.CALL:
            self.used()
        if frame.oversized:
            limit = MAX_INCOMING // 1024
            self._refuse(frame, LimitExceeded(f"a message can have at most {limit} KiB"))
            return
        try:
            message = wire.decode(frame.data)
        except wire.TooMuch as error:
            self._refuse(frame, LimitExceeded(str(error)))
            return
        except WireError as error:
            log.info("refused a message: %s", error)
            self._refuse(frame, InvalidArgs("the message can't be understood: it is not valid"))
            return
        message.fds, frame.fds = frame.fds, []
        self.handler(message)

    def _refuse(self, frame: Frame, error: VMBusError) -> None:
        fields = header_fields(frame.data)
        wants_reply = not frame.data[2] & Flag.NO_REPLY_EXPECTED
        if frame.data[1] != Kind.CALL or SENDER not in fields or not wants_reply:
            return
        self.send(
            Message(
                kind=Kind.ERROR,
                destination=fields[SENDER],
                error_name=error.dbus_name,
                reply_serial=fields[0],
                signature="s",
                body=[str(error)],
            )
        )

    # The end

    def _on_close(self, error: Exception | None) -> None:
        if isinstance(error, OSError) and error.strerror:
            why = f"the connection to the bus is lost: {error.strerror}"
        else:
            why = str(error) if error else "the connection to the bus is closed"
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ConnectionResetError(why))
        self._replies.clear()
        if not self.closed.done():
            self.closed.set_result(error)

    async def aclose(self) -> None:
        """Send what is queued, as far as the bus takes it, and close."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUS_TIMEOUT):
                await self._stream.flush()
        self._stream.close()


def _nothing() -> None:
    pass


def _ignore(message: Message) -> None:
    _close_all(message.fds)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
