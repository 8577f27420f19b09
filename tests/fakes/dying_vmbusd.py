"""vmbusd that is killed with SIGKILL at one chosen step of its work.

It counts the steps that matter to who comes after it: what it writes down, the processes it spawns,
releases and kills, what it sends; each has a moment before and a moment after. VMBUS_DIES_AT says
at which moment it dies, VMBUS_STEPS names a file that a line is added to for each that it reached.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from vmbus.bus.objects import Objects
from vmbus.bus.stream import MessageStream
from vmbus.daemon import main
from vmbus.model.record import Store
from vmbus.vmm.process import Process

STEPS: list[tuple[type, str]] = [
    (Store, "count"),
    (Store, "save"),
    (Store, "told"),
    (Store, "delete"),
    (Process, "spawn"),
    (Process, "release"),
    (Process, "kill"),
    (Objects, "added"),
    (Objects, "changed"),
    (Objects, "died"),
    (Objects, "removed"),
    (MessageStream, "_flush"),
]


class Fate:
    """Counts the moments, and ends it all at the right one."""

    def __init__(self) -> None:
        self.dies_at = int(os.environ["VMBUS_DIES_AT"])
        self.steps = os.open(os.environ["VMBUS_STEPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.moments = 0
        self._counts = 0

    def moment(self, name: str) -> None:
        # It counts once at its start; a VM's life begins with the second time.
        self._counts += name == "before count"
        if self._counts < 2:
            return
        self.moments += 1
        os.write(self.steps, f"{self.moments} {name}\n".encode())
        if self.moments == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: type, name: str) -> None:
        plain: Any = owner.__dict__[name]
        function: Callable[..., Any] = getattr(plain, "__func__", plain)

        @functools.wraps(function)
        def watched(*what: Any, **more: Any) -> Any:
            self.moment(f"before {name}")
            result = function(*what, **more)
            self.moment(f"after {name}")
            return result

        setattr(owner, name, classmethod(watched) if isinstance(plain, classmethod) else watched)


if __name__ == "__main__":
    fate = Fate()
    for owner, name in STEPS:
        fate.watch(owner, name)
    main()
