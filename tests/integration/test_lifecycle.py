"""A VM from Create to Remove, on a real bus, in the crosvm stand-in."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rig import (
    CROSVM,
    DEADLINE,
    ERROR,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    STANDARD_ERROR,
    VM,
    Client,
    Rig,
    Service,
    client,
    guest,
    listening,
    plain,
    refused,
)
from vmbus.bus.connection import RemoteError
from vmbus.bus.wire import Variant


async def _names(bus: Client, path: str) -> list[Any]:
    """What was signalled about a VM: the names of the changed properties, and Died."""
    return [
        sorted(plain(message.body)[1]) if message.member == "PropertiesChanged" else message.member
        for message in bus.of(path)
    ]


async def test_create_starts_nothing(bus: Client, service: Service, tmp_path: Path) -> None:
    before = service.children()
    path = await bus.create(kernel=guest(tmp_path), name="idle", memory_mib=64, cpus=1)
    found = await bus.get_all(path)
    assert service.children() == before
    assert found.pop("CreatedTimestamp") > 0
    assert found.pop("Id") == int(path.rpartition("/")[2])
    assert 2048 <= found.pop("CID") <= 65535
    assert found == {
        "Name": "idle",
        "VMM": "crosvm",
        "MemoryMiB": 64,
        "CPUs": 1,
        "State": "not-started",
        "PayloadState": "none",
        "PayloadExitStatus": -1,
        "StatusText": "",
        "RequesterUid": os.getuid(),
        "RequesterPid": os.getpid(),
        "RequesterSid": "",
        "Pid": 0,
        "StartedTimestamp": 0,
        "DiedTimestamp": 0,
        "DeathReason": "",
        "ExitStatus": 0,
        "LastWords": "",
        "MemoryActual": 0,
        "Protected": False,
    }
    assert await bus.call(MANAGER_PATH, MANAGER, "GetVM", "s", ["idle"]) == [path]
    await bus.vm(path, "Remove")


async def test_the_whole_life_is_told_in_order(bus: Client, tmp_path: Path) -> None:
    """PropertiesChanged, then Died, once, then Wait's answer."""
    path = await bus.create(kernel=guest(tmp_path, then={"exit": 32}))
    answers: list[str] = []

    async def wait() -> list[Any]:
        answer = await bus.vm(path, "Wait")
        answers.append("Died" if any(m.member == "Died" for m in bus.of(path)) else "too early")
        return answer

    waiting = asyncio.create_task(wait())
    await bus.vm(path, "Start")
    cid = await bus.get(path, "CID")
    assert await waiting == ["reboot", 32]
    assert answers == ["Died"]
    assert await bus.died(path) == [cid, "reboot", 32]
    assert await _names(bus, path) == [
        ["State"],
        ["Pid"],
        ["PayloadState", "StartedTimestamp", "State"],
        ["DeathReason", "DiedTimestamp", "ExitStatus", "LastWords", "Pid", "State"],
        "Died",
    ]
    assert await bus.vm(path, "Wait") == ["reboot", 32]
    assert await bus.get(path, "State") == "dead"
    await bus.vm(path, "Remove")


@pytest.mark.parametrize(
    ("then", "reason", "status"),
    [
        ({"exit": 0}, "shutdown", 0),
        ({"exit": 1}, "crash", 1),
        ({"exit": 32}, "reboot", 32),
        ({"exit": 33}, "crash", 33),
        ({"exit": 34}, "guest-panic", 34),
        ({"exit": 36}, "watchdog", 36),
        ({"kill_group": True, "exit": 32}, "reboot", -9),
        ({"signal": signal.SIGKILL}, "signal", -9),
        ({"signal": signal.SIGTERM}, "signal", -15),
        ({"signal": signal.SIGABRT}, "crash", -6),
    ],
)
async def test_every_end_has_its_reason(
    bus: Client, tmp_path: Path, then: dict[str, Any], reason: str, status: int
) -> None:
    path = await bus.run(guest(tmp_path, then=then))
    assert await bus.vm(path, "Wait") == [reason, status]
    assert await bus.get(path, "DeathReason") == reason
    await bus.vm(path, "Remove")


