"""VMs outlive the service, and each death is told once, by whichever service learns of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import select
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.polkit import polkit
from tests.rig import (
    CROSVM,
    DEADLINE,
    ERROR,
    GONE,
    MANAGER,
    MANAGER_PATH,
    STANDARD_ERROR,
    Client,
    Rig,
    Service,
    client,
    guest,
    listening,
    refused,
    until_reaped,
)
from vmbus.bus.connection import RemoteError
from vmbus.bus.wire import Variant
from vmbus.vmm import pidfd as processes


def _deaths(bus: Client) -> Counter[str]:
    return Counter(m.path or "" for m in bus.signals if m.member == "Died")


def _until_ended(pid: int) -> None:
    """Wait for the end of a process that isn't ours."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], DEADLINE)[0]
        finally:
            os.close(fd)


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
async def test_vm_outlives_the_service_and_is_found_again(
    listener: Client, mortal: Service, tmp_path: Path, end: str
) -> None:
    """Whatever is known of a VM is known to the next service, which can do all with it."""
    path = await listener.run(guest(tmp_path), name="survivor")
    before = await listener.get_all(path)
    mortal.process.send_signal(signal.Signals[end])
    mortal.process.wait(DEADLINE)
    assert processes.find(*mortal.traces()[0]) is not None
    mortal.start()
    assert await listener.get_all(path) == before
    assert await listener.call(MANAGER_PATH, MANAGER, "GetVM", "s", ["survivor"]) == [path]
    await listener.vm(path, "Suspend")
    await listener.vm(path, "Resume")
    await listener.vm(path, "Stop", "t", 0)
    assert (await listener.died(path))[1:] == ["stopped", 0]
    assert await listener.vm(path, "Wait") == ["stopped", 0]
    await listener.vm(path, "Remove")
    assert not list((mortal.runtime / "vm").glob("[0-9]*"))
    assert _deaths(listener) == {path: 1}


@pytest.mark.parametrize(
    ("ending", "reason", "status"),
    [
        ({"exit": 0}, "unknown", 0),
        ({"exit": 32}, "unknown", 0),
    ],
)
async def test_death_while_the_service_is_away_is_told_by_the_next(
    listener: Client,
    mortal: Service,
    tmp_path: Path,
    ending: dict[str, int],
    reason: str,
    status: int,
) -> None:
    """Nobody watched, and nothing of the process is left that could be asked."""
    path = await listener.run(guest(tmp_path, then={**ending, "after": 0.3}))
    ((pid, _),) = mortal.traces()
    mortal.crash()
    _until_ended(pid)
    until_reaped(pid)
    mortal.start()
    assert (await listener.died(path))[1:] == [reason, status]
    assert await listener.get(path, "State") == "dead"
    assert "away" in await listener.get(path, "LastWords")
    mortal.crash()
    mortal.start()
    assert await listener.vm(path, "Wait") == [reason, status]
    assert _deaths(listener) == {path: 1}


@pytest.mark.parametrize(
    ("ending", "reason", "status"),
    [
        ({"exit": 0}, "shutdown", 0),
        ({"exit": 32}, "reboot", 32),
        ({"exit": 34}, "guest-panic", 34),
        ({"signal": signal.SIGABRT}, "crash", -signal.SIGABRT),
        ({"signal": signal.SIGKILL}, "signal", -signal.SIGKILL),
    ],
)
async def test_death_of_an_adopted_vm_has_its_true_reason(
    listener: Client,
    mortal: Service,
    tmp_path: Path,
    ending: dict[str, int],
    reason: str,
    status: int,
) -> None:
    """The VMM is no child of the service any more, and still the kernel tells how it ended."""
    kernel = guest(tmp_path, on={"SuspendVcpus": ending})
    path = await listener.run(kernel)
    mortal.crash()
    mortal.start()
    with contextlib.suppress(RemoteError):
        await listener.vm(path, "Suspend")
    assert (await listener.died(path))[1:] == [reason, status]


