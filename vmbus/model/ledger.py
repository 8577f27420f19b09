"""What is known of one VM: changed in one place, written down, and only then told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import VMBusError
from ..guest.report import Payload
from ..reasons import Reason
from ..spec import VMConfig
from ..vmm.run import Trace
from .identity import Identity
from .record import Record
from .state import ALIVE, OVER, Event, State, after
from .surroundings import Surroundings

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: What is written down, besides what never changes.
_WRITTEN = frozenset(Record.model_fields) - {
    *("version", "id", "name", "cid", "requester", "config", "vmm", "kvm", "vsock")
}
#: What is written down, or is neither, but nobody is told.
_SILENT = frozenset({"traces", "asked_for", "killed_for", "halted", "ends_by", "ready_by"})


class Ledger:
    """The facts of one VM. Timestamps are microseconds since the epoch, 0 before; memory in bytes.

    kvm: whether KVM is used. vsock: whether its guest gets a vsock.
    """

    def __init__(
        self,
        identity: Identity,
        config: VMConfig,
        vmm: str,
        surroundings: Surroundings,
        *,
        kvm: bool,
        vsock: bool,
    ) -> None:
        self.identity = identity
        self.config = config
        self.vmm = vmm
        self.kvm = kvm
        self.vsock = vsock
        self.state = State.NOT_STARTED
        self.traces: list[Trace] = []
        self.created = now()
        self.started = 0
        self.died = 0
        self.reason: Reason | None = None
        self.status = 0
        self.last_words = ""
        self.memory_actual = 0
        #: What it was asked to end for, and what it was, or was about to be, killed for.
        self.asked_for: Reason | None = None
        self.killed_for: Reason | None = None
        #: Whether its vCPUs were told to stop: also where no answer came, since it may do it later.
        self.halted = False
        #: When a Stop is out of time, in seconds since boot.
        self.ends_by = 0.0
        #: What its guest reported: how far it is, its exit status (-1 before), and how it puts it.
        self.payload = Payload.NONE
        self.payload_status = -1
        self.status_text = ""
        #: When a guest that isn't ready hangs, by the clock of the event loop; 0: never.
        self.ready_by = 0.0
        self._around = surroundings

    @property
    def pid(self) -> int:
        """The VMM's process, 0 when there is none."""
        return self.traces[0].pid if self.traces and self.alive else 0

    @property
    def alive(self) -> bool:
        """Whether a VMM runs for it, or is about to."""
        return self.state in ALIVE

    @property
    def over(self) -> bool:
        """Whether it has ended, and so will never run again."""
        return self.state in OVER

    def write(self) -> None:
        """Write all of it down. Raises VMBusError."""
        identity = self.identity
        record = Record.model_construct(
            id=identity.id,
            name=identity.name,
            cid=identity.cid,
            requester=identity.requester,
            config=self.config,
            vmm=self.vmm,
            kvm=self.kvm,
            vsock=self.vsock,
            **{name: getattr(self, name) for name in _WRITTEN},
        )
        try:
            self._around.store.save(record)
        except OSError as error:
            raise VMBusError(f"the VM can't be written down: {error.strerror}") from error

    def read(self, record: Record) -> None:
        """Take over what was written down."""
        for name in _WRITTEN:
            setattr(self, name, getattr(record, name))
        if self.alive and self.started:
            self.memory_actual = self.config.memory_mib << 20

    def _change(self, event: Event | None = None, *, firm: bool = False, **values: Any) -> None:
        """The one place where a VM changes. Raises InvalidState, with nothing changed.

        firm: raise VMBusError, with nothing changed, also where it can't be written down; else what
        is so is so, and told.
        """
        if event is not None:
            state = after(self.state, event)
            if state is not self.state:
                values = {"state": state, **values}
        before = {name: getattr(self, name) for name in values}
        pid = self.pid
        self.__dict__.update(values)
        if not _WRITTEN.isdisjoint(values):
            try:
                self.write()
            except VMBusError as error:
                if firm:
                    self.__dict__.update(before)
                    raise
                log.error("VM %s: %s", self.identity.name, error)
        told = [name for name in values if name not in _SILENT]
        if self.pid != pid:
            told.append("pid")
        if told:
            self._call(self._around.observer.changed, self, told)

    def _log(self, event: str, text: str) -> None:
        log.info("VM %s %s", self.identity.name, text, extra={"vm": self.identity, "event": event})

    def _call(self, function: Callable[..., _T], *args: Any) -> _T | None:
        """Call out of here: what fails there must not leave a VM neither alive nor dead."""
        try:
            return function(*args)
        except Exception:
            log.exception("VM %s: internal error", self.identity.name)
            return None


def now() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def since_boot() -> float:
    """Seconds since boot, by a clock that the next service can go by, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
