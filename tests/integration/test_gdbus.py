"""GLib's clients, as desktop programs use them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.rig import BUS, DEADLINE, MANAGER, MANAGER_PATH, VM, Service, guest

PASS_A_KERNEL = """
import sys
from gi.repository import Gio, GLib

bus = Gio.bus_get_sync(Gio.BusType.SESSION)
fds = Gio.UnixFDList.new()
with open(sys.argv[1]) as kernel:
    config = {"kernel": GLib.Variant("h", fds.append(kernel.fileno()))}
reply, _ = bus.call_with_unix_fd_list_sync(
    "org.vmbus1", "/org/vmbus1", "org.vmbus1.Manager", "Create",
    GLib.Variant("(a{sv})", (config,)), None, Gio.DBusCallFlags.NONE, 20000, fds,
)
print(reply.unpack()[0])
"""


def _call(service: Service, path: str, method: str, *arguments: str) -> str:
    return service.rig.gdbus("call", "-d", BUS, "-o", path, "-m", method, *arguments)


def test_a_life_by_gdbus(service: Service, tmp_path: Path) -> None:
    config = f"{{'kernel': <'{guest(tmp_path)}'>, 'name': <'by-gdbus'>}}"
    made = _call(service, MANAGER_PATH, f"{MANAGER}.Create", config)
    path = made.removeprefix("(objectpath '").removesuffix("',)")
    assert _call(service, path, f"{VM}.Start") == "()"
    assert "InvalidState" in _call(service, path, f"{VM}.Start")
    state = _call(service, path, "org.freedesktop.DBus.Properties.Get", VM, "State")
    assert state == "(<'running'>,)"
    assert _call(service, path, f"{VM}.Kill") == "()"
    assert _call(service, path, f"{VM}.Wait") == "('killed', -9)"
    assert _call(service, path, f"{VM}.Remove") == "()"


def test_a_descriptor_by_glib(service: Service, tmp_path: Path) -> None:
    """GLib's library passes descriptors inside of a config."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", PASS_A_KERNEL, str(guest(tmp_path))],
        env=service.rig.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    path = done.stdout.strip()
    assert path.startswith("/org/vmbus1/vm/"), done.stderr
    assert _call(service, path, f"{VM}.Start") == "()"
    assert _call(service, path, f"{VM}.Kill") == "()"
    assert _call(service, path, f"{VM}.Remove") == "()"


def test_what_the_gdbus_program_does_not_pass_is_said(service: Service) -> None:
    """Its command line names a descriptor inside of a config, but sends none: only arguments."""
    said = _call(service, MANAGER_PATH, f"{MANAGER}.Create", "{'kernel': <handle 7>}")
    assert "InvalidArgs" in said
    assert "file descriptor 7 is named, but only 0 came along" in said