async def test_stop_goes_on_under_the_next_service(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """What a Stop was asked for is known, and so is how much time it has left."""
    deaf = {"ignore": True}
    path = await listener.run(guest(tmp_path, on={"Powerbtn": deaf, "Exit": deaf}))
    stopping = asyncio.create_task(listener.vm(path, "Stop", "t", 1_500_000))
    await listener.until_state(path, "stopping")
    mortal.crash()
    with pytest.raises(RemoteError):
        await stopping
    mortal.start()
    assert await listener.get(path, "State") == "stopping"
    assert (await listener.died(path))[1:] == ["killed", -signal.SIGKILL]


async def test_start_goes_on_under_the_next_service(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """A VMM that was spawned, but hadn't answered, may still come to run."""
    path = await listener.create(kernel=str(guest(tmp_path, boot={"delay": 1.0})))
    starting = asyncio.create_task(listener.vm(path, "Start"))
    await listener.until(lambda m: m.path == path and _says(m, "Pid"))
    mortal.crash()
    with pytest.raises(RemoteError):
        await starting
    mortal.start()
    await listener.until(lambda m: m.path == path and _says(m, "StartedTimestamp"))
    assert await listener.get(path, "State") == "running"
    await listener.vm(path, "Kill")
    assert (await listener.died(path))[1] == "killed"


def _says(message: Any, name: str) -> bool:
    return message.member == "PropertiesChanged" and name in message.body[1]


@pytest.mark.parametrize("state", ["suspended", "running"])
async def test_vcpus_are_as_the_state_says(
    listener: Client, mortal: Service, tmp_path: Path, state: str
) -> None:
    """A suspended VM is found suspended, and can be resumed."""
    path = await listener.run(guest(tmp_path))
    await listener.vm(path, "Suspend")
    if state == "running":
        await listener.vm(path, "Resume")
    mortal.crash()
    mortal.start()
    assert await listener.get(path, "State") == state
    await listener.vm(path, "Resume" if state == "suspended" else "Suspend")


async def test_ids_and_cids_go_on_where_they_stopped(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """An id is never given twice, though the VM that had it is gone with its files."""
    kernel = str(guest(tmp_path))
    first = await listener.create(kernel=kernel)
    cid = await listener.get(first, "CID")
    await listener.vm(first, "Remove")
    mortal.crash()
    mortal.start()
    second = await listener.create(kernel=kernel)
    assert [first, second] == ["/org/vmbus1/vm/1", "/org/vmbus1/vm/2"]
    assert await listener.get(second, "CID") == cid + 1


async def test_vm_that_was_not_started_says_what_it_lost(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """Descriptors end with a service that has no place to keep them; the VM can't be started."""
    path = await listener.create(kernel=str(guest(tmp_path)), name="late")
    mortal.crash()
    mortal.start()
    assert await listener.get(path, "State") == "not-started"
    async with refused(f"{ERROR}StartFailed") as texts:
        await listener.vm(path, "Start")
    assert "is not open any more, since the service was restarted" in texts[0]
    assert (await listener.died(path))[1] == "start-failed"


async def test_requester_that_left_meanwhile_takes_its_vm_along(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """kill_on_disconnect holds across services: for who left while there was none, and later."""
    kernel = guest(tmp_path)
    async with client(mortal.rig) as stays:
        async with client(mortal.rig) as leaves:
            gone = await leaves.run(kernel, kill_on_disconnect=True)
            there = await stays.run(kernel, kill_on_disconnect=True)
            mortal.crash()
        mortal.start()
        assert (await listener.died(gone))[1] == "requester-gone"
        assert await listener.get(there, "State") == "running"
    assert (await listener.died(there))[1] == "requester-gone"


async def test_console_is_taken_up_again(listener: Client, mortal: Service, tmp_path: Path) -> None:
    """What the guest prints while nobody reads comes into the log later, as far as it is kept."""
    path = await listener.run(guest(tmp_path, console="before\n", echo=True))
    mortal.crash()
    mortal.start()
    (stream,) = await listener.vm(path, "OpenConsole")
    try:
        os.write(stream, b"after\n")
        assert select.select([stream], [], [], DEADLINE)[0]
        assert os.read(stream, 100) == b"after\n"
    finally:
        os.close(stream)
    (log,) = await listener.vm(path, "OpenLog")
    with open(log, "rb") as file:
        assert file.read() == b"before\nafter\n"


async def test_output_that_was_lost_is_missed_in_the_log(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """A guest that prints more than can be kept for it runs on, and its log says so."""
    kernel = guest(tmp_path, boot={"delay": 0.5}, console=f"{'x' * 99}\n" * 1500)
    path = await listener.create(kernel=str(kernel))
    starting = asyncio.create_task(listener.vm(path, "Start"))
    await listener.until(lambda m: m.path == path and _says(m, "Pid"))
    mortal.crash()
    with pytest.raises(RemoteError):
        await starting
    fifo = mortal.runtime / "vm" / path.rpartition("/")[2] / "tmp" / "console.out"
    _until_full(fifo)
    mortal.start()
    await listener.vm(path, "Kill")
    (log,) = await listener.vm(path, "OpenLog")
    with open(log, "rb") as file:
        assert b"some of the output was lost" in file.read()


def _until_full(fifo: Path) -> None:
    fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        for _ in range(int(DEADLINE * 1000)):
            if not poll.poll(0):
                return
            os.sched_yield()
            select.select([], [], [], 0.001)
        raise AssertionError("the guest does not print")
    finally:
        os.close(fd)


async def test_bus_that_goes_away_takes_no_vm_along(rig: Rig, tmp_path: Path) -> None:
    """The service ends with an error, for who started it to start it anew; the VM runs on."""
    bus = Rig(system=False)
    service = Service(bus, {"crosvm": str(CROSVM), "kvm": "on"})
    async with client(bus) as caller:
        await caller.run(guest(tmp_path))
    traces = service.traces()
    bus.kill_bus()
    assert service.process.wait(DEADLINE) == 1
    assert service.traces() == traces and len(traces) == 1
    service.close()
    bus.services.clear()
    bus.close()


async def test_stop_all_ends_every_vm_for_the_hosts_sake(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """All at once, each in good order, and the service goes on."""
    paths = [await listener.run(guest(tmp_path)) for _ in range(3)]
    await listener.call(MANAGER_PATH, MANAGER, "StopAll", "t", [0])
    for path in paths:
        assert (await listener.died(path))[1:] == ["host-shutdown", 0]
    await listener.run(guest(tmp_path))


# The worst moments

LIVES: dict[str, dict[str, Any]] = {
    "stopped": {},
    "ended": {"on": {"SuspendVcpus": {"exit": 0}}},
    "not started": {"boot": {"error": "no"}},
    "killed": {"on": {"Powerbtn": {"ignore": True}}},
}


async def _live(bus: Client, kernel: Path, how: str) -> None:
    path = await bus.create(kernel=str(kernel))
    if how == "not started":
        async with refused(f"{ERROR}StartFailed"):
            await bus.vm(path, "Start")
    else:
        await bus.vm(path, "Start")
    if how == "stopped":
        await bus.vm(path, "Suspend")
        await bus.vm(path, "Resume")
        await bus.vm(path, "Stop", "t", 0)
    elif how == "killed":
        await bus.vm(path, "Kill")
    elif how == "ended":
        try:
            await bus.vm(path, "Suspend")
        except RemoteError as error:
            if error.name in GONE:
                raise
    await bus.vm(path, "Wait")
    await bus.vm(path, "Remove")


async def _settle(bus: Client, service: Service) -> None:
    """Bring what the last service left to its end, and see that nothing is left of it."""
    (rows,) = await bus.call(MANAGER_PATH, MANAGER, "List")
    known = {pid for pid, _ in service.traces()}
    for _, _, state, _, _, path in rows:
        assert state in ("not-started", "starting", "running", "suspended", "stopping") or (
            await bus.get(path, "DeathReason")
        )
        await bus.vm(path, "Kill")
        if state != "not-started":
            await bus.vm(path, "Wait")
        await bus.vm(path, "Remove")
    left = {each.name for each in (service.runtime / "vm").iterdir()}
    assert left == {"counters.json"}
    for pid in known:
        _until_ended(pid)
    assert not _vmms(service)


def _vmms(service: Service) -> list[int]:
    """Processes that have to do with this service's directory, or wait to be released."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != service.process.pid:
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if str(service.runtime).encode() in command and b"crosvm" in command:
                    found.append(int(entry.name))
    return found


def _attempted(bus: Client) -> set[str]:
    """VMs of which it was told that their Start was attempted."""
    return {
        m.path or ""
        for m in bus.signals
        if m.member == "PropertiesChanged"
        and m.body[0] == "org.vmbus1.VirtualMachine"
        and "State" in m.body[1]
    }


@pytest.mark.parametrize("how", LIVES)
async def test_every_moment_is_a_good_one_to_be_killed_in(
    listener: Client, mortal: Service, tmp_path: Path, how: str
) -> None:
    """Whatever the service was doing, the next one knows every VM, and tells every death once."""
    kernel = guest(tmp_path, **LIVES[how])
    steps = tmp_path / "steps"
    dying = Path(__file__).parent.parent / "fakes" / "dying_vmbusd.py"
    last = ""
    mortal.crash()
    for moment in itertools.count(1):
        mortal.start(dying, VMBUS_DIES_AT=str(moment), VMBUS_STEPS=str(steps))
        await _settle(listener, mortal)
        deaths = _deaths(listener)
        # Between the bus having it and our knowing that the bus has it there is no telling.
        often = {1, 2} if last.endswith("before told") else {1}
        assert set(deaths.values()) <= often, f"killed at {last}: {deaths}"
        assert set(deaths) == _attempted(listener), f"killed at {last}"
        listener.signals.clear()
        try:
            await _live(listener, kernel, how)
            break  # the whole life is through, and there was no such moment in it
        except RemoteError as error:
            assert error.name in GONE, error
        mortal.process.wait(DEADLINE)
        last = steps.read_text().splitlines()[-1]
    reached = steps.read_text()
    for name in ("save", "spawn", "release", "died", "told", "delete", "_flush"):
        assert (f"before {name}" in reached and f"after {name}" in reached) or how == "not started"


# Where nothing can be written


@pytest.fixture
def small_disk(rig: Rig) -> Iterator[tuple[Service, Path]]:
    """A service whose runtime directory is on a file system of its own, and the rest of that."""
    directory = rig.directory / f"run{len(rig.services)}"
    directory.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "none", directory], check=True
    )
    service = Service(rig, {"crosvm": str(CROSVM), "kvm": "on"})
    try:
        yield service, directory / "ballast"
    finally:
        service.close()
        subprocess.run(["umount", "--lazy", directory], check=True)


def _fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_full_disk_is_told_and_harms_no_vm(
    small_disk: tuple[Service, Path], tmp_path: Path
) -> None:
    """What can't be written down is not begun; what runs goes on, and its death is told once."""
    service, ballast = small_disk
    kernel = guest(tmp_path)
    async with listening(service.rig) as bus:
        running, ready = await bus.run(kernel), await bus.create(kernel=kernel)
        dies, ends = await bus.run(kernel), await bus.run(kernel)
        _fill(ballast)
        for what in (bus.create(kernel=kernel), bus.vm(ready, "Start")):
            async with refused(f"{STANDARD_ERROR}Failed") as texts:
                await what
            assert "No space left on device" in texts[0]
        assert await bus.get(ready, "State") == "not-started"
        assert await bus.get(MANAGER_PATH, "VMCount") == 4
        # It could not be written down, but is so: and the next service must not tell it again.
        await bus.vm(dies, "Kill")
        await bus.vm(ends, "Stop", "t", 0)
        service.crash()
        service.start()
        assert await bus.get(running, "State") == "running"
        ballast.unlink()
        await bus.vm(ready, "Remove")
        await bus.vm(running, "Suspend")
        await bus.vm(running, "Kill")
        assert (await bus.died(running))[1] == "killed"
        assert _deaths(bus) == {running: 1, dies: 1, ends: 1}


async def test_directory_that_cannot_be_written_to_is_told_and_harms_no_vm(tmp_path: Path) -> None:
    """What runs is suspended, killed and told of, though nothing of it can be written down."""
    rig = Rig(system=True)
    kernel = guest(tmp_path)
    try:
        with polkit(rig), kernel.open("rb") as file:
            service = Service(rig, {"crosvm": str(CROSVM), "kvm": "on"}, user="vmbus")
            async with listening(rig) as bus:
                path = await bus.create(kernel=Variant("h", 0), fds=[file.fileno()])
                await bus.vm(path, "Start")
                vms = service.runtime / "vm"
                for directory in (vms, vms / "1"):
                    directory.chmod(0o500)
                async with refused(f"{STANDARD_ERROR}Failed") as texts:
                    await bus.create(kernel=Variant("h", 0), fds=[file.fileno()])
                assert "Permission denied" in texts[0]
                await bus.vm(path, "Suspend")
                assert await bus.get(path, "State") == "suspended"
                await bus.vm(path, "Kill")
                assert (await bus.died(path))[1] == "killed"
                for directory in (vms, vms / "1"):
                    directory.chmod(0o700)
                await bus.vm(path, "Remove")
                assert [each.name for each in vms.iterdir()] == ["counters.json"]
    finally:
        rig.close()


@pytest.mark.parametrize("part", range(2))
async def test_random_moments_are_good_ones_too(
    listener: Client, mortal: Service, tmp_path: Path, part: int
) -> None:
    """Several VMs at once, each at another point of its life, and a service killed at any time."""
    chance = random.Random(part)
    twice: Counter[str] = Counter()
    kernels = [guest(tmp_path, **LIVES[how]) for how in LIVES]
    for _ in range(int(os.environ.get("VMBUS_CRASHES", "15"))):
        listener.signals.clear()
        lives = [
            asyncio.create_task(_live(listener, kernel, how))
            for kernel, how in zip(kernels, LIVES, strict=True)
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.uniform(0, 0.25)):
                await asyncio.wait(lives)
        mortal.crash()
        for life in lives:
            try:
                await life
            except RemoteError as error:
                assert error.name in GONE, error
        unsure = await _told_but_not_noted(listener, mortal)
        mortal.start()
        await _settle(listener, mortal)
        deaths = _deaths(listener)
        assert set(deaths) == _attempted(listener)
        again = deaths - Counter(set(deaths))
        assert set(again) <= unsure
        twice += again
    # Microseconds, of which a quarter of a second has many.
    assert twice.total() <= 1


async def _told_but_not_noted(bus: Client, service: Service) -> set[str]:
    """VMs whose Died the bus has had, though the service was killed before it could note that."""
    await bus.connection.call_bus("GetId", "", [])  # and so after all that it has had
    directory = service.runtime / "vm"
    return {
        path
        for path in _deaths(bus)
        if (own := directory / path.rpartition("/")[2]).exists() and not (own / "told").exists()
    }


async def test_vms_that_are_being_started_get_under_way_before_the_service_ends(
    listener: Client, mortal: Service, tmp_path: Path
) -> None:
    """Told to end, it leaves none between having been spawned and having been let through."""
    paths = [await listener.create(kernel=guest(tmp_path)) for _ in range(10)]
    starts = [asyncio.create_task(listener.vm(path, "Start")) for path in paths]
    await listener.until(lambda m: m.path == paths[0] and _says(m, "State"))
    assert await asyncio.to_thread(mortal.terminate) == 0
    results = await asyncio.gather(*starts, return_exceptions=True)
    mortal.start()
    begun = [path for path in paths if await listener.get(path, "State") != "not-started"]
    assert begun
    for path in begun:
        if await listener.get(path, "State") == "starting":
            await listener.until(
                lambda m, path=path: m.path == path and _says(m, "StartedTimestamp")
            )
        assert await listener.get(path, "State") == "running"
    assert not _deaths(listener)
    assert all(result == [] or isinstance(result, RemoteError) for result in results)
