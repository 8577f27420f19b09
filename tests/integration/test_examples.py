"""The examples work."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.rig import (
    DEADLINE,
    ROOT,
    VM,
    Client,
    Rig,
    Service,
    client,
    end_group,
    guest,
    plain,
    until_reaped,
)
from tests.vmbusmock import MOCK, control, data_directory, mock

EXAMPLES = ROOT / "examples"
NOTIFICATIONS = "org.freedesktop.Notifications"


@contextlib.contextmanager
def _runs(rig: Rig, *argv: str | Path) -> Iterator[IO[str]]:
    """A program that runs meanwhile; gives what it prints."""
    process = subprocess.Popen(
        argv,
        env=_environment(rig),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        end_group(process)
        process.stdout.close()


def _environment(rig: Rig) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    path = os.environ["PATH"]
    return {**rig.environment, "PATH": f"{scripts}:{path}", "PYTHONPATH": str(ROOT)}


async def _life(bus: Client, directory: Path, status: int, name: str) -> str:
    """A VM that ends by itself, with that status."""
    path = await bus.create(kernel=guest(directory, then={"exit": status}), name=name)
    await bus.vm(path, "Start")
    await bus.vm(path, "Wait")
    return path


async def test_the_notifier_tells_of_unexpected_deaths(
    rig: Rig, service: Service, bus: Client, tmp_path: Path
) -> None:
    """A panic is shown, with the VM's name and no markup in the words; a shutdown isn't."""
    desktop = [sys.executable, "-m", "dbusmock", "--session", "--template", "notification_daemon"]
    with _runs(rig, *desktop):
        rig.gdbus("wait", "--timeout", f"{DEADLINE:.0f}", NOTIFICATIONS)
        with _runs(rig, sys.executable, EXAMPLES / "notifier.py", "--user") as said:
            assert said.readline() == "listening\n"
            async with client(rig) as screen:
                await screen.listen(f"type='signal',interface='{MOCK}'")
                await _life(bus, tmp_path, 0, "quiet")
                await _life(bus, tmp_path, 34, "loud")
                shown = plain((await screen.until(lambda m: m.member == "MethodCalled")).body)
    member, arguments = shown
    assert member == "Notify"
    assert arguments[3] == "loud: guest-panic"
    assert arguments[4] == "exiting with guest panic"


async def test_the_shell_listener_runs_its_command(
    rig: Rig, service: Service, bus: Client, tmp_path: Path
) -> None:
    """With the object, the reason and the status; a command that fails is not its end."""
    command = ["--session", "sh", "-c", 'echo "$@"; exit 1', "sh"]
    with _runs(rig, EXAMPLES / "on-death.sh", *command) as said:
        assert said.readline() == "on-death: listening\n"
        first = await _life(bus, tmp_path, 32, "first")
        second = await _life(bus, tmp_path, 34, "second")
        for line in (f"{first} reboot 32", f"{second} guest-panic 34"):
            assert said.readline() == f"{line}\n"
            assert said.readline() == "on-death: sh failed with status 1\n"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The listener in C, built as its first comment says, without a warning."""
    program = tmp_path_factory.mktemp("compiled") / "on-death"
    flags = "$(pkg-config --cflags --libs libsystemd)"
    command = f"cc -O2 -Wall -Wextra -Werror {EXAMPLES}/on-death.c -o {program} {flags}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return program


def _next(said: IO[str], count: int) -> list[str]:
    return [said.readline().rstrip("\n") for _ in range(count)]


async def test_the_listener_in_c_goes_on_over_a_restart(
    mortal: Service, listener: Client, tmp_path: Path, compiled: Path
) -> None:
    """It tells states and deaths, runs its program, and hears of a death that it missed."""
    with _runs(mortal.rig, compiled, "--user", "echo") as said:
        assert _next(said, 1) == ["listening"]
        path = await listener.run(guest(tmp_path))
        assert _next(said, 2) == [f"{path} is starting", f"{path} is running"]
        ((pid, _),) = mortal.traces()
        mortal.crash()
        os.kill(pid, signal.SIGKILL)
        until_reaped(pid)
        mortal.start()
        assert _next(said, 2) == ["the service is gone", "the service is here"]
        told = _next(said, 3)
        assert told == [f"{path} is dead", f"{path} died: unknown 0", f"{path} unknown 0"]
        lie = ("--object-path", path, "--signal", f"{VM}.Died", "uint32 5", "'crash'", "1")
        (names,) = await listener.connection.call_bus("ListNames", "", [])
        for name in (each for each in names if each.startswith(":")):
            assert mortal.rig.gdbus("emit", "--dest", name, *lie) == ""
        path = await listener.run(guest(tmp_path, then={"exit": 34}))
        lives = [f"{path} is {state}" for state in ("starting", "running", "dead")]
        ends = [f"{path} died: guest-panic 34", f"{path} guest-panic 34"]
        assert _next(said, 5) == [*lives, *ends]
        mortal.rig.kill_bus()
        assert "on-death: Connection reset by peer\n" in said.read()


async def test_the_listener_in_c_is_tested_against_the_mock(
    own_rig: Rig, tmp_path: Path, compiled: Path
) -> None:
    """The mock comes while it listens, and is as good as the service."""
    with _runs(own_rig, compiled, "--user", "/nonexistent") as said:
        assert _next(said, 1) == ["listening"]
        with mock(own_rig):
            assert _next(said, 1) == ["the service is here"]
            async with client(own_rig) as bus:
                path = await bus.run(guest(tmp_path))
                await control(bus, "Die", "osi", path, "watchdog", 36)
            lives = [f"{path} is {state}" for state in ("starting", "running", "dead")]
            assert _next(said, 4) == [*lives, f"{path} died: watchdog 36"]
            assert _next(said, 1) == ["on-death: /nonexistent failed"]
        assert _next(said, 1) == ["the service is gone"]


async def test_a_tool_is_tested_against_the_mock(rig: Rig, tmp_path: Path) -> None:
    """The example's own tests pass where the template is installed."""
    done = _pytest(rig, EXAMPLES / "test_supervise.py", tmp_path)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def _pytest(rig: Rig, file: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run tests as anybody would, without this project's settings."""
    settings = directory / "pytest.ini"
    # The loop's scope is what newer versions of pytest-asyncio take unasked.
    lines = ["[pytest]", "filterwarnings = error", "asyncio_default_fixture_loop_scope = function"]
    settings.write_text("\n".join(lines))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", settings, file],
        env={
            **_environment(rig),
            "XDG_DATA_DIRS": str(data_directory(directory / "share")),
            "PYTHONPATH": f"{ROOT}:{file.parent}",
        },
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE,
        check=False,
    )
