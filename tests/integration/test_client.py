"""The typed client against the real service: values, exceptions, events, and open files."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints
from unittest.mock import ANY

import pytest
from pydantic import BaseModel

from tests.contract import documented, types_of
from tests.rig import CROSVM, DEADLINE, MANAGER, VM, Client, Rig, Service, guest, until_reaped
from vmbus import __version__, errors, listening, request, spec
from vmbus.client import VM as ClientVM
from vmbus.client import About, Deaths, Disk, ServiceGone, SharedDir, Snapshot, VMBus
from vmbus.events import Added, Changed, Death, Died, Event, Events, Removed, ServiceChanged
from vmbus.missed import missed
from vmbus.request import File

MIB = 1 << 20


@pytest.fixture
async def vmbus(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VMBus]:
    """The client, on the bus of the service."""
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", service.rig.address)
    async with VMBus.connect(user=True) as connected:
        yield connected


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


#: What the client calls otherwise than the contract does.
_CALLED = {"GetVM": "vm", "GetVMByCID": "vm_by_cid", "List": "vms"}
_TYPES = {"s": str, "u": int, "t": int, "i": int, "b": bool, "as": tuple[str, ...]}
_GIVEN: dict[str, set[object]] = {
    "": {type(None)},
    "o": {ClientVM},
    "si": {Death},
    "h": {socket.socket, BinaryIO},
    "a(ussuuo)": {list[Snapshot]},
}


@pytest.mark.parametrize(("interface", "kind"), [(MANAGER, VMBus), (VM, ClientVM)])
def test_every_method_of_the_contract_is_there_and_typed(interface: str, kind: type) -> None:
    """With as many arguments, all of a type, and a result that is what the method gives."""
    for method in documented()[interface].iterfind("method"):
        name = method.attrib["name"]
        made = getattr(kind, _CALLED.get(name, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
        hints = get_type_hints(made)
        assert hints.pop("return") in _GIVEN[types_of(method, "out")], name
        assert len(hints) == sum(arg.get("direction") == "in" for arg in method.iterfind("arg"))
        assert Any not in hints.values(), name


@pytest.mark.parametrize(("interface", "kind"), [(MANAGER, About), (VM, Snapshot)])
def test_every_property_of_the_contract_is_there_and_typed(interface: str, kind: type) -> None:
    """As a field whose type is that of the property."""
    fields = {_flat(name): hint for name, hint in get_type_hints(kind).items()}
    for each in documented()[interface].iterfind("property"):
        assert fields[_flat(each.attrib["name"])] == _TYPES[each.attrib["type"]]


@pytest.mark.parametrize(
    ("made", "checked"),
    [
        (request.Config, spec.VMConfig),
        (request.Disk, spec.Disk),
        (request.Net, spec.Net),
        (request.SharedDir, spec.SharedDir),
    ],
)
def test_every_key_of_a_config_is_there(made: type, checked: type[BaseModel]) -> None:
    """Those that the service takes, and no other."""
    assert set(made.__annotations__) == set(checked.model_fields)


async def test_snapshots_are_what_the_bus_tells(vmbus: VMBus, bus: Client, tmp_path: Path) -> None:
    vm = await _running(vmbus, tmp_path)
    never_started = await vmbus.create(kernel=guest(tmp_path))
    for snapshot in (await vm.properties(), await never_started.properties()):
        values = {_flat(name): value for name, value in asdict(snapshot).items()}
        path = values.pop("path")
        told = {_flat(name): value for name, value in (await bus.get_all(path)).items()}
        assert {name: value for name, value in values.items() if name in told} == told
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
        with pytest.raises(ServiceGone) as raised:
            await elsewhere.vms()
        assert raised.value.name.endswith(".ServiceUnknown")


async def test_what_the_service_says_of_itself(vmbus: VMBus, tmp_path: Path) -> None:
    """Its properties as one value; a VM counts from Create on."""
    before = await vmbus.about()
    await vmbus.create(kernel=guest(tmp_path))
    assert await vmbus.about() == About(__version__, ("crosvm", "qemu"), before.vm_count + 1)


async def test_a_vm_is_found_by_its_cid(vmbus: VMBus, tmp_path: Path) -> None:
    """By the number that its vsock has; another number is nobody's."""
    vm = await vmbus.create(kernel=guest(tmp_path))
    assert (await vmbus.vm_by_cid((await vm.properties()).cid)).path == vm.path
    with pytest.raises(errors.NoSuchVM):
        await vmbus.vm_by_cid(7)


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


