"""Who may do what on a system bus: the service of the user vmbus, and the real polkit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.pages import all_blocks
from tests.permissions import (
    CREATE,
    DEATH,
    DENIED,
    DONE,
    GIVEN,
    INTERACTIVE,
    LIFE,
    MANAGE,
    OTHER,
    OWN,
    OWNER,
    ROOT,
    WORLDS,
    Ruled,
    Who,
    World,
    attempt,
    create,
    everything,
    observer,
    place,
    request_of,
    try_everything,
)
from tests.polkit import (
    AUTHORITY,
    AUTHORITY_INTERFACE,
    AUTHORITY_PATH,
    Answer,
    agent,
    caller,
    polkit,
)
from tests.rig import (
    DEADLINE,
    ERROR,
    MANAGER,
    MANAGER_PATH,
    STANDARD_ERROR,
    Client,
    Rig,
    Service,
    client,
    plain,
    refused,
)
from vmbus.bus import authority
from vmbus.bus.peers import Peers
from vmbus.bus.wire import Kind, Message, Variant
from vmbus.errors import AccessDenied


@pytest.fixture(scope="module")
def here() -> Iterator[Ruled]:
    with place() as made:
        yield made


@pytest.fixture
def service(here: Ruled) -> Service:
    """For its log, where a test fails."""
    here.polkitd.rules(GIVEN)
    return here.service


@pytest.fixture
async def root(here: Ruled, service: Service) -> AsyncIterator[Client]:
    async with observer(here) as watching:
        yield watching


# The matrix, where the bus knows no labels; test_labels.py has it where it does.


@pytest.mark.parametrize(
    ("uid", "owner"),
    [(OWNER, OWNER), (OWNER, ROOT), (OTHER, OTHER), (OTHER, OWNER), (ROOT, ROOT), (ROOT, OWNER)],
)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
async def test_who_may_do_what(
    here: Ruled, root: Client, world: World, uid: int, owner: int
) -> None:
    await try_everything(here, root, world, Who(uid), Who(owner), own=uid == owner)


async def test_who_may_is_not_told_apart_from_what_the_state_allows(
    here: Ruled, root: Client
) -> None:
    """Who may not learns nothing of the VM by trying; who may learns what is wrong."""
    running = [step for step in LIFE if step.before in ("running", "suspended")]
    async with caller(here.rig, OWNER) as owner, caller(here.rig, OTHER) as other:
        path = await here.given(owner)
        before = await everything(root, path)
        for step in running:
            assert await attempt(owner, path, step) == ERROR + "InvalidState"
            assert await attempt(root, path, step) == ERROR + "InvalidState"
            assert await attempt(other, path, step) == INTERACTIVE
        assert await everything(root, path) == before


# What polkit is told


async def test_a_rule_can_decide_by_verb_vm_and_requester(here: Ruled, root: Client) -> None:
    here.polkitd.rules(f"""
        {GIVEN}
        polkit.addRule(function(action, subject) {{
            if (action.id == "{MANAGE}" && subject.user == "man"
                    && action.lookup("verb") == "start"
                    && action.lookup("requester_uid") == "{OWNER}"
                    && action.lookup("vm") == "given-db")
                return polkit.Result.YES;
        }});
    """)
    start, kill = DEATH
    async with caller(here.rig, OWNER) as owner, caller(here.rig, OTHER) as other:
        database = await owner.create(**here.config("given-db"))
        web = await owner.create(**here.config("given-web"))
        assert await attempt(other, web, start) == INTERACTIVE
        assert await attempt(other, database, start) == DONE
        assert await attempt(other, database, kill) == INTERACTIVE
        await owner.vm(database, "Kill")
        await owner.vm(database, "Remove")
        roots = await root.create(**here.config("given-db"))
        assert await attempt(other, roots, start) == INTERACTIVE


def documented_rules(people: dict[str, str]) -> str:
    """The rules in the documentation, with users, groups and VMs that there are here."""
    shown = [block for block in all_blocks() if block.file.endswith(".rules")]
    rules = "\n".join(block.text for block in sorted(shown, key=lambda block: block.file))
    for name, stand_in in people.items():
        assert f'"{name}"' in rules
        rules = rules.replace(f'"{name}"', f'"{stand_in}"')
    return rules


async def test_the_documented_rules_do_what_the_documentation_says(
    here: Ruled, root: Client
) -> None:
    """Operators do everything, a job what it is for, users what is their own; others nothing."""
    people = {"vm-operators": "bin", "vm-users": "games", "1000": str(OWNER), "db-": "given-db-"}
    here.polkitd.rules(GIVEN + documented_rules(people))
    steps = {step.member: step for step in LIFE}
    async with (
        caller(here.rig, pwd.getpwnam("bin").pw_uid) as operator,
        caller(here.rig, pwd.getpwnam("backup").pw_uid) as job,
        caller(here.rig, OWNER) as user,
        caller(here.rig, OTHER) as anybody,
    ):
        database = await user.create(**here.config("given-db-1"))
        web = await user.create(**here.config("given-web-1"))
        anybodys = await anybody.create(**here.config("given-db-2"))
        assert await attempt(anybody, database, steps["Start"]) == DENIED
        assert await attempt(user, anybodys, steps["Start"]) == DENIED
        assert await attempt(job, database, steps["Start"]) == DENIED
        assert await attempt(user, database, steps["Start"]) == DONE
        for path in (web, anybodys):
            assert await attempt(operator, path, steps["Start"]) == DONE
            assert await attempt(job, path, steps["Suspend"]) == DENIED
        assert await attempt(job, database, steps["Suspend"]) == DONE
        assert await attempt(job, database, steps["Resume"]) == DONE
        assert await attempt(job, database, DEATH[1]) == DENIED
        for who in (operator, user):
            assert await create(here, root, who) == DONE
        for who in (job, anybody):
            assert await create(here, root, who) == DENIED


async def test_the_dialog_names_the_vm(here: Ruled, root: Client) -> None:
    async with (
        caller(here.rig, OWNER) as owner,
        caller(here.rig, OTHER, interactive=True) as other,
        agent(here.rig, other, Answer.GRANT) as desktop,
    ):
        path = await owner.create(**here.config("given-shop"))
        await other.vm(path, "Start")
        await other.create(**here.config("mail"))
        manage, create = desktop.requests
        assert manage.action == MANAGE
        assert "“given-shop” of another user" in manage.message
        assert create.action == CREATE
        assert "create the virtual machine “mail”" in create.message


async def test_a_vm_to_be_that_has_no_name_is_not_called_by_one(here: Ruled, root: Client) -> None:
    async with (
        caller(here.rig, OTHER, interactive=True) as other,
        agent(here.rig, other, Answer.GRANT) as desktop,
    ):
        config = here.config("none")
        del config["name"]
        await other.create(**config)
        (create,) = desktop.requests
        assert create.message == "Authentication is required to create a virtual machine."


async def test_the_dialog_is_in_the_language_of_who_is_asked(here: Ruled, root: Client) -> None:
    async with (
        caller(here.rig, OWNER) as owner,
        caller(here.rig, OTHER, interactive=True) as other,
        agent(here.rig, other, Answer.GRANT, "de_DE.UTF-8") as desktop,
    ):
        path = await owner.create(**here.config("given-laden"))
        await other.vm(path, "Start")
        config = here.config("none")
        del config["name"]
        await other.create(**config)
        assert [each.message for each in desktop.requests] == [
            "Zum Verwalten der virtuellen Maschine »given-laden« eines anderen Benutzers ist eine "
            "Legitimierung nötig.",
            "Zum Anlegen einer virtuellen Maschine ist eine Legitimierung nötig.",
        ]


async def test_every_text_of_the_actions_is_translated(here: Ruled, root: Client) -> None:
    texts = {}
    for locale in ("C", "de_DE.UTF-8"):
        reply = await root.connection.call(
            AUTHORITY, AUTHORITY_PATH, AUTHORITY_INTERFACE, "EnumerateActions", "s", [locale]
        )
        (rows,) = plain(reply.body)
        ours = [row for row in rows if row[0] in (CREATE, OWN, MANAGE)]
        texts[locale] = {text for row in ours for text in row[1:3]}
    assert len(texts["C"]) == len(texts["de_DE.UTF-8"]) == 6
    assert not texts["C"] & texts["de_DE.UTF-8"]


# What happens while polkit has not decided


async def test_the_state_is_looked_at_again_after_the_dialog(here: Ruled, root: Client) -> None:
    async with (
        caller(here.rig, OWNER) as owner,
        caller(here.rig, OTHER, interactive=True) as other,
        agent(here.rig, other) as desktop,
    ):
        path = await here.given(owner)
        await owner.vm(path, "Start")
        suspending = asyncio.create_task(other.vm(path, "Suspend"))
        await desktop.asked()
        await owner.vm(path, "Kill")
        desktop.close_all(Answer.GRANT)
        async with refused(ERROR + "InvalidState"):
            await suspending


async def test_a_vm_that_is_removed_takes_its_dialogs_along(here: Ruled, root: Client) -> None:
    async with (
        caller(here.rig, OWNER) as owner,
        caller(here.rig, OTHER, interactive=True) as other,
        agent(here.rig, other) as desktop,
    ):
        path, kept = [await here.given(owner) for _ in range(2)]
        calls = [asyncio.create_task(other.vm(each, "Start")) for each in (path, kept)]
        await desktop.asked(2)
        name = await root.get(path, "Name")
        (mine,) = [request for request in desktop.requests if f"“{name}”" in request.message]
        await owner.vm(path, "Remove")
        await desktop.gave_up(mine)
        async with refused(STANDARD_ERROR + "UnknownObject") as texts:
            await calls[0]
        assert texts == [f"the VM {name} was removed before polkit had decided"]
        assert not calls[1].done()
        desktop.close_all(Answer.GRANT)
        assert await calls[1] == []
        assert await root.get(kept, "State") == "running"


async def test_a_caller_that_leaves_takes_its_dialog_along(here: Ruled, root: Client) -> None:
    async with caller(here.rig, OWNER) as owner, contextlib.AsyncExitStack() as stack:
        path = await here.given(owner)
        before = await everything(root, path)
        fds = here.service.fds()
        other = await stack.enter_async_context(caller(here.rig, OTHER, interactive=True))
        desktop = await stack.enter_async_context(agent(here.rig, other))
        starting = asyncio.create_task(other.vm(path, "Start"))
        request = await desktop.asked()
        await other.connection.aclose()
        await desktop.gave_up(request)
        with pytest.raises(ConnectionError):
            await starting
        assert await everything(root, path) == before
        assert here.service.fds() == fds


# A polkit that doesn't answer, or isn't there


@pytest.fixture
def ours() -> Iterator[Ruled]:
    """One whose polkit may be stopped and killed."""
    with place() as made:
        yield made


async def test_a_polkit_that_hangs_holds_up_nothing_else(ours: Ruled) -> None:
    async with contextlib.AsyncExitStack() as stack:
        root = await stack.enter_async_context(client(ours.rig))
        await root.listen()
        owner = await stack.enter_async_context(caller(ours.rig, OWNER))
        other = await stack.enter_async_context(caller(ours.rig, OTHER, interactive=True))
        many = [await stack.enter_async_context(client(ours.rig)) for _ in range(100)]
        path, running = [await ours.given(owner) for _ in range(2)]
        await owner.vm(running, "Start")
        ours.polkitd.signal(signal.SIGSTOP)
        held_up = [asyncio.create_task(other.vm(path, "Start"))]
        held_up += [asyncio.create_task(each.vm(path, "OpenLog")) for each in (owner, root)]
        # What everybody sees of a VM, its owner and who waits for polkit among them.
        everybody = [*many, owner, other, root]
        states = await asyncio.gather(*(each.get(path, "State") for each in everybody))
        assert set(states) == {"not-started"}
        lists = await asyncio.gather(*(each.call(MANAGER_PATH, MANAGER, "List") for each in many))
        assert {len(rows) for (rows,) in lists} == {2}
        # VMs live and die, and who waits for that hears of it.
        waits = [asyncio.create_task(each.vm(running, "Wait")) for each in (*many, other)]
        pid = await root.get(running, "Pid")
        os.kill(pid, signal.SIGKILL)
        assert (await root.died(running))[2] == -signal.SIGKILL
        ends = await asyncio.gather(*waits)
        assert {status for _, status in ends} == {-signal.SIGKILL}
        # And all this while polkit had not answered.
        assert not any(each.done() for each in held_up)
        assert await root.get(path, "State") == "not-started"
        ours.polkitd.signal(signal.SIGCONT)
        async with refused(DENIED):
            await held_up[0]
        for each in held_up[1:]:
            (fd,) = await each
            os.close(fd)


async def test_the_service_ends_while_a_dialog_is_open(ours: Ruled) -> None:
    """Neither the user at the dialog, nor who waits for a VM's death, is waited for."""
    async with (
        caller(ours.rig, OWNER) as owner,
        caller(ours.rig, OTHER, interactive=True) as other,
        agent(ours.rig, other) as desktop,
    ):
        path = await ours.given(owner)
        starting = asyncio.create_task(other.vm(path, "Start"))
        request = await desktop.asked()
        waiting = asyncio.create_task(other.vm(path, "Wait"))
        await other.get(path, "State")
        async with asyncio.timeout(DEADLINE):
            ours.service.process.terminate()
            await desktop.gave_up(request)
            for call in (starting, waiting):
                async with refused(STANDARD_ERROR + "Failed") as texts:
                    await call
                assert texts == ["the service is shutting down"]
            assert await asyncio.to_thread(ours.service.process.wait, 10) == 0


