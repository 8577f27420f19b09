"""The commands that change what a VM has while it runs: memory, resize-disk."""

from __future__ import annotations

import click

from .common import Options, command, connect, find, name_argument
from .size import parse_size, size_text
from .text import print_json


@command()
@name_argument
@click.argument("size", type=parse_size, required=False)
async def memory(options: Options, name: str, size: int | None) -> None:
    """Print how much memory a guest has, or set it.

    With SIZE its balloon is told how much to leave it; SIZE is in bytes, or has a suffix: 512M,
    2GiB. The guest takes its time to follow.
    """
    async with connect(options) as bus:
        vm = await find(bus, name)
        if size is not None:
            await vm.set_memory_target(size)
        actual = await vm.memory_actual()
    if options.json:
        target = {} if size is None else {"target": size}
        print_json({"name": name, "memory_actual": actual, **target})
    elif size is None:
        click.echo(size_text(actual))


@command(name="resize-disk")
@name_argument
@click.argument("index", type=click.IntRange(min=0))
@click.argument("size", type=parse_size)
async def resize_disk(options: Options, name: str, index: int, size: int) -> None:
    """Grow a writable disk of a VM. INDEX counts its disks from 0.

    SIZE is in bytes, or has a suffix: 512M, 2GiB.
    """
    async with connect(options) as bus:
        await (await find(bus, name)).resize_disk(index, size)
    if options.json:
        print_json({"name": name, "index": index, "size": size})


COMMANDS = (memory, resize_disk)
