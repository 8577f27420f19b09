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

from ..errors import InvalidArgs, InvalidState, NoSuchVM, NotSupported, StartFailed, VMBusError
from ..guest.console import BoundedLog, Console
from ..reasons import ORDERLY, Reason, death_reason
from ..settings import Settings
from ..spec import MIN_MEMORY_MIB, VMConfig
from ..vmm.base import Control, Driver, Launch
from ..vmm.run import Ending, Run
from .identity import Identity, Observer
from .state import ALIVE, OVER, Event, State, after

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Seconds that a VMM which is out of time gets to end by its own stop before SIGKILL.
_GRACE = 0.5
#: Seconds that a reader waits for a VMM to say how much memory its guest has.
_ASK_MEMORY = 1.0
_SECTOR = 512


class Machine:
    """One VM. Timestamps are microseconds since the epoch, 0 before; memory is in bytes.

    vsock: whether its guest gets a vsock device. kvm: whether KVM is usable.
    """

    def __init__(
        self,
        identity: Identity,
        config: VMConfig,
        driver: Driver,
        settings: Settings,
        observer: Observer,
        *,
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
        self._kvm = kvm
        self._vsock = vsock
        self._temporary = identity.directory / "tmp"
        self._console = Console(
            BoundedLog(identity.directory / "console.log", settings.console_log_bytes)
        )
        self._disk_sizes = [disk.image.size for disk in config.disks]
        self._run = Run(driver)
        self._turn = asyncio.Lock()
        self._halted = False
        self._asked_for: Reason | None = None
        self._killed_for: Reason | None = None
        self._life: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()
        self._gone = asyncio.Event()
        #: Called last of all, when nothing of the VM but its record and its log is left.
        self.on_death: Callable[[Machine], None] = lambda _: None

    @property
    def alive(self) -> bool:
        """Whether a VMM runs for it, or is about to."""
        return self.state in ALIVE

    # Beginning and end

    async def start(self) -> None:
        """Spawn the VMM; return when it answers. Raises InvalidState or StartFailed."""
        self._change(Event.START)
        self._life = asyncio.create_task(self._live(), name=f"vm-{self.identity.id}")
        await self._answered.wait()
        if self.started == 0:
            raise StartFailed(f"{self.vmm}: {self.last_words}")

    async def stop(self, timeout: float, reason: Reason = Reason.STOPPED) -> None:
        """End the VM in good order, or else, when `timeout` (s) is over, by force."""
        if self.state in OVER:
            return
        self._change(Event.STOP)
        if self.state is State.STARTING:
            await self.kill(reason)
            return
        self._asked_for = self._asked_for or reason
        try:
            async with asyncio.timeout(timeout):
                control = self._answering()
                await self._let_it_hear(control)
                if not await self._obeyed(control.power_button()):
                    await self._obeyed(control.quit())
                await self._gone.wait()
        except TimeoutError:
            await self._end_by_force(Reason.KILLED if reason is Reason.STOPPED else reason)

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
        shutil.rmtree(self.identity.directory, ignore_errors=True)
        self._gone.set()

    # While it runs: one request at a time, each decided when its turn comes

    async def suspend(self) -> None:
        """Stop the vCPUs. Raises InvalidState, ControlFailed or TimedOut."""

        async def suspend(control: Control) -> None:
            await control.suspend()
            self._halted = True

        await self._ask(Event.SUSPEND, suspend)

    async def resume(self) -> None:
        """Let the vCPUs go on. Raises InvalidState, ControlFailed or TimedOut."""

        async def resume(control: Control) -> None:
            await control.resume()
            self._halted = False

        await self._ask(Event.RESUME, resume)

    async def set_memory_target(self, size: int) -> None:
        """Have the balloon leave the guest `size` bytes. Raises InvalidArgs, NotSupported, …"""
        after(self.state, Event.ADJUST)
        if not self.config.balloon:
            raise NotSupported("this VM was created without a balloon")
        least, most = MIN_MEMORY_MIB << 20, self.config.memory_mib << 20
        if not least <= size <= most:
            raise InvalidArgs(f"the guest can have {least} to {most} bytes, not {size}")
        await self._ask(Event.ADJUST, lambda control: control.set_memory(size))
        self._change(memory_actual=self.memory_actual)

    async def resize_disk(self, index: int, size: int) -> None:
        """Grow a disk to `size` bytes. Raises InvalidArgs, NotSupported, InvalidState, …"""
        after(self.state, Event.RESIZE)
        if index >= len(self.config.disks):
            raise InvalidArgs(f"there is no disk {index}; the VM has {len(self.config.disks)}")
        if not self.config.disks[index].writable:
            raise NotSupported(f"disk {index} is read-only")
        if size % _SECTOR:
            raise InvalidArgs(f"a disk's size must be a multiple of {_SECTOR} bytes")

        async def grow(control: Control) -> None:
            if size <= self._disk_sizes[index]:
                now = self._disk_sizes[index]
                raise InvalidArgs(f"a disk can only grow; it has {now} bytes already")
            await control.resize_disk(index, size)
            self._disk_sizes[index] = size

        await self._ask(Event.RESIZE, grow)

    async def ask_memory(self) -> int:
        """How many bytes the guest has now; what was last known where the VMM doesn't say."""
        control = self._run.control
        if control is not None and self.state not in OVER:
            try:
                async with asyncio.timeout(_ASK_MEMORY):
                    self.memory_actual = await control.memory()
            except (VMBusError, TimeoutError) as error:
                log.debug("VM %s: its memory is not known: %s", self.identity.name, error)
        return self.memory_actual

    def open_console(self) -> int:
        """A stream socket joined to the console, the caller's to close. Raises InvalidState."""
        if self.state in OVER:
            raise InvalidState(f"a VM that is {self.state} has no console; its log can be opened")
        return self._console.attach().detach()

    def open_log(self) -> int:
        """A read-only descriptor of the console's log, the caller's to close."""
        return self._console.open_log()

    # Life

    async def _live(self) -> None:
        """From Start to death: the only place that learns how a VMM began and how it ended."""
        words = ""
        try:
            words = await self._begin()
        except OSError as error:
            words = f"could not be started: {error.strerror or error}"
        except Exception:
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
        if not await self._run.spawn(launch):
            return "ended before it was started"
        self.config.close()
        self._change(pid=self._run.pid)
        words = await self._run.until_it_answers(self._settings.start_timeout)
        if self._run.control is not None:
            self._run.control.watch_memory(lambda size: self._change(memory_actual=size))
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
        said = ending.words or words or _obituary(ending.status)
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
        self.config.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._call(self.on_death, self)

    # Helpers

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

    def _answering(self) -> Control:
        assert self._run.control is not None
        return self._run.control

    async def _ask(self, event: Event, request: Callable[[Control], Awaitable[None]]) -> None:
        """Ask the VMM for what an event says, if the state still allows it, then tell of it."""
        async with self._turn:
            after(self.state, event)
            await request(self._answering())
            self._change(event)

    async def _let_it_hear(self, control: Control) -> None:
        """A guest that is suspended, or about to be, would never learn that it is to end."""
        async with self._turn:
            if self._halted:
                await self._obeyed(control.resume())

    async def _obeyed(self, request: Awaitable[None]) -> bool:
        try:
            await request
            return True
        except VMBusError as error:
            log.info("VM %s: its VMM does not do as it is asked: %s", self.identity.name, error)
        except Exception:
            log.exception("VM %s: internal error", self.identity.name)
        return False

    async def _end_by_force(self, reason: Reason) -> None:
        self._killed_for = self._killed_for or reason
        try:
            async with asyncio.timeout(_GRACE):
                await self._obeyed(self._answering().quit())
                await self._gone.wait()
        except TimeoutError:
            await self.kill(reason)


def _obituary(status: int) -> str:
    """What to say of a VMM that said nothing itself."""
    if status == 0:
        return ""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _now() -> int:
    return time.time_ns() // 1000
