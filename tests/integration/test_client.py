"""The typed client against the real service: values, exceptions, events, and open files."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from tests.contract import documented
from tests.rig import CROSVM, DEADLINE, VM, Client, Rig, Service, guest
from vmbus import errors
from vmbus.client import VM as ClientVM
from vmbus.client import Disk, RemoteError, SharedDir, Snapshot, VMBus
from vmbus.events import Added, Changed, Death, Died, Event, Events, Removed, ServiceChanged
from vmbus.request import File

MIB = 1 << 20


@pytest.fixture
async def vmbus(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VMBus]:
    """The client, on the bus of the service."""
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", service.rig.address)
    async with VMBus.connect(user=True) as connected:
        yield connected


@pytest.fixture
def own_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A bus that a test may do with as it likes."""
    rig = Rig(system=False)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", rig.address)
    yield rig
    rig.close()


def _service(rig: Rig, **settings: object) -> Service:
    return Service(rig, {"crosvm": str(CROSVM), "kvm": "on", **settings})


async def _running(vmbus: VMBus, directory: Path, **directives: Any) -> ClientVM:
    vm = await vmbus.create(kernel=guest(directory, **directives))
    await vm.start()
    return vm


def _flat(name: str) -> str:
    return name.replace("_", "").lower()


def _open_files() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _numbers())


def _numbers() -> list[str]:
    # The listing's own descriptor is among them, and closed again.
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


# Values


def test_a_snapshot_has_a_field_for_every_property() -> None:
    properties = [each.attrib["name"] for each in documented()[VM].iterfind("property")]
    expected = {_flat(name) for name in properties} | {"path"}
    assert {_flat(field.name) for field in fields(Snapshot)} == expected


async def test_snapshots_are_what_the_bus_tells(vmbus: VMBus, bus: Client, tmp_path: Path) -> None:
    vm = await _running(vmbus, tmp_path)
    never_started = await vmbus.create(kernel=guest(tmp_path))
    for snapshot in (await vm.properties(), await never_started.properties()):
        values = {_flat(name): value for name, value in asdict(snapshot).items()}
        path = values.pop("path")
        told = await bus.get_all(path)
        assert values == {_flat(name): value for name, value in told.items()}
        assert snapshot in await vmbus.vms()
    ids = [each.id for each in await vmbus.vms()]
    assert ids == sorted(ids)
    await vm.kill()


@pytest.mark.parametrize("by", ["name", "id", "path"])
async def test_a_vm_is_found(vmbus: VMBus, tmp_path: Path, by: str) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path))
    known = await vm.properties()
    assert (await vmbus.vm(str(getattr(known, by)))).path == vm.path


async def test_a_name_goes_before_an_id(vmbus: VMBus, tmp_path: Path) -> None:
    first = await vmbus.create(kernel=guest(tmp_path))
    number = str((await first.properties()).id)
    second = await vmbus.create(name=number, kernel=guest(tmp_path))
    assert (await vmbus.vm(number)).path == second.path


async def test_whether_the_service_runs(vmbus: VMBus, own_rig: Rig) -> None:
    assert await vmbus.running()
    async with VMBus.connect(user=True) as elsewhere:
        assert not await elsewhere.running()
        with pytest.raises(RemoteError) as raised:
            await elsewhere.vms()
        assert raised.value.name.endswith(".ServiceUnknown")


# What is done with a VM


async def test_a_life(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path), name="alive", memory_mib=64)
    assert (await vm.properties()).state == "not-started"
    states = []
    for step in (vm.start, vm.suspend, vm.resume, vm.stop):
        await step()
        states.append((await vm.properties()).state)
    assert states == ["running", "suspended", "running", "dead"]
    assert await vm.wait() == Death("stopped", 0)
    await vm.remove()
    with pytest.raises(errors.NoSuchVM):
        await vmbus.vm("alive")


