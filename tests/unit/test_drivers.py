"""What crosvm and QEMU are started with, what is asked of them, and what they say of their end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.doubles import DEADLINE, a_config
from vmbus.errors import ControlFailed, NotSupported, TimedOut, VMBusError
from vmbus.files import Handle, OpenFile
from vmbus.guest.console import INPUT, OUTPUT
from vmbus.guest.port import NOTIFY_INPUT, NOTIFY_OUTPUT
from vmbus.reasons import Reason
from vmbus.spec import MAX_DISKS, Net, VMConfig, host_cpus
from vmbus.vmm import base
from vmbus.vmm.base import Command, Control, Driver, Launch, last_line
from vmbus.vmm.crosvm import Crosvm, CrosvmControl
from vmbus.vmm.process import Process
from vmbus.vmm.qemu import Qemu
from vmbus.vmm.qmp import QemuControl, told_by_events
from vmbus.vmm.virtiofsd import Virtiofsd

CROSVM = Path(__file__).parents[1] / "fakes" / "crosvm"
GUEST = "#!vmbus-test-guest\n"
KILL = -signal.SIGKILL
DRIVERS: list[Driver] = [Crosvm(str(CROSVM)), Qemu("/opt/qemu")]
both_drivers = pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.name)

pytestmark = pytest.mark.usefixtures("nothing_left")


class Maker:
    """Launches configs whose files lie in one directory."""

    def __init__(self, directory: Path, resources: contextlib.ExitStack) -> None:
        self.directory = directory
        self.resources = resources
        self.names: dict[int, str] = {}
        self.configs = 0
        for name in ("initrd", "bios", "disk"):
            (directory / name).write_text(f"{GUEST}{{}}")

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def config(self, **changes: Any) -> VMConfig:
        config = self.resources.enter_context(a_config(self.directory, **changes))
        for name in ("kernel", "initrd", "bios"):
            file = getattr(config, name)
            if file is not None:
                self.names[file.fd] = name.upper()
        for index, disk in enumerate(config.disks):
            self.names[disk.image.fd] = f"DISK{index}"
        return config

    def launch(self, config: VMConfig, *, kvm: bool = True) -> Launch:
        self.configs += 1
        directory = self.directory / f"tmp{self.configs}"
        directory.mkdir()
        for name in (INPUT, OUTPUT, NOTIFY_INPUT, NOTIFY_OUTPUT):
            os.mkfifo(directory / name)
        return Launch(
            "guest-1",
            2048,
            config,
            directory,
            kvm=kvm,
            vsock=bool(config.vsock),
            control_timeout=DEADLINE,
        )

    def ready(self, driver: Driver, launch: Launch | None = None) -> tuple[Launch, Command]:
        """A launch, of a minimal config where none is given, and the command for it."""
        launch = launch or self.launch(self.config())
        return launch, self.resources.enter_context(contextlib.closing(driver.prepare(launch)))

    def command(self, driver: Driver, *, kvm: bool = True, **changes: Any) -> Command:
        return self.ready(driver, self.launch(self.config(**changes), kvm=kvm))[1]

    def argv(self, driver: Driver, *, kvm: bool = True, **changes: Any) -> list[str]:
        """The argument vector, with names for descriptors and for the directory."""
        command = self.command(driver, kvm=kvm, **changes)
        temporary = str(self.directory / f"tmp{self.configs}")
        return [self._named(word).replace(temporary, "TMP") for word in command.argv]

    def _named(self, word: str) -> str:
        def name(match: re.Match[str]) -> str:
            place = Path(os.readlink(f"/proc/self/fd/{match[2]}"))
            fifo = place.name.upper() if place.is_fifo() else "CONTROL"
            return match[1] + self.names.get(int(match[2]), fifo)

        return re.sub(r"(/proc/self/fd/|\bfd=)(\d+)", name, word)


@pytest.fixture
def make(tmp_path: Path, nothing_left: None) -> Iterator[Maker]:
    with contextlib.ExitStack() as resources:
        yield Maker(tmp_path, resources)


# crosvm's command line

CROSVM_BEGINNING = [
    str(CROSVM),
    *["--extended-status", "--no-syslog", "run"],
    *["--socket=/proc/self/fd/CONTROL", "--name=guest-1"],
    "--pivot-root=TMP/empty",
]
CROSVM_SERIAL = [
    "--serial",
    "type=file,hardware=serial,num=1,path=/proc/self/fd/CONSOLE.OUT,"
    "input=/proc/self/fd/CONSOLE.IN,console=true,earlycon=true",
    "--serial",
    "type=file,hardware=virtio-console,num=1,path=/proc/self/fd/NOTIFY.OUT,name=org.vmbus.notify",
]


def test_crosvm_minimal(make: Maker) -> None:
    assert make.argv(DRIVERS[0]) == [
        *CROSVM_BEGINNING,
        *["--mem", "size=256", "--cpus", "num-cores=1"],
        *CROSVM_SERIAL,
        "/proc/self/fd/KERNEL",
    ]


def test_crosvm_full(make: Maker) -> None:
    argv = make.argv(
        DRIVERS[0],
        memory_mib=512,
        cpus=host_cpus(),
        initrd=make.path("initrd"),
        params='root=/dev/vda x="a,b" -- $(id)',
        disks=[
            {"image": make.path("disk")},
            {"image": make.path("disk"), "writable": True, "id": "a.b_c-d", "direct": True},
        ],
    )
    assert argv == [
        *CROSVM_BEGINNING,
        *["--mem", "size=512", "--cpus", f"num-cores={host_cpus()}"],
        *CROSVM_SERIAL,
        "--block=path=/proc/self/fd/DISK0,ro=true",
        "--block=path=/proc/self/fd/DISK1,ro=false,id=a.b_c-d,direct=true",
        *["--initrd", "/proc/self/fd/INITRD"],
        '--params=root=/dev/vda x="a,b" -- $(id)',
        "/proc/self/fd/KERNEL",
    ]


def test_crosvm_with_a_bios(make: Maker) -> None:
    bios: dict[str, Any] = {"kernel": None, "bios": make.path("bios")}
    assert make.argv(DRIVERS[0], **bios)[-2:] == ["--bios", "/proc/self/fd/BIOS"]


async def _answering(make: Maker, **changes: Any) -> tuple[Process, Control]:
    launch, command = make.ready(DRIVERS[0], make.launch(make.config(**changes)))
    process = Process.spawn(command.argv, command.inherit)
    process.release()
    connecting = asyncio.ensure_future(DRIVERS[0].connect(launch))
    either: set[asyncio.Future[Any]] = {connecting, process.exited}
    await asyncio.wait(either, timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
    if not connecting.done():
        connecting.cancel()
        process.kill()
        await process.exited
        raise AssertionError(process.stderr_tail())
    return process, connecting.result()


async def _ended(process: Process) -> int | None:
    async with asyncio.timeout(DEADLINE):
        return await process.exited


def _disks(path: str, number: int) -> list[dict[str, Any]]:
    """One writable disk, which is locked, and others of every kind."""
    options: list[dict[str, Any]] = [
        {},
        {"id": "x" * 20},
        {"direct": True},
        {"id": "0", "direct": True},
        {"id": "A.b_c-d"},
    ]
    return [{"image": path, **options[index % len(options)]} for index in range(number)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel": None, "bios": "{bios}"},
        {"initrd": "{initrd}"},
        {"params": "quiet"},
        {"params": "a=b,c=\"d e\" -- --help 'x' \\ [y] ü", "initrd": "{initrd}"},
        {"params": "-"},
        {"params": "--params=x"},
        {"memory_mib": 16, "cpus": host_cpus()},
        {"name": "a"},
        {"disks": 1},
        {"disks": MAX_DISKS, "params": "x" * 2047},
        {"kernel": None, "bios": "{bios}", "disks": 3},
        {"disks": "writable"},
        {"balloon": False, "protected": True, "gdb_port": 65535},
        {"shared_dirs": [{"source": "/etc", "tag": "A.b_c-d", "writable": True}]},
    ],
    ids=lambda changes: ",".join(changes) or "minimal",
)
async def test_crosvm_takes_every_command_line_that_the_driver_makes(
    make: Maker, changes: dict[str, Any]
) -> None:
    """The stand-in refuses whatever the documentation of crosvm doesn't name."""
    kernel = make.directory / "guest"
    kernel.write_text(f"{GUEST}{{}}")
    paths = {"{bios}": make.path("bios"), "{initrd}": make.path("initrd")}
    config = {key: paths.get(str(value), value) for key, value in changes.items()}
    config.setdefault("kernel", str(kernel))
    if isinstance(config.get("disks"), int):
        config["disks"] = _disks(make.path("disk"), int(str(config["disks"])))
    elif config.get("disks"):
        both = {"writable": True, "direct": True, "id": "data"}
        config["disks"] = [{"image": make.path("disk"), **both}]
    process, control = await _answering(make, **config)
    await control.quit()
    assert await _ended(process) == 0
    (line,) = process.stderr_tail().splitlines()
    assert line.endswith("] exiting with success")


