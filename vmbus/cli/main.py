"""The command line itself: the group of commands, and how every one of them ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import click

from .. import __version__
from . import act, console, exits, logs, monitor, remote, run, show, tune, vsock, wait
from .common import Ended, Options, global_options, say
from .failures import Failure
from .text import clean


class _Commands(click.Group):
    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See click.Group; what is for another machine is taken apart there."""
        options = context.ensure_object(Options)
        if options.host and not context.resilient_parsing:
            remote.run_on(options.host, [*options.given(), *args])
        return super().resolve_command(context, args)


def _store_host(context: click.Context, parameter: click.Parameter, host: str | None) -> None:
    if host is not None:
        if not host or host.startswith("-"):
            raise click.BadParameter(f"{host!r} is not [USER@]HOST", context, parameter)
        context.ensure_object(Options).host = host


@click.group(
    name="vmbusctl",
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="NAME is the name of a VM, its id, its object path, or cid:N by its vsock.",
)
@click.option(
    "-H",
    "--host",
    metavar="[USER@]HOST",
    expose_value=False,
    callback=_store_host,
    help="Run the command on another machine, by ssh: files that it names are that machine's. "
    "Stands before the command.",
)
@global_options
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Control the virtual machines of vmbus."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(exits.MISUSED)


for _module in (show, monitor, act, run, wait, console, logs, vsock, tune):
    for _command in _module.COMMANDS:
        cli.add_command(_command)


def main() -> None:
    """Run vmbusctl, and exit."""
    _complete_standard_streams()
    status = _run()
    try:
        sys.stdout.flush()
    except (AttributeError, BrokenPipeError):
        status = _broken_pipe()
    sys.exit(status)


def _run() -> int:
    try:
        return int(cli.main(prog_name="vmbusctl", standalone_mode=False) or 0)
    except Ended as ended:
        return ended.status
    except Failure as failure:
        say(failure.line())
        return exits.FAILED
    except click.UsageError as error:
        say(_usage_line(error))
        return exits.MISUSED
    except click.ClickException as error:
        say(clean(f"vmbusctl: {error.format_message()}"))
        return exits.FAILED
    except (KeyboardInterrupt, click.Abort):
        return exits.BY_SIGNAL + signal.SIGINT
    except Exception as error:
        say(clean(f"vmbusctl: internal error: {type(error).__name__}: {error}"))
        return exits.FAILED


def _usage_line(error: click.UsageError) -> str:
    where = error.ctx.command_path if error.ctx is not None else "vmbusctl"
    command = where.removeprefix("vmbusctl").strip()
    text = error.format_message().rstrip(".")
    told = f"{command}: {text}" if command else text
    return clean(f'vmbusctl: {told} (see "{where} --help")')


def _broken_pipe() -> int:
    """Nobody reads on: end quietly, also when Python empties its buffers at the very end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return exits.BY_SIGNAL + signal.SIGPIPE


def _complete_standard_streams() -> None:
    """Fill descriptors 0 to 2 where they are closed, or a socket of ours would be taken for one."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
