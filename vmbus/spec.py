"""The config of a VM, as Create takes it: a frozen model that refuses what it doesn't know.

Validation opens the files, so that a VM that was created can be started; it reports every problem
at once and leaves nothing open behind a refusal.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Protocol, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
)

from .errors import InvalidArgs, InvalidConfig, NotSupported
from .files import FilePolicy, OpenFile

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
#: Longest kernel command line, in bytes: what x86 kernels take, less their closing NUL.
MAX_PARAMS = 2047
MIN_MEMORY_MIB = 16
#: What the size of a disk is a multiple of, in bytes.
SECTOR = 512
MAX_DISKS = 8
MAX_NETS = 4
MAX_SHARED_DIRS = 4
MAC_PATTERN = r"^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$"


@functools.cache
def host_memory_mib() -> int:
    """Physical memory of the host, in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1024 * 1024)


@functools.cache
def host_cpus() -> int:
    return os.cpu_count() or 1


def _at_most(limit: Callable[[], int], what: str) -> AfterValidator:
    def check(value: int, info: ValidationInfo) -> int:
        # What runs already was checked when it was created; the host may have shrunk since.
        if isinstance(info.context, FilePolicy) and value > limit():
            raise ValueError(f"must be at most {limit()}, {what}")
        return value

    return AfterValidator(check)


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must not have control characters in it")
    if len(value.encode()) > MAX_PARAMS:
        raise ValueError(f"must be at most {MAX_PARAMS} bytes long")
    return value


class Files(Protocol):
    """How the files that a config names are opened. Each raises ValueError."""

    def open(self, source: object, *, writable: bool) -> OpenFile:
        """A file."""

    def open_disk(self, source: object, *, writable: bool) -> OpenFile:
        """A disk image."""

    def open_tap(self, source: object) -> OpenFile:
        """A tap device, or the name of one."""

    def directory(self, source: object) -> OpenFile:
        """A directory to be shared."""


def _open_file(value: object, info: ValidationInfo) -> OpenFile:
    return _policy(info).open(value, writable=False)


def _policy(info: ValidationInfo) -> Files:
    return cast(Files, info.context)


def _open_disk(value: object, info: ValidationInfo) -> OpenFile:
    return _policy(info).open_disk(value, writable=bool(info.data.get("writable", False)))


def _open_tap(value: object, info: ValidationInfo) -> OpenFile:
    return _policy(info).open_tap(value)


def _directory(value: object, info: ValidationInfo) -> OpenFile:
    return _policy(info).directory(value)


def _unicast(value: str) -> str:
    if int(value[:2], 16) & 1:
        raise ValueError("must be a unicast address: its first byte must be even")
    return value.lower()


# What is written down of a file that a VM holds open.
_WRITTEN = PlainSerializer(OpenFile.facts)
File = Annotated[OpenFile, PlainValidator(_open_file), _WRITTEN]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )


class Disk(_Model):
    """One disk. `writable` stands before `image`, whose validation looks at it."""

    writable: bool = False
    image: Annotated[OpenFile, PlainValidator(_open_disk), _WRITTEN]
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,20}$")] | None = None
    direct: bool = False


class Net(_Model):
    """One network device, on a tap."""

    tap: Annotated[OpenFile, PlainValidator(_open_tap), _WRITTEN]
    mac: Annotated[str, Field(pattern=MAC_PATTERN), AfterValidator(_unicast)] | None = None


class SharedDir(_Model):
    """One directory of the host that the guest mounts by its tag."""

    source: Annotated[OpenFile, PlainValidator(_directory), _WRITTEN]
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,35}$")]
    writable: bool = False


