"""Descriptors of VMs, watched behind one of their own: a few of them a turn of the event loop.

The loop calls for all that is ready before it looks again. When a thousand VMMs die at once, each
death being some work, who has only a question would else have to wait for all of them.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from weakref import WeakKeyDictionary

#: How many are called for in one turn.
PER_TURN = 4


class Readers:
    """What is to be called when a descriptor can be read.

    It has one of its own open while it watches any.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll: select.epoll | None = None
        self._callbacks: dict[int, Callable[[], object]] = {}

    def add(self, fd: int, callback: Callable[[], object]) -> None:
        """Call it, and call it again, while the descriptor can be read. Raises OSError."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop.add_reader(self._epoll.fileno(), self._call_some)
        try:
            self._epoll.register(fd, select.EPOLLIN)
            self._callbacks[fd] = callback
        finally:
            self._close_unused()

    def remove(self, fd: int) -> None:
        """Watch it no more, if it was watched; to be called before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            assert self._epoll is not None
            self._epoll.unregister(fd)
            self._close_unused()

    def _close_unused(self) -> None:
        if self._epoll is not None and not self._callbacks:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _call_some(self) -> None:
        assert self._epoll is not None
        ready = [(fd, self._callbacks[fd]) for fd, _ in self._epoll.poll(0, PER_TURN)]
        for fd, callback in ready:
            # One may be removed by another, and its number be somebody else's by then.
            if self._callbacks.get(fd) is callback:
                callback()


_of: WeakKeyDictionary[asyncio.AbstractEventLoop, Readers] = WeakKeyDictionary()


def readers() -> Readers:
    """Those of the loop that runs."""
    loop = asyncio.get_running_loop()
    found = _of.get(loop)
    if found is None:
        found = _of[loop] = Readers(loop)
    return found
