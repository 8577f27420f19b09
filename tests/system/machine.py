"""A Debian that systemd has booted in a container, with the package or ready for it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.rig import DEADLINE, ROOT

DEBIAN = ROOT / "build" / "root"
GUEST = ROOT / "build" / "guest"
#: Seconds for what installs or removes a package, or boots a guest.
LONG = 120.0


class CannotBoot(Exception):
    """Containers can't be booted on this host; the message says what is missing."""


class Program:
    """A program that is listened to while it runs."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._heard = b""

    def type(self, text: str) -> None:
        """Have it read this."""
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), text.encode())

    def until(self, wanted: str, after: str = "") -> str:
        """All that it has said, once that is among it, behind where `after` ends."""
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        while wanted.encode() not in self._heard[len(after.encode()) :]:
            ready, _, _ = select.select([stdout], [], [], LONG)
            data = os.read(stdout, 65536) if ready else b""
            assert data, f"no {wanted!r} in {self._heard!r}"
            self._heard += data
        return self._heard.decode()

    def answer(self, prompt: str, text: str) -> None:
        """Type a line at a prompt that hides it; what is still shown is dropped with the hiding."""
        seen, shown = self.until(prompt), True
        while shown:
            self.type(f"{text}\n")
            before, seen = seen, self.until("\n", after=seen)
            shown = text in seen.removeprefix(before)

    def ends(self) -> None:
        """Wait for its end."""
        self._process.wait(LONG)

    def close(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._process.stdout.close()
        self._process.stdin.close()
        # nsenter has a child for it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(DEADLINE)


class Machine:
    """A container that runs until `close`. Nothing in it outlives that."""

    def __init__(self, directory: Path, packages: Path) -> None:
        self._console: IO[bytes] = (directory / "console").open("w+b")
        command = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"]
        command += ["--private-network", "--console=pipe", "--volatile=overlay"]
        command += ["--notify-ready=yes", "--kill-signal=SIGKILL"]
        command += [f"--directory={DEBIAN}", f"--bind-ro={GUEST}:/guest"]
        command += [f"--bind-ro={packages}:/packages"]
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notified.bind(str(directory / "notify"))
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "NOTIFY_SOCKET": str(directory / "notify")},
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=self._console,
        )
        try:
            # Then closed: nspawn, and systemd with it, would wait for one who does not read on.
            with notified:
                self._leader = self._until_booted(notified)
            # Whatever went wrong, nothing of this is to be done to the host.
            if self.command("test", "-d", "/packages", "-a", "-d", "/guest").returncode:
                raise CannotBoot("the container was started, but can't be entered")
        except BaseException:
            self.close()
            raise

    def _until_booted(self, notified: socket.socket) -> str:
        """Hear from nspawn that the container is up, and who its leader is. Raises CannotBoot."""
        ended = os.pidfd_open(self._process.pid)
        try:
            told: dict[str, str] = {}
            while "READY" not in told:
                ready, _, _ = select.select([notified.fileno(), ended], [], [], DEADLINE)
                if notified.fileno() not in ready:
                    last = self.console.strip().splitlines()[-1:] or ["it hangs"]
                    raise CannotBoot(last[0])
                lines = notified.recv(4096).decode().splitlines()
                told |= {key: value for key, _, value in (line.partition("=") for line in lines)}
            return told["X_NSPAWN_LEADER_PID"]
        finally:
            os.close(ended)

    @property
    def console(self) -> str:
        """What the container's console and nspawn itself have said."""
        return Path(self._console.name).read_text("utf-8", "replace")

    @property
    def _enter(self) -> list[str]:
        # Its root, too: where we are in a changed root ourselves, a container can't have its own as
        # that of its namespace, which is the host's then.
        enter = ["nsenter", f"--target={self._leader}", "--all", "--root", "--wdns=/", "env", "-i"]
        return [*enter, "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]

    def command(
        self, *argv: str, user: str | None = None, stdin: str = "", deadline: float = DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the container to its end: root's as it is, a user's as a unit."""
        return subprocess.run(
            [*self._enter, *self._as(user), *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
        )

    @staticmethod
    def _as(user: str | None) -> list[str]:
        if user is None:
            return []
        # By systemd, so that it is in a cgroup of its own and has nothing of ours.
        return ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--uid={user}"]

    def run(self, *argv: str, **options: object) -> str:
        """The output of a program that succeeds."""
        done = self.command(*argv, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    @contextlib.contextmanager
    def program(self, *argv: str) -> Iterator[Program]:
        """A program of root's that goes on in the container, until it is no longer listened to."""
        with contextlib.closing(Program([*self._enter, *argv])) as program:
            yield program

    @contextlib.contextmanager
    def at_terminal(self, script: str, *, user: str) -> Iterator[Program]:
        """A shell's script with a terminal of its own, in a session of the user's."""
        session = [*self._as(user), "--property=PAMName=login"]
        spawn = "import pty, sys; pty.spawn(['sh', '-c', sys.argv[1]])"
        with self.program(*session, "python3", "-c", spawn, script) as program:
            yield program

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "sh", path, stdin=text)

    def busctl(self, *arguments: str, user: str | None = None) -> str:
        """What busctl prints, on either stream."""
        done = self.command("busctl", *arguments, user=user)
        return (done.stdout + done.stderr).strip()

    def unit(self, name: str, key: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", name)

    def active_units(self, pattern: str) -> list[str]:
        """The names of units that are loaded and active."""
        options = ("--plain", "--no-legend", "--state=active", pattern)
        lines = self.run("systemctl", "list-units", *options).splitlines()
        return [line.split()[0] for line in lines]

    def processes(self, user: str) -> list[str]:
        """The numbers of a user's processes."""
        found = self.run("find", "/proc", "-maxdepth", "1", "-name", "[0-9]*", "-user", user)
        return [path.removeprefix("/proc/") for path in found.splitlines()]

    def install(self, package: Path) -> str:
        """Install a package by dpkg; what that says."""
        inside = Path("/packages") / package.name
        done = self.command("dpkg", "--install", str(inside), deadline=LONG)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def until_off(self) -> None:
        """Wait until it has shut itself down."""
        self._process.wait(LONG)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE)
        self._console.close()


@contextlib.contextmanager
def booted(packages: Path) -> Iterator[Machine]:
    """A machine that has just booted and can install these packages. Raises CannotBoot."""
    with (
        tempfile.TemporaryDirectory(prefix="vmbus-") as directory,
        contextlib.closing(Machine(Path(directory), packages)) as machine,
    ):
        yield machine