async def test_memory(vmbus: VMBus, bus: Client, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path), memory_mib=128)
    assert await vm.memory_actual() == 0
    await vm.start()
    assert await vm.memory_actual() == 128 * MIB
    await vm.set_memory_target(32 * MIB)
    assert await vm.memory_actual() == 32 * MIB == await bus.get(vm.path, "MemoryActual")
    await vm.kill()
    assert await vm.memory_actual() == 0


async def test_vsock_that_is_not_there(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path), vsock=False)
    await vm.start()
    with pytest.raises(errors.NotSupported):
        await vm.connect_vsock(1024)
    with pytest.raises(errors.InvalidArgs):
        await vm.connect_vsock(22)
    await vm.kill()


async def test_what_a_guest_reports(vmbus: VMBus, tmp_path: Path) -> None:
    said = "READY=1\nSTATUS=fine\nEXIT_STATUS=3\n"
    vm = await vmbus.create(kernel=guest(tmp_path, notify=said, then={"exit": 0}))
    assert (await vm.properties()).payload_state == "none"
    await vm.start()
    await vm.wait()
    found = await vm.properties()
    assert found.payload_state == "finished"
    assert (found.payload_exit_status, found.status_text) == (3, "fine")


async def test_resize_disk(vmbus: VMBus, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    vm = await vmbus.create(
        kernel=guest(tmp_path), disks=[{"image": image, "writable": True, "id": "data"}]
    )
    await vm.start()
    await vm.resize_disk(0, 3 * MIB)
    assert image.stat().st_size == 3 * MIB
    await vm.kill()


async def test_stop_with_a_time_out_kills_when_it_is_over(vmbus: VMBus, tmp_path: Path) -> None:
    deaf = {"ignore": True}
    vm = await _running(vmbus, tmp_path, on={"Powerbtn": deaf, "Exit": deaf})
    await vm.stop(timeout=0.05)
    assert (await vm.wait()).reason == "killed"


async def test_the_console_both_ways_and_its_log(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path, console="hello\n", echo=True))
    loop = asyncio.get_running_loop()
    with await vm.open_console() as console:
        console.setblocking(False)
        await vm.start()
        heard = b""
        async with asyncio.timeout(DEADLINE):
            while heard != b"hello\n":
                heard += await loop.sock_recv(console, 100)
            await loop.sock_sendall(console, b"typed")
            while heard != b"hello\ntyped":
                heard += await loop.sock_recv(console, 100)
        await vm.kill()
    with await vm.open_log() as log:
        assert log.read() == b"hello\ntyped"


# Files


@pytest.mark.parametrize("how", ["path", "text", "file", "descriptor"])
async def test_a_file_in_every_form(vmbus: VMBus, tmp_path: Path, how: str) -> None:
    path = guest(tmp_path, then={"exit": 34})
    with path.open("rb") as file:
        forms: dict[str, File] = {
            "path": path,
            "text": str(path),
            "file": file,
            "descriptor": file.fileno(),
        }
        vm = await vmbus.create(kernel=forms[how])
        assert not file.closed
        assert file.read(2) == b"#!"
    await vm.start()
    assert await vm.wait() == Death("guest-panic", 34)


async def test_an_open_file_that_has_no_name_any_more(vmbus: VMBus, tmp_path: Path) -> None:
    kernel, image = guest(tmp_path, then={"exit": 32}), tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with kernel.open("rb") as opened, image.open("r+b") as disk:
        kernel.unlink()
        image.unlink()
        vm = await vmbus.create(kernel=opened, disks=[{"image": disk, "writable": True}])
    await vm.start()
    assert await vm.wait() == Death("reboot", 32)


