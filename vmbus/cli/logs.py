"""The command logs: what a console has printed, and prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket

import click

from ..client import VM
from ..errors import InvalidState
from .comeback import GONE, Comeback, comeback, console_again
from .common import Options, command, connect, find, name_argument, say
from .tame import AsIs, Lines, Printer, Tame
from .terminal import STDOUT, write
from .text import clean

_CHUNK = 64 * 1024
#: By how much of its end, in bytes, that which was shown is found again in a log.
_KNOWN = 4096
#: How often to look for a moment in which the guest prints nothing.
_TRIES = 100


@command()
@name_argument
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="Only the last N.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is printed, until it ends.")
async def logs(options: Options, name: str, lines: int | None, follow: bool) -> None:
    """Print what a VM's console has printed.

    Also after its death. At a terminal colours are shown, and whatever else would steer it is
    written out. Otherwise it is printed byte by byte as the guest did, or with --json as a document
    for every line.
    """
    printer = Lines() if options.json else Tame() if os.isatty(STDOUT) else AsIs()
    async with connect(options) as bus, comeback(bus, name) as service:
        vm = await find(bus, name)
        if follow:
            await _Follower(vm, service, printer).follow(lines)
        else:
            await write(printer.feed(_last(await _log(vm), lines)))
    await write(printer.end())


async def _log(vm: VM) -> bytes:
    with await vm.open_log() as log:
        return log.read()


def _last(data: bytes, lines: int | None) -> bytes:
    """The last lines; None: all of them."""
    if lines is None:
        return data
    at = len(data) - data.endswith(b"\n")
    for _ in range(lines):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return data
    return data[at + 1 :] if lines else b""


class _Follower:
    """Shows a log and what comes after it, whatever becomes of the service."""

    def __init__(self, vm: VM, service: Comeback, printer: Printer) -> None:
        self._vm = vm
        self._service = service
        self._printer = printer
        self._known = b""

    async def follow(self, lines: int | None) -> None:
        """Show the last lines, then all that comes, until the VM has ended."""
        with contextlib.ExitStack() as streams:
            stream: socket.socket | None = None
            with contextlib.suppress(InvalidState):
                stream = streams.enter_context(await self._vm.open_console())
            log = await self._until_joined(stream)
            self._known = log[-_KNOWN:]
            await write(self._printer.feed(_last(log, lines)))
            while stream is not None:
                await self._show_all(stream)
                stream = await console_again(self._vm, self._service)
                if stream is not None:
                    streams.enter_context(stream)
                # A VM that is dead may be collected, and its log with it.
                with contextlib.suppress(*GONE):
                    await self._show_after(await self._until_joined(stream))

    async def _until_joined(self, stream: socket.socket | None) -> bytes:
        """The log up to the very byte with which the stream goes on.

        What was printed before the log was asked for is in the stream when it comes: so if there is
        nothing in the stream then, nothing was printed that isn't in the log.
        """
        if stream is None:
            return await self._service.insist(lambda: _log(self._vm))
        stream.setblocking(False)
        # We have nothing to say.
        stream.shutdown(socket.SHUT_WR)
        log = b""
        for _ in range(_TRIES):
            ended = _drain(stream)
            log = await self._service.insist(lambda: _log(self._vm))
            if ended or not select.select([stream], [], [], 0)[0]:
                return log
        self._say("the guest never pauses; what comes now may have come before")
        return log

    async def _show_all(self, stream: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError):
            while data := await asyncio.get_running_loop().sock_recv(stream, _CHUNK):
                await self._show(data)

    async def _show_after(self, log: bytes) -> None:
        """Show what the log has after that which was shown before."""
        at = log.rfind(self._known) if self._known else 0
        if at >= 0:
            await self._show(log[at + len(self._known) :])
        else:
            self._say(f'some of it is missing here; see "vmbusctl logs {self._service.name}"')
            self._known = log[-_KNOWN:]

    async def _show(self, data: bytes) -> None:
        self._known = (self._known + data)[-_KNOWN:]
        await write(self._printer.feed(data))

    def _say(self, text: str) -> None:
        say(f"vmbusctl: {clean(self._service.name)}: {text}")


def _drain(stream: socket.socket) -> bool:
    """Take what is in a stream by now; whether it has ended."""
    with contextlib.suppress(BlockingIOError):
        try:
            while stream.recv(_CHUNK):
                pass
        except ConnectionResetError:
            pass
        return True
    return False


COMMANDS = (logs,)
