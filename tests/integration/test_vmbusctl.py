"""vmbusctl as a user has it: its output, its exit status, its signals, its terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.contract import documented
from tests.ctl import VMBUSCTL, Ctl, Running, vmbusctl
from tests.rig import DEADLINE, MANAGER, MANAGER_PATH, VM, Client, Rig, Service, guest
from vmbus.bus.connection import RemoteError

MIB = 1 << 20

#: How a guest ends; the reason; the exit status of run and of wait.
ENDS: list[tuple[dict[str, Any], str, int]] = [
    ({"then": {"exit": 0}}, "shutdown", 0),
    ({"then": {"exit": 32}}, "reboot", 3),
    ({"then": {"exit": 33}}, "crash", 10),
    ({"then": {"signal": signal.SIGSEGV}}, "crash", 10),
    ({"then": {"exit": 34}}, "guest-panic", 11),
    ({"then": {"exit": 36}}, "watchdog", 12),
    ({"boot": {"error": "no luck"}}, "start-failed", 20),
    ({"then": {"signal": signal.SIGKILL}}, "signal", 31),
]
by_end = pytest.mark.parametrize(("directives", "reason", "code"), ENDS)


async def _running(bus: Client, kernel: Path, **config: Any) -> str:
    path = await bus.create(kernel=kernel, **config)
    await bus.vm(path, "Start")
    return path


async def _path(bus: Client, name: str) -> str:
    (path,) = await bus.call(MANAGER_PATH, MANAGER, "GetVM", "s", [name])
    return str(path)


async def _paths(bus: Client) -> list[str]:
    (rows,) = await bus.call(MANAGER_PATH, MANAGER, "List")
    return [row[5] for row in rows]


def _as_on_the_bus(vm: dict[str, Any]) -> dict[str, Any]:
    """A VM of vmbusctl's JSON in the words of the bus, as far as that can be."""
    known = {each.attrib["name"].lower() for each in documented()[VM].iterfind("property")}
    flat = {key.replace("_", ""): value for key, value in vm.items()}
    return {key: value for key, value in flat.items() if key in known}


async def _told(bus: Client, path: str) -> dict[str, Any]:
    return {key.lower(): value for key, value in (await bus.get_all(path)).items()}


# What there is