async def test_a_relative_path_is_the_callers(
    vmbus: VMBus, bus: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = guest(tmp_path)
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    shared: SharedDir = {"source": "shared", "tag": "data", "writable": True}
    vm = await vmbus.create(kernel=kernel.name, shared_dirs=[shared])
    await vm.start()
    argv = Path(f"/proc/{await bus.get(vm.path, 'Pid')}/cmdline").read_text().split("\0")
    assert f"--shared-dir={tmp_path}/shared:data:type=fs:cache=auto" in argv
    await vm.kill()


async def test_what_is_none_is_not_mentioned(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path), bios=None, name=None, cpus=None, vsock=None)
    known = await vm.properties()
    assert (known.name, known.cpus, known.protected) == (f"vm-{known.id}", 1, False)


async def test_nothing_stays_open(vmbus: VMBus, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    disk: Disk = {"image": image, "writable": True}
    before = _open_files()
    vm = await vmbus.create(kernel=guest(tmp_path), disks=[disk])
    with pytest.raises(errors.InvalidConfig):
        await vmbus.create(kernel=guest(tmp_path), bios=guest(tmp_path), disks=[disk])
    with pytest.raises(FileNotFoundError):
        await vmbus.create(kernel=guest(tmp_path), initrd=tmp_path / "nothing", disks=[disk])
    with pytest.raises(errors.InvalidConfig):
        await vmbus.create(kernel=guest(tmp_path), disks=[disk] * 17)
    (await vm.open_console()).close()
    (await vm.open_log()).close()
    async with await vmbus.events(), VMBus.connect(user=True) as another:
        await another.vms()
        await vm.start()
        await vm.kill()
    await vm.remove()
    with pytest.raises(errors.UnknownObject):
        await vm.open_log()
    assert _open_files() == before


# Errors


Wrong = Callable[[VMBus, Path], Awaitable[object]]
_CALLS: list[tuple[str, Wrong, type[errors.VMBusError], str]] = [
    ("no kernel", lambda b, d: b.create(), errors.InvalidConfig, "kernel"),
    ("memory", lambda b, d: b.create(kernel=guest(d), memory_mib=1), errors.InvalidConfig, "16"),
    ("huge", lambda b, d: b.create(kernel=guest(d), cpus=1 << 70), errors.InvalidConfig, "cpus"),
    ("gdb", lambda b, d: b.create(kernel=guest(d), gdb_port=0), errors.InvalidConfig, "gdb_port"),
    (
        "tap",
        lambda b, d: b.create(kernel=guest(d), net=[{"tap": "no-tap", "mac": "1"}]),
        errors.InvalidConfig,
        r"net\[0\]\.tap.*no-tap.*net\[0\]\.mac",
    ),
    (
        "tap file",
        lambda b, d: b.create(kernel=guest(d), net=[{"tap": 0}]),
        errors.InvalidConfig,
        "open tap device",
    ),
    (
        "protected",
        lambda b, d: b.create(kernel=guest(d), protected=True),
        errors.NotSupported,
        "protected",
    ),
    ("name", lambda b, d: b.vm("nobody"), errors.NoSuchVM, "nobody"),
    ("id", lambda b, d: b.vm("4000000"), errors.NoSuchVM, "4000000"),
    ("path", lambda b, d: b.vm("/org/vmbus1/vm/no"), errors.NoSuchVM, "/org/vmbus1/vm/no"),
    ("root", lambda b, d: b.vm("/"), errors.NoSuchVM, "no VM /"),
    ("bad path", lambda b, d: b.vm("//"), errors.NoSuchVM, "//"),
    ("NUL", lambda b, d: b.vm("a\0b"), errors.InvalidArgs, "GetVM"),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [row[1:] for row in _CALLS], ids=[row[0] for row in _CALLS]
)
async def test_an_error_has_its_class(
    vmbus: VMBus, tmp_path: Path, call: Wrong, error: type[errors.VMBusError], text: str
) -> None:
    with pytest.raises(error, match=text) as raised:
        await call(vmbus, tmp_path)
    assert type(raised.value) is error


Misdeed = Callable[[ClientVM], Awaitable[object]]
_MISDEEDS: list[tuple[str, Misdeed, type[errors.VMBusError]]] = [
    ("start twice", lambda vm: vm.start(), errors.InvalidState),
    ("resume", lambda vm: vm.resume(), errors.InvalidState),
    ("remove", lambda vm: vm.remove(), errors.InvalidState),
    ("too much memory", lambda vm: vm.set_memory_target(1 << 40), errors.InvalidArgs),
    ("negative memory", lambda vm: vm.set_memory_target(-1), errors.InvalidArgs),
    ("unthinkable memory", lambda vm: vm.set_memory_target(1 << 64), errors.InvalidArgs),
    ("no driver", lambda vm: vm.set_memory_target(64 * MIB), errors.ControlFailed),
    ("no disk", lambda vm: vm.resize_disk(0, MIB), errors.InvalidArgs),
    ("negative disk", lambda vm: vm.resize_disk(-1, MIB), errors.InvalidArgs),
    ("negative time", lambda vm: vm.stop(-1), errors.InvalidArgs),
    ("no time", lambda vm: vm.stop(math.nan), errors.InvalidArgs),
    ("endless time", lambda vm: vm.stop(math.inf), errors.InvalidArgs),
]


@pytest.mark.parametrize(
    ("misdeed", "error"), [row[1:] for row in _MISDEEDS], ids=[row[0] for row in _MISDEEDS]
)
async def test_what_a_running_vm_refuses_leaves_it_running(
    vmbus: VMBus, tmp_path: Path, misdeed: Misdeed, error: type[errors.VMBusError]
) -> None:
    vm = await _running(vmbus, tmp_path, no_balloon_driver=True)
    with pytest.raises(error) as raised:
        await misdeed(vm)
    assert type(raised.value) is error
    assert (await vm.properties()).state == "running"
    await vm.kill()


async def test_errors_of_a_start(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path, boot={"error": "no luck"}), name="luckless")
    with pytest.raises(errors.StartFailed, match="no luck"):
        await vm.start()
    assert await vm.wait() == Death("start-failed", 1)
    with pytest.raises(errors.NameExists, match="luckless"):
        await vmbus.create(kernel=guest(tmp_path), name="luckless")
    with pytest.raises(errors.InvalidState):
        await vm.open_console()
    await vm.remove()
    for call in (vm.properties, vm.start, vm.wait, vm.memory_actual):
        with pytest.raises(errors.UnknownObject):
            await call()


