"""Processes that may not be our children: found again, watched, killed and asked how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.unit.doubles import DEADLINE
from vmbus.vmm import pidfd as processes

pytestmark = pytest.mark.usefixtures("nothing_left")

#: Has a child that ends as the FIFO it is given says; reaps it when told to by a line.
_PARENT = """
import os, sys
argv = ["sh", "-c", 'read -r end <"$0"; eval "$end"', sys.argv[1]]
pid = os.posix_spawn("/bin/sh", argv, {}, setsid=True)
print(pid, flush=True)
sys.stdin.readline()
os.waitpid(pid, 0)
"""


class Stranger:
    """A process whose parent isn't us, a zombie from its end until it is `reaped`."""

    def __init__(self, directory: Path) -> None:
        self._orders = directory / "orders"
        os.mkfifo(self._orders)
        argv = [sys.executable, "-ISc", _PARENT, str(self._orders)]
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen(argv, stdin=pipe, stdout=pipe)
        assert self._parent.stdout is not None
        self.pid = int(self._parent.stdout.readline())
        self.started = processes.began(self.pid)
        found = processes.find(self.pid, self.started)
        assert found is not None
        self.pidfd = found

    def end(self, script: str) -> None:
        """Have it end so; return when it has."""
        self._orders.write_text(f"ulimit -c 0; {script}\n")
        self.ended()

    def ended(self) -> None:
        """Wait for it."""
        assert select.select([self.pidfd], [], [], DEADLINE)[0]

    def reaped(self) -> None:
        """Have its parent reap it."""
        if self._parent.poll() is None:
            self._parent.communicate(b"\n", DEADLINE)

    def status(self) -> int | None:
        return processes.status(self.pidfd, self.pid, self.started)

    def close(self) -> None:
        """Whatever there still is of it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.reaped()
        os.close(self.pidfd)


@pytest.fixture
def stranger(tmp_path: Path, nothing_left: None) -> Iterator[Stranger]:
    stranger = Stranger(tmp_path)
    yield stranger
    stranger.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A child of ours that leads a group of its own, and runs."""
    process = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def _spawn(script: str) -> tuple[int, int]:
    """A child that has ended so: its descriptor and its number."""
    argv = ["/bin/sh", "-c", f"ulimit -c 0; {script}"]
    pid = os.posix_spawn(argv[0], argv, {}, setsid=True)
    pidfd = os.pidfd_open(pid)
    assert select.select([pidfd], [], [], DEADLINE)[0]
    return pidfd, pid


# Who it is


def test_process_is_found_by_its_number_and_its_beginning(child: subprocess.Popen[bytes]) -> None:
    pidfd = processes.find(child.pid, processes.began(child.pid))
    assert pidfd is not None
    assert not os.get_inheritable(pidfd)
    assert not processes.has_ended(pidfd)
    child.kill()
    assert select.select([pidfd], [], [], DEADLINE)[0]
    assert processes.has_ended(pidfd)
    child.wait()
    assert processes.has_ended(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize("difference", [-1, 1])
def test_process_that_began_at_another_time_is_another(
    child: subprocess.Popen[bytes], difference: int
) -> None:
    assert processes.find(child.pid, processes.began(child.pid) + difference) is None


def test_process_that_is_gone_is_not_found() -> None:
    pidfd, pid = _spawn("exit 0")
    started = processes.began(pid)
    os.waitpid(pid, 0)
    assert processes.find(pid, started) is None
    with pytest.raises(OSError, match=r"."):
        processes.began(pid)
    os.close(pidfd)


def test_process_that_has_ended_and_is_not_reaped_is_found() -> None:
    """So that its status can be learnt."""
    ended, pid = _spawn("exit 5")
    pidfd = processes.find(pid, processes.began(pid))
    assert pidfd is not None
    assert processes.has_ended(pidfd)
    assert processes.status(pidfd, pid, processes.began(pid)) == 5
    os.close(pidfd)
    os.close(ended)


@pytest.mark.parametrize("name", ["a) Z 1 (b", ") ) )", "(((", "x\ny"])
def test_name_of_a_program_does_not_matter(tmp_path: Path, name: str) -> None:
    """It stands in the middle of what the kernel tells, in parentheses, as it is."""
    (tmp_path / name).symlink_to("/bin/sleep")
    with subprocess.Popen([tmp_path / name, "1000"]) as named:
        with subprocess.Popen(["/bin/sleep", "1000"]) as plain:
            began = [processes.began(each.pid) for each in (named, plain)]
            plain.kill()
        named.kill()
    assert 0 <= began[1] - began[0] < DEADLINE * os.sysconf("SC_CLK_TCK")


# How it ended


#: Whether the kernel tells the status of a process that is reaped.
KEPT = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 15)
ENDS = pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 255", 255),
        ("kill -KILL $$", -signal.SIGKILL),
        ("kill -TERM $$", -signal.SIGTERM),
        ("kill -SEGV $$", -signal.SIGSEGV),
        ("kill -RTMAX $$", -signal.SIGRTMAX),
    ],
)


