"""vmbusctl monitor at a terminal: a screen of all VMs, drawn anew when something happens."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ctl import Running
from tests.rig import CROSVM, Client, Rig, Service, client, guest

ENTER, LEAVE, SHOW_CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
#: Where the environment says how large a terminal is, that is believed.
ENVIRONMENT = {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@pytest.fixture
def mortal() -> Iterator[Service]:
    """A service on a bus of its own, which may die."""
    rig = Rig(system=False)
    yield Service(rig, {"crosvm": str(CROSVM), "kvm": "on"})
    rig.close()


async def until(monitor: Running, fd: int, wanted: bytes) -> bytes:
    """What is drawn up to this; then that is forgotten."""
    await asyncio.to_thread(monitor.until, fd, wanted)
    return monitor.heard.pop(fd)


async def test_screen_lives_through_a_restart_and_leaves_a_clean_terminal(
    mortal: Service, tmp_path: Path, terminal: tuple[int, int]
) -> None:
    """It shows all VMs with their states, and the last events; and draws when these change."""
    user, program = terminal
    resize(program, 30, 160)
    before = termios.tcgetattr(program)
    async with client(mortal.rig) as bus:
        path = await bus.create(kernel=guest(tmp_path), name="web")
    with Running(mortal.rig, "monitor", terminal=program, environment=ENVIRONMENT) as monitor:
        drawn = await until(monitor, user, b"not-started")
        assert ENTER in drawn
        async with client(mortal.rig) as bus:
            await bus.vm(path, "Start")
            await until(monitor, user, b"1 VMs, 1 running")
            mortal.crash()
            await until(monitor, user, b"the service is not running")
            mortal.start()
        async with client(mortal.rig) as bus:
            await until(monitor, user, b"service running=True")
            await bus.vm(path, "Kill")
            await until(monitor, user, b"died cid=")
        monitor.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(monitor.status) == 0
        assert monitor.rest(monitor.stderr) == ""
        end = await until(monitor, user, LEAVE)
        assert SHOW_CURSOR in end
    assert termios.tcgetattr(program) == before


async def test_screen_is_drawn_for_events_and_sizes_only(
    service: Service, bus: Client, tmp_path: Path, name: str, terminal: tuple[int, int]
) -> None:
    """Nothing is drawn while nothing happens; what doesn't fit is counted."""
    user, program = terminal
    resize(program, 30, 160)
    paths = [await bus.create(kernel=guest(tmp_path), name=f"{name}-{i}") for i in range(12)]
    with Running(service.rig, "monitor", terminal=program, environment=ENVIRONMENT) as monitor:
        await until(monitor, user, f"{name}-11".encode())
        while select.select([user], [], [], 0.3)[0]:
            os.read(user, 65536)
        assert not select.select([user], [], [], 0.7)[0]
        resize(program, 10, 60)
        monitor.process.send_signal(signal.SIGWINCH)
        drawn = await until(monitor, user, b"not shown")
        while select.select([user], [], [], 0.3)[0]:
            drawn += os.read(user, 65536)
        assert drawn.count(b"\n") == 9
        assert f"{name}-11".encode() not in drawn
        monitor.process.terminate()
        assert await asyncio.to_thread(monitor.status) == 0
    for path in paths:
        await bus.vm(path, "Remove")


async def test_dumb_terminal_gets_lines(
    service: Service, bus: Client, tmp_path: Path, name: str, terminal: tuple[int, int]
) -> None:
    user, program = terminal
    dumb = {"TERM": "dumb"}
    with Running(service.rig, "monitor", terminal=program, environment=dumb) as monitor:
        while not select.select([user], [], [], 0.05)[0]:
            await bus.vm(await bus.create(kernel=guest(tmp_path)), "Remove")
        path = await bus.create(kernel=guest(tmp_path), name=name)
        said = await until(monitor, user, f"  {name}  added".encode())
        assert b"\x1b" not in said
        monitor.process.terminate()
        assert await asyncio.to_thread(monitor.status) == 0
    await bus.vm(path, "Remove")


async def test_lines_go_on_after_a_restart(mortal: Service, tmp_path: Path) -> None:
    """With what was missed."""
    async with client(mortal.rig) as bus:
        path = await bus.create(kernel=guest(tmp_path), name="web")
        with Running(mortal.rig, "monitor", "--json") as monitor:
            while not select.select([monitor.stdout], [], [], 0.05)[0]:
                await bus.vm(await bus.create(kernel=guest(tmp_path)), "Remove")
            mortal.crash()
            await until(monitor, monitor.stdout, b'"running": false')
            mortal.start()
            await until(monitor, monitor.stdout, b'"running": true')
            await bus.vm(path, "Remove")
            await until(monitor, monitor.stdout, b'"removed", "name": "web"')
            monitor.process.terminate()
            assert await asyncio.to_thread(monitor.status) == 0