async def test_a_wait_for_what_never_starts_ends_with_its_removal(
    vmbus: VMBus, tmp_path: Path
) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path))
    waiting = asyncio.create_task(vm.wait())
    await vm.properties()  # Calls go out in their order.
    await vm.remove()
    with pytest.raises(errors.NoSuchVM):
        await waiting


async def test_no_balloon(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path), balloon=False)
    await vm.start()
    with pytest.raises(errors.NotSupported):
        await vm.set_memory_target(64 * MIB)
    await vm.kill()


async def test_a_vmm_that_does_not_answer(own_rig: Rig, tmp_path: Path) -> None:
    _service(own_rig, control_timeout=0.1)
    async with VMBus.connect(user=True) as bus:
        vm = await _running(bus, tmp_path, on={"SuspendVcpus": {"silent": True}})
        with pytest.raises(errors.TimedOut):
            await vm.suspend()
        await vm.kill()


# Events


async def _until(events: Events, last: Event) -> list[Event]:
    """All events up to one, those of other VMs left out."""
    found: list[Event] = []
    async with asyncio.timeout(DEADLINE):
        async for event in events:
            if getattr(event, "path", None) == getattr(last, "path", None):
                found.append(event)
            if event == last:
                return found
    raise AssertionError(f"the events ended: {found}")


