"""One VM: its config, its state, its run, and what can be done with it.

What can be decided is decided before the first await of each verb, so that of two calls at once
exactly one wins; everything that follows from a decision happens in one task, `_live`, from Start
to death. Nothing here knows of the bus: an observer is told, and tells everybody.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ..errors import InvalidArgs, InvalidState, NoSuchVM, StartFailed
from ..guest.console import BoundedLog, Console
from ..reasons import ORDERLY, Reason, death_reason, obituary
from ..settings import Settings
from ..spec import VMConfig
from ..text import clean
from ..vmm.base import Control, Driver, Launch
from ..vmm.run import Ending, Run
from .controls import Controls
from .identity import Identity, Observer
from .limits import Shares
from .state import ALIVE, OVER, Event, State, after

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Seconds that a VMM which is out of time gets to end by its own stop before SIGKILL.
_GRACE = 0.5


class Machine:
    """One VM. Timestamps are microseconds since the epoch, 0 before; memory is in bytes.

    shares: what it may take. kvm: whether KVM is usable. vsock: whether its guest gets a vsock.
    """

    def __init__(
        self,
        identity: Identity,
        config: VMConfig,
        driver: Driver,
        settings: Settings,
        observer: Observer,
        *,
        shares: Shares,
        kvm: bool,
        vsock: bool = False,
    ) -> None:
        self.identity = identity
        self.config = config
        self.vmm = driver.name
        self.state = State.NOT_STARTED
        self.pid = 0
        self.created = _now()
        self.started = 0
        self.died = 0
        self.reason: Reason | None = None
        self.status = 0
        self.last_words = ""
        self.memory_actual = 0
        self._settings = settings
        self._observer = observer
        self._shares = shares
        self._kvm = kvm
        self._vsock = vsock
        self._temporary = identity.directory / "tmp"
        self._console = Console(
            BoundedLog(identity.directory / "console.log", settings.console_log_bytes)
        )
        self._run = Run(driver)
        self._controls = Controls(identity.name, settings.control_timeout)
        self._asked_for: Reason | None = None
        self._killed_for: Reason | None = None
        self._life: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()
        self._gone = asyncio.Event()
        #: Resolved when the VM exists no more.
        self.forgotten: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Called last of all, when nothing of the VM but its record and its log is left.
        self.on_death: Callable[[Machine], None] = lambda _: None

    @property
    def alive(self) -> bool:
        """Whether a VMM runs for it, or is about to."""
        return self.state in ALIVE

    # Beginning and end

    async def start(self) -> None:
        """Spawn the VMM; return when it answers. Raises InvalidState, StartFailed, …"""
        after(self.state, Event.START)
        self._shares.run(self.config.memory_mib)
        self._change(Event.START)
        self._life = asyncio.create_task(self._live(), name=f"vm-{self.identity.id}")
        await self._answered.wait()
        if self.started == 0:
            raise StartFailed(f"{self.vmm}: {self.last_words}")

    async def stop(self, timeout: float, reason: Reason = Reason.STOPPED) -> None:
        """End the VM in good order, or else, when `timeout` (s) is over, by force."""
        if self.state in OVER:
            return
        forced = Reason.KILLED if reason is Reason.STOPPED else reason
        self._change(Event.STOP)
        if self.state is State.STARTING:
            await self.kill(forced)
            return
        self._asked_for = self._asked_for or reason
        try:
            async with asyncio.timeout(timeout):
                await self._controls.end_in_order()
                await self._gone.wait()
        except TimeoutError:
            await self._end_by_force(forced)

    async def kill(self, reason: Reason = Reason.KILLED) -> None:
        """End the VMM at once; return when the VM is dead. Nothing to do when it isn't alive."""
        if self.state not in ALIVE:
            return
        if self._run.kill():
            self._killed_for = self._killed_for or reason
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
        self.config.close()
        self._shares.forget()
        shutil.rmtree(self.identity.directory, ignore_errors=True)
        self._gone.set()
        if not self.forgotten.done():
            self.forgotten.set_result(None)

    # While it runs: one request at a time, each decided when its turn comes

    async def suspend(self) -> None:
        """Stop the vCPUs. Raises InvalidState, ControlFailed or TimedOut."""
        await self._ask(Event.SUSPEND, self._controls.suspend)

    async def resume(self) -> None:
        """Let the vCPUs go on. Raises InvalidState, ControlFailed or TimedOut."""
        await self._ask(Event.RESUME, self._controls.resume)

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
            now = self.config.disks[index].image.size_now()
            if size <= now:
                raise InvalidArgs(f"a disk can only grow; it has {now} bytes already")
            await control.resize_disk(index, size)

        await self._ask(Event.RESIZE, grow)

    async def ask_memory(self) -> int:
        """How many bytes the guest has now; what was last known where the VMM doesn't say."""
        if self._controls.control is not None and self.alive:
            size = await self._controls.memory()
            if size is not None:
                self._memory_is(size)
        return self.memory_actual

    def _memory_is(self, size: int) -> None:
        if self.alive and 0 <= size <= self.config.memory_mib << 20 and size != self.memory_actual:
            self._change(memory_actual=size)

    def open_console(self, uid: int) -> int:
        """A stream socket joined to the console, the caller's to close.

        uid: the user on whose account it goes. Raises InvalidState or LimitExceeded.
        """
        if self.state in OVER:
            raise InvalidState(f"a VM that is {self.state} has no console; its log can be opened")
        return self._console.attach(self._shares.console(uid).release).detach()

    def open_log(self) -> int:
        """A read-only descriptor of the console's log, the caller's to close."""
        return self._console.open_log()

    # Life

    async def _live(self) -> None:
        """From Start to death: the only place that learns how a VMM began and how it ended."""
        words = ""
        try:
            words = await self._begin()
        except Exception as error:
            if isinstance(error, (OSError, ValueError)):
                words = f"could not be started: {getattr(error, 'strerror', None) or error}"
            else:
                log.exception("VM %s: internal error", self.identity.name)
                words = "internal error"
            if self._run.pid:
                self._run.kill()
        self._end(await self._run.ends(), words)

    async def _begin(self) -> str:
        """Spawn the VMM and wait for its first answer. Returns why none came, where it doesn't."""
        self._temporary.mkdir(mode=0o700)
        launch = Launch(
            name=self.identity.name,
            cid=self.identity.cid,
            config=self.config,
            directory=self._temporary,
            console=self._console.plug().detach(),
            kvm=self._kvm,
            vsock=self._vsock,
            control_timeout=self._settings.control_timeout,
        )
        spawned = await self._run.spawn(launch, self._settings.start_timeout)
        if not spawned:
            return "ended before it was started"
        self.config.close_for_run()
        self._shares.close_files()
        self._change(pid=self._run.pid)
        words = await self._run.until_it_answers(self._settings.start_timeout)
        self._controls.control = self._run.control
        if self._run.control is not None:
            self._run.control.watch_memory(self._memory_is)
            memory = self.config.memory_mib << 20
            self._change(Event.ANSWERED, started=_now(), memory_actual=memory)
            self._answered.set()
        return words

    def _end(self, ending: Ending, words: str) -> None:
        """The VMM is gone: tell everybody, in the promised order, and clean up."""
        self._console.close()
        reason = death_reason(
            ending.status,
            told=ending.told,
            ran=self.started > 0,
            asked_for=self._asked_for,
            killed_for=self._killed_for,
        )
        said = clean(ending.words or words or obituary(ending.status))
        self._change(
            Event.EXITED,
            reason=reason,
            status=ending.status,
            pid=0,
            died=_now(),
            last_words="" if self.started and reason in ORDERLY else said,
            memory_actual=0,
        )
        self._call(self._observer.died, self)
        self._answered.set()
        self._gone.set()
        self._close_files()
        self._shares.end()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._call(self.on_death, self)

    # Helpers

    def _close_files(self) -> None:
        self.config.close()
        self._shares.close_files()

    def _call(self, function: Callable[..., _T], *args: Any) -> _T | None:
        """Call out of here: what fails there must not leave a VM neither alive nor dead."""
        try:
            return function(*args)
        except Exception:
            log.exception("VM %s: internal error", self.identity.name)
            return None

    def _change(self, event: Event | None = None, **values: Any) -> None:
        """The one place where a VM changes. Raises InvalidState, with nothing changed."""
        names = list(values)
        if event is not None:
            state = after(self.state, event)
            if state is not self.state:
                self.state = state
                names.insert(0, "state")
        for name, value in values.items():
            setattr(self, name, value)
        if names:
            self._call(self._observer.changed, self, names)

    async def _ask(self, event: Event, request: Callable[[Control], Awaitable[None]]) -> None:
        """Ask the VMM for what an event says, if the state still allows it, then tell of it."""
        if self._controls.control is None:
            after(self.state, event)
        async with self._controls.turn() as control:
            after(self.state, event)
            await request(control)
            self._change(event)

    async def _end_by_force(self, reason: Reason) -> None:
        self._killed_for = self._killed_for or reason
        try:
            async with asyncio.timeout(_GRACE):
                await self._controls.quit()
                await self._gone.wait()
        except TimeoutError:
            await self.kill(reason)


def _now() -> int:
    return time.time_ns() // 1000
