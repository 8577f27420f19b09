"""One VM: its config, its state, its process, and what can be done with it.

What can be decided is decided before the first await of each verb, so that of two calls at once
exactly one wins; everything that follows from a decision happens in one task, `_live`, from Start
to death. Nothing here knows of the bus: an observer is told, and tells everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import InvalidState, NoSuchVM, StartFailed, VMBusError
from ..guest.console import BoundedLog, Console
from ..reasons import Reason, death_reason
from ..settings import Settings
from ..spec import VMConfig
from ..vmm.base import Command, Control, Driver, Launch
from ..vmm.process import Process
from .state import ALIVE, OVER, Event, State, after

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: The exit status of a VMM that could not be executed, as shells have it.
NOT_EXECUTED = 127
#: Seconds that a VMM which is out of time gets to end by its own stop before SIGKILL.
_GRACE = 0.5


@dataclass(frozen=True, slots=True)
class Requester:
    """Who called Create, as the bus vouches for it. `sid` is empty where there is no label."""

    uid: int
    pid: int = 0
    sid: str = ""


class Observer(Protocol):
    """Who is told of changes, in the order in which they happen."""

    def added(self, vm: Machine) -> None:
        """The VM exists."""

    def changed(self, vm: Machine, names: Sequence[str]) -> None:
        """These attributes of the VM have new values."""

    def died(self, vm: Machine) -> None:
        """The VM is dead or failed, and `changed` has said so."""

    def removed(self, vm: Machine) -> None:
        """The VM exists no more."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a VM is called, for as long as it exists."""

    id: int
    name: str
    cid: int
    directory: Path
    requester: Requester


class Machine:
    """One VM. Timestamps are microseconds since the epoch, 0 before."""

    def __init__(
        self,
        identity: Identity,
        config: VMConfig,
        driver: Driver,
        settings: Settings,
        observer: Observer,
        *,
        kvm: bool,
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
        self._driver = driver
        self._settings = settings
        self._observer = observer
        self._kvm = kvm
        self._temporary = identity.directory / "tmp"
        self._log = BoundedLog(identity.directory / "console.log", settings.console_log_bytes)
        self._console = Console(self._log)
        self._process: Process | None = None
        self._command: Command | None = None
        self._control: Control | None = None
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

    # Verbs

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
                assert self._control is not None
                if not await self._obeyed(self._control.power_button()):
                    await self._obeyed(self._control.quit())
                await self._gone.wait()
        except TimeoutError:
            await self._end_by_force(Reason.KILLED if reason is Reason.STOPPED else reason)

    async def kill(self, reason: Reason = Reason.KILLED) -> None:
        """End the VMM at once; return when the VM is dead. Nothing to do when it isn't alive."""
        if self.state not in ALIVE:
            return
        if self._process is None or self._process.kill():
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
        status, words = NOT_EXECUTED, ""
        try:
            self._process = await self._spawn()
            self.config.close()
            self._change(pid=self._process.pid)
            words = await self._until_it_answers(self._process)
            status = await self._process.exited
        except _KilledEarly:
            status = -signal.SIGKILL
        except OSError as error:
            words = f"could not be started: {error.strerror or error}"
        except Exception:
            log.exception("VM %s: internal error", self.identity.name)
            words = "internal error"
            if self._process is not None:
                self._process.kill()
                status = await self._process.exited
        await self._end(status, words)

    async def _spawn(self) -> Process:
        self._temporary.mkdir(mode=0o700)
        launch = Launch(
            name=self.identity.name,
            cid=self.identity.cid,
            config=self.config,
            directory=self._temporary,
            console=self._console.plug().detach(),
            kvm=self._kvm,
        )
        try:
            # In a thread, since files may have to be copied, from wherever they are.
            self._command = await asyncio.to_thread(self._driver.prepare, launch)
            with contextlib.closing(self._command):
                if self._killed_for is not None:
                    raise _KilledEarly
                return Process.spawn(self._command.argv, self._command.inherit)
        finally:
            os.close(launch.console)

    async def _until_it_answers(self, process: Process) -> str:
        """Wait for the VMM's first answer, or its end. Returns why it never answered, if so."""
        assert self._command is not None
        answer = asyncio.ensure_future(self._command.connect())
        either: set[asyncio.Future[Any]] = {answer, process.exited}
        await asyncio.wait(
            either,
            timeout=self._settings.start_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
            if process.exited.done():
                return ""
            process.kill()
            return f"did not answer in {self._settings.start_timeout:g} s"
        try:
            self._control = answer.result()
        except (Exception, asyncio.CancelledError) as error:
            # A VMM hangs up before it ends, and its own last words are better than ours.
            await asyncio.wait({process.exited}, timeout=_GRACE)
            process.kill()
            if isinstance(error, VMBusError):
                return str(error)
            log.exception("VM %s: internal error", self.identity.name)
            return "internal error"
        if not process.exited.done():
            self._change(Event.ANSWERED, started=_now())
            self._answered.set()
        return ""

    async def _end(self, status: int, words: str) -> None:
        """The VMM is gone: find out why, tell everybody in the promised order, clean up."""
        told = await self._told()
        stderr = self._process.stderr_tail() if self._process is not None else ""
        self._console.close()
        reason = death_reason(
            status,
            told=told or self._call(self._driver.told_by, status, stderr),
            ran=self.started > 0,
            asked_for=self._asked_for,
            killed_for=self._killed_for,
        )
        self._change(
            Event.EXITED,
            reason=reason,
            status=status,
            pid=0,
            died=_now(),
            last_words=self._call(self._driver.last_words, stderr) or words or _obituary(status),
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
        assert self._control is not None
        self._killed_for = self._killed_for or reason
        try:
            async with asyncio.timeout(_GRACE):
                await self._obeyed(self._control.quit())
                await self._gone.wait()
        except TimeoutError:
            await self.kill(reason)

    async def _told(self) -> Reason | None:
        try:
            return None if self._control is None else await self._control.aclose()
        except Exception:
            log.exception("VM %s: its end could not be asked for", self.identity.name)
            return None


class _KilledEarly(Exception):
    """Kill came while the VMM was being made ready."""


def _obituary(status: int) -> str:
    """What to say of a VMM that said nothing itself."""
    if status == 0:
        return ""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _now() -> int:
    return time.time_ns() // 1000
