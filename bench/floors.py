"""What can't be had for less: a VMM spawned and asked by hand, and its end told by the kernel."""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

from bench.stage import GUEST
from vmbus.files import OpenFile
from vmbus.spec import VMConfig
from vmbus.vmm.base import CONTROL_SOCKET, Command, Launch
from vmbus.vmm.qemu import Qemu

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def spawn_and_kill(params: str) -> tuple[float, float]:
    """Start QEMU with the arguments that the service gives it, and kill it once it has answered.

    Returns how long it took until its control socket answered, and from its SIGKILL until its
    pidfd was readable; in milliseconds.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = VMConfig.model_construct(
            kernel=_open(GUEST / "vmlinuz"), initrd=_open(GUEST / "initrd"), params=params
        )
        launch = Launch("floor", 3, config, directory, False, False, 10.0)
        command = Qemu(shutil.which("qemu-system-x86_64") or "").prepare(launch)
        _make_fifos(command.argv)
        before = time.perf_counter()
        pid = _spawn(command)
        command.close()
        with _greeted(directory / CONTROL_SOCKET):
            answered = time.perf_counter()
            ended = _kill(pid)
        config.close()
    return (answered - before) * 1e3, ended


class Spawner:
    """Somebody with many descriptors open, of FIFOs as a VM's, who starts a shell."""

    def __init__(self, descriptors: int) -> None:
        self._held: list[int] = []
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._limits[1], self._limits[1]))
        with tempfile.TemporaryDirectory() as directory:
            for number in range(descriptors):
                path = f"{directory}/{number}"
                os.mkfifo(path)
                self._held.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    def __call__(self) -> float:
        """How long until the shell runs, in milliseconds."""
        ours, theirs = os.pipe()
        before = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, theirs, 1)]
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "echo"], {}, file_actions=actions)
        os.read(ours, 1)
        took = (time.perf_counter() - before) * 1e3
        os.waitpid(pid, 0)
        os.close(ours)
        os.close(theirs)
        return took

    def close(self) -> None:
        for fd in self._held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


def _open(path: Path) -> OpenFile:
    return OpenFile(os.open(path, os.O_RDONLY), str(path), writable=False, size=path.stat().st_size)


def _make_fifos(argv: list[str]) -> None:
    """Make what QEMU opens both ends of; nobody else has to."""
    for argument in argv:
        if argument.startswith("pipe,"):
            path = argument.partition(",path=")[2]
            os.mkfifo(f"{path}.in")
            os.mkfifo(f"{path}.out")


def _spawn(command: Command) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, each) for each in range(3)]
    actions += [(os.POSIX_SPAWN_DUP2, each, each) for each in command.inherit]
    try:
        return os.posix_spawn(
            command.argv[0], command.argv, _ENVIRONMENT, file_actions=actions, setsid=True
        )
    finally:
        os.close(null)


def _greeted(path: Path) -> socket.socket:
    """A QMP session, begun as the service begins it: greeting, capabilities, answer."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    _read_line(sock)
    sock.sendall(b'{"execute":"qmp_capabilities"}\r\n')
    _read_line(sock)
    return sock


def _read_line(sock: socket.socket) -> None:
    line = b""
    while not line.endswith(b"\n"):
        chunk = sock.recv(4096)
        if not chunk:
            raise ConnectionError("QEMU ended")
        line += chunk


def _kill(pid: int) -> float:
    pidfd = os.pidfd_open(pid)
    before = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    took = (time.perf_counter() - before) * 1e3
    os.waitpid(pid, 0)
    os.close(pidfd)
    return took
