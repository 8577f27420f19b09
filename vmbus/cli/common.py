"""What all commands share: global options, a connection, names and their completion, the end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate

import click
from click.shell_completion import CompletionItem

from ..client import VM, VMBus
from . import agent, exits
from .failures import EXPECTED, explain, no_bus

_COMPLETION_TIMEOUT = 1.0
#: Signals that come within so many seconds are one: timeout(1) sends each twice.
_SAME_SIGNAL = 0.2


@dataclass
class Options:
    """The global options. They may stand before the command and after it."""

    user: bool = False
    json: bool = False
    legend: bool = True
    ask_password: bool = True
    #: Another machine, on which all of it is to be done.
    host: str = ""

    def given(self) -> list[str]:
        """The flags that were given, as arguments."""
        before = Options()
        return [flag for flag, field, _ in _FLAGS if getattr(self, field) != getattr(before, field)]


class Ended(Exception):
    """The command is over, with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


Action = Callable[Concatenate[Options, ...], Coroutine[Any, Any, int | None]]


_FLAGS = (
    ("--user", "user", "Talk to the service on the session bus, not on the system bus."),
    ("--json", "json", "Print JSON."),
    ("--no-legend", "legend", "No header above tables."),
    ("--no-ask-password", "ask_password", "Let nobody be asked for a password."),
)


def global_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the global options to a command, or to the group of them."""
    for flag, field, help in reversed(_FLAGS):
        function = click.option(
            flag, is_flag=True, expose_value=False, callback=_store(field), help=help
        )(function)
    return function


def _store(field: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def store(context: click.Context, _: click.Parameter, given: bool) -> None:
        options = context.ensure_object(Options)
        if given:
            setattr(options, field, not getattr(Options, field))

    return store


def command(**attributes: Any) -> Callable[[Action], click.Command]:
    """Make a command of a coroutine function, whose result is the exit status; None is 0."""

    def decorate(action: Action) -> click.Command:
        @functools.wraps(action)
        def run(**arguments: Any) -> None:
            context = click.get_current_context()
            options = context.ensure_object(Options)
            what = arguments.get("name") or str(context.info_name)
            try:
                status = asyncio.run(_until_signalled(action(options, **arguments)))
            except BrokenPipeError:
                raise Ended(exits.BY_SIGNAL + signal.SIGPIPE) from None
            except EXPECTED as error:
                raise explain(what, error, user=options.user) from error
            raise Ended(status or 0)

        make: Callable[[Callable[..., Any]], click.Command] = click.command(**attributes)
        return make(global_options(run))

    return decorate


async def _until_signalled(work: Coroutine[Any, Any, int | None]) -> int | None:
    """Run a command; a signal cancels it, so that it tidies up first."""
    caught: list[int] = []
    task = asyncio.ensure_future(work)

    def end(number: int) -> None:
        caught.append(number)
        task.cancel()

    hear_signals(end)
    try:
        return await task
    except asyncio.CancelledError:
        return exits.BY_SIGNAL + caught[0] if caught else exits.FAILED


def hear_signals(handler: Callable[[int], None]) -> None:
    """Call the handler for each signal that ends programs."""
    loop = asyncio.get_running_loop()
    last = -_SAME_SIGNAL

    def hear(number: int) -> None:
        nonlocal last
        before, last = last, loop.time()
        if last - before >= _SAME_SIGNAL:
            handler(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, hear, number)


@contextlib.asynccontextmanager
async def connect(options: Options, *, asks: bool = True) -> AsyncIterator[VMBus]:
    """The service. asks: whether whoever sits at a terminal may be asked for a password."""
    interactive = asks and options.ask_password and not options.user and agent.is_needed()
    async with contextlib.AsyncExitStack() as stack:
        if interactive:
            await stack.enter_async_context(agent.text_agent())
        try:
            connecting = VMBus.connect(user=options.user, interactive=interactive)
            bus = await stack.enter_async_context(connecting)
        except OSError as error:
            what = str(click.get_current_context().info_name)
            raise no_bus(what, error, user=options.user) from error
        yield bus


async def find(bus: VMBus, which: str) -> VM:
    """The VM with that name, id, object path, or "cid:N". Raises NoSuchVM."""
    kind, _, cid = which.partition(":")
    if kind == "cid" and cid.isascii() and cid.isdigit() and int(cid) < 1 << 32:
        return await bus.vm_by_cid(int(cid))
    return await bus.vm(which)


def say(text: str) -> None:
    """Tell the user something that isn't the command's result."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Show on a terminal that something is going on."""
    if not os.isatty(2) or sys.stderr is None:
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(text)):
        yield


def complete_names(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The names of VMs that begin so. Never starts the service, never complains."""
    options = context.ensure_object(Options)
    if options.host:
        return []
    try:
        names = asyncio.run(_names(user=options.user))
    except Exception:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


async def _names(*, user: bool) -> list[str]:
    async with asyncio.timeout(_COMPLETION_TIMEOUT), VMBus.connect(user=user) as bus:
        return [vm.name for vm in await bus.vms()] if await bus.running() else []


def name_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add NAME: one VM."""
    return click.argument("name", shell_complete=complete_names)(function)


def names_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add NAME...: one VM or several."""
    return click.argument(
        "names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_names
    )(function)
