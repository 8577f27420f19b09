"""Declared VMs as units: systemd starts, stops and restarts them, and they don't drift apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest

from tests.system.conftest import Packages
from tests.system.machine import LONG, Machine
from tests.system.test_service import guest
from tests.system.test_vms import crash, kill, signals

VMBUSD = "vmbusd.service"

# As docs/declared.md has them.
DECLARATION = """
kernel = "/srv/web/vmlinuz"
initrd = "/srv/web/initrd"
params = "console=ttyS0 quiet"
memory_mib = 128
ready_timeout_usec = 120_000_000

[[disks]]
image = "/srv/web/root.img"
writable = true
"""
UNIT_COMMANDS = """
systemctl enable --now vmbus-vm@web
systemctl status vmbus-vm@web
journalctl --unit vmbus-vm@web
systemctl stop vmbus-vm@web
"""
SSH, SSH_TERMINAL = """
ssh alice@host vmbusctl run --config web.toml
ssh -t alice@host vmbusctl run --config web.toml
""".strip().splitlines()

#: Says that it is ready when the power button would be heard.
SCRIPT = """
    wait-powerbtn &
    until ls -l /proc/*/fd 2>/dev/null | grep -q input/event; do :; done
    echo 'up and waiting'
    for each in /sys/class/virtio-ports/*; do port=/dev/${each##*/}; done
    echo STATUS=Serving >$port
    echo READY=1 >$port
    wait
    poweroff -f
"""


class Unit:
    """vmbus-vm@NAME.service, with a declaration."""

    def __init__(self, machine: Machine, name: str, declaration: str) -> None:
        self.machine = machine
        self.vm = name
        self.name = f"vmbus-vm@{name}.service"
        machine.write(f"/etc/vmbus/vm.d/{name}.toml", declaration)

    def drop_in(self, text: str) -> None:
        self.machine.write(f"/run/systemd/system/{self.name}.d/test.conf", text)
        self.machine.run("systemctl", "daemon-reload")

    def systemctl(self, *command: str) -> None:
        self.machine.run("systemctl", *command, self.name, deadline=LONG)

    def get(self, key: str) -> str:
        return self.machine.unit(self.name, key)

    def of_vm(self, key: str) -> str:
        return str(json.loads(self.machine.run("vmbusctl", "--json", "status", self.vm))[key])

    def journal(self) -> str:
        self.machine.run("journalctl", "--sync")
        return self.machine.run("journalctl", "--output=cat", f"--unit={self.name}")

    def end(self) -> tuple[str, str]:
        """Its state, and how its VM died at last. systemd forgets one that has ended well."""
        *_, last = re.findall(r"died: (.*)", self.journal())
        return self.get("ActiveState"), last

    def has_vm(self) -> bool:
        return self.vm in self.machine.run("vmbusctl", "list", "--no-legend").split()


READY = "ready_timeout_usec = 120_000_000"
Declare = Callable[..., Unit]


def declaration(script: str, *more: str) -> str:
    """Of a VM whose guest runs a script."""
    keys, values = (guest(script)[start::2] for start in (0, 1))
    pairs = zip(keys, values, strict=True)
    lines = [f'{key.removeprefix("--")} = "{value}"' for key, value in pairs]
    return "\n".join([*lines, *more, ""])


@pytest.fixture
def declare(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Declare]:
    """Declare a VM, whose unit is stopped in the end."""
    made: list[Unit] = []

    def declare(script: str, *more: str) -> Unit:
        # Names with dashes are what they are, and not paths.
        name = re.sub(r"\W", "-", request.node.name.replace("_", "-"))[-60:].strip("-")
        made.append(Unit(machine, name, declaration(script, *more)))
        return made[-1]

    yield declare
    for unit in made:
        machine.command("systemctl", "disable", "--now", unit.name, deadline=LONG)
        machine.command("systemctl", "reset-failed", unit.name)


def test_a_declared_vm_is_a_unit(machine: Machine) -> None:
    """It is active when its guest is ready; its console is in the journal; a stop shuts it down."""
    machine.run("mkdir", "/srv/web")
    machine.run("cp", "/guest/vmlinuz", "/guest/initrd", "/srv/web")
    machine.run("truncate", "--size=1M", "/srv/web/root.img")
    # What the guest does is told by its kernel's command line; the image is somebody's own.
    machine.run("sh", "-c", "chown bob /srv/web/root.img && chmod 600 /srv/web/root.img")
    (params,) = re.findall("params = .*", declaration(SCRIPT))
    unit = Unit(machine, "web", re.sub("params = .*", params, DECLARATION))
    enable, status, journal, stop = UNIT_COMMANDS.strip().splitlines()
    machine.run(*enable.split(), deadline=LONG)
    assert unit.get("ActiveState") == "active"
    assert unit.get("UnitFileState") == "enabled"
    assert unit.of_vm("payload_state") == "ready"
    assert f"vmbus-{unit.of_vm('id')}-" in machine.run("machinectl", "--no-legend")
    assert 'Status: "Serving"' in machine.run(*status.split())
    machine.run("journalctl", "--sync")
    assert "up and waiting" in machine.run(*journal.split())
    machine.run(*stop.split(), deadline=LONG)
    assert unit.end() == ("inactive", "stopped (0)")
    assert unit.get("StatusText") == "died: stopped (0)"
    assert not unit.has_vm()
    unit.systemctl("disable")


def test_a_unit_can_be_a_user_s(machine: Machine, declare: Declare) -> None:
    """With User= in a drop-in the VM is that user's, whom polkit lets create it."""
    unit = declare(SCRIPT, READY)
    unit.drop_in("[Service]\nUser=alice\n")
    unit.systemctl("start")
    assert unit.of_vm("requester_uid") == machine.run("id", "-u", "alice")


