"""Guests that report how they are, by the virtio port of a VMM, seen on the bus."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

from tests.rig import (
    ERROR,
    STANDARD_ERROR,
    Client,
    Service,
    guest,
    plain,
    refused,
)
from vmbus.bus.wire import Variant
from vmbus.model.reported import TEXT_PAUSE


def _changes(bus: Client, path: str, name: str) -> list[Any]:
    """The values that a property was told to have, in their order."""
    told = [plain(m.body)[1] for m in bus.of(path) if m.member == "PropertiesChanged"]
    return [changed[name] for changed in told if name in changed]


async def _until(bus: Client, path: str, name: str, value: object) -> None:
    await bus.until(
        lambda m: (
            m.path == path
            and m.member == "PropertiesChanged"
            and plain(m.body)[1].get(name) == value
        )
    )


async def _told(bus: Client, path: str) -> dict[str, Any]:
    found = await bus.get_all(path)
    return {name: found[name] for name in ("PayloadState", "PayloadExitStatus", "StatusText")}


async def test_whole_story_of_a_guest(bus: Client, tmp_path: Path) -> None:
    """From nothing to its exit status, which stays when it is dead."""
    said = "X_VMBUS_PAYLOAD=started\nSTATUS=Booting\nREADY=1\nSTOPPING=1\nEXIT_STATUS=3\n"
    path = await bus.create(kernel=guest(tmp_path, relay=True))
    assert await _told(bus, path) == {
        "PayloadState": "none",
        "PayloadExitStatus": -1,
        "StatusText": "",
    }
    (fd,) = await bus.vm(path, "OpenConsole")
    await bus.vm(path, "Start")
    assert (await _told(bus, path))["PayloadState"] == "starting"
    with socket.socket(fileno=fd) as keys:
        for line, name, value in zip(
            said.splitlines(keepends=True),
            ["PayloadState", "StatusText", "PayloadState", "PayloadState", "PayloadExitStatus"],
            ["started", "Booting", "ready", "finished", 3],
            strict=True,
        ):
            keys.send(line.encode())
            await _until(bus, path, name, value)
    await bus.vm(path, "Kill")
    assert await _told(bus, path) == {
        "PayloadState": "finished",
        "PayloadExitStatus": 3,
        "StatusText": "Booting",
    }
    assert _changes(bus, path, "PayloadState") == ["starting", "started", "ready", "finished"]


async def test_last_words_are_told_before_the_death(bus: Client, tmp_path: Path) -> None:
    """Said in the moment before it powers off, they still come first."""
    said = "READY=1\nSTATUS=bye\nEXIT_STATUS=7"
    path = await bus.run(guest(tmp_path, notify=said, then={"exit": 0}))
    assert (await bus.died(path))[1:] == ["shutdown", 0]
    assert await _told(bus, path) == {
        "PayloadState": "finished",
        "PayloadExitStatus": 7,
        "StatusText": "bye",
    }
    members = [m.member for m in bus.of(path)]
    assert members.index("Died") == len(members) - 1


async def test_garbage_does_no_harm(bus: Client, tmp_path: Path) -> None:
    """Neither to the service, nor to what is said after it."""
    garbage = "STATUS=" + "x" * 20_000 + "\n=\n\0\x1b[2J\nREADY\nEXIT_STATUS=99999999999\n" * 50
    path = await bus.run(guest(tmp_path, notify=f"{garbage}READY=1\n"))
    await _until(bus, path, "PayloadState", "ready")
    assert (await _told(bus, path))["PayloadExitStatus"] == -1
    await bus.vm(path, "Kill")


async def test_guest_that_is_not_ready_in_time(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path), ready_timeout_usec=Variant("t", 200_000))
    assert (await bus.died(path))[1:] == ["hangup", -9]
    assert await bus.get(path, "DeathReason") == "hangup"
    assert await bus.vm(path, "Wait") == ["hangup", -9]


async def test_guest_that_is_ready_in_time(bus: Client, tmp_path: Path) -> None:
    """It may end much later, and is not killed for that."""
    path = await bus.run(
        guest(tmp_path, notify="READY=1\n", then={"exit": 0, "after": 1.5}),
        ready_timeout_usec=1_000_000,
    )
    assert (await bus.died(path))[1:] == ["shutdown", 0]


async def test_flooding_guest_disturbs_nobody(bus: Client, tmp_path: Path) -> None:
    """Others are served as before, and the bus carries but some of its texts."""
    floods = [await bus.run(guest(tmp_path, flood_notify=True)) for _ in range(3)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    other = await bus.run(guest(tmp_path, notify="READY=1\n"))
    await _until(bus, other, "PayloadState", "ready")
    for path in floods:
        await bus.until(lambda m, path=path: len(_changes(bus, path, "StatusText")) >= 5)
        told = len(_changes(bus, path, "StatusText"))
        assert told <= (loop.time() - began) / TEXT_PAUSE + 10
    for path in [*floods, other]:
        await bus.vm(path, "Kill")


async def test_guest_reports_across_services(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """What was said is kept; what is said while nobody listens is heard by the next service."""
    said = "READY=1\nSTATUS=before\n"
    path = await listener.run(guest(tmp_path, notify=said, relay=True))
    await _until(listener, path, "StatusText", "before")
    mortal.crash()
    keys = os.open(_temporary(mortal, path) / "console.in", os.O_WRONLY)
    os.write(keys, b"STATUS=meanwhile\nEXIT_STATUS=4\n")
    os.close(keys)
    mortal.start()
    await _until(listener, path, "PayloadExitStatus", 4)
    await _until(listener, path, "StatusText", "meanwhile")
    assert (await _told(listener, path))["PayloadState"] == "finished"
    await listener.vm(path, "Kill")


def _temporary(service: Service, path: str) -> Path:
    return service.runtime / "vm" / path.rpartition("/")[2] / "tmp"


async def test_deadline_holds_across_services(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """It is the same, and not a new one; who was ready in time, was."""
    kernel = guest(tmp_path, relay=True)
    late, ready = [await listener.run(kernel, ready_timeout_usec=3_000_000) for _ in range(2)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    mortal.crash()
    keys = os.open(_temporary(mortal, ready) / "console.in", os.O_WRONLY)
    os.write(keys, b"READY=1\n")
    os.close(keys)
    mortal.start()
    assert (await listener.died(late))[1:] == ["hangup", -9]
    assert loop.time() - began < 6
    assert await listener.get(ready, "State") == "running"
    assert await listener.get(ready, "PayloadState") == "ready"
    await listener.vm(ready, "Kill")


async def test_guest_is_not_connected_to_without_a_vsock(bus: Client, tmp_path: Path) -> None:
    """And whatever the host has, some ports are nobody's to connect to."""
    path = await bus.run(guest(tmp_path), vsock=False)
    async with refused(f"{ERROR}NotSupported"):
        await bus.vm(path, "ConnectVsock", "u", 1024)
    for port in (0, 1023, 0xFFFFFFFF):
        async with refused(f"{STANDARD_ERROR}InvalidArgs"):
            await bus.vm(path, "ConnectVsock", "u", port)
    await bus.vm(path, "Kill")
