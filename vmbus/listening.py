"""What a client's connection hears: who the service is, and what happens to VMs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from .bus import connection as bus_connection
from .bus.connection import Connection, RemoteError
from .bus.contract import BUS_NAME, ROOT_PATH, VIRTUAL_MACHINE
from .bus.wire import Flag, Kind, Message
from .calls import close_all, refusal
from .errors import VMBusError
from .events import (
    MAX_EVENTS,
    Death,
    Died,
    Event,
    Events,
    Removed,
    ServiceChanged,
    Snapshot,
    event_of,
)
from .missed import Watch

_OWNERS = (
    f"type='signal',sender='{bus_connection.BUS_NAME}',member='NameOwnerChanged',arg0='{BUS_NAME}'"
)
_SIGNALS = f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT_PATH}'"
_DEATH = f"type='signal',sender='{BUS_NAME}',interface='{VIRTUAL_MACHINE}',member='Died',path="


class Listening:
    """The handler of a connection. fetch: tells of all VMs, and doesn't start the service."""

    def __init__(
        self, connection: Connection, fetch: Callable[[], Awaitable[list[Snapshot]]]
    ) -> None:
        self._connection = connection
        self._fetch = fetch
        self._owner: str | None = None
        self._owner_changed = asyncio.Event()
        self._events: set[Events] = set()
        self._watch: Watch | None = None
        self._beginning = asyncio.Lock()
        self._deaths: dict[str, set[asyncio.Future[Death]]] = {}
        #: The last VMs that were started here, and of whose death nobody here was told.
        self._untold: dict[str, None] = {}
        self._closing = False
        connection.handler = self._on_message
        connection.closed.add_done_callback(lambda _: self._on_close())

    async def begin(self) -> None:
        """Learn who the service is, and hear of it when that changes."""
        await self._connection.call_bus("AddMatch", "s", [_OWNERS])
        owner = ""
        with contextlib.suppress(RemoteError):
            (owner,) = await self._connection.call_bus("GetNameOwner", "s", [BUS_NAME])
        if self._owner is None:
            self._owner = owner

    async def aclose(self) -> None:
        self._closing = True
        if self._watch is not None:
            await self._watch.aclose()

    # The service

    @property
    def owner(self) -> str:
        """The connection that is the service; empty while there is none."""
        return self._owner or ""

    async def until_other_than(self, owner: str) -> None:
        """Wait until the service is another than this one. Raises ConnectionError."""
        while self.owner == owner:
            if self._connection.closed.done():
                raise ConnectionResetError("the connection to the bus is closed")
            await self._owner_changed.wait()

    # Listeners

    async def events(self, *, with_service: bool, kinds: tuple[type[Event], ...] = ()) -> Events:
        """A listener, which hears from now on."""
        events = Events(self._forget, with_service=with_service, kinds=kinds)
        await self._connection.call_bus("AddMatch", "s", [_SIGNALS])
        self._events.add(events)
        try:
            async with self._beginning:
                if self._watch is None:
                    await self._begin_watch()
        except BaseException:
            await self._forget(events)
            raise
        return events

    async def deaths(self, past: bool) -> Events:
        """A listener to deaths alone. past: it begins with those that nobody here was told of."""
        events = await self.events(with_service=False, kinds=(Died,))
        if past and self._watch is not None:
            for death in self._watch.past_deaths(self._untold):
                self.told(death.path)
                events.put(death)
        return events

    @contextlib.contextmanager
    def starting(self, path: str) -> Iterator[None]:
        """Start a VM within: its death is for those who listen, even if they come too late."""
        self._untold[path] = None
        if len(self._untold) > MAX_EVENTS:
            # Who never listens would gather them without end.
            del self._untold[next(iter(self._untold))]
        try:
            yield
        except VMBusError:
            self.told(path)
            raise

    def told(self, path: str) -> None:
        """Nobody needs to be told of that VM's death any more."""
        self._untold.pop(path, None)

    async def _begin_watch(self) -> None:
        self._watch = Watch(self._known_to_service, self._tell, self._end)
        try:
            await self._watch.begin()
        except BaseException:
            self._watch = None
            raise

    async def _known_to_service(self) -> list[Snapshot]:
        return await self._fetch() if self.owner else []

    async def _forget(self, events: Events) -> None:
        if events not in self._events:
            return
        self._events.discard(events)
        watch = None
        if not self._events:
            # What it knows is true only as long as it hears everything.
            watch, self._watch = self._watch, None
        with contextlib.suppress(RemoteError, OSError):
            await self._connection.call_bus("RemoveMatch", "s", [_SIGNALS])
        if watch is not None:
            await watch.aclose()

    @contextlib.asynccontextmanager
    async def death_of(self, path: str) -> AsyncIterator[asyncio.Future[Death]]:
        """Listen for one VM's death."""
        rule = f"{_DEATH}'{path}'"
        death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        waiting = self._deaths.setdefault(path, set())
        waiting.add(death)
        try:
            await self._connection.call_bus("AddMatch", "s", [rule])
            yield death
            self.told(path)
        finally:
            death.cancel()
            waiting.discard(death)
            if not waiting:
                self._deaths.pop(path, None)
            with contextlib.suppress(RemoteError, OSError):
                await self._connection.call_bus("RemoveMatch", "s", [rule])

    # What comes in

    def _on_message(self, message: Message) -> None:
        close_all(message.fds)
        if message.kind is Kind.SIGNAL:
            event = self._event(message)
            if event is not None:
                self._take(event)
        elif message.kind is Kind.CALL and not message.flags & Flag.NO_REPLY_EXPECTED:
            self._connection.send(refusal(message))

    def _event(self, message: Message) -> Event | None:
        if message.sender == bus_connection.BUS_NAME:
            if message.member != "NameOwnerChanged" or message.body[0] != BUS_NAME:
                return None
            self._owner = message.body[2]
            self._wake()
            return ServiceChanged(running=bool(self._owner))
        # Anybody may send us a signal; only the owner's are believed.
        return event_of(message) if message.sender == self._owner else None

    def _take(self, event: Event) -> None:
        if isinstance(event, Died):
            for death in self._deaths.get(event.path, ()):
                if not death.done():
                    death.set_result(event.death)
        if self._watch is not None:
            self._watch.take(event)

    def _wake(self) -> None:
        self._owner_changed.set()
        self._owner_changed = asyncio.Event()

    def _tell(self, event: Event) -> None:
        if isinstance(event, Died | Removed):
            self.told(event.path)
        for events in self._events:
            events.put(event)

    def _end(self, error: Exception | None) -> None:
        for events in self._events:
            events.end(error)

    def _on_close(self) -> None:
        self._wake()
        lost = ConnectionResetError("the connection to the bus is closed")
        self._end(None if self._closing else lost)
