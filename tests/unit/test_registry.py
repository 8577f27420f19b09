"""All VMs: their ids, CIDs and names, and what is left when one is refused or removed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.doubles import DEADLINE, DEAF, FakeDriver, FakeHost, Recorder, fill_disk
from vmbus.errors import (
    InvalidConfig,
    InvalidState,
    LimitExceeded,
    NameExists,
    NoSuchVM,
    VMBusError,
    VMMUnavailable,
)
from vmbus.files import Handle
from vmbus.model.identity import Requester
from vmbus.model.limits import Limits
from vmbus.model.machine import Machine
from vmbus.model.record import Store
from vmbus.model.registry import FIRST_CID, LAST_CID, CIDPool, Registry
from vmbus.model.state import State
from vmbus.model.surroundings import Surroundings
from vmbus.reasons import Reason
from vmbus.settings import Settings

ME = Requester(1000, 4711, "label")

LIMITS = Limits(Settings().limits)


# CIDs


def test_cids_are_those_of_the_contract() -> None:
    assert (FIRST_CID, LAST_CID) == (2048, 65535)
    assert CIDPool().take() == 2048


def test_cids_are_used_one_after_the_other_and_again_as_late_as_can_be() -> None:
    pool = CIDPool(1, 4)
    assert [pool.take(), pool.take(), pool.take()] == [1, 2, 3]
    pool.free(2)
    pool.free(1)
    assert [pool.take(), pool.take(), pool.take()] == [4, 2, 1]


@pytest.mark.parametrize("freed", [[], [2, 3]])
def test_no_cid_is_given_twice(freed: list[int]) -> None:
    pool = CIDPool(1, 4)
    for _ in range(4):
        pool.take()
    for cid in freed:
        pool.free(cid)
    assert [pool.take() for _ in freed] == freed
    for _ in range(2):
        with pytest.raises(LimitExceeded, match="no more than"):
            pool.take()
    pool.free(4)
    assert pool.take() == 4


def test_full_pool_says_how_many_there_can_be() -> None:
    pool = CIDPool(10, 12)
    for _ in range(3):
        pool.take()
    with pytest.raises(LimitExceeded, match=r"^there can be no more than 3 VMs$"):
        pool.take()


# The registry


@pytest.fixture
def driver(nothing_left: None) -> Iterator[FakeDriver]:
    driver = FakeDriver()
    yield driver
    driver.close()


@pytest.fixture
def host(driver: FakeDriver) -> FakeHost:
    return FakeHost(driver)


@pytest.fixture
def another_driver(host: FakeHost) -> Iterator[Callable[[], FakeDriver]]:
    """Makes the next VM's driver, where there are several VMs that obey."""
    drivers: list[FakeDriver] = []

    def make() -> FakeDriver:
        driver = host.fake = FakeDriver()
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def observer() -> Recorder:
    return Recorder()


@pytest.fixture
async def registry(tmp_path: Path, host: FakeHost, observer: Recorder) -> AsyncIterator[Registry]:
    around = Surroundings(Settings(), observer, Store(tmp_path / "run" / "vm"))
    registry = Registry(around, host, LIMITS, image_directories=(tmp_path,))
    registry.restore("bus", {})
    registry.go_on()
    (tmp_path / "kernel").touch()
    yield registry
    for vm in registry:
        async with asyncio.timeout(DEADLINE):
            await vm.kill()
    for vm in registry:
        registry.remove(vm)


async def _create(registry: Registry, tmp_path: Path, **changes: object) -> Machine:
    return await registry.create({"kernel": str(tmp_path / "kernel"), **changes}, ME)


def _directories(tmp_path: Path) -> list[str]:
    return sorted(each.name for each in (tmp_path / "run" / "vm").iterdir() if each.is_dir())


async def test_create_starts_nothing_and_records_who_asked(
    registry: Registry, tmp_path: Path, observer: Recorder
) -> None:
    vm = await _create(registry, tmp_path, name="mine")
    assert (vm.state, vm.vmm, vm.identity.requester) == (State.NOT_STARTED, "fake", ME)
    assert (vm.identity.id, vm.identity.cid, vm.identity.name) == (1, FIRST_CID, "mine")
    assert observer.told == ["added mine"]
    assert vm.identity.directory.stat().st_mode & 0o777 == 0o700


