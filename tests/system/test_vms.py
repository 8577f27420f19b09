"""VMs outlive the service, each in a scope of its own, and are found again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.rig import BUS, VM, kernel_version
from tests.system.conftest import RULES, Packages
from tests.system.machine import LONG, Machine, Program
from tests.system.test_service import KILL, guest
from vmbus.systemd.journal import MESSAGE_IDS

UNIT = "vmbusd.service"
MACHINED = "vmbus-machined.service"

# Pressed before somebody listens, the button does nothing.
SCRIPT = """
    wait-powerbtn &
    until ls -l /proc/*/fd 2>/dev/null | grep -q input/event; do :; done
    echo 'up and waiting'
    wait
    poweroff -f
"""


class Guest:
    """A VM of alice's, whose guest waits for the power button, then powers off."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        machine.run("vmbusctl", "create", "--name", name, *guest(SCRIPT), user="alice")
        self.id = self.get("id")
        self.scope = f"vmbus-{self.id}.scope"

    def start(self) -> Guest:
        self.machine.run("vmbusctl", "start", self.name, user="alice", deadline=LONG)
        return self

    def boot(self) -> Guest:
        """Start it, and wait until the guest is up."""
        with self.machine.program("vmbusctl", "console", self.name) as console:
            self.start()
            console.until("up and waiting")
        return self

    @property
    def pid(self) -> str:
        return self.get("pid")

    def get(self, key: str) -> str:
        return str(json.loads(self.machine.run("vmbusctl", "--json", "status", self.name))[key])

    def death(self) -> tuple[str, str]:
        """Why it died, and the status."""
        assert self.get("state") == "dead"
        return self.get("death_reason"), self.get("exit_status")

    def obeys(self) -> None:
        """The service can control it."""
        assert self.get("state") == "running"
        self.machine.run("vmbusctl", "suspend", self.name, user="alice")
        assert self.get("state") == "suspended"
        self.machine.run("vmbusctl", "resume", self.name, user="alice")

    def end_it(self) -> None:
        self.machine.run("vmbusctl", "kill", self.name, user="alice")
        assert self.death() == ("killed", "-9")
        self.machine.run("vmbusctl", "remove", self.name, user="alice")


@pytest.fixture
def vm(machine: Machine, request: pytest.FixtureRequest) -> Guest:
    return Guest(machine, request.node.name.replace("_", "-")[:60])


def kill(machine: Machine, pid: str) -> None:
    machine.run("python3", "-c", KILL, pid)


def crash(machine: Machine) -> None:
    """Kill the service, and wait until systemd has started it anew."""
    before = machine.unit(UNIT, "MainPID")
    kill(machine, before)
    machine.run("gdbus", "wait", "--system", BUS)
    assert machine.unit(UNIT, "MainPID") not in ("0", before)


@contextlib.contextmanager
def signals(machine: Machine, *matches: str) -> Iterator[Program]:
    """What the bus carries of these signals, as busctl has it."""
    found = [f"--match=type='signal',{match}" for match in matches]
    with machine.program("busctl", "monitor", "--json=short", *found) as monitor:
        monitor.until("Monitoring")
        yield monitor


@contextlib.contextmanager
def deaths(machine: Machine) -> Iterator[Callable[[], list[list[Any]]]]:
    """What this gives returns the reason and the status of each Died that was told until then."""
    with signals(machine, f"interface='{VM}'", "interface='org.test'") as monitor:

        def heard() -> list[list[Any]]:
            machine.run("busctl", "emit", "/org/test", "org.test", "End")
            lines = monitor.until('"End"').splitlines()
            messages = [json.loads(line) for line in lines if line.startswith("{")]
            return [each["payload"]["data"][1:] for each in messages if each["member"] == "Died"]

        yield heard


def placed(machine: Machine, vm: Guest) -> list[str]:
    """Start a VM, and wait until it is where it belongs.

    Returns the directories of its cgroup: one, or one for each of the old hierarchies.
    """
    with signals(machine, "member='MachineNew'") as monitor:
        vm.start()
        monitor.until(f'"vmbus-{vm.id}-')
    assert f":/vmbus.slice/{vm.scope}\n" in machine.run("cat", f"/proc/{vm.pid}/cgroup") + "\n"
    where = f"*/vmbus.slice/{vm.scope}"
    return machine.run("find", "/sys/fs/cgroup", "-path", where, "-type", "d").splitlines()


