"""With a service manager that keeps descriptors, nothing is lost from one service to the next."""

from __future__ import annotations

import array
import asyncio
import os
import select
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import (
    CROSVM,
    DEADLINE,
    Client,
    Rig,
    Service,
    guest,
    kernel_version,
    listening,
)
from vmbus.bus.wire import Variant


class Keeper:
    """What systemd is to a service: a socket to be told things, and a store of descriptors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[str] = []
        self.kept: dict[str, int] = {}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))

    def take(self) -> None:
        """Take what was said by now."""
        while select.select([self._sock], [], [], 0)[0]:
            text, ancillary, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(64))
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            said = dict(line.split("=", 1) for line in text.decode().splitlines())
            name = said.get("FDNAME", "")
            if "FDSTORE" in said:
                assert name not in self.kept
                (self.kept[name],) = fds
            elif "FDSTOREREMOVE" in said and name in self.kept:
                os.close(self.kept.pop(name))
            else:
                self.told += text.decode().splitlines()

    def until(self, said: str) -> None:
        """Wait until that was said."""
        self.take()
        while said not in self.told:
            assert select.select([self._sock], [], [], DEADLINE)[0], self.told
            self.take()

    def close(self) -> None:
        self._sock.close()
        for fd in self.kept.values():
            os.close(fd)


@pytest.fixture
def keeper(rig: Rig) -> Iterator[Keeper]:
    found = Keeper(rig.directory / f"notify-{len(rig.services)}")
    yield found
    found.close()


@pytest.fixture
def kept(rig: Rig, keeper: Keeper) -> Iterator[Service]:
    """A service that was started by a service manager."""
    environment = {"NOTIFY_SOCKET": str(keeper.path)}
    service = Service(rig, {"crosvm": str(CROSVM), "kvm": "on"}, environment)
    yield service
    service.close()


@pytest.fixture
async def listener(kept: Service) -> AsyncIterator[Client]:
    async with listening(kept.rig) as connected:
        yield connected


def restart(service: Service, keeper: Keeper) -> None:
    service.crash()
    keeper.take()
    service.start(kept=keeper.kept)


async def test_manager_is_told_what_the_service_does(kept: Service, keeper: Keeper) -> None:
    """Ready once it can be called, and stopping when it is told to end."""
    keeper.until("READY=1")
    assert await asyncio.to_thread(kept.terminate) == 0
    keeper.take()
    assert "STOPPING=1" in keeper.told


async def test_vm_that_was_not_started_keeps_its_files(
    kept: Service, keeper: Keeper, listener: Client, tmp_path: Path
) -> None:
    """It can be started by the next service, with the very files that it was created with."""
    kernel = guest(tmp_path)
    with kernel.open("rb") as file:
        path = await listener.create(kernel=Variant("h", 0), fds=[file.fileno()])
    kernel.unlink()
    restart(kept, keeper)
    await listener.vm(path, "Start")
    assert await listener.get(path, "State") == "running"
    await listener.vm(path, "Kill")
    await listener.vm(path, "Remove")
    keeper.take()
    assert keeper.kept == {}


@pytest.mark.parametrize(
    ("ending", "reason", "status"),
    [
        ({"exit": 0}, "shutdown", 0),
        ({"exit": 32}, "reboot", 32),
        ({"exit": 36}, "watchdog", 36),
        ({"signal": signal.SIGKILL}, "signal", -signal.SIGKILL),
    ],
)
async def test_death_while_the_service_was_away_has_its_true_reason(
    kept: Service,
    keeper: Keeper,
    listener: Client,
    tmp_path: Path,
    ending: dict[str, Any],
    reason: str,
    status: int,
) -> None:
    """The kernel tells whoever still has a descriptor of the process, from Linux 6.15 on."""
    path = await listener.create(kernel=guest(tmp_path, then={**ending, "after": 0.3}))
    await listener.vm(path, "Start")
    kept.crash()
    keeper.take()
    (pidfd,) = [fd for name, fd in keeper.kept.items() if name.endswith("-vmm")]
    poll = select.poll()
    poll.register(pidfd, 0)  # POLLHUP, unasked, when it has been reaped
    assert poll.poll(DEADLINE * 1000)
    kept.start(kept=keeper.kept)
    known = [reason, status] if kernel_version() >= (6, 15) else ["unknown", 0]
    assert (await listener.died(path))[1:] == known


async def test_disk_can_be_resized_by_the_next_service(
    kept: Service, keeper: Keeper, listener: Client, tmp_path: Path
) -> None:
    """What it has to see of the disk it sees through the descriptor that was kept."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    disks = Variant("aa{sv}", [{"image": Variant("s", str(image)), "writable": Variant("b", True)}])
    path = await listener.create(kernel=guest(tmp_path), disks=disks)
    await listener.vm(path, "Start")
    restart(kept, keeper)
    await listener.vm(path, "ResizeDisk", "ut", 0, 2 << 20)
    assert image.stat().st_size == 2 << 20
    await listener.vm(path, "Kill")
    keeper.take()
    assert keeper.kept == {}


async def test_what_is_kept_and_wanted_by_nobody_is_dropped(
    kept: Service, keeper: Keeper, listener: Client, tmp_path: Path
) -> None:
    """A store that has more than the records know of does not grow."""
    keeper.take()
    keeper.kept["vm-99-file-0"] = os.open("/dev/null", os.O_RDONLY)
    fds = kept.fds()
    restart(kept, keeper)
    await listener.create(kernel=guest(tmp_path))
    keeper.take()
    assert "vm-99-file-0" not in keeper.kept
    assert kept.fds().count("/dev/null") == fds.count("/dev/null")