async def test_vms_are_found_by_id_name_and_cid(registry: Registry, tmp_path: Path) -> None:
    first = await _create(registry, tmp_path, name="first")
    second = await _create(registry, tmp_path)
    assert (len(registry), list(registry)) == (2, [first, second])
    for vm in (first, second):
        assert registry.get(vm.identity.id) is vm
        assert registry.by_name(vm.identity.name) is vm
        assert registry.by_cid(vm.identity.cid) is vm


async def test_vm_that_does_not_exist_is_not_found(registry: Registry, tmp_path: Path) -> None:
    vm = await _create(registry, tmp_path, name="gone")
    registry.remove(vm)
    assert registry.get(1) is None
    with pytest.raises(NoSuchVM, match=r"^there is no VM with the name 'gone'$"):
        registry.by_name("gone")
    with pytest.raises(NoSuchVM, match=rf"^there is no VM with the CID {FIRST_CID}$"):
        registry.by_cid(FIRST_CID)
    with pytest.raises(NoSuchVM) as refused:
        registry.by_name("x" * 100_000)
    assert len(str(refused.value)) < 200


async def test_ids_are_never_used_again(registry: Registry, tmp_path: Path) -> None:
    ids = []
    for _ in range(5):
        vm = await _create(registry, tmp_path)
        ids.append((vm.identity.id, vm.identity.name, vm.identity.cid))
        registry.remove(vm)
    assert ids == [(n, f"vm-{n}", FIRST_CID + n - 1) for n in range(1, 6)]


async def test_default_name_is_never_one_that_somebody_took(
    registry: Registry, tmp_path: Path
) -> None:
    await _create(registry, tmp_path, name="vm-2")
    await _create(registry, tmp_path, name="vm-3")
    vm = await _create(registry, tmp_path)
    assert (vm.identity.id, vm.identity.name) == (4, "vm-4")


async def test_name_is_free_again_after_remove(registry: Registry, tmp_path: Path) -> None:
    registry.remove(await _create(registry, tmp_path, name="name"))
    assert (await _create(registry, tmp_path, name="name")).identity.id == 2


async def test_of_two_creates_with_one_name_one_wins(registry: Registry, tmp_path: Path) -> None:
    results = await asyncio.gather(
        _create(registry, tmp_path, name="name"),
        _create(registry, tmp_path, name="name"),
        return_exceptions=True,
    )
    assert sorted(type(each).__name__ for each in results) == ["Machine", "NameExists"]
    assert len(registry) == 1


async def test_removed_vm_leaves_nothing(
    registry: Registry, tmp_path: Path, observer: Recorder
) -> None:
    vm = await _create(registry, tmp_path, name="name")
    registry.remove(vm)
    registry.remove(vm)
    assert (len(registry), _directories(tmp_path)) == (0, [])
    assert observer.told == ["added name", "removed name"]


# Refusals. `nothing_left` looks for descriptors; a next VM shows that no id or CID got lost.


async def _refused(
    registry: Registry, tmp_path: Path, error: type[VMBusError], **changes: object
) -> str:
    there = list(registry), _directories(tmp_path)
    with pytest.raises(error) as refused:
        await _create(registry, tmp_path, **changes)
    assert (list(registry), _directories(tmp_path)) == there
    return str(refused.value)


async def test_name_that_exists_is_refused_and_leaves_nothing(
    registry: Registry, tmp_path: Path, observer: Recorder
) -> None:
    await _create(registry, tmp_path, name="name")
    said = await _refused(registry, tmp_path, NameExists, name="name")
    assert said == "there is a VM with the name 'name' already"
    vm = await _create(registry, tmp_path)
    assert (vm.identity.id, vm.identity.cid) == (2, FIRST_CID + 1)
    assert observer.told == ["added name", "added vm-2"]


