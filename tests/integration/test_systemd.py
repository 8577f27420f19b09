"""What needs root at systemd: the rule that is for the user vmbus, and vmbus-machined."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.polkit import AUTHORITY, AUTHORITY_INTERFACE, AUTHORITY_PATH, Polkit, caller
from tests.rig import BUS, DEADLINE, ROOT, Client, Rig, Service, client, guest, plain
from tests.standin import Refused, StandIn, Systemd, standin, systemd
from vmbus.bus.wire import Message, Variant
from vmbus.events import Snapshot
from vmbus.systemd import machined
from vmbus.systemd.machined import MACHINED, machine_name
from vmbus.systemd.notify import Manager

MANAGE_UNITS = "org.freedesktop.systemd1.manage-units"
RULES = ROOT / "data" / "polkit-1" / "rules.d" / "org.vmbus1.rules"
VMBUS, NOBODY = pwd.getpwnam("vmbus").pw_uid, 65534
YES, CHALLENGE = (True, False), (False, True)


@pytest.fixture(scope="module")
def authority() -> Iterator[Polkit]:
    """polkit with systemd's own actions, and the project's rule."""
    rig = Rig(system=True)
    running = Polkit(rig)
    policy = Path("/usr/share/polkit-1/actions/org.freedesktop.systemd1.policy")
    shutil.copyfile(policy, running.actions / policy.name)
    (running.actions / policy.name).chmod(0o644)
    running.rules(RULES.read_text())
    running.start()
    yield running
    running.kill()
    rig.close()


async def _ask(asking: Client, about: Client, action: str, details: dict[str, str]) -> Any:
    """Ask as systemd does: is it authorized, and would a dialog help."""
    subject = ["system-bus-name", {"name": Variant("s", about.connection.unique_name)}]
    reply = await asking.connection.call(
        AUTHORITY,
        AUTHORITY_PATH,
        AUTHORITY_INTERFACE,
        "CheckAuthorization",
        "(sa{sv})sa{ss}us",
        [subject, action, details, 0, ""],
    )
    return tuple(plain(reply.body)[0][:2])


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({"unit": "vmbus-1.scope", "verb": "stop"}, YES),
        ({"unit": "vmbus-4711.scope", "verb": "kill"}, YES),
        # What StartTransientUnit asks: before systemd 257, and from then on.
        ({}, CHALLENGE),
        ({"unit": "vmbus-1.scope", "verb": "start"}, CHALLENGE),
        ({"unit": "vmbus-1.scope", "verb": "restart"}, CHALLENGE),
        ({"unit": "vmbus-1.scope", "verb": "set-property"}, CHALLENGE),
        ({"unit": "vmbus-1.scope"}, CHALLENGE),
        ({"verb": "stop"}, CHALLENGE),
        ({"unit": "vmbus-1.service", "verb": "stop"}, CHALLENGE),
        ({"unit": "vmbus-.scope", "verb": "stop"}, CHALLENGE),
        ({"unit": "vmbus-1xscope", "verb": "stop"}, CHALLENGE),
        ({"unit": "vmbus-1.scope.d", "verb": "stop"}, CHALLENGE),
        ({"unit": "vmbus-1.scope\n", "verb": "stop"}, CHALLENGE),
        ({"unit": "my-vmbus-1.scope", "verb": "stop"}, CHALLENGE),
        ({"unit": "ssh.service\nvmbus-1.scope", "verb": "stop"}, CHALLENGE),
        ({"unit": "vmbusd.service", "verb": "stop"}, CHALLENGE),
    ],
)
async def test_the_service_may_end_scopes_of_vms_and_nothing_else(
    authority: Polkit, details: dict[str, str], expected: tuple[bool, bool]
) -> None:
    """No unit of another name, and no start at all: not even of a unit of that name."""
    async with client(authority.rig) as manager, caller(authority.rig, VMBUS) as service:
        assert await _ask(manager, service, MANAGE_UNITS, details) == expected


async def test_nobody_else_may_and_nothing_else_is_allowed(authority: Polkit) -> None:
    """The rule is for one user and one action."""
    details = {"unit": "vmbus-1.scope", "verb": "stop"}
    async with (
        client(authority.rig) as manager,
        caller(authority.rig, VMBUS) as service,
        caller(authority.rig, NOBODY) as nobody,
    ):
        assert await _ask(manager, nobody, MANAGE_UNITS, details) == CHALLENGE
        other = "org.freedesktop.systemd1.manage-unit-files"
        assert await _ask(manager, service, other, details) == CHALLENGE


# vmbus-machined, with a real vmbusd


@dataclass
class Host:
    """The service managers that vmbus-machined talks to, and the units that processes are in."""

    rig: Rig
    systemd: StandIn
    answers: Systemd
    machined: StandIn
    kernel: Path


@pytest.fixture
async def host(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    """vmbus-machined in this process, on the bus of a vmbusd.

    A process is in the unit that systemd was last asked to put it into.
    """
    rig = service.rig
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", rig.address)
    async with (
        systemd(rig) as (manager, answers),
        standin(rig, MACHINED, lambda _: ("o", ["/org/freedesktop/machine1/machine/x"])) as known,
    ):

        def in_unit(pid: int, name: str) -> bool:
            starts = [call for call in manager.calls if call[0] == "StartTransientUnit"]
            return any(call[1] == name and pid in dict(call[3])["PIDs"] for call in starts)

        # On a session bus the service itself would ask for scopes.
        (owner,) = await manager.connection.call_bus("GetNameOwner", "s", [BUS])
        manager.refused.add(owner)
        monkeypatch.setattr(machined, "_in_unit", in_unit)
        yield Host(rig, manager, answers, known, guest(rig.directory))


class Starting(Manager):
    """A service manager that waits until the program is up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = asyncio.Event()

    def ready(self) -> None:
        self.up.set()


