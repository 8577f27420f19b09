"""What a client makes of a service that comes and goes while it is being asked."""

from __future__ import annotations

import asyncio

import pytest

from vmbus.calls import ServiceGone
from vmbus.events import (
    Added,
    Changed,
    Death,
    Died,
    Event,
    EventsLost,
    Removed,
    ServiceChanged,
    Snapshot,
)
from vmbus.missed import Watch

UP, DOWN = ServiceChanged(running=True), ServiceChanged(running=False)


def _vm(state: str = "running", number: int = 1, **values: object) -> Snapshot:
    return Snapshot(f"/vm/{number}", id=number, cid=number, state=state, **values)  # type: ignore[arg-type]


class Heard:
    """A watch whose service says what it is told to, and all that comes of it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.failed: list[Exception] = []
        self.watch = Watch(self._fetch, self.events.append, self.failed.append)
        self._asked: asyncio.Queue[asyncio.Future[list[Snapshot]]] = asyncio.Queue()

    async def _fetch(self) -> list[Snapshot]:
        answer: asyncio.Future[list[Snapshot]] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(answer)
        return await answer

    async def asked(self) -> asyncio.Future[list[Snapshot]]:
        """The next question, to be answered."""
        async with asyncio.timeout(5):
            return await self._asked.get()

    async def began(self, *vms: Snapshot) -> None:
        """It knows these."""
        beginning = asyncio.create_task(self.watch.begin())
        (await self.asked()).set_result(list(vms))
        await beginning

    async def answer(self, *vms: Snapshot) -> None:
        """The service, just come, says that there are these."""
        self.watch.take(UP)
        (await self.asked()).set_result(list(vms))
        await self.settled()

    async def settled(self) -> None:
        """Whatever was to come of an answer has."""
        task = self.watch._task
        assert task is not None
        await asyncio.wait({task})


@pytest.fixture
def heard() -> Heard:
    return Heard()


async def test_what_is_there_at_first_is_no_event(heard: Heard) -> None:
    """What happens while it is asked for is, after that."""
    beginning = asyncio.create_task(heard.watch.begin())
    answer = await heard.asked()
    heard.watch.take(Changed("/vm/1", {"state": "suspended"}))
    assert heard.events == []
    answer.set_result([_vm()])
    await beginning
    assert heard.events == [Changed("/vm/1", {"state": "suspended"})]
    await heard.answer(_vm("suspended"))
    assert heard.events[1:] == [UP]


async def test_a_service_that_is_not_there_yet(heard: Heard) -> None:
    """Everything that it has when it comes is new."""
    beginning = asyncio.create_task(heard.watch.begin())
    (await heard.asked()).set_exception(ServiceGone("x.ServiceUnknown", ""))
    await beginning
    await heard.answer(_vm())
    assert heard.events == [UP, Added("/vm/1", _vm())]


async def test_a_death_is_told_once(heard: Heard) -> None:
    """Whether it was seen or heard of first; and again only for another VM with that path."""
    died = Died("/vm/1", 1, Death("crash", 1))
    await heard.began(_vm())
    await heard.answer(_vm("dead", death_reason="crash", exit_status=1))
    heard.watch.take(died)
    assert heard.events[2:] == [died]
    heard.watch.take(Removed("/vm/1"))
    heard.watch.take(Added("/vm/1", _vm()))
    heard.watch.take(died)
    assert heard.events[-1] == died


async def test_a_service_that_goes_while_it_is_asked(heard: Heard) -> None:
    """What it told is passed on, and the next one is asked anew."""
    died = Died("/vm/1", 1, Death("crash", 1))
    await heard.began(_vm(), _vm(number=2))
    heard.watch.take(UP)
    answer = await heard.asked()
    for event in (died, DOWN, UP):
        heard.watch.take(event)
    answer.set_exception(ServiceGone("x.NoReply", ""))
    (await heard.asked()).set_result([_vm("dead", death_reason="crash", exit_status=1)])
    await heard.settled()
    changes = {"state": "dead", "death_reason": "crash", "exit_status": 1}
    assert heard.events == [UP, died, DOWN, UP, Changed("/vm/1", changes), Removed("/vm/2")]


async def test_a_service_that_does_not_answer(heard: Heard) -> None:
    """Whoever listens is told that something may be missing."""
    await heard.began(_vm())
    heard.watch.take(UP)
    (await heard.asked()).set_exception(TimeoutError("no answer"))
    await heard.settled()
    assert [type(error) for error in heard.failed] == [EventsLost]


async def test_a_watch_that_ends_asks_no_more(heard: Heard) -> None:
    """The question that is under way is given up."""
    await heard.began()
    heard.watch.take(UP)
    answer = await heard.asked()
    await heard.watch.aclose()
    assert answer.cancelled()
