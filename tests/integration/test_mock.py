"""The mock for tests of clients: it does what the real service does, and what a test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pprint
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.contract import INTROSPECTABLE, documented
from tests.rig import (
    CROSVM,
    DEADLINE,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    PROPERTIES,
    ROOT,
    VM,
    Client,
    Rig,
    Service,
    client,
    guest,
    listening,
    plain,
    refused,
)
from tests.vmbusmock import MOCK, control, data_directory, mock, template
from vmbus import errors
from vmbus.bus.connection import RemoteError
from vmbus.bus.wire import Variant
from vmbus.client import VM as ClientVM
from vmbus.client import VMBus
from vmbus.events import Death
from vmbus.reasons import Reason

MIB = 1 << 20
VMMS = ["crosvm"]
Die = Callable[[ClientVM, str, int], Awaitable[None]]


@pytest.fixture
async def raw(own_rig: Rig) -> AsyncIterator[Client]:
    """A mock's caller, who hears all signals."""
    with mock(own_rig):
        async with listening(own_rig) as bus:
            yield bus


# The same as the real service


class Stage:
    """Where a scenario is played: on it, every reply, error and signal is written down."""

    def __init__(self, bus: VMBus, raw: Client, directory: Path) -> None:
        self.bus = bus
        self.raw = raw
        self.directory = directory
        self.heard: list[tuple[str, Any, list[Any]]] = []

    async def does(self, what: str, work: Awaitable[Any]) -> Any:
        """Write down what came of a call, and the signals since the one before."""
        result: Any = None
        try:
            async with asyncio.timeout(DEADLINE):
                result = await work
            outcome = _shown(result)
        except (errors.VMBusError, RemoteError) as error:
            outcome = _shown(error)
        # Whatever was sent before this is answered has come by then.
        await self.raw.call(MANAGER_PATH, PROPERTIES, "GetAll", "s", [MANAGER])
        signals = [
            [each.path, each.interface, each.member, _shown(plain(each.body))]
            for each in self.raw.signals
            if each.interface != MOCK
        ]
        self.raw.signals.clear()
        self.heard.append((what, outcome, signals))
        return result

    # What only the one side can be told, and only the other knows by itself.

    def kernel(self, **directives: Any) -> Path:
        return guest(self.directory, **directives)

    async def dies(self, vm: ClientVM, reason: str, status: int) -> None:
        """The guest does it by itself."""

    async def cannot_start(self, words: str) -> None:
        """The VMM says that by itself."""

    async def reports(self, vm: ClientVM, name: str, value: str | int) -> None:
        """The guest says what has this property told by itself."""
        await self.tell(vm, name, value)
        await self.raw.until(
            lambda m: (
                m.path == vm.path
                and m.member == "PropertiesChanged"
                and plain(m.body)[1].get(name) == value
            )
        )

    async def tell(self, vm: ClientVM, name: str, value: str | int) -> None:
        with await vm.open_console() as console:
            console.sendall(_REPORTS[name, value])


class MockStage(Stage):
    async def dies(self, vm: ClientVM, reason: str, status: int) -> None:
        await control(self.raw, "Die", "osi", vm.path, reason, status)

    async def cannot_start(self, words: str) -> None:
        await control(self.raw, "FailNextStart", "s", words)

    async def tell(self, vm: ClientVM, name: str, value: str | int) -> None:
        kind = "s" if isinstance(value, str) else "i"
        await control(self.raw, f"Set{name}", f"o{kind}", vm.path, value)


#: What a guest says, by what that changes.
_REPORTS: dict[tuple[str, str | int], bytes] = {
    ("PayloadState", "started"): b"X_VMBUS_PAYLOAD=started\n",
    ("StatusText", "fine"): b"STATUS=fine\n",
    ("PayloadState", "ready"): b"READY=1\n",
    ("PayloadExitStatus", 3): b"EXIT_STATUS=3\n",
}


