"""What is asked of a VMM that runs: one request at a time, none of them trusted to be answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable

from ..errors import TimedOut, VMBusError
from ..vmm.base import Control

log = logging.getLogger(__name__)

#: Seconds that a reader waits for a VMM to say how much memory its guest has.
_ASK_MEMORY = 1.0


class Controls:
    """The control of one VM's VMM. `control` is there once the VMM has answered.

    timeout: how long a request may wait for the one before it, in seconds.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.control: Control | None = None
        self._name = name
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._halted = False
        self._asking: asyncio.Task[int | None] | None = None

    @property
    def answering(self) -> Control:
        """The control of a VMM that has answered."""
        assert self.control is not None
        return self.control

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Control]:
        """Wait until no other request is under way. Raises TimedOut."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._lock.acquire()
        except TimeoutError:
            raise TimedOut("the VMM is still busy with another request") from None
        try:
            yield self.answering
        finally:
            self._lock.release()

    async def suspend(self, control: Control) -> None:
        """To be called in one's turn, as `resume`. Raises ControlFailed or TimedOut."""
        # Also where no answer comes: it may do it later.
        self._halted = True
        await control.suspend()

    async def resume(self, control: Control) -> None:
        """See `suspend`."""
        await control.resume()
        self._halted = False

    async def end_in_order(self) -> None:
        """Press the power button; where there is none, have the VMM stop."""
        # A guest that is suspended, or about to be, would never learn of it.
        async with self._lock:
            if self._halted:
                await self._obeyed(self.answering.resume())
        if not await self._obeyed(self.answering.power_button()):
            await self.quit()

    async def quit(self) -> None:
        """Have the VMM stop by itself, if it does."""
        await self._obeyed(self.answering.quit())

    async def memory(self) -> int | None:
        """How many bytes the guest has; None where the VMM doesn't say in time."""
        if self._asking is None or self._asking.done():
            # All who read meanwhile share one question.
            self._asking = asyncio.create_task(self._ask_memory())
        return await asyncio.shield(self._asking)

    async def _ask_memory(self) -> int | None:
        try:
            async with asyncio.timeout(_ASK_MEMORY):
                return await self.answering.memory()
        except (VMBusError, TimeoutError) as error:
            log.debug("VM %s: its memory is not known: %s", self._name, error)
        except Exception:
            log.exception("VM %s: internal error", self._name)
        return None

    async def _obeyed(self, request: Awaitable[None]) -> bool:
        try:
            await request
            return True
        except VMBusError as error:
            log.info("VM %s: its VMM does not do as it is asked: %s", self._name, error)
        except Exception:
            log.exception("VM %s: internal error", self._name)
        return False
