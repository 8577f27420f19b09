"""Real Linux guests under QEMU (TCG): what only they can prove."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import ERROR, Client, Rig, Service, client, refused
from vmbus.bus.wire import Variant

#: Seconds for a guest to boot on a busy host.
BOOT = 60.0


@pytest.fixture(scope="module")
def service(rig: Rig) -> Service:
    """A vmbusd whose VMs run in QEMU."""
    return Service(rig, {"crosvm": "/none"})


class Guest:
    """A VM whose guest runs a shell script, and its console."""

    def __init__(self, bus: Client, path: str, stream: socket.socket) -> None:
        self.bus = bus
        self.path = path
        self.text = ""
        self._stream = stream
        self._stream.setblocking(False)

    async def prints(self, wanted: str) -> None:
        """Wait until the console has shown this."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(BOOT):
            while wanted not in self.text:
                data = await loop.sock_recv(self._stream, 65536)
                assert data, f"the console ended without {wanted!r}: {self.text}"
                self.text += data.decode("utf-8", "replace")

    async def dies(self) -> list[Any]:
        """The reason and the status."""
        async with asyncio.timeout(BOOT):
            answer = await self.bus.vm(self.path, "Wait")
        self._stream.close()
        return answer


@pytest.fixture
def boot(bus: Client, guest_files: tuple[Path, Path]) -> Any:
    """Boot a guest that runs a script; what else is given goes into its config."""

    async def start(script: str, *, fds: Any = (), **config: Any) -> Guest:
        run = base64.b64encode(script.encode()).decode()
        path = await bus.create(
            fds=fds,
            kernel=guest_files[0],
            initrd=guest_files[1],
            params=f"console=ttyS0 quiet panic=-1 cryptomgr.notests vmbus.run={run}",
            **{"memory_mib": 128, **config},
        )
        (fd,) = await bus.vm(path, "OpenConsole")
        guest = Guest(bus, path, socket.socket(fileno=fd))
        await bus.vm(path, "Start")
        return guest

    return start


async def test_a_guest_boots_prints_and_powers_off(bus: Client, boot: Any) -> None:
    guest = await boot("echo free: $(free -m | awk 'NR==2 {print $2}'); nproc")
    assert await bus.get(guest.path, "State") == "running"
    await guest.prints("script ended with 0")
    assert await guest.dies() == ["shutdown", 0]
    (log,) = await bus.vm(guest.path, "OpenLog")
    with os.fdopen(log, "rb") as file:
        assert b"vmbus-guest: up" in file.read()


async def test_a_reboot_is_told_as_one(boot: Any) -> None:
    assert await (await boot("reboot -f; sleep 100")).dies() == ["reboot", 0]


async def test_a_panic_is_told_as_one(boot: Any) -> None:
    assert await (await boot("echo c > /proc/sysrq-trigger; sleep 100")).dies() == [
        "guest-panic",
        0,
    ]


async def test_kills_asked_for_and_not(bus: Client, boot: Any) -> None:
    asked, not_asked = await boot("sleep 100"), await boot("sleep 100")
    await bus.vm(asked.path, "Kill")
    os.kill(await bus.get(not_asked.path, "Pid"), signal.SIGKILL)
    assert await asked.dies() == ["killed", -9]
    assert await not_asked.dies() == ["signal", -9]


async def test_an_administrators_sigterm_is_a_signal(bus: Client, boot: Any) -> None:
    """QEMU ends in good order then, with status 0, but nobody had asked vmbus for it."""
    guest = await boot("sleep 100")
    os.kill(await bus.get(guest.path, "Pid"), signal.SIGTERM)
    assert await guest.dies() == ["signal", 0]


async def test_the_console_goes_both_ways(boot: Any) -> None:
    guest = await boot("echo say something; read line; echo you said $line")
    await guest.prints("say something")
    await asyncio.get_running_loop().sock_sendall(guest._stream, b"hello\n")
    await guest.prints("you said hello")
    assert await guest.dies() == ["shutdown", 0]


