"""Fixtures: packages, and machines that have them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.rig import ROOT
from tests.system.machine import CannotBoot, Machine, booted

#: alice may create VMs, and carol by her own password. Who isn't named needs an administrator's.
RULES = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.create" && subject.user == "alice") {
        return polkit.Result.YES;
    }
    if (action.id == "org.vmbus1.create" && subject.user == "carol") {
        return polkit.Result.AUTH_SELF;
    }
});
"""


class Packages(NamedTuple):
    """The package, and the same with a higher version, in one directory."""

    current: Path
    newer: Path


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """What `make deb` has built."""
    (built,) = (ROOT / "build" / "deb").glob("vmbus_*.deb")
    directory = tmp_path_factory.mktemp("packages")
    tree = directory / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", built, tree], check=True)
    control = tree / "DEBIAN" / "control"
    text = control.read_text()
    version = next(line for line in text.splitlines() if line.startswith("Version: "))
    control.write_text(text.replace(version, f"{version}+newer"))
    newer = directory / "newer.deb"
    # Quickly, not small.
    subprocess.run(["dpkg-deb", "-Znone", "--build", tree, newer], check=True, capture_output=True)
    shutil.rmtree(tree)
    return Packages(Path(shutil.copy(built, directory / "current.deb")), newer)


@pytest.fixture(scope="session")
def _bootable(packages: Packages) -> None:
    """Ends the session with one line where no container can be booted."""
    try:
        with booted(packages.current.parent):
            pass
    except CannotBoot as error:
        pytest.exit(
            f"systemd can't be booted in a container here ({error}); that needs root, new "
            "namespaces, overlayfs and a cgroup hierarchy that systemd may write to",
            returncode=1,
        )


@pytest.fixture
def clean(_bootable: None, packages: Packages) -> Iterator[Machine]:
    """A machine without the package."""
    with booted(packages.current.parent) as machine:
        yield machine


@pytest.fixture(scope="module")
def machine(_bootable: None, packages: Packages) -> Iterator[Machine]:
    """A machine with the package, the users alice and bob, and a rule of polkit's for alice."""
    with booted(packages.current.parent) as machine:
        machine.write("/etc/polkit-1/rules.d/50-test.rules", RULES)
        for user in ("alice", "bob"):
            machine.run("useradd", "--create-home", user)
        machine.install(packages.current)
        machine.run("sh", "-c", "cp /guest/vmlinuz /guest/initrd /var/lib/vmbus/images")
        yield machine
