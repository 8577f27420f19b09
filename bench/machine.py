"""What was measured on: the machine, and the versions of all that took part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from bench.plan import LIBRARIES
from vmbus import __version__

_PROGRAMS = {
    "dbus-daemon": ["dbus-daemon", "--version"],
    "polkit": ["pkaction", "--version"],
    "QEMU": ["qemu-system-x86_64", "--version"],
    "libvirt": ["libvirtd", "--version"],
    "libvirt-dbus": ["dpkg-query", "-W", "-f=${Version}", "libvirt-dbus"],
}


def describe() -> dict[str, str]:
    """Everything by its name, for people."""
    about = {
        "CPU": f"{_field('/proc/cpuinfo', 'model name')}, {os.cpu_count()} of them",
        "memory": f"{_memory_mib()} MiB",
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "load before": load(),
        "guests": "emulated (TCG)",
        "Python": platform.python_version(),
        "vmbus": __version__,
    }
    for library in LIBRARIES.values():
        name = library.replace("_", "-")
        about[name] = importlib.metadata.version(name)
    for name, command in _PROGRAMS.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"\d[\w.+-]*", done.stdout)
        about[name] = found[0] if found else "unknown"
    return about


def load() -> str:
    """The load average, of 1, 5 and 15 minutes."""
    return " ".join(f"{each:.2f}" for each in os.getloadavg())


def _memory_mib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def _field(file: str, name: str) -> str:
    found = re.search(rf"^{name}\s*: (.*)$", Path(file).read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()
