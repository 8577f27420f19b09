"""Real Linux guests under QEMU (TCG): what only they can prove."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import ERROR, Client, Rig, Service, listening, plain, refused
from tests.taps import idle_tap, open_tap
from vmbus.bus.connection import RemoteError
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

    def take_up(self, stream: socket.socket) -> None:
        """Go on with another stream of the same console."""
        self._stream.close()
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

    async def silence(self) -> None:
        """Take what is under way, then see that nothing comes for a while."""
        loop = asyncio.get_running_loop()
        quiet = 0
        while quiet < 2:
            try:
                async with asyncio.timeout(0.5):
                    await loop.sock_recv(self._stream, 65536)
            except TimeoutError:
                quiet += 1
            else:
                assert quiet == 0, "the guest prints again"

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


async def test_a_block_device(boot: Any, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"on a block device".ljust(1 << 20, b"\0"))
    attached = ["losetup", "--find", "--show", str(image)]
    loop = subprocess.run(attached, check=True, capture_output=True, text=True).stdout.strip()
    try:
        disks = [{"image": loop, "writable": True}]
        guest = await boot("head -c 17 /dev/vda; echo written > /dev/vda; sync", disks=disks)
        await guest.prints("on a block device")
        assert await guest.dies() == ["shutdown", 0]
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    assert image.read_bytes().startswith(b"written")


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
    async with listening(rig) as connected:
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


async def test_microvm_has_the_port_too(microvms: Client, guest_files: tuple[Path, Path]) -> None:
    path = await microvms.create(**_example(guest_files, f"example.status=3 {_clock()}"))
    await microvms.vm(path, "Start")
    async with asyncio.timeout(BOOT):
        assert await microvms.vm(path, "Wait") == ["shutdown", 0]
    assert await microvms.get(path, "PayloadExitStatus") == 3


async def test_the_guest_sees_the_power_button(bus: Client, boot: Any) -> None:
    guest = await boot("echo ready; wait-powerbtn; echo pressed")
    await guest.prints("ready")
    stopping = asyncio.create_task(bus.vm(guest.path, "Stop", "t", int(BOOT * 1_000_000)))
    # Pressed before the guest listens it is lost, and pressing once more does no harm.
    await bus.until_state(guest.path, "stopping")
    pressing = asyncio.create_task(_press_until_dead(bus, guest.path))
    await guest.prints("pressed")
    assert await guest.dies() == ["stopped", 0]
    await asyncio.gather(stopping, pressing)


async def _press_until_dead(bus: Client, path: str) -> None:
    presses = []
    try:
        while await bus.get(path, "State") == "stopping":
            presses.append(asyncio.create_task(bus.vm(path, "Stop", "t", int(BOOT * 1_000_000))))
            await asyncio.wait(presses[-1:], timeout=0.5)
    finally:
        await asyncio.gather(*presses, return_exceptions=True)
    assert not any(press.exception() for press in presses)


def _example(guest_files: tuple[Path, Path], params: str) -> dict[str, Any]:
    """The config of the guest that is in examples/guest."""
    kernel, initrd = guest_files
    params = f"console=ttyS0 quiet panic=-1 cryptomgr.notests rdinit=/example {params}"
    return {"kernel": kernel, "initrd": initrd, "params": params, "memory_mib": 128}


async def test_the_example_reports_all_of_its_life(
    bus: Client, guest_files: tuple[Path, Path]
) -> None:
    """By the virtio port: every step in its order, its exit status, and then it is dead."""
    config = _example(guest_files, "example.status=7")
    path = await bus.create(**config, ready_timeout_usec=int(BOOT * 1_000_000))
    await bus.vm(path, "Start")
    async with asyncio.timeout(BOOT):
        assert await bus.vm(path, "Wait") == ["shutdown", 0]
    told = [plain(m.body)[1] for m in bus.of(path) if m.member == "PropertiesChanged"]
    steps = [each["PayloadState"] for each in told if "PayloadState" in each]
    # Those that come as one are told as one.
    assert steps[0] == "starting" and steps[-1] == "finished"
    assert sorted(steps, key=["starting", "started", "ready", "finished"].index) == steps
    found = await bus.get_all(path)
    assert found["PayloadState"] == "finished"
    assert found["PayloadExitStatus"] == 7
    assert found["StatusText"] == "Done, ending with 7"


async def test_a_guest_is_ready_when_it_says_so(bus: Client, boot: Any) -> None:
    """And goes on, long after it had to be."""
    script = """
        for each in /sys/class/virtio-ports/*; do port=/dev/${each##*/}; done
        read go; echo READY=1 >$port; echo said; read go
    """
    guest = await boot(script, ready_timeout_usec=int(BOOT * 1_000_000))
    assert await bus.get(guest.path, "PayloadState") == "starting"
    await guest.prints("vmbus-guest: up")
    await asyncio.get_running_loop().sock_sendall(guest._stream, b"go\n")
    await guest.prints("said")
    await bus.until(
        lambda m: (
            m.path == guest.path
            and m.member == "PropertiesChanged"
            and plain(m.body)[1].get("PayloadState") == "ready"
        )
    )
    await asyncio.get_running_loop().sock_sendall(guest._stream, b"go\n")
    assert await guest.dies() == ["shutdown", 0]


async def test_a_guest_that_hangs_is_killed(boot: Any) -> None:
    assert await (await boot("sleep 1000", ready_timeout_usec=500_000)).dies() == ["hangup", -9]


async def test_a_guest_that_ignores_the_power_button(bus: Client, boot: Any) -> None:
    guest = await boot("echo ready; sleep 1000")
    await guest.prints("ready")
    await bus.vm(guest.path, "Stop", "t", 300_000)
    assert (await guest.dies())[0] == "killed"


async def test_suspend_stops_the_guests_clock(bus: Client, boot: Any) -> None:
    guest = await boot("while :; do echo tick; sleep 0.1; done")
    await guest.prints("tick\r\ntick\r\n")
    await bus.vm(guest.path, "Suspend")
    await guest.silence()
    await bus.vm(guest.path, "Resume")
    guest.text = ""
    await guest.prints("tick\r\ntick\r\n")
    await bus.vm(guest.path, "Kill")
    await guest.dies()


async def test_the_balloon_is_seen_in_the_guest(bus: Client, boot: Any) -> None:
    script = """
        before=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
        echo ready
        while [ $(awk '/MemTotal/ {print $2}' /proc/meminfo) -gt $((before - 50000)) ]
        do sleep 0.1; done
        echo smaller; sleep 1000
    """
    guest = await boot(script, memory_mib=256)
    await guest.prints("ready")
    assert await bus.get(guest.path, "MemoryActual") == 256 << 20
    await bus.vm(guest.path, "SetMemoryTarget", "t", 160 << 20)
    await guest.prints("smaller")
    await bus.until(lambda m: m.path == guest.path and "MemoryActual" in m.body[2])
    assert await bus.get(guest.path, "MemoryActual") < 220 << 20
    await bus.vm(guest.path, "Kill")
    await guest.dies()


async def test_disks_in_order_and_one_that_grows(bus: Client, boot: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"one".ljust(1 << 20, b"\0"))
    second.write_bytes(b"two".ljust(1 << 20, b"\0"))
    script = """
        for disk in vda vdb; do
            echo $disk: $(head -c 3 /dev/$disk) $(cat /sys/block/$disk/serial)
        done
        echo ready
        while [ $(cat /sys/block/vdb/size) = 2048 ]; do sleep 0.1; done
        echo grown to $(cat /sys/block/vdb/size)
        echo end | dd of=/dev/vdb bs=512 seek=8191 conv=notrunc,sync 2>/dev/null; sync
    """
    guest = await boot(
        script,
        disks=[
            {"image": str(first), "id": "boot"},
            {"image": str(second), "id": "data", "writable": True, "direct": True},
        ],
    )
    await guest.prints("ready")
    assert "vda: one boot" in guest.text
    assert "vdb: two data" in guest.text
    await bus.vm(guest.path, "ResizeDisk", "ut", 1, 4 << 20)
    await guest.prints("grown to 8192")
    assert await guest.dies() == ["shutdown", 0]
    assert second.read_bytes()[8191 * 512 :].startswith(b"end\n")


async def test_a_shared_directory(boot: Any, tmp_path: Path) -> None:
    shared = tmp_path / "shared, with a comma"
    shared.mkdir()
    (shared / "from-host").write_text("hello guest")
    shared.chmod(0o777)
    script = """
        mkdir /mnt; mount -t virtiofs share /mnt && cat /mnt/from-host
        echo hello host > /mnt/from-guest; umount /mnt
    """
    guest = await boot(
        script,
        shared_dirs=[{"source": str(shared), "tag": "share", "writable": True}],
    )
    await guest.prints("hello guest")
    assert await guest.dies() == ["shutdown", 0]
    assert (shared / "from-guest").read_text() == "hello host\n"


async def test_a_read_only_share_needs_another_virtiofsd(boot: Any, tmp_path: Path) -> None:
    async with refused(ERROR + "NotSupported") as text:
        await boot("true", shared_dirs=[{"source": str(tmp_path), "tag": "share"}])
    assert "read-only" in text[0]


async def test_network_on_taps(boot: Any) -> None:
    """One tap by descriptor, one by name; the guest sees both, with the MACs it was given."""
    with open_tap("vmbus-test0") as by_fd, idle_tap("vmbus-test1"):
        guest = await boot(
            "cat /sys/class/net/eth*/address",
            fds=[by_fd],
            net=[
                {"tap": Variant("h", 0), "mac": "52:54:00:00:00:01"},
                {"tap": "vmbus-test1", "mac": "52:54:00:00:00:0A"},
            ],
        )
        await guest.prints("script ended")
        assert "52:54:00:00:00:01" in guest.text
        assert "52:54:00:00:00:0a" in guest.text
        assert await guest.dies() == ["shutdown", 0]


#: Prints what is behind it at the first serial port, and halts.
_BOOT_SECTOR = bytes.fromhex("31c0 8ed8 be167c fc ac 84c0 7406 baf803 ee ebf5 f4 ebfd")


async def test_a_firmware_boots_from_a_disk(bus: Client, tmp_path: Path) -> None:
    """QEMU's own, and a disk with nothing but a boot sector."""
    disk = tmp_path / "disk"
    sector = (_BOOT_SECTOR + b"booted from a disk\n\0").ljust(510, b"\0") + b"\x55\xaa"
    disk.write_bytes(sector.ljust(1 << 20, b"\0"))
    bios = "/usr/share/seabios/bios-256k.bin"
    path = await bus.create(bios=bios, memory_mib=64, disks=[{"image": str(disk)}])
    (fd,) = await bus.vm(path, "OpenConsole")
    guest = Guest(bus, path, socket.socket(fileno=fd))
    await bus.vm(path, "Start")
    await guest.prints("booted from a disk\n")
    await bus.vm(path, "Kill")
    assert await guest.dies() == ["killed", -9]


