"""The one door in: every call is decoded, authorized, run and answered here, exactly once."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any

from ..errors import (
    InvalidArgs,
    LimitExceeded,
    UnknownInterface,
    UnknownMethod,
    UnknownObject,
    VMBusError,
)
from .connection import Connection
from .contract import PEER, MethodType, interfaces
from .methods import TABLE, Call, Descriptor, Marshalled, Method, Reply, Service
from .peers import Access, Authority
from .stream import MAX_FDS
from .wire import Flag, Kind, Message, WireError

log = logging.getLogger(__name__)

_MAX_ERROR_TEXT = 4000


class Gate:
    """The handler of a connection's calls."""

    def __init__(self, connection: Connection, service: Service, authority: Authority) -> None:
        self._connection = connection
        self._service = service
        self._authority = authority
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, message: Message) -> None:
        """Take one message. Reads are answered at once, the rest in a task of its own."""
        if message.kind is not Kind.CALL:
            _close(message.fds)
            return
        try:
            method, types, call = self._resolve(message)
            sender = message.sender or ""
            if method.access is Access.READ and self._authority.may_read_at_once(sender):
                result = method.run(call)
                if not inspect.isawaitable(result):
                    self._reply(message, types, result)
                    _close(message.fds)
                    return
                self._spawn(self._finish(message, types, result))
            else:
                self._spawn(self._finish(message, types, self._admit(sender, method, call)))
        except Exception as error:
            self._fail(message, error)
            _close(message.fds)

    async def aclose(self, timeout: float) -> None:
        """Let the calls under way be answered for `timeout` seconds, then end them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)
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
        call = Call(self._service, path, message.body, message.fds, vm)
        return TABLE[interface, member], types, call

    # Running it

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admit(self, sender: str, method: Method, call: Call) -> Reply:
        call.caller = await self._authority.authorize(sender, method.access, call.vm)
        if call.vm is not None and self._service.objects.vm(call.path) is not call.vm:
            raise UnknownObject(f"there is no object {call.path} any more")
        result = method.run(call)
        return await result if inspect.isawaitable(result) else result

    async def _finish(self, message: Message, types: MethodType, work: Awaitable[Reply]) -> None:
        try:
            self._reply(message, types, await work)
        except asyncio.CancelledError:
            self._fail(message, VMBusError("the service is shutting down"))
            raise
        except Exception as error:
            self._fail(message, error)
        finally:
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


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
