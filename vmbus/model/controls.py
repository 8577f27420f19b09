"""What is asked of a VMM that runs: one request at a time, none of them trusted to be answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from ..errors import TimedOut, VMBusError
from ..vmm.base import Control

log = logging.getLogger(__name__)

#: Seconds that a reader waits for a VMM to say how much memory its guest has.
_ASK_MEMORY = 1.0


class Controls:
    """The control of one VM's VMM, from its first answer on.

    timeout: how long a request may wait for the one before it, in seconds.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._control: asyncio.Future[Control] = asyncio.get_running_loop().create_future()
        self._name = name
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._asking: asyncio.Task[int | None] | None = None

    @property
    def has_answered(self) -> bool:
        """Whether the VMM ever answered us. One that another service started may not, yet."""
        return self._control.done()

    def answered(self, control: Control) -> None:
        """The VMM has answered for the first time."""
        self._control.set_result(control)

    async def _there(self) -> Control:
        return await asyncio.shield(self._control)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Control]:
        """Wait until no other request is under way. Raises TimedOut."""
        try:
            async with asyncio.timeout(self._timeout):
                control = await self._there()
                await self._lock.acquire()
        except TimeoutError:
            busy = "is still busy with another request"
            silent = "has not answered since the service was restarted"
            raise TimedOut(f"the VMM {busy if self.has_answered else silent}") from None
        try:
            yield control
        finally:
            self._lock.release()

    async def settle(self, *, halted: bool) -> None:
        """Have the vCPUs stop, or go on, once more: nobody knows whether they do."""
        control = await self._there()
        async with self._lock:
            await self._obeyed(control.suspend() if halted else control.resume())

    async def end_in_order(self, halted: Callable[[], bool]) -> None:
        """Press the power button; where there is none, have the VMM stop.

        halted: whether the vCPUs were told to stop.
        """
        control = await self._there()
        # A guest that is suspended, or about to be, would never learn of it.
        async with self._lock:
            if halted():
                await self._obeyed(control.resume())
        if not await self._obeyed(control.power_button()):
            await self.quit()

    async def quit(self) -> None:
        """Have the VMM stop by itself, if it does."""
        await self._obeyed((await self._there()).quit())

    async def memory(self) -> int | None:
        """How many bytes the guest has; None where the VMM doesn't say in time."""
        if self._asking is None or self._asking.done():
            # All who read meanwhile share one question.
            self._asking = asyncio.create_task(self._ask_memory())
        return await asyncio.shield(self._asking)

    async def _ask_memory(self) -> int | None:
        try:
            async with asyncio.timeout(_ASK_MEMORY):
                return await (await self._there()).memory()
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
