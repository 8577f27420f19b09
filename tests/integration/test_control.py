"""What can be done with a VM while it runs, on the crosvm stand-in: answers, errors, silences."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tests.rig import (
    CROSVM,
    ERROR,
    MANAGER_PATH,
    STANDARD_ERROR,
    Client,
    Rig,
    Service,
    guest,
    listening,
    plain,
    refused,
)
from vmbus.bus.wire import Variant

MIB = 1 << 20


def _disk(directory: Path, size: int = MIB, head: bytes = b"") -> Path:
    disk = directory / "disk"
    disk.write_bytes(head.ljust(size, b"\0"))
    return disk


async def test_suspend_and_resume(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path))
    await bus.vm(path, "Suspend")
    assert await bus.get(path, "State") == "suspended"
    async with refused(ERROR + "InvalidState") as text:
        await bus.vm(path, "Suspend")
    assert "suspended" in text[0]
    await bus.vm(path, "Resume")
    assert await bus.get(path, "State") == "running"
    async with refused(ERROR + "InvalidState"):
        await bus.vm(path, "Resume")
    states = [plain(m.body)[1].get("State") for m in bus.of(path)]
    assert [state for state in states if state] == ["starting", "running", "suspended", "running"]
    await bus.vm(path, "Kill")


async def test_stop_of_a_suspended_vm_lets_its_guest_hear_of_it(
    bus: Client, tmp_path: Path
) -> None:
    path = await bus.run(guest(tmp_path))
    await bus.vm(path, "Suspend")
    await bus.vm(path, "Stop", "t", 0)
    assert (await bus.died(path))[1:] == ["stopped", 0]


@pytest.mark.parametrize("member", ["Suspend", "Resume"])
async def test_only_a_vm_that_runs_can_be_suspended(
    bus: Client, tmp_path: Path, member: str
) -> None:
    path = await bus.create(kernel=guest(tmp_path))
    async with refused(ERROR + "InvalidState"):
        await bus.vm(path, member)
    assert await bus.get(path, "State") == "not-started"


async def test_memory(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path), memory_mib=256)
    assert await bus.get(path, "MemoryActual") == 256 * MIB
    await bus.vm(path, "SetMemoryTarget", "t", 64 * MIB)
    await bus.until(lambda m: m.path == path and "MemoryActual" in plain(m.body)[2])
    assert await bus.get(path, "MemoryActual") == 64 * MIB
    for wrong in (0, 256 * MIB + 1, 1 << 60):
        async with refused(STANDARD_ERROR + "InvalidArgs") as text:
            await bus.vm(path, "SetMemoryTarget", "t", wrong)
        assert str(wrong) in text[0]
    await bus.vm(path, "Kill")
    assert await bus.get(path, "MemoryActual") == 0
    async with refused(ERROR + "InvalidState"):
        await bus.vm(path, "SetMemoryTarget", "t", 64 * MIB)


async def test_memory_of_a_guest_that_can_not(bus: Client, tmp_path: Path) -> None:
    driverless = await bus.run(guest(tmp_path, no_balloon_driver=True))
    async with refused(ERROR + "ControlFailed") as text:
        await bus.vm(driverless, "SetMemoryTarget", "t", 64 * MIB)
    assert "driver" in text[0]
    assert await bus.get(driverless, "MemoryActual") == 256 * MIB
    without = await bus.run(guest(tmp_path), balloon=False)
    async with refused(ERROR + "NotSupported"):
        await bus.vm(without, "SetMemoryTarget", "t", 64 * MIB)
    for path in (driverless, without):
        await bus.vm(path, "Kill")


async def test_resize_disk(bus: Client, tmp_path: Path) -> None:
    disk = _disk(tmp_path)
    disks = [{"image": str(disk), "writable": True}, {"image": str(guest(tmp_path))}]
    path = await bus.run(guest(tmp_path), disks=disks)
    await bus.vm(path, "ResizeDisk", "ut", 0, 4 * MIB)
    assert disk.stat().st_size == 4 * MIB
    for index, size, error, words in (
        (0, 4 * MIB, STANDARD_ERROR + "InvalidArgs", "only grow"),
        (0, 2 * MIB, STANDARD_ERROR + "InvalidArgs", str(4 * MIB)),
        (0, 8 * MIB + 1, STANDARD_ERROR + "InvalidArgs", "512"),
        (2, 8 * MIB, STANDARD_ERROR + "InvalidArgs", "no disk 2"),
        (1, 8 * MIB, ERROR + "NotSupported", "read-only"),
    ):
        async with refused(error) as text:
            await bus.vm(path, "ResizeDisk", "ut", index, size)
        assert words in text[0]
    assert disk.stat().st_size == 4 * MIB
    await bus.vm(path, "Kill")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"reply": {"Err": 5}}, "ControlFailed"),
        ({"reply": {"ErrString": "no"}}, "ControlFailed"),
        ({"reply": {"Err": 95}}, "NotSupported"),
        ({"close": True}, "ControlFailed"),
        ({"garbage": True}, "ControlFailed"),
    ],
)
async def test_a_vmm_that_refuses(
    bus: Client, tmp_path: Path, answer: dict[str, Any], error: str
) -> None:
    """The state stays what it is, and the next request is understood."""
    path = await bus.run(guest(tmp_path, on={"SuspendVcpus": {**answer, "times": 1}}))
    async with refused(ERROR + error):
        await bus.vm(path, "Suspend")
    assert await bus.get(path, "State") == "running"
    await bus.vm(path, "Suspend")
    assert await bus.get(path, "State") == "suspended"
    await bus.vm(path, "Kill")


async def test_a_vmm_that_dies_of_a_request(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path, on={"SuspendVcpus": {"exit": 33, "silent": True}}))
    async with refused(ERROR + "ControlFailed"):
        await bus.vm(path, "Suspend")
    assert (await bus.died(path))[1:] == ["crash", 33]


@pytest.fixture
async def impatient(tmp_path: Path) -> Any:
    """A client of a service that gives its VMMs little time."""
    rig = Rig(system=False)
    settings = {"crosvm": str(CROSVM), "kvm": "on", "control_timeout": 0.5, "start_timeout": 2.0}
    service = Service(rig, settings)
    async with listening(rig) as connected:
        yield connected, service
    rig.close()


async def test_silent_vmms_hold_up_nobody(
    impatient: tuple[Client, Service], tmp_path: Path
) -> None:
    """With 20 requests that are never answered, reads and other VMs go on; then: TimedOut."""
    bus, _ = impatient
    mute = guest(tmp_path, on={"SuspendVcpus": {"silent": True}})
    paths = [await bus.run(mute) for _ in range(20)]
    asking = [asyncio.create_task(bus.vm(path, "Suspend")) for path in paths]
    for path in paths:
        assert await bus.get(path, "State") == "running"
    other = await bus.run(guest(tmp_path))
    await bus.vm(other, "Suspend")
    assert not any(task.done() for task in asking)
    for task in asking:
        async with refused(ERROR + "TimedOut"):
            await task
    for path in (*paths, other):
        await bus.vm(path, "Kill")


async def test_vmms_that_never_answer(impatient: tuple[Client, Service], tmp_path: Path) -> None:
    """50 hanging Starts fail in bounded time, slow down no 51st, and leave nothing behind."""
    bus, service = impatient
    fds = service.fds()
    hanging = guest(tmp_path, boot={"hang": True})
    paths = [await bus.create(kernel=hanging) for _ in range(50)]
    starts = [asyncio.create_task(bus.vm(path, "Start")) for path in paths]
    other = await bus.run(guest(tmp_path))
    await bus.vm(other, "Kill")
    for path, start in zip(paths, starts, strict=True):
        async with refused(ERROR + "StartFailed") as text:
            await start
        assert "2 s" in text[0]
        assert await bus.get(path, "State") == "failed"
        assert (await bus.died(path))[1:] == ["start-failed", -9]
    for path in (*paths, other):
        await bus.vm(path, "Remove")
    assert service.children() == []
    assert service.fds() == fds
    assert [each.name for each in (service.runtime / "vm").iterdir()] == ["counters.json"]


async def test_a_flood_on_stderr_and_a_child_that_holds_it(bus: Client, tmp_path: Path) -> None:
    noisy = guest(tmp_path, stderr_flood=8 * MIB, stderr_child=1000, then={"exit": 34})
    path = await bus.run(noisy)
    assert await bus.vm(path, "Wait") == ["guest-panic", 34]
    assert len(await bus.get(path, "LastWords")) < 1000


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"vsock": True}, "/dev/vhost-vsock"),
        ({"protected": True}, "protected"),
        ({"gdb_port": 1234, "cpus": 2, "vmm": "crosvm"}, "gdb_port"),
        ({"vmm": "crosvm", "shared_dirs": [{"source": "/tmp", "tag": "t"}]}, "read-only"),
    ],
)
async def test_not_supported(
    bus: Client, service: Service, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    """What this host can't do is found at Create, with its name."""
    assert not Path("/dev/vhost-vsock").exists()
    count, fds = await bus.get(MANAGER_PATH, "VMCount"), service.fds()
    async with refused(ERROR + "NotSupported") as text:
        await bus.create(kernel=guest(tmp_path), **config)
    assert named in text[0]
    assert await bus.get(MANAGER_PATH, "VMCount") == count
    assert service.fds() == fds


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"net": [{"tap": "no-such-tap"}]}, "net[0].tap: there is no network device"),
        ({"net": [{"tap": "lo"}]}, "net[0].tap: lo is not a tap"),
        ({"net": [{"tap": "../lo"}]}, "net[0].tap:"),
        ({"net": [{"tap": "lo", "mac": "01:00:00:00:00:00"}]}, "net[0].mac: must be a unicast"),
        ({"shared_dirs": [{"source": "/etc/passwd", "tag": "t"}]}, "is not a directory"),
        (
            {"shared_dirs": [{"source": "/etc", "tag": "t"}, {"source": "/tmp", "tag": "t"}]},
            "a tag of its own",
        ),
        ({"gdb_port": 0}, "gdb_port"),
    ],
)
async def test_bad_devices(bus: Client, tmp_path: Path, config: dict[str, Any], named: str) -> None:
    async with refused(ERROR + "InvalidConfig") as text:
        await bus.create(kernel=guest(tmp_path), **config)
    assert named in text[0]


