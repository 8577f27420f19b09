"""Deadlines of all VMs on a single timer."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

#: So many deadlines that hold no more are kept among the others, and as many as there are others.
_SLACK = 64


class Watch:
    """At most one deadline a VM, by the clock of the event loop.

    That clock is the kernel's since boot, and so the next service's, too; it stands still while the
    host sleeps, as guests do.
    """

    def __init__(self) -> None:
        self._due: dict[int, tuple[float, Callable[[], None]]] = {}
        # May hold what is in `_due` no more, but always all that is.
        self._heap: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None

    def set(self, id: int, by: float, act: Callable[[], None]) -> None:
        """Have `act` called when it is `by`, in place of what was set for this id before.

        by: 0: nothing is to be called.
        """
        self._due.pop(id, None)
        if by:
            self._due[id] = by, act
            heapq.heappush(self._heap, (by, id))
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            self._heap = [(each[0], key) for key, each in self._due.items()]
            heapq.heapify(self._heap)
        self._set_timer()

    def close(self) -> None:
        """Call nothing any more."""
        self._due.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        while self._heap and not self._holds(*self._heap[0]):
            heapq.heappop(self._heap)
        first = self._heap[0][0] if self._heap else None
        if self._timer is not None and self._timer.when() != first:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and first is not None:
            self._timer = asyncio.get_running_loop().call_at(first, self._act)

    def _act(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._heap and (self._heap[0][0] <= now or not self._holds(*self._heap[0])):
            by, id = heapq.heappop(self._heap)
            if self._holds(by, id):
                self._due.pop(id)[1]()
        self._set_timer()

    def _holds(self, by: float, id: int) -> bool:
        return id in self._due and self._due[id][0] == by
