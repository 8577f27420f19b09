"""What a client passes to Create: a config's values for the wire, and the files to go along."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Required, Self, TypedDict

from .bus.stream import MAX_FDS
from .bus.wire import Variant
from .errors import InvalidConfig


class HasFileno(Protocol):
    """An open file. It stays its owner's."""

    def fileno(self) -> int: ...


File = str | os.PathLike[str] | HasFileno


class Disk(TypedDict, total=False):
    """A disk. The file of a writable one must be open for reading and writing."""

    image: Required[File]
    writable: bool
    id: str
    direct: bool


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
            fd = file.fileno()
        self.fds.append(fd)
        return Variant("h", len(self.fds) - 1)

    def _open(self, path: str | os.PathLike[str], mode: int) -> int:
        # A pipe that nobody writes to must not hold us up; the service will refuse it.
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        self._opened.append(fd)
        os.set_blocking(fd, True)
        return fd


def encode_config(
    files: Files,
    boot: Mapping[str, File | None],
    values: Mapping[str, str | int | None],
    disks: Sequence[Disk],
) -> dict[str, Any]:
    """A config as Create takes it; what is None isn't mentioned. Raises OSError, InvalidConfig."""
    config = {key: files.add(file) for key, file in boot.items() if file is not None}
    config |= {key: _variant(key, value) for key, value in values.items() if value is not None}
    if disks:
        config["disks"] = Variant("aa{sv}", [_disk(files, disk) for disk in disks])
    return config


def _disk(files: Files, disk: Disk) -> dict[str, Any]:
    image = files.add(disk["image"], writable=disk.get("writable", False))
    rest = {key: _variant(key, value) for key, value in disk.items() if key != "image"}
    return {"image": image, **rest}


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
