"""What is to be measured, how thoroughly, and how its progress shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.samples import FAST, VMBUS

#: The D-Bus library of each column that is vmbus'.
LIBRARIES = {VMBUS: "dbus_next", FAST: "dbus_fast"}
#: Every measure, and what it says.
MEASURES = {
    "calls": "one property, and all of a VM",
    "many": "the state of 100 VMs",
    "lives": "Create and Start until it runs; kill -9 until the event",
    "create": "Create alone",
    "start": "the start of the service",
    "crowd": "1 to 3000 VMs: what each costs, idle, and 1000 deaths at once",
    "clients": "64 clients at once",
}


@dataclass(frozen=True)
class Plan:
    """quick: few samples and small crowds, to see whether all works."""

    only: frozenset[str]
    libraries: dict[str, str]
    quick: bool
    console: Console

    def wants(self, *names: str) -> bool:
        return not self.only or bool(self.only.intersection(names))

    def rounds(self, thorough: int) -> int:
        return max(3, thorough // 20) if self.quick else thorough

    @contextlib.contextmanager
    def progress(self, what: str, steps: int) -> Iterator[Callable[[], None]]:
        """Show a bar; what is given is called once a step, of which there is one to warm up."""
        bar = Progress(
            TextColumn("{task.description:<42}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            auto_refresh=False,
        )
        with bar:
            task = bar.add_task(what, total=steps + 1)

            def tick() -> None:
                bar.advance(task)
                bar.refresh()

            yield tick
