"""The commands of a VM's life: create, start, suspend, resume, stop, kill, remove."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click

from ..client import VM, VMBus
from .common import Options, command, connect, find, names_argument, progress, say
from .exits import FAILED
from .failures import EXPECTED, Failure, explain
from .spec import Wanted, config_options
from .text import clean, print_json


@command()
@config_options
@click.option("--collect", is_flag=True, help="Forget the VM when it dies.")
async def create(options: Options, collect: bool, **asked: Any) -> None:
    """Create a VM and print its name. It is not started."""
    wanted = Wanted(collect=collect or None, **asked)
    async with connect(options) as bus:
        vm = await (await wanted.create(bus)).properties()
    if options.json:
        print_json({"id": vm.id, "name": vm.name, "cid": vm.cid, "path": vm.path})
    else:
        click.echo(clean(vm.name))


@command()
@names_argument
async def start(options: Options, names: tuple[str, ...]) -> int:
    """Start VMs."""
    return await _for_each(options, names, "Starting", VM.start)


timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long a guest may take before it is killed.  [default: as the service is set]",
)


@command()
@names_argument
@timeout_option
async def stop(options: Options, names: tuple[str, ...], timeout: float | None) -> int:
    """Stop VMs in good order."""
    return await _for_each(options, names, "Stopping", lambda vm: vm.stop(timeout))


@command(name="shutdown-all")
@timeout_option
async def shutdown_all(options: Options, timeout: float | None) -> None:
    """Stop all VMs, whoever created them.

    In good order, as for a shutdown of the host.
    """
    async with connect(options) as bus:
        with progress("Stopping all VMs"):
            await bus.stop_all(timeout)


@command()
@names_argument
async def suspend(options: Options, names: tuple[str, ...]) -> int:
    """Stop the vCPUs of VMs, until resume."""
    return await _for_each(options, names, "Suspending", VM.suspend)


@command()
@names_argument
async def resume(options: Options, names: tuple[str, ...]) -> int:
    """Let suspended VMs go on."""
    return await _for_each(options, names, "Resuming", VM.resume)


@command()
@names_argument
async def kill(options: Options, names: tuple[str, ...]) -> int:
    """Kill VMs at once."""
    return await _for_each(options, names, "Killing", VM.kill)


@command()
@names_argument
async def remove(options: Options, names: tuple[str, ...]) -> int:
    """Forget VMs that are not running, with their logs."""
    return await _for_each(options, names, "Removing", VM.remove)


async def _for_each(
    options: Options, names: Sequence[str], doing: str, act: Callable[[VM], Awaitable[None]]
) -> int:
    """Do the same with several VMs at once, and tell of every failure."""
    names = list(dict.fromkeys(names))
    async with connect(options) as bus:
        with progress(clean(f"{doing} {', '.join(names)}")):
            results = await asyncio.gather(*(_one(options, bus, name, act) for name in names))
    for failure in filter(None, results):
        say(failure.line())
    if options.json:
        print_json([_result(*each) for each in zip(names, results, strict=True)])
    return FAILED if any(results) else 0


async def _one(
    options: Options, bus: VMBus, name: str, act: Callable[[VM], Awaitable[None]]
) -> Failure | None:
    try:
        await act(await find(bus, name))
    except EXPECTED as error:
        return explain(name, error, user=options.user)
    return None


def _result(name: str, failure: Failure | None) -> dict[str, Any]:
    return {"name": name, "ok": failure is None, "error": failure and failure.reason}


COMMANDS = (create, start, suspend, resume, stop, kill, remove, shutdown_all)
