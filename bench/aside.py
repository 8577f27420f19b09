"""Work in a process of its own, so that one measurement doesn't wait for another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_FORK = multiprocessing.get_context("fork")
_DEADLINE = 300.0


class Aside:
    """Runs `work(channel)`; what it sends first says that it is ready, what last is its result."""

    def __init__(self, work: Callable[[Connection], None]) -> None:
        self._ours, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def _receive(self) -> Any:
        if not self._ours.poll(_DEADLINE):
            raise TimeoutError("a helper process of the benchmark does not answer")
        return self._ours.recv()

    def go(self) -> None:
        """Tell it to begin, or, where it has begun, to end."""
        self._ours.send(None)

    def is_done(self) -> bool:
        """Whether its result is there."""
        return self._ours.poll()

    def result(self) -> Any:
        """Wait for its result, and for its end."""
        found = self._receive()
        self._process.join()
        self._ours.close()
        return found
