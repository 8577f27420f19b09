"""crosvm: its command line, its exit codes and its control socket.

The socket carries one JSON value a packet; what crosvm doesn't understand it doesn't answer, so
every exchange has a deadline.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ControlFailed, NotSupported, TimedOut
from ..files import check_raw
from ..guest.console import INPUT, OUTPUT
from ..guest.port import NAME, NOTIFY_OUTPUT
from ..reasons import Reason
from ..spec import MAX_PARAMS, Disk, Net, VMConfig
from .base import Command, Launch, check_unmoved, connect, last_line, listen

_REASONS = {
    0: Reason.SHUTDOWN,
    1: Reason.CRASH,
    32: Reason.REBOOT,
    33: Reason.CRASH,
    34: Reason.GUEST_PANIC,
    35: Reason.CRASH,
    36: Reason.WATCHDOG,
}
_SAID = {
    "success": Reason.SHUTDOWN,
    "reset": Reason.REBOOT,
    "crash": Reason.CRASH,
    "guest panic": Reason.GUEST_PANIC,
    "watchdog reset": Reason.WATCHDOG,
}
_FAREWELL = re.compile(r"exiting with ([a-z ]+)")
_ENOTSUP = 95
_ENOTCONN = 107
_MAX_PACKET = 1 << 16
_LOG_PREFIX = re.compile(r"^\[[^]]*\]\s*")
_QUOTED = re.compile(r"[,\[\]\"\\]")


def _value(text: str) -> str:
    """Quote a value of a key=value option where crosvm would read more into it."""
    if not _QUOTED.search(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _options(**values: object) -> str:
    shown = {True: "true", False: "false"}
    return ",".join(
        f"{key.replace('_', '-')}={shown[value] if isinstance(value, bool) else value}"
        for key, value in values.items()
    )


class Crosvm:
    """The driver. `program` is the path of crosvm."""

    name = "crosvm"

    def __init__(self, program: str) -> None:
        self._program = program

    def unsupported(self, config: VMConfig) -> list[str]:
        """See Driver.unsupported."""
        problems = [
            f"shared_dirs[{index}].writable: crosvm can't share a directory read-only"
            for index, shared in enumerate(config.shared_dirs)
            if not shared.writable
        ]
        problems += [
            f"shared_dirs[{index}].source: crosvm can't share a directory with ':' in its path"
            for index, shared in enumerate(config.shared_dirs)
            if ":" in shared.source.name
        ]
        if config.protected and not _protected_vms():
            problems.append("protected: this host has no protected KVM")
        if config.gdb_port is not None and config.cpus > 1:
            problems.append("gdb_port: crosvm can debug a VM with one CPU only")
        return problems

    def prepare(self, launch: Launch) -> Command:
        """See Driver.prepare."""
        command = Command()
        try:
            listener = listen(launch.directory, socket.SOCK_SEQPACKET)
            socket_path = command.pass_fd(command.own_fd(listener.detach()))
            command.argv = [self._program, "--extended-status", "--no-syslog", "run"]
            command.argv += [f"--socket={socket_path}", f"--name={launch.name}"]
            command.argv += _sandbox(launch.directory)
            command.argv += _machine(launch)
            command.argv += _console(launch.directory, command)
            command.argv += _notify_port(launch.directory, command)
            for disk in launch.config.disks:
                # crosvm looks for itself what an image is, and opens what its head names.
                check_raw(disk.image)
                command.argv.append(_block(disk, command.pass_fd(disk.image.fd)))
            command.argv += [_net(net, command) for net in launch.config.net]
            check_unmoved(launch.config)
            command.argv += [
                f"--shared-dir={shared.source.name}:{shared.tag}:type=fs:cache=auto"
                for shared in launch.config.shared_dirs
            ]
            command.argv += _boot(launch, command)
        except BaseException:
            command.close()
            raise
        return command

    async def connect(self, launch: Launch) -> CrosvmControl:
        """See Driver.connect."""
        return await CrosvmControl(launch).answers()

    def told_by(self, status: int, stderr: str) -> Reason | None:
        """See Driver.told_by.

        On its way out crosvm may kill its whole process group, and so itself, for the sake of
        children that don't end; it has said by then how the VM ended.
        """
        if status == -signal.SIGKILL:
            last = _LOG_PREFIX.sub("", last_line(stderr))
            if last.startswith("exiting with error"):
                return Reason.CRASH
            said = _FAREWELL.fullmatch(last)
            return _SAID.get(said[1]) if said else None
        return _REASONS.get(status)

    def last_words(self, stderr: str) -> str:
        """See Driver.last_words."""
        line = (
            last_line(stderr, containing="exiting with error")
            or last_line(stderr, containing="ERROR")
            or last_line(stderr)
        )
        return _LOG_PREFIX.sub("", line)


def _sandbox(directory: Path) -> list[str]:
    """The empty directory that devices are jailed in; not every host has crosvm's default."""
    root = directory / "empty"
    root.mkdir()
    return [f"--pivot-root={root}"]


