"""vmbusctl -H: the same command on another machine, by ssh."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.ctl import VMBUSCTL, Ctl, Running, on_path
from tests.rig import Client, Service, guest

#: Notes its arguments and its number, and does as sshd does with a command: a shell gets it.
SSH = """#!/bin/sh
for argument; do printf '%s\\0' "$argument"; done >"$0.arguments"
echo $$ >"$0.pid"
while [ "$1" != -- ]; do shift; done
exec sh -c "$3"
"""
#: A machine that can't be reached.
LOST = """#!/bin/sh
echo "ssh: connect to host far port 22: No route to host" >&2
exit 255
"""


@pytest.fixture
def far(tmp_path: Path) -> dict[str, str]:
    """An environment with another machine, which is this one."""
    there = f'#!/bin/sh\nexec {shlex.join(VMBUSCTL)} "$@"\n'
    return on_path(tmp_path, ssh=SSH, vmbusctl=there)


def arguments_of_ssh(directory: Path) -> list[str]:
    return (directory / "ssh.arguments").read_text().split("\0")[:-1]


async def test_command_runs_there_as_it_was_given(
    ctl: Ctl, bus: Client, tmp_path: Path, name: str, far: dict[str, str]
) -> None:
    """Its options, output and exit status are those that it has there; ssh is told no more."""
    await bus.create(kernel=guest(tmp_path), name=name)
    told = ctl("--json", "-H", "me@far", "list", environment=far).stdout
    assert name in [vm["name"] for vm in json.loads(told)]
    command = "vmbusctl --user --json list"
    assert arguments_of_ssh(tmp_path) == ["--", "me@far", command]
    here = ctl("--json", "status", name).stdout
    assert ctl("-Hfar", "--json", "status", name, environment=far).stdout == here
    (line,) = ctl("--host=far", "start", "nobody", environment=far, code=1).stderr.splitlines()
    assert line.startswith("vmbusctl: nobody: ")
    assert "wrong usage" in ctl("-H", "far", "wait", "--help", environment=far).stdout
    ctl("-H", "far", "frobnicate", environment=far, code=2)


async def test_run_there_with_words_that_a_shell_would_take_apart(
    ctl: Ctl, tmp_path: Path, name: str, far: dict[str, str]
) -> None:
    """Files are named as that machine has them; stdin, stdout and the exit status are the VM's."""
    directory = tmp_path / 'it\'s "far"; $HOME *'
    directory.mkdir()
    kernel = guest(directory, console="hello\n", then={"exit": 34})
    arguments = ("run", "--name", name, "--kernel", str(kernel), "--params", "a -H 'b'")
    done = ctl("-H", "far", *arguments, environment=far, code=11)
    assert done.stdout == "hello\n"
    assert f"{name}: died: guest-panic (34)" in done.stderr


async def test_vmbusctl_becomes_ssh(
    service: Service, bus: Client, tmp_path: Path, name: str, far: dict[str, str]
) -> None:
    """So that nothing stands between its streams, signals and exit status and those of ssh."""
    path = await bus.create(kernel=guest(tmp_path, echo=True), name=name)
    await bus.vm(path, "Start")
    with Running(service.rig, "-H", "far", "console", name, environment=far) as console:
        console.type(b"typed\n")
        console.until(console.stdout, b"typed\n")
        assert (tmp_path / "ssh.pid").read_text() == f"{console.process.pid}\n"
        await bus.vm(path, "Kill")
        assert console.status() == 0


async def test_terminal_is_asked_for_at_a_terminal(
    service: Service, tmp_path: Path, terminal: tuple[int, int], far: dict[str, str]
) -> None:
    """So that keys and passwords are typed there as they are here."""
    arguments = ("-H", "far", "list")
    with Running(service.rig, *arguments, terminal=terminal[1], environment=far) as listing:
        assert listing.status() == 0
    assert arguments_of_ssh(tmp_path) == ["-t", "--", "far", "vmbusctl --user list"]


def test_what_ssh_says_is_not_masked(ctl: Ctl, tmp_path: Path) -> None:
    done = ctl("-H", "far", "list", environment=on_path(tmp_path, ssh=LOST), code=255)
    assert (done.stdout, done.stderr) == (
        "",
        "ssh: connect to host far port 22: No route to host\n",
    )


def test_ssh_that_is_not_there(ctl: Ctl, tmp_path: Path) -> None:
    """One line says so."""
    done = ctl("-H", "far", "list", environment={"PATH": str(tmp_path)}, code=1)
    assert done.stderr == (
        "vmbusctl: far: can't run ssh: No such file or directory (install openssh-client)\n"
    )


@pytest.mark.parametrize("host", ["", "-oProxyCommand=true"])
def test_host_that_ssh_would_take_for_an_option_is_refused(ctl: Ctl, host: str) -> None:
    (line,) = ctl("-H", host, "list", code=2).stderr.splitlines()
    assert "is not [USER@]HOST" in line


def test_names_there_are_not_completed_by_names_here(
    service: Service, tmp_path: Path, far: dict[str, str]
) -> None:
    """Nor is ssh run by a shell that completes."""
    variables = {"COMP_WORDS": "vmbusctl -H far --user status v", "COMP_CWORD": "5"}
    given = [f"{key}={value}" for key, value in {**far, **variables}.items()]
    line = ["env", *given, "_VMBUSCTL_COMPLETE=bash_complete", *VMBUSCTL]
    done = service.rig.command(*line, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert not (tmp_path / "ssh.arguments").exists()
