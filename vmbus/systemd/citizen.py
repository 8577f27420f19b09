"""The service as a citizen of a systemd machine: everything that systemd is told, and asks, in one.

Without systemd all of it does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

from ..bus.connection import Connection, RemoteError
from ..bus.wire import Message
from ..model.ledger import Ledger
from .logind import Inhibitor
from .notify import Manager, inherited
from .units import Bounds, Units, scope_name

log = logging.getLogger(__name__)


class Citizen:
    """What the daemon has of systemd: a place for descriptors, one for VMs, a lock on shutdowns.

    user: on a session bus VMs get scopes from the user's own manager; on the system bus they get
    them from vmbus-machined, since nobody but root may make any, and logind is there to be asked.
    """

    def __init__(self, connection: Connection, *, user: bool) -> None:
        self.keep = Manager.from_environment()
        self.placement = Scopes(Units(connection)) if user else NoScopes()
        self._connection = connection
        self._user = user
        self._inhibitor: Inhibitor | None = None
        self._ending: asyncio.Task[None] | None = None

    def on_signal(self, message: Message) -> None:
        """Take any signal of the connection."""
        self.placement.on_signal(message)
        if self._inhibitor is not None:
            self._inhibitor.on_signal(message)

    async def watch(self, end_vms: Callable[[], Awaitable[None]]) -> None:
        """Begin to listen. end_vms: awaited when the host is about to shut down."""
        try:
            await self.placement.watch()
            if not self._user:
                inhibitor = self._inhibitor = Inhibitor(
                    self._connection, lambda: self._end(inhibitor, end_vms)
                )
                await inhibitor.watch()
        except (RemoteError, OSError) as error:
            log.info("systemd can't be listened to: %s", error)

    def _end(self, inhibitor: Inhibitor, end_vms: Callable[[], Awaitable[None]]) -> None:
        async def end() -> None:
            try:
                await end_vms()
            finally:
                inhibitor.release()

        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(end(), name="host-shutdown")

    def inherited(self) -> dict[str, int]:
        """The descriptors that were kept for us, by name, from now on the caller's."""
        found = {}
        for name, fds in inherited().items():
            found[name] = fds.pop(0)
            for fd in fds:
                os.close(fd)
        return found

    def drop(self, kept: dict[str, int]) -> None:
        """Let go of what was kept and nobody wants."""
        for name, fd in kept.items():
            os.close(fd)
            with contextlib.suppress(ValueError):
                self.keep.forget(name)
        kept.clear()

    async def aclose(self) -> None:
        """Listen no more."""
        for task in (self._ending, *self.placement.tasks):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._inhibitor is not None:
            await self._inhibitor.aclose()
        self.keep.close()


class NoScopes:
    """VMs are put nowhere by us."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    async def watch(self) -> None:
        """Nothing to listen to."""

    def on_signal(self, message: Message) -> None:
        """Nothing to hear."""

    async def put(self, vm: Ledger, pids: Sequence[int]) -> None:
        """See Placement.put."""

    def clear(self, vm: Ledger) -> None:
        """See Placement.clear."""


class Scopes(NoScopes):
    """Each VM in a transient scope of its own."""

    def __init__(self, units: Units) -> None:
        super().__init__()
        self._units = units

    async def watch(self) -> None:
        """Begin to hear of scopes that are ready. Raises RemoteError or OSError."""
        await self._units.watch()

    def on_signal(self, message: Message) -> None:
        """Take any signal of the connection."""
        self._units.on_signal(message)

    async def put(self, vm: Ledger, pids: Sequence[int]) -> None:
        """See Placement.put."""
        if self._units.present:
            await self._units.scope(
                scope_name(vm.identity.id),
                f"Virtual machine {vm.identity.name}",
                pids,
                Bounds.of_vm(vm.config.memory_mib, vm.config.cpus),
            )

    def clear(self, vm: Ledger) -> None:
        """See Placement.clear."""
        if self._units.present and vm.traces:
            task = asyncio.create_task(self._units.stop(scope_name(vm.identity.id)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