def _shown(value: Any) -> Any:
    """A value without what must differ: numbers of processes, times, a VMM's words, texts."""
    if isinstance(value, (socket.socket, BinaryIO)) or hasattr(value, "fileno"):
        value.close()
        return "a descriptor"
    if isinstance(value, errors.InvalidConfig):
        # Which keys are wrong is part of the contract, the words are not.
        keys = re.findall(r"(?:^|; )([\w\[\]., ]+):", str(value))
        return ["InvalidConfig", sorted(set(", ".join(keys).split(", ")))]
    if isinstance(value, Exception):
        return getattr(value, "name", type(value).__name__)
    if isinstance(value, ClientVM):
        return value.path
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, _shown(asdict(value))]
    if isinstance(value, dict):
        return {key: _hidden(key, _shown(each)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    return value


def _hidden(key: str, value: Any) -> Any:
    name = str(key).replace("_", "").lower()
    differs = name in ("pid", "lastwords") or name.endswith(("requesterpid", "timestamp"))
    return f"some {name}" if differs and value else value


async def _play(stage: Stage) -> list[tuple[str, Any, list[Any]]]:
    """A client's life with VMs, in good and bad."""
    bus, does = stage.bus, stage.does
    await does("about", bus.about())
    await _configs(stage)
    images = [stage.directory / name for name in ("data", "root")]
    for image in images:
        image.write_bytes(bytes(MIB))
    disks: Any = [{"image": images[0], "writable": True, "id": "data"}, {"image": images[1]}]
    vm = await does(
        "create", bus.create(kernel=stage.kernel(), name="web", memory_mib=128, disks=disks)
    )
    await does("same name", bus.create(kernel=stage.kernel(), name="web"))
    for which in ("web", vm.path, vm.path.rpartition("/")[2], "no", "/org/vmbus1/vm/99"):
        await does(f"find {which}", bus.vm(which))
    known = await does("read", vm.properties())
    await does("find by CID", bus.vm_by_cid(known.cid))
    await does("find by a wrong CID", bus.vm_by_cid(7))
    await _misdeeds(stage, vm, "not started")
    await does("console before", vm.open_console())
    await does("start", vm.start())
    await _misdeeds(stage, vm, "running")
    await does("grow", vm.resize_disk(0, 2 * MIB))
    await does("console", vm.open_console())
    await does("log", vm.open_log())
    await does("suspend", vm.suspend())
    await _misdeeds(stage, vm, "suspended")
    await does("less memory", vm.set_memory_target(64 * MIB))
    await does("resume", vm.resume())
    await does("all", bus.vms())
    await does("ask for the memory", vm.memory_actual())
    await does("all now", bus.vms())
    await does("stop", vm.stop())
    await _misdeeds(stage, vm, "dead")
    await does("wait", vm.wait())
    await does("read the dead", vm.properties())
    await does("remove", vm.remove())
    await _misdeeds(stage, vm, "removed")
    await _reports(stage)
    await _ends(stage)
    await _collected(stage)
    await _raw(stage)
    await does("all in the end", bus.vms())
    await does("about in the end", bus.about())
    return stage.heard


async def _configs(stage: Stage) -> None:
    kernel = stage.kernel()
    bad: list[dict[str, Any]] = [
        {},
        {"kernel": kernel, "bios": kernel},
        {"bios": kernel, "params": "x", "initrd": kernel},
        {"kernel": kernel, "memory_mib": 1, "cpus": 0, "name": "-", "vmm": "xen"},
        {"kernel": kernel, "memory_mib": "64", "cpus": True, "name": 7, "balloon": 1},
        {"kernel": kernel, "colour": "red", "gdb_port": 80, "collect": "never"},
        {"kernel": kernel, "params": "a\nb", "vsock": "yes", "protected": 0},
        {"kernel": kernel, "params": "x" * 2048, "kill_on_disconnect": "no"},
        {"kernel": kernel, "disks": [{"image": kernel, "id": "x" * 21, "wheels": 4}]},
        {"kernel": kernel, "disks": [{"image": kernel}] * 9},
        {"kernel": kernel, "net": [{"tap": "no/tap", "mac": "1"}]},
        {"kernel": kernel, "net": [{"tap": "no/tap", "mac": "01:00:00:00:00:00"}]},
        {"kernel": kernel, "shared_dirs": [{"source": "/nothing", "tag": "a b"}]},
        {"kernel": kernel, "shared_dirs": [{"source": "/", "tag": "a"}] * 2},
        {"kernel": kernel, "protected": True},
        {"kernel": kernel, "vmm": "qemu"},
    ]
    for number, config in enumerate(bad):
        await stage.does(f"bad config {number}", stage.bus.create(**config))


async def _misdeeds(stage: Stage, vm: ClientVM, when: str) -> None:
    """What a VM in that state refuses, all of it."""
    calls: list[tuple[str, set[str], Callable[[], Awaitable[Any]]]] = [
        ("resume", {"suspended"}, vm.resume),
        ("suspend", {"running"}, vm.suspend),
        ("start", {"not started"}, vm.start),
        ("remove", {"not started", "dead"}, vm.remove),
        ("kill", {"running", "suspended"}, vm.kill),
        ("stop", {"running", "suspended"}, vm.stop),
        ("console", {"not started", "running", "suspended"}, vm.open_console),
        ("too much memory", set(), lambda: vm.set_memory_target(1 << 40)),
        ("a disk that is not there", set(), lambda: vm.resize_disk(7, MIB)),
        ("a disk that shrinks", set(), lambda: vm.resize_disk(0, 512)),
        ("an odd size", set(), lambda: vm.resize_disk(0, 3 * MIB + 1)),
        ("a read-only disk", set(), lambda: vm.resize_disk(1, 4 * MIB)),
        ("negative time", set(), lambda: vm.stop(-1)),
    ]
    for what, right, call in calls:
        if when not in right:
            await stage.does(f"{what}, {when}", call())
    await stage.does(f"read, {when}", vm.properties())


async def _reports(stage: Stage) -> None:
    """A guest that says how far it is, and has no vsock to be asked by."""
    bus, does = stage.bus, stage.does
    vm = await does(
        "create one that reports", bus.create(kernel=stage.kernel(relay=True), vsock=False)
    )
    await does("a port before", vm.connect_vsock(1024))
    await does("start one that reports", vm.start())
    await does("a port", vm.connect_vsock(1024))
    await does("a low port", vm.connect_vsock(1023))
    for name, value in _REPORTS:
        await does(f"reports {name} {value}", stage.reports(vm, name, value))
        await does(f"read with {name} {value}", vm.properties())
    await does("kill one that reports", vm.kill())
    await does("a port after", vm.connect_vsock(1024))
    await does("remove one that reports", vm.remove())


async def _ends(stage: Stage) -> None:
    """Each way to die, and who waits for it."""
    bus, does = stage.bus, stage.does
    vm = await does("create an unlucky one", bus.create(kernel=stage.kernel(boot={"error": "no"})))
    await stage.cannot_start("exiting with error 1: no")
    await does("a start that fails", vm.start())
    await does("wait for the failed", vm.wait())
    await does("read the failed", vm.properties())
    for reason, status in (("guest-panic", 34), ("reboot", 32), ("shutdown", 0)):
        kernel = stage.kernel(then={"exit": status})
        vm = await does(f"create for {reason}", bus.create(kernel=kernel))
        waiting = asyncio.create_task(vm.wait())
        await vm.start()
        await stage.dies(vm, reason, status)
        await does(f"wait for {reason}", waiting)
        await does(f"read after {reason}", vm.properties())
    vm = await does("create for a kill", bus.create(kernel=stage.kernel(), balloon=False))
    await does("start for a kill", vm.start())
    await does("no balloon", vm.set_memory_target(64 * MIB))
    await does("kill", vm.kill())
    await does("kill again", vm.kill())
    vm = await does("create for all", bus.create(kernel=stage.kernel()))
    await does("start for all", vm.start())
    await does("stop all", bus.stop_all())
    await does("wait for all", vm.wait())
    idle = await does("create for nothing", bus.create(kernel=stage.kernel()))
    waiting = asyncio.create_task(idle.wait())
    await idle.properties()
    await does("remove what never started", idle.remove())
    await does("wait for what never started", waiting)


async def _collected(stage: Stage) -> None:
    """VMs that go by themselves."""
    bus, does = stage.bus, stage.does
    vm = await does("create to collect", bus.create(kernel=stage.kernel(), collect="on-death"))
    await does("start to collect", vm.start())
    waiting = asyncio.create_task(vm.wait())
    await does("kill the collected", vm.kill())
    await does("wait for the collected", waiting)
    await does("read the collected", vm.properties())
    async with bus.deaths() as deaths:
        async with VMBus.session() as other:
            vm = await other.create(kernel=stage.kernel(), kill_on_disconnect=True)
            await does("start what goes along", vm.start())
        async with asyncio.timeout(DEADLINE):
            await does("its death", anext(aiter(deaths)))


async def _raw(stage: Stage) -> None:
    """What no well-made client asks for."""
    raw, root = stage.raw, MANAGER_PATH
    vm = str(await stage.does("create for raw calls", raw.create(kernel=str(stage.kernel()))))
    calls: list[tuple[Any, ...]] = [
        (root, MANAGER, "Create", "s", ["x"]),
        (root, MANAGER, "Nothing"),
        (root, VM, "Start"),
        (vm, "org.example", "Start"),
        ("/no", MANAGER, "List"),
        ("/org/vmbus1/vm", MANAGER, "List"),
        (vm, VM, "Start", "u", [1]),
        (root, MANAGER, "Create", "a{sv}", [{"kernel": Variant("s", "relative")}]),
        (root, MANAGER, "Create", "a{sv}", [{"kernel": Variant("s", "/nothing")}]),
        (root, MANAGER, "Create", "a{sv}", [{"kernel": Variant("h", 3)}]),
        (root, MANAGER, "List"),
        (root, OBJECT_MANAGER, "GetManagedObjects"),
        (vm, PROPERTIES, "Get", "ss", [VM, "Nothing"]),
        (vm, PROPERTIES, "Get", "ss", ["org.example", "State"]),
        (vm, PROPERTIES, "Get", "ss", ["", "State"]),
        (vm, PROPERTIES, "Get", "ss", [VM, "MemoryActual"]),
        (root, PROPERTIES, "Get", "ss", [VM, "State"]),
        (root, PROPERTIES, "Get", "ss", [MANAGER, "VMCount"]),
        (vm, PROPERTIES, "GetAll", "s", [PROPERTIES]),
        (vm, PROPERTIES, "GetAll", "s", ["org.example"]),
        (vm, PROPERTIES, "Set", "ssv", [VM, "State", Variant("s", "dead")]),
        (vm, PROPERTIES, "Set", "ssv", [VM, "Nothing", Variant("s", "dead")]),
    ]
    for call in calls:
        await stage.does(f"{call}", raw.call(*call))
    for path in ("/", "/org", root, "/org/vmbus1/vm", vm):
        await stage.does(f"introspect {path}", _members(raw, path))


async def _members(raw: Client, path: str) -> Any:
    """What an object says it has, whoever wrote that down and how."""
    (xml,) = await raw.call(path, INTROSPECTABLE, "Introspect")
    node = ElementTree.fromstring(xml)
    found: dict[str, Any] = {each.attrib["name"]: "a node" for each in node.iterfind("node")}
    for interface in node.iterfind("interface"):
        if interface.attrib["name"] != MOCK:
            found[interface.attrib["name"]] = sorted(
                (each.tag, each.attrib["name"], each.get("type", ""), _args(each))
                for each in interface
                if "name" in each.attrib
            )
    return found


def _args(member: ElementTree.Element) -> str:
    args = member.iterfind("arg")
    return " ".join(f"{arg.get('direction', '')}{arg.attrib['type']}" for arg in args)


async def _on_stage(kind: type[Stage], rig: Rig, directory: Path) -> list[Any]:
    directory.mkdir()
    async with client(rig) as raw, VMBus.session() as bus:
        await raw.listen()
        if not (await bus.about()).available_vmms:
            await raw.until(lambda message: "AvailableVMMs" in plain(message.body)[1])
        raw.signals.clear()
        return await _play(kind(bus, raw, directory))


async def test_the_mock_says_all_that_the_service_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One scenario, twice: every reply, every error's name and every signal are the same."""
    heard = []
    for kind in (Stage, MockStage):
        with contextlib.ExitStack() as stack:
            rig = Rig(system=False)
            stack.callback(rig.close)
            monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", rig.address)
            if kind is Stage:
                settings = {"crosvm": str(CROSVM), "kvm": "on", "qemu": "/nonexistent"}
                Service(rig, settings)
            else:
                stack.enter_context(mock(rig, {"vmms": VMMS}))
            heard.append(await _on_stage(kind, rig, tmp_path / kind.__name__))
    real, mocked = heard
    assert len(real) > 100
    differences = [pair for pair in zip(real, mocked, strict=True) if pair[0] != pair[1]]
    assert not differences, pprint.pformat(differences, width=140)


def test_the_mock_knows_every_method_reason_and_error() -> None:
    """What the scenario can't show: nothing that the contract names is missing."""
    made = template()
    methods = {each.attrib["name"] for each in documented()[MANAGER].iterfind("method")}
    assert methods <= set(made._MANAGER)
    methods = {each.attrib["name"] for each in documented()[VM].iterfind("method")}
    assert methods <= set(made._VM)
    assert set(made.REASONS) == {str(each) for each in Reason} | {"hangup"}
    own = {name.rpartition(".")[2] for name in _ERRORS if name.startswith("org.vmbus1")}
    assert set(made._OWN_ERRORS) == own


# What a test tells it

_ERRORS = {
    kind.dbus_name: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.VMBusError)
}


async def test_every_error_as_its_class(raw: Client, own_rig: Rig, tmp_path: Path) -> None:
    """Whatever can go wrong with the service can be had from the mock, once each time."""
    async with VMBus.session() as bus:
        vm = await bus.create(kernel=guest(tmp_path))
        for name, kind in _ERRORS.items():
            await control(raw, "FailNext", "sss", "Suspend", name, "said so")
            with pytest.raises(kind, match="said so") as raised:
                await vm.suspend()
            assert type(raised.value) is kind
        with pytest.raises(errors.InvalidState, match="must be running"):
            await vm.suspend()


async def test_a_death_of_each_reason(raw: Client, tmp_path: Path) -> None:
    """Any reason of the contract, with any status; others are refused, and so are the dead."""
    for reason in template().REASONS:
        path = await raw.create(kernel=str(guest(tmp_path)))
        async with refused("org.vmbus1.Error.InvalidState"):
            await control(raw, "Die", "osi", path, reason, 3)
        await raw.vm(path, "Start")
        await control(raw, "Die", "osi", path, reason, 3)
        assert (await raw.died(path))[1:] == [reason, 3]
        assert await raw.vm(path, "Wait") == [reason, 3]
    async with refused("org.freedesktop.DBus.Error.InvalidArgs"):
        await control(raw, "Die", "osi", path, "boredom", 0)
    async with refused("org.freedesktop.DBus.Error.UnknownObject"):
        await control(raw, "Die", "osi", "/no", "crash", 0)


async def test_a_start_that_fails_once(raw: Client, tmp_path: Path) -> None:
    """The next Start fails with the words given, the one after it doesn't."""
    await control(raw, "FailNextStart", "s", "no luck")
    first, second = [await raw.create(kernel=str(guest(tmp_path))) for _ in range(2)]
    async with refused("org.vmbus1.Error.StartFailed") as texts:
        await raw.vm(first, "Start")
    assert texts == ["crosvm: no luck"]
    await raw.vm(second, "Start")


async def test_a_guest_does_not_take_back_what_it_reported(raw: Client, tmp_path: Path) -> None:
    """States go forward only, the exit status comes once, and only a VM that runs reports."""
    path = await raw.create(kernel=guest(tmp_path))
    async with refused("org.vmbus1.Error.InvalidState"):
        await control(raw, "SetPayloadState", "os", path, "ready")
    await raw.vm(path, "Start")
    await control(raw, "SetPayloadState", "os", path, "ready")
    async with refused("org.freedesktop.DBus.Error.InvalidArgs"):
        await control(raw, "SetPayloadState", "os", path, "started")
    await control(raw, "SetPayloadState", "os", path, "finished")
    await control(raw, "SetPayloadExitStatus", "oi", path, 3)
    async with refused("org.freedesktop.DBus.Error.InvalidArgs"):
        await control(raw, "SetPayloadExitStatus", "oi", path, 0)
    assert [await raw.get(path, f"Payload{name}") for name in ("State", "ExitStatus")] == [
        "finished",
        3,
    ]


async def test_dbusmocks_own_controls_work(raw: Client, tmp_path: Path) -> None:
    """A log of calls, properties that are set from outside, methods of a test's own, a reset."""
    path = await raw.create(kernel=str(guest(tmp_path)), name="web")
    await raw.call(
        path, MOCK, "UpdateProperties", "sa{sv}", [VM, {"LastWords": Variant("s", "so be it")}]
    )
    assert await raw.get(path, "LastWords") == "so be it"
    code = 'ret = "/org/vmbus1/vm/77"'
    await raw.call(MANAGER_PATH, MOCK, "AddMethod", "sssss", [MANAGER, "GetVM", "s", "o", code])
    assert await raw.call(MANAGER_PATH, MANAGER, "GetVM", "s", ["x"]) == ["/org/vmbus1/vm/77"]
    (calls,) = await raw.call(MANAGER_PATH, MOCK, "GetMethodCalls", "s", ["Create"])
    assert [each[1][0]["name"] for each in calls] == ["web"]
    await raw.call(MANAGER_PATH, MOCK, "Reset")
    assert await raw.call(MANAGER_PATH, MANAGER, "List") == [[]]


async def test_the_mock_keeps_nothing_open(own_rig: Rig, tmp_path: Path) -> None:
    """Descriptors that came, and those that went, are closed with their VM at the latest."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    disks: Any = [{"image": image, "writable": True}]
    with mock(own_rig) as running:
        async with VMBus.session() as bus:
            await bus.about()
            before = running.fds()
            async with await bus.create(kernel=guest(tmp_path), disks=disks) as vm:
                await vm.start()
                (await vm.open_log()).close()
                with await vm.open_console() as console:
                    await vm.kill()
                    assert os.read(console.fileno(), 1) == b""
                assert await vm.wait() == Death("killed", -9)
            with pytest.raises(errors.InvalidConfig):
                await bus.create(kernel=guest(tmp_path), disks=disks, cpus=0)
            await bus.about()  # It has put away the call before when it takes the next.
            assert running.fds() == before


# Where it is found


async def test_the_template_is_found_by_its_name(own_rig: Rig, tmp_path: Path) -> None:
    """In a directory of XDG_DATA_DIRS."""
    with mock(own_rig, data=data_directory(tmp_path / "share")):
        async with VMBus.session() as bus:
            assert (await bus.about()).available_vmms == ("crosvm", "qemu")


async def test_the_template_is_installed_where_it_is_found(own_rig: Rig, tmp_path: Path) -> None:
    """With the interfaces that it reads, by the build files."""
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    # What is installed is made with the first Python there, which needs what this one has.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (
        ["setup", "--prefix=/usr", str(tmp_path / "build"), str(ROOT)],
        ["install", "-C", str(tmp_path / "build"), "--destdir", str(tmp_path / "root")],
    ):
        done = subprocess.run(
            [*meson, *command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    with mock(own_rig, {"version": "7"}, data=tmp_path / "root" / "usr" / "share"):
        async with VMBus.session() as bus:
            assert (await bus.about()).version == "7"
