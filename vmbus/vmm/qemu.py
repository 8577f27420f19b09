"""QEMU: its command line."""

from __future__ import annotations

import platform
import socket
from pathlib import Path

from ..errors import ControlFailed
from ..guest.console import CONSOLE
from ..guest.port import NAME, NOTIFY
from ..reasons import Reason
from ..spec import MAX_PARAMS, Disk, Net, VMConfig
from .base import Command, Launch, connect, last_line, listen, readable_again
from .qmp import QemuControl
from .virtiofsd import Virtiofsd

_MICROVM_PARAMS = "reboot=t"


class Qemu:
    """The driver. `program` is the path of qemu-system-*."""

    name = "qemu"

    def __init__(
        self, program: str, machine: str = "auto", virtiofsd: Virtiofsd | None = None
    ) -> None:
        self._program = program
        self._machine = machine
        self._virtiofsd = virtiofsd

    def _is_microvm(self, launch: Launch) -> bool:
        """Whether the smallest machine fits: it has no firmware, and needs the clock of KVM.

        Emulated, a microvm has no clock that a kernel could measure its time-stamp counter by on a
        busy host, and often hangs for ever in its boot.
        """
        if launch.config.bios is not None or platform.machine() != "x86_64":
            return False
        return self._machine == "microvm" or (self._machine == "auto" and launch.kvm)

    def unsupported(self, config: VMConfig) -> list[str]:
        """See Driver.unsupported."""
        problems = ["protected: QEMU can't do that; crosvm can"] if config.protected else []
        if config.shared_dirs and self._virtiofsd is None:
            problems.append("shared_dirs: virtiofsd is not installed, which QEMU needs for them")
        elif self._virtiofsd is not None:
            problems += self._virtiofsd.unsupported(config.shared_dirs)
        return problems

    def prepare(self, launch: Launch) -> Command:
        """See Driver.prepare."""
        command = Command()
        try:
            listener = listen(launch.directory, socket.SOCK_STREAM)
            microvm = self._is_microvm(launch)
            bus = "device" if microvm else "pci"
            command.argv = [self._program, *_machine(launch, microvm=microvm), *_BARE]
            command.argv += _monitor(command, command.own_fd(listener.detach()))
            command.argv += _console(launch.directory)
            command.argv += _notify_port(launch.directory, bus)
            for index, disk in enumerate(launch.config.disks):
                command.argv += _disk(command, index, disk, bus)
            for index, net in enumerate(launch.config.net):
                command.argv += _net(command, index, net, bus)
            command.argv += _extras(launch, bus)
            if self._virtiofsd is not None:
                command.argv += self._virtiofsd.share(launch, command, bus)
            command.argv += _boot(launch.config, command, microvm=microvm)
        except BaseException:
            command.close()
            raise
        return command

    async def connect(self, launch: Launch) -> QemuControl:
        """See Driver.connect."""
        try:
            sock = await connect(launch.directory, socket.SOCK_STREAM)
        except OSError as error:
            raise ControlFailed(f"QEMU's control socket: {error.strerror}") from None
        return await QemuControl.greet(sock, launch.control_timeout)

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
]


def _machine(launch: Launch, *, microvm: bool) -> list[str]:
    config = launch.config
    usual = "q35" if platform.machine() == "x86_64" else "virt"
    machine = "microvm,acpi=on" if microvm else usual
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


def _console(directory: Path) -> list[str]:
    # QEMU opens both FIFOs both ways, so that neither comes to an end while nobody else has it.
    return [*_pipe(CONSOLE, directory), "-serial", "chardev:console"]


def _notify_port(directory: Path, bus: str) -> list[str]:
    return [
        *_pipe(NOTIFY, directory),
        "-device",
        f"virtio-serial-{bus},max_ports=2",
        "-device",
        f"virtserialport,chardev={NOTIFY},name={NAME}",
    ]


def _pipe(name: str, directory: Path) -> list[str]:
    path = str(directory / name).replace(",", ",,")
    return ["-chardev", f"pipe,id={name},path={path}"]


def _disk(command: Command, index: int, disk: Disk, bus: str) -> list[str]:
    command.pass_fd(disk.image.fd)
    driver = "host_device" if disk.image.is_block_device() else "file"
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
        f"driver={driver},node-name=file{index},filename=/dev/fdset/{index}"
        + f",read-only={file_read_only},{cache}",
        "-blockdev",
        f"driver=raw,node-name=disk{index},file=file{index},read-only={read_only},{cache}",
        "-device",
        f"virtio-blk-{bus},drive=disk{index}{serial}",
    ]


def _net(command: Command, index: int, net: Net, bus: str) -> list[str]:
    if net.tap.fd < 0:
        name = net.tap.name.replace(",", ",,")
        backend = f"ifname={name},script=no,downscript=no"
    else:
        command.pass_fd(net.tap.fd)
        backend = f"fd={net.tap.fd}"
    # There is no firmware that would boot from it, and its ROM is a package of its own.
    rom = ",romfile=" if bus == "pci" else ""
    mac = f",mac={net.mac}" if net.mac else ""
    return [
        "-netdev",
        f"tap,id=net{index},{backend}",
        "-device",
        f"virtio-net-{bus},netdev=net{index}{mac}{rom}",
    ]


def _extras(launch: Launch, bus: str) -> list[str]:
    # That a guest panicked is told by a device; q35 and microvm have the ISA bus that Linux on x86
    # looks for it on.
    panic = "pvpanic" if platform.machine() == "x86_64" else "pvpanic-pci"
    extras = ["-device", panic]
    if launch.config.balloon:
        extras += ["-device", f"virtio-balloon-{bus},id=balloon"]
    if launch.vsock:
        extras += ["-device", f"vhost-vsock-{bus},guest-cid={launch.cid}"]
    if launch.credential:
        credential = "name=opt/io.systemd.credentials/vmm.notify_socket"
        extras += ["-fw_cfg", f"{credential},string={launch.credential}"]
    if launch.config.gdb_port is not None:
        extras += ["-gdb", f"tcp:127.0.0.1:{launch.config.gdb_port}"]
    return extras


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
    if len(params.encode()) > MAX_PARAMS:
        params = config.params
    return [*boot, "-append", params] if params else boot