async def test_all_are_stopped_at_once(own_rig: Rig, tmp_path: Path) -> None:
    """Every VM ends in good order, for the host's sake."""
    _service(own_rig)
    async with VMBus.session() as bus:
        vms = [await _running(bus, tmp_path) for _ in range(2)]
        await bus.stop_all()
        assert [await vm.wait() for vm in vms] == [Death("host-shutdown", 0)] * 2
        with pytest.raises(errors.InvalidArgs):
            await bus.stop_all(-1)


# What is made and removed


async def test_a_vm_goes_with_its_block(vmbus: VMBus, tmp_path: Path) -> None:
    """Whether it runs, was never started or is gone by then; an error of the block stays."""
    async with (
        await _running(vmbus, tmp_path) as running,
        await vmbus.create(kernel=guest(tmp_path)) as idle,
        await vmbus.create(kernel=guest(tmp_path), collect="on-death") as collected,
    ):
        await collected.start()
        await collected.kill()
    assert not {running.path, idle.path, collected.path} & {vm.path for vm in await vmbus.vms()}
    with pytest.raises(LookupError):
        async with await _running(vmbus, tmp_path) as failed:
            raise LookupError
    with pytest.raises(errors.UnknownObject):
        await failed.properties()


async def test_a_vm_goes_with_its_connection(vmbus: VMBus, tmp_path: Path) -> None:
    """kill_on_disconnect, which no crash of a client can get around."""
    async with vmbus.deaths() as deaths:
        async with VMBus.session() as other:
            vm = await other.create(kernel=guest(tmp_path), kill_on_disconnect=True)
            await vm.start()
        assert await _death(deaths, vm) == Died(vm.path, ANY, Death("requester-gone", -9))


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
        "parts",
        lambda b, d: b.create(
            kernel=guest(d),
            disks=[{"writable": True}],  # type: ignore[typeddict-item]
            net=[{"mac": "02:00:00:00:00:01"}],  # type: ignore[typeddict-item]
            shared_dirs=[{"tag": "a"}],  # type: ignore[typeddict-item]
        ),
        errors.InvalidConfig,
        r"disks\[0\]\.image: .*; net\[0\]\.tap: .*; shared_dirs\[0\]\.source: ",
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
            with pytest.raises(ConnectionError):
                assert [event async for event in events if not isinstance(event, ServiceChanged)]
            with pytest.raises(ConnectionError):
                await anext(aiter(bus.deaths()))
            with pytest.raises(ConnectionError):
                await bus.vms()


# Deaths


async def test_the_first_lines_of_a_program(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Create, start, and hear of deaths, in the fewest words."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", service.rig.address)
    kernel = guest(tmp_path, then={"exit": 34})
    async with asyncio.timeout(DEADLINE), VMBus.system() as bus:
        vm = await bus.create(kernel=kernel, memory_mib=512)
        await vm.start()
        async for death in bus.deaths():
            assert (death.path, death.reason) == (vm.path, "guest-panic")
            break


async def _death(deaths: Deaths, vm: ClientVM) -> Died:
    """The next death of this VM."""
    async with asyncio.timeout(DEADLINE):
        async for death in deaths:
            if death.path == vm.path:
                return death
    raise AssertionError("the deaths ended")


async def test_deaths_with_all_that_was_known(vmbus: VMBus, tmp_path: Path) -> None:
    """Why, and of whom: the VM itself may be gone when its death is read."""
    vm = await vmbus.create(kernel=guest(tmp_path, then={"exit": 34}), name="mortal")
    async with vmbus.deaths() as deaths:
        await vm.start()
        await vm.wait()
        await vm.remove()
        death = await _death(deaths, vm)
    assert (death.name, death.reason, death.status) == ("mortal", "guest-panic", 34)
    assert death.vm is not None
    assert (death.vm.state, death.vm.last_words) == ("dead", "exiting with guest panic")


async def test_deaths_from_the_first_step_of_a_loop(vmbus: VMBus, tmp_path: Path) -> None:
    """A loop without a block of its own listens while it runs."""
    vm = await vmbus.create(kernel=guest(tmp_path))
    deaths = aiter(vmbus.deaths())
    first = asyncio.ensure_future(anext(deaths))
    await vm.start()
    await vm.kill()
    async with asyncio.timeout(DEADLINE):
        assert (await first).path == vm.path
    await vm.remove()


