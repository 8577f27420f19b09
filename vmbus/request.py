"""What a client passes to Create: a config's values for the wire, and the files to go along."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Required, Self, TypedDict

from .bus.stream import MAX_FDS
from .bus.wire import Variant
from .errors import InvalidConfig


class HasFileno(Protocol):
    """An open file. It stays its owner's."""

    def fileno(self) -> int: ...


#: A path, or an open file or its descriptor.
File = str | os.PathLike[str] | HasFileno | int


class Disk(TypedDict, total=False):
    """A disk. The file of a writable one must be open for reading and writing."""

    image: Required[File]
    writable: bool
    id: str
    direct: bool


class Net(TypedDict, total=False):
    """A network device. A tap's name is for the service to open; else it is an open tap device."""

    tap: Required[str | HasFileno | int]
    mac: str


class SharedDir(TypedDict, total=False):
    """A directory that the guest mounts by its tag. It is the VMM that opens it."""

    source: Required[str | os.PathLike[str]]
    tag: Required[str]
    writable: bool


class Config(TypedDict, total=False):
    """What a VM is made of, as the contract says of Create. None is as good as not mentioned."""

    name: str | None
    vmm: str | None
    kill_on_disconnect: bool | None
    kernel: File | None
    initrd: File | None
    bios: File | None
    params: str | None
    memory_mib: int | None
    cpus: int | None
    disks: Sequence[Disk] | None
    net: Sequence[Net] | None
    shared_dirs: Sequence[SharedDir] | None
    vsock: bool | None
    protected: bool | None
    balloon: bool | None
    gdb_port: int | None
    ready_timeout_usec: int | None
    collect: str | None


class Files:
    """The files of one call; those that were opened here are closed with it."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._opened: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def add(self, file: File, *, writable: bool = False) -> Any:
        """The value that stands for a file in the call. Raises OSError or InvalidConfig."""
        if len(self.fds) >= MAX_FDS:
            raise InvalidConfig([f"at most {MAX_FDS} files can be passed"])
        if isinstance(file, str | os.PathLike):
            fd = self._open(file, os.O_RDWR if writable else os.O_RDONLY)
        else:
            fd = file if isinstance(file, int) else file.fileno()
        self.fds.append(fd)
        return Variant("h", len(self.fds) - 1)

    def _open(self, path: str | os.PathLike[str], mode: int) -> int:
        # A pipe that nobody writes to must not hold us up; the service will refuse it.
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        self._opened.append(fd)
        os.set_blocking(fd, True)
        return fd


def encode_config(files: Files, config: Config) -> dict[str, Any]:
    """A config as Create takes it. Raises OSError or InvalidConfig."""
    return {key: _encoded(files, key, value) for key, value in config.items() if value is not None}


def _encoded(files: Files, key: str, value: Any) -> Any:
    if key in _FILES:
        return files.add(value)
    if key in _PARTS:
        return Variant("aa{sv}", [_PARTS[key](files, each) for each in value])
    return _variant(key, value)


# What is missing is for the service to say, with all else that is wrong.


def _disk(files: Files, disk: Disk) -> dict[str, Any]:
    made = _variants(disk)
    if "image" in disk:
        made["image"] = files.add(disk["image"], writable=disk.get("writable", False))
    return made


def _net(files: Files, net: Net) -> dict[str, Any]:
    made = _variants(net)
    if "tap" in net:
        tap = net["tap"]
        made["tap"] = Variant("s", tap) if isinstance(tap, str) else files.add(tap)
    return made


def _shared_dir(_: Files, shared: SharedDir) -> dict[str, Any]:
    made = _variants(shared)
    if "source" in shared:
        made["source"] = Variant("s", str(Path(shared["source"]).absolute()))
    return made


_FILES = ("kernel", "initrd", "bios")
_PARTS: Mapping[str, Callable[[Files, Any], dict[str, Any]]] = {
    "disks": _disk,
    "net": _net,
    "shared_dirs": _shared_dir,
}


def _variants(part: Mapping[str, object]) -> dict[str, Any]:
    """The plain values of a part of a config."""
    special = ("image", "tap", "source")
    return {key: _variant(key, value) for key, value in part.items() if key not in special}


def _variant(key: str, value: object) -> Any:
    if isinstance(value, bool):
        return Variant("b", value)
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidConfig([f"{key}: {value} is out of range"])
        return Variant("x", value)
    if isinstance(value, str):
        return Variant("s", value)
    raise InvalidConfig([f"{key}: must be a string, an integer or a boolean"])
