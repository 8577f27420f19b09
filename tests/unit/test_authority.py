"""Which of polkit's actions decides what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from vmbus.bus.authority import Access, Request, action_for
from vmbus.model.identity import Identity, Requester
from vmbus.model.machine import Machine

CREATE, OWN, MANAGE = "org.vmbus1.create", "org.vmbus1.manage-own", "org.vmbus1.manage"


async def request(access: Access, owner: Requester | None) -> Request:
    vm = None
    if owner is not None:
        identity = Identity(id=1, name="web", cid=3, directory=Path("/"), requester=owner)
        vm = cast(Machine, SimpleNamespace(identity=identity))
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    return Request(":1.1", access, "verb", "web", vm, interactive=False, gone=gone)


@pytest.mark.parametrize(
    ("caller", "owner", "expected"),
    [
        (Requester(5), Requester(5), OWN),
        (Requester(5, pid=1), Requester(5, pid=2), OWN),
        (Requester(5, sid="a_t"), Requester(5, sid="a_t"), OWN),
        (Requester(5, sid="a_t"), Requester(5, sid="b_t"), MANAGE),
        (Requester(5, sid="a_t"), Requester(5, sid="a_t:s0"), MANAGE),
        (Requester(5, sid=""), Requester(5, sid="b_t"), OWN),
        (Requester(5, sid="a_t"), Requester(5, sid=""), OWN),
        (Requester(6), Requester(5), MANAGE),
        (Requester(6, sid="a_t"), Requester(5, sid="a_t"), MANAGE),
        (Requester(6, pid=1), Requester(5, pid=1), MANAGE),
        (Requester(0), Requester(5), MANAGE),
        (Requester(0), Requester(0), OWN),
        (Requester(0, sid="a_t"), Requester(0, sid="b_t"), MANAGE),
    ],
)
async def test_own_is_what_the_same_user_with_the_same_label_asked_for(
    caller: Requester, owner: Requester, expected: str
) -> None:
    assert action_for(await request(Access.MANAGE, owner), caller) == expected


@pytest.mark.parametrize("caller", [Requester(5), Requester(0), Requester(5, sid="a_t")])
async def test_create_is_an_action_of_its_own(caller: Requester) -> None:
    assert action_for(await request(Access.CREATE, None), caller) == CREATE