@contextlib.contextmanager
def child(machine: Machine, cgroups: list[str]) -> Iterator[Program]:
    """A process in the cgroup of a VM, as if its VMM had begun it."""
    joining = "".join(f"echo 0 >{cgroup}/cgroup.procs && " for cgroup in cgroups)
    script = f"{joining} echo 'is there' && exec sleep infinity"
    options = ("--quiet", "--pipe", "--wait", "--collect")
    with machine.program("systemd-run", *options, "sh", "-c", script) as program:
        program.until("is there")
        yield program


def test_a_vm_survives_the_service_s_death(machine: Machine, vm: Guest) -> None:
    """A killed service comes back and has its VMs, which notice nothing; one end is told once."""
    with deaths(machine) as died:
        pid = vm.boot().pid
        crash(machine)
        vm.obeys()
        assert vm.pid == pid
        machine.run("vmbusctl", "stop", vm.name, user="alice", deadline=LONG)
        assert vm.death() == ("stopped", "0")
        crash(machine)
        assert vm.death() == ("stopped", "0")
        assert died() == [["stopped", 0]]
    machine.run("vmbusctl", "remove", vm.name, user="alice")


def test_a_restart_leaves_vms_alone(machine: Machine, vm: Guest) -> None:
    """systemctl restart starts a service that has them all; also those that were not started."""
    later = Guest(machine, "created-before-started-after")
    vm.start()
    pid = vm.pid
    machine.run("systemctl", "restart", UNIT)
    assert vm.pid == pid
    vm.obeys()
    vm.end_it()
    # Its files were passed by alice, open: systemd kept them.
    later.start().end_it()


def test_a_death_while_the_service_is_away_is_told(machine: Machine, vm: Guest) -> None:
    """The next service tells how a VM ended that none saw ending, where the kernel remembers."""
    vm.start()
    service, vmm = machine.unit(UNIT, "MainPID"), vm.pid
    with deaths(machine) as died:
        machine.run("sh", "-c", f"kill -STOP {service}")
        kill(machine, vmm)
        crash(machine)
        known = ["signal", -9] if kernel_version() >= (6, 15) else ["unknown", 0]
        assert died() == [known]
    assert [vm.get("death_reason"), int(vm.get("exit_status"))] == known
    machine.run("vmbusctl", "remove", vm.name, user="alice")


def test_a_stop_leaves_vms_alone(machine: Machine, vm: Guest) -> None:
    """A later call finds them; of one that died meanwhile nobody knows how, and says so."""
    dying = Guest(machine, "dies-without-a-service").start()
    vm.start()
    pid, other = vm.pid, dying.pid
    machine.run("systemctl", "stop", UNIT)
    assert machine.unit(UNIT, "Result") == "success"
    # It was the service that wanted it.
    assert machine.unit(MACHINED, "ActiveState") in ("inactive", "deactivating")
    kill(machine, other)
    assert vm.pid == pid
    vm.obeys()
    assert dying.death() == ("unknown", "0")
    vm.end_it()
    machine.run("vmbusctl", "remove", dying.name)


def test_a_service_with_nothing_to_do_ends(machine: Machine, vm: Guest) -> None:
    """Not while a VM runs; and the next call starts one that knows of the dead."""
    drop_in = f"/run/systemd/system/{UNIT}.d/test.conf"
    settings = "[Service]\nExecStart=\nExecStart=/usr/bin/vmbusd --exit-on-idle=1\n"
    machine.write(drop_in, settings)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", UNIT)
    before = machine.unit(UNIT, "MainPID")
    vm.start()
    with signals(machine, f"member='NameOwnerChanged',arg0='{BUS}'") as monitor:
        machine.run("vmbusctl", "kill", vm.name, user="alice")
        assert machine.unit(UNIT, "MainPID") == before
        monitor.until('"NameOwnerChanged"')
    machine.run("rm", drop_in)
    machine.run("systemctl", "daemon-reload")
    assert vm.death() == ("killed", "-9")
    assert machine.unit(UNIT, "MainPID") not in ("0", before)
    assert machine.unit(UNIT, "NRestarts") == "0"
    machine.run("vmbusctl", "remove", vm.name, user="alice")


def test_each_vm_has_a_scope(machine: Machine, vm: Guest) -> None:
    """A VM that runs is in a scope of its own in vmbus.slice, which bounds it."""
    cgroups = placed(machine, vm)
    assert machine.unit(vm.scope, "Slice") == "vmbus.slice"
    assert machine.unit(vm.scope, "CPUWeight") == "100"
    most = machine.unit(vm.scope, "MemoryMax")
    assert int(most) > 256 << 20
    # In force only where the host lets the container have the controllers.
    wanted = {"memory.max": most, "memory.limit_in_bytes": most, "cpu.weight": "100"}
    for cgroup in cgroups:
        there = machine.run("ls", cgroup).split()
        for name in wanted.keys() & there:
            assert machine.run("cat", f"{cgroup}/{name}") == wanted[name]
    vm.end_it()