@ENDS
def test_status_of_a_child_and_that_it_is_reaped(script: str, status: int) -> None:
    pidfd, pid = _spawn(script)
    assert processes.status(pidfd, pid, processes.began(pid)) == status
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    os.close(pidfd)


@ENDS
def test_status_of_another_ones_child(stranger: Stranger, script: str, status: int) -> None:
    """Before its parent reaps it; and where the kernel keeps it, also afterwards."""
    stranger.end(script)
    assert stranger.status() == status
    stranger.reaped()
    assert stranger.status() == (status if KEPT else None)


@ENDS
def test_status_of_a_zombie_where_the_kernel_tells_it_of_zombies_only(
    stranger: Stranger, script: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is before Linux 6.15."""
    monkeypatch.setattr(processes, "_told_by_pidfd", lambda *_: None)
    stranger.end(script)
    assert stranger.status() == status
    stranger.reaped()
    assert stranger.status() is None


def test_status_of_a_process_that_is_reaped_between_two_looks(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel does not tell it before, and the zombie does not afterwards."""
    stranger.end("exit 7")
    really_look = processes._told_by_zombie

    def reaped_before(pidfd: int, pid: int, started: int) -> int | None:
        stranger.reaped()
        return really_look(pidfd, pid, started)

    monkeypatch.setattr(processes, "_told_by_zombie", reaped_before)
    assert stranger.status() == (7 if KEPT else None)


def test_status_is_not_that_of_another_with_the_same_number(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_told_by_pidfd", lambda *_: None)
    stranger.end("exit 7")
    assert processes.status(stranger.pidfd, stranger.pid, stranger.started + 1) is None


def test_status_that_nobody_knows_any_more_is_none() -> None:
    """A child of ours that something else has reaped, on a kernel that does not keep it."""
    pidfd, pid = _spawn("exit 5")
    started = processes.began(pid)
    os.waitpid(pid, 0)
    with pytest.MonkeyPatch.context() as older:
        older.setattr(processes, "_PIDFD_GET_INFO", 0)
        assert processes.status(pidfd, pid, started) is None
    assert processes.status(pidfd, pid, started) == (5 if KEPT else None)
    os.close(pidfd)


def test_process_that_runs_has_no_status(stranger: Stranger) -> None:
    assert not processes.has_ended(stranger.pidfd)
    assert stranger.status() is None


# Killing


@pytest.fixture(params=["by its descriptor", "by its number"])
def old_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as it is since Linux 6.9 and as it was before."""
    if request.param == "by its number":
        monkeypatch.setattr(processes, "_PIDFD_SIGNAL_PROCESS_GROUP", 1 << 30)


_GROUP = (
    "setsid sh -c 'exec 1>&-; echo $$ >&2; exec sleep 1000' & read -r go; "
    "exec 2>&-; sleep 1000 & (sleep 1000 & sleep 1000) & "
)


def _gone(pipe: IO[bytes]) -> bool:
    """Whether all who hold the other end are gone, in time."""
    assert select.select([pipe], [], [], DEADLINE)[0]
    return os.read(pipe.fileno(), 100) == b""


@pytest.mark.usefixtures("old_kernel")
@pytest.mark.parametrize("end", ["exec sleep 1000", "exit 3"])
def test_group_is_killed_with_and_without_its_leader_and_nobody_else(end: str) -> None:
    """Those in the group hold one pipe, and a child in a session of its own the other."""
    argv = ["/bin/sh", "-c", _GROUP + end]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    ) as leader:
        assert leader.stdin is not None
        assert leader.stdout is not None
        assert leader.stderr is not None
        pidfd, started = os.pidfd_open(leader.pid), processes.began(leader.pid)
        outside = int(leader.stderr.readline())
        leader.stdin.write(b"go\n")
        leader.stdin.flush()
        if end == "exit 3":
            assert select.select([pidfd], [], [], DEADLINE)[0]
        processes.kill_group(pidfd, leader.pid)
        assert _gone(leader.stdout)
        status = 3 if end == "exit 3" else -signal.SIGKILL
        assert processes.status(pidfd, leader.pid, started) == status
        assert not select.select([leader.stderr], [], [], 0)[0]
        os.kill(outside, signal.SIGKILL)
        assert _gone(leader.stderr)
        os.close(pidfd)


@pytest.mark.usefixtures("old_kernel")
def test_killing_what_is_gone_is_nothing(child: subprocess.Popen[bytes]) -> None:
    """Not even where its number is another's by now."""
    pidfd, pid = _spawn("exit 0")
    os.waitpid(pid, 0)
    processes.kill_group(pidfd, pid)
    assert child.poll() is None
    os.close(pidfd)


@pytest.mark.usefixtures("old_kernel")
def test_stranger_is_killed(stranger: Stranger) -> None:
    processes.kill_group(stranger.pidfd, stranger.pid)
    stranger.ended()
    assert stranger.status() == -signal.SIGKILL


async def test_descriptor_of_a_stranger_wakes_the_event_loop(stranger: Stranger) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(stranger.pidfd, ended.set)
    stranger.end("exit 0")
    async with asyncio.timeout(DEADLINE):
        await ended.wait()
    loop.remove_reader(stranger.pidfd)
