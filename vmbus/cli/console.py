"""A guest's console at a terminal or in a pipe: console and logs, and what run has of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Any

import click

from .common import Options, command, connect, name_argument, say
from .text import clean

_STDIN, _STDOUT = 0, 1
_ESCAPE = b"\x1d"
#: What a pipe that is ready for writing takes at once.
_PIPE_BUF = 4096
_CHUNK = 64 * 1024


async def attend(console: socket.socket, begin: asyncio.Event) -> bool:
    """Copy a console to stdout until it ends, and from `begin` on stdin to the console.

    Returns whether the user left it by the escape key.
    """
    console.setblocking(False)
    output = asyncio.create_task(_copy_out(console))
    typing = asyncio.create_task(_copy_in(console, begin))
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


def takes_keys() -> bool:
    """Whether stdin is a terminal, which then is the guest's."""
    return os.isatty(_STDIN)


async def _copy_out(console: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    last = b""
    # A console that closes with our typing still unread says so by a reset.
    with contextlib.suppress(ConnectionResetError):
        while data := await loop.sock_recv(console, _CHUNK):
            await write_all(_STDOUT, data)
            last = data[-1:]
    if os.isatty(_STDOUT) and last not in (b"", b"\n"):
        await write_all(_STDOUT, b"\r\n")


async def _copy_in(console: socket.socket, begin: asyncio.Event) -> bool:
    """Copy stdin until its end or the escape key; whether it was the key."""
    await begin.wait()
    terminal = takes_keys()
    if terminal and not _in_foreground(_STDIN):
        return False
    with _raw(_STDIN) if terminal else contextlib.nullcontext():
        while data := await _read(_STDIN):
            typed, escape, _ = data.partition(_ESCAPE) if terminal else (data, b"", b"")
            try:
                await asyncio.get_running_loop().sock_sendall(console, typed)
            except ConnectionError:
                return False
            if escape:
                return True
    return False


async def _read(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    await _ready(fd, loop.add_reader, loop.remove_reader)
    try:
        return os.read(fd, _CHUNK)
    except OSError:
        return b""


async def write_all(fd: int, data: bytes) -> None:
    """Write without ever holding up the event loop, so that signals are heard meanwhile."""
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        await _ready(fd, loop.add_writer, loop.remove_writer)
        view = view[os.write(fd, view[:_PIPE_BUF]) :]


async def _ready(fd: int, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
    """Wait until a descriptor can be read or written; what epoll refuses always can."""
    ready = asyncio.Event()
    try:
        add(fd, ready.set)
    except PermissionError:
        await asyncio.sleep(0)
        return
    try:
        await ready.wait()
    finally:
        remove(fd)


def _in_foreground(fd: int) -> bool:
    """Whether this terminal is ours to read; a job in the background would be stopped by it."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


@command()
@name_argument
async def console(options: Options, name: str) -> None:
    """Join the console of a VM. At a terminal ^] leaves it."""
    async with connect(options) as bus:
        with await (await bus.vm(name)).open_console() as stream:
            if takes_keys():
                say(f"vmbusctl: {clean(name)}: the console; ^] leaves it")
            begin = asyncio.Event()
            begin.set()
            left = await attend(stream, begin)
    if takes_keys():
        say(f"\nvmbusctl: {clean(name)}: left" if left else f"vmbusctl: {clean(name)}: ended")


@command()
@name_argument
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="Only the last N.")
async def logs(options: Options, name: str, lines: int | None) -> None:
    """Print what the console of a VM has printed, also after its death."""
    async with connect(options) as bus:
        with await (await bus.vm(name)).open_log() as log:
            data = log.read()
    if lines is not None:
        data = b"".join(data.splitlines(keepends=True)[-lines:] if lines else [])
    await write_all(_STDOUT, data)


COMMANDS = (console, logs)
