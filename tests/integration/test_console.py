"""The console end to end: floods, sleepers, restarts, and vmbusctl at it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ctl import VMBUSCTL, Running
from tests.rig import CROSVM, DEADLINE, ERROR, Client, Rig, Service, client, guest, refused

MIB = 1 << 20
#: Seconds for a guest to boot on a busy host.
BOOT = 60.0
LOG = 256 * 1024
#: Seconds of a flood.
FLOOD = 10.0


@pytest.fixture
def mortal(own_rig: Rig) -> Service:
    """A service of this test's own, to be killed and started anew, that keeps little of a log."""
    return Service(own_rig, {"crosvm": str(CROSVM), "kvm": "on", "console_log_bytes": LOG})


@pytest.fixture
def name(tmp_path: Path) -> str:
    return tmp_path.name.replace("_", "-")[-40:].lstrip("-")


async def _console(bus: Client, path: str) -> socket.socket:
    (fd,) = await bus.vm(path, "OpenConsole")
    stream = socket.socket(fileno=fd)
    stream.setblocking(False)
    return stream


async def _log(bus: Client, path: str) -> bytes:
    (fd,) = await bus.vm(path, "OpenLog")
    with os.fdopen(fd, "rb") as file:
        return file.read()


async def _until_end(stream: socket.socket, *, deadline: float = DEADLINE) -> bytes:
    data = b""
    async with asyncio.timeout(deadline):
        while piece := await asyncio.get_running_loop().sock_recv(stream, 65536):
            data += piece
    return data


async def _until(stream: socket.socket, wanted: bytes, *, deadline: float = DEADLINE) -> bytes:
    data = b""
    async with asyncio.timeout(deadline):
        while wanted not in data:
            piece = await asyncio.get_running_loop().sock_recv(stream, 65536)
            assert piece, f"the console ended without {wanted!r}: {data!r}"
            data += piece
    return data


def _numbers(text: bytes) -> list[int]:
    """The numbers of whole lines of a flood of the stand-in; the first may be cut."""
    return [int(line.split()[1]) for line in text.split(b"\n")[1:-1] if line]


def _contiguous(numbers: list[int]) -> bool:
    return bool(numbers) and numbers == list(range(numbers[0], numbers[-1] + 1))


# Floods


