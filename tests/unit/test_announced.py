"""What VMMs are told of the ways by which their guests can report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.doubles import a_config
from vmbus.guest.console import INPUT, OUTPUT
from vmbus.guest.port import NOTIFY_INPUT, NOTIFY_OUTPUT
from vmbus.spec import MAX_PARAMS
from vmbus.vmm.base import Driver, Launch
from vmbus.vmm.crosvm import Crosvm
from vmbus.vmm.qemu import Qemu

pytestmark = pytest.mark.usefixtures("files_closed")

SYSTEMD = "systemd.set_credential=vmm.notify_socket:vsock:2:9277"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A VM's, with its FIFOs."""
    directory = tmp_path / "vm"
    directory.mkdir()
    for name in (INPUT, OUTPUT, NOTIFY_INPUT, NOTIFY_OUTPUT):
        os.mkfifo(directory / name)
    return directory


def _argv(driver: Driver, directory: Path, *, vsock: bool = False, **config: object) -> list[str]:
    with a_config(directory, **config) as made:
        launch = Launch("web", 2048, made, directory, False, vsock, 1.0, 9277 if vsock else 0)
        command = driver.prepare(launch)
        command.close()
    return command.argv


@pytest.mark.parametrize(("machine", "bus"), [("q35", "pci"), ("microvm", "device")])
def test_qemu_has_a_port_with_the_name_that_guests_look_for(
    directory: Path, machine: str, bus: str
) -> None:
    argv = _argv(Qemu("/qemu", machine), directory)
    assert f"pipe,id=notify,path={directory}/notify" in argv
    assert f"virtio-serial-{bus},max_ports=2" in argv
    assert "virtserialport,chardev=notify,name=org.vmbus.notify" in argv


def test_crosvm_has_a_port_with_the_name_that_guests_look_for(directory: Path) -> None:
    """Its descriptor is there when crosvm is, whoever else comes and goes."""
    argv = _argv(Crosvm("/crosvm"), directory)
    (port,) = [each for each in argv if "name=org.vmbus.notify" in each]
    assert port.startswith("type=file,hardware=virtio-console,num=1,path=/proc/self/fd/")


def test_qemu_announces_the_vsock_to_systemd(directory: Path) -> None:
    """Where there is one; by a device, so that the kernel's command line is the caller's own."""
    credential = "name=opt/io.systemd.credentials/vmm.notify_socket,string=vsock:2:9277"
    assert credential in _argv(Qemu("/qemu"), directory, vsock=True, params="quiet")
    (directory / "control").unlink()
    assert not [each for each in _argv(Qemu("/qemu"), directory) if "systemd" in each]


@pytest.mark.parametrize(
    ("params", "seen"),
    [
        ("", [f"--params={SYSTEMD}"]),
        ("quiet", [f"--params=quiet {SYSTEMD}"]),
        ("x" * (MAX_PARAMS - len(SYSTEMD) - 1), [f"--params={{}} {SYSTEMD}"]),
        ("x" * (MAX_PARAMS - len(SYSTEMD)), ["--params={}"]),
    ],
)
def test_crosvm_announces_the_vsock_to_systemd(
    directory: Path, params: str, seen: list[str]
) -> None:
    """By the kernel's command line, as far as that has room after what the caller wants."""
    argv = _argv(Crosvm("/crosvm"), directory, vsock=True, params=params)
    shown = [each for each in argv if each.startswith("--params")]
    assert shown == [each.format(params) for each in seen]


def test_crosvm_without_a_vsock_announces_nothing(directory: Path) -> None:
    assert "--params=quiet" in _argv(Crosvm("/crosvm"), directory, params="quiet")
