"""What a client is told of VMs, as typed values: snapshots, events, and the stream of events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from .bus.contract import OBJECT_MANAGER, PROPERTIES, VIRTUAL_MACHINE, interfaces
from .bus.wire import Message, Variant

#: Events that may wait for a reader.
MAX_EVENTS = 4096


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The properties of a VM at one moment. Timestamps are microseconds since the epoch."""

    path: str
    id: int = 0
    name: str = ""
    cid: int = 0
    vmm: str = ""
    protected: bool = False
    memory_mib: int = 0
    cpus: int = 0
    state: str = ""
    payload_state: str = ""
    payload_exit_status: int = -1
    status_text: str = ""
    requester_uid: int = 0
    requester_sid: str = ""
    requester_pid: int = 0
    pid: int = 0
    created_timestamp: int = 0
    started_timestamp: int = 0
    died_timestamp: int = 0
    death_reason: str = ""
    exit_status: int = 0
    last_words: str = ""
    #: What was last known; `VM.memory_actual` asks.
    memory_actual: int = 0


# The contract's names in Python's manner, "MemoryMiB" as "memory_mib", without a second list.
_FIELDS = {each.name.replace("_", ""): each.name for each in fields(Snapshot)}


@dataclass(frozen=True, slots=True)
class About:
    """What the service says of itself. available_vmms: empty until it has found out."""

    version: str
    available_vmms: tuple[str, ...]
    vm_count: int


@dataclass(frozen=True, slots=True)
class Death:
    """Why a VM died, a value of `vmbus.reasons.Reason`, and how its VMM ended."""

    reason: str
    status: int


@dataclass(frozen=True, slots=True)
class Added:
    """A VM was created."""

    path: str
    vm: Snapshot


@dataclass(frozen=True, slots=True)
class Changed:
    """Properties of a VM have new values, under the names that `Snapshot` has for them.

    invalidated: those that have changed too, and must be asked for.
    """

    path: str
    values: Mapping[str, Any]
    invalidated: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Died:
    """A VM died. vm: what was last known of it, where anything was."""

    path: str
    cid: int
    death: Death
    vm: Snapshot | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The VM's name, or else its id."""
        return self.vm.name if self.vm is not None else self.path.rpartition("/")[2]

    @property
    def reason(self) -> str:
        """Why it died, a value of `vmbus.reasons.Reason`."""
        return self.death.reason

    @property
    def status(self) -> int:
        """How its VMM ended: the exit code, or minus the signal."""
        return self.death.status


@dataclass(frozen=True, slots=True)
class Removed:
    """A VM exists no more."""

    path: str


@dataclass(frozen=True, slots=True)
class ServiceChanged:
    """The service has appeared on the bus, or vanished from it; its VMs live on without it.

    When it has appeared, what was missed follows: each VM's changes as one, deaths, VMs that came
    and went.
    """

    running: bool


Event = Added | Changed | Died | Removed | ServiceChanged


class EventsLost(Exception):
    """Events were lost; what VMs are like now must be asked for anew."""


class Events:
    """Events in their order, for `async for`; made by `VMBus.events`, ended by `aclose`.

    They go on when the service is started anew, unless asked to end with it. With a connection that
    is lost they end in ConnectionError. A reader that falls `MAX_EVENTS` behind gets those, then
    EventsLost.
    """

    def __init__(
        self,
        forget: Callable[[Events], Awaitable[None]],
        *,
        with_service: bool = False,
        kinds: tuple[type[Event], ...] = (),
    ) -> None:
        self._forget = forget
        self._with_service = with_service
        self._kinds = kinds
        self._queue: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Listen no more."""
        self.end()
        await self._forget(self)

    def put(self, event: Event) -> None:
        """Queue an event for the reader."""
        if self._ended or (self._kinds and not isinstance(event, self._kinds)):
            return
        if len(self._queue) >= MAX_EVENTS:
            self.end(EventsLost(f"more than {MAX_EVENTS} events were waiting to be read"))
            return
        self._queue.append(event)
        self._wake.set()
        if self._with_service and event == ServiceChanged(running=False):
            self.end()

    def end(self, error: Exception | None = None) -> None:
        """Let the reader come to an end after what is queued."""
        if not self._ended:
            self._ended, self._error = True, error
            self._wake.set()


class Deaths:
    """Deaths of VMs in their order, for `async for`; made by `VMBus.deaths`.

    Listening begins with `async with`, or else with the first step of the loop, and ends with it.
    Such a loop begins with VMs that were started by this connection and have died by then, unless
    they are removed, or their death was told before. See Events for what becomes of it when the
    service or the bus goes.
    """

    def __init__(self, listen: Callable[[bool], Awaitable[Events]]) -> None:
        self._listen = listen
        self._events: Events | None = None

    async def __aenter__(self) -> Self:
        self._events = await self._listen(False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._events is not None:
            await self._events.aclose()

    async def __aiter__(self) -> AsyncGenerator[Died, None]:
        events = self._events or await self._listen(True)
        try:
            async for event in events:
                if isinstance(event, Died):
                    yield event
        finally:
            if events is not self._events:
                await events.aclose()


def snapshot(path: str, properties: Mapping[str, Any]) -> Snapshot:
    """A VM's properties as the bus has them, without those that are not known here."""
    return Snapshot(path, **_values(properties))


def event_of(message: Message) -> Event | None:
    """The event that a signal of the service stands for, if it is one of those that matter."""
    declared = interfaces().get(message.interface or "")
    if declared is None or declared.signals.get(message.member or "") != message.signature:
        return None
    return _parse((declared.name, message.member), message.path or "", message.body)


def _parse(signal: tuple[str, str | None], path: str, body: Sequence[Any]) -> Event | None:
    if signal == (VIRTUAL_MACHINE, "Died"):
        cid, reason, status = body
        return Died(path, cid, Death(reason, status))
    if signal == (PROPERTIES, "PropertiesChanged") and body[0] == VIRTUAL_MACHINE:
        _, changed, invalidated = body
        return Changed(path, _values(changed), frozenset(_values(dict.fromkeys(invalidated))))
    if signal == (OBJECT_MANAGER, "InterfacesAdded") and VIRTUAL_MACHINE in body[1]:
        return Added(body[0], snapshot(body[0], body[1][VIRTUAL_MACHINE]))
    if signal == (OBJECT_MANAGER, "InterfacesRemoved") and VIRTUAL_MACHINE in body[1]:
        return Removed(body[0])
    return None


def _values(properties: Mapping[str, Any]) -> dict[str, Any]:
    known = ((_FIELDS.get(name.lower()), value) for name, value in properties.items())
    return {name: _plain(value) for name, value in known if name is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