async def test_a_tap_must_be_one(bus: Client, tmp_path: Path) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    async with refused(ERROR + "InvalidConfig") as text:
        await bus.create(fds=[null], kernel=guest(tmp_path), net=[{"tap": Variant("h", 0)}])
    os.close(null)
    assert "net[0].tap: it must be an open tap device" in text[0]


@pytest.mark.parametrize(
    ("head", "name"),
    [(b"QFI\xfb\0\0\0\3", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"QED\0", "QED")],
)
async def test_an_image_that_is_not_raw(
    bus: Client, tmp_path: Path, head: bytes, name: str
) -> None:
    """Never misread as raw: a guest could write such a head to its raw disk, too."""
    async with refused(ERROR + "InvalidConfig") as text:
        await bus.create(kernel=guest(tmp_path), disks=[{"image": str(_disk(tmp_path, head=head))}])
    assert f"disks[0].image: the image is {name}" in text[0]


async def test_all_of_it_at_once(bus: Client, tmp_path: Path) -> None:
    """Every key that crosvm knows, on a command line that the stand-in accepts."""
    shared = tmp_path / "shared"
    shared.mkdir()
    path = await bus.run(
        guest(tmp_path),
        name="all.of-it_1",
        vmm="crosvm",
        initrd=guest(tmp_path),
        params='console=ttyS0 quoted="a,b [c]"',
        memory_mib=64,
        cpus=1,
        disks=[
            {"image": str(_disk(tmp_path)), "writable": True, "id": "first", "direct": True},
            {"image": str(guest(tmp_path)), "id": "second"},
        ],
        shared_dirs=[{"source": str(shared), "tag": "share", "writable": True}],
        vsock=False,
        balloon=False,
        gdb_port=1234,
    )
    assert await bus.get(path, "State") == "running"
    await bus.vm(path, "Stop", "t", 0)
    assert (await bus.died(path))[1:] == ["stopped", 0]