async def test_polkit_can_vanish_and_come_back(ours: Ruled) -> None:
    async with (
        client(ours.rig) as root,
        caller(ours.rig, OWNER) as owner,
        caller(ours.rig, OTHER, interactive=True) as other,
        agent(ours.rig, other) as desktop,
    ):
        await root.listen()
        path = await ours.given(owner)
        before = await everything(root, path)
        starting = asyncio.create_task(other.vm(path, "Start"))
        await desktop.asked()
        ours.polkitd.kill()
        async with refused(DENIED) as texts:
            await starting
        assert "polkit can't be asked" in texts[0]
        for who in (owner, other, root):
            for step in (*LIFE, *DEATH):
                assert await attempt(who, path, step) == DENIED
            async with refused(DENIED):
                await who.create(**ours.config("given-none"))
        assert await everything(root, path) == before
        ours.polkitd.start()
        await desktop.register()
        assert await attempt(owner, path, DEATH[0]) == DONE
        desktop.answer = Answer.GRANT
        assert await attempt(other, path, DEATH[1]) == DONE


async def test_without_a_dialog_a_polkit_that_hangs_denies_after_a_while(
    system_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "POLKIT_TIMEOUT", 0.1)
    with polkit(system_rig) as polkitd:
        async with client(system_rig) as service, client(system_rig) as who:
            decides = authority.Polkit(service.connection, Peers(service.connection))
            assert (await decides.authorize(request_of(who))).uid == ROOT
            polkitd.signal(signal.SIGSTOP)
            with pytest.raises(AccessDenied, match="polkit can't be asked"):
                await decides.authorize(request_of(who))
            polkitd.signal(signal.SIGCONT)
            monkeypatch.undo()
            assert (await decides.authorize(request_of(who))).uid == ROOT


