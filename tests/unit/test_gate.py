"""Who is let in where too many come, and what is ended when the service ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.rig import ERROR, STANDARD_ERROR
from vmbus.bus.authority import Access, Authority, Request
from vmbus.bus.connection import Connection
from vmbus.bus.contract import PEER
from vmbus.bus.gate import Gate
from vmbus.bus.methods import Service
from vmbus.bus.peers import Peers
from vmbus.bus.wire import Flag, Kind, Message
from vmbus.model.identity import Requester
from vmbus.model.limits import Limits
from vmbus.settings import Limit, LimitSettings, Settings

pytestmark = pytest.mark.usefixtures("nothing_left")


class Bus:
    """A connection to a bus that says who somebody is when it is let, and what was sent on it."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.answers = asyncio.Event()

    def send(self, message: Message) -> None:
        self.sent.append(message)

    async def call_bus(self, *_: Any) -> list[Any]:
        await self.answers.wait()
        return [{"UnixUserID": SimpleNamespace(value=1)}]

    def errors(self, sender: str) -> list[str | None]:
        return [each.error_name for each in self.sent if each.destination == sender]


class Undecided(Authority):
    """One that asks users, none of whom answers."""

    def may_read_at_once(self, sender: str) -> bool:
        return False

    async def authorize(self, request: Request) -> Requester:
        assert request.access is Access.READ
        if request.interactive:
            await asyncio.Event().wait()
        return Requester(1)


def ping(sender: str, *, interactive: bool = False) -> Message:
    flags = Flag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
    message = Message(path="/", interface=PEER, member="Ping", flags=flags)
    message.kind, message.sender, message.serial = Kind.CALL, sender, 1
    return message


def gate(bus: Bus) -> Gate:
    limits = LimitSettings(calls=Limit(per_user=3, in_all=5), memory=Limit(per_user=1, in_all=1))
    objects = SimpleNamespace(interfaces_at=lambda _: (PEER,), vm=lambda _: None)
    service = SimpleNamespace(objects=objects, settings=Settings(limits=limits))
    connection = cast(Connection, bus)
    return Gate(connection, cast(Service, service), Undecided(), Peers(connection), Limits(limits))


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_who_is_known_is_not_shut_out_by_those_who_are_not() -> None:
    bus = Bus()
    door = gate(bus)
    bus.answers.set()
    door.handle(ping("known"))
    await settle()
    assert bus.errors("known") == [None]
    bus.answers.clear()
    for number in range(10):
        door.handle(ping(f"stranger{number}"))
    door.handle(ping("known"))
    await settle()
    assert bus.errors("known") == [None, None]
    # What strangers have under way is bounded; and they are answered when it is known who they are.
    refused = [bus.errors(f"stranger{number}") for number in range(10)]
    assert refused == [[]] * 5 + [[ERROR + "LimitExceeded"]] * 5
    bus.answers.set()
    await settle()
    assert [bus.errors(f"stranger{number}") for number in range(3)] == [[None]] * 3
    await door.aclose()


async def test_nobody_is_asked_any_more_when_the_service_ends() -> None:
    bus = Bus()
    bus.answers.set()
    door = gate(bus)
    door.handle(ping("asked", interactive=True))
    await settle()
    assert bus.sent == []
    closing = asyncio.create_task(door.aclose())
    door.handle(ping("asking already", interactive=True))
    await closing
    door.handle(ping("too late"))
    for caller in ("asked", "asking already", "too late"):
        assert bus.errors(caller) == [STANDARD_ERROR + "Failed"]
