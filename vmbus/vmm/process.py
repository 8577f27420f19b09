"""One VMM process: spawned or found again, watched through a pidfd, and its last words kept."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from . import pidfd as processes
from .readers import readers

#: How much of a VMM's stderr is kept, in bytes: its end.
_TAIL = 8 * 1024
#: Seconds between two reads of what it prints.
_PAUSE = 0.01
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
#: Python ignores these, and what is ignored stays so in a child.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)
# Becomes the program when it is told to; ends when whoever would tell it does.
_GATE = ("/bin/sh", "-c", 'read -r _ && exec "$@" </dev/null', "vmbus-gate")


class Process:
    """A program in a session of its own. `exited` is resolved with its status, once, when it ended.

    A status is an exit code, or minus the signal that ended it; None where nobody knows.
    """

    def __init__(self, pid: int, started: int, pidfd: int, stderr: int, gate: int = -1) -> None:
        # Good only until `exited`: the kernel gives the number to others after that.
        self.pid = pid
        #: When it began, in clock ticks since boot.
        self.started = started
        self.pidfd = pidfd
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._stderr = stderr
        self._gate = gate
        self._tail = b""
        self._readers = readers()
        self._pause: asyncio.TimerHandle | None = None
        try:
            self._readers.add(pidfd, self._reap)
            if stderr >= 0:
                self._readers.add(stderr, self._on_stderr)
        except OSError:
            self._readers.remove(pidfd)
            raise

    @classmethod
    def spawn(cls, argv: Sequence[str], fds: Sequence[int], stderr: Path | None = None) -> Process:
        """Make ready to run `argv` with `fds` kept open under their own numbers. Raises OSError.

        It runs when `release` is called, in the process that is there by now, and never if we end
        before. Its stdin and stdout are /dev/null; it leads a session and a process group of its
        own. stderr: the FIFO to be made for it, which outlives us.
        """
        program = shutil.which(argv[0])
        if program is None:
            # The shell would say it, too, but not as an error of ours.
            missing = errno.EACCES if os.path.exists(argv[0]) else errno.ENOENT
            raise OSError(missing, os.strerror(missing), argv[0])
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            reader, writer = os.pipe() if stderr is None else _make_fifo(stderr)
            ours.callback(os.close, reader)
            theirs.callback(os.close, writer)
            os.set_blocking(reader, False)
            go, gate = os.pipe()
            ours.callback(os.close, gate)
            theirs.callback(os.close, go)
            actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
                (os.POSIX_SPAWN_DUP2, go, 0),
                (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, writer, 2),
            ]
            # dup2 onto itself is how posix_spawn takes close-on-exec off.
            actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds]
            pid = os.posix_spawn(
                _GATE[0],
                [*_GATE, program, *argv[1:]],
                _ENVIRONMENT,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=_DEFAULT_SIGNALS,
            )
            try:
                pidfd = os.pidfd_open(pid)
                ours.callback(os.close, pidfd)
                process = cls(pid, processes.began(pid), pidfd, reader, gate)
            except OSError:
                # Out of descriptors, most likely; a VMM that can't be watched must not run.
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            ours.pop_all()
            return process

    @classmethod
    def find(cls, pid: int, started: int, stderr: Path, pidfd: int | None = None) -> Process | None:
        """Take up a process that another of us spawned; None if it ended and left no trace.

        pidfd: a descriptor of it, which is ours from now on, where one was kept.
        """
        if pidfd is None:
            pidfd = processes.find(pid, started)
        if pidfd is None:
            return None
        reader = -1
        with contextlib.suppress(OSError):
            reader = os.open(stderr, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(pid, started, pidfd, reader)

    def release(self) -> None:
        """Let it run."""
        if self._gate >= 0:
            with contextlib.suppress(BrokenPipeError):  # it was killed before
                os.write(self._gate, b"\n")
            self._close_gate()

    def kill(self) -> bool:
        """SIGKILL to the process and all that share its group. False if it had ended already."""
        if self.has_ended():
            return False
        processes.kill_group(self.pidfd, self.pid)
        return True

    def has_ended(self) -> bool:
        """Whether it has, told or not."""
        return self.exited.done() or processes.has_ended(self.pidfd)

    def stderr_tail(self) -> str:
        """The end of what it printed on stderr, whatever that was, as text without controls."""
        text = self._tail.decode("utf-8", "replace")
        return "".join(c if c.isprintable() or c == "\n" else " " for c in text)

    def let_go(self) -> None:
        """Watch it no more; it goes on, unless it waits to be released."""
        if not self.exited.done():
            self.exited.cancel()
            self._readers.remove(self.pidfd)
            os.close(self.pidfd)
            self._close_stderr()
            self._close_gate()

    def _on_stderr(self) -> None:
        """Read some, then let some gather: a VMM that prints without end costs little, too."""
        if self._read_stderr():
            self._readers.remove(self._stderr)
            self._pause = asyncio.get_running_loop().call_later(_PAUSE, self._listen)

    def _listen(self) -> None:
        self._pause = None
        self._readers.add(self._stderr, self._on_stderr)

    def _read_stderr(self) -> bool:
        try:
            data = os.read(self._stderr, 64 * 1024)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close_stderr()
            return False
        self._tail = (self._tail + data)[-_TAIL:]
        return True

    def _close_stderr(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._stderr >= 0:
            self._readers.remove(self._stderr)
            os.close(self._stderr)
            self._stderr = -1

    def _close_gate(self) -> None:
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1

    def _reap(self) -> None:
        self._readers.remove(self.pidfd)
        processes.kill_group(self.pidfd, self.pid)
        status = processes.status(self.pidfd, self.pid, self.started)
        os.close(self.pidfd)
        # What is in the pipe by now is all there is; a child that still holds it may never close.
        for _ in range(16):
            if self._stderr < 0 or not self._read_stderr():
                break
        self._close_stderr()
        self._close_gate()
        self.exited.set_result(status)


def _make_fifo(path: Path) -> tuple[int, int]:
    """A FIFO's ends: ours, and one for a program that goes on when we end.

    Open for reading too, it always has a reader; and what nobody reads is lost, not waited for.
    """
    os.mkfifo(path, 0o600)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return reader, os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except BaseException:
        os.close(reader)
        raise