async def _reads(bus: Client, path: str, count: int) -> list[float]:
    """How long each of so many reads of a property took."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await bus.get(path, "State")
        took.append(time.perf_counter() - began)
    return took


def _on_disk(directory: Path) -> int:
    """The size of a log's files, one of which may just be given the other's name."""
    size = 0
    for file in directory.glob("console.*"):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _cpu(service: Service) -> float:
    """The seconds of CPU that a service has had."""
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_flood_at_full_speed_for_ten_seconds_while_five_readers_sleep(
    mortal: Service, listener: Client, tmp_path: Path
) -> None:
    """Calls are answered as before, memory and disk stay bounded, and the log has the newest."""
    path = await listener.create(kernel=str(guest(tmp_path, flood_console=True)))
    directory = mortal.runtime / "vm" / path.rpartition("/")[2]
    before = await _reads(listener, path, 500)
    with contextlib.ExitStack() as stack:
        sleepers = [stack.enter_context(await _console(listener, path)) for _ in range(5)]
        await listener.vm(path, "Start")
        memory = mortal.resident()
        end = asyncio.get_running_loop().time() + FLOOD
        during, seen = [], 0
        while asyncio.get_running_loop().time() < end:
            during += await _reads(listener, path, 100)
            assert _on_disk(directory) <= LOG
            log = _numbers(await _log(listener, path))
            assert _contiguous(log)
            assert log[-1] >= seen
            seen = log[-1]
        assert statistics.median(during) < 5 * statistics.median(before)
        assert mortal.resident() < memory + 8 * MIB
        await listener.vm(path, "Kill")
        for sleeper in sleepers:
            numbers = _numbers(b"\n" + await _until_end(sleeper))
            assert numbers[0] == 0
            assert len(numbers) < seen
    last = _numbers(await _log(listener, path))
    assert _contiguous(last)
    assert last[-1] >= seen
    assert len(last) * 64 > LOG // 2 - 128


async def test_flood_as_fast_as_the_host_can_leaves_the_service_mostly_idle(
    mortal: Service, listener: Client, tmp_path: Path
) -> None:
    """Faster than any VMM: a program writes right into the FIFO."""
    path = await listener.run(guest(tmp_path))
    fifo = mortal.runtime / "vm" / path.rpartition("/")[2] / "tmp" / "console.out"
    with await _console(listener, path) as stream:
        with fifo.open("wb", buffering=0) as output:
            flood = subprocess.Popen(["timeout", str(DEADLINE), "yes"], stdout=output)
        began, cpu = time.monotonic(), _cpu(mortal)
        while time.monotonic() < began + 3.0:
            await asyncio.get_running_loop().sock_recv(stream, 65536)
        used = (_cpu(mortal) - cpu) / (time.monotonic() - began)
        flood.terminate()
        flood.wait()
    assert used < 0.12
    await listener.vm(path, "Kill")


async def test_two_readers_get_the_same_bytes(
    mortal: Service, listener: Client, tmp_path: Path
) -> None:
    """Both of all that the guest printed, and so does the log."""
    text = "".join(f"{number:07}\n" for number in range(12_000))
    path = await listener.create(kernel=str(guest(tmp_path, console=text, then={"exit": 0})))
    with await _console(listener, path) as first, await _console(listener, path) as second:
        reading = asyncio.gather(_until_end(first), _until_end(second))
        await listener.vm(path, "Start")
        one, other = await reading
    assert one == other == text.encode()
    assert await _log(listener, path) == text.encode()


# Real guests


@pytest.fixture
def real(rig: Rig, guest_files: tuple[Path, Path]) -> Iterator[Service]:
    """A service of this test's own whose VMs run in QEMU."""
    service = Service(rig, {"crosvm": "/none", "console_log_bytes": 8 * MIB})
    yield service
    service.close()


def _linux(guest_files: tuple[Path, Path], script: str) -> dict[str, Any]:
    run = base64.b64encode(script.encode()).decode()
    params = f"console=ttyS0 quiet panic=-1 cryptomgr.notests vmbus.run={run}"
    return {
        "kernel": str(guest_files[0]),
        "initrd": str(guest_files[1]),
        "params": params,
        "memory_mib": 128,
    }


async def test_real_guest_is_heard_by_two_and_answers_both(
    real: Service, guest_files: tuple[Path, Path]
) -> None:
    """Both ways, and what was said can be read after the death until Remove."""
    async with client(real.rig) as bus:
        script = "read one; echo first $one; read two; echo second $two; seq 1 20000; echo over"
        path = await bus.create(**_linux(guest_files, script))
        with await _console(bus, path) as first, await _console(bus, path) as second:
            await bus.vm(path, "Start")
            heard = [await _until(each, b"up, kernel", deadline=BOOT) for each in (first, second)]
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(first, b"hello\n")
            heard[0] += await _until(first, b"first hello", deadline=BOOT)
            await loop.sock_sendall(second, b"world\n")
            rest = await asyncio.gather(
                _until_end(first, deadline=BOOT), _until_end(second, deadline=BOOT)
            )
        said = [one + other for one, other in zip(heard, rest, strict=True)]
        assert said[0] == said[1]
        assert b"second world" in said[0]
        counted = "".join(f"{number}\r\n" for number in range(1, 20_001)).encode()
        assert counted + b"over" in said[0]
        assert await bus.vm(path, "Wait") == ["shutdown", 0]
        assert await _log(bus, path) == said[0]
        await bus.vm(path, "Remove")
        async with refused("org.freedesktop.DBus.Error.UnknownObject"):
            await bus.vm(path, "OpenLog")


