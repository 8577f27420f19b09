"""A VM as its guest tells of it: how far its payload is, and whether it is ready in time."""

from __future__ import annotations

import asyncio
from typing import Any

from ..guest.report import Payload, Report
from ..reasons import Reason
from .ledger import Ledger
from .state import Event, State

#: Seconds between two texts of a guest's; of those that come faster only the last is told.
TEXT_PAUSE = 0.2


class Reported(Ledger):
    """The part of a VM that takes its guest's word, as far as that harms nobody else."""

    _text: str | None = None
    _pause: asyncio.TimerHandle | None = None
    _watched = 0.0

    def reported(self, report: Report) -> None:
        """The guest has said something of itself."""
        if not self.alive:
            return
        if report.status is not None:
            self._text = report.status
        elif report.error is not None and not (self._text or self.status_text):
            # It has no words of its own for that.
            self._text = report.error
        values: dict[str, Any] = {}
        for passed in report.passed:
            # Each is told, however quickly the next one came.
            if self.payload.then(passed) is not self.payload:
                self._change(payload=passed)
        payload = self.payload.then(report.payload)
        if payload is not self.payload:
            values["payload"] = payload
        if report.exit_status is not None and self.payload_status < 0:
            values["payload_status"] = report.exit_status
        if self._pause is None:
            values |= self._new_text()
        if values:
            self._change(**values)

    def _new_text(self) -> dict[str, Any]:
        """What changes by a text that waits to be told; the next has to wait for a while."""
        text, self._text = self._text, None
        if text is None or text == self.status_text:
            return {}
        self._pause = asyncio.get_running_loop().call_later(TEXT_PAUSE, self._tell_text)
        return {"status_text": text}

    def _tell_text(self) -> None:
        self._pause = None
        if values := self._new_text():
            self._change(**values)

    def _tell_last_text(self) -> None:
        """Have nothing wait to be told any more."""
        if self._pause is not None:
            self._pause.cancel()
        self._tell_text()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    # In time

    def _change(self, event: Event | None = None, *, firm: bool = False, **values: Any) -> None:
        """See Ledger._change. A guest whose vCPUs begin to run has all the time it gets."""
        if event is Event.ANSWERED:
            values["payload"] = self.payload.then(Payload.STARTING)
        if event in (Event.ANSWERED, Event.RESUME):
            timeout = self.config.ready_timeout_usec / 1e6
            now = asyncio.get_running_loop().time()
            values["ready_by"] = now + timeout if timeout else 0.0
        super()._change(event, firm=firm, **values)
        self._watch_readiness()

    def _watch_readiness(self) -> None:
        """Have a guest that isn't ready in time killed; one that stands still can't be ready."""
        waits = self.state is State.RUNNING and not self.payload.is_up
        by = self.ready_by if waits else 0.0
        if by != self._watched:
            self._watched = by
            self._around.watch.set(self.identity.id, by, lambda: self._kill_now(Reason.HANGUP))

    def _kill_now(self, reason: Reason) -> None:
        """Have the VMM end at once, and the VM die for that reason."""
        raise NotImplementedError
