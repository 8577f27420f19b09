"""The polkit rig does what tests of authorization take for granted. vmbus has no part in this."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.polkit import (
    AUTHORITY,
    AUTHORITY_INTERFACE,
    AUTHORITY_PATH,
    Agent,
    Answer,
    Caller,
    Polkit,
    agent,
    caller,
    polkit,
)
from tests.rig import STANDARD_ERROR, Client, Rig, client, plain, refused
from vmbus.bus.connection import Connection
from vmbus.bus.wire import Variant

DAEMON, BIN, NOBODY = 1, 2, 65534
MANAGE = "org.vmbus1.manage"
DETAILS = {"verb": "start", "vm": "web", "requester_uid": "7", "requester_sid": ""}
YES, NO, CHALLENGE = (True, False), (False, False), (False, True)


@pytest.fixture(scope="module")
def authority() -> Iterator[Polkit]:
    rig = Rig(system=True)
    with polkit(rig) as running:
        yield running
    rig.close()


@pytest.fixture(autouse=True)
async def clean(authority: Polkit, nothing_left: None) -> None:
    """Every test begins without rules, and leaves nothing behind."""
    authority.rules("")


async def ask(
    asking: Client,
    about: Caller,
    action: str = MANAGE,
    *,
    flags: int = 0,
    timeout: float = 10.0,
    **details: str,
) -> tuple[bool, bool, dict[str, Any]]:
    """Ask as a service would: is it authorized, would a dialog help, and what else is known."""
    subject = ["system-bus-name", {"name": Variant("s", about.connection.unique_name)}]
    reply = await asking.connection.call(
        AUTHORITY,
        AUTHORITY_PATH,
        AUTHORITY_INTERFACE,
        "CheckAuthorization",
        "(sa{sv})sa{ss}us",
        [subject, action, {**DETAILS, **details}, flags, ""],
        timeout=timeout,
    )
    authorized, challenge, found = plain(reply.body)[0]
    return authorized, challenge, found


async def test_a_caller_is_a_process_of_its_user(authority: Polkit) -> None:
    async with caller(authority.rig, DAEMON) as daemon, caller(authority.rig, NOBODY) as nobody:
        for each in (daemon, nobody):
            name = each.connection.unique_name
            (found,) = plain(
                await nobody.connection.call_bus("GetConnectionCredentials", "s", [name])
            )
            assert (found["UnixUserID"], found["ProcessID"]) == (each.uid, each.process.pid)
            assert os.stat(f"/proc/{each.process.pid}").st_uid == each.uid


async def test_the_defaults_are_those_of_the_project(authority: Polkit) -> None:
    async with (
        client(authority.rig) as service,
        caller(authority.rig, 0) as root,
        caller(authority.rig, NOBODY) as nobody,
    ):
        for action, expected in (("create", CHALLENGE), ("manage-own", YES), ("manage", CHALLENGE)):
            assert (await ask(service, root, f"org.vmbus1.{action}"))[:2] == YES
            for flags in (0, 1):
                found = await ask(service, nobody, f"org.vmbus1.{action}", flags=flags)
                assert found[:2] == expected


async def test_rules_are_in_force_at_once_and_see_the_details(authority: Polkit) -> None:
    async with client(authority.rig) as service, caller(authority.rig, NOBODY) as nobody:
        for number in range(20):
            authority.rules(f"""
                polkit.addRule(function(action, subject) {{
                    if (action.lookup("verb") == "start" && action.lookup("vm") == "web{number}"
                            && action.lookup("requester_uid") == "7"
                            && action.lookup("requester_sid") === ""
                            && subject.user == "nobody" && subject.isInGroup("nogroup"))
                        return polkit.Result.YES;
                }});
            """)
            assert (await ask(service, nobody, vm=f"web{number}"))[:2] == YES
            assert (await ask(service, nobody, vm=f"web{number}", verb="stop"))[:2] == CHALLENGE
            assert (await ask(service, nobody, vm=f"web{number - 1}"))[:2] == CHALLENGE


def test_rules_that_are_no_es5_are_told_of(authority: Polkit) -> None:
    with pytest.raises(AssertionError, match="SyntaxError"):
        authority.rules("polkit.addRule((action) => null);")


async def test_details_are_for_root_and_the_owner_of_the_action(authority: Polkit) -> None:
    async with caller(authority.rig, DAEMON) as daemon, caller(authority.rig, NOBODY) as nobody:
        for about in (daemon, nobody):
            async with refused(f"{AUTHORITY}.Error.NotAuthorized"):
                await ask(daemon, about)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(Answer.GRANT, YES), (Answer.REFUSE, NO), (Answer.FAIL, NO), (Answer.DISMISS, NO)],
)
async def test_a_dialog_ends_as_it_is_told(
    authority: Polkit, answer: Answer, expected: tuple[bool, bool]
) -> None:
    async with (
        client(authority.rig) as service,
        caller(authority.rig, DAEMON) as daemon,
        caller(authority.rig, BIN) as other,
        agent(authority.rig, daemon, answer) as desktop,
    ):
        assert (await ask(service, daemon))[:2] == CHALLENGE
        assert (await ask(service, other, flags=1))[:2] == CHALLENGE
        assert desktop.requests == []
        found = await ask(service, daemon, flags=1)
        assert found[:2] == expected
        assert ("polkit.dismissed" in found[2]) == (answer is Answer.DISMISS)
        (request,) = desktop.requests
        assert request.action == MANAGE
        assert "“web”" in request.message
        assert request.details["polkit.subject-pid"] == str(daemon.process.pid)


async def test_a_dialog_stays_open_until_it_is_closed(authority: Polkit) -> None:
    async with (
        client(authority.rig) as service,
        caller(authority.rig, DAEMON) as daemon,
        agent(authority.rig, daemon) as desktop,
    ):
        asked = asyncio.create_task(ask(service, daemon, flags=1))
        await desktop.asked()
        assert (await ask(service, daemon, "org.vmbus1.manage-own"))[:2] == YES
        assert not asked.done()
        desktop.close_all(Answer.GRANT)
        assert (await asked)[:2] == YES


@pytest.mark.parametrize("who", ["service", "caller", "agent"])
async def test_a_dialog_ends_with_whom_it_is_for(authority: Polkit, who: str) -> None:
    service = await Connection.open(authority.rig.address)
    async with (
        caller(authority.rig, DAEMON) as daemon,
        agent(authority.rig, daemon) as desktop,
    ):
        asked = asyncio.create_task(ask(Client(service), daemon, flags=1))
        request = await desktop.asked()
        leaving: dict[str, Connection | Agent] = {
            "service": service,
            "caller": daemon.connection,
            "agent": desktop,
        }
        await leaving[who].aclose()
        if who == "service":
            with pytest.raises(ConnectionError):
                await asked
        else:
            assert (await asked)[:2] == NO
        if who != "agent":
            await desktop.gave_up(request)
    await service.aclose()


@pytest.fixture
def mortal() -> Iterator[Polkit]:
    """One that may be killed."""
    rig = Rig(system=True)
    with polkit(rig) as running:
        yield running
    rig.close()


async def test_polkit_can_hang_and_die_and_come_back(mortal: Polkit) -> None:
    async with (
        client(mortal.rig) as service,
        caller(mortal.rig, DAEMON) as daemon,
        agent(mortal.rig, daemon) as desktop,
    ):
        mortal.signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await ask(service, daemon, timeout=0.2)
        mortal.signal(signal.SIGCONT)
        asked = asyncio.create_task(ask(service, daemon, flags=1))
        await desktop.asked()
        mortal.kill()
        async with refused(STANDARD_ERROR + "NoReply"):
            await asked
        async with refused(STANDARD_ERROR + "ServiceUnknown"):
            await ask(service, daemon)
        mortal.start()
        assert (await ask(service, daemon, flags=1))[:2] == CHALLENGE
        await desktop.register()
        desktop.answer = Answer.GRANT
        assert (await ask(service, daemon, flags=1))[:2] == YES


async def test_what_is_kept_is_for_the_process_and_the_action_alone(authority: Polkit) -> None:
    """Not for the VM that the dialog named; and no rule can refuse what is done with it."""
    authority.rules("""
        polkit.addRule(function(action, subject) {
            polkit.log("asked about " + action.lookup("vm"));
            return action.lookup("verb") == "kill" ? polkit.Result.NO
                                                   : polkit.Result.AUTH_ADMIN_KEEP;
        });
    """)
    async with (
        client(authority.rig) as service,
        caller(authority.rig, DAEMON) as daemon,
        caller(authority.rig, DAEMON) as again,
        agent(authority.rig, daemon, Answer.GRANT) as desktop,
    ):
        assert (await ask(service, daemon, verb="kill"))[:2] == NO
        assert (await ask(service, daemon, flags=1))[:2] == YES
        assert (await ask(service, daemon, vm="db", verb="kill"))[:2] == YES
        assert "asked about db" in authority.log
        assert (await ask(service, again))[:2] == CHALLENGE
        assert len(desktop.requests) == 1