async def test_a_kill_from_outside_is_not_ours(bus: Client, tmp_path: Path) -> None:
    """What the OOM killer does is told as `signal`, with nobody having asked for anything."""
    path = await bus.run(guest(tmp_path))
    os.kill(await bus.get(path, "Pid"), signal.SIGKILL)
    assert (await bus.died(path))[1:] == ["signal", -9]


async def test_kill(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path))
    pid = await bus.get(path, "Pid")
    await bus.vm(path, "Kill")
    assert await bus.get(path, "State") == "dead"
    assert not Path(f"/proc/{pid}").exists()
    await bus.vm(path, "Kill")
    assert [m.member for m in bus.of(path)].count("Died") == 1
    assert (await bus.died(path))[1:] == ["killed", -9]


async def test_kill_of_a_vm_that_never_ran_changes_nothing(bus: Client, tmp_path: Path) -> None:
    path = await bus.create(kernel=guest(tmp_path))
    await bus.vm(path, "Kill")
    assert await bus.get(path, "State") == "not-started"
    assert bus.of(path) == []
    await bus.vm(path, "Remove")


async def test_stop(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path))
    await bus.vm(path, "Stop", "t", 0)
    assert (await bus.died(path))[1:] == ["stopped", 0]


async def test_stop_of_a_guest_that_ignores_it(bus: Client, tmp_path: Path) -> None:
    deaf = guest(tmp_path, on={"Powerbtn": {"ignore": True}})
    path = await bus.run(deaf)
    await bus.vm(path, "Stop", "t", 200_000)
    assert (await bus.died(path))[1] == "killed"


async def test_stop_without_a_power_button_uses_the_vmms_own(bus: Client, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path, on={"Powerbtn": {"reply": {"Err": 95}}}))
    await bus.vm(path, "Stop", "t", 0)
    assert (await bus.died(path))[1:] == ["stopped", 0]


async def test_kill_ends_a_stop_that_waits(bus: Client, tmp_path: Path) -> None:
    deaf = guest(tmp_path, on={"Powerbtn": {"ignore": True}})
    path = await bus.run(deaf)
    stopping = asyncio.create_task(bus.vm(path, "Stop", "t", 3600 * 1_000_000))
    await bus.until_state(path, "stopping")
    await bus.vm(path, "Kill")
    assert await stopping == []
    assert (await bus.died(path))[1:] == ["killed", -9]


async def test_of_two_starts_one_wins(bus: Client, service: Service, tmp_path: Path) -> None:
    path = await bus.create(kernel=guest(tmp_path))
    async with client(service.rig) as other:
        done = await asyncio.gather(
            *(each.vm(path, "Start") for each in (bus, other, bus, other)), return_exceptions=True
        )
    lost = [each for each in done if isinstance(each, RemoteError)]
    assert len(lost) == 3
    assert {each.name for each in lost} == {ERROR + "InvalidState"}
    assert await bus.get(path, "State") == "running"
    async with refused(ERROR + "InvalidState") as text:
        await bus.vm(path, "Start")
    assert "running" in text[0]
    assert "not-started" in text[0]
    await bus.vm(path, "Kill")


async def test_kill_during_start(bus: Client, tmp_path: Path) -> None:
    path = await bus.create(kernel=guest(tmp_path, boot={"hang": True}))
    starting = asyncio.create_task(bus.vm(path, "Start"))
    await bus.until_state(path, "starting")
    await bus.vm(path, "Kill")
    with pytest.raises(RemoteError) as failed:
        await starting
    assert failed.value.name == ERROR + "StartFailed"
    assert await bus.get(path, "State") == "failed"
    assert (await bus.died(path))[1] == "killed"


