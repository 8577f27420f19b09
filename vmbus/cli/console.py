"""A guest's console at a terminal or in a pipe: the command, and what run has of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from . import terminal
from .comeback import comeback, console_again
from .common import Options, command, connect, find, name_argument, say
from .terminal import Screen, in_foreground, raw, takes_keys
from .text import clean

_ESCAPE = b"\x1d"
_CHUNK = 64 * 1024


class Joint:
    """stdin and stdout, joined to a console; `stream` is closed with it.

    again: gives another stream when one has ended, or None when there won't be any more.
    """

    def __init__(
        self, stream: socket.socket, again: Callable[[], Awaitable[socket.socket | None]]
    ) -> None:
        self._again = again
        self._stream: socket.socket | None = None
        self._streams = contextlib.ExitStack()
        self._there = asyncio.Event()
        self._screen = Screen()
        self._take(stream)

    async def attend(self, begin: asyncio.Event) -> bool:
        """Copy the console to stdout until it ends, and from `begin` on stdin to the console.

        Returns whether the user left it by the escape key.
        """
        output = asyncio.create_task(self._copy_out())
        typing = asyncio.create_task(self._copy_in(begin))
        try:
            await asyncio.wait({output, typing}, return_when=asyncio.FIRST_COMPLETED)
            if typing.done() and typing.result():
                return True
            await output
            return False
        finally:
            for task in (output, typing):
                task.cancel()
            await asyncio.wait({output, typing})
            self._streams.close()
            with contextlib.suppress(OSError):
                await self._screen.leave()

    def _take(self, stream: socket.socket | None) -> None:
        self._stream = stream
        if stream is not None:
            # Those that have ended stay open until the end: somebody may be writing to one.
            self._streams.enter_context(stream)
            stream.setblocking(False)
            self._there.set()

    async def _copy_out(self) -> None:
        loop = asyncio.get_running_loop()
        while self._stream is not None:
            # A console that closes with our typing still unread says so by a reset.
            with contextlib.suppress(ConnectionResetError):
                while data := await loop.sock_recv(self._stream, _CHUNK):
                    await self._screen.show(data)
            self._there.clear()
            self._take(await self._again())

    async def _copy_in(self, begin: asyncio.Event) -> bool:
        """Copy stdin until its end or the escape key; whether it was the key."""
        await begin.wait()
        keys = takes_keys()
        if keys and not in_foreground():
            return False
        with raw() if keys else contextlib.nullcontext():
            while data := await self._read(keys):
                typed, escape, _ = data.partition(_ESCAPE) if keys else (data, b"", b"")
                await self._type(typed)
                if escape:
                    return True
        return False

    async def _read(self, keys: bool) -> bytes:
        if not keys:
            # Keys are heard at any time, for one of them leaves; a pipe keeps what it has.
            await self._there.wait()
        return await terminal.read()

    async def _type(self, typed: bytes) -> None:
        if self._stream is not None and self._there.is_set():
            try:
                await asyncio.get_running_loop().sock_sendall(self._stream, typed)
            except ConnectionError:
                self._there.clear()


@command()
@name_argument
async def console(options: Options, name: str) -> None:
    """Join the console of a VM. At a terminal ^] leaves it.

    When the service is restarted meanwhile, the console is joined again.
    """
    async with connect(options) as bus, comeback(bus, name) as service:
        vm = await find(bus, name)
        joint = Joint(await vm.open_console(), lambda: console_again(vm, service))
        if takes_keys():
            say(f"vmbusctl: {clean(name)}: the console; ^] leaves it")
        begin = asyncio.Event()
        begin.set()
        left = await joint.attend(begin)
    if takes_keys():
        say(f"vmbusctl: {clean(name)}: {'left' if left else 'ended'}")


COMMANDS = (console,)
