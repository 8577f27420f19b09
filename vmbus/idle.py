"""When nobody has asked for anything for a while: one timer, which runs only after somebody did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Idle:
    """Tells when nothing was used for `seconds` while `may_go` held; `over` is set then.

    Whatever could make `may_go` hold must be followed by a `touch`.
    """

    def __init__(self, seconds: float, may_go: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._may_go = may_go
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.over = asyncio.Event()

    def touch(self) -> None:
        """Something was used."""
        self._last = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._last + self._seconds, self._look)

    def close(self) -> None:
        """Tell no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        end = self._last + self._seconds
        if self._loop.time() < end:
            self._timer = self._loop.call_at(end, self._look)
        elif self._may_go():
            self.over.set()
