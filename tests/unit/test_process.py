"""One VMM process: how it is started, what it inherits, how its end is learnt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmbus.vmm.process import Process

pytestmark = pytest.mark.usefixtures("nothing_left")

DEADLINE = 20.0
TAIL = 8 * 1024


def _sh(script: str, *arguments: str, fds: Sequence[int] = ()) -> Process:
    return _run(["/bin/sh", "-c", script, "sh", *arguments], fds)


def _run(argv: Sequence[str], fds: Sequence[int] = ()) -> Process:
    process = Process.spawn(argv, fds)
    process.release()
    return process


async def _ended(process: Process) -> int | None:
    async with asyncio.timeout(DEADLINE):
        return await process.exited


def _read(fd: int) -> bytes:
    """What comes through a pipe next; nothing when its last writer is gone."""
    ready, _, _ = select.select([fd], [], [], DEADLINE)
    assert ready
    return os.read(fd, 1000)


# Ending


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 255", 255),
        ("exec true", 0),
        ("kill -KILL $$", -signal.SIGKILL),
        ("kill -TERM $$", -signal.SIGTERM),
        ("ulimit -c 0; kill -SEGV $$", -signal.SIGSEGV),
        ("ulimit -c 0; kill -ABRT $$", -signal.SIGABRT),
        ("kill -RTMAX $$", -signal.SIGRTMAX),
    ],
)
async def test_status_is_the_exit_code_or_minus_the_signal(script: str, status: int) -> None:
    assert await _ended(_sh(script)) == status


async def test_kill_ends_it_by_sigkill() -> None:
    process = _sh("exec sleep 1000")
    assert process.kill()
    assert await _ended(process) == -signal.SIGKILL


async def test_kill_of_what_has_ended_says_so() -> None:
    process = _sh("exit 3")
    assert await _ended(process) == 3
    assert not process.kill()


async def test_kill_of_what_has_ended_unnoticed_says_so() -> None:
    """It is a zombie, whose end the event loop has not been told of yet."""
    process = _sh("exit 3")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not process.kill()
    assert await _ended(process) == 3


async def test_second_kill_does_no_harm() -> None:
    process = _sh("exec sleep 1000")
    process.kill()
    process.kill()
    assert await _ended(process) == -signal.SIGKILL


@pytest.mark.parametrize("how", ["exit 0", "kill -KILL $$", "kill"])
async def test_whole_group_ends_with_its_leader(how: str) -> None:
    """Every member holds the pipe, so its end says that all of them are gone."""
    reader, writer = os.pipe()
    end = "exec sleep 1000" if how == "kill" else how
    process = _sh(f"trap '' TERM HUP; sleep 1000 & (sleep 1000 & sleep 1000) & {end}", fds=[writer])
    os.close(writer)
    if how == "kill":
        process.kill()
    await _ended(process)
    assert _read(reader) == b""
    os.close(reader)


async def test_stopped_process_can_be_killed() -> None:
    process = _sh("kill -STOP $$")
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert process.kill()
    assert await _ended(process) == -signal.SIGKILL


# Last words


@pytest.mark.parametrize(
    ("script", "tail"),
    [
        ("exit 1", ""),
        ("echo out; echo error >&2", "error\n"),
        ("printf 'no newline' >&2", "no newline"),
        ("printf 'a\\033[31mb\\tc\\rd\\000e\\n' >&2", "a [31mb c d e\n"),
        ("printf 'ok \\377\\n' >&2", "ok \N{REPLACEMENT CHARACTER}\n"),
    ],
)
async def test_stderr_is_kept_as_plain_text(script: str, tail: str) -> None:
    process = _sh(script)
    await _ended(process)
    assert process.stderr_tail() == tail


async def test_flood_on_stderr_is_read_to_its_end_and_its_end_kept() -> None:
    process = _sh("head -c 4000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 5")
    assert await _ended(process) == 5
    tail = process.stderr_tail()
    assert (len(tail), tail[-9:]) == (TAIL, "xthe end\n")
    assert set(tail[:-8]) == {"x"}


async def test_endless_flood_on_stderr_does_not_delay_the_end() -> None:
    """From a process that is in a session of its own, and so outlives the VMM."""
    reader, writer = os.pipe()
    script = (
        'setsid sh -c \'echo $$ >"$1"; exec yes >&2\' sh "$1" & read -r pid <"$2"; '
        'echo "$pid" >"$1"; exit 6'
    )
    paths = [f"/proc/self/fd/{fd}" for fd in (writer, reader)]
    process = _sh(script, *paths, fds=[reader, writer])
    assert await _ended(process) == 6
    assert set(process.stderr_tail()) <= {"y", "\n"}
    os.kill(int(os.read(reader, 100)), signal.SIGKILL)
    os.close(writer)
    assert _read(reader) == b""
    os.close(reader)


async def test_child_that_holds_stderr_open_does_not_delay_the_end() -> None:
    reader, writer = os.pipe()
    process = _sh("setsid sleep 1000 & echo $! >&2; exit 7", fds=[writer])
    os.close(writer)
    assert await _ended(process) == 7
    os.kill(int(process.stderr_tail()), signal.SIGKILL)
    assert _read(reader) == b""
    os.close(reader)


async def test_process_that_closes_stderr_goes_on() -> None:
    orders, order = os.pipe()
    news, tell = os.pipe()
    script = 'exec 2>&-; echo closed >"$2"; read -r line <"$1"; exit 8'
    process = _sh(script, f"/proc/self/fd/{orders}", f"/proc/self/fd/{tell}", fds=[orders, tell])
    assert await asyncio.to_thread(_read, news) == b"closed\n"
    assert not process.exited.done()
    os.write(order, b"go\n")
    assert await _ended(process) == 8
    for fd in (orders, order, news, tell):
        os.close(fd)


# What it is born with


async def test_it_leads_a_session_and_a_group_of_its_own() -> None:
    process = _sh("exec sleep 1000")
    assert (os.getsid(process.pid), os.getpgid(process.pid)) == (process.pid, process.pid)
    process.kill()
    await _ended(process)


@pytest.fixture
def left_open() -> set[int]:
    """What whoever runs the tests left open for every program to inherit; vmbusd closes such."""
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if fd > 2 and os.get_inheritable(fd):
                found.add(fd)
    return found


_LIST = """
import os
for fd in map(int, os.listdir("/proc/self/fd")):
    try:
        os.write(2, f"{fd} {os.readlink(f'/proc/self/fd/{fd}').partition(':')[0]}\\n".encode())
    except FileNotFoundError:
        pass  # what listdir itself had open
