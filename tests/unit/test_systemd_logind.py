"""The lock that delays a shutdown, at python-dbusmock's logind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import NoReturn

import pytest

from tests.logind import Logind
from tests.rig import DEADLINE, STANDARD_ERROR, Rig, client
from tests.standin import Refused, standin
from vmbus.bus.connection import Connection
from vmbus.bus.wire import Kind, Message
from vmbus.systemd.logind import LOGIND, Inhibitor

pytestmark = pytest.mark.usefixtures("nothing_left")
PATH = "/org/freedesktop/login1"
MANAGER = f"{LOGIND}.Manager"
MOCK = "org.freedesktop.DBus.Mock"


@pytest.fixture(scope="module")
def logind(rig: Rig) -> Iterator[Logind]:
    running = Logind(rig)
    yield running
    running.close()


class Told:
    """A service that holds the lock, and is told of shutdowns."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.shutdowns = 0
        self._news = asyncio.Event()
        self.inhibitor = Inhibitor(connection, self._on_shutdown)
        connection.handler = self._on_message

    def _on_shutdown(self) -> None:
        self.shutdowns += 1

    def _on_message(self, message: Message) -> None:
        self.inhibitor.on_signal(message)
        self._news.set()

    async def until_told(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while self.shutdowns < count:
                self._news.clear()
                await self._news.wait()


@contextlib.asynccontextmanager
async def service(rig: Rig) -> AsyncIterator[Told]:
    """One on this bus, for as long as that lasts."""
    connection = await Connection.open(rig.address)
    told = Told(connection)
    await told.inhibitor.watch()
    try:
        yield told
    finally:
        await told.inhibitor.aclose()
        await connection.aclose()


@pytest.fixture
async def told(logind: Logind, nothing_left: None) -> AsyncIterator[Told]:
    """A service that holds the lock, and nobody else does."""
    await logind.until(0)
    async with service(logind.rig) as told:
        await logind.until(1)
        yield told
    await logind.until(0)


@pytest.fixture
def bare() -> Iterator[Rig]:
    """A bus without a logind."""
    rig = Rig(system=False)
    yield rig
    rig.close()


async def test_a_shutdown_is_delayed_until_the_lock_is_released(logind: Logind, told: Told) -> None:
    """The service is told, and has the time that it takes."""
    (lock,) = await logind.locks()
    assert lock == ["shutdown", "vmbus", "ending virtual machines in an orderly way", "delay"]
    await logind.prepare(begins=True)
    await told.until_told(1)
    assert len(await logind.locks()) == 1
    told.inhibitor.release()
    await logind.until(0)


async def test_a_shutdown_that_is_called_off_can_come_again(logind: Logind, told: Told) -> None:
    """The lock is taken anew, and the next shutdown is told of."""
    for count in (1, 2):
        await logind.prepare(begins=True)
        await told.until_told(count)
        told.inhibitor.release()
        await logind.until(0)
        await logind.prepare(begins=False)
        await logind.until(1)


async def test_a_lock_that_was_not_released_is_not_taken_twice(logind: Logind, told: Told) -> None:
    """As when a shutdown is called off before the VMs have ended."""
    await logind.prepare(begins=True)
    await told.until_told(1)
    await logind.prepare(begins=False)
    await logind.prepare(begins=True)
    await told.until_told(2)
    assert len(await logind.locks()) == 1


async def test_a_logind_that_comes_later_or_again_has_the_lock(bare: Rig) -> None:
    """There is none at first; and one that began anew may know of no locks."""
    async with service(bare) as told:
        assert not told.inhibitor.held
        for _ in range(2):
            logind = Logind(bare)
            await logind.until(1)
            logind.close()


async def test_nobody_else_can_announce_a_shutdown(logind: Logind, told: Told) -> None:
    """Anybody on the bus can send us the very signal; the VMs run on."""
    async with client(logind.rig) as liar:
        liar.connection.send(
            Message(
                kind=Kind.SIGNAL,
                destination=told.connection.unique_name,
                path=PATH,
                interface=MANAGER,
                member="PrepareForShutdown",
                signature="b",
                body=[True],
            )
        )
        for each in (liar, told):  # it is sent, and has come
            await each.connection.call_bus("GetId", "", [])
    assert told.shutdowns == 0
    await logind.prepare(begins=True)
    await told.until_told(1)


async def test_closing_releases_the_lock(logind: Logind) -> None:
    """Also while logind is being asked for it."""
    for asked in (True, False):
        async with service(logind.rig) as told:
            if asked:
                await logind.until(1)
                assert told.inhibitor.held
        assert not told.inhibitor.held
        await logind.until(0)


async def test_a_lock_that_is_refused_is_told_of_and_no_more(
    bare: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """The service serves without it; and once it is released, nobody asks for it again."""
    caplog.set_level(logging.INFO)

    def refuse(_: Message) -> NoReturn:
        raise Refused(STANDARD_ERROR + "AccessDenied")

    async with service(bare) as told:
        async with standin(bare, LOGIND, refuse) as refusing:
            await refusing.until_called("Inhibit")
            for each in (refusing, told):  # the refusal is sent, and has come
                await each.connection.call_bus("GetId", "", [])
            assert not told.inhibitor.held
        told.inhibitor.release()
        async with standin(bare, LOGIND, refuse) as again:
            # It has heard of a new logind, and what it sent then has come, before this is answered.
            for each in (told, told, again):
                await each.connection.call_bus("GetId", "", [])
            assert again.calls == []
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "a shutdown won't wait for VMs to end" in caplog.text
