"""Stand-ins for what a VM works with: a VMM that is a shell script, its driver, and an observer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import VMMUnavailable
from vmbus.files import FilePolicy
from vmbus.model.identity import Identity, Observer, Requester
from vmbus.model.limits import Limits, Shares
from vmbus.model.machine import Machine
from vmbus.model.record import Store
from vmbus.model.registry import Registry
from vmbus.model.surroundings import Keep, NoKeep, Surroundings
from vmbus.reasons import Reason
from vmbus.settings import Settings
from vmbus.spec import VMConfig, parse_config
from vmbus.vmm.base import Command, Control, Driver, Helper, Launch
from vmbus.vmm.host import Host

#: A VMM that ends with the status which its control tells it.
OBEDIENT = 'read -r status <"$1"; exit "$status"'
#: A VMM that ends by a signal only.
DEAF = "exec sleep 1000"
DEADLINE = 20.0


class FakeControl:
    """The control of a VMM that does as its driver says."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.requests: list[str] = []
        self.closed = 0
        self.memory_changed: Callable[[int], None] = lambda _: None

    def exit(self, status: int) -> None:
        """Have an obedient VMM end."""
        os.write(self.driver.orders, b"%d\n" % status)

    async def power_button(self) -> None:
        self._do("power_button", self.driver.on_power_button)

    async def quit(self) -> None:
        self._do("quit", self.driver.on_quit)

    async def suspend(self) -> None:
        await self._answer("suspend")

    async def resume(self) -> None:
        await self._answer("resume")

    async def set_memory(self, size: int) -> None:
        await self._answer(f"set_memory {size}")

    async def memory(self) -> int:
        await self._answer("memory")
        return self.driver.memory

    def watch_memory(self, changed: Callable[[int], None]) -> None:
        self.memory_changed = changed

    async def resize_disk(self, index: int, size: int) -> None:
        await self._answer(f"resize_disk {index} {size}")

    async def aclose(self) -> Reason | None:
        self.closed += 1
        if isinstance(self.driver.told, Exception):
            raise self.driver.told
        return self.driver.told

    async def _answer(self, name: str) -> None:
        self._do(name, self.driver.on_request)
        await self.driver.before_reply()

    def _do(self, name: str, answer: int | Exception | None) -> None:
        self.requests.append(name)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            self.exit(answer)


class FakeDriver:
    """A driver whose VMM is a shell script; its attributes say what goes how.

    An answer to a request is a status to end with, an exception to raise, or None: nothing happens.
    """

    name = "fake"

    def __init__(self, script: str = OBEDIENT) -> None:
        self.argv = ["/bin/sh", "-c", script, "vmm"]
        self.on_power_button: int | Exception | None = 0
        self.on_quit: int | Exception | None = 0
        self.on_request: int | Exception | None = None
        self.memory = 0
        self.told: Reason | Exception | None = None
        self.by_status: dict[int, Reason] = {}
        #: Awaited before any answer to what isn't about ending.
        self.before_reply: Callable[[], Any] = _at_once
        #: Raised by the function of that name.
        self.failures: dict[str, Exception] = {}
        #: Awaited before the first answer; what it raises is what connecting raises.
        self.before_answer: Callable[[], Any] = _at_once
        self.prepared = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.helpers: list[Helper] = []
        self.control = FakeControl(self)
        self._order, self.orders = os.pipe()

    def prepare(self, launch: Launch) -> Command:
        self.prepared.set()
        self.may_go_on.wait(DEADLINE)
        self._fail("prepare")
        (launch.directory / "file").touch()
        command = Command(helpers=self.helpers)
        orders = command.pass_fd(command.own_fd(os.dup(self._order)))
        command.argv = [*self.argv, orders]
        return command

    def told_by(self, status: int, stderr: str) -> Reason | None:
        self._fail("told_by")
        return self.by_status.get(status)

    def unsupported(self, config: VMConfig) -> list[str]:
        return []

    def last_words(self, stderr: str) -> str:
        self._fail("last_words")
        return stderr.strip()

    def close(self) -> None:
        os.close(self._order)
        os.close(self.orders)

    async def connect(self, launch: Launch) -> Control:
        await self.before_answer()
        return self.control

    def _fail(self, name: str) -> None:
        if name in self.failures:
            raise self.failures[name]


async def _at_once() -> None:
    pass


async def never() -> None:
    await asyncio.Event().wait()


