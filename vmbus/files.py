"""Files that callers name, by descriptor or by path, opened without trusting either.

A descriptor proves what its caller may do, so it is taken as it is, in the mode it has. A path
proves nothing: it is opened only below the image directories, and what is checked is the file that
was opened, not the name it had a moment before.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

#: What the first bytes of a disk image say that is not what it seems. Taken for raw it would show
#: the guest the wrong disk; a VMM that looks for itself would even open the files it names.
_FORMATS = {
    b"QFI\xfb": "qcow2",
    b"QED\0": "QED",
    b"KDMV": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"composite_disk\x1d": "composite",
    b"\x3a\xff\x26\xed": "Android sparse",
}
_TUNGETIFF = 0x800454D2
_IFF_TAP = 2
_ACCESS = {os.O_RDONLY: "read-only", os.O_WRONLY: "write-only", os.O_RDWR: "read and write"}


@dataclass(frozen=True, slots=True)
class Handle:
    """A descriptor that came with a call. It is the call's; whoever keeps it duplicates it."""

    fd: int


class OpenFile:
    """A file held open for a VM. `close` may be called any number of times."""

    __slots__ = ("fd", "held", "name", "size", "writable")

    def __init__(self, fd: int, name: str, *, writable: bool, size: int) -> None:
        self.fd = fd
        #: Whether it is an open file at all, and not just the name of a tap device.
        self.held = fd >= 0
        self.name = name
        self.writable = writable
        self.size = size

    def close(self) -> None:
        """Close the descriptor, once."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            # What a file system has to say here of what was written is not for us.
            with contextlib.suppress(OSError):
                os.close(fd)

    def check_open(self) -> None:
        """Raises ValueError if the descriptor was lost, with a service that held it."""
        if self.held and self.fd < 0:
            raise ValueError(f"{self.name} is not open any more, since the service was restarted")

    def size_now(self) -> int:
        """Its size in bytes, whatever became of it since it was opened. Raises OSError."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def is_block_device(self) -> bool:
        """Raises OSError."""
        return stat.S_ISBLK(os.fstat(self.fd).st_mode)

    def is_still(self, path: str) -> bool:
        """Whether that path still leads to it. Raises OSError."""
        return os.path.samestat(os.stat(path), os.fstat(self.fd))

    def facts(self) -> dict[str, object]:
        """What is to be known of it where it can't be held."""
        # A path may be any bytes, which text can't have as they are.
        name = os.fsencode(self.name).decode("latin-1")
        return {"name": name, "writable": self.writable, "size": self.size, "held": self.held}

    @classmethod
    def lost(cls, facts: object) -> OpenFile:
        """A file as `facts` has it, without its descriptor. Raises ValueError or TypeError."""
        if not isinstance(facts, dict):
            raise TypeError("what is known of a file must be a mapping")
        known = dict(facts)
        held = known.pop("held")
        file = cls(-1, os.fsdecode(str(known.pop("name")).encode("latin-1")), **known)
        file.held = bool(held)
        return file

    def __repr__(self) -> str:
        return f"OpenFile({self.name!r})"


