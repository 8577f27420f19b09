"""vmbusd.toml as a model: every setting, its default and what it means."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .spec import host_memory_mib


class SettingsError(Exception):
    """A settings file that can't be used; the message names the file and every problem."""


class Limit(BaseModel):
    """How much of something one user can have, and all users together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_user: int = Field(ge=0)
    in_all: int = Field(ge=0)


def _whole_host() -> Limit:
    return Limit(per_user=host_memory_mib(), in_all=host_memory_mib())


class LimitSettings(BaseModel):
    """The table `limits`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vms: Limit = Limit(per_user=1000, in_all=4000)
    """VMs that exist."""
    memory: Limit = Field(default_factory=_whole_host)
    """MiB of memory in VMs that run. By default all that the host has."""
    calls: Limit = Limit(per_user=1000, in_all=4000)
    """Calls under way at one time, a Wait among them."""
    consoles: Limit = Limit(per_user=200, in_all=2000)
    """Consoles that are open."""
    files: Limit = Limit(per_user=2000, in_all=8000)
    """Files held for VMs that have not been started."""


class Settings(BaseModel):
    """The settings of one vmbusd. Times are in seconds, sizes in bytes unless the name says MiB."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_directories: tuple[Path, ...] = (Path("/var/lib/vmbus/images"),)
    """Where files that are given by path may lie. With --user any path will do."""
    crosvm: str = "crosvm"
    """The crosvm program: a path, or a name to look up in PATH."""
    qemu: str = "qemu-system-x86_64"
    """The QEMU program: a path, or a name to look up in PATH."""
    virtiofsd: str = "virtiofsd"
    """The virtiofsd program, which QEMU needs for shared directories: a path, or a name."""
    qemu_machine: Literal["auto", "microvm", "q35"] = "auto"
    """The machine that QEMU emulates on x86-64; auto: microvm where KVM is usable and it fits."""
    kvm: Literal["probe", "on", "off"] = "probe"
    """Whether KVM is usable: found out by running a tiny guest, or simply said."""
    start_timeout: float = Field(default=30.0, gt=0, le=3600)
    """How long a VMM may take until it answers on its control socket."""
    control_timeout: float = Field(default=10.0, gt=0, le=600)
    """How long a VMM that runs may take to answer one request."""
    stop_timeout: float = Field(default=90.0, gt=0, le=86400)
    """How long Stop waits for the guest when its caller names no time."""
    shutdown_timeout: float = Field(default=20.0, gt=0, le=3600)
    """How long the VMs get to end when the host shuts down."""
    limits: LimitSettings = Field(default_factory=LimitSettings)
    """What one user, and all together, can take; each a table with `per_user` and `in_all`."""
    notify_port: int = Field(default=9277, ge=1024, lt=(1 << 32) - 1)
    """The vsock port of the host at which guests report how they are."""
    console_log_bytes: int = Field(default=256 * 1024, ge=4096, le=1 << 24)
    """How much of each VM's console is kept, at the most 16 MiB. The oldest goes first."""


def load_settings(path: Path | None) -> Settings:
    """Read a settings file; None or an absent default file means the defaults.

    Raises SettingsError.
    """
    if path is None:
        return Settings()
    try:
        return Settings.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        )
        raise SettingsError(f"{path}: {problems}") from None
