"""vmbusctl leaves nothing out: every method of the contract, and shells that complete it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import documented
from tests.ctl import VMBUSCTL, on_path, vmbusctl
from tests.rig import BUS, CROSVM, DEADLINE, ROOT, Client, Rig, Service, guest
from vmbus.bus.connection import BUS_NAME, BUS_PATH, Connection
from vmbus.bus.wire import Kind, Message

MIB = 1 << 20


@pytest.fixture
def alone() -> Iterator[Service]:
    """A service on a bus of its own, all of whose VMs may be ended."""
    rig = Rig(system=False)
    yield Service(rig, {"crosvm": str(CROSVM), "kvm": "on"})
    rig.close()


async def test_every_method_is_reached_by_a_command(alone: Service, tmp_path: Path) -> None:
    """The bus sees a call of each method of the interfaces, but of List.

    In its place is GetManagedObjects, which tells the same and more.
    """
    called: set[str | None] = set()
    last = asyncio.Event()

    def note(message: Message) -> None:
        for fd in message.fds:
            os.close(fd)
        if message.kind is Kind.CALL:
            called.add(message.member)
            if message.member == "StopAll":
                last.set()

    watching = await Connection.open(alone.rig.address)
    async with contextlib.aclosing(watching):
        watching.handler = note
        body = [[f"type='method_call',destination='{BUS}'"], 0]
        await watching.call(
            BUS_NAME, BUS_PATH, "org.freedesktop.DBus.Monitoring", "BecomeMonitor", "asu", body
        )
        for code, *arguments in _life(guest(tmp_path), tmp_path / "disk"):
            await asyncio.to_thread(vmbusctl, alone.rig, *map(str, arguments), code=code)
        async with asyncio.timeout(DEADLINE):
            await last.wait()
    methods = {
        method.attrib["name"]
        for interface in documented().values()
        for method in interface.iterfind("method")
    }
    assert methods - called == {"List"}
    assert "GetManagedObjects" in called


def _life(kernel: Path, disk: Path) -> Iterator[tuple[Any, ...]]:
    """Command lines for all that can be done with a VM, each after its exit status."""
    disk.write_bytes(bytes(MIB))
    yield 0, "create", "--name", "web", "--kernel", kernel, "--no-vsock", f"--disk={disk},writable"
    yield 0, "list"
    yield 1, "status", "cid:2"
    yield 0, "start", "web"
    yield 0, "suspend", "web"
    yield 0, "resume", "web"
    yield 0, "logs", "web"
    yield 1, "vsock", "web", 1024
    yield 0, "memory", "web", "64M"
    yield 0, "resize-disk", "web", 0, "2M"
    yield 0, "stop", "web"
    yield 0, "kill", "web"
    yield 1, "console", "web"
    yield 0, "wait", "web"
    yield 0, "remove", "web"
    yield 0, "shutdown-all"


# Completion


@pytest.fixture
def shell(service: Service, tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that finds vmbusctl and its completions, as they are installed."""
    for name in ("vmbusctl", "_vmbusctl"):
        directory = tmp_path / "completions"
        directory.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "generate", name], capture_output=True, check=True
        )
        (directory / name).write_bytes(done.stdout)
    programs = on_path(tmp_path, vmbusctl=f'#!/bin/sh\nexec {shlex.join(VMBUSCTL)} "$@"\n')
    return {**service.rig.environment, **programs, "TERM": "dumb", "HOME": str(tmp_path)}


#: How a shell begins: with the completions loaded, a short prompt, and nothing of the user's.
BEGINNINGS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        "bind 'set enable-bracketed-paste off'; . ~/completions/vmbusctl; PS1='%s> '",
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        "unsetopt zle_bracketed_paste 2>/dev/null; fpath=(~/completions $fpath); "
        "autoload -U compinit; compinit -u -d ~/dump; PS1='%s> '",
    ),
}


class Shell:
    """A shell at a terminal, at which somebody types."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        argv, beginning = BEGINNINGS[name]
        self._user, program = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv],
            env=environment,
            stdin=program,
            stdout=program,
            stderr=program,
        )
        os.close(program)
        self.type(beginning.replace("%s", "re''ady") + "\n")
        self.until("ready> ")

    def type(self, text: str) -> None:
        os.write(self._user, text.encode())

    def until(self, wanted: str) -> str:
        """What it shows until this is there."""
        shown = b""
        while wanted.encode() not in shown:
            assert select.select([self._user], [], [], DEADLINE)[0], shown
            shown += os.read(self._user, 65536)
        return shown.decode()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._user)


@pytest.mark.parametrize("name", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("beginning", "whole"),
    [
        ("vmbusctl shutd", "shutdown-all "),
        ("vmbusctl logs --foll", "--follow "),
        ("vmbusctl --user status completed-b", "completed-by-shell "),
        ("vmbusctl create --kernel ~/kernel-of", "kernel-of-mine "),
    ],
)
async def test_shell_completes(
    bus: Client, tmp_path: Path, shell: dict[str, str], name: str, beginning: str, whole: str
) -> None:
    """Commands, options, names of VMs, and files."""
    vm = await bus.create(kernel=guest(tmp_path), name="completed-by-shell")
    (tmp_path / "kernel-of-mine").touch()
    with contextlib.closing(Shell(name, shell)) as typed:
        typed.type(f"{beginning}\t")
        await asyncio.to_thread(typed.until, whole)
    await bus.vm(vm, "Remove")