async def test_events_in_their_order(vmbus: VMBus, tmp_path: Path) -> None:
    async with await vmbus.events() as events:
        vm = await vmbus.create(kernel=guest(tmp_path), memory_mib=64)
        known = await vm.properties()
        await vm.start()
        await vm.suspend()
        await vm.set_memory_target(32 * MIB)
        await vm.resume()
        await vm.kill()
        await vm.remove()
        found = await _until(events, Removed(vm.path))
    assert found[0] == Added(vm.path, known)
    assert found[-2:] == [Died(vm.path, known.cid, Death("killed", -9)), Removed(vm.path)]
    changes = [event for event in found if isinstance(event, Changed)]
    assert len(changes) == len(found) - 3
    states = [event.values["state"] for event in changes if "state" in event.values]
    assert states == ["starting", "running", "suspended", "running", "dead"]
    assert {"death_reason": "killed", "exit_status": -9, "pid": 0}.items() <= (
        changes[-1].values.items()
    )


async def test_memory_is_told_as_changed_without_its_value(vmbus: VMBus, tmp_path: Path) -> None:
    vm = await _running(vmbus, tmp_path)
    async with await vmbus.events() as events:
        await vm.set_memory_target(64 * MIB)
        changed = Changed(vm.path, {}, frozenset({"memory_actual"}))
        assert (await _until(events, changed))[-1] == changed
    await vm.kill()


async def test_every_listener_hears_until_it_closes(vmbus: VMBus, tmp_path: Path) -> None:
    one, other = await vmbus.events(), await vmbus.events()
    vm = await vmbus.create(kernel=guest(tmp_path))
    await one.aclose()
    await vm.remove()
    heard = [event async for event in one if getattr(event, "path", "") == vm.path]
    assert [type(event) for event in heard] == [Added]
    assert [type(event) for event in await _until(other, Removed(vm.path))] == [Added, Removed]
    await other.aclose()


async def test_events_of_others_are_not_believed(
    vmbus: VMBus, service: Service, tmp_path: Path
) -> None:
    vm = await vmbus.create(kernel=guest(tmp_path))
    async with await vmbus.events() as events:
        lie = ("--object-path", vm.path, "--signal", f"{VM}.Died", "5", "'crash'", "1")
        assert service.rig.gdbus("emit", *lie) == ""
        await vm.remove()
        assert await _until(events, Removed(vm.path)) == [Removed(vm.path)]


async def test_events_tell_of_the_service_and_end_with_it_where_asked(own_rig: Rig) -> None:
    async with VMBus.connect(user=True) as bus:
        staying, leaving = await bus.events(), await bus.events(end_with_service=True)
        first = _service(own_rig)
        first.terminate()
        async with asyncio.timeout(DEADLINE):
            assert [event async for event in leaving] == [
                ServiceChanged(running=True),
                ServiceChanged(running=False),
            ]
        _service(own_rig)
        assert len(await _until(staying, ServiceChanged(running=False))) == 2
        assert await anext(staying) == ServiceChanged(running=True)
        await staying.aclose()
        await leaving.aclose()


async def test_a_service_that_goes_ends_what_waits_for_it(own_rig: Rig, tmp_path: Path) -> None:
    service = _service(own_rig)
    async with VMBus.connect(user=True) as bus:
        vm = await bus.create(kernel=guest(tmp_path))
        waiting = asyncio.create_task(vm.wait())
        await vm.properties()
        service.process.kill()
        with pytest.raises(RemoteError) as raised:
            async with asyncio.timeout(DEADLINE):
                await waiting
        assert raised.value.name.endswith(".NoReply")


async def test_a_bus_that_goes_ends_everything(own_rig: Rig, tmp_path: Path) -> None:
    _service(own_rig)
    async with VMBus.connect(user=True) as bus:
        vm = await bus.create(kernel=guest(tmp_path))
        waiting = asyncio.create_task(vm.wait())
        events = await bus.events()
        own_rig.kill_bus()
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(ConnectionError):
                await waiting
            assert [event async for event in events if not isinstance(event, ServiceChanged)] == []
            with pytest.raises(ConnectionError):
                await bus.vms()