async def test_restart_in_the_middle_loses_at_most_what_did_not_fit_and_says_so(
    real: Service, guest_files: tuple[Path, Path]
) -> None:
    """A guest that counts for ever, and a service that is away until its FIFO is full."""
    async with client(real.rig) as bus:
        path = await bus.create(**_linux(guest_files, "seq 100000 999999"))
        with await _console(bus, path) as stream:
            await bus.vm(path, "Start")
            await _until(stream, b"\n101000\r", deadline=BOOT)
        fifo = real.runtime / "vm" / path.rpartition("/")[2] / "tmp" / "console.out"
        real.crash()
        await asyncio.to_thread(_wait_until_full, fifo)
        real.start()
        with await _console(bus, path) as stream:
            for _ in range(10):
                await _until(stream, b"000\r\n", deadline=BOOT)
        await bus.vm(path, "Kill")
        before, lost, after = (await _log(bus, path)).partition(b"some of the output was lost]")
    assert lost
    parts = [
        [int(number) for number in re.findall(rb"(?<=\n)\d{6}(?=\r\n)", part)]
        for part in (before, after)
    ]
    assert all(_contiguous(numbers) for numbers in parts)
    # 128 KiB are so many lines.
    assert parts[0][-1] - 101_000 > 120 * 1024 // 8
    assert parts[1][0] > parts[0][-1]


def _wait_until_full(fifo: Path) -> None:
    """Return when a FIFO that somebody writes to takes no more."""
    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        deadline = time.monotonic() + BOOT
        while poll.poll(0):
            assert time.monotonic() < deadline, "the guest does not print"
            select.select([], [], [], 0.01)
    finally:
        os.close(fd)


async def test_run_shows_a_real_guest_live(
    real: Service, guest_files: tuple[Path, Path], name: str
) -> None:
    config = _linux(guest_files, "read line; echo you said $line")
    arguments = ["--kernel", config["kernel"], "--initrd", config["initrd"]]
    arguments += ["--params", config["params"], "--memory", "128", "--name", name]
    with Running(real.rig, "run", *arguments) as run:
        run.until(run.stdout, b"up, kernel")
        run.type(b"hello\n")
        run.until(run.stdout, b"you said hello")
        assert run.status() == 0
        assert f"{name}: died: shutdown (0)" in run.rest(run.stderr)


# vmbusctl and a service that is restarted


def _type(running: Running, terminal: tuple[int, int], key: bytes) -> None:
    """Type a key and have it back from the guest."""
    os.write(terminal[0], key)
    running.until(terminal[0], key)


def _until_away(running: Running) -> None:
    running.until(running.stderr, b"the service went away; waiting for it to come back")


async def test_console_is_joined_again_when_the_service_is_back(
    mortal: Service, listener: Client, tmp_path: Path, name: str, terminal: tuple[int, int]
) -> None:
    path = await listener.run(guest(tmp_path, echo=True), name=name)
    before = termios.tcgetattr(terminal[1])
    with Running(mortal.rig, "console", name, terminal=terminal[1]) as console:
        _type(console, terminal, b"a")
        mortal.crash()
        _until_away(console)
        mortal.start()
        console.until(console.stderr, b"the service is back")
        _type(console, terminal, b"b")
        # The end of a service that is told to end is as good as its death.
        mortal.terminate()
        mortal.start()
        deadline = time.monotonic() + DEADLINE
        while console.heard[console.stderr].count(b"is back") < 2:
            assert time.monotonic() < deadline
            console.heard[console.stderr] += os.read(console.stderr, 65536)
        _type(console, terminal, b"c")
        os.write(terminal[0], b"\x1d")
        assert console.status() == 0
    assert termios.tcgetattr(terminal[1]) == before
    assert await listener.get(path, "State") == "running"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("key", 0),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, 128 + signal.SIGHUP),
        (signal.SIGINT, 128 + signal.SIGINT),
    ],
)
async def test_console_can_be_left_while_the_service_is_away(
    mortal: Service,
    listener: Client,
    tmp_path: Path,
    name: str,
    terminal: tuple[int, int],
    end: str | signal.Signals,
    code: int,
) -> None:
    """And the terminal is given back, as ever."""
    await listener.run(guest(tmp_path, echo=True), name=name)
    before = termios.tcgetattr(terminal[1])
    with Running(mortal.rig, "console", name, terminal=terminal[1]) as console:
        _type(console, terminal, b"a")
        mortal.crash()
        _until_away(console)
        if isinstance(end, signal.Signals):
            console.process.send_signal(end)
        else:
            os.write(terminal[0], b"\x1d")
        assert console.status() == code
    assert termios.tcgetattr(terminal[1]) == before


