"""Who calls: asked once, remembered, and told to those who wait in the order they came in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from tests.rig import DEADLINE
from vmbus.bus import peers
from vmbus.bus.connection import Connection, RemoteError
from vmbus.bus.peers import Peers
from vmbus.bus.wire import Variant
from vmbus.errors import AccessDenied
from vmbus.model.identity import Requester


class Bus:
    """The one call that Peers makes, answered when the test says so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def call_bus(self, member: str, signature: str, body: Sequence[Any]) -> list[Any]:
        assert (member, signature) == ("GetConnectionCredentials", "s")
        self.asked.append(body[0])
        return [await self.answer]


def made() -> tuple[Bus, Peers]:
    bus = Bus()
    return bus, Peers(cast("Connection", bus))


def credentials(uid: int = 7, **more: Any) -> dict[str, Any]:
    return {"UnixUserID": Variant("u", uid), "ProcessID": Variant("u", 99), **more}


async def test_nobody_who_comes_later_goes_before() -> None:
    bus, known = made()
    order: list[int] = []

    async def identify(number: int) -> None:
        await known.identify(":1.5")
        order.append(number)

    calls = [asyncio.create_task(identify(number)) for number in range(3)]
    await asyncio.sleep(0)
    bus.answer.set_result(credentials())
    while known.known(":1.5") is None:
        await asyncio.sleep(0)
    # From here on a caller is let in at once; those who waited must still be first.
    calls.append(asyncio.create_task(identify(3)))
    await asyncio.gather(*calls)
    assert order == [0, 1, 2, 3]
    assert bus.asked == [":1.5"]


async def test_what_the_bus_vouches_for_is_recorded() -> None:
    bus, known = made()
    label = Variant("ay", b"user_u:user_r\0")
    bus.answer.set_result(credentials(LinuxSecurityLabel=label, Other=Variant("s", "x")))
    assert await known.identify(":1.5") == Requester(7, 99, "user_u:user_r", ":1.5")
    assert known.known(":1.5") == Requester(7, 99, "user_u:user_r", ":1.5")


@pytest.mark.parametrize(
    "error",
    [RemoteError("a.b.NameHasNoOwner", "gone"), TimeoutError("late"), ConnectionResetError("gone")],
)
async def test_whom_the_bus_does_not_know_is_denied_and_asked_for_again(error: Exception) -> None:
    bus, known = made()
    bus.answer.set_exception(error)
    for _ in range(2):
        with pytest.raises(AccessDenied):
            await known.identify(":1.5")
    assert bus.asked == [":1.5"] * 2
    assert known.known(":1.5") is None


@pytest.mark.parametrize("found", [{}, {"UnixUserID": Variant("s", "root")}])
async def test_credentials_that_name_no_user_are_none(found: dict[str, Any]) -> None:
    bus, known = made()
    bus.answer.set_result(found)
    with pytest.raises(AccessDenied):
        await known.identify(":1.5")


async def test_a_caller_that_gives_up_takes_nobody_along() -> None:
    bus, known = made()
    first, second = (asyncio.create_task(known.identify(":1.5")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    bus.answer.set_result(credentials())
    async with asyncio.timeout(DEADLINE):
        assert (await second).uid == 7
    assert first.cancelled()


async def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_MAX_REMEMBERED", 3)
    bus, known = made()
    bus.answer.set_result(credentials())
    for number in range(5):
        await known.identify(f":1.{number}")
    assert [known.known(f":1.{number}") is not None for number in range(5)] == [False] * 2 + [
        True
    ] * 3
