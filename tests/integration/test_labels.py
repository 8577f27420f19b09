"""Who may do what where the bus knows security labels: they tell callers of one user apart."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.permissions import (
    CREATE,
    DEATH,
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
    Labels,
    Ruled,
    Who,
    World,
    attempt,
    create,
    everything,
    observer,
    place,
    try_everything,
)
from tests.rig import Client, Rig, Service, client, plain
from vmbus.bus.connection import Connection
from vmbus.bus.wire import Variant

# As a bus says them: with a NUL behind them.
STAFF, SHOP = b"staff_u:staff_r:staff_t:s0\0", b"user_u:user_r:shop_t:s0-s0:c0.c1023\0"
STAFF_SID, SHOP_SID = "staff_u:staff_r:staff_t:s0", "user_u:user_r:shop_t:s0-s0:c0.c1023"


@pytest.fixture(scope="module")
def here() -> Iterator[Ruled]:
    with place(labels=True) as made:
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


async def credentials(asking: Connection, of: Client) -> dict[str, Any]:
    name = of.connection.unique_name
    (found,) = plain(await asking.call_bus("GetConnectionCredentials", "s", [name]))
    return dict(found)


async def test_the_bus_with_labels_differs_in_labels_alone() -> None:
    """Of the stand-in for such a bus; vmbus has no part in this."""
    rig = Rig(system=True)
    try:
        with Labels.of(rig, "root") as labels:
            async with client(rig) as known, client(rig) as unknown:
                labels.put(known, STAFF)
                behind = await Connection.open(labels.address)
                for who, label in ((known, STAFF), (unknown, None)):
                    said, own = [
                        await credentials(each, who) for each in (behind, known.connection)
                    ]
                    assert said.pop("LinuxSecurityLabel", None) == label
                    assert said.pop("HostsSecurityLabel", None) == own.pop(
                        "LinuxSecurityLabel", None
                    )
                    assert said == own
                await behind.aclose()
    finally:
        rig.close()


async def test_descriptors_pass_the_bus_with_labels_in_both_directions(
    here: Ruled, root: Client
) -> None:
    with here.kernel.open() as file:
        path = await root.create(kernel=Variant("h", 0), fds=[file.fileno()])
    (log,) = await root.vm(path, "OpenLog")
    with os.fdopen(log, "rb") as lent:
        assert "console-log" in os.readlink(f"/proc/self/fd/{lent.fileno()}")
    assert await attempt(root, path, DEATH[0]) == DONE


# The matrix


@pytest.mark.parametrize(
    ("who", "owner", "own"),
    [
        (Who(OWNER, STAFF), Who(OWNER, STAFF), True),
        (Who(OWNER, STAFF), Who(OWNER, SHOP), False),
        (Who(OWNER, SHOP), Who(OWNER, STAFF), False),
        (Who(OWNER, STAFF), Who(OTHER, STAFF), False),
        (Who(OTHER, SHOP), Who(OWNER, STAFF), False),
        (Who(ROOT, STAFF), Who(ROOT, SHOP), False),
        (Who(ROOT, STAFF), Who(OWNER, STAFF), False),
        # What isn't known tells nobody apart.
        (Who(OWNER, STAFF), Who(OWNER), True),
        (Who(OWNER), Who(OWNER, STAFF), True),
        (Who(OTHER), Who(OWNER, STAFF), False),
    ],
)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
async def test_who_may_do_what(
    here: Ruled, root: Client, world: World, who: Who, owner: Who, own: bool
) -> None:
    await try_everything(here, root, world, who, owner, own=own)


# What a label is


@pytest.mark.parametrize(
    ("label", "sid"),
    [
        (STAFF, STAFF_SID),
        (STAFF[:-1], STAFF_SID),
        (b"unconfined\n\0", "unconfined\n"),
        ("/usr/bin/käse (enforce)\0".encode(), "/usr/bin/käse (enforce)"),
        (b"staff\xff\xc3\0", "staff\\xff\\xc3"),
        (b"staff\0shop\0", "staff"),
        (b"x" * 4096 + b"\0", "x" * 4096),
        (b"\0", ""),
        (b"", ""),
        (None, ""),
    ],
)
async def test_the_label_is_recorded_and_shown_without_its_nul(
    here: Ruled, root: Client, label: bytes | None, sid: str
) -> None:
    async with here.caller(Who(OWNER, label)) as owner, here.caller(Who(OWNER, label)) as again:
        path = await here.given(owner)
        assert await root.get(path, "RequesterSid") == sid
        assert (await root.get_all(path))["RequesterSid"] == sid
        assert await root.get(path, "RequesterUid") == OWNER
        assert await root.get(path, "RequesterPid") == owner.process.pid
        for step in DEATH:
            assert await attempt(again, path, step) == DONE


@pytest.mark.parametrize(
    ("label", "own"),
    [
        (STAFF[:-1], True),
        (b"\0", True),
        (b"", True),
        (None, True),
        (SHOP, False),
        (STAFF[:-2] + b"\0", False),
        (STAFF[:-1] + b":c0\0", False),
        (STAFF.upper(), False),
        (b"\xff\0", False),
    ],
)
async def test_a_vm_is_ones_own_with_the_very_same_label_or_where_one_is_not_known(
    here: Ruled, root: Client, label: bytes | None, own: bool
) -> None:
    async with here.caller(Who(OWNER, STAFF)) as owner, here.caller(Who(OWNER, label)) as other:
        path = await here.given(owner)
        before = await everything(root, path)
        assert await attempt(other, path, DEATH[0]) == (DONE if own else INTERACTIVE)
        assert (await everything(root, path) == before) is not own


async def test_a_vm_stays_its_creators_when_they_come_back_with_another_label(
    here: Ruled, root: Client
) -> None:
    """The record is of the connection that called Create, and is not changed by who comes later."""
    start, kill = DEATH
    async with here.caller(Who(OWNER, STAFF)) as owner:
        path = await here.given(owner)
    async with here.caller(Who(OWNER, SHOP)) as other, here.caller(Who(OWNER, STAFF)) as again:
        assert await attempt(other, path, start) == INTERACTIVE
        assert await attempt(again, path, start) == DONE
        assert await attempt(other, path, kill) == INTERACTIVE
        assert await root.get(path, "RequesterSid") == STAFF_SID


# What polkit is told


async def test_rules_see_what_is_to_be_done_to_what_and_whose_it_is(
    here: Ruled, root: Client
) -> None:
    here.polkitd.rules(
        GIVEN
        + """
        polkit.addRule(function(action, subject) {
            polkit.log("asked: " + [action.id, action.lookup("verb"), action.lookup("vm"),
                action.lookup("requester_uid"), "<" + action.lookup("requester_sid") + ">",
                subject.user].join(" "));
            return polkit.Result.YES;
        });
        """
    )
    seen = len(here.polkitd.log)
    async with (
        here.caller(Who(OWNER, STAFF)) as owner,
        here.caller(Who(OWNER)) as unknown,
        here.caller(Who(OTHER, SHOP)) as other,
    ):
        path, other_path = [await here.given(owner) for _ in range(2)]
        last_path = await here.given(unknown)
        paths = (path, other_path, last_path)
        names = [await root.get(each, "Name") for each in paths]
        await other.create(**here.config("another"))
        await unknown.create(**here.config("one-more"))
        for step in LIFE:
            await attempt(other, path, step)
        await attempt(other, other_path, DEATH[0])
        await attempt(owner, other_path, DEATH[1])
        await attempt(other, last_path, DEATH[0])
    expected = [f"{CREATE} create another {OTHER} <{SHOP_SID}> man"]
    expected.append(f"{CREATE} create one-more {OWNER} <> games")
    expected += [
        f"{MANAGE} {step.member.lower()} {names[0]} {OWNER} <{STAFF_SID}> man" for step in LIFE
    ]
    expected.append(f"{MANAGE} start {names[1]} {OWNER} <{STAFF_SID}> man")
    expected.append(f"{OWN} kill {names[1]} {OWNER} <{STAFF_SID}> games")
    expected.append(f"{MANAGE} start {names[2]} {OWNER} <> man")
    assert re.findall("asked: (.*)", here.polkitd.log[seen:]) == expected


async def test_a_rule_can_decide_by_verb_vm_user_and_label(here: Ruled, root: Client) -> None:
    """Each method is allowed by a rule that fits it, and denied where one detail is another."""
    async with (
        here.caller(Who(OWNER, STAFF)) as owner,
        here.caller(Who(OWNER, SHOP)) as shop,
        here.caller(Who(ROOT, STAFF)) as roots,
        here.caller(Who(OTHER, SHOP)) as other,
    ):
        database, web = [await owner.create(**here.config(f"given-{name}")) for name in "ab"]
        foreign = {"user": await roots.create(**here.config("given-c"))}
        foreign["label"] = await shop.create(**here.config("given-d"))
        names = [await root.get(path, "Name") for path in (database, *foreign.values())]
        for step in LIFE:
            here.polkitd.rules(f"""
                {GIVEN}
                polkit.addRule(function(action, subject) {{
                    if (action.id == "{MANAGE}" && subject.user == "man"
                            && action.lookup("verb") == "{step.member.lower()}"
                            && {names}.indexOf(action.lookup("vm")) >= 0
                            && action.lookup("requester_uid") == "{OWNER}"
                            && action.lookup("requester_sid") == "{STAFF_SID}")
                        return polkit.Result.YES;
                }});
            """)
            for path in (web, *foreign.values()):
                assert await attempt(other, path, step) == INTERACTIVE
            for each in LIFE:
                if each is not step:
                    assert await attempt(other, database, each) == INTERACTIVE
            assert await attempt(other, database, step) == DONE


async def test_a_rule_can_decide_who_creates_by_label(here: Ruled, root: Client) -> None:
    here.polkitd.rules(f"""
        polkit.addRule(function(action, subject) {{
            if (action.id == "{CREATE}" && action.lookup("requester_sid") == "{SHOP_SID}"
                    && action.lookup("requester_uid") == "{OWNER}")
                return polkit.Result.YES;
        }});
    """)
    for who, outcome in (
        (Who(OWNER, SHOP), DONE),
        (Who(OWNER, STAFF), INTERACTIVE),
        (Who(OWNER), INTERACTIVE),
        (Who(OTHER, SHOP), INTERACTIVE),
    ):
        async with here.caller(who) as asking:
            assert await create(here, root, asking) == outcome


async def test_labels_that_are_no_text_are_told_apart(here: Ruled, root: Client) -> None:
    async with here.caller(Who(OWNER, b"\xfe\0")) as owner:
        path = await here.given(owner)
    async with here.caller(Who(OWNER, b"\xff\0")) as other:
        assert await attempt(other, path, DEATH[0]) == INTERACTIVE
