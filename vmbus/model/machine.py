"""One VM: what can be done with it.

What can be decided is decided before the first await of each verb, so that of two calls at once
exactly one wins. Nothing here knows of the bus: an observer is told, and tells everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import InvalidArgs, InvalidState, NoSuchVM, NotSupported, StartFailed
from ..guest import vsock
from ..reasons import Reason
from ..vmm.base import Control
from .ledger import since_boot
from .life import Life
from .state import Event, State, after

#: Ports below are for what the guest's own administrator set up.
FIRST_OPEN_PORT = 1024
#: Seconds that a VMM which is out of time gets to end by its own stop before SIGKILL.
_GRACE = 0.5


class Machine(Life):
    """One VM, with its verbs."""

    # Beginning and end

    async def start(self) -> None:
        """Spawn the VMM; return when it answers. Raises InvalidState, StartFailed, …"""
        after(self.state, Event.START)
        self._shares.run(self.config.memory_mib)
        try:
            self._change(Event.START, firm=True)
        except BaseException:
            self._shares.end()
            raise
        self._life = self._begin_life(self._begin)
        await self._answered.wait()
        if self.started == 0:
            raise StartFailed(f"{self.vmm}: {self.last_words}")

    async def stop(self, timeout: float, reason: Reason = Reason.STOPPED) -> None:
        """End the VM in good order, or else, when `timeout` (s) is over, by force."""
        if self.over:
            return
        if self.state is State.STARTING:
            after(self.state, Event.STOP)
            await self.kill(_forced(reason))
            return
        ends_by = since_boot() + timeout
        self._change(Event.STOP, asked_for=self.asked_for or reason, ends_by=ends_by)
        await self._end_in_time(timeout, _forced(reason))

    async def stop_again(self) -> None:
        """Go on with a Stop that another service began."""
        if self.state is State.STOPPING:
            reason = _forced(self.asked_for or Reason.STOPPED)
            await self._end_in_time(max(0.0, self.ends_by - since_boot()), reason)

    async def kill(self, reason: Reason = Reason.KILLED) -> None:
        """End the VMM at once; return when the VM is dead. Nothing to do when it isn't alive."""
        if not self.alive:
            return
        self._kill_now(reason)
        await self._gone.wait()

    async def wait(self) -> tuple[Reason, int]:
        """Wait for death. Returns why, and the status. Raises NoSuchVM if it is removed first."""
        await self._gone.wait()
        if self.reason is None:
            raise NoSuchVM(f"VM {self.identity.name} was removed without having been started")
        return self.reason, self.status

    def remove(self) -> None:
        """Delete all that the VM has. Raises InvalidState if it is alive."""
        after(self.state, Event.REMOVE)
        self._console.close()
        self.holdings.close()
        self._shares.forget()
        self._around.store.delete(self.identity.id)
        self._gone.set()
        if not self.forgotten.done():
            self.forgotten.set_result(None)

    # While it runs: one request at a time, each decided when its turn comes

    async def suspend(self) -> None:
        """Stop the vCPUs. Raises InvalidState, ControlFailed or TimedOut."""

        async def halt(control: Control) -> None:
            self._change(halted=True)
            await control.suspend()

        await self._ask(Event.SUSPEND, halt)

    async def resume(self) -> None:
        """Let the vCPUs go on. Raises InvalidState, ControlFailed or TimedOut."""
        await self._ask(Event.RESUME, lambda control: control.resume(), halted=False)

    async def set_memory_target(self, size: int) -> None:
        """Have the balloon leave the guest `size` bytes. Raises InvalidArgs, NotSupported, …"""
        after(self.state, Event.ADJUST)
        self.config.check_memory_target(size)
        await self._ask(Event.ADJUST, lambda control: control.set_memory(size))
        self._change(memory_actual=self.memory_actual)

    async def resize_disk(self, index: int, size: int) -> None:
        """Grow a disk to `size` bytes. Raises InvalidArgs, NotSupported, InvalidState, …"""
        after(self.state, Event.RESIZE)
        self.config.check_disk_size(index, size)

        async def grow(control: Control) -> None:
            image = self.config.disks[index].image
            if image.fd < 0:
                raise NotSupported("the service was restarted, and does not hold the disk any more")
            now = image.size_now()
            if size <= now:
                raise InvalidArgs(f"a disk can only grow; it has {now} bytes already")
            await control.resize_disk(index, size)

        await self._ask(Event.RESIZE, grow)

    async def ask_memory(self) -> int:
        """How many bytes the guest has now; what was last known where the VMM doesn't say."""
        if self._controls.has_answered and self.alive:
            size = await self._controls.memory()
            if size is not None:
                self._memory_is(size)
        return self.memory_actual

    def open_console(self, uid: int) -> int:
        """A stream socket joined to the console, the caller's to close.

        uid: the user on whose account it goes. Raises InvalidState or LimitExceeded.
        """
        if self.over:
            raise InvalidState(f"a VM that is {self.state} has no console; its log can be opened")
        return self._console.attach(self._shares.console(uid).release).detach()

    async def connect_vsock(self, port: int) -> int:
        """A stream socket to a vsock port of the guest, the caller's to close.

        Raises InvalidArgs, NotSupported, InvalidState, ControlFailed or TimedOut.
        """
        if not FIRST_OPEN_PORT <= port < vsock.ANY_PORT:
            raise InvalidArgs(f"a port must be {FIRST_OPEN_PORT} to {vsock.ANY_PORT - 1}")
        if not self.vsock:
            raise NotSupported("this VM has no vsock")
        after(self.state, Event.CONNECT)
        timeout = self._around.settings.control_timeout
        stream = await vsock.connect(self._around.vsock, self.identity.cid, port, timeout)
        return stream.detach()

    def open_log(self) -> int:
        """A read-only descriptor of the console's log, the caller's to close."""
        return self._console.open_log()

    # Helpers

    async def _ask(
        self, event: Event, request: Callable[[Control], Awaitable[None]], **values: Any
    ) -> None:
        """Ask the VMM for what an event says, if the state still allows it, then tell of it."""
        if not self._controls.has_answered:
            after(self.state, event)
        async with self._controls.turn() as control:
            after(self.state, event)
            await request(control)
            if event in (Event.SUSPEND, Event.RESUME):
                self._change(event, **values)

    async def _end_in_time(self, timeout: float, forced: Reason) -> None:
        """In good order; or when time is up by the VMM's own stop, or else by SIGKILL."""
        try:
            async with asyncio.timeout(timeout):
                await self._controls.end_in_order(lambda: self.halted)
                await self._gone.wait()
            return
        except TimeoutError:
            self._change(killed_for=self.killed_for or forced)
        try:
            async with asyncio.timeout(_GRACE):
                await self._controls.quit()
                await self._gone.wait()
        except TimeoutError:
            await self.kill(forced)


def _forced(reason: Reason) -> Reason:
    """What a Stop that runs out of time ends as."""
    return Reason.KILLED if reason is Reason.STOPPED else reason