async def test_a_debugger(bus: Client, boot: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    guest = await boot("sleep 1000", gdb_port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=BOOT) as debugger:
        debugger.sendall(b"$?#3f")
        assert debugger.recv(100).lstrip(b"+").startswith(b"$")
    await bus.vm(guest.path, "Kill")
    await guest.dies()


async def test_guests_outlive_the_service(service: Service, bus: Client, boot: Any) -> None:
    """One that is suspended, one that is asked to end, one that talks: all go on, and are heard."""
    talks = await boot("echo ready; read line; echo heard $line")
    waits = await boot("echo waits; while :; do sleep 0.1; echo tick; done")
    ends = await boot("echo ready; wait-powerbtn; echo pressed; sleep 3")
    for guest, first in ((talks, "ready"), (waits, "waits"), (ends, "ready")):
        await guest.prints(first)
    await bus.vm(waits.path, "Suspend")
    pids = [await bus.get(each.path, "Pid") for each in (talks, waits)]
    stopping = asyncio.create_task(bus.vm(ends.path, "Stop", "t", int(BOOT * 1_000_000)))
    await bus.until_stopping(ends.path)
    pressing = asyncio.create_task(_press_until_dead(bus, ends.path))
    await ends.prints("pressed")
    service.crash()
    for call in (stopping, pressing):
        with pytest.raises(RemoteError):
            await call
    service.start()
    states = [await bus.get(each.path, "State") for each in (talks, waits)]
    assert states == ["running", "suspended"]
    assert [await bus.get(each.path, "Pid") for each in (talks, waits)] == pids
    for guest in (talks, waits):
        (fd,) = await bus.vm(guest.path, "OpenConsole")
        guest.take_up(socket.socket(fileno=fd))
    await asyncio.get_running_loop().sock_sendall(talks._stream, b"you again\n")
    await talks.prints("heard you again")
    assert await talks.dies() == ["shutdown", 0]
    await waits.silence()
    await bus.vm(waits.path, "Resume")
    await waits.prints("tick")
    await bus.vm(waits.path, "Kill")
    assert await waits.dies() == ["killed", -9]
    assert (await bus.died(ends.path))[1] == "stopped"
    ends._stream.close()
