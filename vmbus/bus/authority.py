"""Who may do what: on a session bus its user, on a system bus whoever polkit lets."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

from ..errors import (
    AccessDenied,
    InteractiveAuthorizationRequired,
    LimitExceeded,
    UnknownObject,
)
from ..model.identity import Requester
from ..model.machine import Machine
from .connection import Connection, RemoteError
from .peers import Peers
from .wire import Flag, Message, Variant, WireError

#: Seconds for polkit to decide where no user is asked; polkitd 122 stands still for 15 at times.
POLKIT_TIMEOUT = 25.0
POLKIT = "org.freedesktop.PolicyKit1"
POLKIT_PATH = "/org/freedesktop/PolicyKit1/Authority"
POLKIT_AUTHORITY = "org.freedesktop.PolicyKit1.Authority"
_CHECK = "(sa{sv})sa{ss}us"
_DECISION = "(bba{ss})"
_ALLOW_INTERACTION = 1
_TRANSLATIONS = "vmbus"


def _(text: str) -> str:
    """Mark a text for translators. polkit translates it, into the language of who is asked."""
    return text


#: Characters of an error of polkit's that callers are told.
_MAX_TEXT = 200
#: A system bus lets no connection wait for more than 128 answers. Whoever could take them all, by
#: calls in a flood or by dialogs that stand, would have everybody else denied.
_QUESTIONS, _QUESTIONS_PER_USER = 48, 8
_DIALOGS, _DIALOGS_PER_USER = 64, 8
_LEFT = "the caller has left the bus before polkit had decided"


class Access(enum.Enum):
    """What a method does, as far as permission is concerned."""

    READ = "read"
    CREATE = "create"
    MANAGE = "manage"


#: What the user is asked where no VM is named.
_UNNAMED = {
    Access.CREATE: _("Authentication is required to create a virtual machine."),
    Access.MANAGE: _("Authentication is required to end all virtual machines."),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller wants: a verb of a VM, or of a VM to be, by its name.

    interactive: the caller would have the user asked. gone: resolved when the caller leaves.
    """

    sender: str
    access: Access
    verb: str
    name: str
    vm: Machine | None
    interactive: bool
    gone: asyncio.Future[None]


class Authority(Protocol):
    """Who decides what a caller may do."""

    def may_read_at_once(self, sender: str) -> bool:
        """Whether this caller may read, as far as that can be told without asking anybody."""

    async def authorize(self, request: Request) -> Requester:
        """Return who the caller is, if the call is allowed.

        Raises AccessDenied or InteractiveAuthorizationRequired.
        """


