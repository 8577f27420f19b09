"""One VMM process: spawned, watched through a pidfd, ended, and its last words kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

#: How much of a VMM's stderr is kept, in bytes: its end.
_TAIL = 8 * 1024
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
#: Python ignores these, and what is ignored stays so in a child.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


class Process:
    """A VMM in a session of its own. `exited` is resolved with its status, once, when it ended.

    A status is an exit code, or minus the signal that ended it.
    """

    def __init__(self, pid: int, stderr: int) -> None:
        self._loop = asyncio.get_running_loop()
        # Good only until `exited`: the kernel gives the number to others after that.
        self.pid = pid
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._stderr = stderr
        self._tail = b""
        self._pidfd = os.pidfd_open(pid)
        os.set_blocking(stderr, False)
        self._loop.add_reader(stderr, self._read_stderr)
        self._loop.add_reader(self._pidfd, self._reap)

    @classmethod
    def spawn(cls, argv: Sequence[str], fds: Sequence[int]) -> Process:
        """Run `argv` with `fds` kept open under their own numbers. Raises OSError.

        Its stdin and stdout are /dev/null; it leads a session and a process group of its own.
        """
        reader, writer = os.pipe()
        try:
            actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, writer, 2),
            ]
            # dup2 onto itself is how posix_spawn takes close-on-exec off.
            actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds]
            pid = os.posix_spawnp(
                argv[0],
                list(argv),
                _ENVIRONMENT,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=_DEFAULT_SIGNALS,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            return cls(pid, reader)
        except OSError:
            # Out of descriptors, most likely; a VMM that can't be watched must not run.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            raise

    def kill(self) -> bool:
        """SIGKILL to the process and all that share its group. False if it had ended already."""
        if self.exited.done() or self._has_ended():
            return False
        self._kill_group()
        return True

    def _has_ended(self) -> bool:
        peek = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PIDFD, self._pidfd, peek) is not None

    def stderr_tail(self) -> str:
        """The end of what it printed on stderr, whatever that was, as text without controls."""
        text = self._tail.decode("utf-8", "replace")
        return "".join(c if c.isprintable() or c == "\n" else " " for c in text)

    def _kill_group(self) -> None:
        # The leader isn't reaped yet, so neither its pid nor its group can be anybody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

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
        if self._stderr >= 0:
            self._loop.remove_reader(self._stderr)
            os.close(self._stderr)
            self._stderr = -1

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._kill_group()
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        assert result is not None
        exited = result.si_code == os.CLD_EXITED
        status = result.si_status if exited else -result.si_status
        os.close(self._pidfd)
        # What is in the pipe by now is all there is; a child that still holds it may never close.
        for _ in range(16):
            if self._stderr < 0 or not self._read_stderr():
                break
        self._close_stderr()
        self.exited.set_result(status)