"""


async def test_it_inherits_the_chosen_descriptors_and_no_others(
    left_open: set[int],
) -> None:
    with open("/dev/zero") as chosen, open("/dev/zero"):
        process = _run([sys.executable, "-ISc", _LIST], [chosen.fileno()])
        await _ended(process)
        lines = [line.split() for line in process.stderr_tail().splitlines()]
        assert {int(fd): what for fd, what in lines if int(fd) not in left_open} == {
            0: "/dev/null",
            1: "/dev/null",
            2: "pipe",
            chosen.fileno(): "/dev/zero",
        }
        assert not os.get_inheritable(chosen.fileno())


async def test_descriptors_keep_their_numbers() -> None:
    reader, writer = os.pipe()
    process = _sh(
        f'echo hello >"$1"; test ! -e /proc/self/fd/{reader}',
        f"/proc/self/fd/{writer}",
        fds=[writer],
    )
    os.close(writer)
    assert await _ended(process) == 0
    assert _read(reader) == b"hello\n"
    os.close(reader)


async def test_its_environment_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD_NOT", "secret")
    process = _run(["/bin/sh", "-c", "env >&2"])
    await _ended(process)
    names = {line.partition("=")[0] for line in process.stderr_tail().splitlines()}
    assert names <= {"PATH", "LANG", "PWD", "_", "SHLVL", "OLDPWD"}


@pytest.mark.parametrize("number", [signal.SIGPIPE, signal.SIGXFSZ], ids=lambda s: s.name)
async def test_signals_that_python_ignores_work_again(number: signal.Signals) -> None:
    assert signal.getsignal(number) is signal.SIG_IGN
    status = await _ended(_sh(f"ulimit -c 0; kill -{number.value} $$; exit 9"))
    assert status == -number


async def test_signals_that_we_block_are_not_blocked_in_it() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        process = _sh("kill -USR1 $$; exit 9")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert await _ended(process) == -signal.SIGUSR1


# At the gate, and from one of us to the next


async def test_it_does_not_run_before_it_is_released(tmp_path: Path) -> None:
    """It is the same process that waits and that runs."""
    ran = tmp_path / "ran"
    process = Process.spawn(["/bin/sh", "-c", f"echo $$ >{ran}; exit 3"], ())
    # What it waits for is in its way to any end of its own.
    assert not await _blocks(process)
    assert not ran.exists()
    process.release()
    process.release()
    assert await _ended(process) == 3
    assert int(ran.read_text()) == process.pid


async def _blocks(process: Process) -> bool:
    """Whether it ends by itself in a while in which any that runs would have."""
    control = _run(["/bin/sh", "-c", "exit 0"])
    await _ended(control)
    return process.has_ended()


async def test_it_is_killed_at_the_gate(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    process = Process.spawn(["/usr/bin/touch", str(ran)], ())
    assert process.kill()
    process.release()
    assert await _ended(process) == -signal.SIGKILL
    assert not ran.exists()


async def test_it_never_runs_where_who_spawned_it_lets_go_before(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    process = Process.spawn(["/usr/bin/touch", str(ran)], ())
    process.let_go()
    _, status = os.waitpid(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) > 0
    assert not ran.exists()


_SPAWNER = """
import asyncio, os, signal, sys
from vmbus.vmm.process import Process

