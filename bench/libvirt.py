"""The peer: libvirt's QEMU driver behind libvirt-dbus, on the bus that vmbus is on.

It runs as its packages have it, save that it asks polkit for nothing and confines nothing. Its
directories are its own, in a mount namespace: the host's libvirt, if there is one, is left alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.client import CallFailed, Client, call_frame, get_frame
from bench.stage import GUEST
from tests.rig import DEADLINE, Rig

BUS = "org.libvirt"
PATH = "/org/libvirt/QEMU"
CONNECT = "org.libvirt.Connect"
DOMAIN = "org.libvirt.Domain"
POLICY = Path("/usr/share/dbus-1/system.d/org.libvirt.conf")
_STOPPED = 5
_SCRIPT = """
for each in /etc/libvirt /var/lib/libvirt /run/libvirt /var/log/libvirt /var/cache/libvirt; do
    mkdir -p "$each" && mount -t tmpfs none "$each" || exit
done
cat >/etc/libvirt/qemu.conf <<END
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
END
cat >/etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0777"
END
virtlogd &
libvirtd &
exec setpriv --reuid=libvirtdbus --regid=libvirtdbus --clear-groups libvirt-dbus --system
"""
_XML = """<domain type='qemu'>
<name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{guest}/vmlinuz</kernel>
<initrd>{guest}/initrd</initrd><cmdline>{params}</cmdline></os>
<features><acpi/></features><cpu mode='maximum'/>
<on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
<devices><emulator>{qemu}</emulator><controller type='usb' model='none'/>
<serial type='pty'/><memballoon model='virtio'/><panic model='isa'/></devices>
</domain>"""


class Libvirt:
    """The daemons, and the calls of org.libvirt that are measured."""

    def __init__(self, rig: Rig) -> None:
        self._log = (rig.directory / "libvirt.log").open("wb")
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _SCRIPT]
        self._process = subprocess.Popen(
            command,
            env=rig.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._root = Path(f"/proc/{self._process.pid}/root")
        self.client = Client(str(rig.directory / "bus"))
        self._until_it_answers()

    def _until_it_answers(self) -> None:
        end = time.monotonic() + DEADLINE
        while True:
            try:
                self.client.call(call_frame(BUS, PATH, CONNECT, "ListDomains", "u", 0))
                return
            except CallFailed:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def create(self, name: str, params: str = "") -> str:
        """Start a transient domain; return when it runs. Returns its path."""
        return self._domain("DomainCreateXML", "su", _xml(name, params), 0)

    def define(self, name: str) -> str:
        """Make a domain, without starting it."""
        return self._domain("DomainDefineXML", "s", _xml(name, ""))

    def _domain(self, member: str, signature: str, *values: Any) -> str:
        frame = call_frame(BUS, PATH, CONNECT, member, signature, *values)
        return str(self.client.ask(frame)[0])

    def destroy(self, path: str) -> None:
        self.client.call(call_frame(BUS, path, DOMAIN, "Destroy", "u", 0))

    def suspend(self, path: str) -> None:
        self.client.call(call_frame(BUS, path, DOMAIN, "Suspend"))

    def get(self, path: str, name: str) -> Any:
        return self.client.ask(get_frame(BUS, path, DOMAIN, name))[0].value

    def pid(self, name: str) -> int:
        return int((self._root / f"run/libvirt/qemu/{name}.pid").read_text())

    def listen(self) -> None:
        """Hear of every domain's events."""
        self.client.listen(f"type='signal',sender='{BUS}',member='DomainEvent'")

    def died(self, path: str) -> float:
        """When the event came that says that it is stopped."""
        while True:
            arrival = self.client.until("DomainEvent")
            domain, event, _ = arrival.message.body
            if (domain, event) == (path, _STOPPED):
                return arrival.at

    def close(self) -> None:
        self.client.close()
        # virtlogd and libvirtd are in its session.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def _xml(name: str, params: str) -> str:
    qemu = shutil.which("qemu-system-x86_64")
    return _XML.format(name=name, guest=GUEST, params=params, qemu=qemu)