class VMConfig(_Model):
    """Everything that one VM is made of. Memory in MiB."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    vmm: Literal["auto", "crosvm", "qemu"] = "auto"
    kernel: File | None = None
    initrd: File | None = None
    bios: File | None = None
    params: Annotated[str, AfterValidator(_printable)] = ""
    memory_mib: Annotated[
        int, Field(ge=MIN_MEMORY_MIB), _at_most(host_memory_mib, "the memory of this host")
    ] = 256
    cpus: Annotated[int, Field(ge=1), _at_most(host_cpus, "the CPUs of this host")] = 1
    disks: Annotated[list[Disk], Field(max_length=MAX_DISKS)] = []
    net: Annotated[list[Net], Field(max_length=MAX_NETS)] = []
    shared_dirs: Annotated[list[SharedDir], Field(max_length=MAX_SHARED_DIRS)] = []
    vsock: bool | None = None
    protected: bool = False
    balloon: bool = True
    gdb_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    kill_on_disconnect: bool = False
    ready_timeout_usec: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    collect: Literal["manual", "on-death"] = "manual"

    def files(self) -> list[OpenFile]:
        """Every file the VM needs, in no order."""
        single = [file for file in (self.kernel, self.initrd, self.bios) if file is not None]
        several = [disk.image for disk in self.disks] + [net.tap for net in self.net]
        return single + several + [shared.source for shared in self.shared_dirs]

    def check_memory_target(self, size: int) -> None:
        """Whether the guest can be left `size` bytes. Raises NotSupported or InvalidArgs."""
        if not self.balloon:
            raise NotSupported("this VM was created without a balloon")
        least, most = MIN_MEMORY_MIB << 20, self.memory_mib << 20
        if not least <= size <= most:
            raise InvalidArgs(f"the guest can have {least} to {most} bytes, not {size}")

    def check_disk_size(self, index: int, size: int) -> None:
        """Whether a disk can be that large at all. Raises NotSupported or InvalidArgs."""
        if index >= len(self.disks):
            raise InvalidArgs(f"there is no disk {index}; the VM has {len(self.disks)}")
        if not self.disks[index].writable:
            raise NotSupported(f"disk {index} is read-only")
        if size % SECTOR:
            raise InvalidArgs(f"a disk's size must be a multiple of {SECTOR} bytes")

    def close(self) -> None:
        """Close the files; a VM that has ended, or never will start, needs them no more."""
        for file in self.files():
            file.close()

    def close_for_run(self) -> None:
        """Close what is the VMM's by now; a writable disk is kept, to see how large it is."""
        kept = [disk.image for disk in self.disks if disk.writable]
        for file in self.files():
            if file not in kept:
                file.close()


def joint_problems(raw: Mapping[str, object]) -> list[str]:
    """What is wrong with the keys that only make sense together."""
    problems = []
    if "kernel" in raw and "bios" in raw:
        problems.append("kernel, bios: only one of them can be given")
    if "kernel" not in raw and "bios" not in raw:
        problems.append("kernel: a kernel (or else a bios) is required")
    if "bios" in raw and "kernel" not in raw:
        problems += [
            f"{key}: goes only with a kernel, not with a bios"
            for key in ("initrd", "params")
            if key in raw
        ]
    tags = [str(each.get("tag")) for each in _dicts(raw.get("shared_dirs"))]
    if len(tags) != len(set(tags)):
        problems.append("shared_dirs: each must have a tag of its own")
    return problems


def _dicts(value: object) -> list[dict[str, object]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def parse_config(raw: Mapping[str, object], files: FilePolicy) -> VMConfig:
    """Validate a config and open its files. Raises InvalidConfig, with nothing left open."""
    problems = joint_problems(raw)
    try:
        config = VMConfig.model_validate(dict(raw), context=files)
    except ValidationError as error:
        problems = [_problem(each) for each in error.errors(include_url=False)] + problems
    except BaseException:
        files.close_all()
        raise
    else:
        problems += _too_large(config)
    if problems:
        files.close_all()
        raise InvalidConfig(problems)
    return config


def _too_large(config: VMConfig) -> list[str]:
    """What can't be loaded into the guest's memory, and may have to be copied before."""
    return [
        f"{key}: the file is larger than the guest's memory"
        for key in ("kernel", "initrd", "bios")
        if (file := getattr(config, key)) is not None and file.size > config.memory_mib << 20
    ]


_PARTS: Mapping[str, type[_Model]] = {"disks": Disk, "net": Net, "shared_dirs": SharedDir}


def _problem(error: Any) -> str:
    where = ""
    for part in error["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    where = where[:100]
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; the keys are {', '.join(_known_keys(error['loc']))}"
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    given = error.get("input")
    if isinstance(given, (bool, int, float, str)) and error["type"] != "value_error":
        text += f", not {_shorten(given)}"
    return f"{where}: {text}"


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    model = _PARTS.get(str(location[0]), VMConfig) if len(location) > 1 else VMConfig
    return list(model.model_fields)


def _shorten(value: bool | int | float | str) -> str:
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else shown[:60] + "…"
