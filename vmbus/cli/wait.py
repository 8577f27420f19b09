"""The command wait: until a VM has died, or is ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..client import VM
from ..errors import NoSuchVM
from ..events import Changed, Death, Died, Events, Removed
from . import exits
from .common import Options, command, connect, find, name_argument
from .text import clean, print_json

#: What a guest says when it is ready, or after that.
_READY = ("ready", "finished")


@command(epilog="\b\n" + exits.table())
@name_argument
@click.option("--ready", is_flag=True, help="Wait until its guest says that it is ready.")
async def wait(options: Options, name: str, ready: bool) -> int:
    """Wait until a VM has died, and print why.

    With --ready wait no longer than until its guest has said that it is ready, or has finished. A
    VM that dies before is a failure, however it died.
    """
    async with connect(options, asks=False) as bus:
        if not ready:
            death: Death | None = await (await find(bus, name)).wait()
        else:
            async with await bus.events() as events:
                death = await _until_ready(await find(bus, name), events)
    if death is None:
        _tell(options, "ready", {"name": name, "ready": True})
        return 0
    told = {"name": name, "reason": death.reason, "status": death.status}
    _tell(options, f"{death.reason} ({death.status})", told)
    status = exits.exit_status(death.reason)
    return status or exits.FAILED if ready else status


def _tell(options: Options, line: str, told: Mapping[str, Any]) -> None:
    if options.json:
        print_json(told)
    else:
        click.echo(clean(line))


async def _until_ready(vm: VM, events: Events) -> Death | None:
    """None when it is ready, or else how it died. events: those since before it was found."""
    now = await vm.properties()
    if now.payload_state in _READY:
        return None
    if now.died_timestamp:
        return Death(now.death_reason, now.exit_status)
    async for event in events:
        match event:
            case Changed(vm.path, values) if values.get("payload_state") in _READY:
                return None
            case Died(vm.path, _, death):
                return death
            case Removed(vm.path):
                break
    raise NoSuchVM("the VM was removed before it was started")


COMMANDS = (wait,)