class SameUser:
    """On a session bus: the service's own user may do everything, everyone else nothing."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def may_read_at_once(self, sender: str) -> bool:
        """See Authority.may_read_at_once."""
        known = self._peers.known(sender)
        return known is not None and known.uid == os.getuid()

    async def authorize(self, request: Request) -> Requester:
        """See Authority.authorize."""
        caller = await self._peers.identify(request.sender)
        if caller.uid != os.getuid():
            raise AccessDenied(f"only the user with uid {os.getuid()} may use this service")
        return caller


class Polkit:
    """On a system bus: all may read, and polkit decides the rest, with the recorded requester."""

    def __init__(self, connection: Connection, peers: Peers) -> None:
        self._connection = connection
        self._peers = peers
        self._numbers = itertools.count(1)
        self._questions = asyncio.Semaphore(_QUESTIONS)
        self._questions_of: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
        self._dialogs: Counter[int] = Counter()
        self._asking: set[asyncio.Task[tuple[bool, bool]]] = set()

    def may_read_at_once(self, sender: str) -> bool:
        """See Authority.may_read_at_once."""
        return True

    async def authorize(self, request: Request) -> Requester:
        """See Authority.authorize."""
        caller = await self._peers.identify(request.sender)
        if request.access is not Access.READ:
            await self._check(request, caller)
        return caller

    async def _check(self, request: Request, caller: Requester) -> None:
        action = action_for(request, caller)
        requester = caller if request.vm is None else request.vm.identity.requester
        details = {
            "verb": request.verb,
            "vm": request.name,
            "requester_uid": str(requester.uid),
            "requester_sid": requester.sid,
        }
        if not request.name:
            details["polkit.message"] = _UNNAMED[request.access]
            details["polkit.gettext_domain"] = _TRANSLATIONS
        place = await self._question(caller.uid)
        allowed, challenge = await self._ask(request, action, details, place, interactive=False)
        if challenge and request.interactive:
            place = self._dialog(caller.uid)
            allowed, _ = await self._ask(request, action, details, place, interactive=True)
        if allowed:
            return
        if challenge and not request.interactive:
            raise InteractiveAuthorizationRequired(
                f"{action} needs authentication, and the call did not allow to ask the user for it"
            )
        raise AccessDenied(f"polkit does not allow {action} for {request.verb!r}")

    async def _question(self, uid: int) -> contextlib.ExitStack:
        """A place among the questions under way, the user's own and all, to be given back."""
        mine = self._questions_of.setdefault(uid, asyncio.Semaphore(_QUESTIONS_PER_USER))
        with contextlib.ExitStack() as place:
            for semaphore in (mine, self._questions):
                await semaphore.acquire()
                place.callback(semaphore.release)
            return place.pop_all()

    def _dialog(self, uid: int) -> contextlib.ExitStack:
        """A place among the dialogs, to be given back. Raises LimitExceeded."""
        if self._dialogs[uid] >= _DIALOGS_PER_USER or self._dialogs.total() >= _DIALOGS:
            raise LimitExceeded("there are too many dialogs open; answer some of them first")
        self._dialogs[uid] += 1
        place = contextlib.ExitStack()
        place.callback(self._dialogs.subtract, [uid])
        return place

    async def _ask(
        self,
        request: Request,
        action: str,
        details: dict[str, str],
        place: contextlib.ExitStack,
        *,
        interactive: bool,
    ) -> tuple[bool, bool]:
        """Whether it is allowed, and whether the user could be asked. Raises AccessDenied.

        place: given back when polkit has answered, even where nobody waits for that any more: for
        the bus the question is under way until then.
        """
        if request.gone.done():
            # It waited for its place among many, maybe, and nothing is to be asked for it any more.
            place.close()
            raise AccessDenied(_LEFT)
        cancellation = f"vmbus-{next(self._numbers)}"
        question = [
            ["system-bus-name", {"name": Variant("s", request.sender)}],
            action,
            details,
            _ALLOW_INTERACTION if interactive else 0,
            cancellation,
        ]
        asking = asyncio.create_task(self._call(question, interactive=interactive))
        self._asking.add(asking)
        asking.add_done_callback(functools.partial(self._answered, place))
        whichever: list[asyncio.Future[Any]] = [asking, request.gone]
        if request.vm is not None:
            whichever.append(request.vm.forgotten)
        try:
            await asyncio.wait(whichever, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            if request.gone.done():
                raise AccessDenied(_LEFT)
            raise UnknownObject(f"the VM {request.name} was removed before polkit had decided")
        finally:
            if not asking.done():
                self._cancel(cancellation)

    def _answered(
        self, place: contextlib.ExitStack, asking: asyncio.Task[tuple[bool, bool]]
    ) -> None:
        self._asking.discard(asking)
        place.close()
        if not asking.cancelled():
            asking.exception()  # where nobody waits any more, nobody else looks at it

    async def _call(self, question: Sequence[Any], *, interactive: bool) -> tuple[bool, bool]:
        try:
            reply = await self._connection.call(
                POLKIT,
                POLKIT_PATH,
                POLKIT_AUTHORITY,
                "CheckAuthorization",
                _CHECK,
                question,
                # A user may take any time; a polkit that hangs then holds up this call alone.
                timeout=None if interactive else POLKIT_TIMEOUT,
            )
        except (RemoteError, OSError, WireError) as error:
            if isinstance(error, TimeoutError):
                self._cancel(question[-1])
            raise AccessDenied(f"polkit can't be asked: {_in_short(error)}") from error
        for fd in reply.fds:
            os.close(fd)
        if reply.signature != _DECISION:
            raise AccessDenied("polkit answers something that can't be understood")
        ((allowed, challenge, _),) = reply.body
        return allowed, challenge

    def _cancel(self, cancellation: str) -> None:
        """Tell polkit that nobody waits for this check any more."""
        self._connection.send(
            Message(
                destination=POLKIT,
                path=POLKIT_PATH,
                interface=POLKIT_AUTHORITY,
                member="CancelCheckAuthorization",
                signature="s",
                body=[cancellation],
                flags=Flag.NO_REPLY_EXPECTED,
            )
        )


def action_for(request: Request, caller: Requester) -> str:
    """The polkit action that decides a request."""
    if request.access is Access.CREATE:
        return "org.vmbus1.create"
    if request.vm is None:
        return "org.vmbus1.manage"
    owner = request.vm.identity.requester
    same_label = caller.sid == owner.sid or not (caller.sid and owner.sid)
    own = caller.uid == owner.uid and same_label
    return "org.vmbus1.manage-own" if own else "org.vmbus1.manage"


def _in_short(error: Exception) -> str:
    """The last line of its text, where those of more than one line say what is wrong."""
    return str(error).strip().rpartition("\n")[2][:_MAX_TEXT]