class Recorder:
    """An observer that writes down what it is told; `fails` says which tellings raise."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.fails: Callable[[str], bool] = lambda _: False
        self.look: Callable[[Machine], None] = lambda _: None
        self._news = asyncio.Event()

    def added(self, vm: Machine) -> None:
        self._tell(vm, f"added {vm.identity.name}")

    def restored(self, vm: Machine) -> None:
        self._tell(vm, f"restored {vm.identity.name}")

    def changed(self, vm: Machine, names: Sequence[str]) -> None:
        shown = (f"{name}={vm.state}" if name == "state" else name for name in names)
        self._tell(vm, f"changed {' '.join(shown)}")

    def died(self, vm: Machine) -> None:
        # As with the bus: it is known to be told in a moment, and also where telling it failed.
        asyncio.get_running_loop().call_soon(vm.death_was_told)
        self._tell(vm, f"died {vm.reason} {vm.status}")

    def removed(self, vm: Machine) -> None:
        self._tell(vm, f"removed {vm.identity.name}")

    async def until(self, beginning: str) -> None:
        """Wait until something was told that begins so."""
        async with asyncio.timeout(DEADLINE):
            while not any(each.startswith(beginning) for each in self.told):
                self._news.clear()
                await self._news.wait()

    def _tell(self, vm: Machine, what: str) -> None:
        self.told.append(what)
        self._news.set()
        self.look(vm)
        if self.fails(what):
            raise RuntimeError(f"told: {what}")


@contextlib.contextmanager
def a_config(directory: Path, **changes: object) -> Iterator[VMConfig]:
    """A config whose kernel is an empty file. None takes a key away."""
    kernel = directory / "kernel"
    kernel.touch()
    raw: dict[str, object] = {"kernel": str(kernel), **changes}
    raw = {key: value for key, value in raw.items() if value is not None}
    config = parse_config(raw, FilePolicy(None))
    try:
        yield config
    finally:
        config.close()


def machine(
    directory: Path,
    config: VMConfig,
    driver: Driver,
    observer: Observer,
    settings: Settings | None = None,
) -> Machine:
    """A VM whose directory exists."""
    identity = Identity(7, "guest", 2048, directory / "7", Requester(1000))
    identity.directory.mkdir()
    settings = settings or Settings()
    around = Surroundings(settings, observer, Store(directory))
    shares = Shares(Limits(settings.limits), 1000, files=len(config.files()))
    return Machine(identity, config, driver, around, shares=shares, kvm=False)


class FakeHost(Host):
    """A host with one driver, or with none."""

    def __init__(self, driver: Driver | None) -> None:
        super().__init__(Settings())
        self.fake = driver
        self.vsock = False

    async def kvm_problem(self) -> str:
        return "there is none"

    def driver_named(self, name: str) -> Driver:
        assert self.fake is not None
        assert self.fake.name == name
        return self.fake

    def driver(self, config: VMConfig, kvm_problem: str) -> Driver:
        if self.fake is None:
            raise VMMUnavailable(f"no {config.vmm}")
        return self.fake


class Silent(Recorder):
    """One that is gone before it can tell anybody of a death."""

    def died(self, vm: Machine) -> None:
        self._tell(vm, f"died {vm.reason} {vm.status}")


class FakeKeep:
    """A service manager that keeps descriptors."""

    lasting = True

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def store(self, name: str, fd: int) -> None:
        assert name not in self.kept
        self.kept[name] = os.dup(fd)

    def forget(self, name: str) -> None:
        if name in self.kept:
            os.close(self.kept.pop(name))

    def handed_on(self) -> dict[str, int]:
        """Copies, for the next service."""
        return {name: os.dup(fd) for name, fd in self.kept.items()}


class Services:
    """One service after the other in one directory."""

    def __init__(self, directory: Path, driver: FakeDriver) -> None:
        self.directory = directory
        self.driver = driver
        self.host = FakeHost(driver)
        self.observer = Recorder()
        self.registry: Registry | None = None
        self.work: list[asyncio.Future[Any]] = []
        self.keep: Keep = NoKeep()
        (directory / "kernel").touch()

    def begin(
        self,
        settings: Settings | None = None,
        observer: Recorder | None = None,
        bus: str = "bus",
        kept: dict[str, int] | None = None,
    ) -> Registry:
        """The next service."""
        settings = settings or Settings()
        self.observer = observer or Recorder()
        around = Surroundings(settings, self.observer, Store(self.directory / "vm"), self.keep)
        self.registry = Registry(around, self.host, Limits(settings.limits), image_directories=None)
        self.registry.restore(bus, {} if kept is None else kept)
        self.registry.go_on()
        return self.registry

    async def end(self) -> None:
        """As the service ends: nobody waits for a reply any more, and the VMs are let go."""
        assert self.registry is not None
        self.registry.close()
        for work in self.work:
            work.cancel()
        await asyncio.gather(*self.work, return_exceptions=True)
        self.work.clear()
        await self.registry.let_go()
        self.registry = None

    async def create(self, **changes: object) -> Machine:
        assert self.registry is not None
        raw = {"kernel": str(self.directory / "kernel"), "name": "guest", **changes}
        return await self.registry.create(raw, Requester(1000, 4711, "label", ":1.5"))

    async def started(self, **changes: object) -> Machine:
        """A VM that runs, in a first service."""
        self.begin()
        vm = await self.create(**changes)
        await vm.start()
        return vm

    def do(self, work: Awaitable[Any]) -> asyncio.Future[Any]:
        """Do it until the service ends."""
        self.work.append(asyncio.ensure_future(work))
        return self.work[-1]

    async def next(self, **options: Any) -> Machine:
        """The VM, in the next service."""
        if self.registry is not None:
            await self.end()
        (vm,) = self.begin(**options)
        return vm

    async def close(self) -> None:
        """End all there is."""
        for vm in self.registry or ():
            async with asyncio.timeout(DEADLINE):
                await vm.kill()
        for vm in self.registry or ():
            assert self.registry is not None
            self.registry.remove(vm)
        await asyncio.gather(*self.work, return_exceptions=True)
        assert not isinstance(self.keep, FakeKeep) or self.keep.kept == {}


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on there is no space left for files of that name, nor to give one that name."""
    really_open = os.open

    def full_open(file: Any, flags: int, *args: Any, **options: Any) -> int:
        opened = really_open(file, flags, *args, **options)
        if flags & (os.O_WRONLY | os.O_RDWR) and os.path.basename(file) == name:
            os.close(opened)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened

    def full(really: Callable[[str, str], None]) -> Callable[[str, str], None]:
        def name_it(source: str, target: str) -> None:
            if os.path.basename(target) == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            really(source, target)

        return name_it

    monkeypatch.setattr(os, "open", full_open)
    for verb in ("replace", "rename", "link"):
        monkeypatch.setattr(os, verb, full(getattr(os, verb)))
