"""All VMs: their ids, CIDs and names, and the directory that their files are in."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ..errors import InvalidState, LimitExceeded, NameExists, NoSuchVM, VMBusError
from ..files import FilePolicy
from ..guest.report import Report
from ..guest.vsock import Listener
from ..reasons import Reason
from ..spec import VMConfig, parse_config
from ..vmm.base import Driver
from ..vmm.host import Host
from .identity import Identity, Requester
from .limits import Limits, Shares
from .machine import Machine
from .record import Record
from .state import State
from .surroundings import Surroundings

log = logging.getLogger(__name__)

#: Seconds that a VM which is being started has to get under way when the service ends.
_LAST_STARTS = 2.0
FIRST_CID = 2048
LAST_CID = 65535
#: What the socket by which guests report is kept as, for the next service.
_LISTENER = "notify-vsock"


class CIDPool:
    """Context ids. A freed one goes to the end of the line, so it is reused as late as can be."""

    def __init__(self, first: int = FIRST_CID, last: int = LAST_CID) -> None:
        self._first = first
        self._last = last
        self._fresh = iter(range(first, last + 1))
        self._freed: deque[int] = deque()
        #: The last that was taken for the first time.
        self.reached = first - 1

    def go_on(self, reached: int, used: Collection[int]) -> None:
        """Go on where another pool had got to, of whose CIDs `used` are not free."""
        self.reached = min(max(reached, self.reached), self._last)
        self._fresh = iter(range(self.reached + 1, self._last + 1))
        self._freed = deque(cid for cid in range(self._first, self.reached + 1) if cid not in used)

    def take(self) -> int:
        """The next CID. Raises LimitExceeded when all are in use."""
        cid = next(self._fresh, None)
        if cid is not None:
            self.reached = cid
            return cid
        if self._freed:
            return self._freed.popleft()
        raise LimitExceeded(f"there can be no more than {self._last - self._first + 1} VMs")

    def free(self, cid: int) -> None:
        self._freed.append(cid)


class Registry:
    """The VMs that exist. `image_directories` None: files may be anywhere."""

    def __init__(
        self,
        surroundings: Surroundings,
        host: Host,
        limits: Limits,
        *,
        image_directories: tuple[Path, ...] | None,
    ) -> None:
        self._around = surroundings
        self._host = host
        self._limits = limits
        self._closing = False
        self._ending: set[asyncio.Task[None]] = set()
        self._image_directories = image_directories
        self._machines: dict[int, Machine] = {}
        self._by_name: dict[str, Machine] = {}
        self._by_cid: dict[int, Machine] = {}
        self._cids = CIDPool()
        self._last_id = 0
        self._listener = Listener(surroundings.vsock, self._hearer)

    def __len__(self) -> int:
        return len(self._machines)

    def __iter__(self) -> Iterator[Machine]:
        return iter(list(self._machines.values()))

    def get(self, id: int) -> Machine | None:
        return self._machines.get(id)

    def by_name(self, name: str) -> Machine:
        """Raises NoSuchVM."""
        try:
            return self._by_name[name]
        except KeyError:
            raise NoSuchVM(f"there is no VM with the name {name[:100]!r}") from None

    def by_cid(self, cid: int) -> Machine:
        """Raises NoSuchVM."""
        try:
            return self._by_cid[cid]
        except KeyError:
            raise NoSuchVM(f"there is no VM with the CID {cid}") from None

    def restore(self, bus: str, kept: MutableMapping[str, int]) -> None:
        """Take over the VMs of the service before us. Raises OSError.

        bus: which one we are on. kept: descriptors that outlived the other service, by name; those
        that are of no use are left in it.
        """
        listener = kept.pop(_LISTENER, None)
        if listener is not None:
            self._listener.adopt(listener)
        store = self._around.store
        records = store.open()
        if store.counters.bus != bus:
            # Another bus gives the same names to other connections.
            records = [_of_nobody(record) for record in records]
            for record in records:
                store.save(record)
        store.count(bus=bus)
        self._last_id = store.counters.last_id
        self._cids.go_on(store.counters.last_cid, {record.cid for record in records})
        for record in records:
            directory = store.directory_of(record.id)
            identity = Identity(record.id, record.name, record.cid, directory, record.requester)
            uid, files = record.requester.uid, len(record.config.files())
            vm = Machine(
                identity,
                record.config,
                self._host.driver_named(record.vmm),
                self._around,
                shares=Shares(self._limits, uid, files=files, firm=False),
                kvm=record.kvm,
                vsock=record.vsock,
            )
            vm.read(record)
            vm.take_over(kept)
            self._enter(vm)
            self._around.observer.restored(vm)

    def go_on(self) -> None:
        """Let the VMs that were restored live on, now that they can be told of."""
        self._listen()
        for vm in self:
            vm.go_on()
            if vm.state is State.STOPPING:
                self._own(vm.stop_again())

    def _listen(self) -> None:
        port = self._around.settings.notify_port
        try:
            if self._host.vsock:
                self._around.keep.store(_LISTENER, self._listener.open(port))
        except OSError as error:
            log.warning("guests can't report at vsock port %d: %s", port, error.strerror)

    def _hearer(self, cid: int) -> Callable[[Report], None] | None:
        vm = self._by_cid.get(cid)
        return vm.reported if vm is not None and vm.alive and vm.vsock else None

    async def create(self, raw: Mapping[str, object], requester: Requester) -> Machine:
        """Validate a config and make its VM, without starting anything.

        Raises InvalidConfig, NameExists, LimitExceeded or VMMUnavailable, with nothing changed.
        """
        self._check_open()
        files = FilePolicy(self._image_directories, requester.uid)
        problem = await self._host.kvm_problem()
        # In a thread, since the files may lie on a file system that takes its time.
        config, driver = await asyncio.to_thread(self._check, raw, files, problem)
        try:
            self._check_open()
            return self._add(config, requester, driver, kvm=not problem)
        except BaseException:
            config.close()
            raise

    def _check(
        self, raw: Mapping[str, object], files: FilePolicy, kvm_problem: str
    ) -> tuple[VMConfig, Driver]:
        """The config, and the driver of a VMM that can do all of it."""
        config = parse_config(raw, files)
        try:
            return config, self._host.driver(config, kvm_problem)
        except BaseException:
            config.close()
            raise

    def _add(self, config: VMConfig, requester: Requester, driver: Driver, *, kvm: bool) -> Machine:
        if config.name is not None and config.name in self._by_name:
            raise NameExists(f"there is a VM with the name {config.name!r} already")
        shares = Shares(self._limits, requester.uid, files=len(config.files()))
        try:
            identity = self._identity(config, requester)
        except BaseException:
            shares.forget()
            raise
        vsock = self._host.vsock if config.vsock is None else config.vsock
        vm = Machine(identity, config, driver, self._around, shares=shares, kvm=kvm, vsock=vsock)
        try:
            vm.write()
        except BaseException:
            vm.remove()
            self._cids.free(identity.cid)
            raise
        vm.holdings.store()
        self._enter(vm)
        log.info(
            "VM %s created for uid %d",
            identity.name,
            requester.uid,
            extra={"vm": identity, "event": "created"},
        )
        self._around.observer.added(vm)
        return vm

    def _enter(self, vm: Machine) -> None:
        vm.on_death = functools.partial(self._on_death, vm)
        identity = vm.identity
        self._machines[identity.id] = self._by_name[identity.name] = vm
        self._by_cid[identity.cid] = vm

    def _identity(self, config: VMConfig, requester: Requester) -> Identity:
        id = self._last_id + 1
        while config.name is None and f"vm-{id}" in self._by_name:
            id += 1
        cid = self._cids.take()
        store = self._around.store
        directory = store.directory_of(id)
        try:
            store.count(last_id=id, last_cid=self._cids.reached)
            self._last_id = id
            directory.mkdir(mode=0o700)
        except OSError as error:
            self._cids.free(cid)
            raise VMBusError(f"no directory for the VM: {error.strerror}") from error
        return Identity(id, config.name or f"vm-{id}", cid, directory, requester)

    def remove(self, vm: Machine) -> None:
        """Forget a VM and delete its files. Raises InvalidState if it is alive."""
        identity = vm.identity
        if identity.id not in self._machines:
            return
        vm.remove()
        del self._machines[identity.id]
        del self._by_name[identity.name], self._by_cid[identity.cid]
        self._cids.free(identity.cid)
        self._around.observer.removed(vm)

    def goes_with(self, vm: Machine, gone: asyncio.Future[None]) -> None:
        """Have a VM end when the connection that created it is gone."""
        gone.add_done_callback(lambda _: self.requester_left(vm))

    def requester_left(self, vm: Machine) -> None:
        """The connection that created a VM is gone; one that was to go with it does."""
        if vm.alive:
            self._own(vm.kill(Reason.REQUESTER_GONE))
        elif vm.reason is None and not vm.forgotten.done():
            # Never started, it would be nobody's.
            self.remove(vm)

    async def start(self, vm: Machine) -> None:
        """Start a VM. Raises what Machine.start does."""
        self._check_open()
        await vm.start()

    def _check_open(self) -> None:
        if self._closing:
            raise InvalidState("the service is shutting down")

    def _on_death(self, vm: Machine) -> None:
        if vm.config.collect == "on-death":
            self.remove(vm)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    @property
    def needs_us(self) -> bool:
        """Whether a VM would fare worse if the service ended until it is called again."""
        return any(vm.needs_service for vm in self)

    async def stop_all(self, timeout: float) -> None:
        """End all VMs at once, each in good order while there is time (s)."""
        async with asyncio.TaskGroup() as group:
            for vm in self:
                if vm.alive:
                    group.create_task(vm.stop(timeout, Reason.HOST_SHUTDOWN))

    def close(self) -> None:
        """No more VMs can be created or started."""
        self._closing = True

    async def let_go(self) -> None:
        """Have nothing to do with the VMs any more: they go on, and the next service finds them."""
        self._closing = True
        starting = [asyncio.create_task(vm.spawned.wait()) for vm in self if vm.alive]
        # A VMM that is not let through yet would never be.
        for tasks, grace in ((starting, _LAST_STARTS), (list(self._ending), 0)):
            if tasks:
                await asyncio.wait(tasks, timeout=grace)
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        self._listener.close()
        for vm in self:
            await vm.let_go()
        self._around.watch.close()


def _of_nobody(record: Record) -> Record:
    requester = dataclasses.replace(record.requester, connection="")
    return record.model_copy(update={"requester": requester})