def _protected_vms() -> bool:
    """Whether the host's KVM can keep a guest's memory from the host: arm64's pKVM."""
    return "kvm-arm.mode=protected" in Path("/proc/cmdline").read_text().split()


def _machine(launch: Launch) -> list[str]:
    config = launch.config
    machine = ["--mem", _options(size=config.memory_mib), "--cpus", _options(num_cores=config.cpus)]
    if launch.vsock:
        machine += ["--vsock", _options(cid=launch.cid)]
    if not config.balloon:
        machine.append("--no-balloon")
    if config.protected:
        machine.append("--protected-vm")
    if config.gdb_port is not None:
        machine.append(f"--gdb={config.gdb_port}")
    return machine


def _net(net: Net, command: Command) -> str:
    if net.tap.fd < 0:
        tap = _options(tap_name=_value(net.tap.name))
    else:
        command.pass_fd(net.tap.fd)
        tap = _options(tap_fd=net.tap.fd)
    return f"--net={tap}" + (f",mac={net.mac}" if net.mac else "")


def _console(directory: Path, command: Command) -> list[str]:
    """Both FIFOs are open both ways, so that neither ever comes to an end, whoever else goes.

    A full one holds the guest up: crosvm takes one that refuses for a broken port, and its guest's
    terminal would stand still for good.
    """
    both = os.O_RDWR | os.O_CLOEXEC
    out = command.own_fd(os.open(directory / OUTPUT, both))
    typed = command.own_fd(os.open(directory / INPUT, both))
    serial = _options(
        type="file",
        hardware="serial",
        num=1,
        path=command.pass_fd(out),
        input=command.pass_fd(typed),
        console=True,
        earlycon=True,
    )
    return ["--serial", serial]


def _notify_port(directory: Path, command: Command) -> list[str]:
    # As the console's: a guest that says more than is heard has to wait.
    out = command.own_fd(os.open(directory / NOTIFY_OUTPUT, os.O_RDWR | os.O_CLOEXEC))
    port = _options(
        type="file", hardware="virtio-console", num=1, path=command.pass_fd(out), name=NAME
    )
    return ["--serial", port]


def _block(disk: Disk, path: str) -> str:
    options = _options(path=path, ro=not disk.writable)
    if disk.id is not None:
        options += f",id={_value(disk.id)}"
    if disk.direct:
        options += ",direct=true"
    return f"--block={options}"


def _boot(launch: Launch, command: Command) -> list[str]:
    config = launch.config
    if config.bios is not None:
        return ["--bios", command.pass_fd(config.bios.fd)]
    assert config.kernel is not None
    boot = []
    if config.initrd is not None:
        boot += ["--initrd", command.pass_fd(config.initrd.fd)]
    if params := _params(launch):
        boot.append(f"--params={params}")
    return [*boot, command.pass_fd(config.kernel.fd)]


