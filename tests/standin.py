"""A service that isn't there, played by the test: it owns a name, and answers as it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from tests.rig import DEADLINE, Rig, plain
from vmbus.bus.connection import Connection
from vmbus.bus.wire import Kind, Message


class Refused(Exception):
    """To be raised by an answer: an error reply of that name."""


class StandIn:
    """It notes every call as a tuple of its member and its arguments, in plain values.

    answer: gives signature and body of the reply to a call, or raises Refused.
    """

    def __init__(
        self, connection: Connection, answer: Callable[[Message], tuple[str, Sequence[Any]]]
    ) -> None:
        self.connection = connection
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []
        #: Unique names of callers who are refused, and whose calls aren't noted.
        self.refused: set[str] = set()
        self._called = asyncio.Event()
        connection.handler = self._handle

    def _handle(self, message: Message) -> None:
        if message.kind is not Kind.CALL:
            return
        if message.sender in self.refused:
            refusal = Message(kind=Kind.ERROR, destination=message.sender)
            refusal.reply_serial = message.serial
            refusal.error_name = "org.freedesktop.DBus.Error.AccessDenied"
            self.connection.send(refusal)
            return
        self.calls.append((message.member, *plain(message.body)))
        reply = Message(kind=Kind.RETURN, destination=message.sender, reply_serial=message.serial)
        try:
            reply.signature, reply.body = self.answer(message)
        except Refused as error:
            reply.kind, reply.error_name = Kind.ERROR, str(error)
        self.connection.send(reply)
        self._called.set()

    async def until_called(self, member: str, count: int = 1) -> tuple[Any, ...]:
        """The call of this member with this number, from 1, once it is made."""
        async with asyncio.timeout(DEADLINE):
            while True:
                found = [call for call in self.calls if call[0] == member]
                if len(found) >= count:
                    return found[count - 1]
                self._called.clear()
                await self._called.wait()

    def emit(self, signal: Message) -> None:
        """Send a signal, after what was sent before."""
        signal.kind = Kind.SIGNAL
        self.connection.send(signal)


@contextlib.asynccontextmanager
async def standin(
    rig: Rig, name: str, answer: Callable[[Message], tuple[str, Sequence[Any]]]
) -> AsyncIterator[StandIn]:
    """One that owns its name; on a rig's session bus anybody may own any."""
    connection = await Connection.open(rig.address)
    async with contextlib.aclosing(connection):
        found = StandIn(connection, answer)
        assert await connection.call_bus("RequestName", "su", [name, 4]) == [1]
        yield found


class Systemd:
    """The answers of a service manager whose jobs end at once, as `result` says."""

    def __init__(self) -> None:
        self.result = "done"
        self.error = ""
        #: Whether jobs end at all.
        self.ends = True
        self.standin: StandIn | None = None
        self._jobs = 0

    def __call__(self, message: Message) -> tuple[str, Sequence[Any]]:
        if self.error:
            raise Refused(self.error)
        if message.member == "KillUnit":
            return "", []
        self._jobs += 1
        path = f"/org/freedesktop/systemd1/job/{self._jobs}"
        if self.ends:
            # Sent after the reply, and most likely read together with it.
            asyncio.get_running_loop().call_soon(self.end, path, message.body[0])
        return "o", [path]

    def end(self, path: str, unit: str) -> None:
        """The job is over."""
        assert self.standin is not None
        self.standin.emit(job_removed(path, unit, self.result))


def job_removed(path: str, unit: str, result: str) -> Message:
    """The signal for a job that is over."""
    return Message(
        path="/org/freedesktop/systemd1",
        interface="org.freedesktop.systemd1.Manager",
        member="JobRemoved",
        signature="uoss",
        body=[1, path, unit, result],
    )


@contextlib.asynccontextmanager
async def systemd(rig: Rig) -> AsyncIterator[tuple[StandIn, Systemd]]:
    """A service manager on the bus."""
    answers = Systemd()
    async with standin(rig, "org.freedesktop.systemd1", answers) as found:
        answers.standin = found
        yield found, answers