async def test_wrong_config_is_refused_and_leaves_nothing(
    registry: Registry, tmp_path: Path
) -> None:
    await _refused(registry, tmp_path, InvalidConfig, cpus=0)
    assert (await _create(registry, tmp_path)).identity.cid == FIRST_CID


async def test_path_outside_the_image_directories_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    said = await _refused(registry, tmp_path, InvalidConfig, initrd="/etc/passwd")
    assert "not below an image directory" in said


async def test_missing_vmm_is_refused_and_leaves_nothing(
    registry: Registry, tmp_path: Path, host: FakeHost
) -> None:
    there, host.fake = host.fake, None
    assert await _refused(registry, tmp_path, VMMUnavailable, vmm="qemu") == "no qemu"
    host.fake = there
    assert (await _create(registry, tmp_path)).identity.cid == FIRST_CID


async def test_one_vm_too_many_is_refused_and_leaves_nothing(
    registry: Registry, tmp_path: Path
) -> None:
    registry._cids = CIDPool(1, 2)
    first = await _create(registry, tmp_path)
    await _create(registry, tmp_path)
    await _refused(registry, tmp_path, LimitExceeded)
    registry.remove(first)
    assert (await _create(registry, tmp_path)).identity.cid == 1


async def test_directory_that_cannot_be_made_leaves_nothing(
    registry: Registry, tmp_path: Path
) -> None:
    registry._cids = CIDPool(1, 1)
    (tmp_path / "run" / "vm" / "1").touch()
    said = await _refused(registry, tmp_path, VMBusError)
    assert said == "no directory for the VM: File exists"
    assert (await _create(registry, tmp_path)).identity.cid == 1


async def test_descriptor_of_the_caller_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    with (tmp_path / "kernel").open() as file:
        vm = await registry.create({"kernel": Handle(file.fileno())}, ME)
        registry.remove(vm)
        assert os.fstat(file.fileno())


# Life


async def test_vm_that_runs_is_not_removed(registry: Registry, tmp_path: Path) -> None:
    vm = await _create(registry, tmp_path)
    await vm.start()
    with pytest.raises(InvalidState):
        registry.remove(vm)
    assert (len(registry), _directories(tmp_path)) == (1, ["1"])


async def test_dead_vm_stays_until_it_is_removed(
    registry: Registry, tmp_path: Path, observer: Recorder
) -> None:
    vm = await _create(registry, tmp_path, collect="manual")
    await vm.start()
    await vm.kill()
    assert registry.get(1) is vm
    registry.remove(vm)
    assert observer.told[-2:] == [f"died killed {-9}", "removed vm-1"]


@pytest.mark.parametrize("starts", [True, False])
async def test_vm_that_is_to_be_collected_goes_with_its_death(
    registry: Registry, tmp_path: Path, driver: FakeDriver, observer: Recorder, starts: bool
) -> None:
    """After Died, and Wait is answered all the same."""
    vm = await _create(registry, tmp_path, collect="on-death")
    waiting = asyncio.ensure_future(vm.wait())
    if starts:
        await vm.start()
        driver.control.exit(0)
    else:
        driver.argv = ["/none"]
        with pytest.raises(VMBusError):
            await vm.start()
    reason, status = await asyncio.wait_for(waiting, DEADLINE)
    assert observer.told[-2:] == [f"died {reason} {status}", "removed vm-1"]
    assert (len(registry), _directories(tmp_path)) == (0, [])


async def test_what_has_no_record_is_removed(tmp_path: Path) -> None:
    """What another service was about to make, or to remove, when it ended."""
    left = tmp_path / "run" / "vm" / "7" / "tmp"
    removed = tmp_path / "run" / "vm" / "removed-6"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").touch()
    Store(tmp_path / "run" / "vm").open()
    for _ in range(2):
        left.mkdir(parents=True)
        (left / "control").touch()
        removed.mkdir()
        (removed / "record.json").touch()
        around = Surroundings(Settings(), Recorder(), Store(tmp_path / "run" / "vm"))
        registry = Registry(around, FakeHost(None), LIMITS, image_directories=None)
        registry.restore("bus", {})
        assert (_directories(tmp_path), len(registry)) == ([], 0)
    assert (tmp_path / "run" / "vm").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / "other").exists()


