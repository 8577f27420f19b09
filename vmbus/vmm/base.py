"""What a driver is: how to start one kind of VMM, and what to ask of it while it runs."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..files import OpenFile
from ..reasons import Reason
from ..spec import VMConfig

#: The control socket's name in a VM's directory of temporary files.
CONTROL_SOCKET = "control"
_COPY_CHUNK = 1 << 24
_HOST_CID = socket.VMADDR_CID_HOST


@dataclass(frozen=True, slots=True)
class Launch:
    """What a driver needs to know to start one VM.

    directory: the VM's own, for temporary files; the console's FIFOs are in it. kvm: whether KVM is
    usable. vsock: whether the guest gets a vsock. control_timeout: how long the VMM may take to
    answer a request, in seconds. notify_port: the vsock port where the guest can report; 0: none.
    """

    name: str
    cid: int
    config: VMConfig
    directory: Path
    kvm: bool
    vsock: bool
    control_timeout: float
    notify_port: int = 0

    @property
    def credential(self) -> str:
        """Where an unchanged systemd in the guest reports, or an empty string: nowhere."""
        return f"vsock:{_HOST_CID}:{self.notify_port}" if self.notify_port else ""


class Control(Protocol):
    """A VMM that answers. Each request raises ControlFailed, NotSupported or TimedOut."""

    async def power_button(self) -> None:
        """Press the guest's power button."""

    async def quit(self) -> None:
        """Ask the VMM to end at once, in good order."""

    async def suspend(self) -> None:
        """Stop the vCPUs."""

    async def resume(self) -> None:
        """Let the vCPUs go on."""

    async def set_memory(self, size: int) -> None:
        """Have the balloon leave the guest `size` bytes; it takes the guest's time."""

    async def memory(self) -> int:
        """How many bytes the guest has now."""

    def watch_memory(self, changed: Callable[[int], None]) -> None:
        """Call `changed` with what the guest has whenever the VMM tells that it changed."""

    async def resize_disk(self, index: int, size: int) -> None:
        """Grow a disk's file to `size` bytes, then tell the guest."""

    async def aclose(self) -> Reason | None:
        """Let go of the VMM, which has ended, and tell what it said of its end, if it did."""


@dataclass(frozen=True, slots=True)
class Helper:
    """A program beside the VMM: its argument vector and the descriptors it inherits."""

    argv: list[str]
    inherit: list[int]


@dataclass(slots=True)
class Command:
    """A VMM about to be started: its argument vector and the descriptors it inherits."""

    argv: list[str] = field(default_factory=list)
    inherit: list[int] = field(default_factory=list)
    #: Programs that the VMM needs beside it, to be started before it and ended after it.
    helpers: list[Helper] = field(default_factory=list)
    _owned: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def pass_fd(self, fd: int) -> str:
        """Have the VMM inherit a descriptor that somebody else closes; returns its path there."""
        self.inherit.append(fd)
        return f"/proc/self/fd/{fd}"

    def own_fd(self, fd: int) -> int:
        """Close a descriptor of ours when the VMM is started, or won't be."""
        self._owned.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Close our copies of what was made for the VMM alone."""
        self._owned.close()


class Driver(Protocol):
    """One kind of VMM."""

    name: str

    def unsupported(self, config: VMConfig) -> list[str]:
        """What of a config this VMM can't do on this host, and why. May block."""

    def prepare(self, launch: Launch) -> Command:
        """Make ready what the VMM needs. May block: runs in a worker thread. Raises OSError."""

    async def connect(self, launch: Launch) -> Control:
        """Wait, however long, until the VMM answers; it may have been launched by another of us.

        Raises ControlFailed or NotSupported.
        """

    def told_by(self, status: int, stderr: str) -> Reason | None:
        """What this VMM says of its end by its exit code, or by the last it printed."""

    def last_words(self, stderr: str) -> str:
        """The line of its stderr that says best why it ended, or an empty string."""


def listen(directory: Path, kind: socket.SocketKind, name: str = CONTROL_SOCKET) -> socket.socket:
    """Bind a socket before whoever serves it exists, so that connecting to it never fails."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with short_path(directory) as path:
            sock.bind(f"{path}/{name}")
        sock.listen(socket.SOMAXCONN)
    except BaseException:
        sock.close()
        raise
    return sock


async def connect(directory: Path, kind: socket.SocketKind) -> socket.socket:
    """Connect to the control socket that `listen` bound. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.setblocking(False)
    try:
        with short_path(directory) as path:
            # At once, or not at all: there is nothing to wait for but room in the queue.
            sock.connect(f"{path}/{CONTROL_SOCKET}")
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def short_path(directory: Path) -> Iterator[str]:
    """A name of the directory that leaves room in the 107 bytes of a socket's path."""
    place = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{place}"
    finally:
        os.close(place)


def check_unmoved(config: VMConfig) -> None:
    """Whether the shared directories are what they were at Create. Raises ValueError or OSError."""
    for shared in config.shared_dirs:
        if not shared.source.is_still(shared.source.name):
            raise ValueError(f"{shared.source.name} is not the directory that it was at Create")


def readable_again(file: OpenFile, command: Command) -> str:
    """A path under which the VMM can open a read-only file anew.

    VMMs open some files by name only. The name of an inherited descriptor does, where the service
    may open the file itself; else the content goes into an anonymous file of our own.
    """
    try:
        again = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        again = _copy(file.fd, file.size)
    return command.pass_fd(command.own_fd(again))


def _copy(fd: int, size: int) -> int:
    copy = os.memfd_create("vmbus")
    try:
        offset = 0
        while offset < size:
            sent = os.sendfile(copy, fd, offset, min(_COPY_CHUNK, size - offset))
            if sent == 0:
                break
            offset += sent
    except BaseException:
        os.close(copy)
        raise
    return copy


def last_line(text: str, *, containing: str = "") -> str:
    """The last line that isn't blank and has `containing` in it, at most 500 characters of it."""
    for line in reversed(text.splitlines()):
        if line.strip() and containing in line:
            return line.strip()[:500]
    return ""