def _net(*taps: tuple[int, str, str | None]) -> list[Net]:
    """Network devices, on a tap by descriptor, or by name where that is negative."""
    return [
        Net.model_construct(tap=OpenFile(fd, name, writable=True, size=0), mac=mac)
        for fd, name, mac in taps
    ]


def _with_net(make: Maker, driver: Driver, net: list[Net]) -> Command:
    config = make.config().model_copy(update={"net": net})
    return make.resources.enter_context(contextlib.closing(driver.prepare(make.launch(config))))


def _lent_fd(make: Maker) -> int:
    fd = os.open("/dev/null", os.O_RDWR)
    make.resources.callback(os.close, fd)
    return fd


def test_crosvms_network_devices(make: Maker) -> None:
    fd, mac = _lent_fd(make), "02:00:00:00:00:01"
    command = _with_net(
        make, DRIVERS[0], _net((fd, "x", mac), (-1, "tap0", None), (-1, "a,b", mac))
    )
    assert [word for word in command.argv if word.startswith("--net")] == [
        f"--net=tap-fd={fd},mac={mac}",
        "--net=tap-name=tap0",
        f'--net=tap-name="a,b",mac={mac}',
    ]
    assert fd in command.inherit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vsock": True}, ["--vsock", "cid=2048"]),
        ({"balloon": False}, ["--no-balloon"]),
        ({"protected": True}, ["--protected-vm"]),
        ({"gdb_port": 1234}, ["--gdb=1234"]),
        (
            {"shared_dirs": [{"source": "/etc", "tag": "t", "writable": True}]},
            ["--shared-dir=/etc:t:type=fs:cache=auto"],
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_crosvms_options(make: Maker, changes: dict[str, Any], words: list[str]) -> None:
    """Each adds its words and changes nothing else."""
    argv, without = make.argv(DRIVERS[0], **changes), make.argv(DRIVERS[0])
    at = argv.index(words[0])
    assert argv[at : at + len(words)] == words
    assert argv[:at] + argv[at + len(words) :] == without


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"vsock": True, "gdb_port": 1234, "balloon": False}, []),
        ({"protected": True}, ["protected: this host has no protected KVM"]),
        ({"gdb_port": 1234, "cpus": 2}, ["gdb_port: crosvm can debug a VM with one CPU only"]),
    ],
    ids=str,
)
def test_what_crosvm_cannot_do_is_said_before(
    make: Maker, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], problems: list[str]
) -> None:
    monkeypatch.setattr("vmbus.vmm.crosvm._protected_vms", lambda: False)
    monkeypatch.setattr("vmbus.spec.host_cpus", lambda: 2)
    assert DRIVERS[0].unsupported(make.config(**changes)) == problems


