"""The service on a system bus with the project's own policy, and started by a bus on demand."""

from __future__ import annotations

import asyncio
import os
import select
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LIBRARIES
from tests.contract import INTROSPECTABLE, METHODS
from tests.frames import Var
from tests.handmade import raw
from tests.polkit import polkit
from tests.rig import (
    BUS,
    CROSVM,
    DEADLINE,
    ERROR,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    PROPERTIES,
    STANDARD_ERROR,
    VM,
    Client,
    Rig,
    Service,
    client,
    guest,
    listening,
    refused,
    vmbusd,
)

NOBODY = 65534


@pytest.fixture(scope="module", params=LIBRARIES)
def system_service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A vmbusd of the user vmbus, on a bus of its own, with polkit."""
    rig = Rig(system=True)
    images = rig.directory / "images"
    images.mkdir()
    settings = {"crosvm": str(CROSVM), "kvm": "on", "image_directories": [str(images)]}
    with polkit(rig):
        yield Service(rig, settings, {"VMBUS_DBUS_LIBRARY": str(request.param)}, user="vmbus")
        rig.close()


@pytest.fixture
async def root(system_service: Service) -> AsyncIterator[Client]:
    """A client of root's that has heard every signal since the test began."""
    async with listening(system_service.rig) as connected:
        yield connected


@pytest.fixture
def kernel(system_service: Service) -> Path:
    return guest(system_service.rig.directory / "images")


def nobody(service: Service, path: str, method: str, *arguments: str) -> str:
    """What gdbus says to a user who is nobody here."""
    options = ["-d", BUS, "-o", path, "-m", method, *arguments]
    return service.rig.gdbus("call", *options, user=NOBODY, group=NOBODY)


# Who may do what


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        (f"{MANAGER}.List", [], "'{path}'"),
        (f"{MANAGER}.GetVM", ["{name}"], "'{path}'"),
        (f"{OBJECT_MANAGER}.GetManagedObjects", [], "'{path}'"),
        (f"{PROPERTIES}.Get", [MANAGER, "VMCount"], "<uint32 "),
        (f"{PROPERTIES}.GetAll", [MANAGER], "'VMCount'"),
        (f"{INTROSPECTABLE}.Introspect", [], f'<interface name="{MANAGER}">'),
        ("org.freedesktop.DBus.Peer.Ping", [], "()"),
    ],
)
async def test_everybody_may_read(
    root: Client,
    system_service: Service,
    kernel: Path,
    method: str,
    arguments: list[str],
    expected: str,
) -> None:
    path = await root.create(kernel=kernel)
    names = {"path": path, "name": await root.get(path, "Name")}
    arguments = [each.format(**names) for each in arguments]
    said = await asyncio.to_thread(nobody, system_service, MANAGER_PATH, method, *arguments)
    assert expected.format(**names) in said


async def test_busctl_of_anybody_shows_everything(
    root: Client, system_service: Service, kernel: Path
) -> None:
    path = await root.create(kernel=kernel)
    for arguments, expected in (
        (["tree", "--list", BUS], path),
        (["introspect", BUS, path], ".RequesterUid"),
        (["get-property", BUS, path, VM, "State"], 's "not-started"'),
    ):
        done = await asyncio.to_thread(
            system_service.rig.command, "busctl", "--system", *arguments, user=NOBODY
        )
        assert expected in done.stdout, done.stderr


async def test_nobody_may_create_unless_polkit_says_so(
    root: Client, system_service: Service, kernel: Path
) -> None:
    config = f"{{'kernel': <'{kernel}'>}}"
    before = await root.get(MANAGER_PATH, "VMCount")
    said = await asyncio.to_thread(
        nobody, system_service, MANAGER_PATH, f"{MANAGER}.Create", config
    )
    assert f"{STANDARD_ERROR}InteractiveAuthorizationRequired" in said
    assert "org.vmbus1.create needs authentication" in said
    assert await root.get(MANAGER_PATH, "VMCount") == before
    path = await root.create(kernel=kernel)
    assert await root.get(path, "RequesterUid") == 0
    assert await root.get(path, "RequesterPid") == os.getpid()