def test_a_restart_of_the_service_is_not_noticed(machine: Machine, declare: Declare) -> None:
    """Neither a restart nor a crash of vmbusd ends the unit or its VM; a stop still reaches it."""
    unit = declare(SCRIPT, READY)
    unit.systemctl("start")
    before = unit.get("MainPID"), unit.of_vm("pid")
    machine.run("systemctl", "restart", VMBUSD)
    crash(machine)
    assert (unit.get("MainPID"), unit.of_vm("pid")) == before
    assert (unit.get("ActiveState"), unit.get("NRestarts")) == ("active", "0")
    unit.systemctl("stop")
    assert unit.end() == ("inactive", "stopped (0)")


@pytest.mark.parametrize("whose", ["vmm", "vmbusctl"])
def test_a_vm_that_is_killed_is_run_again(machine: Machine, declare: Declare, whose: str) -> None:
    """Whichever of VMM and vmbusctl is killed takes the other along, and both are started anew."""
    unit = declare(SCRIPT, READY)
    unit.systemctl("start")
    before = unit.get("MainPID"), unit.of_vm("pid"), unit.of_vm("id")
    with signals(machine, "member='Died'", "member='InterfacesAdded'") as monitor:
        kill(machine, before[1] if whose == "vmm" else before[0])
        said = monitor.until('"InterfacesAdded"')
    assert f'"{"signal" if whose == "vmm" else "requester-gone"}",-9]' in said
    # Until it is ready again.
    unit.systemctl("start")
    after = unit.get("MainPID"), unit.of_vm("pid"), unit.of_vm("id")
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert unit.get("ActiveState") == "active"


@pytest.mark.parametrize(
    ("script", "more", "end"),
    [
        ("poweroff -f", "", ("inactive", "shutdown (0)")),
        ("poweroff -f", READY, ("failed", "shutdown (0)")),
        ("echo c >/proc/sysrq-trigger; sleep 100", "", ("failed", "guest-panic (0)")),
    ],
    ids=["poweroff", "not ready", "panic"],
)
def test_the_end_of_a_guest_is_the_unit_s(
    machine: Machine, declare: Declare, script: str, more: str, end: tuple[str, str]
) -> None:
    """What the guest wished for is a success, if it was ready when that was asked; a panic isn't.

    A failure would be run again.
    """
    unit = declare(script, more)
    unit.drop_in("[Service]\nRestart=no\n")
    with machine.program("systemctl", "start", "--wait", unit.name) as unit_runs:
        unit_runs.ends()
    assert unit.end() == end


