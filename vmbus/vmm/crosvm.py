"""crosvm: its command line, its exit codes and its control socket.

The socket carries one JSON value a packet; what crosvm doesn't understand it doesn't answer, so
every exchange has a deadline.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

from ..errors import ControlFailed, NotSupported, TimedOut
from ..reasons import Reason
from ..spec import Disk, VMConfig
from .base import CONTROL_TIMEOUT, Command, Launch, connect, last_line, listen

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

    def prepare(self, launch: Launch) -> Command:
        """See Driver.prepare."""

        control = CrosvmControl(launch.directory)
        command = Command([], control.answers)
        try:
            listener = listen(launch.directory, socket.SOCK_SEQPACKET)
            socket_path = command.pass_fd(command.own_fd(listener.detach()))
            command.argv = [self._program, "--extended-status", "--no-syslog", "run"]
            command.argv += [f"--socket={socket_path}", f"--name={launch.name}"]
            command.argv += _sandbox(launch.directory)
            command.argv += _machine(launch.config)
            command.argv += _console(command.pass_fd(launch.console))
            for disk in launch.config.disks:
                command.argv.append(_block(disk, command.pass_fd(disk.image.fd)))
            command.argv += _boot(launch.config, command)
        except BaseException:
            command.close()
            raise
        return command

    def told_by(self, status: int, stderr: str) -> Reason | None:
        """See Driver.told_by.

        On its way out crosvm may kill its whole process group, and so itself, for the sake of
        children that don't end; it has said by then how the VM ended.
        """
        if status == -signal.SIGKILL:
            said = _FAREWELL.fullmatch(_LOG_PREFIX.sub("", last_line(stderr)))
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


def _machine(config: VMConfig) -> list[str]:
    return [
        "--mem",
        _options(size=config.memory_mib),
        "--cpus",
        _options(num_cores=config.cpus),
    ]


def _console(path: str) -> list[str]:
    serial = _options(
        type="file", hardware="serial", num=1, path=path, input=path, console=True, earlycon=True
    )
    return ["--serial", serial]


def _block(disk: Disk, path: str) -> str:
    options = _options(path=path, ro=not disk.writable)
    if disk.id is not None:
        options += f",id={_value(disk.id)}"
    if disk.direct:
        options += ",direct=true"
    return f"--block={options}"


def _boot(config: VMConfig, command: Command) -> list[str]:
    if config.bios is not None:
        return ["--bios", command.pass_fd(config.bios.fd)]
    assert config.kernel is not None
    boot = []
    if config.initrd is not None:
        boot += ["--initrd", command.pass_fd(config.initrd.fd)]
    if config.params:
        boot.append(f"--params={config.params}")
    return [*boot, command.pass_fd(config.kernel.fd)]


class CrosvmControl:
    """A client of one crosvm's control socket.

    Each request has a connection of its own, so that a late answer to one that was given up is
    never taken for the answer to the next.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def answers(self) -> CrosvmControl:
        """Wait, however long, for the first answer: the VM's loop runs."""
        await self._exchange("VcpuPidTid")
        return self

    async def request(self, request: Any, *, timeout: float = CONTROL_TIMEOUT) -> Any:
        """Send one request and return the reply. Raises ControlFailed, NotSupported, TimedOut."""
        try:
            async with asyncio.timeout(timeout):
                return await self._exchange(request)
        except TimeoutError:
            raise TimedOut(f"crosvm did not answer in {timeout:g} s") from None

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
        raise ControlFailed(f"crosvm answered with error {str(reply['Err'])[:50]}")
    if isinstance(reply, dict) and "ErrString" in reply:
        raise ControlFailed(f"crosvm answered: {str(reply['ErrString'])[:300]}")
    return reply