async def test_descriptors_of_files_that_the_service_may_not_open(
    bus: Client, guest_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """A kernel that has no name any more is copied; a disk is used through its descriptor."""
    kernel, initrd = (tmp_path / "kernel", tmp_path / "initrd")
    kernel.write_bytes(guest_files[0].read_bytes())
    initrd.write_bytes(guest_files[1].read_bytes())
    disk = tmp_path / "disk"
    disk.write_bytes(b"vmbus was here".ljust(1 << 20, b"\0"))
    fds = [os.open(kernel, os.O_RDONLY), os.open(initrd, os.O_RDONLY), os.open(disk, os.O_RDWR)]
    kernel.unlink()
    initrd.unlink()
    run = base64.b64encode(b"head -c 14 /dev/vda; echo; echo changed > /dev/vda; sync").decode()
    path = await bus.create(
        fds=fds,
        kernel=Variant("h", 0),
        initrd=Variant("h", 1),
        params=f"console=ttyS0 quiet vmbus.run={run}",
        memory_mib=128,
        disks=[{"image": Variant("h", 2), "writable": True, "id": "data"}],
    )
    for fd in fds:
        os.close(fd)
    (fd,) = await bus.vm(path, "OpenConsole")
    guest = Guest(bus, path, socket.socket(fileno=fd))
    await bus.vm(path, "Start")
    await guest.prints("vmbus was here")
    assert await guest.dies() == ["shutdown", 0]
    assert disk.read_bytes().startswith(b"changed\n")


async def test_a_read_only_disk_is_one(boot: Any, tmp_path: Path) -> None:
    """Also where the descriptor would allow more."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"keep".ljust(1 << 20, b"\0"))
    fd = os.open(disk, os.O_RDWR)
    try:
        script = "cat /sys/block/vda/ro; echo lost > /dev/vda || echo refused"
        guest = await boot(script, fds=[fd], disks=[{"image": Variant("h", 0)}])
    finally:
        os.close(fd)
    await guest.prints("refused")
    await guest.dies()
    assert disk.read_bytes().startswith(b"keep")


async def test_a_kernel_that_is_none(bus: Client, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_text("not a kernel")
    path = await bus.create(kernel=kernel)
    async with refused(ERROR + "StartFailed") as text:
        await bus.vm(path, "Start")
    assert "invalid kernel header" in text[0]
    assert await bus.get(path, "LastWords") in text[0]


@pytest.fixture
async def microvms(guest_files: tuple[Path, Path]) -> AsyncIterator[Client]:
    """A client of a service that has QEMU emulate its smallest machine."""
    rig = Rig(system=False)
    Service(rig, {"crosvm": "/none", "qemu_machine": "microvm"})
    async with client(rig) as connected:
        await connected.listen()
        yield connected
    rig.close()


def _clock() -> str:
    """What an emulated microvm needs to know: the host's time-stamp counter, in kHz."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return f"tsc_early_khz={int(float(line.partition(':')[2]) * 1000)}"
    raise AssertionError("no CPU frequency")


async def test_microvm(microvms: Client, guest_files: tuple[Path, Path], tmp_path: Path) -> None:
    """The same by virtio-mmio: a disk, a panic, and a reboot without a word about how."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"vmbus was here".ljust(1 << 20, b"\0"))
    ends = {
        "head -c 14 /dev/vda": ["shutdown", 0],
        "reboot -f; sleep 100": ["reboot", 0],
        "echo c > /proc/sysrq-trigger; sleep 100": ["guest-panic", 0],
    }
    for script, end in ends.items():
        run = base64.b64encode(script.encode()).decode()
        path = await microvms.create(
            kernel=guest_files[0],
            initrd=guest_files[1],
            params=f"console=ttyS0 quiet panic=-1 {_clock()} vmbus.run={run}",
            memory_mib=128,
            disks=[{"image": str(disk)}],
        )
        await microvms.vm(path, "Start")
        async with asyncio.timeout(BOOT):
            assert await microvms.vm(path, "Wait") == end
        (log,) = await microvms.vm(path, "OpenLog")
        with os.fdopen(log, "rb") as file:
            assert (b"vmbus was here" in file.read()) == ("vda" in script)
