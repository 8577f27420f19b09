"""The options that say what a VM is made of, as create and run take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..client import Disk


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


_FILE = click.Path(dir_okay=False)
_OPTIONS = (
    click.option("--name", "vm_name", metavar="NAME", help="Name of the VM.  [default: vm-ID]"),
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
)


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a config."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def config_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `VMBus.create` for what these options gave."""
    return {"name" if key == "vm_name" else key: value for key, value in arguments.items()}
