"""The command monitor: what happens to VMs, as lines, as JSON, or on a screen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from ..events import Added, Changed, Died, Event, Events, Removed, ServiceChanged, Snapshot
from .common import Options, command, connect
from .text import clean, moment, print_json_line


@command()
async def monitor(options: Options) -> None:
    """Show what happens to VMs, until ^C.

    On a terminal this is a table of all VMs, with the last events below it. Otherwise it is a line
    for every event, or with --json a document in a line.
    """
    async with connect(options, asks=False) as bus, await bus.events() as events:
        running = await bus.running()
        known = Known(await bus.vms() if running else [], running=running)
        # A signal is this command's ordinary end.
        with contextlib.suppress(asyncio.CancelledError):
            if options.json:
                await follow(events, known, _print_json)
            elif os.isatty(1) and os.environ.get("TERM", "dumb") != "dumb":
                # What only a screen needs takes its time to be loaded.
                from .screen import show

                await show(events, known, legend=options.legend)
            else:
                await follow(events, known, _print_line)


class Known:
    """What is known of the service and all VMs, by what was heard."""

    def __init__(self, vms: list[Snapshot], *, running: bool) -> None:
        self.vms = {vm.path: vm for vm in vms}
        self.running = running

    def name(self, event: Event) -> str:
        """The name, or else the id, of the VM that an event is about; empty if there is none."""
        if isinstance(event, Added):
            return event.vm.name
        path = getattr(event, "path", "")
        return self.vms[path].name if path in self.vms else path.rpartition("/")[2]

    def take(self, event: Event) -> None:
        """Take notice of an event."""
        match event:
            case Added(path, vm):
                self.vms[path] = vm
            case Changed(path, values) if path in self.vms:
                self.vms[path] = replace(self.vms[path], **values)
            case Removed(path):
                self.vms.pop(path, None)
            case ServiceChanged(running):
                self.running = running


async def follow(events: Events, known: Known, tell: Callable[[Event, str], None]) -> None:
    """Tell every event, with the name that it is about, before it is taken notice of."""
    async for event in events:
        tell(event, known.name(event))
        known.take(event)


def line_of(event: Event, name: str) -> str:
    """An event that has just come, for people."""
    kind, details = _told(event)
    what = " ".join([kind, *(_pair(*each) for each in details.items())])
    return clean(f"{moment(_now())}  {name or 'vmbus'}  {what}")


def _print_line(event: Event, name: str) -> None:
    click.echo(line_of(event, name))


def _print_json(event: Event, name: str) -> None:
    kind, details = _told(event)
    path = getattr(event, "path", "")
    about = {"name": name, "path": path} if path else {}
    print_json_line({"time": _now(), "event": kind, **about, **details})


def _now() -> int:
    return time.time_ns() // 1000


def _pair(key: str, value: Any) -> str:
    if key.endswith("_timestamp"):
        value = moment(value)
    if isinstance(value, list):
        value = ",".join(value)
    return f"{key}={json.dumps(value) if ' ' in str(value) else value}"


def _told(event: Event) -> tuple[str, dict[str, Any]]:
    match event:
        case Added(_, vm):
            return "added", {"id": vm.id, "cid": vm.cid, "state": vm.state}
        case Changed(_, values, invalidated):
            unknown = {"invalidated": sorted(invalidated)} if invalidated else {}
            return "changed", {**values, **unknown}
        case Died(_, cid, death):
            return "died", {"cid": cid, "reason": death.reason, "status": death.status}
        case Removed():
            return "removed", {}
        case ServiceChanged(running):
            return "service", {"running": running}


COMMANDS = (monitor,)