@contextlib.asynccontextmanager
async def impostor(rig: Rig, signature: str, body: list[Any]) -> AsyncIterator[None]:
    """A polkit that answers every question with the same."""
    async with caller(rig, pwd.getpwnam("polkitd").pw_uid) as polkitd:

        def answer(message: Message) -> None:
            if message.kind is Kind.CALL:
                reply = Message(
                    kind=Kind.RETURN, destination=message.sender, reply_serial=message.serial
                )
                reply.signature, reply.body = signature, body
                polkitd.connection.send(reply)

        polkitd.connection.handler = answer
        assert await polkitd.connection.call_bus("RequestName", "su", [AUTHORITY, 4]) == [1]
        yield


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("", []),
        ("s", ["yes"]),
        ("b", [True]),
        ("bb", [True, True]),
        ("(bb)", [(True, False)]),
        ("(uba{ss})", [(1, False, {})]),
        ("(sba{ss})", [("true", False, {})]),
        ("a{sv}", [{"authorized": Variant("b", True)}]),
        ("(bba{ss})", [(False, False, {})]),
    ],
)
async def test_a_polkit_that_talks_nonsense_allows_nothing(
    system_rig: Rig, signature: str, body: list[Any]
) -> None:
    async with client(system_rig) as service, client(system_rig) as who:
        decides = authority.Polkit(service.connection, Peers(service.connection))
        async with impostor(system_rig, signature, body):
            with pytest.raises(AccessDenied):
                await decides.authorize(request_of(who))
        async with impostor(system_rig, "(bba{ss})", [(True, False, {})]):
            assert (await decides.authorize(request_of(who))).uid == ROOT
