"""A Debian that systemd has booted in a container, with the package or ready for it."""

from __future__ import annotations

import contextlib
import os
import select
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

    def command(
        self, *argv: str, user: str | None = None, stdin: str = "", deadline: float = DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the container to its end: root's as it is, a user's as a unit."""
        enter = ["nsenter", f"--target={self._leader}", "--all", "--wdns=/", "env", "-i"]
        enter += ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        if user is not None:
            # By systemd, so that it is in a cgroup of its own and has nothing of ours.
            enter += ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--uid={user}"]
        return subprocess.run(
            [*enter, *argv],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
        )

    def run(self, *argv: str, **options: object) -> str:
        """The output of a program that succeeds."""
        done = self.command(*argv, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1"', "sh", path, stdin=text)

    def busctl(self, *arguments: str, user: str | None = None) -> str:
        """What busctl prints, on either stream."""
        done = self.command("busctl", *arguments, user=user)
        return (done.stdout + done.stderr).strip()

    def unit(self, name: str, key: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", name)

    def install(self, package: Path) -> str:
        """Install a package by dpkg; what that says."""
        inside = Path("/packages") / package.name
        done = self.command("dpkg", "--install", str(inside), deadline=LONG)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

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
