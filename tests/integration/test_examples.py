"""The examples work, and so does all that the guide for clients shows."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.rig import DEADLINE, ROOT, Client, Rig, Service, client, guest, plain
from tests.vmbusmock import MOCK, data_directory

EXAMPLES = ROOT / "examples"
GUIDE = ROOT / "docs" / "clients.md"
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
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
    with _runs(rig, EXAMPLES / "on-death", *command) as said:
        assert said.readline() == "on-death: listening\n"
        first = await _life(bus, tmp_path, 32, "first")
        second = await _life(bus, tmp_path, 34, "second")
        for line in (f"{first} reboot 32", f"{second} guest-panic 34"):
            assert said.readline() == f"{line}\n"
            assert said.readline() == "on-death: sh failed with status 1\n"


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


# The guide


def _blocks(language: str) -> list[str]:
    """The code in the guide, in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", _guide(), re.DOTALL | re.MULTILINE)


def _guide() -> str:
    """All but its first section, which is a newcomer's."""
    return GUIDE.read_text().partition("## From Python")[2]


TESTS = [block for block in _blocks("python") if "\ndef test_" in block.replace("async ", "")]
PROGRAMS = [block for block in _blocks("python") if block not in TESTS]


def test_every_block_of_the_guide_is_run() -> None:
    """There is none in a language that no test runs."""
    fences = re.findall(r"^```(.+)$", _guide(), re.MULTILINE)
    assert len(fences) == len(PROGRAMS) + len(TESTS) + len(_blocks("sh"))
    assert PROGRAMS and TESTS and _blocks("sh")


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_of_the_guide(rig: Rig, service: Service, tmp_path: Path, number: int) -> None:
    """Each does what it says with the real service, in a directory that has a kernel."""
    guest(tmp_path, then={"exit": 0, "after": 0.2}).rename(tmp_path / "vmlinuz")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAMS[number]],
        env=_environment(rig),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    wanted = ("shutdown 0", "mortal shutdown", "is running", "there is none")[number]
    assert wanted in done.stdout


def test_commands_of_the_guide(tmp_path: Path) -> None:
    """They run one after the other, on a bus of their own, and the last tells of the death."""
    bus = Rig(system=False)
    process = subprocess.Popen(
        ["sh", "-ec", "\n".join([*_blocks("sh"), "echo done"])],
        env={**_environment(bus), "XDG_DATA_DIRS": str(data_directory(tmp_path / "share"))},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        lines = list(iter(process.stdout.readline, "done\n"))
        assert process.wait(DEADLINE) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.stdout.close()
        bus.close()
    assert lines[-1] == "('guest-panic', 34)\n"


def test_tests_of_the_guide(rig: Rig, tmp_path: Path) -> None:
    """They pass where the template is installed."""
    (tmp_path / "test_guide.py").write_text("\n".join(TESTS))
    done = _pytest(rig, tmp_path / "test_guide.py", tmp_path)
    assert f"{len(TESTS)} passed" in done.stdout, done.stdout + done.stderr