async def main():
    process = Process.spawn(["/usr/bin/touch", sys.argv[1]], [int(sys.argv[2])])
    os.write(1, b"%d\\n" % process.pid)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_it_never_runs_where_who_spawned_it_dies_before(tmp_path: Path) -> None:
    """And it ends, too: a pipe that only it still holds comes to its end."""
    ran = tmp_path / "ran"
    reader, writer = os.pipe()
    spawner = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", _SPAWNER, str(ran), str(writer)],
        pass_fds=[writer],
        stdout=subprocess.PIPE,
    )
    os.close(writer)
    said, _ = await asyncio.wait_for(spawner.communicate(), DEADLINE)
    assert int(said) > 0
    assert spawner.returncode == -signal.SIGKILL
    assert await asyncio.to_thread(_read, reader) == b""
    os.close(reader)
    assert not ran.exists()


async def test_it_runs_on_when_it_is_let_go_and_is_found_again(tmp_path: Path) -> None:
    """What it says goes into a FIFO, which outlives who reads it."""
    stderr = tmp_path / "stderr"
    orders, order = os.pipe()
    script = 'echo one >&2; read -r line <"$0"; echo two >&2; exit 5'
    argv = ["/bin/sh", "-c", script, f"/proc/self/fd/{orders}"]
    first = Process.spawn(argv, [orders], stderr)
    os.close(orders)
    first.release()
    first.let_go()
    second = Process.find(first.pid, first.started, stderr)
    assert second is not None
    assert (second.pid, second.started) == (first.pid, first.started)
    os.write(order, b"go\n")
    os.close(order)
    assert await _ended(second) == 5
    assert second.stderr_tail() == "one\ntwo\n"
    assert Process.find(first.pid, first.started, stderr) is None


async def test_flood_on_stderr_that_nobody_reads_does_not_hold_it_up(tmp_path: Path) -> None:
    """What the FIFO does not hold is lost."""
    stderr = tmp_path / "stderr"
    script = "head -c 4000000 /dev/zero >&2; exit 6"
    process = Process.spawn(["/bin/sh", "-c", script], (), stderr)
    process.release()
    process.let_go()
    _, status = await asyncio.to_thread(os.waitpid, process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 6


async def test_process_of_another_that_has_no_fifo_any_more_is_found(tmp_path: Path) -> None:
    first = _sh("exec sleep 1000")
    first.let_go()
    second = Process.find(first.pid, first.started, tmp_path / "none")
    assert second is not None
    assert second.kill()
    assert (await _ended(second), second.stderr_tail()) == (-signal.SIGKILL, "")


async def test_process_is_taken_up_by_a_descriptor_that_was_kept(tmp_path: Path) -> None:
    """Also where it has ended, and its number says nothing any more."""
    first = _sh("exit 7")
    kept = os.dup(first.pidfd)
    first.let_go()
    second = Process.find(first.pid, first.started, tmp_path / "none", kept)
    assert second is not None
    assert await _ended(second) == 7


# Not being born; `nothing_left` looks for what that leaves behind


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("/none/crosvm", FileNotFoundError),
        ("no-such-program-anywhere", FileNotFoundError),
        ("/etc/passwd", PermissionError),
        ("/", PermissionError),
    ],
)
async def test_program_that_cannot_be_executed(program: str, error: type[OSError]) -> None:
    with pytest.raises(error):
        Process.spawn([program], ())


async def test_descriptor_that_is_not_open() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        _sh("exit 0", fds=[1 << 20])


async def test_process_that_cannot_be_watched_is_not_left_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_pidfd(pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_pidfd)
    with pytest.raises(OSError, match="Too many open files"):
        _sh("exec sleep 1000")
