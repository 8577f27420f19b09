"""What a VM is made of, as create and run are told: by options, and by a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
from click.shell_completion import CompletionItem

from ..client import VM, Config, Disk, Net, SharedDir, VMBus
from .declared import Declaration


def _disks(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Disk]:
    return [_disk(context, param, value) for value in values]


def _disk(context: click.Context, param: click.Parameter, value: str) -> Disk:
    """Take FILE[,writable][,direct][,id=ID] apart; the file's name may have commas of its own."""
    disk = Disk(image=value)
    file, comma, last = value.rpartition(",")
    while comma and _apply(disk, last):
        disk["image"] = file
        file, comma, last = file.rpartition(",")
    if comma and not Path(str(disk["image"])).exists():
        raise click.BadParameter(f"{last!r} is none of writable, direct, id=ID", context, param)
    return disk


def _complete_file(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _apply(disk: Disk, option: str) -> bool:
    """Take one option of a disk; False if it is none."""
    if option == "writable":
        disk["writable"] = True
    elif option == "direct":
        disk["direct"] = True
    elif option.startswith("id="):
        disk["id"] = option.removeprefix("id=")
    else:
        return False
    return True


def _nets(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Net]:
    return [_net(context, param, value) for value in values]


def _net(context: click.Context, param: click.Parameter, value: str) -> Net:
    """Take TAP[,mac=ADDRESS] apart."""
    tap, *options = value.split(",")
    net = Net(tap=tap)
    for option in options:
        if not option.startswith("mac="):
            raise click.BadParameter(f"{option!r} is not mac=ADDRESS", context, param)
        net["mac"] = option.removeprefix("mac=")
    return net


def _shares(
    context: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[SharedDir]:
    return [_share(context, param, value) for value in values]


def _share(context: click.Context, param: click.Parameter, value: str) -> SharedDir:
    """Take DIR:TAG[,writable] apart; a tag has neither colons nor commas."""
    source, _, rest = value.rpartition(":")
    tag, *options = rest.split(",")
    if not source or not tag:
        raise click.BadParameter(f"{value!r} is not DIR:TAG[,writable]", context, param)
    if options not in ([], ["writable"]):
        raise click.BadParameter(f"{','.join(options)!r} is not writable", context, param)
    return SharedDir(source=source, tag=tag, writable=bool(options))


def _if_given(meaning: bool) -> Callable[[click.Context, click.Parameter, bool], bool | None]:
    """What a flag means where it is given; else the service decides."""
    return lambda _, __, given: meaning if given else None


def _microseconds(_: click.Context, __: click.Parameter, seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e6)


_FILE = click.Path(dir_okay=False)
_OPTIONS = (
    click.option(
        "--config",
        "file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="What the VM is made of, in TOML, where no option says otherwise.",
    ),
    click.option(
        "--name",
        "vm_name",
        metavar="NAME",
        help="Name of the VM.  [default: that of the file, or else vm-ID]",
    ),
    click.option("--vmm", type=click.Choice(["auto", "crosvm", "qemu"]), help="Who runs it."),
    click.option("--kernel", type=_FILE, metavar="FILE", help="Kernel to boot."),
    click.option("--initrd", type=_FILE, metavar="FILE", help="Initial RAM disk of the kernel."),
    click.option("--bios", type=_FILE, metavar="FILE", help="Firmware, in place of a kernel."),
    click.option("--params", metavar="STR", help="Command line of the kernel."),
    click.option("--memory", "memory_mib", type=int, metavar="MIB", help="Memory in MiB."),
    click.option("--cpus", type=int, metavar="N", help="Number of CPUs."),
    click.option(
        "--disk",
        "disks",
        multiple=True,
        callback=_disks,
        shell_complete=_complete_file,
        metavar="FILE[,writable][,id=ID][,direct]",
        help="A disk; may be given again.",
    ),
    click.option(
        "--net",
        multiple=True,
        callback=_nets,
        metavar="TAP[,mac=ADDRESS]",
        help="A network device on a tap; may be given again.",
    ),
    click.option(
        "--share",
        "shared_dirs",
        multiple=True,
        callback=_shares,
        shell_complete=_complete_file,
        metavar="DIR:TAG[,writable]",
        help="A directory that the guest mounts by its tag; may be given again.",
    ),
    click.option("--vsock/--no-vsock", default=None, help="Whether it gets a vsock device."),
    click.option(
        "--protected",
        is_flag=True,
        callback=_if_given(True),
        help="Keep its memory from the host.",
    ),
    click.option(
        "--no-balloon",
        "balloon",
        is_flag=True,
        callback=_if_given(False),
        help="Without a memory balloon.",
    ),
    click.option(
        "--ready-timeout",
        "ready_timeout_usec",
        type=click.FloatRange(min=0, max=1e9),
        callback=_microseconds,
        metavar="SECONDS",
        help="Kill it unless its guest reports ready in time.",
    ),
    click.option(
        "--gdb",
        "gdb_port",
        type=int,
        metavar="PORT",
        help="Let a debugger join at this port of 127.0.0.1, whoever runs it.",
    ),
)


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a config."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


class Wanted:
    """A VM that is asked for: by options, else by the file of --config, else by default."""

    def __init__(self, file: Path | None, collect: bool | None, **options: Any) -> None:
        """Raises Failure. collect: whether to forget it when it dies, if that was said."""
        self._declaration = Declaration(file) if file else None
        options["name"] = options.pop("vm_name")
        if collect is not None:
            options["collect"] = "on-death" if collect else "manual"
        given = {key: value for key, value in options.items() if value not in (None, [])}
        declared = self._declaration.config if self._declaration else {}
        self.config = cast(Config, {**declared, **given})

    async def create(self, bus: VMBus) -> VM:
        """Raises Failure where the file is to blame, else what VMBus.create does."""
        with self._declaration.blamed() if self._declaration else contextlib.nullcontext():
            return await bus.create(**self.config)
