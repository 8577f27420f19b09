"""Deadlines of many VMs on one timer."""

from __future__ import annotations

import asyncio

from tests.rig import DEADLINE
from vmbus.model.watch import Watch


def _timers() -> int:
    loop = asyncio.get_running_loop()
    scheduled = loop._scheduled  # type: ignore[attr-defined]
    return sum(not handle.cancelled() for handle in scheduled)


async def test_deadlines_come_in_their_order_by_one_timer() -> None:
    watch = Watch()
    now = asyncio.get_running_loop().time()
    came: list[int] = []
    over = asyncio.Event()
    for id in (3, 1, 4, 2):
        watch.set(id, now + id / 100, lambda id=id: came.append(id))  # type: ignore[misc]
    watch.set(9, now + 0.1, over.set)
    assert _timers() == 1
    async with asyncio.timeout(DEADLINE):
        await over.wait()
    assert came == [1, 2, 3, 4]


async def test_deadline_that_is_past_comes_at_once() -> None:
    """It may have passed while no service was there."""
    watch, over = Watch(), asyncio.Event()
    watch.set(1, 0.001, over.set)
    async with asyncio.timeout(DEADLINE):
        await over.wait()


async def test_deadline_that_was_taken_back_or_moved_does_not_come() -> None:
    watch = Watch()
    now = asyncio.get_running_loop().time()
    came: list[str] = []
    over = asyncio.Event()
    watch.set(1, now + 0.01, lambda: came.append("taken back"))
    watch.set(1, 0.0, lambda: came.append("none"))
    watch.set(2, now + 0.01, lambda: came.append("before"))
    watch.set(2, now + 0.02, lambda: came.append("after"))
    watch.set(3, now + 0.05, over.set)
    async with asyncio.timeout(DEADLINE):
        await over.wait()
    assert came == ["after"]


async def test_deadline_may_take_back_another_as_it_comes() -> None:
    watch, over = Watch(), asyncio.Event()
    now = asyncio.get_running_loop().time()
    came: list[int] = []
    watch.set(1, now, lambda: watch.set(2, 0.0, over.set))
    watch.set(2, now, lambda: came.append(2))
    watch.set(3, now + 0.01, over.set)
    async with asyncio.timeout(DEADLINE):
        await over.wait()
    assert came == []


async def test_deadlines_that_hold_no_more_take_no_memory() -> None:
    """However many VMs come and go before the first of them."""
    watch = Watch()
    far = asyncio.get_running_loop().time() + 1e6
    for id in range(10_000):
        watch.set(id, far + id, _never)
        watch.set(id, 0.0, _never)
    assert len(watch._heap) < 100
    watch.set(1, far, _never)
    assert _timers() == 1
    watch.close()
    assert _timers() == 0


def _never() -> None:
    raise AssertionError