def _params(launch: Launch) -> str:
    """The kernel's command line, which is also systemd's; the kernel itself looks over a '.'."""
    params = launch.config.params
    if not launch.credential:
        return params
    more = f"{params} systemd.set_credential=vmm.notify_socket:{launch.credential}".lstrip()
    return more if len(more.encode()) <= MAX_PARAMS else params


class CrosvmControl:
    """A client of one crosvm's control socket.

    Each request has a connection of its own, so that a late answer to one that was given up is
    never taken for the answer to the next.
    """

    def __init__(self, launch: Launch) -> None:
        self._directory = launch.directory
        self._memory = launch.config.memory_mib << 20
        self._timeout = launch.control_timeout

    async def answers(self) -> CrosvmControl:
        """Wait, however long, for the first answer: the VM's loop runs."""
        await self._exchange("VcpuPidTid")
        return self

    async def request(self, request: Any) -> Any:
        """Send one request and return the reply. Raises ControlFailed, NotSupported, TimedOut."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._exchange(request)
        except TimeoutError:
            raise TimedOut(f"crosvm did not answer in {self._timeout:g} s") from None

    async def _exchange(self, request: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            sock = await connect(self._directory, socket.SOCK_SEQPACKET)
            with sock:
                await loop.sock_sendall(sock, json.dumps(request).encode())
                return _reply(await loop.sock_recv(sock, _MAX_PACKET))
        except OSError as error:
            raise ControlFailed(f"crosvm's control socket: {error.strerror}") from None

    async def power_button(self) -> None:
        """See Control.power_button."""
        await self.request("Powerbtn")

    async def quit(self) -> None:
        """See Control.quit."""
        await self.request("Exit")

    async def suspend(self) -> None:
        """See Control.suspend."""
        await self.request("SuspendVcpus")

    async def resume(self) -> None:
        """See Control.resume."""
        await self.request("ResumeVcpus")

    async def set_memory(self, size: int) -> None:
        """See Control.set_memory: crosvm is told what the balloon takes, not what it leaves."""
        adjust = {"num_bytes": self._memory - size, "wait_for_success": False}
        await self.request({"BalloonCommand": {"Adjust": adjust}})

    async def memory(self) -> int:
        """See Control.memory."""
        reply = await self.request({"BalloonCommand": "Stats"})
        try:
            taken = int(reply["BalloonStats"]["balloon_actual"])
        except (KeyError, TypeError, ValueError):
            raise ControlFailed("crosvm's answer has no size of the balloon") from None
        return max(0, self._memory - taken)

    def watch_memory(self, changed: Callable[[int], None]) -> None:
        """See Control.watch_memory: crosvm never tells by itself."""

    async def resize_disk(self, index: int, size: int) -> None:
        """See Control.resize_disk."""
        resize = {"disk_index": index, "command": {"Resize": {"new_size": size}}}
        await self.request({"DiskCommand": resize})

    async def aclose(self) -> Reason | None:
        """See Control.aclose: crosvm says it by its exit code alone."""
        return None


def _reply(packet: bytes) -> Any:
    if not packet:
        raise ControlFailed("crosvm closed its control socket without an answer")
    try:
        reply = json.loads(packet)
    except ValueError:
        raise ControlFailed("crosvm answered with something that is not JSON") from None
    if isinstance(reply, dict) and "Err" in reply:
        if reply["Err"] == _ENOTSUP:
            raise NotSupported("crosvm can't do that with this VM")
        if reply["Err"] == _ENOTCONN:
            raise ControlFailed("the guest has no driver for that, or none yet")
        raise ControlFailed(f"crosvm answered with error {str(reply['Err'])[:50]}")
    if isinstance(reply, dict) and "ErrString" in reply:
        raise ControlFailed(f"crosvm answered: {str(reply['ErrString'])[:300]}")
    return reply
