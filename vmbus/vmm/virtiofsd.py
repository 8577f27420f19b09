"""virtiofsd: the program beside QEMU that serves a shared directory to the guest."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence

from ..spec import SharedDir
from .base import Command, Helper, Launch, check_unmoved, listen, short_path

#: Where distributions put it, which isn't in PATH.
DIRECTORIES = ("/usr/libexec", "/usr/lib/qemu", "/usr/lib/virtiofsd")
_VERSION_TIMEOUT = 5.0


class Virtiofsd:
    """The virtiofsd of this host. `program` is its path."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._is_qemus: bool | None = None

    def unsupported(self, shared: Sequence[SharedDir]) -> list[str]:
        """What of the shared directories it can't do. May block."""
        return [
            f"shared_dirs[{index}].writable: QEMU's own virtiofsd, which is installed here, "
            "can't share a directory read-only"
            for index, each in enumerate(shared)
            if not each.writable and self._qemus()
        ]

    def share(self, launch: Launch, command: Command, bus: str) -> list[str]:
        """Add a helper for each shared directory, and return what QEMU has to be told of them."""
        if not launch.config.shared_dirs:
            return []
        # It works on the guest's memory, which therefore is a file that both can map.
        size = f"{launch.config.memory_mib}M"
        options = ["-object", f"memory-backend-memfd,id=memory,size={size},share=on"]
        options += ["-machine", "memory-backend=memory"]
        check_unmoved(launch.config)
        for index, shared in enumerate(launch.config.shared_dirs):
            name = f"fs{index}"
            listener = command.own_fd(listen(launch.directory, socket.SOCK_STREAM, name).detach())
            command.helpers.append(Helper(self._argv(shared, listener), [listener]))
            with short_path(launch.directory) as path:
                joined = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                joined.connect(f"{path}/{name}")
            fd = command.own_fd(joined.detach())
            command.pass_fd(fd)
            options += ["-chardev", f"socket,id={name},fd={fd}"]
            options += ["-device", f"vhost-user-fs-{bus},chardev={name},tag={shared.tag}"]
        return options

    def _argv(self, shared: SharedDir, listener: int) -> list[str]:
        if self._qemus():
            # Its options are split at commas, and a backslash keeps one.
            source = shared.source.name.replace("\\", "\\\\").replace(",", "\\,")
            return [self._program, f"--fd={listener}", "-o", f"source={source}"]
        argv = [self._program, f"--fd={listener}", f"--shared-dir={shared.source.name}"]
        return argv if shared.writable else [*argv, "--readonly"]

    def _qemus(self) -> bool:
        """Whether it is the one that came with QEMU until 8.0, with options of its own."""
        if self._is_qemus is None:
            try:
                told = subprocess.run(
                    [self._program, "--version"],
                    capture_output=True,
                    text=True,
                    timeout=_VERSION_TIMEOUT,
                    check=False,
                )
            except (OSError, subprocess.SubprocessError):
                return True
            self._is_qemus = "Bellard" in told.stdout + told.stderr
        return self._is_qemus