def test_a_guest_that_reboots_is_run_again(machine: Machine, declare: Declare) -> None:
    """Which is no failure."""
    unit = declare("reboot -f; sleep 100")
    with signals(machine, "member='Died'", "member='InterfacesAdded'") as monitor:
        unit.systemctl("start")
        (dead,) = re.findall(
            r'/vm/(\d+)","interface":"[^"]*","member":"Died"', monitor.until('"reboot"')
        )
        monitor.until(f'/vm/{int(dead) + 1}"')
    assert "Failed with result" not in unit.journal()


def test_shutdown_all_ends_units(machine: Machine, declare: Declare) -> None:
    """It is somebody's wish that there be no VMs: a success, and nothing is run again."""
    unit = declare(SCRIPT, READY)
    with machine.program("systemctl", "start", "--wait", unit.name) as unit_runs:
        unit.systemctl("start")
        machine.run("vmbusctl", "shutdown-all", deadline=LONG)
        unit_runs.ends()
    assert unit.end() == ("inactive", "host-shutdown (0)")
    assert unit.journal().count("died: ") == 1


def test_a_declaration_that_is_wrong(machine: Machine, declare: Declare) -> None:
    """The unit fails, and the journal has the file and the key."""
    unit = declare(SCRIPT, "memory_mb = 512")
    assert machine.command("systemctl", "start", unit.name).returncode != 0
    assert f"vmbusctl: /etc/vmbus/vm.d/{unit.vm}.toml: memory_mb: unknown key" in unit.journal()


@pytest.fixture(scope="module")
def ssh(machine: Machine) -> Machine:
    """A machine whose root is let in as alice, by the name "host"."""
    machine.run(
        "sh", "-c",
        "ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 </dev/null &&"
        " install -d -o alice -m 700 /home/alice/.ssh &&"
        " install -o alice /root/.ssh/id_ed25519.pub /home/alice/.ssh/authorized_keys &&"
        " echo 'StrictHostKeyChecking no' >/root/.ssh/config &&"
        " echo '127.0.0.1 host' >>/etc/hosts",
    )  # fmt: skip
    return machine


def test_ssh_runs_a_vm(ssh: Machine) -> None:
    """Its output and its exit status come back; the file is the other machine's."""
    script = "echo hello from $(nproc); echo c >/proc/sysrq-trigger; sleep 100"
    ssh.write("/home/alice/web.toml", declaration(script))
    done = ssh.command(*SSH.split(), deadline=LONG)
    assert "hello from 1" in done.stdout
    assert done.returncode == 11, done.stderr


def test_a_terminal_that_is_gone_stops_the_vm(ssh: Machine) -> None:
    """With -t an ssh that ends takes the VM along, in good order."""
    ssh.write("/home/alice/web.toml", declaration(SCRIPT))
    with signals(ssh, "member='Died'") as monitor:
        # Without one of its own, ssh has to be told twice.
        with ssh.program(*SSH_TERMINAL.replace("-t", "-tt").split()) as shown:
            shown.until("up and waiting")
        assert '"stopped",0]' in monitor.until('"Died"')


def test_a_shutdown_of_the_host_ends_units(clean: Machine, packages: Packages) -> None:
    """The VM ends in good order, and no other is begun in its place."""
    # What lets a shutdown wait so long is in force from the next boot on; and so it is now.
    clean.install(packages.current)
    clean.run("systemctl", "restart", "systemd-logind.service")
    unit = Unit(clean, "web", declaration(SCRIPT, READY))
    unit.systemctl("start")
    with signals(clean, "member='Died'", "member='InterfacesAdded'") as monitor:
        clean.run("systemctl", "poweroff")
        said = monitor.until('"Died"')
    clean.until_off()
    assert '"host-shutdown",0]' in said
    assert '"InterfacesAdded"' not in said
