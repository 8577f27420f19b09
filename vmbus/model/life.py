"""How a VM lives: from Start, or from where another service left it, to its death.

All of it happens in one task, which alone learns how a VMM began and how it ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, MutableMapping

from ..errors import VMBusError
from ..guest.console import BoundedLog, Console
from ..guest.port import Port
from ..reasons import ORDERLY, Reason, death_reason, obituary
from ..spec import VMConfig
from ..text import clean
from ..vmm.base import Driver, Launch
from ..vmm.run import Ending, Run
from .controls import Controls
from .holdings import Holdings
from .identity import Identity
from .ledger import now
from .limits import Shares
from .reported import Reported
from .state import Event, State
from .surroundings import Surroundings

log = logging.getLogger(__name__)

#: What changes when a VM dies.
_DEATH = ("state", "reason", "status", "died", "last_words", "memory_actual", "pid")


class Life(Reported):
    """One VM as far as it lives by itself. shares: what it may take; for the rest see Ledger."""

    def __init__(
        self,
        identity: Identity,
        config: VMConfig,
        driver: Driver,
        surroundings: Surroundings,
        *,
        shares: Shares,
        kvm: bool,
        vsock: bool = False,
    ) -> None:
        super().__init__(identity, config, driver.name, surroundings, kvm=kvm, vsock=vsock)
        settings = surroundings.settings
        self._shares = shares
        self.holdings = Holdings(identity.id, config, shares, surroundings.keep)
        self._temporary = identity.directory / "tmp"
        self._console = Console(
            BoundedLog(identity.directory / "console.log", settings.console_log_bytes),
            self._temporary,
        )
        self._port = Port(self._temporary, self.reported)
        launch = Launch(
            name=identity.name,
            cid=identity.cid,
            config=config,
            directory=self._temporary,
            kvm=kvm,
            vsock=vsock,
            notify_port=settings.notify_port if vsock else 0,
            control_timeout=settings.control_timeout,
        )
        self._run = Run(driver, launch)
        self._controls = Controls(identity.name, settings.control_timeout)
        self._life: asyncio.Task[None] | None = None
        #: Set when its VMM is let through, or never will be.
        self.spawned = asyncio.Event()
        self._answered = asyncio.Event()
        self._gone = asyncio.Event()
        #: Resolved when the VM exists no more.
        self.forgotten: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Called last of all, when nothing of the VM but its record and its log is left.
        self.on_death: Callable[[], None] = lambda: None

    # From one service to the next

    def take_over(self, kept: MutableMapping[str, int]) -> None:
        """Take what the service before us held open for it, and that is still there, out of `kept`.

        To be called once, after `read`; the VM goes on when `go_on` is called.
        """
        pidfd = self.holdings.take_over(kept)
        if self.alive:
            self.spawned.set()
            self._shares.runs(self.config.memory_mib)
            self._shares.close_files()
            self._run.adopt(self.traces, pidfd)
        elif pidfd is not None:
            os.close(pidfd)

    def go_on(self) -> None:
        """Live on, or have it told that and how it died."""
        if self.alive:
            self._life = self._begin_life(self._adopt)
        elif self.over:
            if not self._was_told:
                # The service before us may have ended before it could tell this, too.
                self._call(self._around.observer.changed, self, _DEATH)
            self._have_died()

    async def let_go(self) -> None:
        """Have nothing to do with it any more: it goes on without us."""
        if self._life is not None and not self._life.done():
            self._life.cancel()
            await asyncio.wait({self._life})
        self._run.let_go()
        self._port.close()
        self._tell_last_text()
        self._console.close()
        self.config.close()

    @property
    def needs_service(self) -> bool:
        """Whether it would lose something without a service: its end told, or what is kept open."""
        if self.over:
            return False
        return self.alive or self.config.kill_on_disconnect or self.holdings.fleeting

    # The task

    def _begin_life(self, beginning: Callable[[], Awaitable[str]]) -> asyncio.Task[None]:
        return asyncio.create_task(self._live(beginning), name=f"vm-{self.identity.id}")

    async def _live(self, beginning: Callable[[], Awaitable[str]]) -> None:
        """To the end: the only place that learns how a VMM began and how it ended."""
        words = ""
        try:
            words = await beginning()
        except Exception as error:
            if isinstance(error, (OSError, ValueError, VMBusError)):
                words = f"could not be started: {getattr(error, 'strerror', None) or error}"
            else:
                log.exception("VM %s: internal error", self.identity.name)
                words = "internal error"
            if self._run.pid:
                self._run.kill()
        self._end(await self._run.ends(), words)

    async def _begin(self) -> str:
        """Spawn the VMM and wait for its first answer. Returns why none came, where it doesn't."""
        self.holdings.check()
        self._temporary.mkdir(mode=0o700)
        self._console.plug()
        self._port.plug()
        timeout = self._around.settings.start_timeout
        if not await self._run.spawn(timeout, self._held):
            return "ended before it was started"
        self.spawned.set()
        self.holdings.close_for_run()
        return await self._until_it_answers(timeout)

    async def _held(self) -> None:
        """Its processes are there, but don't run before the next service could find them, too."""
        traces = self._run.traces
        await self._around.placement.put(self, [trace.pid for trace in traces])
        self.holdings.store_vmm(self._run.pidfd)
        self._change(traces=traces, firm=True)

    async def _adopt(self) -> str:
        """Take up what the service before us left, whatever it was about to do."""
        if not self._run.pid:
            return ""
        self._call(self._console.plug_again)
        self._call(self._port.plug_again)
        self._watch_readiness()
        if self.killed_for is not None:
            self._run.kill()
        if self.state is State.STARTING:
            return await self._until_it_answers(self._around.settings.start_timeout)
        words = await self._until_it_answers(None)
        settled = not self.halted or self.state not in (State.SUSPENDED, State.RUNNING)
        if self._controls.has_answered and not settled:
            # Asked for and not known to be done, or not known to be undone.
            await self._controls.settle(halted=self.state is State.SUSPENDED)
        return words

    async def _until_it_answers(self, timeout: float | None) -> str:
        words = await self._run.until_it_answers(timeout)
        control = self._run.control
        if control is not None:
            control.watch_memory(self._memory_is)
            if self.state is State.STARTING:
                memory = self.config.memory_mib << 20
                self._change(Event.ANSWERED, started=now(), memory_actual=memory)
                self._log("started", f"runs in process {self.pid}")
            self._controls.answered(control)
            self._console.answered()
            self._answered.set()
        return words

    def _end(self, ending: Ending, words: str) -> None:
        """The VMM is gone: tell everybody, in the promised order, and clean up."""
        self._call(self._console.close)
        for last in (self._port.drain, self._port.close, self._tell_last_text):
            self._call(last)
        reason = death_reason(
            ending.status,
            told=ending.told,
            ran=self.started > 0,
            asked_for=self.asked_for,
            killed_for=self.killed_for,
        )
        said = clean(ending.words or words or obituary(ending.status))
        self._change(
            Event.EXITED,
            reason=reason,
            status=ending.status or 0,
            died=now(),
            last_words="" if self.started and reason in ORDERLY else said,
            memory_actual=0,
        )
        self._log("died", f"has died: {reason}" + (f" ({said})" if said else ""))
        self.spawned.set()
        self._have_died()

    def _have_died(self) -> None:
        was_told = self._was_told
        if not was_told:
            self._call(self._around.observer.died, self)
        self._answered.set()
        self._gone.set()
        self.holdings.close()
        self._shares.end()
        self._call(self._around.placement.clear, self)
        shutil.rmtree(self._temporary, ignore_errors=True)
        if was_told:
            self._call(self.on_death)

    @property
    def _was_told(self) -> bool:
        return self._around.store.was_told(self.identity.id)

    def death_was_told(self) -> None:
        """To be called by the observer when everybody has been told."""
        if self.forgotten.done():
            return
        self._call(self._around.store.told, self.identity.id)
        self._call(self.on_death)

    def _kill_now(self, reason: Reason) -> None:
        if not self._run.has_ended():
            if self.killed_for is None:
                self._change(killed_for=reason)
            self._run.kill()

    def _memory_is(self, size: int) -> None:
        if self.alive and 0 <= size <= self.config.memory_mib << 20 and size != self.memory_actual:
            self._change(memory_actual=size)
