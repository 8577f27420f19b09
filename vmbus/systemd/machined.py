"""vmbus-machined: what only root can do for the VMs of a system's vmbusd, in a program of its own.

Each VM that runs gets a scope, and a line in `machinectl list`. The program is a client of the
service like any other, and nothing waits for it. What it is told it doesn't trust: it touches no
process but those of the user whom the service runs as.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import sys
from collections.abc import Iterator
from pathlib import Path

from ..bus.connection import Connection, RemoteError, bus_address
from ..bus.contract import BUS_NAME
from ..bus.wire import Message, WireError
from ..calls import close_all
from ..client import VMBus
from ..errors import VMBusError
from ..events import Added, Changed, Died, Event, EventsLost, Removed, ServiceChanged, Snapshot
from .journal import journal_handler
from .notify import Manager
from .units import Bounds, Units, scope_name

log = logging.getLogger("vmbus-machined")

MACHINED = "org.freedesktop.machine1"
_MAX_NAME = 64


class Machines:
    """The VMs of the service: each in a scope, and known to systemd-machined where there is one."""

    def __init__(self, connection: Connection, units: Units) -> None:
        self._connection = connection
        self._units = units
        self._known: dict[str, Snapshot] = {}
        self._scopes: dict[str, str] = {}
        self._refused = False

    async def look(self, bus: VMBus) -> None:
        """Take up the VMs that run already."""
        self._known = {vm.path: vm for vm in await bus.vms()}
        for vm in self._known.values():
            if vm.pid:
                await self._show(vm, vm.pid)

    async def on_event(self, event: Event, bus: VMBus) -> None:
        """Do what an event asks for."""
        match event:
            case ServiceChanged(running=True):
                await self.look(bus)
            case Added(path, vm):
                self._known[path] = vm
            case Changed(path, {"pid": int(pid)}) if pid and path in self._known:
                await self._show(self._known[path], pid)
            case Died(path) if path in self._scopes:
                await self._units.stop(self._scopes.pop(path))
            case Removed(path):
                self._known.pop(path, None)

    async def _show(self, vm: Snapshot, pid: int) -> None:
        (uid,) = await self._connection.call_bus("GetConnectionUnixUser", "s", [BUS_NAME])
        with _process_of(uid, pid) as process:
            if process is None:
                log.warning("VM %s: process %d isn't there, or isn't the service's", vm.name, pid)
                return
            scope = scope_name(vm.id)
            await self._units.scope(
                scope, f"Virtual machine {vm.name}", [pid], Bounds.of_vm(vm.memory_mib, vm.cpus)
            )
            # systemd went by the number. What has it now is the VMM only if that runs still; else
            # it is left alone, whatever unit it is in.
            if not _in_unit(pid, scope) or _has_ended(process):
                return
            self._scopes[vm.path] = scope
            # Without a unit of its own the machine would be the service, and be terminated with it.
            await self._register(vm, pid)

    async def _register(self, vm: Snapshot, pid: int) -> None:
        body = [machine_name(vm), b"", "vmbus", "vm", pid, ""]
        target = (MACHINED, "/org/freedesktop/machine1", f"{MACHINED}.Manager")
        try:
            await self._connection.call(*target, "RegisterMachine", "sayssus", body)
        except (RemoteError, OSError, WireError) as error:
            again = isinstance(error, RemoteError) and error.name.endswith(".MachineExists")
            if not again and not self._refused:
                self._refused = True
                log.info("machinectl won't list VMs: %s", error)


def machine_name(vm: Snapshot) -> str:
    """What machinectl calls a VM: a host name that no container is likely to want, and unique."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", vm.name)
    return f"vmbus-{vm.id}-{plain}"[:_MAX_NAME].rstrip("-")


@contextlib.contextmanager
def _process_of(uid: int, pid: int) -> Iterator[int | None]:
    """A pidfd of a process, or None if there is no such process of that user, and of no other."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError, ValueError):
        yield None
        return
    try:
        theirs = _uids(pid) == {uid} and not _has_ended(pidfd)
        yield pidfd if theirs else None
    finally:
        os.close(pidfd)


def _uids(pid: int) -> set[int]:
    """All four of a process: real, effective, saved, and the file system's."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("Uid:"):
                return {int(uid) for uid in line.split()[1:]}
    return set()


def _in_unit(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        return any(line.endswith(f"/{name}") for line in lines)
    return False


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


async def serve(manager: Manager) -> None:
    """Serve until the connection to the bus ends. Raises OSError, RemoteError, EventsLost, …"""
    connection = await Connection.open(bus_address(user=False))
    async with contextlib.aclosing(connection):
        units = Units(connection)

        def handle(message: Message) -> None:
            close_all(message.fds)
            units.on_signal(message)

        connection.handler = handle
        await units.watch()
        machines = Machines(connection, units)
        async with VMBus.connect() as bus, await bus.events() as events:
            if await bus.running():
                await machines.look(bus)
            manager.ready()
            async for event in events:
                # A service that went away meanwhile comes back with an event.
                with contextlib.suppress(RemoteError, VMBusError):
                    await machines.on_event(event, bus)
    raise ConnectionError("the connection to the bus is closed")


def main() -> None:
    """Run it as a program."""
    handler = journal_handler("vmbus-machined") or logging.StreamHandler(sys.stderr)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(serve(Manager.from_environment()))
    except (RemoteError, OSError, VMBusError, EventsLost) as error:
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