async def test_start_and_kill_in_one_breath(bus: Client, tmp_path: Path) -> None:
    """Calls of one client take effect in the order they came."""
    for _ in range(20):
        path = await bus.create(kernel=guest(tmp_path, boot={"hang": True}))
        starting = asyncio.create_task(bus.vm(path, "Start"))
        killing = asyncio.create_task(bus.vm(path, "Kill"))
        await killing
        with pytest.raises(RemoteError):
            await starting
        assert await bus.get(path, "State") == "failed"
        assert (await bus.died(path))[1] == "killed"
        await bus.vm(path, "Remove")


@pytest.mark.parametrize(
    ("boot", "words"),
    [
        ({"error": "the moon is in the wrong place"}, "the moon is in the wrong place"),
        ({"exit": 33}, ""),
        ({"signal": signal.SIGSEGV}, ""),
    ],
)
async def test_a_vmm_that_ends_first(
    bus: Client, tmp_path: Path, boot: dict[str, Any], words: str
) -> None:
    path = await bus.create(kernel=guest(tmp_path, boot=boot))
    async with refused(ERROR + "StartFailed") as text:
        await bus.vm(path, "Start")
    assert words in text[0]
    found = await bus.get_all(path)
    assert found["State"] == "failed"
    assert found["DeathReason"] == "start-failed"
    assert words in found["LastWords"]
    assert found["Pid"] == 0
    assert (await bus.died(path))[1] == "start-failed"


async def test_a_kernel_that_is_none(bus: Client, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_text("not a kernel")
    path = await bus.create(kernel=kernel)
    async with refused(ERROR + "StartFailed") as text:
        await bus.vm(path, "Start")
    assert "magic" in text[0]


async def test_remove(bus: Client, service: Service, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path))
    async with refused(ERROR + "InvalidState") as text:
        await bus.vm(path, "Remove")
    assert "running" in text[0]
    await bus.vm(path, "Kill")
    own = service.runtime / "vm" / path.rpartition("/")[2]
    assert own.exists()
    await bus.vm(path, "Remove")
    assert not own.exists()
    async with refused(STANDARD_ERROR + "UnknownObject"):
        await bus.get(path, "State")
    removed = await bus.until(lambda m: m.member == "InterfacesRemoved" and m.body[0] == path)
    assert removed.path == MANAGER_PATH


async def test_wait_for_a_vm_that_is_removed_first(bus: Client, tmp_path: Path) -> None:
    path = await bus.create(kernel=guest(tmp_path))
    waiting = asyncio.create_task(bus.vm(path, "Wait"))
    await bus.get(path, "State")
    await bus.vm(path, "Remove")
    with pytest.raises(RemoteError) as gone:
        await waiting
    assert gone.value.name == ERROR + "NoSuchVM"


async def test_collect_on_death(bus: Client, service: Service, tmp_path: Path) -> None:
    path = await bus.run(guest(tmp_path), collect="on-death", name="brief")
    await bus.vm(path, "Kill")
    await bus.until(lambda m: m.member == "InterfacesRemoved" and m.body[0] == path)
    members = [m.member for m in bus.signals if m.path == path or path in plain(m.body)]
    assert members.index("Died") < members.index("InterfacesRemoved")
    assert not (service.runtime / "vm" / path.rpartition("/")[2]).exists()
    again = await bus.create(kernel=guest(tmp_path), name="brief")
    assert again != path
    await bus.vm(again, "Remove")


async def test_temporary_files_go_at_death_and_the_log_stays(
    bus: Client, service: Service, tmp_path: Path
) -> None:
    path = await bus.run(guest(tmp_path, console="hello from the guest\n"))
    own = service.runtime / "vm" / path.rpartition("/")[2]
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert stat.S_ISSOCK((own / "tmp" / "control").stat().st_mode)
    await bus.vm(path, "Kill")
    left = {each.name for each in own.iterdir()}
    assert "console.log" in left and "tmp" not in left
    (log,) = await bus.vm(path, "OpenLog")
    assert os.read(log, 100) == b"hello from the guest\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(log, b"x")
    os.close(log)


