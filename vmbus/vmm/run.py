"""One run of a VMM: from the preparation of its command line to the last it said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import VMBusError
from ..reasons import Reason
from .base import Command, Control, Driver, Launch
from .process import Process

log = logging.getLogger(__name__)

#: The exit status of a VMM that could not be executed, as shells have it.
NOT_EXECUTED = 127
#: Seconds that a VMM which has hung up gets to end by itself.
_GRACE = 0.5


@dataclass(frozen=True, slots=True)
class Ending:
    """How a VMM ended: its status, what it said of that, and its last words.

    status: an exit code, or minus a signal; None where nobody knows.
    """

    status: int | None
    told: Reason | None
    words: str


@dataclass(frozen=True, slots=True)
class Trace:
    """By what a process is found again: its number, and when it began, in ticks since boot."""

    pid: int
    began: int


class Run:
    """A VMM and the programs beside it. `control` is there once it has answered."""

    def __init__(self, driver: Driver, launch: Launch) -> None:
        self.control: Control | None = None
        self._driver = driver
        self._launch = launch
        self._process: Process | None = None
        self._helpers: list[Process] = []
        self._killing = asyncio.Event()
        self._adopted = False

    @property
    def pid(self) -> int:
        """The VMM's process, 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def pidfd(self) -> int:
        """A descriptor of the VMM's process."""
        assert self._process is not None
        return self._process.pidfd

    @property
    def traces(self) -> list[Trace]:
        """The VMM, first, and the programs beside it."""
        found = [self._process] if self._process is not None else []
        return [Trace(each.pid, each.started) for each in (*found, *self._helpers)]

    def has_ended(self) -> bool:
        """Whether the VMM was there and has ended."""
        return self._process is not None and self._process.has_ended()

    def kill(self) -> bool:
        """End it at once, or before it is spawned. False if it had ended by itself."""
        if self._process is not None:
            return self._process.kill()
        self._killing.set()
        return True

    async def spawn(self, timeout: float, held: Callable[[], Awaitable[None]]) -> bool:
        """Start the VMM. False if it was killed before.

        held: awaited when the processes are there and not one of them has begun to run; they never
        do if it fails. Raises OSError, TimeoutError, or ValueError for a file that isn't what it
        was at Create.
        """
        command = await self._prepare(timeout)
        if command is None:
            return False
        with contextlib.closing(command):
            for number, helper in enumerate(command.helpers, 1):
                self._helpers.append(
                    Process.spawn(helper.argv, helper.inherit, self._stderr(number))
                )
            self._process = Process.spawn(command.argv, command.inherit, self._stderr(0))
        await held()
        for process in (*self._helpers, self._process):
            process.release()
        return True

    def adopt(self, traces: Sequence[Trace], pidfd: int | None) -> bool:
        """Take up what another of us spawned. False if nothing is left of the VMM.

        pidfd: a descriptor of the VMM, where one was kept; ours from now on.
        """
        self._adopted = True
        if not traces and pidfd is not None:
            os.close(pidfd)
        for number, trace in enumerate(traces):
            kept = None if number else pidfd
            process = Process.find(trace.pid, trace.began, self._stderr(number), kept)
            if number == 0:
                self._process = process
            elif process is not None:
                self._helpers.append(process)
        return self._process is not None

    def let_go(self) -> None:
        """Watch no more of it; what runs goes on."""
        for process in (*self._helpers, *([self._process] if self._process else [])):
            process.let_go()

    def _stderr(self, number: int) -> Path:
        return self._launch.directory / f"stderr.{number}"

    async def _prepare(self, timeout: float) -> Command | None:
        """Make the command, unless the run is killed before.

        In a thread, since files may have to be copied, from wherever they are. One that hangs there
        is left behind: what it makes, if it ever does, is closed at once.
        """
        preparing = asyncio.ensure_future(asyncio.to_thread(self._driver.prepare, self._launch))
        killing = asyncio.ensure_future(self._killing.wait())
        either: set[asyncio.Future[Any]] = {preparing, killing}
        try:
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            preparing.add_done_callback(_close_command)
            raise
        finally:
            killing.cancel()
        if preparing.done() and not self._killing.is_set():
            return preparing.result()
        preparing.add_done_callback(_close_command)
        if self._killing.is_set():
            return None
        raise TimeoutError(f"its files could not be made ready in {timeout:g} s")

    async def until_it_answers(self, timeout: float | None) -> str:
        """Wait for the first answer, or the end. Returns why neither came, once it is killed.

        timeout: in seconds; None: a VMM that runs already may take as long as it likes.
        """
        assert self._process is not None
        answer = asyncio.ensure_future(self._driver.connect(self._launch))
        either: set[asyncio.Future[Any]] = {answer, self._process.exited}
        try:
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if self._process.exited.done():
                # What it answered before it ended may not have been read yet.
                await asyncio.wait({answer}, timeout=_GRACE)
        finally:
            unanswered = not answer.done()
            if unanswered:
                answer.cancel()
                await asyncio.wait({answer})
        if unanswered:
            return f"did not answer in {timeout or 0:g} s" if self.kill() else ""
        # A connection may also give itself up, without having been told to.
        failure = asyncio.CancelledError() if answer.cancelled() else answer.exception()
        if failure is None:
            self.control = answer.result()
            return ""
        if not isinstance(failure, VMBusError):
            log.error("connecting to %s failed", self._driver.name, exc_info=failure)
        # A VMM hangs up before it ends, and its own last words are better than ours.
        await asyncio.wait({self._process.exited}, timeout=_GRACE)
        if timeout is not None:
            self.kill()
        return str(failure) if isinstance(failure, VMBusError) else "internal error"

    async def ends(self) -> Ending:
        """Wait for the end of it all."""
        status: int | None
        if self._process is not None:
            status = await asyncio.shield(self._process.exited)
        elif self._adopted:
            status = None
        else:
            status = -signal.SIGKILL if self._killing.is_set() else NOT_EXECUTED
        for helper in self._helpers:
            helper.kill()
        if self._helpers:
            # Their last words count too; but one that a file system holds up holds up nothing.
            await asyncio.wait({helper.exited for helper in self._helpers}, timeout=_GRACE)
        told, words = None, ""
        try:
            if self.control is not None:
                told = await self.control.aclose()
            stderr = self._process.stderr_tail() if self._process is not None else ""
            words = self._driver.last_words(stderr) or self._words_of_helpers()
            if status is not None:
                told = told or self._driver.told_by(status, stderr)
        except Exception:
            # However a driver fails, its VM is dead and has to be told so.
            log.exception("the end of a VM could not be asked for")
        return Ending(status, told, words)

    def _words_of_helpers(self) -> str:
        for helper in self._helpers:
            if words := helper.stderr_tail().strip():
                return words.splitlines()[-1]
        return ""


def _close_command(preparing: asyncio.Future[Command]) -> None:
    if not preparing.cancelled() and preparing.exception() is None:
        preparing.result().close()
