"""The command run: a VM in the foreground, from its creation to its death."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import click

from ..client import VM, Config, VMBus
from ..errors import InvalidState, StartFailed, UnknownObject
from ..events import Changed, Death, Died, Events
from ..systemd.notify import Manager
from . import exits
from .comeback import GONE, Comeback, console_again
from .common import Ended, Options, command, connect, hear_signals, say
from .console import Joint
from .failures import EXPECTED, explain
from .spec import Wanted, config_options
from .terminal import takes_keys
from .text import clean

#: Seconds that a VM may take to go after a failure.
_DISCARD_TIMEOUT = 10.0
_T = TypeVar("_T")


@command(epilog="\b\n" + exits.table())
@config_options
@click.option(
    "--collect/--keep", default=None, help="Forget the VM when it ends, as by default, or keep it."
)
async def run(options: Options, **asked: Any) -> int:
    """Create a VM and run it in the foreground, joined to its console.

    At a terminal all keys go to the guest, and ^] leaves the VM running by itself. Otherwise
    stdin is copied to the guest, and the VM ends with vmbusctl, even if that is killed.

    SIGTERM, SIGINT or SIGHUP stops the VM in good order, a second one kills it. When the service is
    restarted meanwhile, the VM is attended again.

    A service manager is told when the VM runs; or, if the guest has a time to get ready in, when it
    says that it is.
    """
    wanted = Wanted(**asked)
    config = wanted.config
    collect = config.setdefault("collect", "on-death") == "on-death"
    # With nobody to leave it, a VM that goes on without us would be forgotten by all.
    config.setdefault("kill_on_disconnect", not takes_keys())
    async with connect(options) as bus:
        vm = await wanted.create(bus)
        attendance = _Attendance(options, bus, vm, config)
        try:
            return await attendance.run()
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise explain(attendance.name, error, user=options.user) from error
        finally:
            if collect and not attendance.left:
                await _discard(vm)


class _Attendance:
    """One VM and its console, while vmbusctl is there."""

    def __init__(self, options: Options, bus: VMBus, vm: VM, config: Config) -> None:
        self.name = vm.path
        #: Whether the user has left the VM to itself.
        self.left = False
        self._options = options
        self._bus = bus
        self._vm = vm
        self._config = config
        self._manager = Manager.from_environment()
        self._service = Comeback(self.name)
        self._last_words = ""
        self._death: Death | None = None
        self._signals = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Attend the VM until it has died, or the user leaves it. Returns the exit status."""
        self.name = self._service.name = (await self._vm.properties()).name
        try:
            async with await self._bus.events() as events:
                self._spawn(self._listen(events))
                joint = Joint(await self._vm.open_console(), self._console_again)
                begin = asyncio.Event()
                attending = self._spawn(joint.attend(begin))
                living = self._spawn(self._live(begin, attending))
                hear_signals(self._on_signal)
                either: set[asyncio.Future[Any]] = {living, self._failed}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not living.done():
                    self._failed.result()
                return self._tell(await living)
        finally:
            await self._end_tasks()
            self._manager.close()

    async def _live(self, begin: asyncio.Event, attending: asyncio.Task[bool]) -> Death | None:
        # Asked for before Start, since a VM that is collected can't be asked after its death.
        death = self._spawn(self._until_dead())
        with contextlib.suppress(StartFailed):
            await self._vm.start()
            if takes_keys():
                how = "kills it" if self._bound else "leaves it running by itself"
                say(f"vmbusctl: {clean(self.name)}: runs; ^] {how}")
            begin.set()
            if not self._config.get("ready_timeout_usec"):
                self._manager.ready()
        try:
            left = await attending
        except OSError as error:
            # The terminal is gone. What becomes of the VM then is for the SIGHUP to say.
            if error.errno != errno.EIO:
                raise
            left = False
        if left:
            if not self._bound:
                self.left = True
                return None
            await self._service.insist(self._vm.kill)
        return await death

    @property
    def _bound(self) -> bool:
        """Whether the VM can't go on without us."""
        return bool(self._config.get("kill_on_disconnect"))

    async def _console_again(self) -> socket.socket | None:
        return await console_again(self._vm, self._service)

    async def _until_dead(self) -> Death:
        try:
            return await self._service.insist(self._vm.wait)
        except GONE:
            # It has died while the service was away, and is collected.
            if self._death is None:
                raise
            return self._death

    async def _listen(self, events: Events) -> None:
        async for event in events:
            self._service.heard(event)
            if isinstance(event, Changed) and event.path == self._vm.path:
                self._last_words = event.values.get("last_words", self._last_words)
                self._tell_manager(event.values)
            elif isinstance(event, Died) and event.path == self._vm.path:
                self._death = event.death

    def _tell_manager(self, values: Mapping[str, Any]) -> None:
        if status := values.get("status_text") or values.get("state"):
            self._manager.status(status)
        on_time = values.get("payload_state") in ("ready", "finished")
        if on_time and self._config.get("ready_timeout_usec"):
            self._manager.ready()

    def _tell(self, death: Death | None) -> int:
        if death is None:
            say(f'vmbusctl: {clean(self.name)}: left running; see "vmbusctl console"')
            return 0
        status = exits.exit_status(death.reason)
        words = self._last_words if status else ""
        self._manager.status(f"died: {death.reason} ({death.status})")
        if self._options.json:
            told = {"name": self.name, "reason": death.reason, "status": death.status}
            say(json.dumps({**told, "last_words": words}))
        else:
            line = f"vmbusctl: {self.name}: died: {death.reason} ({death.status})"
            say(clean(f"{line}: {words}" if words else line))
        return status

    # Signals

    def _on_signal(self, number: int) -> None:
        """Stop the VM; the second time kill it; the third time give up on it."""
        self._signals += 1
        if self._signals > 2:
            self._fail(Ended(exits.BY_SIGNAL + number))
            return
        self._spawn(self._end(self._vm.stop if self._signals == 1 else self._vm.kill))

    async def _end(self, end: Callable[[], Awaitable[None]]) -> None:
        try:
            # It may be dead and forgotten already.
            with contextlib.suppress(UnknownObject):
                await self._service.insist(end)
        except EXPECTED as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    # Tasks

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failed.done():
            self._failed.exception()


async def _discard(vm: VM) -> None:
    """Leave nothing of a VM behind, as far as that is possible."""
    with contextlib.suppress(*EXPECTED):
        async with asyncio.timeout(_DISCARD_TIMEOUT):
            with contextlib.suppress(InvalidState):
                await vm.remove()
                return
            await vm.kill()
            await vm.remove()


COMMANDS = (run,)
