"""VMs outlive the service, and so do commands that are attached to one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from ..client import VM, RemoteError, VMBus
from ..errors import (
    InvalidArgs,
    InvalidState,
    NoSuchVM,
    UnknownInterface,
    UnknownObject,
    VMBusError,
)
from ..events import Event, Events, ServiceChanged
from .common import say
from .failures import is_away
from .text import clean

#: Seconds that a service may need to come back.
_PATIENCE = 60.0
#: How an object that isn't there any more answers.
GONE = (InvalidArgs, NoSuchVM, UnknownInterface, UnknownObject)
_T = TypeVar("_T")


class Comeback:
    """Whether the service has come back. Somebody has to tell it by `heard`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._changes = 0
        self._changed = asyncio.Event()
        self._away = False

    def heard(self, event: Event) -> None:
        """Take notice of an event."""
        if isinstance(event, ServiceChanged):
            self._changes += 1
            self._changed.set()

    async def listen(self, events: Events) -> None:
        """Hear all events."""
        async for event in events:
            self.heard(event)

    async def insist(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Ask, as often as the service goes away meanwhile. Raises what the answer is then."""
        while True:
            changes = self._changes
            try:
                answer = await ask()
            except (RemoteError, VMBusError) as error:
                if not is_away(error):
                    raise
                await self._until_changed(changes, error)
            else:
                self._is_there()
                return answer

    async def _until_changed(self, changes: int, error: Exception) -> None:
        if not self._away:
            self._away = True
            self._say("the service went away; waiting for it to come back")
        try:
            async with asyncio.timeout(_PATIENCE):
                while self._changes == changes:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise error from None

    def _is_there(self) -> None:
        if self._away:
            self._away = False
            self._say("the service is back; its log has what was printed meanwhile")

    def _say(self, text: str) -> None:
        # The terminal may be raw now, where a line doesn't begin at the left by itself.
        line = f"vmbusctl: {clean(self.name)}: {text}"
        say(f"\r\n{line}\r" if os.isatty(2) else line)


@contextlib.asynccontextmanager
async def comeback(bus: VMBus, name: str) -> AsyncIterator[Comeback]:
    """A Comeback that hears of the service by itself. name: the VM's, for people."""
    made = Comeback(name)
    async with await bus.events() as events:
        listening = asyncio.create_task(made.listen(events))
        try:
            yield made
        finally:
            listening.cancel()
            await asyncio.wait({listening})


async def console_again(vm: VM, service: Comeback) -> socket.socket | None:
    """The console of a VM whose stream has ended; None if the VM has, too."""

    async def ask() -> socket.socket | None:
        # Everybody may ask that, and nobody wants a dialog about a VM that is dead.
        if (await vm.properties()).died_timestamp:
            return None
        return await vm.open_console()

    try:
        return await service.insist(ask)
    except (InvalidState, *GONE):
        return None