def test_directories_that_crosvm_cannot_share_are_said_before(make: Maker) -> None:
    """By its ":" a path would become options of its own, and read-only is none of them."""
    odd = make.directory / "a:tag:type=fs"
    odd.mkdir()
    shared = [
        {"source": str(make.directory), "tag": "fine", "writable": True},
        {"source": str(make.directory), "tag": "read-only"},
        {"source": str(odd), "tag": "odd", "writable": True},
    ]
    problems = DRIVERS[0].unsupported(make.config(shared_dirs=shared))
    assert [problem.split(": ")[0] for problem in problems] == [
        "shared_dirs[1].writable",
        "shared_dirs[2].source",
    ]


# crosvm's control socket


async def _with_guest(make: Maker, **directives: Any) -> tuple[Process, CrosvmControl]:
    kernel = make.directory / "guest"
    kernel.write_text(GUEST + json.dumps(directives))
    process, control = await _answering(make, kernel=str(kernel))
    assert isinstance(control, CrosvmControl)
    return process, control


@pytest.mark.parametrize("verb", [CrosvmControl.power_button, CrosvmControl.quit])
async def test_crosvm_ends_when_it_is_asked(
    make: Maker, verb: Callable[[CrosvmControl], Awaitable[None]]
) -> None:
    process, control = await _with_guest(make)
    await verb(control)
    assert await _ended(process) == 0
    assert await control.aclose() is None


async def test_crosvm_suspends_and_resumes(make: Maker) -> None:
    """A guest that is suspended doesn't see its power button."""
    process, control = await _with_guest(make)
    await control.suspend()
    await control.power_button()
    assert "VcpuPidTidResponse" in await control.request("VcpuPidTid")
    await control.resume()
    assert await _ended(process) == 0


async def test_crosvms_balloon(make: Maker) -> None:
    """crosvm counts what the balloon takes; we count what it leaves."""
    process, control = await _with_guest(make)
    assert await control.memory() == 256 << 20
    await control.set_memory(100 << 20)
    assert await control.memory() == 100 << 20
    await control.quit()
    await _ended(process)


async def test_guest_without_a_balloon_driver(make: Maker) -> None:
    process, control = await _with_guest(make, no_balloon_driver=True)
    with pytest.raises(ControlFailed, match="the guest has no driver for that, or none yet"):
        await control.memory()
    await control.quit()
    await _ended(process)


@pytest.mark.parametrize(
    "reply", ["Ok", {}, {"BalloonStats": 5}, {"BalloonStats": {"balloon_actual": "x"}}], ids=str
)
async def test_crosvm_whose_answer_has_no_size(make: Maker, reply: object) -> None:
    process, control = await _with_guest(make, on={"BalloonCommand.Stats": {"reply": reply}})
    with pytest.raises(ControlFailed, match="crosvm's answer has no size of the balloon"):
        await control.memory()
    await control.quit()
    await _ended(process)


async def test_crosvm_grows_a_disk(make: Maker) -> None:
    kernel = make.directory / "guest"
    kernel.write_text(f"{GUEST}{{}}")
    disks = [{"image": make.path("disk")}, {"image": make.path("disk2"), "writable": True}]
    Path(make.path("disk2")).touch()
    process, control = await _answering(make, kernel=str(kernel), disks=disks)
    await control.resize_disk(1, 1 << 20)
    assert os.stat(make.path("disk2")).st_size == 1 << 20
    for index, says in ((0, "crosvm answered with error 30"), (2, "crosvm answered: no disk 2")):
        with pytest.raises(ControlFailed, match=says):
            await control.resize_disk(index, 1 << 20)
    await control.quit()
    await _ended(process)


