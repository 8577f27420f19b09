"""What one user can take, and what goes when its connection does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rig import CROSVM, ERROR, MANAGER_PATH, Client, Rig, Service, client, guest, refused


@pytest.fixture
async def tight() -> AsyncIterator[tuple[Client, Service]]:
    """A client of a service that gives little away."""
    rig = Rig(system=False)
    limits = {
        "vms": {"per_user": 3, "in_all": 10},
        "memory": {"per_user": 512, "in_all": 1024},
        "calls": {"per_user": 5, "in_all": 10},
        "consoles": {"per_user": 2, "in_all": 10},
        "files": {"per_user": 4, "in_all": 10},
    }
    service = Service(rig, {"crosvm": str(CROSVM), "kvm": "on", "limits": limits})
    async with client(rig) as connected:
        await connected.listen()
        yield connected, service
    rig.close()


async def test_vms(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, service = tight
    paths = [await bus.create(kernel=guest(tmp_path)) for _ in range(3)]
    fds = service.fds()
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.create(kernel=guest(tmp_path))
    assert "3 VMs" in text[0]
    assert service.fds() == fds
    assert await bus.get(MANAGER_PATH, "VMCount") == 3
    await bus.vm(paths[0], "Remove")
    assert await bus.create(kernel=guest(tmp_path))


async def test_memory_counts_while_a_vm_runs(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, _ = tight
    first, second = [await bus.create(kernel=guest(tmp_path), memory_mib=300) for _ in range(2)]
    await bus.vm(first, "Start")
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.vm(second, "Start")
    assert "512 MiB" in text[0]
    assert await bus.get(second, "State") == "not-started"
    await bus.vm(first, "Kill")
    await bus.vm(second, "Start")
    await bus.vm(second, "Kill")


async def test_files_count_until_start(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, _ = tight
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    disks = [{"image": str(disk)} for _ in range(3)]
    first = await bus.create(kernel=guest(tmp_path), disks=disks)
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.create(kernel=guest(tmp_path))
    assert "4 open files" in text[0]
    await bus.vm(first, "Start")
    second = await bus.create(kernel=guest(tmp_path))
    await bus.vm(second, "Remove")
    await bus.vm(first, "Kill")


async def test_consoles(tight: tuple[Client, Service], tmp_path: Path) -> None:
    bus, _ = tight
    path = await bus.create(kernel=guest(tmp_path))
    streams = [(await bus.vm(path, "OpenConsole"))[0] for _ in range(2)]
    async with refused(ERROR + "LimitExceeded") as text:
        await bus.vm(path, "OpenConsole")
    assert "2 open consoles" in text[0]
    os.close(streams.pop())
    # That it is closed reaches the service by another way than the call.
    async with asyncio.timeout(10):
        while True:
            try:
                streams += await bus.vm(path, "OpenConsole")
                break
            except Exception as error:
                assert "2 open consoles" in str(error)
    for stream in streams:
        os.close(stream)
    await bus.vm(path, "Remove")


async def test_calls(tight: tuple[Client, Service], tmp_path: Path) -> None:
    """Calls that wait are counted, and given back when their caller leaves."""
    bus, service = tight
    path = await bus.create(kernel=guest(tmp_path))
    async with client(service.rig) as other:
        await other.get(path, "State")
        waits = [asyncio.create_task(other.vm(path, "Wait")) for _ in range(5)]
        await other.get(path, "State")
        async with refused(ERROR + "LimitExceeded"):
            await other.vm(path, "Wait")
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
    await bus.vm(path, "Start")
    await bus.vm(path, "Kill")
    await bus.vm(path, "Remove")


async def test_kill_on_disconnect(bus: Client, service: Service, tmp_path: Path) -> None:
    async with client(service.rig) as creator:
        kept = await creator.create(kernel=guest(tmp_path))
        taken = await creator.create(kernel=guest(tmp_path), kill_on_disconnect=True)
        never_started = await creator.create(kernel=guest(tmp_path), kill_on_disconnect=True)
        for path in (kept, taken):
            await creator.vm(path, "Start")
    assert (await bus.died(taken))[1:] == ["requester-gone", -9]
    await bus.until(lambda m: m.member == "InterfacesRemoved" and m.body[0] == never_started)
    assert not any(m.member == "Died" for m in bus.of(never_started))
    assert await bus.get(kept, "State") == "running"
    await bus.vm(kept, "Kill")


async def test_a_creator_that_leaves_before_the_vm_runs(
    bus: Client, service: Service, tmp_path: Path
) -> None:
    async with client(service.rig) as creator:
        path = await creator.create(
            kernel=guest(tmp_path, boot={"hang": True}), kill_on_disconnect=True
        )
        starting = asyncio.create_task(creator.vm(path, "Start"))
        await bus.until_state(path, "starting")
        starting.cancel()
    assert (await bus.died(path))[1:] == ["requester-gone", -9]
    assert await bus.get(path, "State") == "failed"