async def test_console(bus: Client, tmp_path: Path) -> None:
    """Both ways, for two readers, from before Start until the end of the VM."""
    path = await bus.create(kernel=guest(tmp_path, console="login: ", echo=True))
    loop = asyncio.get_running_loop()
    first, second = [await _console(bus, path) for _ in range(2)]
    await bus.vm(path, "Start")
    await loop.sock_sendall(first, b"root\n")
    for stream in (first, second):
        assert await _read(stream, len("login: root\n")) == b"login: root\n"
    await bus.vm(path, "Kill")
    for stream in (first, second):
        assert await loop.sock_recv(stream, 1) == b""
        stream.close()
    async with refused(ERROR + "InvalidState"):
        await bus.vm(path, "OpenConsole")


async def _console(bus: Client, path: str) -> socket.socket:
    (fd,) = await bus.vm(path, "OpenConsole")
    stream = socket.socket(fileno=fd)
    stream.setblocking(False)
    return stream


async def _read(stream: socket.socket, size: int) -> bytes:
    data = b""
    async with asyncio.timeout(DEADLINE):
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(stream, size - len(data))
    return data


async def test_one_match_sees_every_death(bus: Client, service: Service, tmp_path: Path) -> None:
    async with client(service.rig) as listener:
        await listener.listen("interface='org.vmbus1.VirtualMachine',member='Died'")
        paths = [await bus.run(guest(tmp_path)) for _ in range(5)]
        await asyncio.gather(*(bus.vm(path, "Kill") for path in paths))
        for path in paths:
            assert (await listener.died(path))[1:] == ["killed", -9]
        heard = [m.path for m in listener.signals if m.member == "Died"]
        assert sorted(path for path in heard if path in paths) == sorted(paths)


def _pipe(tmp_path: Path) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _read_only(tmp_path: Path) -> int:
    disk = tmp_path / "disk"
    disk.touch()
    return os.open(disk, os.O_RDONLY)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, ["kernel"]),
    "unknown key": ({"kernel": "/dev/null", "colour": "red"}, ["colour", "kernel"]),
    "wrong type": ({"memory_mib": "much", "cpus": True}, ["memory_mib", "cpus", "kernel"]),
    "kernel and bios": ({"kernel": "/dev/zero", "bios": "/dev/zero"}, ["kernel, bios"]),
    "no memory": ({"memory_mib": 0}, ["memory_mib"]),
    "too much memory": ({"memory_mib": 1 << 40}, ["memory_mib"]),
    "a name with a slash": ({"name": "../etc"}, ["name"]),
    "a relative path": ({"kernel": "vmlinuz"}, ["kernel"]),
    "100 KB of params": ({"params": "x" * 100_000}, ["params"]),
    "no such file": ({"kernel": "/no/such/file"}, ["kernel"]),
    "a directory": ({"kernel": "/"}, ["kernel"]),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_config(bus: Client, service: Service, case: str) -> None:
    """Every problem is named; nothing is created, and no descriptor stays."""
    config, named = BAD[case]
    count, before = await bus.get(MANAGER_PATH, "VMCount"), service.fds()
    async with refused(ERROR + "InvalidConfig") as text:
        await bus.create(**config)
    for key in named:
        assert f"{key}:" in text[0]
    assert await bus.get(MANAGER_PATH, "VMCount") == count
    assert service.fds() == before


@pytest.mark.parametrize(
    ("make", "config", "named"),
    [
        (_pipe, {"kernel": Variant("h", 0)}, "kernel: it must be a regular file"),
        (
            _read_only,
            {
                "kernel": Variant("h", 0),
                "disks": [{"image": Variant("h", 0), "writable": True}],
            },
            "disks[0].image: the file is open read-only",
        ),
    ],
)
async def test_bad_descriptor(
    bus: Client,
    service: Service,
    tmp_path: Path,
    make: Callable[[Path], int],
    config: dict[str, Any],
    named: str,
) -> None:
    fd, before = make(tmp_path), service.fds()
    try:
        async with refused(ERROR + "InvalidConfig") as text:
            await bus.create(fds=[fd], **config)
    finally:
        os.close(fd)
    assert named in text[0]
    assert service.fds() == before


