"""Who calls: credentials as the bus vouches for them, and who may do what by them."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
from collections import OrderedDict
from typing import Any, Protocol

from ..errors import AccessDenied, VMBusError
from ..model.identity import Requester
from ..model.machine import Machine
from .connection import Connection, RemoteError

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 4096


class Access(enum.Enum):
    """What a method does, as far as permission is concerned."""

    READ = "read"
    CREATE = "create"
    MANAGE = "manage"


class Peers:
    """The credentials of every caller. A unique name is never given twice, so they stay true."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: OrderedDict[str, Requester] = OrderedDict()
        self._waiting: dict[str, list[asyncio.Future[Requester]]] = {}
        self._asking: set[asyncio.Task[None]] = set()

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
        return _requester({key: variant.value for key, variant in found.items()})

    def _remember(self, sender: str, requester: Requester) -> None:
        self._known[sender] = requester
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)


def _unknown() -> AccessDenied:
    return AccessDenied("the bus does not say who you are")


def _requester(found: dict[str, Any]) -> Requester:
    if "UnixUserID" not in found:
        raise AccessDenied("the bus does not say which user you are")
    label = bytes(found.get("LinuxSecurityLabel", b"")).rstrip(b"\0")
    return Requester(
        uid=int(found["UnixUserID"]),
        pid=int(found.get("ProcessID", 0)),
        sid=label.decode("utf-8", "replace"),
    )


class Authority(Protocol):
    """Who decides what a caller may do."""

    def may_read_at_once(self, sender: str) -> bool:
        """Whether this caller may read, as far as that can be told without asking anybody."""

    async def authorize(self, sender: str, access: Access, vm: Machine | None) -> Requester:
        """Return who the caller is, if the call is allowed. Raises AccessDenied."""


class SameUser:
    """On a session bus: the service's own user may do everything, everyone else nothing."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def may_read_at_once(self, sender: str) -> bool:
        """See Authority.may_read_at_once."""
        known = self._peers.known(sender)
        return known is not None and known.uid == os.getuid()

    async def authorize(self, sender: str, access: Access, vm: Machine | None) -> Requester:
        """See Authority.authorize."""
        caller = await self._peers.identify(sender)
        if caller.uid != os.getuid():
            raise AccessDenied(f"only the user with uid {os.getuid()} may use this service")
        return caller


class RootAndRequester:
    """On a system bus: all may read, root may create, root and its requester may manage a VM."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def may_read_at_once(self, sender: str) -> bool:
        """See Authority.may_read_at_once."""
        return True

    async def authorize(self, sender: str, access: Access, vm: Machine | None) -> Requester:
        """See Authority.authorize."""
        caller = await self._peers.identify(sender)
        if access is Access.READ or caller.uid == 0:
            return caller
        if vm is not None and vm.identity.requester.uid == caller.uid:
            return caller
        what = "create a VM" if vm is None else "do that with a VM that another user created"
        raise AccessDenied(f"only root may {what}")
