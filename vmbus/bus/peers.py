"""Who calls: credentials as the bus vouches for them, and whether they are still there."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Any

from ..errors import AccessDenied, VMBusError
from ..model.identity import Requester
from .connection import BUS_NAME, Connection, RemoteError
from .wire import Message

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 4096
_LEAVING = f"type='signal',sender='{BUS_NAME}',member='NameOwnerChanged',arg2=''"


class Peers:
    """The credentials of every caller. A unique name is never given twice, so they stay true."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: OrderedDict[str, Requester] = OrderedDict()
        self._waiting: dict[str, list[asyncio.Future[Requester]]] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._leaving: dict[str, asyncio.Future[None]] = {}

    async def watch(self) -> None:
        """Begin to hear of connections that leave the bus."""
        await self._connection.call_bus("AddMatch", "s", [_LEAVING])

    def gone(self, sender: str) -> asyncio.Future[None]:
        """Resolved when a caller leaves the bus. To be asked for while its call is being taken."""
        leaving = self._leaving.get(sender)
        if leaving is None:
            leaving = self._leaving[sender] = asyncio.get_running_loop().create_future()
        return leaving

    async def leaves(self, name: str) -> asyncio.Future[None]:
        """As `gone`, for a connection that may have left before we came."""
        gone = self.gone(name)
        there = name and (await self._connection.call_bus("NameHasOwner", "s", [name]))[0]
        if not there and not gone.done():
            gone.set_result(None)
            del self._leaving[name]
        return gone

    def on_signal(self, message: Message) -> None:
        """Take a signal of the bus."""
        if message.sender != BUS_NAME or message.member != "NameOwnerChanged":
            return
        name, _, owner = message.body
        if owner:
            return
        self._known.pop(name, None)
        leaving = self._leaving.pop(name, None)
        if leaving is not None and not leaving.done():
            leaving.set_result(None)

    def known(self, sender: str) -> Requester | None:
        """Who it is, if that was asked before."""
        return self._known.get(sender)

    async def identify(self, sender: str) -> Requester:
        """Who it is. Callers of one sender are answered in their order. Raises AccessDenied."""
        known = self._known.get(sender)
        if known is not None:
            return known
        answer: asyncio.Future[Requester] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(sender, [])
        waiting.append(answer)
        if len(waiting) == 1:
            task = asyncio.create_task(self._ask(sender), name=f"credentials-{sender}")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return await answer

    async def _ask(self, sender: str) -> None:
        """Ask the bus, and tell all who wait, at once: nobody who comes later may go before."""
        found: Requester | VMBusError
        try:
            found = await self._credentials(sender)
            self._remember(sender, found)
        except VMBusError as error:
            found = error
        except Exception:
            log.exception("the credentials of %s could not be had", sender)
            found = _unknown()
        for answer in self._waiting.pop(sender):
            if answer.done():
                continue
            if isinstance(found, Requester):
                answer.set_result(found)
            else:
                answer.set_exception(found)

    async def _credentials(self, sender: str) -> Requester:
        try:
            (found,) = await self._connection.call_bus("GetConnectionCredentials", "s", [sender])
        except (RemoteError, OSError) as error:
            raise _unknown() from error
        return _requester(sender, {key: variant.value for key, variant in found.items()})

    def _remember(self, sender: str, requester: Requester) -> None:
        self._known[sender] = requester
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)


def _unknown() -> AccessDenied:
    return AccessDenied("the bus does not say who you are")


def _requester(sender: str, found: dict[str, Any]) -> Requester:
    if "UnixUserID" not in found:
        raise AccessDenied("the bus does not say which user you are")
    label = bytes(found.get("LinuxSecurityLabel", b"")).partition(b"\0")[0]
    return Requester(
        uid=int(found["UnixUserID"]),
        pid=int(found.get("ProcessID", 0)),
        # Labels that are no text stay different from each other.
        sid=label.decode("utf-8", "backslashreplace"),
        connection=sender,
    )
