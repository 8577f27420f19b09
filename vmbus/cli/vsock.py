"""The command vsock: a stream to a program in a guest."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import click

from . import terminal
from .common import Options, command, connect, find, name_argument

_CHUNK = 64 * 1024


@command()
@name_argument
@click.argument("port", type=click.IntRange(1024, (1 << 32) - 2))
async def vsock(options: Options, name: str, port: int) -> None:
    """Join a vsock port of a VM's guest.

    stdin and stdout are joined to it until the guest closes it.
    """
    async with connect(options) as bus:
        stream = await (await find(bus, name)).connect_vsock(port)
        with stream:
            await join(stream)


async def join(stream: socket.socket) -> None:
    """Copy a stream to stdout until it ends, and stdin to it until that ends."""
    stream.setblocking(False)
    typing = asyncio.create_task(_copy_in(stream))
    try:
        # A program that ends with our words unread says so by a reset.
        with contextlib.suppress(ConnectionResetError):
            while data := await asyncio.get_running_loop().sock_recv(stream, _CHUNK):
                await terminal.write(data)
    finally:
        typing.cancel()
        await asyncio.wait({typing})


async def _copy_in(stream: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await terminal.read():
            await asyncio.get_running_loop().sock_sendall(stream, data)
        stream.shutdown(socket.SHUT_WR)


COMMANDS = (vsock,)
