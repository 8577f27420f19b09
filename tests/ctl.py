"""vmbusctl as a user runs it: with pipes or at a terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig import DEADLINE, Rig

_PYTHON = (sys.executable, "-W", "error", "-c")
#: Warnings count as failures, on stderr for all to see.
VMBUSCTL = (*_PYTHON, "from vmbus.cli import main; main()")
#: The same of the user nobody, who may not be able to reach our Python before it runs.
NOBODY = 65534
OF_NOBODY = (
    *_PYTHON,
    "import os; from vmbus.cli import main; os.setgroups([]); "
    f"os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3); main()",
)
#: Signals that come closer to each other are one (vmbus.cli.common).
APART = 0.3


Done = subprocess.CompletedProcess[str]
Ctl = Callable[..., Done]


def vmbusctl(
    rig: Rig,
    *arguments: str,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
    program: tuple[str, ...] = VMBUSCTL,
    **options: Any,
) -> Done:
    """Run it to its end, with an exit status that is expected."""
    options.setdefault("stdin", subprocess.DEVNULL)
    given = [f"{name}={value}" for name, value in (environment or {}).items()]
    done = rig.command("env", *given, *program, *_bus(rig), *arguments, **options)
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def _bus(rig: Rig) -> list[str]:
    return [] if rig.system else ["--user"]


def on_path(directory: Path, **programs: str) -> dict[str, str]:
    """The PATH on which these scripts are, and what is on ours."""
    for name, text in programs.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


class Running:
    """A vmbusctl that runs until it is told to end, with pipes or with a terminal."""

    def __init__(
        self,
        rig: Rig,
        *arguments: str,
        terminal: int | None = None,
        environment: Mapping[str, str] | None = None,
        program: tuple[str, ...] = VMBUSCTL,
    ) -> None:
        ends = subprocess.PIPE if terminal is None else terminal
        self.process = subprocess.Popen(
            [*program, *_bus(rig), *arguments],
            env={**rig.environment, **(environment or {})},
            stdin=ends,
            stdout=ends,
            stderr=subprocess.PIPE,
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.heard: dict[int, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.pidfd)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    @property
    def stdout(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def stderr(self) -> int:
        assert self.process.stderr is not None
        return self.process.stderr.fileno()

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), text)

    def until(self, fd: int, wanted: bytes) -> bytes:
        """Read until something was said; gives all that was."""
        deadline = time.monotonic() + DEADLINE
        while wanted not in self.heard.setdefault(fd, b""):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([fd], [], [], left)
            assert ready, f"no {wanted!r} in {self.heard}"
            data = os.read(fd, 65536)
            assert data, f"no {wanted!r} in {self.heard}, and no more to come"
            self.heard[fd] += data
        return self.heard[fd]

    def rest(self, fd: int) -> str:
        """All that was said until the end of the stream."""
        heard = self.heard.setdefault(fd, b"")
        while data := os.read(fd, 65536):
            heard += data
        return heard.decode()

    def goes_on(self, seconds: float = APART) -> bool:
        return not select.select([self.pidfd], [], [], seconds)[0]

    def status(self) -> int:
        assert not self.goes_on(DEADLINE), f"still running; {self.heard}"
        return self.process.wait()