@contextlib.asynccontextmanager
async def _running() -> AsyncIterator[None]:
    starting = Starting()
    task = asyncio.create_task(machined.serve(starting))
    try:
        await asyncio.wait_for(starting.up.wait(), DEADLINE)
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _started(bus: Client, host: Host, name: str) -> tuple[str, int, int]:
    """A VM that runs: its path, id and process."""
    path = await bus.create(name=name, kernel=str(host.kernel), memory_mib=256, cpus=2)
    await bus.vm(path, "Start")
    return path, await bus.get(path, "Id"), await bus.get(path, "Pid")


async def test_a_vm_that_runs_is_a_scope_and_a_machine(bus: Client, host: Host) -> None:
    """Bounded by what it was given; ended when the VM has died, for what it left."""
    async with _running():
        early, _, _ = await _started(bus, host, "early")
        await host.machined.until_called("RegisterMachine")
        path, id, pid = await _started(bus, host, "my_web.1")
        registered = await host.machined.until_called("RegisterMachine", 2)
        _, name, _, properties, others = await host.systemd.until_called("StartTransientUnit", 2)
        assert (name, others) == (f"vmbus-{id}.scope", [])
        found = dict(properties)
        assert (found["PIDs"], found["Description"]) == ([pid], "Virtual machine my_web.1")
        assert (found["MemoryMax"], found["CPUWeight"]) == ((256 + 32 + 512) << 20, 200)
        assert registered[1] == f"vmbus-{id}-my-web-1"
        assert registered[3:] == ("vmbus", "vm", pid, "")
        await bus.vm(path, "Kill")
        assert await host.systemd.until_called("StopUnit") == ("StopUnit", name, "replace")
        await bus.vm(early, "Kill")


async def test_vms_that_run_already_are_taken_up(bus: Client, host: Host) -> None:
    """As after a restart of the program: the scopes are there, and the machines are known."""
    path, _, _ = await _started(bus, host, "there-before")
    async with _running():
        await host.machined.until_called("RegisterMachine")
    host.answers.error = "org.freedesktop.systemd1.UnitExists"

    def exists(_: Message) -> Any:
        raise Refused("org.freedesktop.machine1.MachineExists")

    host.machined.answer = exists
    async with _running():
        await host.machined.until_called("RegisterMachine", 2)
        host.answers.error = ""
        await bus.vm(path, "Kill")
        await host.systemd.until_called("StopUnit")


async def test_a_vm_without_a_scope_is_no_machine(
    bus: Client, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """machinectl terminate ends the unit that a machine is in: that would be the whole service."""
    monkeypatch.undo()
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", host.rig.address)
    async with _running():
        path, _, _ = await _started(bus, host, "outside")
        await host.systemd.until_called("StartTransientUnit")
        again, _, _ = await _started(bus, host, "outside-too")
        await host.systemd.until_called("StartTransientUnit", 2)
        assert host.machined.calls == []
        for each in (path, again):
            await bus.vm(each, "Kill")


async def test_a_process_of_somebody_else_is_never_touched(
    bus: Client, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the service says: what it names has to be of the user whom it runs as."""
    theirs = subprocess.Popen(["sleep", "inf"], user=NOBODY, stdin=subprocess.DEVNULL)
    ended = subprocess.Popen(["true"])
    ended.wait()
    try:
        async with client(host.rig) as connected:
            machines = machined.Machines(connected.connection, None)  # type: ignore[arg-type]
            for pid in (theirs.pid, ended.pid, 0, 1 << 31):
                await machines._show(Snapshot("/x", id=9, name="x"), pid)
    finally:
        theirs.kill()
        theirs.wait()
    assert host.systemd.calls == host.machined.calls == []
    assert len(caplog.messages) == 4


async def test_a_number_that_was_given_away_meanwhile_is_left_alone(
    bus: Client, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd goes by the number: whose it is now, in whatever unit, is no machine of ours."""
    monkeypatch.setattr(machined, "_has_ended", _after_the_first(machined._has_ended))
    async with _running():
        path, _, _ = await _started(bus, host, "quick")
        await host.systemd.until_called("StartTransientUnit")
        await bus.vm(path, "Kill")
        other, _, _ = await _started(bus, host, "slow")
        await host.systemd.until_called("StartTransientUnit", 2)
        await bus.vm(other, "Kill")
        assert [call[0] for call in host.systemd.calls] == ["StartTransientUnit"] * 2
    assert host.machined.calls == []


def _after_the_first(real: Callable[[int], bool]) -> Callable[[int], bool]:
    """A process that is there when it is first looked at, and not when it is looked at again."""
    looks: dict[int, int] = {}

    def has_ended(pidfd: int) -> bool:
        looks[pidfd] = looks.get(pidfd, 0) + 1
        return real(pidfd) or looks[pidfd] % 2 == 0

    return has_ended


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", "vmbus-7-web"),
        ("my_web.1", "vmbus-7-my-web-1"),
        ("a--b", "vmbus-7-a-b"),
        ("end.", "vmbus-7-end"),
        ("x" * 63, "vmbus-7-" + "x" * 56),
        ("x" * 55 + ".y", "vmbus-7-" + "x" * 55),
    ],
)
def test_a_machine_has_a_name_that_systemd_takes(name: str, expected: str) -> None:
    """That of a host, at most 64 long; and never one that a container might want."""
    assert machine_name(Snapshot("/x", id=7, name=name)) == expected


def test_the_program_ends_where_there_is_no_bus() -> None:
    """With a line on stderr and a status of 1, for the service manager to try again."""
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", "vmbus.systemd.machined"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ERROR:vmbus-machined:")
    assert "Traceback" not in done.stderr
