"""One run of a VMM: from the preparation of its command line to the last it said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from dataclasses import dataclass
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
    """How a VMM ended: its status, what it said of that, and its last words."""

    status: int
    told: Reason | None
    words: str


class Run:
    """A VMM and the programs beside it. `control` is there once it has answered."""

    def __init__(self, driver: Driver) -> None:
        self.control: Control | None = None
        self._driver = driver
        self._command: Command | None = None
        self._process: Process | None = None
        self._helpers: list[Process] = []
        self._killing = asyncio.Event()

    @property
    def pid(self) -> int:
        """The VMM's process, 0 when there is none."""
        return 0 if self._process is None else self._process.pid

    def kill(self) -> bool:
        """End it at once, or before it is spawned. False if it had ended by itself."""
        if self._process is not None:
            return self._process.kill()
        self._killing.set()
        return True

    async def spawn(self, launch: Launch, timeout: float) -> bool:
        """Start the VMM; `launch.console` is closed. False if it was killed before.

        Raises OSError, TimeoutError, or ValueError for a file that isn't what it was at Create.
        """
        try:
            self._command = await self._prepare(launch, timeout)
            if self._command is None:
                return False
            with contextlib.closing(self._command):
                for helper in self._command.helpers:
                    self._helpers.append(Process.spawn(helper.argv, helper.inherit))
                self._process = Process.spawn(self._command.argv, self._command.inherit)
                return True
        finally:
            os.close(launch.console)

    async def _prepare(self, launch: Launch, timeout: float) -> Command | None:
        """Make the command, unless the run is killed before.

        In a thread, since files may have to be copied, from wherever they are. One that hangs there
        is left behind: what it makes, if it ever does, is closed at once.
        """
        preparing = asyncio.ensure_future(asyncio.to_thread(self._driver.prepare, launch))
        killing = asyncio.ensure_future(self._killing.wait())
        either: set[asyncio.Future[Any]] = {preparing, killing}
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        killing.cancel()
        if preparing.done() and not self._killing.is_set():
            return preparing.result()
        preparing.add_done_callback(_close_command)
        if self._killing.is_set():
            return None
        raise TimeoutError(f"its files could not be made ready in {timeout:g} s")

    async def until_it_answers(self, timeout: float) -> str:
        """Wait for the first answer, or the end. Returns why neither came, once it is killed."""
        assert self._command is not None
        assert self._process is not None
        answer = asyncio.ensure_future(self._command.connect())
        either: set[asyncio.Future[object]] = {answer, self._process.exited}  # type: ignore[arg-type]
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self._process.exited.done():
            # What it answered before it ended may not have been read yet.
            await asyncio.wait({answer}, timeout=_GRACE)
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
            return f"did not answer in {timeout:g} s" if self.kill() else ""
        # A connection may also give itself up, without having been told to.
        failure = asyncio.CancelledError() if answer.cancelled() else answer.exception()
        if failure is None:
            self.control = answer.result()
            return ""
        if not isinstance(failure, VMBusError):
            log.error("connecting to %s failed", self._driver.name, exc_info=failure)
        # A VMM hangs up before it ends, and its own last words are better than ours.
        await asyncio.wait({self._process.exited}, timeout=_GRACE)
        self.kill()
        return str(failure) if isinstance(failure, VMBusError) else "internal error"

    async def ends(self) -> Ending:
        """Wait for the end of it all."""
        if self._process is None:
            status = -signal.SIGKILL if self._killing.is_set() else NOT_EXECUTED
        else:
            status = await self._process.exited
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
