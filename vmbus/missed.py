"""What a client knows of all VMs, so that it can tell what it missed while there was no service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

from .calls import ServiceGone
from .events import (
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

_ALIVE = ("starting", "running", "suspended", "stopping")


class Watch:
    """Passes events on, each death once, and after a gap the events that were missed.

    fetch: tells of all VMs. emit: takes what is passed on. fail: is told when that is all there is.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[list[Snapshot]]],
        emit: Callable[[Event], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self._fetch = fetch
        self._emit = emit
        self._fail = fail
        self._known: dict[str, Snapshot] = {}
        #: VMs whose death was told; after a crash the service may tell it again.
        self._told: set[str] = set()
        #: Events that wait until it is known what went before them.
        self._held: list[Event] | None = None
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Learn what there is; nothing of that is an event. Raises what `fetch` does."""
        self._held = []
        past: set[str] = set()
        try:
            self._known = {vm.path: vm for vm in await self._fetch()}
            past = {path for path, vm in self._known.items() if vm.death_reason}
        except ServiceGone:
            self._known = {}
        finally:
            self._release()
        # After what was told meanwhile; the service may tell theirs again, too.
        self._told |= past

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def past_deaths(self, paths: Iterable[str]) -> list[Died]:
        """The deaths of those VMs that have died and are still there, in their order."""
        dead = (self._known[path] for path in paths if path in self._known and path in self._told)
        return [_death_of(vm) for vm in sorted(dead, key=lambda vm: vm.died_timestamp)]

    def take(self, event: Event) -> None:
        """Take an event as the bus told it."""
        if self._held is None:
            self._pass_on(event)
        else:
            self._held.append(event)

    def _pass_on(self, event: Event) -> None:
        match event:
            case Added(path, vm):
                self._known[path] = vm
            case Changed(path, values) if path in self._known:
                self._known[path] = replace(self._known[path], **values)
            case Died(path):
                if path in self._told:
                    return
                self._told.add(path)
                event = replace(event, vm=self._known.get(path))
            case Removed(path):
                self._known.pop(path, None)
                self._told.discard(path)
        self._emit(event)
        if event == ServiceChanged(running=True):
            self._held = []
            self._task = asyncio.create_task(self._catch_up(), name="catch-up")

    async def _catch_up(self) -> None:
        """Ask the service that has just come what there is, and tell how that came about."""
        try:
            found = await self._fetch()
        except ServiceGone:
            self._release()
        except Exception as error:
            self._fail(EventsLost(f"the service was started anew, but does not say more: {error}"))
            self._release()
        else:
            held = self._held or []
            if not any(isinstance(event, ServiceChanged) for event in held):
                self._held = list(missed(self._known, found, held))
            self._release()

    def _release(self) -> None:
        held, self._held = self._held or [], None
        for event in held:
            self.take(event)


def missed(
    known: Mapping[str, Snapshot], found: Sequence[Snapshot], held: Sequence[Event]
) -> Iterator[Event]:
    """What leads from VMs as they were known to how they are now, each VM's changes as one.

    found: what the service said there is. held: the events that came before and after it said so.
    """
    now = {vm.path: vm for vm in found}
    deaths: dict[str, Died] = {}
    gone = set()
    for event in held:
        match event:
            case Added(path, vm):
                now.setdefault(path, vm)
            case Changed(path, values) if path in now:
                # Older than what was found or newer: the last one of each value is right.
                now[path] = replace(now[path], **values)
            case Died(path):
                deaths.setdefault(path, event)
            case Removed(path):
                gone.add(path)
    for path in sorted({*known, *now, *deaths}, key=lambda path: (len(path), path)):
        yield from _missed(known.get(path), now.get(path), deaths.get(path), gone=path in gone)


def _missed(
    before: Snapshot | None, now: Snapshot | None, death: Died | None, *, gone: bool
) -> Iterator[Event]:
    if before and now and before.created_timestamp != now.created_timestamp:
        # The ids of another host, or of a service with another directory, begin anew.
        yield Removed(before.path)
        before = None
    if now and not before:
        yield Added(now.path, now)
    elif now and before and (values := _differences(before, now)):
        yield Changed(now.path, values)
    if now and before and before.state in _ALIVE and now.death_reason:
        death = death or _death_of(now)
    if death:
        yield death
    present = now or before
    if present and (gone or not now):
        yield Removed(present.path)


def _death_of(vm: Snapshot) -> Died:
    return Died(vm.path, vm.cid, Death(vm.death_reason, vm.exit_status), vm)


def _differences(before: Snapshot, now: Snapshot) -> dict[str, object]:
    # Memory is told without its value, so that there is nothing to compare it with.
    names = {field.name for field in fields(Snapshot)} - {"memory_actual"}
    values = {name: getattr(now, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(before, name)}