def test_a_vm_s_children_end_with_it(machine: Machine, vm: Guest) -> None:
    """Whatever is in the scope of a VM is gone when the VM has ended, and so is the scope."""
    with child(machine, placed(machine, vm)) as process:
        vm.end_it()
        process.ends()


def test_a_scope_that_is_killed_ends_its_vm(machine: Machine, vm: Guest) -> None:
    """systemctl kill gets every process of the VM, and the death is told as what it is."""
    with child(machine, placed(machine, vm)) as process:
        machine.run("systemctl", "kill", "--signal=KILL", vm.scope)
        machine.command("vmbusctl", "wait", vm.name)
        assert vm.death() == ("signal", "-9")
        process.ends()
    machine.run("vmbusctl", "remove", vm.name, user="alice")


def test_machinectl_lists_vms(machine: Machine, vm: Guest) -> None:
    """machinectl shows a VM that runs as a machine of class vm, and by its scope."""
    placed(machine, vm)
    (line,) = [
        each
        for each in machine.run("machinectl", "--no-legend").splitlines()
        if each.startswith(f"vmbus-{vm.id}-")
    ]
    name, *kind = line.split()[:3]
    assert kind == ["vm", "vmbus"]
    assert machine.run("machinectl", "show", "--value", "--property=Unit", name) == vm.scope
    with signals(machine, "member='MachineRemoved'") as monitor:
        vm.end_it()
        monitor.until(f'"{name}"')
    assert name not in machine.run("machinectl", "--no-legend")


def test_the_journal_knows_vms(machine: Machine, vm: Guest) -> None:
    """Entries about a VM have its name, id, CID and requester, and what happened to it."""
    vm.start()
    cid = vm.get("cid")
    vm.end_it()
    machine.run("journalctl", "--sync")
    lines = machine.run("journalctl", f"VMBUS_VM={vm.name}", "--output=json").splitlines()
    entries = [json.loads(line) for line in lines]
    uid = machine.run("id", "-u", "alice")
    fields = ("VMBUS_VM_ID", "VMBUS_CID", "VMBUS_REQUESTER_UID", "_SYSTEMD_UNIT")
    assert {tuple(each[key] for key in fields) for each in entries} == {(vm.id, cid, uid, UNIT)}
    told = [each["MESSAGE_ID"] for each in entries if "MESSAGE_ID" in each]
    assert told == [MESSAGE_IDS[event] for event in ("created", "started", "died")]


def test_an_upgrade_leaves_vms_alone(clean: Machine, packages: Packages) -> None:
    """An upgrade restarts the service and none of the VMs; a removal ends them in good order."""
    vm = with_alice(clean, packages).boot()
    before, pid = clean.unit(UNIT, "MainPID"), vm.pid
    clean.install(packages.newer)
    assert clean.unit(UNIT, "MainPID") not in ("0", before)
    assert vm.pid == pid
    vm.obeys()
    with deaths(clean) as died:
        clean.run("dpkg", "--remove", "vmbus", deadline=LONG)
        assert died() == [["host-shutdown", 0]]
    assert clean.processes("vmbus") == []
    assert clean.active_units("vmbus*") == []


def test_a_shutdown_of_the_host_waits_for_vms(clean: Machine, packages: Packages) -> None:
    """They end in good order, and that is told, before anything is stopped."""
    vm = with_alice(clean, packages)
    # What lets a shutdown wait so long is in force from the next boot on; and so it is now.
    clean.run("systemctl", "restart", "systemd-logind.service")
    vm.boot()
    with signals(clean, "member='Died'") as monitor:
        clean.run("systemctl", "poweroff")
        assert '"host-shutdown",0]' in monitor.until('"Died"')
    clean.until_off()


def with_alice(machine: Machine, packages: Packages) -> Guest:
    """A VM of alice's, on a machine that gets the package for it."""
    machine.run("useradd", "--create-home", "alice")
    machine.write("/etc/polkit-1/rules.d/50-test.rules", RULES)
    # Nothing is ended by force.
    machine.write("/etc/vmbus/vmbusd.toml", "shutdown_timeout = 3600.0\nstop_timeout = 3600.0\n")
    machine.install(packages.current)
    return Guest(machine, "hers")
