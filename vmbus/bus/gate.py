"""The one door in: every call is decoded, authorized, run and answered here, exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from ..errors import (
    ENDING,
    InvalidArgs,
    LimitExceeded,
    UnknownInterface,
    UnknownMethod,
    UnknownObject,
    VMBusError,
)
from ..model.limits import Kind as Share
from ..model.limits import Limits
from ..spec import NAME_PATTERN
from .authority import Access, Authority, Request
from .connection import Connection
from .contract import PEER, MethodType, interfaces
from .methods import TABLE, Call, Descriptor, Marshalled, Method, Reply, Service
from .peers import Peers
from .stream import MAX_FDS
from .wire import Flag, Kind, Message, WireError

log = logging.getLogger(__name__)

_MAX_ERROR_TEXT = 4000


class Gate:
    """The handler of a connection's calls."""

    def __init__(
        self,
        connection: Connection,
        service: Service,
        authority: Authority,
        peers: Peers,
        limits: Limits,
        on_signal: Callable[[Message], None] = lambda _: None,
    ) -> None:
        self._connection = connection
        self._service = service
        self._authority = authority
        self._peers = peers
        self._limits = limits
        self._on_signal = on_signal
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_sender: Counter[str] = Counter()
        #: Those of them whose user isn't known yet.
        self._strangers: set[asyncio.Task[None]] = set()
        self._closed = False
        self._turns: dict[tuple[str, str], asyncio.Future[None]] = {}

    def handle(self, message: Message) -> None:
        """Take one message. Reads are answered at once, the rest in a task of its own."""
        if message.kind is not Kind.CALL:
            self._peers.on_signal(message)
            self._on_signal(message)
            _close(message.fds)
            return
        try:
            if self._closed:
                raise VMBusError(ENDING)
            method, types, call = self._resolve(message)
            sender = message.sender or ""
            if method.access is not Access.CREATE:
                # Only Create takes any; the rest may be under way for long.
                _close(message.fds)
                message.fds = call.fds = ()
            at_once = method.access is Access.READ and not method.lasts
            if at_once and self._authority.may_read_at_once(sender):
                result = method.run(call)
                if not isinstance(result, Coroutine):
                    self._reply(message, types, result)
                    return
                work = result
            else:
                work = self._admit(message, method, call)
            self._spawn(message, types, work)
        except Exception as error:
            self._fail(message, error)
            _close(message.fds)

    @property
    def busy(self) -> bool:
        """Whether calls are under way."""
        return bool(self._tasks)

    async def aclose(self) -> None:
        """Answer what is under way, and what still comes, with an error.

        What was begun on a VM goes on, under the next service if need be.
        """
        self._closed = True
        # One that has only just come must begin first, or nobody would answer it.
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # Which method, on which object

    def _resolve(self, message: Message) -> tuple[Method, MethodType, Call]:
        path, member = message.path or "", message.member or ""
        present = self._service.objects.interfaces_at(path)
        if present is None:
            if message.interface != PEER:
                raise UnknownObject(f"there is no object {path[:255]}")
            present = (PEER,)
        interface = _interface_of(message, present)
        types = interfaces()[interface].methods.get(member)
        if types is None:
            raise UnknownMethod(f"{interface} has no method {member[:255]}")
        if message.signature != types.takes:
            raise InvalidArgs(
                f"{member} takes arguments of type '{types.takes}', not '{message.signature}'"
            )
        if len(message.fds) > MAX_FDS:
            raise LimitExceeded(f"a call can carry at most {MAX_FDS} file descriptors")
        vm = self._service.objects.vm(path)
        sender = message.sender or ""
        gone = self._peers.gone(sender)
        call = Call(self._service, path, message.body, message.fds, gone, vm)
        return TABLE[interface, member], types, call

    # Running it

    def _spawn(
        self,
        message: Message,
        types: MethodType,
        work: Coroutine[Any, Any, Reply],
    ) -> None:
        """Run a call in a task of its own. Raises LimitExceeded.

        What is under way is bounded here by connection, and by user as soon as that is known.
        """
        sender = message.sender or ""
        limit = self._service.settings.limits.calls
        stranger = self._peers.known(sender) is None
        too_many = stranger and len(self._strangers) >= limit.in_all
        if too_many or self._by_sender[sender] >= limit.per_user:
            work.close()
            raise LimitExceeded("there are too many calls under way; wait for some to be answered")
        self._by_sender[sender] += 1
        task = asyncio.create_task(self._finish(message, types, work))
        self._tasks.add(task)
        if stranger:
            self._strangers.add(task)
        task.add_done_callback(functools.partial(self._ended, sender))

    def _ended(self, sender: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._strangers.discard(task)
        self._by_sender[sender] -= 1
        if not self._by_sender[sender]:
            del self._by_sender[sender]

    @contextlib.asynccontextmanager
    async def _on_account_of(self, sender: str) -> AsyncIterator[None]:
        """A call is under way on its user's account. Raises AccessDenied or LimitExceeded."""
        caller = await self._peers.identify(sender)
        self._strangers.discard(_this_task())
        lease = self._limits.take(Share.CALLS, caller.uid)
        try:
            yield
        finally:
            lease.release()

    async def _admit(self, message: Message, method: Method, call: Call) -> Reply:
        """Have a call authorized, then run it, in its turn among its sender's on that object."""
        before, mine = self._turn(message)
        try:
            call.caller = await self._authority.authorize(self._request(message, method, call))
            if before is not None:
                await asyncio.wait({before})
            if call.vm is not None and self._service.objects.vm(call.path) is not call.vm:
                raise UnknownObject(f"there is no object {call.path} any more")
            result = method.run(call)
            # Who comes next goes on when this has done what it does at once.
            mine.set_result(None)
            return await result if isinstance(result, Coroutine) else result
        finally:
            if not mine.done():
                mine.set_result(None)

    def _turn(self, message: Message) -> tuple[asyncio.Future[None] | None, asyncio.Future[None]]:
        """The call to wait for, and the one that others wait for.

        Calls may be authorized in another order than they came. One for which the user may be asked
        can take for ever, and so nobody waits for it.
        """
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key = (message.sender or "", message.path or "")
        before = self._turns.get(key)
        if not message.flags & Flag.ALLOW_INTERACTIVE_AUTHORIZATION:
            self._turns[key] = mine
            mine.add_done_callback(functools.partial(self._turn_over, key))
        return before, mine

    def _turn_over(self, key: tuple[str, str], turn: asyncio.Future[None]) -> None:
        if self._turns.get(key) is turn:
            del self._turns[key]

    def _request(self, message: Message, method: Method, call: Call) -> Request:
        return Request(
            sender=message.sender or "",
            access=method.access,
            verb=(message.member or "").lower(),
            name=_name_of(call),
            vm=call.vm,
            interactive=bool(message.flags & Flag.ALLOW_INTERACTIVE_AUTHORIZATION),
            gone=call.gone,
        )

    async def _finish(
        self, message: Message, types: MethodType, work: Coroutine[Any, Any, Reply]
    ) -> None:
        try:
            # Counted before anybody is asked, or those who let dialogs stand would shut others out.
            async with self._on_account_of(message.sender or ""):
                result = await work
            self._reply(message, types, result)
        except asyncio.CancelledError:
            self._fail(message, VMBusError(ENDING))
            raise
        except Exception as error:
            self._fail(message, error)
        finally:
            work.close()
            _close(message.fds)

    # Answering

    def _reply(self, message: Message, types: MethodType, result: Reply) -> None:
        fd = result.fd if isinstance(result, Descriptor) else None
        if message.flags & Flag.NO_REPLY_EXPECTED:
            if fd is not None:
                os.close(fd)
            return
        answer = Message(
            kind=Kind.RETURN,
            destination=message.sender,
            reply_serial=message.serial,
            signature=types.gives,
        )
        if isinstance(result, Marshalled):
            answer.body = [{}]
            self._connection.send_with_body(answer, result.body)
        elif fd is not None:
            answer.body, answer.fds = [0], [fd]
            self._send_and_close(answer, fd)
        else:
            assert isinstance(result, tuple)
            answer.body = result
            self._connection.send(answer)

    def _send_and_close(self, answer: Message, fd: int) -> None:
        try:
            self._connection.send(answer, sent=lambda: os.close(fd))
        except WireError:
            os.close(fd)
            raise

    def _fail(self, message: Message, error: Exception) -> None:
        if isinstance(error, VMBusError):
            name, text = error.dbus_name, str(error)
        else:
            log.error("%s.%s failed", message.interface, message.member, exc_info=error)
            name, text = VMBusError.dbus_name, "internal error; the service's log says more"
        log.debug("%s: %s.%s: %s", message.sender, message.interface, message.member, text)
        if message.flags & Flag.NO_REPLY_EXPECTED:
            return
        self._connection.send(
            Message(
                kind=Kind.ERROR,
                destination=message.sender,
                reply_serial=message.serial,
                error_name=name,
                signature="s",
                body=[_clean(text)],
            )
        )


def _name_of(call: Call) -> str:
    """The VM's name for polkit's dialog; what a caller would call a VM only if it is a name."""
    if call.vm is not None:
        return call.vm.identity.name
    wanted = call.args[0].get("name") if call.args and isinstance(call.args[0], dict) else None
    name = getattr(wanted, "value", None)
    return name if isinstance(name, str) and re.match(NAME_PATTERN, name) else ""


def _interface_of(message: Message, present: Sequence[str]) -> str:
    """The interface meant; a call may leave it out, and then the first that has the method is."""
    if message.interface is not None:
        if message.interface in present:
            return message.interface
        raise UnknownInterface(f"{message.path} has no interface {message.interface[:255]}")
    for name in present:
        if message.member in interfaces()[name].methods:
            return name
    raise UnknownMethod(f"{message.path} has no method {message.member}")


def _clean(text: str) -> str:
    """Text that any bus carries, whatever a caller had put into it."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()[:_MAX_ERROR_TEXT]


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
