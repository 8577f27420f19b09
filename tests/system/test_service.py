"""The service as its users have it: started by the bus, confined by systemd, asked of polkit."""

from __future__ import annotations

import base64
import json
import re

import pytest

from tests.rig import BUS, MANAGER, MANAGER_PATH, ROOT, VM
from tests.system.machine import LONG, Machine

KERNEL = "/var/lib/vmbus/images/vmlinuz"
INITRD = "/var/lib/vmbus/images/initrd"


@pytest.fixture
def stopped(machine: Machine) -> Machine:
    """A machine whose service doesn't run."""
    machine.run("systemctl", "stop", "vmbusd.service")
    assert machine.unit("vmbusd.service", "ActiveState") == "inactive"
    return machine


def create(machine: Machine, user: str | None, name: str) -> str:
    """What busctl says of a Create by this user."""
    config = ["a{sv}", "4", "name", "s", name, "kernel", "s", KERNEL, "initrd", "s", INITRD]
    config += ["params", "s", "console=ttyS0 quiet"]
    return machine.busctl("call", BUS, MANAGER_PATH, MANAGER, "Create", *config, user=user)


def guest(script: str) -> list[str]:
    """Options of vmbusctl for a guest that runs a script and powers off."""
    run = base64.b64encode(script.encode()).decode()
    params = f"console=ttyS0 quiet cryptomgr.notests vmbus.run={run}"
    return ["--kernel", "/guest/vmlinuz", "--initrd", "/guest/initrd", "--params", params]


