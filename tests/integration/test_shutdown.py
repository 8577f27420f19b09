"""The ways in which it all ends on purpose: the host shuts down, or nobody wants anything."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.logind import Logind
from tests.polkit import polkit
from tests.rig import CROSVM, DEADLINE, ERROR, Rig, Service, client, guest, listening, refused
from vmbus.bus.wire import Variant


@pytest.fixture
def host() -> Iterator[tuple[Service, Logind]]:
    """A system bus with polkit and logind, and the service as a host has it."""
    rig = Rig(system=True)
    logind = Logind(rig)
    try:
        with polkit(rig):
            settings = {"crosvm": str(CROSVM), "kvm": "on", "shutdown_timeout": 2.0}
            yield Service(rig, settings, user="vmbus"), logind
            rig.services[0].close()
    finally:
        logind.close()
        rig.close()


async def test_the_host_shuts_down_when_its_vms_have_ended(
    host: tuple[Service, Logind], tmp_path: Path
) -> None:
    """In good order, by force where need be, and none is started meanwhile."""
    service, logind = host
    await logind.until(1)
    assert (await logind.locks())[0][:2] == ["shutdown", "vmbus"]
    assert (await logind.locks())[0][3] == "delay"
    async with listening(service.rig) as root:
        fds = []
        paths = []
        for kernel in (
            guest(tmp_path),
            guest(tmp_path, on={"Powerbtn": {"ignore": True}, "Exit": {"silent": True}}),
            guest(tmp_path),
        ):
            fds.append(os.open(kernel, os.O_RDONLY))
            paths.append(await root.create(kernel=Variant("h", 0), fds=fds[-1:]))
        for fd in fds:
            os.close(fd)
        ordinary, deaf, late = paths
        await root.vm(ordinary, "Start")
        await root.vm(deaf, "Start")
        await logind.prepare(begins=True)
        await root.until_stopping(deaf)
        async with refused(f"{ERROR}InvalidState") as texts:
            await root.vm(late, "Start")
        assert "shutting down" in texts[0]
        assert (await root.died(ordinary))[1] == "host-shutdown"
        assert (await root.died(deaf))[1] == "host-shutdown"
        await logind.until(0)


async def test_a_service_with_nothing_to_do_ends_by_itself(rig: Rig, tmp_path: Path) -> None:
    """Not while a VM runs; and what it knows is there again when somebody calls."""
    service = Service(rig, {"crosvm": str(CROSVM), "kvm": "on"}, options=["--exit-on-idle", "0.3"])
    async with listening(rig) as bus:
        path = await bus.create(kernel=guest(tmp_path, then={"exit": 0, "after": 1.0}))
        await bus.vm(path, "Start")
        assert (await bus.died(path))[1] == "shutdown"
        assert await asyncio.to_thread(service.process.wait, DEADLINE) == 0
        service.start()
        assert await bus.get(path, "DeathReason") == "shutdown"
        await bus.vm(path, "Remove")
        assert await asyncio.to_thread(service.process.wait, DEADLINE) == 0


@pytest.mark.parametrize("kept", [False, True])
async def test_a_vm_that_would_lose_its_files_keeps_the_service(
    rig: Rig, tmp_path: Path, *, kept: bool
) -> None:
    """One that was created, but not started: what keeps files over a restart drops them then."""
    service = Service(
        rig,
        {"crosvm": str(CROSVM), "kvm": "on"},
        {"NOTIFY_SOCKET": str(rig.directory / "notify")} if kept else None,
        options=["--exit-on-idle", "0.1"],
    )
    async with client(rig) as bus:
        path = await bus.create(kernel=guest(tmp_path))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await _ended(service)
        await bus.vm(path, "Remove")
        await _ended(service)


async def _ended(service: Service) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(service.process.pid)
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(DEADLINE):
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