async def test_a_refusal_tells_nothing_of_what_was_asked_for(
    root: Client, system_service: Service
) -> None:
    config = "{'kernel': <'/etc/shadow'>, 'nonsense': <1>}"
    said = await asyncio.to_thread(
        nobody, system_service, MANAGER_PATH, f"{MANAGER}.Create", config
    )
    assert f"{STANDARD_ERROR}InteractiveAuthorizationRequired" in said
    assert "shadow" not in said and "nonsense" not in said


@pytest.mark.parametrize(
    ("member", "arguments"),
    [
        ("Start", []),
        ("Stop", ["0"]),
        ("Kill", []),
        ("Remove", []),
        ("OpenConsole", []),
        ("OpenLog", []),
    ],
)
async def test_nobody_may_touch_what_is_roots(
    root: Client, system_service: Service, kernel: Path, member: str, arguments: list[str]
) -> None:
    path = await root.create(kernel=kernel)
    await root.vm(path, "Start")
    before = await root.get_all(path)
    said = await asyncio.to_thread(nobody, system_service, path, f"{VM}.{member}", *arguments)
    assert f"{STANDARD_ERROR}InteractiveAuthorizationRequired" in said
    assert "org.vmbus1.manage needs authentication" in said
    assert await root.get_all(path) == before
    await root.vm(path, "Kill")


async def test_nobody_may_own_the_name(system_service: Service) -> None:
    bus_name = "org.freedesktop.DBus"
    options = ["-d", bus_name, "-o", "/org/freedesktop/DBus", "-m", f"{bus_name}.RequestName"]
    said = await asyncio.to_thread(
        system_service.rig.gdbus, "call", *options, BUS, "7", user=NOBODY
    )
    assert f"{STANDARD_ERROR}AccessDenied" in said
    assert "own" in said


def test_root_may_not_run_the_service(system_service: Service) -> None:
    rig = system_service.rig
    done = rig.command(sys.executable, "-m", "vmbus.daemon", "--runtime-dir", str(rig.directory))
    assert done.returncode == 1
    assert "won't run as root; start it as the user vmbus" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "held"),
    [
        (
            ["--inh-caps=+net_admin", "--ambient-caps=+net_admin"],
            "effective, permitted, inheritable, ambient",
        ),
        (["--inh-caps=+net_admin"], "inheritable"),
    ],
)
def test_the_service_may_not_run_with_capabilities(
    system_service: Service, options: list[str], held: str
) -> None:
    argv = ["setpriv", "--reuid=vmbus", "--regid=vmbus", "--clear-groups", *options]
    argv += [sys.executable, "-m", "vmbus.daemon", "--runtime-dir", "/nonexistent"]
    done = system_service.rig.command(*argv)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"won't run with capabilities ({held}); start it without" in line
    # What the line says helps: then it is but the directory that can't be had.
    command = argv.index(sys.executable)
    argv[command:command] = ["setpriv", "--ambient-caps=-all", "--inh-caps=-all"]
    assert "can't use the runtime directory" in system_service.rig.command(*argv).stderr