async def test_terminal_that_goes_away_ends_the_console(
    mortal: Service, listener: Client, tmp_path: Path, name: str
) -> None:
    """Nothing hangs, nothing complains, and the VM runs on."""
    path = await listener.run(guest(tmp_path, console="up\n", echo=True), name=name)
    user, program = os.openpty()
    with Running(mortal.rig, "console", name, terminal=program) as console:
        os.close(program)
        os.write(user, b"q")
        console.until(user, b"q")
        os.close(user)
        # The kernel hangs up the leader of a session; this one has none, and sees the end itself.
        await listener.vm(path, "Kill")
        assert console.status() in (0, 1)
        assert "Traceback" not in console.rest(console.stderr)


async def test_terminal_is_set_right_after_a_guest_that_drew_on_it(
    mortal: Service, listener: Client, tmp_path: Path, name: str, terminal: tuple[int, int]
) -> None:
    """Back to the shell's screen, with a cursor and without reports of the mouse."""
    drawn = "\x1b[?1049h\x1b[?25l\x1b[?1000h"
    path = await listener.run(guest(tmp_path, echo=True), name=name)
    with Running(mortal.rig, "console", name, terminal=terminal[1]) as console:
        os.write(terminal[0], drawn.encode())
        console.until(terminal[0], drawn.encode())
        os.write(terminal[0], b"\x1d")
        assert console.status() == 0
        shown = console.until(terminal[0], b"2004l").rpartition(drawn.encode())[2]
    assert b"\x1b[?1049l\x1b[!p" in shown
    assert re.search(rb"\x1b\[\?1000;[0-9;]*l", shown)
    await listener.vm(path, "Kill")


@pytest.mark.parametrize("collect", ["--collect", "--keep"])
async def test_run_goes_on_with_the_next_service(
    mortal: Service, listener: Client, tmp_path: Path, name: str, collect: str
) -> None:
    """It shows what is printed from then on, takes what is typed, and tells how it all ended."""
    kernel = guest(tmp_path, echo=True)
    with Running(mortal.rig, "run", collect, "--name", name, "--kernel", str(kernel)) as run:
        run.type(b"one\n")
        run.until(run.stdout, b"one\n")
        mortal.crash()
        _until_away(run)
        mortal.start()
        run.until(run.stderr, b"the service is back")
        run.type(b"two\n")
        run.until(run.stdout, b"two\n")
        run.process.terminate()
        assert run.status() == 0
        assert f"{name}: died: stopped (0)" in run.rest(run.stderr)


async def test_run_is_told_of_a_death_while_the_service_was_away(
    mortal: Service, listener: Client, tmp_path: Path, name: str
) -> None:
    """Also of a VM that the next service has forgotten by the time it can be asked."""
    kernel = guest(tmp_path, echo=True)
    with Running(mortal.rig, "run", "--name", name, "--kernel", str(kernel)) as run:
        run.type(b"one\n")
        run.until(run.stdout, b"one\n")
        ((pid, _),) = mortal.traces()
        mortal.crash()
        _until_away(run)
        os.killpg(pid, signal.SIGKILL)
        mortal.start()
        assert run.status() in (31, 40)
        assert f"{name}: died: " in run.rest(run.stderr)


# logs


