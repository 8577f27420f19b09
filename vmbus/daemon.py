"""vmbusd: the program. Its options, and what its process has to be like."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from pathlib import Path

import click

# Or pydantic would look through every package that is installed for plugins of its own.
os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"

from . import __version__
from .privilege import Privileged, check_unprivileged, gain_none
from .serve import Failure, serve
from .settings import Settings, SettingsError, load_settings
from .systemd.journal import journal_handler

log = logging.getLogger("vmbusd")

SETTINGS_FILE = Path("/etc/vmbus/vmbusd.toml")


def _runtime_directory(given: Path | None, *, user: bool) -> Path:
    if given is not None:
        return given
    if not user:
        return Path("/run/vmbus")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base:
        raise Failure("XDG_RUNTIME_DIR is not set; give --runtime-dir")
    return Path(base) / "vmbus"


def _settings(given: Path | None) -> Settings:
    default = SETTINGS_FILE if SETTINGS_FILE.exists() else None
    return load_settings(given or default)


def _prepare_process() -> None:
    # Inherited from a parent that ignored it, no child's status could ever be told.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Nor is what a parent left open for us, its lock files say, any business of a VMM.
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, fd <= 2)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0o077)
    gain_none()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--user", is_flag=True, help="Serve the session bus instead of the system bus.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Settings file.  [default: {SETTINGS_FILE}]",
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="State and sockets.  [default: /run/vmbus]",
)
@click.option(
    "--allow-root",
    is_flag=True,
    help="Run with privileges on the system bus all the same.",
)
@click.option(
    "--exit-on-idle",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End when nothing was asked for so long and no VM runs; the bus starts it again.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log what is going on.")
@click.version_option(__version__)
def main(
    user: bool,
    config: Path | None,
    runtime_dir: Path | None,
    allow_root: bool,
    exit_on_idle: float | None,
    verbose: bool,
) -> None:
    """Run virtual machines for callers on D-Bus."""
    journal = journal_handler("vmbusd")
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        handlers=[journal or logging.StreamHandler(sys.stderr)],
    )
    try:
        if not user and not allow_root:
            check_unprivileged()
        _prepare_process()
        directory = _runtime_directory(runtime_dir, user=user)
        asyncio.run(serve(_settings(config), directory, user=user, exit_on_idle=exit_on_idle))
    except (Failure, Privileged, SettingsError) as error:
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