def status(machine: Machine, pid: str) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = machine.run("cat", f"/proc/{pid}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_users_call_starts_the_service(stopped: Machine) -> None:
    """The first call of an ordinary user has systemd start the service, as its own user."""
    said = stopped.busctl("call", BUS, MANAGER_PATH, MANAGER, "List", user="bob")
    assert said == "a(ussuuo) 0"
    assert stopped.unit("vmbusd.service", "ActiveState") == "active"
    pid = stopped.unit("vmbusd.service", "MainPID")
    assert stopped.run("stat", "-c", "%U", f"/proc/{pid}") == "vmbus"


def test_the_service_stops_cleanly_and_starts_again(stopped: Machine) -> None:
    """A stop is a success, keeps /run/vmbus, and the next call starts the service anew."""
    stopped.run("vmbusctl", "list", user="bob")
    stopped.run("systemctl", "stop", "vmbusd.service")
    assert stopped.unit("vmbusd.service", "Result") == "success"
    assert stopped.run("stat", "-c", "%U:%a", "/run/vmbus") == "vmbus:700"
    stopped.run("vmbusctl", "list", user="bob")


#: Kills a process, and returns when it is no more.
KILL = """
import os, select, signal, sys
process = os.pidfd_open(int(sys.argv[1]))
signal.pidfd_send_signal(process, signal.SIGKILL)
select.select([process], [], [])
"""


def test_systemd_restarts_a_service_that_dies(machine: Machine) -> None:
    """A service that is killed runs again, without a call."""
    machine.run("vmbusctl", "list")
    before = machine.unit("vmbusd.service", "MainPID")
    machine.run("python3", "-c", KILL, before)
    machine.run("gdbus", "wait", "--system", BUS)
    assert machine.unit("vmbusd.service", "NRestarts") == "1"
    assert machine.unit("vmbusd.service", "MainPID") not in ("0", before)


def test_polkit_lets_a_user_whom_a_rule_names_run_a_guest(machine: Machine) -> None:
    """alice creates and starts a VM of her own files; a real guest boots in QEMU and ends."""
    said = machine.command(
        "vmbusctl", "run", "--name", "hers", *guest("echo hello from $(nproc)"), user="alice",
        deadline=LONG,
    )  # fmt: skip
    assert "hello from 1" in said.stdout, said
    assert said.returncode == 0, said


def test_polkit_refuses_a_user_whom_no_rule_names(machine: Machine) -> None:
    """bob may neither create a VM nor touch alice's, and may look at it."""
    said = machine.command("vmbusctl", "create", *guest("true"), user="bob")
    assert "org.vmbus1.create needs authentication" in said.stderr
    # busctl would have had him asked for a password, had he somebody to ask him.
    assert create(machine, "bob", "his") == "Call failed: Access denied"
    path = create(machine, "alice", "looked-at").removeprefix("o ").strip('"')
    for member in ("Start", "Kill", "Remove"):
        answer = machine.busctl("call", BUS, path, VM, member, user="bob")
        assert answer == "Call failed: Access denied"
    assert machine.busctl("get-property", BUS, path, VM, "State", user="bob") == 's "not-started"'
    assert machine.busctl("call", BUS, path, VM, "Remove", user="alice") == ""


def test_the_service_and_its_vmms_have_no_privilege(machine: Machine) -> None:
    """Neither has a capability or a way to get one; both are filtered, and have KVM's group."""
    path = create(machine, "alice", "confined").removeprefix("o ").strip('"')
    machine.run("busctl", "call", BUS, path, VM, "Start", user="alice")
    vmm = machine.busctl("get-property", BUS, path, VM, "Pid").removeprefix("u ")
    kvm = machine.run("getent", "group", "kvm").split(":")[2]
    for pid in (machine.unit("vmbusd.service", "MainPID"), vmm):
        found = status(machine, pid)
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(found[kind], 16) == 0, (kind, found["Name"])
        assert found["NoNewPrivs"] == "1"
        assert found["Seccomp"] == "2"
        assert "0" not in found["Uid"].split()
        assert kvm in found["Groups"].split()
    machine.run("busctl", "call", BUS, path, VM, "Kill", user="alice")
    machine.run("busctl", "call", BUS, path, VM, "Remove", user="alice")


#: Tries out what a VMM may do and may not, and prints what came of it.
PROBE = r"""
import ctypes, json, mmap, os, socket, subprocess

def comes_of(what):
    try:
        what()
    except OSError as error:
        return error.strerror
    return "ok"

def unshared(*namespaces, then):
    done = subprocess.run(["unshare", "--user", "--map-root-user", *namespaces, *then],
                          capture_output=True, text=True)
    return "ok" if done.returncode == 0 else done.stderr

def write(path):
    with open(path, "w"):
        pass
    os.unlink(path)

def suid():
    with open("/run/vmbus/suid", "w") as file:
        try:
            os.fchmod(file.fileno(), 0o4755)
        finally:
            os.unlink(file.name)

def reboot():
    if ctypes.CDLL(None, use_errno=True).reboot(0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
jail = ["--mount", "--pid", "--net", "--fork", "--propagation=private"]
with open("/proc/self/mountinfo") as file:
    mounts = [line.split()[4] for line in file]
print(json.dumps({
    "code that is written at run time": comes_of(lambda: mmap.mmap(-1, 4096, prot=everything)),
    "a jail as crosvm's": unshared(*jail, then=["mount", "-t", "tmpfs", "none", "/mnt"]),
    "mounts below /proc": [each for each in mounts if each.startswith("/proc/")],
    "a socket to guests": comes_of(lambda: socket.socket(socket.AF_VSOCK).close()),
    "a socket for gdb": comes_of(lambda: socket.socket(socket.AF_INET).close()),
    "a file in /run/vmbus": comes_of(lambda: write("/run/vmbus/file")),
    "a file in /etc": comes_of(lambda: write("/etc/file")),
    "a file in /home": comes_of(lambda: write("/home/open/file")),
    "the files in /root": comes_of(lambda: os.listdir("/root")),
    "a raw socket": comes_of(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
    "a setuid file": comes_of(suid),
    "a namespace for IPC": unshared("--ipc", then=["true"]).splitlines()[0],
    "a reboot": comes_of(reboot),
    "processes of others": "ok" if os.path.exists("/proc/1") else "hidden",
}))
"""


def test_the_sandbox_is_in_force_and_leaves_vmms_what_they_need(machine: Machine) -> None:
    """In the unit's sandbox a VMM can jail itself and write code, and can't reach anything else."""
    machine.run("install", "-d", "-m", "1777", "/home/open")
    machine.write("/usr/local/bin/probe.py", PROBE)
    unit = (ROOT / "data" / "systemd" / "vmbusd.service").read_text()
    for what, instead in (
        (r"Type=.*", "Type=oneshot"),
        (r"BusName=.*", ""),
        (r"ExecStart=.*", "ExecStart=/usr/bin/python3 -I /usr/local/bin/probe.py"),
        (r"Restart=.*", "StandardOutput=file:/root/probe.json"),
    ):
        unit = re.sub(f"(?m)^{what}$", instead, unit)
    machine.write("/run/systemd/system/probe.service", unit)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "probe.service")
    assert json.loads(machine.run("cat", "/root/probe.json")) == {
        "code that is written at run time": "ok",
        "a jail as crosvm's": "ok",
        # With any of them no jail would get a /proc of its own, which virtiofsd's must have.
        "mounts below /proc": [],
        "a socket to guests": "ok",
        "a socket for gdb": "ok",
        "a file in /run/vmbus": "ok",
        "a file in /etc": "Read-only file system",
        "a file in /home": "Permission denied",
        "the files in /root": "Permission denied",
        "a raw socket": "Address family not supported by protocol",
        "a setuid file": "Operation not permitted",
        "a namespace for IPC": "unshare: unshare failed: Operation not permitted",
        "a reboot": "Operation not permitted",
        "processes of others": "hidden",
    }


def test_names_of_vms_complete_in_bash(machine: Machine) -> None:
    """The completion that the package installs knows the VMs that exist."""
    create(machine, "alice", "completed")
    script = """
        . /usr/share/bash-completion/completions/vmbusctl
        COMP_WORDS=(vmbusctl start com) COMP_CWORD=2
        _vmbusctl_completion vmbusctl
        echo "${COMPREPLY[@]}"
    """
    machine.write("/usr/local/bin/complete", script)
    assert machine.run("bash", "/usr/local/bin/complete", user="bob") == "completed"
    machine.run("vmbusctl", "remove", "completed")


def test_a_shutdown_waits_for_vms(machine: Machine) -> None:
    """logind gives those that delay a shutdown the time that guests need."""
    machine.run("systemctl", "restart", "systemd-logind.service")
    manager = (
        "org.freedesktop.login1",
        "/org/freedesktop/login1",
        "org.freedesktop.login1.Manager",
    )
    assert machine.busctl("get-property", *manager, "InhibitDelayMaxUSec") == "t 30000000"
