"""A polkit that does what the real one won't: python-dbusmock's, which hangs, dies and babbles."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.permissions import (
    CREATE,
    DEATH,
    DENIED,
    DONE,
    LIFE,
    MANAGE,
    OTHER,
    OWN,
    OWNER,
    Place,
    attempt,
    everything,
    request_of,
)
from tests.polkit import Caller, Control, Mock, caller, mock
from tests.rig import MANAGER, MANAGER_PATH, Client, Rig, Service, client, listening, refused
from vmbus.bus import authority
from vmbus.bus.peers import Peers
from vmbus.errors import AccessDenied

ALL = [CREATE, OWN, MANAGE]
START, KILL = DEATH
TEXT = "the moon is in the wrong house"
Babbling = Callable[[str, str], Awaitable[set[str]]]


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    rig = Rig(system=True)
    try:
        yield Place(rig)
    finally:
        rig.close()


@pytest.fixture
def service(here: Place) -> Service:
    """For its log, where a test fails."""
    return here.service


@pytest.fixture
def polkitd(here: Place, service: Service) -> Iterator[Mock]:
    with mock(here.rig) as running:
        yield running


@pytest.fixture
async def control(polkitd: Mock) -> AsyncIterator[Control]:
    """It allows everything, to everybody, until it is told otherwise."""
    async with polkitd.control() as telling:
        await telling.tell("SetAllowed", "as", ALL)
        yield telling


@pytest.fixture
async def root(here: Place, control: Control) -> AsyncIterator[Client]:
    async with listening(here.rig) as connected:
        yield connected


@pytest.fixture
async def owner(here: Place, root: Client) -> AsyncIterator[Caller]:
    async with caller(here.rig, OWNER) as connected:
        yield connected


@pytest.fixture
async def other(here: Place, root: Client) -> AsyncIterator[Caller]:
    """One whose calls may take as long as a user takes."""
    async with caller(here.rig, OTHER, interactive=True) as connected:
        yield connected


async def hangs(control: Control, action: str) -> list[Any]:
    """The question about this action, once it was asked."""
    return await control.called("CheckAuthorization", lambda question: question[1] == action)


async def open_log(who: Client, path: str) -> None:
    (fd,) = await who.vm(path, "OpenLog")
    os.close(fd)


async def test_while_one_call_waits_a_hundred_others_go_through(
    here: Place, control: Control, root: Client, owner: Caller, other: Caller
) -> None:
    path = await here.given(owner)
    mine = await here.given(other)
    await control.tell("SimulateHangActions", "as", [MANAGE])
    before = await everything(root, path)
    async with contextlib.AsyncExitStack() as stack:
        again = await stack.enter_async_context(caller(here.rig, OTHER))
        waiting = asyncio.create_task(other.vm(path, "Start"))
        await hangs(control, MANAGE)
        # Of others and of the same caller: what needs no polkit, and what needs another answer.
        calls: list[Any] = []
        for who, own in ((owner, path), (other, mine), (again, mine)):
            calls += [who.get(path, "State") for _ in range(10)]
            calls += [who.call(MANAGER_PATH, MANAGER, "List") for _ in range(10)]
            calls += [open_log(who, own) for _ in range(10)]
            calls += [here.given(who) for _ in range(5)]
        assert len(calls) > 100
        await asyncio.gather(*calls)
        assert await attempt(other, mine, START) == DONE
        assert await attempt(again, mine, KILL) == DONE
        assert not waiting.done()
        # A VM that others see is as it was, and in the end its owner goes first.
        assert (await everything(root, path))[0] == before[0]
        assert await attempt(owner, path, START) == DONE
        await control.tell("ReleaseHangingCalls")
        async with refused("org.vmbus1.Error.InvalidState"):
            await waiting


async def test_a_caller_that_leaves_has_its_check_cancelled(
    here: Place, control: Control, root: Client, owner: Caller, other: Caller
) -> None:
    await control.tell("AddMethod", "sssss", "", "CancelCheckAuthorization", "s", "", "")
    path = await here.given(owner)
    await control.tell("SimulateHang", "b", True)
    before = await everything(root, path)
    fds = here.service.fds()
    calls = [asyncio.create_task(owner.vm(path, "Start"))]
    first = await hangs(control, OWN)
    calls.append(asyncio.create_task(other.vm(path, "Start")))
    second = await hangs(control, MANAGE)
    assert first[4] != second[4]
    await other.connection.aclose()
    await control.called("CancelCheckAuthorization", lambda said: said == [second[4]])
    with pytest.raises(ConnectionError):
        await calls[1]
    assert not calls[0].done()
    assert await everything(root, path) == before
    assert here.service.fds() == fds


async def test_an_answer_that_comes_after_the_caller_left_does_nothing(
    here: Place, control: Control, root: Client, owner: Caller, other: Caller
) -> None:
    await control.tell("AddMethod", "sssss", "", "CancelCheckAuthorization", "s", "", "")
    path = await here.given(owner)
    before = await everything(root, path)
    await control.tell("SimulateHang", "b", True)
    starting = asyncio.create_task(other.vm(path, "Start"))
    question = await hangs(control, MANAGE)
    await other.connection.aclose()
    await control.called("CancelCheckAuthorization", lambda said: said == [question[4]])
    # It says yes, and the service has that before it has what root asks next.
    await control.tell("ReleaseHangingCalls")
    assert await everything(root, path) == before
    with pytest.raises(ConnectionError):
        await starting
    await control.tell("SimulateHang", "b", False)
    assert await attempt(owner, path, START) == DONE


async def test_a_polkit_that_vanishes_denies_what_it_was_asked_and_holds_up_nobody(
    here: Place, polkitd: Mock, control: Control, root: Client, owner: Caller, other: Caller
) -> None:
    path, running = [await here.given(owner) for _ in range(2)]
    await owner.vm(running, "Start")
    before = await everything(root, path)
    await control.tell("SimulateHang", "b", True)
    calls = [
        asyncio.create_task(call)
        for call in (
            owner.vm(path, "Start"),
            other.vm(path, "Start"),
            other.vm(running, "Stop", "t", 0),
            owner.create(**here.config("given-none")),
        )
    ]
    for question in (OWN, MANAGE, CREATE):
        await hangs(control, question)
    ends = [asyncio.create_task(each.vm(running, "Wait")) for each in (owner, other, root)]
    polkitd.kill()
    # Sooner than any time-out of the service's own, for those who asked and all who ask now.
    async with asyncio.timeout(authority.POLKIT_TIMEOUT / 2):
        for each in calls:
            async with refused(DENIED) as texts:
                await each
            assert texts[0].startswith("polkit can't be asked")
        for who in (owner, other, root):
            assert await attempt(who, path, START) == DENIED
            assert await who.get(path, "State") == "not-started"
    assert not any(each.done() for each in ends)
    assert await everything(root, path) == before
    assert await root.get(running, "State") == "running"
    with mock(here.rig) as back:
        async with back.control() as telling:
            await telling.tell("SetAllowed", "as", ALL)
            for who in (owner, other):
                assert await attempt(who, path, LIFE[1]) == DONE
            assert await attempt(other, path, START) == DONE
            await other.vm(running, "Kill")
            await asyncio.gather(*ends)
            await here.given(owner)


# Nonsense


@pytest.fixture
async def babbling(
    here: Place, control: Control, root: Client, owner: Caller, other: Caller
) -> AsyncIterator[Babbling]:
    """Ask for all that polkit decides while it answers like that: gives what callers are told.

    Nothing of it may be done, and all of it may be when polkit is itself again.
    """
    path = await here.given(owner)

    async def ask(signature: str, code: str) -> set[str]:
        await control.answer(signature, code)
        before, fds = await everything(root, path), here.service.fds()
        told = set()
        for who in (owner, other):
            for step in (*LIFE, *DEATH):
                async with refused(DENIED) as texts:
                    await who.vm(path, step.member, step.signature, *step.body)
                told |= set(texts)
            async with refused(DENIED) as texts:
                await who.create(**here.config("given-none"))
            told |= set(texts)
        assert await everything(root, path) == before
        assert here.service.fds() == fds
        return told

    yield ask
    assert "Traceback" not in here.service.log.read_text()
    await control.answer("(bba{ss})", "ret = (True, False, {})")
    assert await attempt(owner, path, START) == DONE
    assert await attempt(other, path, KILL) == DONE


@pytest.mark.parametrize(
    ("signature", "code"),
    [
        ("(bba{ss})b", "ret = ((True, False, {}), True)"),
        ("b(bba{ss})", "ret = (True, (True, False, {}))"),
        ("((bba{ss}))", "ret = ((True, False, {}),)"),
        ("a(bba{ss})", "ret = [(True, False, {})]"),
        ("(bv)", "ret = (True, True)"),
        ("(nba{ss})", "ret = (1, False, {})"),
        ("(bba{sv})", "ret = (True, False, {'a': 'b'})"),
        ("(bba{si})", "ret = (True, False, {'a': 1})"),
        ("(bbs)", "ret = (True, False, '')"),
        ("(bbb)", "ret = (True, False, False)"),
        ("ab", "ret = [True, False, True]"),
        ("h", "ret = dbus.types.UnixFd(0)"),
        ("(bba{ss})h", "ret = ((True, False, {}), dbus.types.UnixFd(0))"),
        ("v", "ret = dbus.Struct((True, False, dbus.Dictionary({}, signature='ss')))"),
    ],
)
async def test_what_only_looks_like_a_yes_is_none(
    babbling: Babbling, signature: str, code: str
) -> None:
    told = await babbling(signature, code)
    assert told == {"polkit answers something that can't be understood"}


async def test_huge_details_of_a_no_leave_it_a_no(babbling: Babbling) -> None:
    told = await babbling(
        "(bba{ss})", "ret = (False, False, {str(n): 'x' * 1000 for n in range(1000)})"
    )
    assert all(text.startswith("polkit does not allow org.vmbus1.") for text in told)
    assert max(map(len, told)) < 100


@pytest.mark.parametrize(
    "error",
    [
        "org.freedesktop.PolicyKit1.Error.Failed",
        "org.freedesktop.PolicyKit1.Error.NotAuthorized",
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
        "org.freedesktop.DBus.Error.UnknownMethod",
        "org.freedesktop.DBus.Error.NoReply",
        "org.vmbus1.Error.InvalidState",
        "a.b",
        "a." + "b" * 253,
    ],
)
async def test_whatever_error_polkit_answers_the_caller_is_denied(
    babbling: Babbling, error: str
) -> None:
    told = await babbling("", f"raise dbus.exceptions.DBusException('{TEXT}', name='{error}')")
    assert told == {f"polkit can't be asked: {TEXT}"}


async def test_an_error_without_a_text_denies_too(babbling: Babbling) -> None:
    told = await babbling("", "raise dbus.exceptions.DBusException(name='a.b')")
    assert told == {"polkit can't be asked: "}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise dbus.exceptions.DBusException('x' * 10**6, name='a.b')", "x" * 200),
        # In Python an error's text is a traceback, and the last line says what is wrong.
        ("raise ValueError('the moon is wrong')", "ValueError: the moon is wrong"),
    ],
)
async def test_an_error_with_a_text_of_any_length_is_told_in_short(
    babbling: Babbling, code: str, expected: str
) -> None:
    assert await babbling("", code) == {f"polkit can't be asked: {expected}"}


async def test_a_check_that_takes_too_long_is_cancelled(
    here: Place, control: Control, owner: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "POLKIT_TIMEOUT", 0.1)
    await control.tell("AddMethod", "sssss", "", "CancelCheckAuthorization", "s", "", "")
    await control.tell("SimulateHang", "b", True)
    async with client(here.rig) as service:
        decides = authority.Polkit(service.connection, Peers(service.connection))
        with pytest.raises(AccessDenied, match="did not answer within"):
            await decides.authorize(request_of(owner))
        question = await hangs(control, CREATE)
        await control.called("CancelCheckAuthorization", lambda said: said == [question[4]])