class FilePolicy:
    """Which files may be opened, and every one that was, so that a refusal can close them all."""

    def __init__(self, image_directories: tuple[Path, ...] | None, caller: int = 0) -> None:
        #: The user on whose behalf files are opened.
        self.caller = caller
        #: None: any path will do, since the caller and the service are the same user.
        self.image_directories = image_directories
        self.opened: list[OpenFile] = []

    def close_all(self) -> None:
        for file in self.opened:
            file.close()

    def open(self, source: object, *, writable: bool) -> OpenFile:
        """Take a Handle or a path. Raises ValueError that says what is wrong and what is right."""
        try:
            if isinstance(source, Handle):
                file = self._adopt(source, writable=writable)
            elif isinstance(source, str):
                file = self._open_path(source, writable=writable)
            else:
                raise ValueError("must be an open file (h) or a path (s)")
        except OSError as error:
            raise ValueError(f"it can't be used: {error.strerror}") from error
        self.opened.append(file)
        return file

    def open_disk(self, source: object, *, writable: bool) -> OpenFile:
        """Take a disk image, like `open`. Raises ValueError if it isn't raw."""
        file = self.open(source, writable=writable)
        check_raw(file)
        return file

    def open_tap(self, source: object) -> OpenFile:
        """Take an open tap device, or the name of one that the service may open."""
        if isinstance(source, Handle):
            file = _adopt_tap(source)
        elif isinstance(source, str):
            file = OpenFile(-1, self._checked_tap(source), writable=True, size=0)
        else:
            raise ValueError("must be an open tap device (h) or the name of one (s)")
        self.opened.append(file)
        return file

    def directory(self, source: object) -> OpenFile:
        """Hold a directory to be shared; its name is for the VMM to open. Raises ValueError."""
        if not isinstance(source, str):
            raise ValueError("must be a path (s)")
        place = self._locate(source)
        real = os.readlink(f"/proc/self/fd/{place}")
        file = OpenFile(place, real, writable=False, size=0)
        self.opened.append(file)
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            raise ValueError(f"{_short(source)} is not a directory")
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
        place = self._locate(path)
        try:
            link = f"/proc/self/fd/{place}"
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

    def _locate(self, path: str) -> int:
        """An O_PATH descriptor of what lies at a path that is allowed. Raises ValueError."""
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
            self._check_place(path, os.readlink(f"/proc/self/fd/{place}"))
        except BaseException:
            os.close(place)
            raise
        return place

    def _checked_tap(self, name: str) -> str:
        """Find out now what would keep the VMM from opening a tap device. Raises ValueError."""
        device = Path("/sys/class/net") / name
        if not 0 < len(name) < 16 or not name.isascii() or "/" in name or name in (".", ".."):
            raise ValueError(f"{_short(name)!r} is not the name of a network device")
        if not device.exists():
            raise ValueError(f"there is no network device {name}")
        flags = device / "tun_flags"
        if not flags.exists() or not int(flags.read_text(), 16) & _IFF_TAP:
            raise ValueError(f"{name} is not a tap device")
        owner = int((device / "owner").read_text())
        if self.image_directories is not None and self.caller not in (0, owner):
            raise ValueError(f"the owner of {name} is uid {owner}; pass an open tap device")
        if os.getuid() not in (0, owner):
            raise ValueError(
                f"the service may not open {name}, which is uid {owner}'s; pass an open tap device"
            )
        return name

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


def check_raw(file: OpenFile) -> None:
    """Look at what a disk image is. Raises ValueError if it says that it isn't raw."""
    head = _head(file.fd)
    for magic, name in _FORMATS.items():
        if head.startswith(magic):
            raise ValueError(
                f"the image is {name}, and only raw ones are taken; "
                "`qemu-img convert -O raw` makes one"
            )


def _head(fd: int) -> bytes:
    """The first bytes of a file, which may be open for direct I/O, and then gives whole blocks."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            return page[: os.preadv(fd, [page], 0)]
        except OSError as error:
            raise ValueError(f"it can't be read: {error.strerror}") from error


def _size_if_usable(fd: int) -> int:
    """Size in bytes of a regular file, 0 for a block device. Raises ValueError for the others."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISBLK(status.st_mode):
        return 0
    raise ValueError("it must be a regular file or a block device")


def _adopt_tap(handle: Handle) -> OpenFile:
    request = bytearray(40)
    try:
        fcntl.ioctl(handle.fd, _TUNGETIFF, request)
    except OSError:
        raise ValueError("it must be an open tap device") from None
    name, flags = struct.unpack_from("16sH", request)
    if not flags & _IFF_TAP:
        raise ValueError("it must be a tap device, not a tun device")
    copy = fcntl.fcntl(handle.fd, fcntl.F_DUPFD_CLOEXEC, 3)
    return OpenFile(copy, name.rstrip(b"\0").decode("ascii", "replace"), writable=True, size=0)


def _short(path: str) -> str:
    return path if len(path) <= 200 else path[:200] + "…"