async def test_a_death_that_was_too_quick_for_the_loop(vmbus: VMBus, tmp_path: Path) -> None:
    """Of a VM that was started here it is told all the same; what was told before isn't again."""
    waited = await _running(vmbus, tmp_path, then={"exit": 0})
    await waited.wait()
    removed = await _running(vmbus, tmp_path)
    await removed.discard()
    quick = []
    told = []
    async with asyncio.timeout(DEADLINE), VMBus.session() as other:
        for status in (34, 32):
            quick.append(await _running(vmbus, tmp_path, then={"exit": status}))
            await (await other.vm(quick[-1].path)).wait()
        async for death in vmbus.deaths():
            told.append((death.path, death.reason, death.status))
            if len(told) == 2:
                break
        assert told == [(quick[0].path, "guest-panic", 34), (quick[1].path, "reboot", 32)]
        assert death.vm == await quick[1].properties()
    async with vmbus.deaths() as deaths:
        last = await _running(vmbus, tmp_path, then={"exit": 32})
        async with asyncio.timeout(DEADLINE):
            assert (await anext(aiter(deaths))).path == last.path


async def test_deaths_that_nobody_ever_asks_for_do_not_gather(
    vmbus: VMBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that starts VMs and never listens remembers the last of them, as many as fit."""
    monkeypatch.setattr(listening, "MAX_EVENTS", 2)
    started = [await _running(vmbus, tmp_path) for _ in range(3)]
    async with asyncio.timeout(DEADLINE):
        for vm in started:
            await vm.kill()
        deaths = aiter(vmbus.deaths())
        assert [(await anext(deaths)).path for _ in range(2)] == [vm.path for vm in started[1:]]
        last = await _running(vmbus, tmp_path, then={"exit": 0})
        assert (await anext(deaths)).path == last.path
        await deaths.aclose()


async def test_a_death_that_comes_while_listening_begins_is_told_once(
    vmbus: VMBus, tmp_path: Path
) -> None:
    """Whichever is first, the signal or what the service says of all VMs."""
    for _ in range(20):
        vm = await vmbus.create(kernel=guest(tmp_path))
        await vm.start()
        deaths = aiter(vmbus.deaths())
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            group.create_task(vm.kill())
            assert (await anext(deaths)).path == vm.path
        idle = await vmbus.create(kernel=guest(tmp_path))
        await idle.start()
        await idle.kill()
        async with asyncio.timeout(DEADLINE):
            assert (await anext(deaths)).path == idle.path
        await deaths.aclose()
        await vm.remove()
        await idle.remove()


# Over a restart of the service


async def _listed(events: Events, *, until: str) -> list[Event]:
    """Events up to the addition of the VM with that name."""
    found: list[Event] = []
    async with asyncio.timeout(DEADLINE):
        async for event in events:
            if isinstance(event, Added) and event.vm.name == until:
                return found
            found.append(event)
    raise AssertionError(f"the events ended: {found}")


async def test_a_restart_of_which_nothing_is_missed(own_rig: Rig, tmp_path: Path) -> None:
    """The listener goes on, and VMs that go on unchanged are no events."""
    service = _service(own_rig)
    async with VMBus.session() as bus:
        vm = await _running(bus, tmp_path)
        async with await bus.events() as events:
            service.crash()
            service.start()
            await bus.create(kernel=guest(tmp_path), name="end")
            assert await _listed(events, until="end") == [
                ServiceChanged(running=False),
                ServiceChanged(running=True),
            ]
            await vm.kill()
            assert (await _until(events, Died(vm.path, 2048, Death("killed", -9))))[-1]


async def test_a_death_while_the_service_was_away(own_rig: Rig, tmp_path: Path) -> None:
    """It is told once, with what is known of it, and before that what the VM is like now."""
    service = _service(own_rig)
    async with VMBus.session() as bus:
        vm = await _running(bus, tmp_path)
        async with await bus.events() as events, bus.deaths() as deaths:
            pid = (await vm.properties()).pid
            service.crash()
            os.kill(pid, signal.SIGKILL)
            until_reaped(pid)
            service.start()
            death = await _death(deaths, vm)
            assert (death.reason, death.name) == ("unknown", "vm-1")
            service.crash()
            service.start()
            await bus.create(kernel=guest(tmp_path), name="end")
            told = [e for e in await _listed(events, until="end") if getattr(e, "path", "")]
            assert [type(event) for event in told] == [Changed, Died]
            await vm.remove()


async def test_a_wait_outlasts_the_service(own_rig: Rig, tmp_path: Path) -> None:
    """Killed or told to end: who waits for a VM's death hears of it from the next service."""
    service = _service(own_rig)
    async with VMBus.session() as bus:
        vm = await _running(bus, tmp_path)
        waiting = asyncio.create_task(vm.wait())
        await vm.properties()  # Calls go out in their order.
        service.crash()
        service.start()
        await vm.properties()
        await asyncio.to_thread(service.terminate)
        with pytest.raises(ServiceGone):
            await vm.kill()
        await asyncio.to_thread(service.start)
        await vm.kill()
        async with asyncio.timeout(DEADLINE):
            assert await waiting == Death("killed", -9)


async def test_a_wait_for_a_vm_that_is_collected_meanwhile(own_rig: Rig, tmp_path: Path) -> None:
    """Nobody can be asked any more how it died, but it was told."""
    service = _service(own_rig)
    async with VMBus.session() as bus:
        vm = await bus.create(kernel=guest(tmp_path), collect="on-death")
        await vm.start()
        waiting = asyncio.create_task(vm.wait())
        pid = (await vm.properties()).pid
        service.crash()
        os.kill(pid, signal.SIGKILL)
        until_reaped(pid)
        service.start()
        async with asyncio.timeout(DEADLINE):
            assert (await waiting).reason == "unknown"
        with pytest.raises(errors.UnknownObject):
            await vm.wait()


async def test_a_vm_is_discarded_by_the_next_service(own_rig: Rig, tmp_path: Path) -> None:
    """Leaving a VM's block lasts until there is a service that can remove it."""
    service = _service(own_rig)
    async with VMBus.session() as bus, await bus.events() as events:
        vm = await _running(bus, tmp_path)
        service.crash()
        leaving = asyncio.create_task(vm.discard())
        await _until(events, ServiceChanged(running=False))
        service.start()
        async with asyncio.timeout(DEADLINE):
            await leaving
        assert await bus.vms() == []


def _vm(number: int, state: str = "running", **values: Any) -> Snapshot:
    return Snapshot(f"/org/vmbus1/vm/{number}", id=number, cid=number, state=state, **values)


def _known(*vms: Snapshot) -> dict[str, Snapshot]:
    return {vm.path: vm for vm in vms}


def test_what_was_missed_of_each_vm() -> None:
    """One that is unchanged is no event; of the others the net result, in their order."""
    dead = _vm(2, "dead", death_reason="crash", exit_status=1)
    assert list(missed(_known(_vm(1), _vm(2), _vm(3)), [_vm(1), dead, _vm(10)], [])) == [
        Changed(dead.path, {"state": "dead", "death_reason": "crash", "exit_status": 1}),
        Died(dead.path, 2, Death("crash", 1)),
        Removed(_vm(3).path),
        Added(_vm(10).path, _vm(10)),
    ]


def test_what_the_service_told_before_it_was_asked_counts() -> None:
    """A death is told with the reason that the service gave, whether the VM is there or not."""
    told: list[Event] = [Died(_vm(1).path, 1, Death("unknown", 0)), Removed(_vm(1).path)]
    assert list(missed(_known(_vm(1)), [], told)) == told
    assert list(missed(_known(_vm(1)), [_vm(1)], told)) == told


def test_what_the_service_told_after_it_was_asked_is_newer() -> None:
    """Whichever of the two came last, each value is its last."""
    changes = [Changed(_vm(1).path, {"state": state}) for state in ("suspended", "running")]
    assert list(missed(_known(_vm(1)), [_vm(1, "suspended")], changes)) == []
    assert list(missed({}, [], [Added(_vm(1).path, _vm(1)), *changes[:1]])) == [
        Added(_vm(1).path, _vm(1, "suspended"))
    ]


def test_an_id_that_is_another_vms_now() -> None:
    """A service with another directory counts anew: the VM is not the one that was known."""
    before, now = _vm(1, created_timestamp=1), _vm(1, created_timestamp=2)
    assert list(missed(_known(before), [now], [])) == [Removed(now.path), Added(now.path, now)]
