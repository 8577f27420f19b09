"""The screen of monitor: all VMs, and the last events, drawn when something has changed."""

from __future__ import annotations

import asyncio
import signal
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..events import Event, Events
from .monitor import Known, follow, line_of
from .show import HEADER, row
from .text import coloured_table

#: Events that are remembered, and how much of the screen they may take.
_EVENTS = 100
_SHARE = 3


async def show(events: Events, known: Known, *, legend: bool) -> None:
    """Show what is known until the events end, and leave the terminal as it was."""
    changed = asyncio.Event()
    lines: deque[str] = deque(maxlen=_EVENTS)

    def tell(event: Event, name: str) -> None:
        lines.append(line_of(event, name))
        changed.set()

    console = Console()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    listening = asyncio.create_task(follow(events, known, tell))
    listening.add_done_callback(lambda _: changed.set())
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not listening.done():
                changed.clear()
                live.update(_picture(known, lines, console.height, legend), refresh=True)
                # All events that have come by then are one change.
                await changed.wait()
        listening.result()
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        listening.cancel()
        await asyncio.wait({listening})


def _picture(known: Known, lines: deque[str], height: int, legend: bool) -> Group:
    """What fits: the first VMs, and below them the last events."""
    shown = list(lines)[-max(1, height // _SHARE) :]
    vms = sorted(known.vms.values(), key=lambda vm: vm.id)
    # Above the VMs are a line and the table's header; below them one that is empty.
    room = max(1, height - 2 - legend - len(shown))
    table = coloured_table(HEADER, [row(vm) for vm in vms[:room]], legend=legend)
    return Group(
        _line(_title(known, hidden=len(vms) - room)),
        table,
        Text(),
        *(_line(each) for each in shown),
    )


def _title(known: Known, *, hidden: int) -> str:
    there = sum(vm.state == "running" for vm in known.vms.values())
    more = f", {hidden} not shown" if hidden > 0 else ""
    away = "" if known.running else "; the service is not running"
    return f"vmbus: {len(known.vms)} VMs, {there} running{more}{away}"


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")
