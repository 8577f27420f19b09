"""vmbusd: where the parts are put together, served, and shut down."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from . import __version__
from .bus.authority import Authority, Polkit, SameUser
from .bus.connection import Connection, RemoteError, bus_address
from .bus.contract import BUS_NAME
from .bus.gate import Gate
from .bus.methods import Service
from .bus.objects import Objects
from .bus.peers import Peers
from .bus.wire import Message
from .model.limits import Limits
from .model.record import Store
from .model.registry import Registry
from .model.surroundings import Surroundings
from .privilege import Privileged, check_unprivileged, gain_none
from .settings import Settings, SettingsError, load_settings
from .vmm.host import Host

log = logging.getLogger("vmbusd")

SETTINGS_FILE = Path("/etc/vmbus/vmbusd.toml")
_DO_NOT_QUEUE = 4
_PRIMARY_OWNER = 1


class Failure(Exception):
    """Why the service can't serve, for people."""


async def serve(settings: Settings, directory: Path, *, user: bool) -> None:
    """Own the bus name and serve until SIGTERM, SIGINT, or the end of the bus. Raises Failure."""
    address = bus_address(user=user)
    try:
        connection = await Connection.open(address)
    except (OSError, TimeoutError) as error:
        raise Failure(f"can't connect to the bus at {address}: {error}") from error
    async with contextlib.aclosing(connection):
        await _serve_on(connection, settings, directory, user=user)


async def _serve_on(
    connection: Connection, settings: Settings, directory: Path, *, user: bool
) -> None:
    host = Host(settings)
    objects = Objects(connection, __version__)
    limits = Limits(settings.limits)
    registry = Registry(
        Surroundings(settings, objects, Store(directory / "vm")),
        host,
        limits,
        image_directories=None if user else settings.image_directories,
    )
    peers = Peers(connection)
    authority: Authority = SameUser(peers) if user else Polkit(connection, peers)
    gate = Gate(connection, Service(objects, registry, settings), authority, peers, limits)
    # Who calls in the moment between the name and the VMs is answered when they are there.
    early: list[Message] = []
    connection.handler = early.append
    told = _told_to_end()
    await peers.watch()
    with _alone_in(directory):
        await _own_name(connection)
        await _restore(registry, connection, directory)
        registry.go_on()
        connection.handler = gate.handle
        for message in early:
            gate.handle(message)
        finding = asyncio.create_task(_find_vmms(host, objects), name="find-vmms")
        try:
            await _watch_requesters(registry, peers)
            await _first_of(told, connection)
        finally:
            registry.close()
            await gate.aclose()
            await registry.let_go()
            finding.cancel()
            await asyncio.wait({finding})
            await host.aclose()


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Have the runtime directory to ourselves, whatever bus another service may be on."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failure(f"can't use the runtime directory {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Failure(f"the runtime directory {directory} is used by another vmbusd") from error
        yield
    finally:
        os.close(lock)


async def _own_name(connection: Connection) -> None:
    try:
        (answer,) = await connection.call_bus("RequestName", "su", [BUS_NAME, _DO_NOT_QUEUE])
    except RemoteError as error:
        raise Failure(f"the bus does not let us own {BUS_NAME}: {error.text}") from error
    except OSError as error:
        raise Failure(f"the connection to the bus is gone: {error}") from error
    if answer != _PRIMARY_OWNER:
        raise Failure(f"{BUS_NAME} is owned by another process already")


async def _restore(registry: Registry, connection: Connection, directory: Path) -> None:
    """Take over what the service before us left. Nothing is awaited once the VMs are there."""
    try:
        (bus,) = await connection.call_bus("GetId", "", [])
        registry.restore(bus, {})
    except OSError as error:
        raise Failure(f"can't use the runtime directory {directory}: {error.strerror}") from error


async def _watch_requesters(registry: Registry, peers: Peers) -> None:
    """VMs that go with the connection that created them still do, or have to go now."""
    for vm in registry:
        if vm.config.kill_on_disconnect and not vm.over:
            connection = vm.identity.requester.connection
            registry.goes_with(vm, await peers.leaves(connection))


async def _find_vmms(host: Host, objects: Objects) -> None:
    objects.available_vmms(await host.available())


def _told_to_end() -> asyncio.Event:
    """Set by SIGTERM and SIGINT. In place before the name is owned: who sees that may send them."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


async def _first_of(told: asyncio.Event, connection: Connection) -> None:
    telling = asyncio.create_task(told.wait())
    either: set[asyncio.Future[Any]] = {telling, connection.closed}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    if connection.closed.done():
        raise Failure(f"the connection to the bus is gone: {connection.closed.result()}")
    log.info("told to end")


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
@click.option("--verbose", "-v", is_flag=True, help="Log what is going on.")
@click.version_option(__version__)
def main(
    user: bool, config: Path | None, runtime_dir: Path | None, allow_root: bool, verbose: bool
) -> None:
    """Run virtual machines for callers on D-Bus."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        if not user and not allow_root:
            check_unprivileged()
        _prepare_process()
        asyncio.run(serve(_settings(config), _runtime_directory(runtime_dir, user=user), user=user))
    except (Failure, Privileged, SettingsError) as error:
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