async def test_bios(bus: Client, tmp_path: Path) -> None:
    path = await bus.create(bios=guest(tmp_path, then={"exit": 0}))
    await bus.vm(path, "Start")
    assert await bus.vm(path, "Wait") == ["shutdown", 0]


async def test_stop_while_a_suspend_is_under_way(bus: Client, tmp_path: Path) -> None:
    """Whoever of them is first, the guest hears that it is to end."""
    slow = guest(tmp_path, on={"SuspendVcpus": {"delay": 0.3}})
    path = await bus.run(slow)
    suspending = asyncio.create_task(bus.vm(path, "Suspend"))
    stopping = asyncio.create_task(bus.vm(path, "Stop", "t", 0))
    await stopping
    async with refused(ERROR + "InvalidState"):
        await suspending
    assert (await bus.died(path))[1:] == ["stopped", 0]


async def test_a_disk_that_is_open_for_direct_io(bus: Client, tmp_path: Path) -> None:
    fd = os.open(_disk(tmp_path), os.O_RDWR | os.O_DIRECT)
    try:
        path = await bus.create(
            fds=[fd], kernel=guest(tmp_path), disks=[{"image": Variant("h", 0), "writable": True}]
        )
    finally:
        os.close(fd)
    await bus.vm(path, "Remove")
