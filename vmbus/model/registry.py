"""All VMs: their ids, CIDs and names, and the directory that their files are in."""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import InvalidState, LimitExceeded, NameExists, NoSuchVM, VMBusError
from ..files import FilePolicy
from ..reasons import Reason
from ..settings import Settings
from ..spec import VMConfig, parse_config
from ..vmm.base import Driver
from ..vmm.host import Host
from .identity import Identity, Observer, Requester
from .limits import Limits, Shares
from .machine import Machine

FIRST_CID = 2048
LAST_CID = 65535


class CIDPool:
    """Context ids. A freed one goes to the end of the line, so it is reused as late as can be."""

    def __init__(self, first: int = FIRST_CID, last: int = LAST_CID) -> None:
        self._most = last - first + 1
        self._fresh = iter(range(first, last + 1))
        self._freed: deque[int] = deque()

    def take(self) -> int:
        """The next CID. Raises LimitExceeded when all are in use."""
        cid = next(self._fresh, None)
        if cid is not None:
            return cid
        if self._freed:
            return self._freed.popleft()
        raise LimitExceeded(f"there can be no more than {self._most} VMs")

    def free(self, cid: int) -> None:
        self._freed.append(cid)


class Registry:
    """The VMs that exist. `image_directories` None: files may be anywhere."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        host: Host,
        observer: Observer,
        limits: Limits,
        *,
        image_directories: tuple[Path, ...] | None,
    ) -> None:
        self._directory = directory / "vm"
        self._settings = settings
        self._host = host
        self._observer = observer
        self._limits = limits
        self._closing = False
        self._ending: set[asyncio.Task[None]] = set()
        self._image_directories = image_directories
        self._machines: dict[int, Machine] = {}
        self._by_name: dict[str, Machine] = {}
        self._by_cid: dict[int, Machine] = {}
        self._cids = CIDPool()
        self._last_id = 0

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

    def prepare_directory(self) -> None:
        """Make the directory of all VMs, without what a former run left. Raises OSError."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True)

    async def create(self, raw: Mapping[str, object], requester: Requester) -> Machine:
        """Validate a config and make its VM, without starting anything.

        Raises InvalidConfig, NameExists, LimitExceeded or VMMUnavailable, with nothing changed.
        """
        self._check_open()
        # In a thread, since the files may lie on a file system that takes its time.
        files = FilePolicy(self._image_directories, requester.uid)
        config = await asyncio.to_thread(parse_config, raw, files)
        try:
            driver = await self._host.driver(config)
            kvm = not await self._host.kvm_problem()
            self._check_open()
            return self._add(config, requester, driver, kvm=kvm)
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
        vm = Machine(
            identity,
            config,
            driver,
            self._settings,
            self._observer,
            shares=shares,
            kvm=kvm,
            vsock=vsock,
        )
        vm.on_death = self._on_death
        self._machines[identity.id] = self._by_name[identity.name] = vm
        self._by_cid[identity.cid] = vm
        self._observer.added(vm)
        return vm

    def _identity(self, config: VMConfig, requester: Requester) -> Identity:
        self._last_id += 1
        while config.name is None and f"vm-{self._last_id}" in self._by_name:
            self._last_id += 1
        id = self._last_id
        cid = self._cids.take()
        directory = self._directory / str(id)
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            self._cids.free(cid)
            raise VMBusError(f"no directory for the VM: {error.strerror}") from error
        return Identity(id, config.name or f"vm-{id}", cid, directory, requester)

    def remove(self, vm: Machine) -> None:
        """Forget a VM and delete its files. Raises InvalidState if it is alive."""
        vm.remove()
        identity = vm.identity
        if self._machines.pop(identity.id, None) is None:
            return
        del self._by_name[identity.name], self._by_cid[identity.cid]
        self._cids.free(identity.cid)
        self._observer.removed(vm)

    def requester_left(self, vm: Machine) -> None:
        """The connection that created a VM is gone; one that was to go with it does."""
        if vm.alive:
            task = asyncio.create_task(vm.kill(Reason.REQUESTER_GONE))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
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

    async def shutdown(self) -> None:
        """End all VMs at once, each in good order while there is time. No more can be started."""
        self._closing = True
        async with asyncio.TaskGroup() as group:
            for vm in self:
                if vm.alive:
                    timeout = self._settings.shutdown_timeout
                    group.create_task(vm.stop(timeout, Reason.HOST_SHUTDOWN))