def _logs(rig: Rig, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = rig.command(*VMBUSCTL, "--user", "logs", *arguments, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done


async def test_followed_log_has_no_gap_and_nothing_twice(
    mortal: Service, listener: Client, tmp_path: Path, name: str
) -> None:
    """From within a flood to the end of the VM."""
    path = await listener.run(guest(tmp_path, flood_console=True), name=name)
    with Running(mortal.rig, "logs", "-f", name) as logs:
        logs.until(logs.stdout, b"\n" * 1)
        beginning = len(await _log(listener, path))
        while len(logs.heard[logs.stdout]) < beginning + 64 * 1024:
            logs.heard[logs.stdout] += os.read(logs.stdout, 65536)
        await listener.vm(path, "Suspend")
        await listener.vm(path, "Kill")
        heard = logs.rest(logs.stdout).encode()
        assert logs.status() == 0
        assert "twice" not in logs.rest(logs.stderr)
    numbers = _numbers(heard)
    assert _contiguous(numbers[: beginning // 64 + 512])


@pytest.mark.parametrize("lines", [[], ["-n", "1"]])
async def test_followed_log_goes_on_after_a_restart_with_what_was_printed_meanwhile(
    mortal: Service, listener: Client, tmp_path: Path, name: str, lines: list[str]
) -> None:
    path = await listener.run(guest(tmp_path, console="one\ntwo\n", echo=True), name=name)
    with Running(mortal.rig, "logs", "-f", *lines, name) as logs:
        logs.until(logs.stdout, b"two\n")
        mortal.crash()
        _until_away(logs)
        fifo = mortal.runtime / "vm" / path.rpartition("/")[2] / "tmp" / "console.in"
        fifo.write_bytes(b"three\n")
        mortal.start()
        logs.until(logs.stdout, b"three\n")
        with await _console(listener, path) as stream:
            stream.send(b"four\n")
            logs.until(logs.stdout, b"four\n")
        await listener.vm(path, "Kill")
        assert logs.status() == 0
        assert logs.rest(logs.stdout) == ("two\n" if lines else "one\ntwo\n") + "three\nfour\n"


async def test_followed_log_of_a_dead_vm_ends_at_once(
    mortal: Service, listener: Client, tmp_path: Path, name: str
) -> None:
    path = await listener.run(guest(tmp_path, console="bye\n", then={"exit": 0}), name=name)
    await listener.died(path)
    assert _logs(mortal.rig, "-f", name).stdout == "bye\n"
    await listener.vm(path, "Remove")
    done = mortal.rig.command(*VMBUSCTL, "--user", "logs", name)
    assert done.returncode == 1
    assert "no VM" in done.stderr


async def test_log_as_json(mortal: Service, listener: Client, tmp_path: Path, name: str) -> None:
    """A document for every line, whatever is in it."""
    text = 'one\r\n"\x1b[2J\u00fc"\nlast'
    path = await listener.run(guest(tmp_path, console=text, then={"exit": 0}), name=name)
    await listener.died(path)
    lines = [json.loads(line) for line in _logs(mortal.rig, "--json", name).stdout.splitlines()]
    assert lines == [{"line": "one"}, {"line": '"\x1b[2J\u00fc"'}, {"line": "last"}]


async def test_log_does_not_steer_the_terminal_but_for_colours(
    mortal: Service, listener: Client, tmp_path: Path, name: str, terminal: tuple[int, int]
) -> None:
    """In a pipe it is what the guest printed."""
    text = "\x1b[32mOK\x1b[0m \x1b]0;title\x07\x1b[2J\u00fc\u009b end"
    path = await listener.run(guest(tmp_path, console=text, then={"exit": 0}), name=name)
    await listener.died(path)
    assert _logs(mortal.rig, name).stdout == text
    with Running(mortal.rig, "logs", name, terminal=terminal[1]) as logs:
        shown = logs.until(terminal[0], b"end\x1b[0m")
        assert logs.status() == 0
    assert shown.decode() == ("\x1b[32mOK\x1b[0m \\x1b]0;title\\x07\\x1b[2J\u00fc\\x9b end\x1b[0m")


async def test_console_of_a_dead_vm_is_refused_by_its_state(
    mortal: Service, listener: Client, tmp_path: Path, name: str
) -> None:
    path = await listener.run(guest(tmp_path, then={"exit": 0}), name=name)
    await listener.died(path)
    async with refused(ERROR + "InvalidState"):
        await listener.vm(path, "OpenConsole")
    done = mortal.rig.command(*VMBUSCTL, "--user", "console", name)
    assert done.returncode == 1
    assert "its log can be opened" in done.stderr