@pytest.mark.parametrize("name", ["record.new", "record.json", "counters.new", "counters.json"])
async def test_vm_that_cannot_be_written_down_is_refused_and_leaves_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    registry._cids = CIDPool(1, 1)
    with monkeypatch.context() as full:
        fill_disk(full, name)
        said = await _refused(registry, tmp_path, VMBusError)
    assert said.endswith(": No space left on device")
    vm = await _create(registry, tmp_path)
    assert vm.identity.cid == 1


# All of them


async def _stop_all(registry: Registry, timeout: float = 1000.0) -> None:
    async with asyncio.timeout(DEADLINE):
        await registry.stop_all(timeout)


async def test_stop_all_ends_every_vm_in_good_order(
    registry: Registry, tmp_path: Path, another_driver: Callable[[], FakeDriver]
) -> None:
    vms = []
    for _ in range(4):
        another_driver()
        vms.append(await _create(registry, tmp_path))
    for vm in vms[1:]:
        await vm.start()
    await vms[3].kill()
    await _stop_all(registry)
    assert [vm.state for vm in vms] == [State.NOT_STARTED, *[State.DEAD] * 3]
    assert [vm.reason for vm in vms] == [
        None,
        Reason.HOST_SHUTDOWN,
        Reason.HOST_SHUTDOWN,
        Reason.KILLED,
    ]


async def test_stop_all_kills_what_does_not_end_in_time(
    registry: Registry, tmp_path: Path, driver: FakeDriver
) -> None:
    driver.argv[2] = DEAF
    vms = [await _create(registry, tmp_path) for _ in range(3)]
    for vm in vms:
        await vm.start()
    await _stop_all(registry, 0.05)
    assert [(vm.reason, vm.status) for vm in vms] == [(Reason.HOST_SHUTDOWN, -9)] * 3


async def test_stop_all_ends_what_is_still_starting(
    registry: Registry, tmp_path: Path, driver: FakeDriver, observer: Recorder
) -> None:
    driver.before_answer = asyncio.Event().wait
    vm = await _create(registry, tmp_path)
    starting = asyncio.ensure_future(vm.start())
    await observer.until("changed pid")
    await _stop_all(registry)
    with pytest.raises(VMBusError):
        await starting
    assert (vm.state, vm.reason) == (State.FAILED, Reason.HOST_SHUTDOWN)


async def test_stop_all_ends_all_the_others_where_one_fails(
    registry: Registry, tmp_path: Path, another_driver: Callable[[], FakeDriver]
) -> None:
    vms = []
    for failure in (None, RuntimeError("driver"), None):
        another_driver().on_power_button = failure or 0
        vms.append(await _create(registry, tmp_path))
    for vm in vms:
        await vm.start()
    await _stop_all(registry)
    assert [vm.state for vm in vms] == [State.DEAD] * 3


async def test_stop_all_of_nothing_returns_and_the_service_goes_on(
    registry: Registry, tmp_path: Path
) -> None:
    await _stop_all(registry)
    vm = await _create(registry, tmp_path)
    await registry.start(vm)
    assert vm.state is State.RUNNING


async def test_closed_registry_takes_no_more_vms_and_starts_none(
    registry: Registry, tmp_path: Path, driver: FakeDriver
) -> None:
    """Those that run still can be ended."""
    fresh, runs = await _create(registry, tmp_path), await _create(registry, tmp_path)
    await runs.start()
    registry.close()
    said = await _refused(registry, tmp_path, InvalidState)
    assert said == "the service is shutting down"
    with pytest.raises(InvalidState, match=r"^the service is shutting down$"):
        await registry.start(fresh)
    assert (fresh.state, runs.state) == (State.NOT_STARTED, State.RUNNING)
    await _stop_all(registry)
    assert runs.reason is Reason.HOST_SHUTDOWN
