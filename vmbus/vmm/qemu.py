"""QEMU: its command line, and its control by QMP."""

from __future__ import annotations

import asyncio
import logging
import platform
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

from ..errors import ControlFailed, TimedOut
from ..reasons import Reason
from ..spec import Disk, VMConfig
from .base import CONTROL_TIMEOUT, Command, Launch, connect, last_line, listen, readable_again

#: Seconds that a VMM which has ended gets for its last events to be read.
_LAST_EVENTS = 1.0
#: A VMM that sends more than this is not telling how it ended.
_MAX_EVENTS = 64
_ENDS = ("SHUTDOWN", "GUEST_PANICKED", "WATCHDOG")
_MICROVM_PARAMS = "reboot=t"
_SHUTDOWN_REASONS = {
    "guest-shutdown": Reason.SHUTDOWN,
    "guest-reset": Reason.REBOOT,
    "host-qmp-system-reset": Reason.REBOOT,
    "subsystem-reset": Reason.REBOOT,
    "guest-panic": Reason.GUEST_PANIC,
    "host-qmp-quit": Reason.SHUTDOWN,
    "host-error": Reason.CRASH,
    "host-signal": Reason.SIGNAL,
}

# The library tells at length of every end of file; for us that is a VM's ordinary end.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Qemu:
    """The driver. `program` is the path of qemu-system-*."""

    name = "qemu"

    def __init__(self, program: str, machine: str = "auto") -> None:
        self._program = program
        self._machine = machine

    def _is_microvm(self, launch: Launch) -> bool:
        """Whether the smallest machine fits: it has no firmware, and needs the clock of KVM.

        Emulated, a microvm has no clock that a kernel could measure its time-stamp counter by on a
        busy host, and often hangs for ever in its boot.
        """
        if launch.config.bios is not None or platform.machine() != "x86_64":
            return False
        return self._machine == "microvm" or (self._machine == "auto" and launch.kvm)

    def prepare(self, launch: Launch) -> Command:
        """See Driver.prepare."""

        async def answer() -> QemuControl:
            sock = await connect(launch.directory, socket.SOCK_STREAM)
            return await QemuControl.greet(sock)

        command = Command([], answer)
        try:
            listener = listen(launch.directory, socket.SOCK_STREAM)
            microvm = self._is_microvm(launch)
            bus = "device" if microvm else "pci"
            command.argv = [self._program, *_machine(launch, microvm=microvm), *_BARE]
            command.argv += _monitor(command, command.own_fd(listener.detach()))
            command.argv += _console(command, launch.console)
            for index, disk in enumerate(launch.config.disks):
                command.argv += _disk(command, index, disk, bus)
            command.argv += _boot(launch.config, command, microvm=microvm)
        except BaseException:
            command.close()
            raise
        return command

    def told_by(self, status: int, stderr: str) -> Reason | None:
        """See Driver.told_by: QEMU says it by events, and exits 1 where it fails."""
        return Reason.CRASH if status > 0 else None

    def last_words(self, stderr: str) -> str:
        """See Driver.last_words."""
        errors = "\n".join(
            line
            for line in stderr.splitlines()
            if ": warning: " not in line and ": terminating on signal " not in line
        )
        return last_line(errors)


_BARE = [
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    "-device",
    "pvpanic",
]


def _machine(launch: Launch, *, microvm: bool) -> list[str]:
    config = launch.config
    if microvm:
        machine = "microvm,acpi=on"
    else:
        machine = "q35" if platform.machine() == "x86_64" else "virt"
    accel = "kvm" if launch.kvm else "tcg"
    return [
        "-name",
        f"guest={launch.name}",
        "-machine",
        f"{machine},accel={accel}",
        "-cpu",
        "host" if launch.kvm else "max",
        "-m",
        f"{config.memory_mib}M",
        "-smp",
        str(config.cpus),
    ]


def _monitor(command: Command, listener: int) -> list[str]:
    command.pass_fd(listener)
    return [
        "-chardev",
        f"socket,id=control,fd={listener},server=on,wait=off",
        "-mon",
        "chardev=control,mode=control",
    ]