async def test_list(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    path = await _running(bus, guest(tmp_path), name=name, memory_mib=64, cpus=1)
    await bus.create(kernel=guest(tmp_path))
    listed = json.loads(ctl("list", "--json").stdout)
    assert [vm["path"] for vm in listed] == await _paths(bus)
    assert [_as_on_the_bus(vm) for vm in listed] == [await _told(bus, vm["path"]) for vm in listed]
    rows = [line.split() for line in ctl("list").stdout.splitlines()]
    assert rows[0][:3] == ["ID", "NAME", "STATE"]
    cid = str(await bus.get(path, "CID"))
    wanted = [path.rpartition("/")[2], name, "running", "crosvm", cid, "64MiB", "1"]
    assert wanted in [row[:7] for row in rows]
    bare = ctl("--no-legend", "list").stdout
    assert [line.split() for line in bare.splitlines()] == rows[1:]
    await bus.vm(path, "Kill")


async def test_status(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    path = await _running(bus, guest(tmp_path), name=name)
    await bus.vm(path, "SetMemoryTarget", "t", 64 * MIB)
    shown = json.loads(ctl("--json", "status", name).stdout)
    assert shown["memory_actual"] == 64 * MIB
    told = await _told(bus, path)
    assert _as_on_the_bus(shown) == {**told, "memoryactual": 64 * MIB}
    for which in (name, path.rpartition("/")[2], path):
        text = ctl("status", which).stdout
        assert name in text.splitlines()[0]
        assert "State: running since" in text
        assert "Memory: 256 MiB, now 64 MiB" in text
    await bus.vm(path, "Kill")
    text = ctl("status", name).stdout
    assert "State: dead since" in text
    assert "Reason: killed (status -9)" in text
    assert ", now " not in text


async def test_status_of_the_service(ctl: Ctl, bus: Client) -> None:
    """Without a name it is the service that is shown."""
    told = json.loads(ctl("--json", "status").stdout)
    assert told["version"] == await bus.get(MANAGER_PATH, "Version")
    assert told["available_vmms"] == await bus.get(MANAGER_PATH, "AvailableVMMs")
    assert told["vm_count"] == await bus.get(MANAGER_PATH, "VMCount")
    assert f"Version: {told['version']}\n" in ctl("status").stdout


async def test_vm_by_its_cid(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    """A name can't be taken for one, having no colon; nor a number that is too large for one."""
    path = await bus.create(kernel=guest(tmp_path), name=name)
    cid = await bus.get(path, "CID")
    assert json.loads(ctl("--json", "status", f"cid:{cid}").stdout)["path"] == path
    for nobody in ("cid:2", f"cid:{1 << 32}", "cid:x"):
        assert "no VM" in ctl("status", nobody, code=1).stderr


#: Colours of letters, as a terminal is told them.
COLOUR = re.compile(r"\x1b\[(?:\d+;)*3\d[;m]")


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
async def test_terminal_shows_states_and_reasons_in_colours(
    service: Service,
    bus: Client,
    tmp_path: Path,
    name: str,
    terminal: tuple[int, int],
    environment: dict[str, str],
    coloured: bool,
) -> None:
    """Unless its user wants none; a pipe has none."""
    path = await _running(bus, guest(tmp_path, then={"exit": 34}), name=name)
    await bus.died(path)
    environment = {"TERM": "xterm-256color", "COLUMNS": "200", **environment}
    with Running(service.rig, "list", terminal=terminal[1], environment=environment) as listing:
        assert listing.status() == 0
        shown = listing.until(terminal[0], name.encode()).decode()
        shown = listing.until(terminal[0], b"guest-panic").decode()
    assert bool(COLOUR.search(shown)) == coloured
    plain = vmbusctl(service.rig, "list", environment=environment).stdout
    assert "\x1b" not in plain
    (row,) = (line.split() for line in plain.splitlines() if name in line)
    assert row[-1] == "guest-panic"


# A VM's life


async def test_create(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    kernel = guest(tmp_path)
    assert ctl("create", "--name", name, "--kernel", str(kernel)).stdout == f"{name}\n"
    path = await _path(bus, name)
    assert await bus.get(path, "State") == "not-started"
    made = json.loads(ctl("create", "--json", "--kernel", str(kernel)).stdout)
    told = await _told(bus, made["path"])
    assert made == {key: told[key] for key in ("id", "name", "cid")} | {"path": made["path"]}


async def test_every_option_of_create_arrives(
    ctl: Ctl, bus: Client, tmp_path: Path, name: str
) -> None:
    shared, disk = tmp_path / "a,b", tmp_path / "a,disk"
    shared.mkdir()
    disk.write_bytes(bytes(MIB))
    options = {
        "--name": name,
        "--vmm": "crosvm",
        "--kernel": str(guest(tmp_path)),
        "--initrd": str(disk),
        "--params": "quiet debug",
        "--memory": "96",
        "--cpus": "1",
        "--disk": f"{disk},writable,id=data,direct",
        "--share": f"{shared}:tag,writable",
        "--gdb": "1234",
        "--ready-timeout": "90",
    }
    ctl(
        "create", "--no-vsock", "--no-balloon", *[word for pair in options.items() for word in pair]
    )
    path = await _path(bus, name)
    await bus.vm(path, "Start")
    argv = Path(f"/proc/{await bus.get(path, 'Pid')}/cmdline").read_text().split("\0")
    assert {"--no-balloon", "--gdb=1234", "--params=quiet debug", "size=96"} <= set(argv)
    assert f"--shared-dir={shared}:tag:type=fs:cache=auto" in argv
    (block,) = [argument for argument in argv if argument.startswith("--block=")]
    assert block.endswith(",ro=false,id=data,direct=true")
    assert "--vsock" not in argv
    await bus.vm(path, "Kill")


async def test_files_are_opened_by_vmbusctl(
    ctl: Ctl, bus: Client, tmp_path: Path, name: str
) -> None:
    kernel = guest(tmp_path)
    ctl("create", "--name", name, "--kernel", kernel.name, cwd=tmp_path)
    kernel.unlink()
    path = await _path(bus, name)
    await bus.vm(path, "Start")
    assert await bus.get(path, "State") == "running"
    await bus.vm(path, "Kill")


@pytest.mark.parametrize(
    ("verbs", "state", "reason"),
    [
        (["start"], "running", ""),
        (["start", "suspend"], "suspended", ""),
        (["start", "suspend", "resume"], "running", ""),
        (["start", "stop"], "dead", "stopped"),
        (["start", "suspend", "stop"], "dead", "stopped"),
        (["start", "kill"], "dead", "killed"),
        (["kill"], "not-started", ""),
    ],
)
async def test_a_life(
    ctl: Ctl, bus: Client, tmp_path: Path, name: str, verbs: list[str], state: str, reason: str
) -> None:
    path = await bus.create(kernel=guest(tmp_path), name=name)
    for verb in verbs:
        done = ctl(verb, name)
        assert (done.stdout, done.stderr) == ("", "")
    assert await bus.get(path, "State") == state
    assert await bus.get(path, "DeathReason") == reason
    await bus.vm(path, "Kill")


async def test_stop_has_a_time_out(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    deaf = {"ignore": True}
    path = await _running(bus, guest(tmp_path, on={"Powerbtn": deaf, "Exit": deaf}), name=name)
    ctl("stop", "--timeout", "0.01", name)
    assert await bus.get(path, "DeathReason") == "killed"


@pytest.mark.parametrize(
    ("before", "verb", "state"),
    [
        ([], "start", "running"),
        (["Start"], "suspend", "suspended"),
        (["Start", "Suspend"], "resume", "running"),
        (["Start"], "stop", "dead"),
        (["Start"], "kill", "dead"),
        ([], "remove", None),
    ],
)
async def test_one_of_several_that_fails_leaves_the_others_alone(
    ctl: Ctl,
    bus: Client,
    tmp_path: Path,
    name: str,
    before: list[str],
    verb: str,
    state: str | None,
) -> None:
    names = [f"{name}1", "nobody", f"{name}2"]
    paths = [await bus.create(kernel=guest(tmp_path), name=names[i]) for i in (0, 2)]
    for path in paths:
        for member in before:
            await bus.vm(path, member)
    done = ctl(verb, "--json", *names, code=1)
    assert [(each["name"], each["ok"]) for each in json.loads(done.stdout)] == [
        (names[0], True),
        ("nobody", False),
        (names[2], True),
    ]
    (line,) = done.stderr.splitlines()
    assert line.startswith("vmbusctl: nobody: ")
    if state is None:
        assert not set(paths) & set(await _paths(bus))
        return
    assert [await bus.get(path, "State") for path in paths] == [state] * 2
    for path in paths:
        await bus.vm(path, "Kill")


@by_end
async def test_wait(
    ctl: Ctl,
    bus: Client,
    tmp_path: Path,
    name: str,
    directives: dict[str, Any],
    reason: str,
    code: int,
) -> None:
    path = await bus.create(kernel=guest(tmp_path, **directives), name=name)
    with contextlib.suppress(RemoteError):
        await bus.vm(path, "Start")
    done = ctl("--json", "wait", name, code=code)
    told = json.loads(done.stdout)
    status = await bus.get(path, "ExitStatus")
    assert told == {"name": name, "reason": reason, "status": status}
    assert done.stderr == ""


async def test_wait_lasts_until_death(
    service: Service, bus: Client, tmp_path: Path, name: str
) -> None:
    path = await _running(bus, guest(tmp_path), name=name)
    with Running(service.rig, "wait", name) as waiting:
        assert waiting.goes_on()
        await bus.vm(path, "Stop", "t", 0)
        assert waiting.status() == 0
        assert waiting.rest(waiting.stdout) == "stopped (0)\n"


async def test_wait_until_ready(service: Service, bus: Client, tmp_path: Path, name: str) -> None:
    """It waits until the guest says so, and no longer for one that has said so."""
    path = await bus.create(kernel=guest(tmp_path, relay=True), name=name)
    with Running(service.rig, "wait", "--ready", name) as waiting:
        assert waiting.goes_on()
        await bus.vm(path, "Start")
        (keys,) = await bus.vm(path, "OpenConsole")
        with socket.socket(fileno=keys) as console:
            console.sendall(b"READY=1\n")
            assert await asyncio.to_thread(waiting.status) == 0
        assert waiting.rest(waiting.stdout) == "ready\n"
    told = vmbusctl(service.rig, "wait", "--ready", "--json", name).stdout
    assert json.loads(told) == {"name": name, "ready": True}
    await bus.vm(path, "Kill")


@pytest.mark.parametrize("waits_before", [True, False])
@pytest.mark.parametrize(
    ("directives", "line", "code"),
    [
        ({"then": {"exit": 0}}, "shutdown (0)", 1),
        ({"then": {"exit": 34}}, "guest-panic (34)", 11),
    ],
)
async def test_death_before_ready_is_a_failure(
    service: Service,
    bus: Client,
    tmp_path: Path,
    name: str,
    directives: dict[str, Any],
    line: str,
    code: int,
    waits_before: bool,
) -> None:
    """However it came about, and whether it is waited for or is over already."""
    path = await bus.create(kernel=guest(tmp_path, **directives), name=name)
    if not waits_before:
        await bus.vm(path, "Start")
        await bus.died(path)
    with Running(service.rig, "wait", "--ready", name) as waiting:
        if waits_before:
            assert waiting.goes_on()
            await bus.vm(path, "Start")
        assert await asyncio.to_thread(waiting.status) == code
        assert waiting.rest(waiting.stdout) == f"{line}\n"


async def test_wait_until_ready_for_a_vm_that_is_removed(
    service: Service, bus: Client, tmp_path: Path, name: str
) -> None:
    path = await bus.create(kernel=guest(tmp_path), name=name)
    with Running(service.rig, "wait", "--ready", name) as waiting:
        assert waiting.goes_on()
        await bus.vm(path, "Remove")
        assert waiting.status() == 1
        # One that has only now begun to look finds none.
        said = waiting.rest(waiting.stderr)
        assert "was removed before it was started" in said or "there is no VM" in said


# run


@by_end
async def test_run(
    ctl: Ctl,
    bus: Client,
    tmp_path: Path,
    name: str,
    directives: dict[str, Any],
    reason: str,
    code: int,
) -> None:
    kernel = guest(tmp_path, console="hello\nworld\n", **directives)
    done = ctl("run", "--name", name, "--kernel", kernel.name, cwd=tmp_path, code=code)
    assert done.stdout == ("" if reason == "start-failed" else "hello\nworld\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vmbusctl: {name}: died: {reason} (")
    assert ("no luck" in line) == (reason == "start-failed")
    names = [await bus.get(path, "Name") for path in await _paths(bus)]
    assert name not in names


async def test_run_ends_when_its_guest_is_not_ready_in_time(ctl: Ctl, tmp_path: Path) -> None:
    done = ctl("run", "--kernel", str(guest(tmp_path)), "--ready-timeout", "0.2", code=13)
    assert "hangup" in done.stderr


async def test_status_shows_what_the_guest_says(
    ctl: Ctl, bus: Client, tmp_path: Path, name: str
) -> None:
    """As the guest's word, and unable to steer a terminal."""
    said = "READY=1\nSTATUS=all \x1b[31mwell\nEXIT_STATUS=3\n"
    path = await _running(bus, guest(tmp_path, notify=said, then={"exit": 0}), name=name)
    await bus.died(path)
    assert "Guest says: finished (status 3) all  [31mwell\n" in ctl("status", name).stdout


async def test_run_can_keep_its_vm(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    kernel = guest(tmp_path, then={"exit": 33})
    done = ctl("--json", "run", "--keep", "--name", name, "--kernel", str(kernel), code=10)
    told = json.loads(done.stderr)
    assert (told["name"], told["reason"], told["status"]) == (name, "crash", 33)
    path = await _path(bus, name)
    assert await bus.get(path, "LastWords") == told["last_words"] != ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_run_stops_the_vm(
    service: Service, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    kernel = guest(tmp_path, console="up\n", echo=True)
    # What is typed comes to the guest when Start has answered, and no sooner.
    with Running(service.rig, "run", "--name", name, "--kernel", str(kernel)) as run:
        run.until(run.stdout, b"up\n")
        run.type(b"typed\n")
        run.until(run.stdout, b"up\ntyped\n")
        run.process.send_signal(number)
        assert run.status() == 0
        assert f"{name}: died: stopped (0)" in run.rest(run.stderr)


async def test_a_second_signal_to_run_kills_the_vm(
    service: Service, bus: Client, tmp_path: Path, name: str
) -> None:
    kernel = guest(tmp_path, echo=True, on={"Powerbtn": {"ignore": True}})
    with Running(service.rig, "run", "--name", name, "--kernel", str(kernel)) as run:
        run.type(b"typed\n")
        run.until(run.stdout, b"typed\n")
        run.process.terminate()
        await bus.until_state(await _path(bus, name), "stopping")
        assert run.goes_on()
        run.process.terminate()
        assert run.status() == 30
        assert f"{name}: died: killed (-9)" in run.rest(run.stderr)


# The console and its log


def _type(running: Running, terminal: tuple[int, int]) -> None:
    """Type a key without the return key, and have it back from the guest: that takes raw mode."""
    user, program = terminal
    os.write(user, b"q")
    running.until(user, b"q")
    assert not termios.tcgetattr(program)[3] & (termios.ICANON | termios.ISIG)


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("key", 0, "left"), ("death", 0, "ended"), ("signal", 128 + signal.SIGTERM, "")],
)
async def test_the_console_gives_the_terminal_back(
    service: Service,
    bus: Client,
    tmp_path: Path,
    name: str,
    terminal: tuple[int, int],
    end: str,
    code: int,
    said: str,
) -> None:
    path = await _running(bus, guest(tmp_path, echo=True), name=name)
    before = termios.tcgetattr(terminal[1])
    with Running(service.rig, "console", name, terminal=terminal[1]) as console:
        _type(console, terminal)
        if end == "key":
            os.write(terminal[0], b"\x1d")
        elif end == "death":
            await bus.vm(path, "Kill")
        else:
            console.process.terminate()
        assert console.status() == code
        assert said in console.rest(console.stderr)
    assert termios.tcgetattr(terminal[1]) == before
    assert await bus.get(path, "State") == ("dead" if end == "death" else "running")
    await bus.vm(path, "Kill")


async def test_run_at_a_terminal_can_be_left(
    service: Service, bus: Client, tmp_path: Path, name: str, terminal: tuple[int, int]
) -> None:
    kernel = str(guest(tmp_path, echo=True))
    before = termios.tcgetattr(terminal[1])
    arguments = ("run", "--name", name, "--kernel", kernel)
    with Running(service.rig, *arguments, terminal=terminal[1]) as run:
        _type(run, terminal)
        os.write(terminal[0], b"\x1d")
        assert run.status() == 0
        assert "left running" in run.rest(run.stderr)
    assert termios.tcgetattr(terminal[1]) == before
    path = await _path(bus, name)
    assert await bus.get(path, "State") == "running"
    await bus.vm(path, "Kill")


async def test_the_console_in_a_pipe(
    service: Service, bus: Client, tmp_path: Path, name: str
) -> None:
    path = await _running(bus, guest(tmp_path, echo=True), name=name)
    with Running(service.rig, "console", name) as console:
        console.type(b"abc\x1d\n")
        console.until(console.stdout, b"abc\x1d\n")
        await bus.vm(path, "Kill")
        assert console.status() == 0
        assert console.rest(console.stderr) == ""


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ([], "one\ntwo\nthree"),
        (["-n", "2"], "two\nthree"),
        (["--lines", "0"], ""),
        (["-n", "9"], "one\ntwo\nthree"),
    ],
)
async def test_logs(
    ctl: Ctl, bus: Client, tmp_path: Path, name: str, options: list[str], printed: str
) -> None:
    kernel = guest(tmp_path, console="one\ntwo\nthree", then={"exit": 0})
    path = await _running(bus, kernel, name=name)
    await bus.died(path)
    assert ctl("logs", *options, name).stdout == printed


# Memory and disks


@pytest.mark.parametrize("size", ["67108864", "65536K", "64M", "64MiB", "64mib"])
async def test_memory_target(ctl: Ctl, bus: Client, tmp_path: Path, name: str, size: str) -> None:
    path = await _running(bus, guest(tmp_path), name=name)
    assert ctl("memory", name, size).stdout == ""
    assert await bus.get(path, "MemoryActual") == 64 * MIB
    await bus.vm(path, "Kill")


async def test_memory(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    path = await _running(bus, guest(tmp_path), name=name)
    assert ctl("memory", name).stdout == "256 MiB\n"
    await bus.vm(path, "SetMemoryTarget", "t", 64 * MIB + 4096)
    assert ctl("memory", name).stdout == "64 MiB\n"
    await bus.vm(path, "SetMemoryTarget", "t", 64 * MIB)
    assert json.loads(ctl("memory", "--json", name).stdout) == {
        "name": name,
        "memory_actual": 64 * MIB,
    }
    await bus.vm(path, "Kill")


async def test_resize_disk(ctl: Ctl, bus: Client, tmp_path: Path, name: str) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for disk in (small, large):
        disk.write_bytes(bytes(MIB))
    disks = ("--disk", str(small), "--disk", f"{large},writable")
    ctl("create", "--name", name, "--kernel", str(guest(tmp_path)), *disks)
    ctl("start", name)
    told = json.loads(ctl("--json", "resize-disk", name, "1", "3M").stdout)
    assert told == {"name": name, "index": 1, "size": 3 * MIB}
    assert (small.stat().st_size, large.stat().st_size) == (MIB, 3 * MIB)
    for index, size, word in (("1", "2M", "grow"), ("0", "2M", "read-only"), ("2", "2M", "disk 2")):
        (line,) = ctl("resize-disk", name, index, size, code=1).stderr.splitlines()
        assert line.startswith(f"vmbusctl: {name}: ")
        assert word in line
    ctl("kill", name)


# What goes wrong


KERNEL = "KERNEL"


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ([], 2, "Usage"),
        (["frobnicate"], 2, "frobnicate"),
        (["start"], 2, "NAME"),
        (["start", "nobody"], 1, "nobody"),
        (["status", ""], 1, "no VM"),
        (["status", "\x1b[2J"], 1, "\\x1b[2J"),
        (["status", "\udcff"], 1, "\\udcff"),
        (["wait", "nobody"], 1, "nobody"),
        (["console", "nobody"], 1, "nobody"),
        (["logs", "-n", "-1", "nobody"], 2, "-1"),
        (["stop", "--timeout", "nan", "nobody"], 1, "nobody"),
        (["memory", "nobody", "64X"], 2, "64X"),
        (["memory", "nobody", "64MB"], 2, "64MB"),
        (["memory", "nobody", "٣M"], 2, "٣M"),
        (["memory", "nobody", "99999999T"], 2, "99999999T"),
        (["memory", "nobody", "9" * 5000], 2, "999"),
        (["resize-disk", "nobody", "0"], 2, "SIZE"),
        (["create"], 1, "kernel"),
        (["create", "--kernel", "nothing"], 1, "nothing: No such file"),
        (["create", "--kernel", "/"], 2, "/"),
        (["create", "--kernel", KERNEL, "--memory", "1"], 1, "memory_mib"),
        (["create", "--kernel", KERNEL, "--memory", "9" * 30], 1, "memory_mib"),
        (["create", "--kernel", KERNEL, "--gdb", "70000"], 1, "gdb_port"),
        (["create", "--kernel", KERNEL, "--name", "a b"], 1, "name"),
        (["create", "--kernel", KERNEL, "--protected"], 1, "protected"),
        (["create", "--kernel", KERNEL, "--vmm", "vmware"], 2, "vmware"),
        (["create", "--kernel", KERNEL, "--disk", "file,wrtable"], 2, "wrtable"),
        (["create", "--kernel", KERNEL, "--net", "tap,max=1"], 2, "max=1"),
        (["create", "--kernel", KERNEL, "--net", "no-tap,mac=1"], 1, "net[0].mac"),
        (["create", "--kernel", KERNEL, "--share", "somewhere"], 2, "DIR:TAG"),
        (["create", "--kernel", KERNEL, "--share", "/:tag,wrtable"], 2, "wrtable"),
        (["create", "--kernel", KERNEL, "--share", "/nothing:tag,writable"], 1, "/nothing"),
        (["run", "--kernel", KERNEL, "--cpus", "0"], 1, "cpus"),
    ],
)
async def test_bad_input_ends_in_one_line(
    ctl: Ctl, bus: Client, tmp_path: Path, arguments: list[str], code: int, word: str
) -> None:
    before = await _paths(bus)
    kernel = str(guest(tmp_path))
    done = ctl(*(kernel if each is KERNEL else each for each in arguments), code=code)
    assert done.stdout == ""
    assert word in done.stderr
    if arguments:
        (line,) = done.stderr.splitlines()
        assert line.startswith("vmbusctl: ")
        assert line.isprintable()
    assert await _paths(bus) == before


@pytest.mark.parametrize(
    "arguments", [["list"], ["status", "x"], ["start", "x"], ["wait", "x"], ["memory", "x"]]
)
def test_a_service_that_is_not_there(system_rig: Rig, arguments: list[str]) -> None:
    done = system_rig.command(*VMBUSCTL, *arguments, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith(': the service is not running (start it with "systemctl start vmbusd")')


def test_a_bus_that_is_not_there(tmp_path: Path, system_rig: Rig) -> None:
    address = f"DBUS_SYSTEM_BUS_ADDRESS=unix:path={tmp_path}/bus"
    done = system_rig.command("env", address, *VMBUSCTL, "list")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "can't reach the system bus: No such file" in line


async def test_a_reader_that_goes_ends_it_quietly(
    service: Service, bus: Client, tmp_path: Path, name: str
) -> None:
    path = await _running(bus, guest(tmp_path, flood_console=True), name=name)
    with Running(service.rig, "console", name) as console:
        console.until(console.stdout, b"flood")
        assert console.process.stdout is not None
        console.process.stdout.close()
        assert console.status() == 128 + signal.SIGPIPE
        assert console.rest(console.stderr) == ""
    await bus.vm(path, "Kill")


# Completion


def _completed(rig: Rig, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    line = ["vmbusctl", *words]
    variables = [f"COMP_WORDS={' '.join(line)}", f"COMP_CWORD={len(line) - 1}"]
    variables.append("_VMBUSCTL_COMPLETE=bash_complete")
    done = rig.command("env", *variables, *VMBUSCTL)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("verb", ["status", "start x", "resize-disk", "console"])
async def test_names_complete(
    service: Service, bus: Client, tmp_path: Path, name: str, verb: str
) -> None:
    for which in ("one", "two"):
        await bus.create(kernel=guest(tmp_path), name=f"{name}.{which}")
    beginning = [*verb.split(), f"{name}."]
    expected = [f"plain,{name}.{which}" for which in ("one", "two")]
    assert _completed(service.rig, "--user", *beginning) == expected


def test_commands_complete(service: Service) -> None:
    assert _completed(service.rig, "re") == ["plain,remove", "plain,resize-disk", "plain,resume"]


def test_completion_without_a_service_is_silent(system_rig: Rig) -> None:
    assert _completed(system_rig, "status", "x") == []


# monitor


async def test_monitor(service: Service, bus: Client, tmp_path: Path, name: str) -> None:
    known = await bus.create(kernel=guest(tmp_path), name=f"{name}-known")
    with Running(service.rig, "monitor", "--json") as monitor:
        # What happens before it listens it doesn't hear, so something happens until it does.
        deadline = time.monotonic() + DEADLINE
        while not select.select([monitor.stdout], [], [], 0.05)[0]:
            assert time.monotonic() < deadline
            await bus.vm(await bus.create(kernel=guest(tmp_path)), "Remove")
        path = await bus.create(kernel=guest(tmp_path), name=name)
        cid = await bus.get(path, "CID")
        await bus.vm(path, "Start")
        await bus.vm(path, "SetMemoryTarget", "t", 64 * MIB)
        await bus.vm(path, "Suspend")
        await bus.vm(path, "Resume")
        await bus.vm(path, "Kill")
        await bus.vm(path, "Remove")
        await bus.vm(known, "Remove")
        monitor.until(monitor.stdout, f'"removed", "name": "{name}-known"'.encode())
        monitor.process.send_signal(signal.SIGINT)
        assert monitor.status() == 0
        assert monitor.rest(monitor.stderr) == ""
        lines = [json.loads(line) for line in monitor.rest(monitor.stdout).splitlines()]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    mine = [line for line in lines if line.get("path") == path]
    assert {line["name"] for line in mine} == {name}
    events = [line["event"] for line in mine]
    assert [event for event in events if event != "changed"] == ["added", "died", "removed"]
    assert (events[0], events[-2:]) == ("added", ["died", "removed"])
    states = [line["state"] for line in mine if "state" in line]
    assert states[:2] == ["not-started", "starting"]
    assert states[2:] == ["running", "suspended", "running", "dead"]
    assert ["memory_actual"] in [line.get("invalidated") for line in mine]
    assert (mine[-2]["cid"], mine[-2]["reason"], mine[-2]["status"]) == (cid, "killed", -9)


async def test_monitor_for_people(service: Service, bus: Client, tmp_path: Path, name: str) -> None:
    with Running(service.rig, "monitor") as monitor:
        for _ in range(200):
            path = await bus.create(kernel=guest(tmp_path, then={"exit": 34}), name=name)
            if select.select([monitor.stdout], [], [], 0.05)[0]:
                break
            await bus.vm(path, "Remove")
        await bus.vm(path, "Start")
        died = f"  {name}  died cid={await bus.get(path, 'CID')} reason=guest-panic status=34\n"
        monitor.until(monitor.stdout, died.encode())
        monitor.process.terminate()
        assert monitor.status() == 0
