"""Each VM in a unit of its own: a transient scope, which bounds it, and ends with all its children.

Who may start a transient unit is as good as root: whatever its name, another service can come along
with it. So a system's manager takes `scope` from root alone, and the service, which isn't, leaves
it to `machined`. The manager of a user takes everything from that user.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..bus.connection import Connection, RemoteError
from ..bus.wire import Variant, WireError
from .peer import Peer

log = logging.getLogger(__name__)

SYSTEMD = "org.freedesktop.systemd1"
SLICE = "vmbus.slice"
_MANAGER = (SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager")
#: What a VMM may take, in bytes, besides its guest's memory and an eighth of that.
_ALLOWANCE = 512 << 20
#: Seconds that a job may take. Stopping takes what the processes take to end, or be killed.
_JOB_TIMEOUT = 20.0
_STOP_TIMEOUT_USEC = 5_000_000
#: At shutdown the service comes first, since it ends its VMs in good order; the scopes are stopped
#: after it, and so are to be ordered before it.
_BEFORE = ["vmbusd.service"]
_ABSENT = ("ServiceUnknown", "NameHasNoOwner", "Disconnected", "NoServer")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the processes of a scope can take together; None: no bound.

    memory: bytes. cpu_weight: their share where CPUs are scarce, 1 to 10000, 100 is usual.
    cpu_quota: CPUs that they can keep busy.
    """

    memory: int | None = None
    cpu_weight: int | None = None
    cpu_quota: float | None = None
    tasks: int | None = None

    @classmethod
    def of_vm(cls, memory_mib: int, cpus: int) -> Bounds:
        """What fits a VM: its share of scarce CPUs grows with those that it has."""
        memory = memory_mib << 20
        return cls(memory=memory + memory // 8 + _ALLOWANCE, cpu_weight=100 * max(1, cpus))

    def properties(self) -> Iterator[list[Any]]:
        """Each as systemd has it."""
        if self.memory is not None:
            yield ["MemoryMax", Variant("t", self.memory)]
        if self.cpu_weight is not None:
            yield ["CPUWeight", Variant("t", max(1, min(10_000, self.cpu_weight)))]
        if self.cpu_quota is not None:
            yield ["CPUQuotaPerSecUSec", Variant("t", int(self.cpu_quota * 1_000_000))]
        if self.tasks is not None:
            yield ["TasksMax", Variant("t", self.tasks)]


def scope_name(id: int) -> str:
    """The unit that the VM of this id is in."""
    return f"vmbus-{id}.scope"


class Units:
    """Scopes at the service manager of one bus. Where there is none, or it refuses, there are none.

    `on_signal` has to get every signal of the connection, and `watch` to be called first.
    """

    def __init__(self, connection: Connection) -> None:
        self._manager = Peer(connection, _MANAGER, self._on_job)
        self._calls = 0
        self._jobs: dict[str, asyncio.Future[str]] = {}
        self._said: set[str] = set()
        self.on_signal = self._manager.take

    @property
    def present(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._manager.owner)

    async def watch(self) -> None:
        """Begin to hear of jobs that end. Raises RemoteError or OSError."""
        await self._manager.watch({"JobRemoved": "uoss"})

    def _on_job(self, _: str, body: Sequence[Any]) -> None:
        _, path, _, result = body
        # It may come in one go with the reply that names the job, before its caller can look.
        if self._calls and not self._job(path).done():
            self._job(path).set_result(result)

    async def scope(
        self, name: str, description: str, pids: Sequence[int], bounds: Bounds | None = None
    ) -> bool:
        """Move processes into a new scope. False if there is none, and the log says why.

        A scope of that name that exists already is left as it is: False, and no word of it.
        """
        properties = [
            ["PIDs", Variant("au", list(pids))],
            ["Description", Variant("s", description)],
            ["Slice", Variant("s", SLICE)],
            ["Before", Variant("as", _BEFORE)],
            ["CollectMode", Variant("s", "inactive-or-failed")],
            ["TimeoutStopUSec", Variant("t", _STOP_TIMEOUT_USEC)],
            *(bounds or Bounds()).properties(),
        ]
        body = [name, "fail", properties, []]
        return await self._run("StartTransientUnit", "ssa(sv)a(sa(sv))", body)

    async def stop(self, name: str) -> None:
        """End whatever is left in a scope, children and all; return when nothing is."""
        await self._run("StopUnit", "ss", [name, "replace"])

    async def kill(self, name: str, signal: int) -> None:
        """Send a signal to every process in a scope."""
        with self._explained(f"{name} could not be killed"):
            await self._manager.call("KillUnit", "ssi", [name, "all", signal])

    async def _run(self, member: str, signature: str, body: Sequence[Any]) -> bool:
        """Call a method that gives a job, and see the job through."""
        self._calls += 1
        try:
            with self._explained(f"{member} of {body[0]} failed"):
                async with asyncio.timeout(_JOB_TIMEOUT):
                    (path,) = (await self._manager.call(member, signature, body)).body
                    result = await self._job(path)
                if result == "done":
                    return True
                log.info("%s of %s ended as '%s'", member, body[0], result)
            return False
        finally:
            self._calls -= 1
            if not self._calls:
                self._jobs.clear()

    def _job(self, path: str) -> asyncio.Future[str]:
        if path not in self._jobs:
            self._jobs[path] = asyncio.get_running_loop().create_future()
        return self._jobs[path]

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn what a call can raise into a line of the log; what is so for every VM comes once."""
        try:
            yield
        except RemoteError as error:
            kind = error.name.rpartition(".")[2]
            if kind in ("UnitExists", "NoSuchUnit"):
                return  # it is as it is to be
            if kind in _ABSENT:
                self._say_once("there is no systemd on the bus; VMs get no units of their own")
            elif kind in ("AccessDenied", "InteractiveAuthorizationRequired"):
                self._say_once(f"systemd does not let this user manage units: {error.text}")
            else:
                log.info("%s: %s", what, error.text)
        except (OSError, WireError) as error:  # TimeoutError is an OSError
            log.info("%s: %s", what, str(error) or "systemd took too long")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("%s", text)