async def test_descriptors(bus: Client, service: Service, tmp_path: Path) -> None:
    """A kernel and disks by descriptor; after Start the service keeps the writable one alone."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    kernel_fd = os.open(guest(tmp_path), os.O_RDONLY)
    disk_fd = os.open(disk, os.O_RDWR)
    path = await bus.create(
        fds=[kernel_fd, disk_fd],
        kernel=Variant("h", 0),
        disks=[{"image": Variant("h", 1), "writable": True, "id": "root"}],
    )
    os.close(kernel_fd)
    os.close(disk_fd)
    await bus.vm(path, "Start")
    assert [link for link in service.fds() if str(tmp_path) in link] == [str(disk)]
    await bus.vm(path, "Kill")
    assert not any(str(tmp_path) in link for link in service.fds())


async def test_name_exists(bus: Client, service: Service, tmp_path: Path) -> None:
    path = await bus.create(kernel=guest(tmp_path), name="only")
    before = service.fds()
    async with refused(ERROR + "NameExists"):
        await bus.create(kernel=guest(tmp_path), name="only")
    assert service.fds() == before
    await bus.vm(path, "Remove")


async def test_unavailable_vmm(tmp_path: Path) -> None:
    strange = Service(Rig(system=False), {"crosvm": "/no/crosvm", "qemu": "/no/qemu"})
    try:
        async with client(strange.rig) as caller:
            async with refused(ERROR + "VMMUnavailable") as text:
                await caller.create(kernel=guest(tmp_path))
            assert await caller.get(MANAGER_PATH, "AvailableVMMs") == []
        assert "/no/crosvm" in text[0]
        assert "/no/qemu" in text[0]
    finally:
        strange.rig.close()


async def test_a_service_that_ends_answers_who_waits_and_leaves_its_vms(tmp_path: Path) -> None:
    rig = Rig(system=False)
    try:
        ending = Service(rig, {"crosvm": str(CROSVM), "kvm": "on"})
        async with listening(rig) as caller:
            deaf = guest(tmp_path, on={"Powerbtn": {"ignore": True}, "Exit": {"silent": True}})
            paths = [await caller.run(kernel) for kernel in (guest(tmp_path), deaf)]
            pids = [await caller.get(path, "Pid") for path in paths]
            waits = [asyncio.create_task(caller.vm(path, "Wait")) for path in paths]
            await caller.get(paths[0], "State")  # and so after the waits
            assert await asyncio.to_thread(ending.terminate) == 0
            for wait in waits:
                async with refused(STANDARD_ERROR + "Failed") as text:
                    await wait
                assert text == ["the service is shutting down"]
            assert not any(message.member == "Died" for message in caller.signals)
        assert {pid for pid, _ in ending.traces()} == set(pids)
    finally:
        rig.close()


async def test_many_rounds_leave_nothing_behind(service: Service, tmp_path: Path) -> None:
    """200 rounds of create, start, kill, remove."""
    kernel = guest(tmp_path)
    async with client(service.rig) as caller:

        async def one() -> None:
            path = await caller.create(kernel=kernel)
            await caller.vm(path, "Start")
            await caller.vm(path, "Kill")
            await caller.vm(path, "Remove")

        for _ in range(20):
            await one()
        fds, memory = service.fds(), service.resident()
        left = sorted((service.runtime / "vm").iterdir())
        for _ in range(50):
            await asyncio.gather(*(one() for _ in range(4)))
        assert service.fds() == fds
        assert service.children() == []
        assert sorted((service.runtime / "vm").iterdir()) == left
        assert service.resident() < memory + 4 * 1024 * 1024


async def test_a_reader_that_has_said_all_still_hears(bus: Client, tmp_path: Path) -> None:
    path = await bus.create(kernel=guest(tmp_path, console="login: ", echo=True))
    stream = await _console(bus, path)
    await asyncio.get_running_loop().sock_sendall(stream, b"root\n")
    stream.shutdown(socket.SHUT_WR)
    await bus.vm(path, "Start")
    assert (await _read(stream, len("login: "))).startswith(b"login: ")
    stream.close()
    await bus.vm(path, "Kill")


async def test_hostile_words_of_a_vmm(bus: Client, tmp_path: Path) -> None:
    """What a VMM says may break its own VM, not what others are told."""
    words = {"ErrString": "bad\0\ud800\n\x1b[31m words"}
    path = await bus.create(kernel=guest(tmp_path, on={"VcpuPidTid": {"reply": words}}))
    async with refused(ERROR + "StartFailed") as text:
        await bus.vm(path, "Start")
    assert "words" in text[0]
    await bus.died(path)
    changes = [plain(m.body)[1] for m in bus.of(path) if m.member == "PropertiesChanged"]
    assert changes[-1]["State"] == "failed"
    found = await bus.get_all(path)
    assert found["LastWords"].isprintable()
    objects = await bus.call(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects")
    assert path in objects[0]
    await bus.vm(path, "Remove")


async def test_a_kernel_larger_than_the_guests_memory(bus: Client, tmp_path: Path) -> None:
    kernel = tmp_path / "huge"
    with kernel.open("wb") as file:
        file.truncate(1 << 40)
    async with refused(ERROR + "InvalidConfig") as text:
        await bus.create(kernel=kernel)
    assert "kernel: the file is larger" in text[0]


async def test_a_shared_directory_that_is_another_by_start(bus: Client, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shares = [{"source": str(shared), "tag": "t", "writable": True}]
    path = await bus.create(kernel=guest(tmp_path), shared_dirs=shares)
    shared.rmdir()
    shared.symlink_to("/etc")
    async with refused(ERROR + "StartFailed") as text:
        await bus.vm(path, "Start")
    assert "not the directory that it was at Create" in text[0]
    await bus.vm(path, "Remove")


async def test_an_image_that_is_not_raw_any_more_by_start(bus: Client, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    path = await bus.create(kernel=guest(tmp_path), disks=[{"image": str(disk)}])
    disk.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    async with refused(ERROR + "StartFailed") as text:
        await bus.vm(path, "Start")
    assert "qcow2" in text[0]
    await bus.vm(path, "Remove")


async def test_a_disk_that_grew_meanwhile_never_shrinks(bus: Client, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    disks = [{"image": str(disk), "writable": True}]
    path = await bus.create(kernel=guest(tmp_path), disks=disks)
    os.truncate(disk, 8 << 20)
    await bus.vm(path, "Start")
    async with refused(STANDARD_ERROR + "InvalidArgs") as text:
        await bus.vm(path, "ResizeDisk", "ut", 0, 2 << 20)
    assert str(8 << 20) in text[0]
    assert disk.stat().st_size == 8 << 20
    await bus.vm(path, "Kill")


async def test_waits_hold_no_descriptors(bus: Client, service: Service, tmp_path: Path) -> None:
    """Descriptors that came with a call that takes none are closed before it is answered."""
    path = await bus.create(kernel=guest(tmp_path))
    fds = service.fds()
    with open("/dev/null") as null:
        waits = [
            asyncio.create_task(bus.call(path, VM, "Wait", fds=[null.fileno()] * 16))
            for _ in range(20)
        ]
        await bus.get(path, "State")
        await bus.get(path, "State")
        assert service.fds() == fds
    await bus.vm(path, "Start")
    await bus.vm(path, "Kill")
    assert {tuple(await wait) for wait in waits} == {("killed", -9)}