def status(pid: int) -> dict[str, str]:
    """A process' credentials and more, as the kernel tells them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


async def test_neither_the_service_nor_a_vmm_has_or_gains_a_privilege(
    root: Client, system_service: Service, kernel: Path
) -> None:
    path = await root.create(kernel=kernel)
    await root.vm(path, "Start")
    for pid in (system_service.process.pid, await root.get(path, "Pid")):
        found = status(pid)
        assert "0" not in found["Uid"].split()
        sets = ("CapInh", "CapPrm", "CapEff", "CapAmb")
        assert {int(found[each], 16) for each in sets} == {0}
        assert found["NoNewPrivs"] == "1"
    await root.vm(path, "Kill")


# What the bus itself keeps out, from root too


@pytest.mark.parametrize(
    ("interface", "member"),
    [
        (MANAGER, "Destroy"),
        (VM, "List"),
        (PROPERTIES, "Nonsense"),
        ("org.freedesktop.DBus.Debug.Stats", "GetStats"),
        (None, "List"),
        (None, "Ping"),
    ],
)
async def test_the_bus_refuses_what_the_contract_does_not_name(
    system_service: Service, interface: str | None, member: str
) -> None:
    async with raw(system_service.rig) as hand:
        async with refused(STANDARD_ERROR + "AccessDenied") as texts:
            await hand.call(MANAGER_PATH, interface, member)
        assert "Rejected send message" in texts[0]


async def test_the_policy_lets_the_whole_contract_through(
    root: Client, system_service: Service, kernel: Path
) -> None:
    """Or a method that was added would work on every bus but the one that matters."""
    path = await root.create(kernel=kernel)
    async with raw(system_service.rig) as hand:
        for interface, member, _ in METHODS:
            home = MANAGER_PATH if interface in (MANAGER, OBJECT_MANAGER) else path
            async with refused(STANDARD_ERROR + "InvalidArgs"):
                await hand.call(home, interface, member, "d", [0.5])


async def test_a_kernel_must_be_below_an_image_directory(
    root: Client, system_service: Service, tmp_path: Path
) -> None:
    images = system_service.rig.directory / "images"
    outside = guest(tmp_path)
    link = images / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    for path in (outside, link, images / ".." / "bus.conf"):
        async with refused(ERROR + "InvalidConfig") as texts:
            await root.create(kernel=path)
        assert f"not below an image directory ({images})" in texts[0]


async def test_an_open_file_may_be_anywhere(
    root: Client, system_service: Service, tmp_path: Path
) -> None:
    with guest(tmp_path).open() as file:
        async with raw(system_service.rig) as hand:
            config = {"kernel": Var("h", 0)}
            (path,) = await hand.call(
                MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], fds=[file.fileno()]
            )
    await root.vm(path, "Start")
    await root.vm(path, "Kill")


# Started on demand


@pytest.fixture(params=[False, True], ids=["session", "system"])
def empty_rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A bus that nobody serves."""
    rig = Rig(system=request.param)
    yield rig
    rig.close()


@pytest.mark.parametrize("library", LIBRARIES)
async def test_the_first_call_starts_the_service(empty_rig: Rig, library: str) -> None:
    settings = {"crosvm": str(CROSVM), "kvm": "on"}
    argv = vmbusd(empty_rig.directory, "", settings, user=not empty_rig.system)
    log = empty_rig.directory / "vmbusd.log"
    wrapper = empty_rig.directory / "start"
    wrapper.write_text(
        f"#!/bin/sh\nVMBUS_DBUS_LIBRARY={library} exec {shlex.join(argv)} 2>>{log}\n"
    )
    wrapper.chmod(0o755)
    service = empty_rig.directory / "services" / f"{BUS}.service"
    service.write_text(f"[D-BUS Service]\nName={BUS}\nExec={wrapper}\n")
    async with client(empty_rig) as bus:
        for round_ in range(2):
            calls: list[Any] = [bus.call(MANAGER_PATH, MANAGER, "List") for _ in range(20)]
            assert await asyncio.gather(*calls) == [[[]]] * 20
            (pid,) = await bus.connection.call_bus("GetConnectionUnixProcessID", "s", [BUS])
            process = os.pidfd_open(pid)
            try:
                os.kill(pid, signal.SIGTERM)
                ended, _, _ = await asyncio.to_thread(select.select, [process], [], [], DEADLINE)
                assert ended
            finally:
                os.close(process)
            assert log.read_text().count("told to end") == round_ + 1