def _console(command: Command, fd: int) -> list[str]:
    command.pass_fd(fd)
    return ["-chardev", f"socket,id=console,fd={fd}", "-serial", "chardev:console"]


def _disk(command: Command, index: int, disk: Disk, bus: str) -> list[str]:
    command.pass_fd(disk.image.fd)
    read_only = "off" if disk.writable else "on"
    # An fd set is matched by its open mode: a file open for writing must be opened so, and is
    # made read-only one layer above.
    file_read_only = "off" if disk.image.writable else "on"
    cache = f"cache.direct={'on' if disk.direct else 'off'}"
    serial = "" if disk.id is None else f",serial={disk.id}"
    return [
        "-add-fd",
        f"fd={disk.image.fd},set={index}",
        "-blockdev",
        f"driver=file,node-name=file{index},filename=/dev/fdset/{index}"
        + f",read-only={file_read_only},{cache}",
        "-blockdev",
        f"driver=raw,node-name=disk{index},file=file{index},read-only={read_only},{cache}",
        "-device",
        f"virtio-blk-{bus},drive=disk{index}{serial}",
    ]


def _boot(config: VMConfig, command: Command, *, microvm: bool) -> list[str]:
    if config.bios is not None:
        return ["-bios", readable_again(config.bios, command)]
    assert config.kernel is not None
    boot = ["-kernel", readable_again(config.kernel, command)]
    if config.initrd is not None:
        boot += ["-initrd", readable_again(config.initrd, command)]
    # A microvm has nothing that a kernel would by itself reset it with, save a triple fault. What
    # the caller says of it comes later on the line, and so goes first.
    params = f"{_MICROVM_PARAMS} {config.params}".rstrip() if microvm else config.params
    return [*boot, "-append", params] if params else boot


class QemuControl:
    """A QMP session with one QEMU."""

    def __init__(self, client: QMPClient, events: EventListener) -> None:
        self._client = client
        self._events = events

    @classmethod
    async def greet(cls, sock: socket.socket) -> QemuControl:
        """Open the session, which QEMU takes up once its machine runs. Raises ControlFailed."""
        client = QMPClient()
        events = EventListener(_ENDS, lambda _: len(events.history) < _MAX_EVENTS)
        client.register_listener(events)
        try:
            await client.connect(sock)
            return cls(client, events)
        except QMPError as error:
            raise ControlFailed(f"QEMU's control socket: {error}") from None

    async def request(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command. Raises ControlFailed or TimedOut."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise TimedOut(f"QEMU did not answer in {CONTROL_TIMEOUT:g} s") from None
        except ExecuteError as error:
            raise ControlFailed(f"QEMU answered: {str(error)[:300]}") from None
        except QMPError as error:
            raise ControlFailed(f"QEMU's control socket: {error}") from None

    async def power_button(self) -> None:
        """See Control.power_button."""
        await self.request("system_powerdown")

    async def quit(self) -> None:
        """See Control.quit."""
        await self.request("quit")

    async def aclose(self) -> Reason | None:
        """See Control.aclose. Its last events may still be on their way."""
        try:
            async with asyncio.timeout(_LAST_EVENTS):
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()
        except TimeoutError:
            pass
        try:
            await self._client.disconnect()
        except (EOFError, OSError, QMPError):
            pass
        return told_by_events(self._events.clear())


def told_by_events(events: Iterable[Mapping[str, Any]]) -> Reason | None:
    """What QEMU's events say of its end: the cause, where one event caused the next."""
    reasons = {}
    for event in events:
        data = event.get("data")
        reasons[event.get("event")] = data.get("reason") if isinstance(data, dict) else None
    if "GUEST_PANICKED" in reasons:
        return Reason.GUEST_PANIC
    if "WATCHDOG" in reasons:
        return Reason.WATCHDOG
    return _SHUTDOWN_REASONS.get(str(reasons.get("SHUTDOWN")))
