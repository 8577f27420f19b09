"""VMs that are declared in a file, and what a service manager has of the vmbusctl that runs one."""

from __future__ import annotations

import base64
import contextlib
import os
import pty
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ctl import VMBUSCTL, Running
from tests.integration.test_kept import Keeper
from tests.rig import (
    ERROR,
    MANAGER,
    MANAGER_PATH,
    Client,
    Rig,
    Service,
    guest,
    listening,
    refused,
)
from vmbus.client import Config, Disk, Net, SharedDir
from vmbus.spec import Disk as ServiceDisk
from vmbus.spec import Net as ServiceNet
from vmbus.spec import SharedDir as ServiceSharedDir
from vmbus.spec import VMConfig

MIB = 1 << 20
#: Seconds in which a guest boots, however busy the machine.
BOOT = 120.0


def ctl(rig: Rig, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run vmbusctl to its end."""
    return rig.command(*VMBUSCTL, "--user", *arguments, stdin=subprocess.DEVNULL, **options)


def declare(directory: Path, text: str, name: str = "web.toml") -> Path:
    """A declaration, beside the files `kernel` and `disk`, in a directory of its own."""
    place = directory / "vm.d"
    place.mkdir(exist_ok=True)
    if not (place / "kernel").exists():
        guest(directory, echo=True).rename(place / "kernel")
        (place / "disk").write_bytes(bytes(MIB))
    (place / name).write_text(text)
    return place / name


async def named(bus: Client, name: str) -> str:
    """The object path of a VM."""
    (path,) = await bus.call(MANAGER_PATH, MANAGER, "GetVM", "s", [name])
    return str(path)


async def argv(bus: Client, path: str) -> list[str]:
    """The command line of its VMM."""
    return Path(f"/proc/{await bus.get(path, 'Pid')}/cmdline").read_text().split("\0")


class Manager(Keeper):
    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path)}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager, which listens."""
    with contextlib.closing(Manager(tmp_path / "notify")) as manager:
        yield manager


# What is declared

#: As docs/declared.md has it.
COMMANDS = """
vmbusctl run --config web.toml
vmbusctl create --config web.toml --name another --memory 64
"""


def test_the_keys_of_a_declaration_are_those_of_create() -> None:
    """vmbusctl takes what the service takes, in every table, and nothing else."""
    pairs: Sequence[tuple[type, Any]] = [
        (Config, VMConfig),
        (Disk, ServiceDisk),
        (Net, ServiceNet),
        (SharedDir, ServiceSharedDir),
    ]
    for ours, theirs in pairs:
        assert ours.__annotations__.keys() == theirs.model_fields.keys()


def test_a_declared_guest_runs(guest_files: tuple[Path, Path], tmp_path: Path) -> None:
    """A real guest, whose files are named relative to the declaration: it prints, and ends."""
    kernel, initrd = (os.path.relpath(file, tmp_path) for file in guest_files)
    run = base64.b64encode(b"echo hello from $(head -c 4 /dev/vda)").decode()
    (tmp_path / "disk").write_bytes(b"disk".ljust(MIB, b"\0"))
    declaration = tmp_path / "web.toml"
    declaration.write_text(f"""
        kernel = "{kernel}"
        initrd = "{initrd}"
        params = "console=ttyS0 quiet vmbus.run={run}"
        memory_mib = 128

        [[disks]]
        image = "disk"
    """)
    rig = Rig(system=False)
    try:
        Service(rig, {"crosvm": "/none"})
        done = ctl(rig, "run", "--config", str(declaration), deadline=BOOT)
        assert (done.returncode, done.stderr) == (0, "vmbusctl: web: died: shutdown (0)\n")
        assert "hello from disk" in done.stdout
    finally:
        rig.close()


async def test_every_key_arrives(service: Service, bus: Client, tmp_path: Path) -> None:
    """Paths are relative to the declaration, wherever vmbusctl runs."""
    declaration = declare(
        tmp_path,
        """
        name = "another"
        vmm = "crosvm"
        kernel = "kernel"
        initrd = "disk"
        params = "quiet debug"
        memory_mib = 96
        cpus = 1
        vsock = false
        balloon = false
        protected = false
        gdb_port = 1234
        kill_on_disconnect = false
        ready_timeout_usec = 90_000_000
        collect = "on-death"
        disks = [{ image = "disk", writable = true, id = "data", direct = true }]
        net = []

        [[shared_dirs]]
        source = "."
        tag = "tag"
        writable = true
        """,
    )
    done = ctl(service.rig, "create", "--config", str(declaration), cwd="/")
    assert (done.stdout, done.stderr) == ("another\n", "")
    path = await named(bus, "another")
    await bus.vm(path, "Start")
    found = await argv(bus, path)
    assert {"--no-balloon", "--gdb=1234", "--params=quiet debug", "size=96"} <= set(found)
    assert f"--shared-dir={declaration.parent}:tag:type=fs:cache=auto" in found
    (block,) = [each for each in found if each.startswith("--block=")]
    assert block.endswith(",ro=false,id=data,direct=true")
    assert "--vsock" not in found
    await bus.vm(path, "Kill")
    async with refused(ERROR + "NoSuchVM"):
        await named(bus, "another")


async def test_options_win(service: Service, bus: Client, tmp_path: Path) -> None:
    """An option is in the place of the whole key; a path in it is relative to where we are."""
    text = 'kernel = "kernel"\nmemory_mib = 96\ncollect = "on-death"\n[[disks]]\nimage = "none"\n'
    declaration = declare(tmp_path, text)
    (tmp_path / "scratch").write_bytes(bytes(MIB))
    options = ("--name", "elsewhere", "--memory", "64", "--disk", "scratch,writable")
    done = ctl(service.rig, "create", "--config", str(declaration), *options, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("elsewhere\n", "")
    path = await named(bus, "elsewhere")
    await bus.vm(path, "Start")
    found = await argv(bus, path)
    assert "size=64" in found
    (block,) = [each for each in found if each.startswith("--block=")]
    assert ",ro=false" in block
    await bus.vm(path, "Kill")


async def test_the_commands_that_are_shown(service: Service, bus: Client, tmp_path: Path) -> None:
    """One runs the VM and says how it ended, the other creates another of the same kind."""
    guest(tmp_path, then={"exit": 0}).rename(tmp_path / "ends")
    declaration = declare(tmp_path, 'kernel = "../ends"\nmemory_mib = 96\ncollect = "on-death"\n')
    for command in COMMANDS.strip().splitlines():
        _, *arguments = command.split()
        done = ctl(service.rig, *arguments, cwd=declaration.parent)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "another\n"
    path = await named(bus, "another")
    assert await bus.get(path, "MemoryMiB") == 64
    await bus.vm(path, "Remove")


async def test_run_keeps_a_vm_whose_declaration_says_so(
    service: Service, bus: Client, tmp_path: Path
) -> None:
    """`collect` is obeyed, and an option wins over it, too."""
    guest(tmp_path, then={"exit": 0}).rename(tmp_path / "ends")
    for name, options, kept in (("one", [], True), ("two", ["--collect"], False)):
        text = 'kernel = "../ends"\ncollect = "manual"\n'
        declaration = declare(tmp_path, text, f"{name}.toml")
        assert ctl(service.rig, "run", "--config", str(declaration), *options).returncode == 0
        if kept:
            assert await bus.get(await named(bus, name), "State") == "dead"
        else:
            async with refused(ERROR + "NoSuchVM"):
                await named(bus, name)


BAD = [
    ("kernel", "(at end of document)"),
    ('kernle = "kernel"', "kernle: unknown key; the keys are name, vmm, "),
    ('kernel = "kernel"\n[disk]\nimage = "disk"', "disk: unknown key; the keys are "),
    ('kernel = "kernel"\n[disks]\nimage = "disk"', "disks: must be an array of tables"),
    ('kernel = "kernel"\ndisks = ["disk"]', "disks: must be an array of tables"),
    ('kernel = "kernel"\n[[disks]]\nid = "data"', "disks[0].image: Field required"),
    (
        'kernel = "kernel"\n[[disks]]\nimage = "disk"\nwrtable = true',
        "disks[0].wrtable: unknown key; the keys are image, writable, id, direct",
    ),
    ('kernel = "kernel"\n[[disks]]\nimage = 0', "disks[0].image: must be a string"),
    ('kernel = "kernel"\n[[net]]\ntap = 0', "net[0].tap: must be a string"),
    ('kernel = "kernel"\n[[shared_dirs]]\ntag = "tag"', "shared_dirs[0].source: Field required"),
    ('kernel = "kernel"\n[[shared_dirs]]\nsource = "."', "shared_dirs[0].tag: "),
    ("kernel = 0", "kernel: must be a string"),
    ('kernel = "ker\\u0000nel"', "kernel: must not have a NUL in it"),
    ('kernel = "nothing"', "kernel: {directory}/nothing: No such file or directory"),
    (
        'kernel = "kernel"\n[[disks]]\nimage = "disk"\n[[disks]]\nimage = "nothing"',
        "disks[1].image: {directory}/nothing: No such file or directory",
    ),
    ('kernel = "."', "kernel: "),
    ("cpus = 1", "kernel: a kernel (or else a bios) is required"),
    ('kernel = "kernel"\nmemory_mib = "512"', "memory_mib: "),
    ('kernel = "kernel"\nmemory_mib = 1', "memory_mib: "),
    ('kernel = "kernel"\nmemory_mib = 512.5', "memory_mib: must be a string, an integer or a bool"),
    ('kernel = "kernel"\nmemory_mib = 9999999999999999999999', "memory_mib: "),
    ('kernel = "kernel"\nvsock = 1', "vsock: "),
    ('kernel = "kernel"\nparams = ["quiet"]', "params: must be a string"),
    ('kernel = "kernel"\nname = "a b"', "name: "),
    ('kernel = "kernel"\nvmm = "vmware"', "vmm: "),
    ('kernel = "kernel"\n[[disks]]\nimage = "disk"\nid = 2026-01-01', "disks[0].id: must be a str"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
async def test_a_bad_declaration_is_refused_in_one_line(
    service: Service, bus: Client, tmp_path: Path, text: str, said: str
) -> None:
    """The line names the file, the key, and what is wrong or missing; no VM is left."""
    declaration = declare(tmp_path, text)
    before = await bus.get(MANAGER_PATH, "VMCount")
    done = ctl(service.rig, "run", "--config", str(declaration))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vmbusctl: {declaration}: ")
    assert said.format(directory=declaration.parent) in line
    assert await bus.get(MANAGER_PATH, "VMCount") == before


def test_two_problems_are_told_at_once(service: Service, tmp_path: Path) -> None:
    """All that vmbusctl can tell by itself is in one line."""
    done = ctl(service.rig, "create", "--config", str(declare(tmp_path, "kernel = 1\ncpu = 1")))
    (line,) = done.stderr.splitlines()
    assert "kernel: must be a string; cpu: unknown key; " in line


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file or directory"), (b"\xff", "is not UTF-8")]
)
def test_a_file_that_can_t_be_read(
    service: Service, tmp_path: Path, content: bytes | None, said: str
) -> None:
    """The line names the file."""
    declaration = tmp_path / "web.toml"
    if content is not None:
        declaration.write_bytes(content)
    done = ctl(service.rig, "run", "--config", str(declaration))
    assert (done.returncode, done.stderr) == (1, f"vmbusctl: {declaration}: {said}\n")


# Who goes with whom


async def test_a_vm_goes_with_the_vmbusctl_that_runs_it(
    service: Service, bus: Client, tmp_path: Path
) -> None:
    """Without a terminal nobody could leave it, so it ends even with one that is killed."""
    declaration = declare(tmp_path, 'kernel = "kernel"')
    with Running(service.rig, "run", "--config", str(declaration)) as run:
        run.type(b"typed\n")
        run.until(run.stdout, b"typed\n")
        path = await named(bus, "web")
        run.process.kill()
        assert (await bus.died(path))[1:] == ["requester-gone", -9]
    await bus.until(lambda message: message.member == "InterfacesRemoved" and path in message.body)


async def test_a_declaration_can_let_its_vm_go_on(
    service: Service, bus: Client, tmp_path: Path
) -> None:
    """kill_on_disconnect = false has it outlive a vmbusctl that is killed."""
    declaration = declare(tmp_path, 'kernel = "kernel"\nkill_on_disconnect = false')
    with Running(service.rig, "run", "--config", str(declaration)) as run:
        run.type(b"typed\n")
        run.until(run.stdout, b"typed\n")
        run.process.kill()
        run.status()
    path = await named(bus, "web")
    assert await bus.get(path, "State") == "running"
    await bus.vm(path, "Kill")


async def test_a_vm_that_can_t_be_left_is_killed(
    service: Service, tmp_path: Path, terminal: tuple[int, int]
) -> None:
    """At a terminal, ^] ends a VM whose declaration has kill_on_disconnect, and that is said."""
    declaration = declare(tmp_path, 'kernel = "kernel"\nkill_on_disconnect = true')
    arguments = ("run", "--config", str(declaration))
    with Running(service.rig, *arguments, terminal=terminal[1]) as run:
        run.until(run.stderr, b"vmbusctl: web: runs; ^] kills it\n")
        os.write(terminal[0], b"\x1d")
        assert run.status() == 30
        assert "vmbusctl: web: died: killed (-9)" in run.rest(run.stderr)


async def test_a_terminal_that_is_gone_stops_the_vm(
    service: Service, bus: Client, tmp_path: Path
) -> None:
    """In good order, also where the guest goes on printing to nobody."""
    guest(tmp_path, flood_console=True).rename(tmp_path / "floods")
    declaration = declare(tmp_path, 'kernel = "../floods"')
    user, program = pty.openpty()
    with Running(service.rig, "run", "--config", str(declaration), terminal=program) as run:
        os.close(program)
        run.until(user, b"flood")
        path = await named(bus, "web")
        # It prints before its VMM has answered, and a Stop that early would kill it.
        await bus.until_state(path, "running")
        os.close(user)
        # As the kernel does where the terminal is the session's.
        run.process.send_signal(signal.SIGHUP)
        assert (await bus.died(path))[1:] == ["stopped", 0]


async def test_a_restart_of_the_service_ends_neither(mortal: Service, tmp_path: Path) -> None:
    """The next service knows whose VM it is: it lives as long as its vmbusctl, and no longer."""
    declaration = declare(tmp_path, 'kernel = "kernel"')
    async with listening(mortal.rig) as bus:
        with Running(mortal.rig, "run", "--config", str(declaration)) as run:
            run.type(b"typed\n")
            run.until(run.stdout, b"typed\n")
            path = await named(bus, "web")
            mortal.crash()
            mortal.start()
            run.until(run.stderr, b"the service is back")
            assert await bus.get(path, "State") == "running"
            run.process.kill()
            assert (await bus.died(path))[1:] == ["requester-gone", -9]


# What a service manager is told


async def test_a_service_manager_is_told(
    service: Service, tmp_path: Path, manager: Manager
) -> None:
    """That the VM is ready when it runs, what it does, and how it died."""
    declaration = declare(tmp_path, 'kernel = "kernel"')
    arguments = ("run", "--config", str(declaration))
    with Running(service.rig, *arguments, environment=manager.environment) as run:
        manager.until("READY=1")
        run.process.terminate()
        assert run.status() == 0
    manager.take()
    status = [each.removeprefix("STATUS=") for each in manager.told if each != "READY=1"]
    assert status == ["starting", "running", "stopping", "dead", "died: stopped (0)"]
    assert manager.told.count("READY=1") == 1


async def test_a_guest_that_is_to_get_ready_says_when_it_is(
    service: Service, tmp_path: Path, manager: Manager
) -> None:
    """With ready_timeout_usec the guest's word is waited for, and what it says of itself shown."""
    guest(tmp_path, relay=True).rename(tmp_path / "relays")
    text = 'kernel = "../relays"\nready_timeout_usec = 600_000_000'
    arguments = ("run", "--config", str(declare(tmp_path, text)))
    with Running(service.rig, *arguments, environment=manager.environment) as run:
        run.type(b"STATUS=Booting\n")
        manager.until("STATUS=Booting")
        assert "READY=1" not in manager.told
        run.type(b"READY=1\n")
        manager.until("READY=1")
        run.process.terminate()
        run.status()