@pytest.mark.parametrize(
    ("treatment", "error", "says"),
    [
        ({"reply": {"Err": 95}}, NotSupported, "crosvm can't do that with this VM"),
        ({"reply": {"Err": 22}}, ControlFailed, "crosvm answered with error 22"),
        ({"reply": {"Err": "x" * 999}}, ControlFailed, f"crosvm answered with error {'x' * 50}"),
        ({"reply": {"ErrString": "no"}}, ControlFailed, "crosvm answered: no"),
        ({"reply": {"ErrString": "x" * 999}}, ControlFailed, f"crosvm answered: {'x' * 300}"),
        ({"garbage": True}, ControlFailed, "crosvm answered with something that is not JSON"),
        ({"close": True}, ControlFailed, "crosvm closed its control socket without an answer"),
        ({"silent": True}, TimedOut, "crosvm did not answer in 0.05 s"),
        ({"signal": 9, "silent": True}, ControlFailed, "crosvm closed its control socket"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_crosvm_that_does_not_do_as_it_is_asked(
    make: Maker,
    monkeypatch: pytest.MonkeyPatch,
    treatment: dict[str, Any],
    error: type[VMBusError],
    says: str,
) -> None:
    process, control = await _with_guest(make, on={"Powerbtn": treatment})
    if error is TimedOut:
        monkeypatch.setattr(control, "_timeout", 0.05)
    with pytest.raises(error) as failed:
        await control.request("Powerbtn")
    assert str(failed.value).startswith(says)
    assert len(str(failed.value)) < 400
    process.kill()
    await _ended(process)


async def test_crosvm_that_answers_late_is_not_misunderstood(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a request that was given up is nobody's, least of all the next one's."""
    late = {"Powerbtn": {"reply": {"Err": 22}, "delay": 0.2, "times": 1}}
    process, control = await _with_guest(make, on=late)
    with monkeypatch.context() as impatient, pytest.raises(TimedOut):
        impatient.setattr(control, "_timeout", 0.05)
        await control.request("Powerbtn")
    assert "VcpuPidTidResponse" in await control.request("VcpuPidTid")
    await control.power_button()
    assert await _ended(process) == 0


async def test_crosvm_that_has_ended_cannot_be_asked(make: Maker) -> None:
    process, control = await _with_guest(make)
    process.kill()
    await _ended(process)
    make.resources.close()
    with pytest.raises(ControlFailed, match="crosvm's control socket: Connection refused"):
        await control.power_button()


# crosvm's end


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (0, Reason.SHUTDOWN),
        (1, Reason.CRASH),
        (32, Reason.REBOOT),
        (33, Reason.CRASH),
        (34, Reason.GUEST_PANIC),
        (35, Reason.CRASH),
        (36, Reason.WATCHDOG),
        (2, None),
        (127, None),
        (KILL, None),
        (-signal.SIGTERM, None),
    ],
)
def test_crosvms_exit_codes(status: int, reason: Reason | None) -> None:
    assert DRIVERS[0].told_by(status, "") is reason


STAMP = "[2024-01-01T00:00:00.000000000+00:00 INFO  crosvm] "


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (f"{STAMP}exiting with success\n", Reason.SHUTDOWN),
        (f"{STAMP}exiting with reset\n", Reason.REBOOT),
        (f"{STAMP}exiting with crash\n", Reason.CRASH),
        (f"{STAMP}exiting with guest panic\n", Reason.GUEST_PANIC),
        (f"{STAMP}exiting with watchdog reset\n", Reason.WATCHDOG),
        (f"more\n{STAMP}exiting with success\n\n", Reason.SHUTDOWN),
        (f"{STAMP}exiting with success\nmore\n", None),
        (f"{STAMP}exiting with error 1: x\n", Reason.CRASH),
        (f"{STAMP}exiting with something new\n", None),
        (f"{STAMP}not exiting with success\n", None),
        ("", None),
    ],
)
def test_crosvm_that_killed_its_own_group_had_said_how_it_ended(
    stderr: str, reason: Reason | None
) -> None:
    assert DRIVERS[0].told_by(KILL, stderr) is reason
    assert DRIVERS[0].told_by(-signal.SIGTERM, stderr) is None


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", ""),
        ("\n \n", ""),
        ("No value provided for option '--mem'.\n", "No value provided for option '--mem'."),
        ("[t INFO  crosvm] hello\n", "hello"),
        ("[t ERROR crosvm] first\n[t ERROR crosvm] second\n[t INFO crosvm] bye\n", "second"),
        (
            "[t ERROR a] x\n[t ERROR crosvm] exiting with error 1: why\n[t ERROR b] y\n",
            "exiting with error 1: why",
        ),
        ("[t ERROR crosvm] " + "x" * 1000, ("[t ERROR crosvm] " + "x" * 1000)[17:500]),
    ],
)
def test_crosvms_last_words(stderr: str, words: str) -> None:
    assert DRIVERS[0].last_words(stderr) == words


# QEMU's command line


def _options(argv: Sequence[str], name: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def _all_in(words: Sequence[str], argv: Sequence[str]) -> bool:
    """Whether the words stand in argv one after the other."""
    return any(list(words) == list(argv[at : at + len(words)]) for at in range(len(argv)))


@pytest.mark.parametrize(
    "words",
    [
        ["/opt/qemu", "-name", "guest=guest-1"],
        ["-m", "512M"],
        ["-smp", "1"],
        ["-nodefaults", "-no-user-config"],
        ["-display", "none"],
        ["-no-reboot"],
        ["-chardev", "socket,id=control,fd=CONTROL,server=on,wait=off"],
        ["-mon", "chardev=control,mode=control"],
        ["-chardev", "pipe,id=console,path=TMP/console", "-serial", "chardev:console"],
        ["-chardev", "pipe,id=notify,path=TMP/notify", "-device"],
        ["-device", "virtserialport,chardev=notify,name=org.vmbus.notify"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kvm", [False, True])
def test_qemu_is_started_with(make: Maker, words: list[str], kvm: bool) -> None:
    assert _all_in(words, make.argv(DRIVERS[1], kvm=kvm, memory_mib=512))


def test_comma_in_the_path_of_qemus_console_stays_in_it(make: Maker) -> None:
    make.directory /= "a,b=c"
    make.directory.mkdir()
    path = str(make.directory / "tmp1" / "console").replace(",", ",,")
    assert f"pipe,id=console,path={path}" in make.command(DRIVERS[1]).argv


def test_qemu_is_sandboxed(make: Maker) -> None:
    """It can neither spawn programs nor gain privileges."""
    (sandbox,) = _options(make.argv(DRIVERS[1]), "-sandbox")
    assert sandbox.split(",")[0] == "on"


@pytest.mark.parametrize(
    ("host", "driver", "boot", "kvm", "machine", "cpu", "bus"),
    [
        ("x86_64", "auto", "kernel", True, "microvm", "host", "device"),
        ("x86_64", "auto", "kernel", False, "q35", "max", "pci"),
        ("x86_64", "microvm", "kernel", False, "microvm", "max", "device"),
        ("x86_64", "auto", "bios", True, "q35", "host", "pci"),
        ("x86_64", "auto", "bios", False, "q35", "max", "pci"),
        ("x86_64", "microvm", "bios", True, "q35", "host", "pci"),
        ("aarch64", "auto", "kernel", True, "virt", "host", "pci"),
        ("aarch64", "microvm", "kernel", True, "virt", "host", "pci"),
        ("aarch64", "auto", "bios", False, "virt", "max", "pci"),
    ],
)
def test_qemus_machine(
    make: Maker,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    driver: str,
    boot: str,
    kvm: bool,
    machine: str,
    cpu: str,
    bus: str,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: host)
    changes: dict[str, Any] = {"disks": [{"image": make.path("disk")}]}
    if boot == "bios":
        changes |= {"kernel": None, "bios": make.path("bios")}
    argv = make.argv(Qemu("/opt/qemu", driver), kvm=kvm, **changes)
    (options,) = _options(argv, "-machine")
    assert options.split(",")[0] == machine
    assert f",accel={'kvm' if kvm else 'tcg'}" in options
    assert _options(argv, "-cpu") == [cpu]
    assert f"virtio-blk-{bus},drive=disk0" in _options(argv, "-device")
    assert ("-bios" in argv, "-kernel" in argv) == (boot == "bios", boot == "kernel")


@pytest.mark.parametrize(
    ("by", "writable", "file_read_only", "disk_read_only"),
    [
        ("path", False, "on", "on"),
        ("path", True, "off", "off"),
        ("handle", False, "off", "on"),  # opened as the descriptor is, read-only one layer above
        ("handle", True, "off", "off"),
    ],
)
def test_qemus_disk_is_read_only_unless_it_is_to_be_writable(
    make: Maker, by: str, writable: bool, file_read_only: str, disk_read_only: str
) -> None:
    image: object = make.path("disk")
    if by == "handle":
        fd = os.open(make.path("disk"), os.O_RDWR)
        make.resources.callback(os.close, fd)
        image = Handle(fd)
    argv = make.argv(DRIVERS[1], disks=[{"image": image, "writable": writable}])
    assert _options(argv, "-add-fd") == ["fd=DISK0,set=0"]
    assert _options(argv, "-blockdev") == [
        "driver=file,node-name=file0,filename=/dev/fdset/0"
        f",read-only={file_read_only},cache.direct=off",
        f"driver=raw,node-name=disk0,file=file0,read-only={disk_read_only},cache.direct=off",
    ]


def test_qemus_disks_do_not_get_mixed_up(make: Maker) -> None:
    disks = [
        {"image": make.path("disk"), "id": "first"},
        {"image": make.path("disk"), "direct": True},
        {"image": make.path("disk"), "id": "third-3.x_y"},
    ]
    argv = make.argv(DRIVERS[1], disks=disks)
    assert _options(argv, "-add-fd") == [f"fd=DISK{n},set={n}" for n in range(3)]
    devices = [each.partition(",") for each in _options(argv, "-device")]
    assert [rest for kind, _, rest in devices if kind.startswith("virtio-blk-")] == [
        "drive=disk0,serial=first",
        "drive=disk1",
        "drive=disk2,serial=third-3.x_y",
    ]
    direct = [each.rpartition("=")[2] for each in _options(argv, "-blockdev")]
    assert direct == ["off", "off", "on", "on", "off", "off"]


@both_drivers
@pytest.mark.parametrize("params", ["-S", "a,b", "--help", "x=\"y z\" -- 'q'", "file=/etc/passwd"])
def test_params_stay_one_word_in_their_place(make: Maker, driver: Driver, params: str) -> None:
    with_params, without = make.argv(driver, params=params), make.argv(driver)
    (at,) = [index for index, word in enumerate(with_params) if word.endswith(params)]
    if driver.name == "qemu":
        assert with_params[at - 1] == "-append"
        assert _all_in(with_params[: at - 1], without)
    else:
        assert with_params[at] == f"--params={params}"
        assert with_params[:at] + with_params[at + 1 :] == without


@both_drivers
def test_every_descriptor_on_the_command_line_is_inherited(make: Maker, driver: Driver) -> None:
    command = make.command(
        driver,
        initrd=make.path("initrd"),
        disks=[{"image": make.path("disk")}] * 2,
    )
    named = set(map(int, re.findall(r"(?:/proc/self/fd/|\bfd=)(\d+)", " ".join(command.argv))))
    assert named == set(command.inherit)
    assert all(os.fstat(fd) and not os.get_inheritable(fd) for fd in named)


@both_drivers
def test_close_closes_what_was_made_for_the_vmm_alone(make: Maker, driver: Driver) -> None:
    config = make.config(initrd=make.path("initrd"), disks=[{"image": make.path("disk")}])
    launch = make.launch(config)
    before = set(os.listdir("/proc/self/fd"))
    driver.prepare(launch).close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert all(os.fstat(file.fd) for file in config.files())
    assert all((launch.directory / name).is_fifo() for name in (INPUT, OUTPUT))


@both_drivers
def test_prepare_that_fails_leaves_nothing_open(make: Maker, driver: Driver) -> None:
    launch = make.launch(make.config())
    before = set(os.listdir("/proc/self/fd"))
    (launch.directory / base.CONTROL_SOCKET).touch()
    with pytest.raises(OSError, match="Address already in use"):
        driver.prepare(launch)
    assert set(os.listdir("/proc/self/fd")) == before


@both_drivers
def test_prepare_that_fails_late_leaves_nothing_open(
    make: Maker, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = make.launch(make.config())
    before = set(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Command, "pass_fd", fail)
    with pytest.raises(OSError, match="No space left"):
        driver.prepare(launch)
    assert set(os.listdir("/proc/self/fd")) == before


@both_drivers
def test_control_socket_fits_into_a_directory_with_a_long_name(make: Maker, driver: Driver) -> None:
    make.directory /= "x" * 200
    make.directory.mkdir()
    make.command(driver)
    assert (make.directory / "tmp1" / base.CONTROL_SOCKET).is_socket()


@pytest.mark.parametrize("size", [0, 5, 3 << 20])
def test_qemu_gets_a_copy_of_a_file_that_cannot_be_opened_again(
    make: Maker, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A caller may pass what the service itself has no permission to open."""
    content = os.urandom(size)
    (make.directory / "image").write_bytes(content)
    config = make.config(initrd=make.path("image"))
    assert config.initrd is not None
    launch = make.launch(config)
    really_open = os.open

    def not_permitted(path: Any, flags: int, *rest: Any) -> int:
        if str(path).startswith("/proc/self/fd/") and flags & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", not_permitted)
        command = make.resources.enter_context(contextlib.closing(DRIVERS[1].prepare(launch)))
    (path,) = _options(command.argv, "-initrd")
    fd = int(path.rpartition("/")[2])
    assert "memfd:vmbus" in os.readlink(path)
    assert not os.get_inheritable(fd)
    assert os.pread(fd, size + 1, 0) == content


def test_qemus_network_devices(make: Maker) -> None:
    fd, mac = _lent_fd(make), "02:00:00:00:00:01"
    net = _net((fd, "x", mac), (-1, "tap0", None), (-1, "a,br=x", None))
    command = _with_net(make, DRIVERS[1], net)
    assert _options(command.argv, "-netdev") == [
        f"tap,id=net0,fd={fd}",
        "tap,id=net1,ifname=tap0,script=no,downscript=no",
        "tap,id=net2,ifname=a,,br=x,script=no,downscript=no",
    ]
    devices = [each for each in _options(command.argv, "-device") if "netdev=" in each]
    assert [each.split(",")[1] for each in devices] == ["netdev=net0", "netdev=net1", "netdev=net2"]
    assert [f"mac={mac}" in each.split(",") for each in devices] == [True, False, False]
    assert fd in command.inherit


@pytest.mark.parametrize(
    ("changes", "option", "value", "there"),
    [
        ({}, "-device", "virtio-balloon-device,id=balloon", True),
        ({"balloon": False}, "-device", "virtio-balloon-device,id=balloon", False),
        ({"vsock": True}, "-device", "vhost-vsock-device,guest-cid=2048", True),
        ({"vsock": False}, "-device", "vhost-vsock-device,guest-cid=2048", False),
        ({"gdb_port": 1234}, "-gdb", "tcp:127.0.0.1:1234", True),
    ],
    ids=str,
)
def test_qemus_options(
    make: Maker, changes: dict[str, Any], option: str, value: str, there: bool
) -> None:
    driver = Qemu("/opt/qemu", "microvm")
    argv = [
        word.replace("-pci", "-device") if word.startswith(("virtio", "vhost")) else word
        for word in make.argv(driver, **changes)
    ]
    assert (value in _options(argv, option)) is there


# Shared directories of QEMU, which another program serves


VIRTIOFSD = """#!/bin/sh
echo "virtiofsd backend 1.13.0"
"""
VIRTIOFSD_OF_QEMU = """#!/bin/sh
echo "virtiofsd version 7.2 (Debian 1:7.2)"
echo "Copyright (c) 2003-2022 Fabrice Bellard and the QEMU Project developers"
"""


def _virtiofsd(make: Maker, text: str) -> str:
    path = make.directory / "virtiofsd"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def _shared(make: Maker, name: str = "shared", *, writable: bool = False) -> dict[str, Any]:
    directory = make.directory / name
    directory.mkdir(exist_ok=True)
    return {"source": str(directory), "tag": f"tag{len(name)}", "writable": writable}


@pytest.mark.parametrize(
    ("text", "writable", "name", "options"),
    [
        (VIRTIOFSD, False, "shared", ["--shared-dir={source}", "--readonly"]),
        (VIRTIOFSD, True, "shared", ["--shared-dir={source}"]),
        (VIRTIOFSD, True, "a,b", ["--shared-dir={source}"]),
        (VIRTIOFSD_OF_QEMU, True, "shared", ["-o", "source={source}"]),
        (VIRTIOFSD_OF_QEMU, True, "a,xattr", ["-o", "source={directory}/a\\,xattr"]),
        (VIRTIOFSD_OF_QEMU, True, "a\\b", ["-o", "source={directory}/a\\\\b"]),
    ],
)
def test_virtiofsd_serves_one_directory_on_one_socket(
    make: Maker, text: str, writable: bool, name: str, options: list[str]
) -> None:
    program = _virtiofsd(make, text)
    shared = _shared(make, name, writable=writable)
    command = make.command(Qemu("/opt/qemu", virtiofsd=Virtiofsd(program)), shared_dirs=[shared])
    (helper,) = command.helpers
    (listener,) = helper.inherit
    expected = [each.format(source=shared["source"], directory=make.directory) for each in options]
    assert helper.argv == [program, f"--fd={listener}", *expected]
    with socket.socket(fileno=os.dup(listener)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert listener not in command.inherit


def test_qemu_has_one_device_and_one_connection_for_each_shared_directory(make: Maker) -> None:
    driver = Qemu("/opt/qemu", "q35", Virtiofsd(_virtiofsd(make, VIRTIOFSD)))
    shared = [_shared(make, "a"), _shared(make, "bb")]
    command = make.command(driver, shared_dirs=shared, memory_mib=64)
    chardevs = dict(
        each.removeprefix("socket,id=").split(",fd=")
        for each in _options(command.argv, "-chardev")
        if each.startswith("socket,id=fs")
    )
    assert [int(chardevs[name]) in command.inherit for name in ("fs0", "fs1")] == [True, True]
    devices = [each for each in _options(command.argv, "-device") if "user-fs" in each]
    assert [each.partition(",")[2] for each in devices] == [
        "chardev=fs0,tag=tag1",
        "chardev=fs1,tag=tag2",
    ]
    assert _options(command.argv, "-object") == ["memory-backend-memfd,id=memory,size=64M,share=on"]
    for number, helper in enumerate(command.helpers):
        with socket.socket(fileno=os.dup(helper.inherit[0])) as listener:
            peer, _ = listener.accept()
            with peer, socket.socket(fileno=os.dup(int(chardevs[f"fs{number}"]))) as ours:
                ours.send(b"hello")
                assert peer.recv(9) == b"hello"


@pytest.mark.parametrize(
    ("text", "writable", "problems"),
    [
        (None, True, ["shared_dirs: virtiofsd is not installed, which QEMU needs for them"]),
        (VIRTIOFSD, False, []),
        (VIRTIOFSD, True, []),
        (VIRTIOFSD_OF_QEMU, True, []),
        (
            VIRTIOFSD_OF_QEMU,
            False,
            [
                "shared_dirs[0].writable: QEMU's own virtiofsd, which is installed here, "
                "can't share a directory read-only"
            ],
        ),
    ],
    ids=str,
)
def test_directories_that_qemu_cannot_share_are_said_before(
    make: Maker, text: str | None, writable: bool, problems: list[str]
) -> None:
    virtiofsd = None if text is None else Virtiofsd(_virtiofsd(make, text))
    driver = Qemu("/opt/qemu", virtiofsd=virtiofsd)
    config = make.config(shared_dirs=[_shared(make, writable=writable)])
    assert driver.unsupported(config) == problems
    assert driver.unsupported(make.config()) == []


def test_qemu_cannot_protect_a_vm(make: Maker) -> None:
    problems = DRIVERS[1].unsupported(make.config(protected=True))
    assert problems == ["protected: QEMU can't do that; crosvm can"]


# QEMU's control socket


class Monitor:
    """The other end of QEMU's control socket. `answers`: what a command is answered with."""

    def __init__(self, listener: int) -> None:
        self.listener = listener
        self.commands: list[str] = []
        self.arguments: list[Any] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.greets = True
        self.hung_up = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        sock = socket.socket(fileno=os.dup(self.listener))
        self._server = await asyncio.start_unix_server(self._serve, sock=sock)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            if self.greets:
                version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
                self.send({"QMP": {"version": version, "capabilities": []}})
            text = ""
            while data := await reader.read(1 << 16):
                text += data.decode()
                while text:  # one JSON value after the other, with nothing in between
                    command, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:]
                    self._answer(command)
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.hung_up.set()

    def _answer(self, command: Mapping[str, Any]) -> None:
        self.commands.append(command["execute"])
        self.arguments.append(command.get("arguments", {}))
        answer = self.answers.get(command["execute"], {"return": {}})
        if answer:
            self.send(answer | {key: command[key] for key in ("id",) if key in command})

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: Any) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}})

    def hang_up(self) -> None:
        assert self._writer is not None
        self._writer.close()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            async with asyncio.timeout(DEADLINE):
                await self.hung_up.wait()
        await self._server.wait_closed()


