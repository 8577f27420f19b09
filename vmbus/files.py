"""Files that callers name, by descriptor or by path, opened without trusting either.

A descriptor proves what its caller may do, so it is taken as it is, in the mode it has. A path
proves nothing: it is opened only below the image directories, and what is checked is the file that
was opened, not the name it had a moment before.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

_ACCESS = {os.O_RDONLY: "read-only", os.O_WRONLY: "write-only", os.O_RDWR: "read and write"}


@dataclass(frozen=True, slots=True)
class Handle:
    """A descriptor that came with a call. It is the call's; whoever keeps it duplicates it."""

    fd: int


class OpenFile:
    """A file held open for a VM. `close` may be called any number of times."""

    __slots__ = ("fd", "name", "size", "writable")

    def __init__(self, fd: int, name: str, *, writable: bool, size: int) -> None:
        self.fd = fd
        self.name = name
        self.writable = writable
        self.size = size

    def close(self) -> None:
        """Close the descriptor, once."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __repr__(self) -> str:
        return f"OpenFile({self.name!r})"


class FilePolicy:
    """Which files may be opened, and every one that was, so that a refusal can close them all."""

    def __init__(self, image_directories: tuple[Path, ...] | None) -> None:
        #: None: any path will do, since the caller and the service are the same user.
        self.image_directories = image_directories
        self.opened: list[OpenFile] = []

    def close_all(self) -> None:
        for file in self.opened:
            file.close()

    def open(self, source: object, *, writable: bool) -> OpenFile:
        """Take a Handle or a path. Raises ValueError that says what is wrong and what is right."""
        if isinstance(source, Handle):
            file = self._adopt(source, writable=writable)
        elif isinstance(source, str):
            file = self._open_path(source, writable=writable)
        else:
            raise ValueError("must be an open file (h) or a path (s)")
        self.opened.append(file)
        return file

    def _adopt(self, handle: Handle, *, writable: bool) -> OpenFile:
        flags = fcntl.fcntl(handle.fd, fcntl.F_GETFL)
        if flags & os.O_PATH:
            raise ValueError("the file is open as O_PATH only; open it for reading")
        mode = flags & os.O_ACCMODE
        if writable and (mode != os.O_RDWR or flags & os.O_APPEND):
            append = ", appending" if flags & os.O_APPEND else ""
            raise ValueError(
                f"the file is open {_ACCESS[mode]}{append}; a writable disk needs it open for "
                "reading and writing, not appending"
            )
        if mode == os.O_WRONLY:
            raise ValueError("the file is open write-only; open it for reading")
        size = _size_if_usable(handle.fd)
        copy = fcntl.fcntl(handle.fd, fcntl.F_DUPFD_CLOEXEC, 3)
        return OpenFile(copy, "the file passed", writable=mode == os.O_RDWR, size=size)

    def _open_path(self, path: str, *, writable: bool) -> OpenFile:
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"the path {_short(path)} must be absolute")
        # Looked at before anything is opened, so that nobody learns what exists elsewhere.
        self._check_place(path, os.path.normpath(path))
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            # Nor by a link that leads out: what it says of a file there is nobody's business.
            self._check_place(path, os.path.realpath(path))
            raise ValueError(f"{_short(path)}: {error.strerror}") from None
        try:
            link = f"/proc/self/fd/{place}"
            self._check_place(path, os.readlink(link))
            size = _size_if_usable(place)
            mode = os.O_RDWR if writable else os.O_RDONLY
            try:
                fd = os.open(link, mode | os.O_CLOEXEC)
            except OSError as error:
                wish = "for writing" if writable else "for reading"
                raise ValueError(f"{_short(path)}: {error.strerror} {wish}") from None
        finally:
            os.close(place)
        return OpenFile(fd, path, writable=writable, size=size)

    def _check_place(self, path: str, real: str) -> None:
        if self.image_directories is None:
            return
        allowed = {*self.image_directories, *(place.resolve() for place in self.image_directories)}
        if not any(Path(real).is_relative_to(directory) for directory in allowed):
            names = ", ".join(str(directory) for directory in self.image_directories)
            raise ValueError(
                f"{_short(path)} is not below an image directory ({names or 'none is set'}); "
                "pass an open file instead"
            )


def _size_if_usable(fd: int) -> int:
    """Size in bytes of a regular file, 0 for a block device. Raises ValueError for the others."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISBLK(status.st_mode):
        return 0
    raise ValueError("it must be a regular file or a block device")


def _short(path: str) -> str:
    return path if len(path) <= 200 else path[:200] + "…"