@pytest.fixture
async def monitor(make: Maker) -> AsyncIterator[tuple[Launch, Monitor]]:
    launch, command = make.ready(DRIVERS[1])
    monitor = Monitor(command.inherit[0])
    await monitor.open()
    yield launch, monitor
    await monitor.close()


Monitored = tuple[Launch, Monitor]


async def _connected(launch: Launch) -> QemuControl:
    async with asyncio.timeout(DEADLINE):
        control = await DRIVERS[1].connect(launch)
    assert isinstance(control, QemuControl)
    return control


async def _close(control: QemuControl, monitor: Monitor) -> Reason | None:
    """As it is when QEMU has ended."""
    monitor.hang_up()
    async with asyncio.timeout(DEADLINE):
        return await control.aclose()


@pytest.mark.parametrize(
    ("verb", "command", "arguments"),
    [
        (QemuControl.power_button, "system_powerdown", {}),
        (QemuControl.quit, "quit", {}),
        (QemuControl.suspend, "stop", {}),
        (QemuControl.resume, "cont", {}),
        (lambda control: control.set_memory(1 << 27), "balloon", {"value": 1 << 27}),
        (
            lambda control: control.resize_disk(3, 1 << 20),
            "block_resize",
            {"node-name": "disk3", "size": 1 << 20},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_qemu_is_asked_by_qmp(
    monitor: Monitored,
    verb: Callable[[QemuControl], Awaitable[None]],
    command: str,
    arguments: dict[str, Any],
) -> None:
    to_start, qemu = monitor
    control = await _connected(to_start)
    await verb(control)
    assert qemu.commands == ["qmp_capabilities", command]
    assert qemu.arguments[-1] == arguments
    assert await _close(control, qemu) is None


@pytest.mark.parametrize("answer", [{}, {"actual": None}, {"actual": "much"}, [], 5], ids=str)
async def test_qemu_whose_answer_has_no_size(monitor: Monitored, answer: object) -> None:
    launch, qemu = monitor
    control = await _connected(launch)
    qemu.answers["query-balloon"] = {"return": {"actual": 1 << 27}}
    assert await control.memory() == 1 << 27
    qemu.answers["query-balloon"] = {"return": answer}
    with pytest.raises(ControlFailed, match="QEMU's answer has no size of the memory"):
        await control.memory()
    await _close(control, qemu)


async def test_qemu_tells_when_the_memory_changes(monitor: Monitored) -> None:
    launch, qemu = monitor
    control = await _connected(launch)
    sizes: list[int] = []
    control.watch_memory(sizes.append)
    for actual in (1 << 27, "much", None, 1 << 26):
        qemu.event("BALLOON_CHANGE", actual=actual)
    qemu.event("RESUME")
    await _close(control, qemu)
    assert sizes == [1 << 27, 1 << 26]


async def test_qemu_that_refuses(monitor: Monitored) -> None:
    launch, qemu = monitor
    qemu.answers["system_powerdown"] = {"error": {"class": "GenericError", "desc": "no" * 1000}}
    control = await _connected(launch)
    with pytest.raises(ControlFailed, match=r"^QEMU answered: nonono") as failed:
        await control.power_button()
    assert len(str(failed.value)) < 400
    await _close(control, qemu)


async def test_qemu_that_does_not_answer(
    monitor: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, qemu = monitor
    qemu.answers["system_powerdown"] = {}
    control = await _connected(launch)
    monkeypatch.setattr(control, "_timeout", 0.05)
    with pytest.raises(TimedOut, match=r"^QEMU did not answer in 0\.05 s$"):
        await control.power_button()
    monkeypatch.undo()
    await control.quit()
    await _close(control, qemu)


async def test_qemu_that_hangs_up_instead_of_an_answer(monitor: Monitored) -> None:
    launch, qemu = monitor
    qemu.answers["quit"] = {}
    control = await _connected(launch)
    quitting = asyncio.ensure_future(control.quit())
    await asyncio.to_thread(int)
    qemu.hang_up()
    with pytest.raises(ControlFailed, match=r"^QEMU's control socket: "):
        await asyncio.wait_for(quitting, DEADLINE)
    assert await control.aclose() is None
    with pytest.raises(ControlFailed, match=r"^QEMU's control socket: "):
        await control.power_button()


async def test_qemu_that_refuses_the_session(monitor: Monitored) -> None:
    launch, qemu = monitor
    qemu.answers["qmp_capabilities"] = {"error": {"class": "GenericError", "desc": "no"}}
    with pytest.raises(ControlFailed, match=r"^QEMU's control socket: "):
        await _connected(launch)


@pytest.mark.parametrize("answer", [b"", b"garbage\n", b"{}\n", b'{"QMP": 5}\n', b"\xff\n"])
async def test_qemu_that_greets_wrongly(make: Maker, answer: bytes) -> None:
    launch, command = make.ready(DRIVERS[1])
    with socket.socket(fileno=os.dup(command.inherit[0])) as listener:
        listener.setblocking(False)
        connecting = asyncio.ensure_future(_connected(launch))
        peer, _ = await asyncio.get_running_loop().sock_accept(listener)
        with peer:
            peer.sendall(answer)
            peer.shutdown(socket.SHUT_WR)
            with pytest.raises(ControlFailed, match=r"^QEMU's control socket: "):
                await connecting


@both_drivers
async def test_connecting_can_be_given_up(make: Maker, driver: Driver) -> None:
    """A VMM that never answers; `nothing_left` looks for what that leaves behind."""
    launch, command = make.ready(driver)
    connecting = asyncio.ensure_future(driver.connect(launch))
    with socket.socket(fileno=os.dup(command.inherit[0])) as listener:
        listener.setblocking(False)
        peer, _ = await asyncio.get_running_loop().sock_accept(listener)
        connecting.cancel()
        await asyncio.wait({connecting}, timeout=DEADLINE)
        assert connecting.cancelled()
        peer.close()


@both_drivers
async def test_vmm_that_is_not_there_any_more(make: Maker, driver: Driver) -> None:
    launch, command = make.ready(driver)
    command.close()
    with pytest.raises(ControlFailed, match="control socket: Connection refused"):
        await driver.connect(launch)


@both_drivers
async def test_vmm_whose_control_socket_is_gone(make: Maker, driver: Driver) -> None:
    launch = make.launch(make.config())
    with pytest.raises(ControlFailed, match="control socket: No such file or directory"):
        await driver.connect(launch)


@both_drivers
async def test_vmm_can_be_connected_to_again(make: Maker, driver: Driver) -> None:
    """By a service that neither made its command nor holds its listening socket."""
    launch, command = make.ready(driver)
    with socket.socket(fileno=os.dup(command.inherit[0])) as listener:
        command.close()
        listener.setblocking(False)
        for _ in range(2):
            connecting = asyncio.ensure_future(driver.connect(launch))
            async with asyncio.timeout(DEADLINE):
                peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=DEADLINE)
            assert connecting.cancelled()
            peer.close()


async def test_qemus_last_events_tell_the_reason(monitor: Monitored) -> None:
    launch, qemu = monitor
    control = await _connected(launch)
    qemu.event("RESUME")
    qemu.event("GUEST_PANICKED", action="poweroff")
    qemu.event("SHUTDOWN", guest=True, reason="guest-panic")
    assert await _close(control, qemu) is Reason.GUEST_PANIC


async def test_qemu_that_never_hangs_up_does_not_hold_up_the_end(
    monitor: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some child of it may still hold the socket."""
    monkeypatch.setattr("vmbus.vmm.qmp._LAST_EVENTS", 0.05)
    launch, qemu = monitor
    control = await _connected(launch)
    qemu.event("SHUTDOWN", guest=False, reason="host-signal")
    async with asyncio.timeout(DEADLINE):
        assert await control.aclose() is Reason.SIGNAL


def _event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data}


def _shutdown(reason: str) -> dict[str, Any]:
    return _event("SHUTDOWN", guest=reason.startswith("guest"), reason=reason)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], None),
        ([_shutdown("guest-shutdown")], Reason.SHUTDOWN),
        ([_shutdown("guest-reset")], Reason.REBOOT),
        ([_shutdown("subsystem-reset")], Reason.REBOOT),
        ([_shutdown("host-qmp-system-reset")], Reason.REBOOT),
        ([_shutdown("guest-panic")], Reason.GUEST_PANIC),
        ([_shutdown("host-qmp-quit")], Reason.SHUTDOWN),
        ([_shutdown("host-error")], Reason.CRASH),
        ([_shutdown("host-signal")], Reason.SIGNAL),
        ([_shutdown("something-new")], None),
        ([_event("GUEST_PANICKED", action="pause")], Reason.GUEST_PANIC),
        ([_event("WATCHDOG", action="reset")], Reason.WATCHDOG),
        ([_event("WATCHDOG", action="reset"), _shutdown("guest-reset")], Reason.WATCHDOG),
        ([_event("GUEST_PANICKED", action="x"), _shutdown("host-signal")], Reason.GUEST_PANIC),
        ([_event("WATCHDOG"), _event("GUEST_PANICKED")], Reason.GUEST_PANIC),
        ([_shutdown("guest-reset"), _shutdown("host-qmp-quit")], Reason.SHUTDOWN),
        ([{"event": "SHUTDOWN"}], None),
        ([{"event": "SHUTDOWN", "data": 5}], None),
        ([{"event": "SHUTDOWN", "data": {"reason": ["guest-reset"]}}], None),
        ([{}], None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_qemus_events(events: list[dict[str, Any]], reason: Reason | None) -> None:
    assert told_by_events(events) is reason


@pytest.mark.parametrize(
    ("status", "reason"), [(0, None), (1, Reason.CRASH), (KILL, None), (-signal.SIGABRT, None)]
)
def test_qemus_exit_codes(status: int, reason: Reason | None) -> None:
    assert DRIVERS[1].told_by(status, "") is reason


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", ""),
        ("qemu: -m 5: no\n", "qemu: -m 5: no"),
        ("qemu: bad\nqemu: warning: slow\n", "qemu: bad"),
        ("qemu: terminating on signal 15 from pid 1 (x)\n", ""),
        ("qemu: warning: slow\n", ""),
        ("first\nsecond\n\n", "second"),
    ],
)
def test_qemus_last_words(stderr: str, words: str) -> None:
    assert DRIVERS[1].last_words(stderr) == words


@pytest.mark.parametrize(
    ("text", "containing", "line"),
    [
        ("", "", ""),
        ("a\n  b  \n\n \n", "", "b"),
        ("a x\nb\nc x\nd", "x", "c x"),
        ("a\nb", "x", ""),
        ("x" * 501, "", "x" * 500),
    ],
)
def test_last_line(text: str, containing: str, line: str) -> None:
    assert last_line(text, containing=containing) == line
