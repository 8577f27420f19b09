"""The Debian package: installed, upgraded and purged where systemd runs."""

from __future__ import annotations

from tests.rig import BUS
from tests.system.conftest import Packages
from tests.system.machine import LONG, Machine
from tests.system.test_service import guest

#: Where programs and administrators keep files that last.
PLACES = ("/etc", "/opt", "/run/vmbus", "/srv", "/usr", "/var/lib", "/root", "/home")


def files(machine: Machine) -> set[str]:
    found = machine.command("find", *PLACES, "-xdev", deadline=60).stdout
    return set(found.splitlines())


def test_the_package_installs_into_a_clean_debian(clean: Machine, packages: Packages) -> None:
    """dpkg installs it without a warning, without starting anything, and nothing has failed."""
    said = clean.install(packages.current)
    assert "warning" not in said and "error" not in said, said
    assert clean.run("dpkg", "--verify", "vmbus") == ""
    assert clean.unit("vmbusd.service", "LoadState") == "loaded"
    assert clean.unit("vmbusd.service", "ActiveState") == "inactive"
    assert clean.unit("vmbusd.service", "UnitFileState") == "static"
    assert clean.run("systemctl", "--failed", "--plain", "--no-legend") == ""
    assert clean.run("stat", "-c", "%U:%a", "/run/vmbus", "/var/lib/vmbus/images").split() == [
        "vmbus:700",
        "root:755",
    ]
    assert clean.run("id", "-nG", "vmbus").split() == ["vmbus", "kvm"]
    # Which is where polkitd looks for translations of the texts that it shows.
    clean.run("test", "-e", "/usr/share/locale/de/LC_MESSAGES/vmbus.mo")


def test_an_upgrade_runs_the_new_service_if_the_old_one_ran(
    clean: Machine, packages: Packages
) -> None:
    """An upgrade restarts a service that runs, and starts none that doesn't."""
    clean.install(packages.current)
    clean.install(packages.newer)
    assert clean.unit("vmbusd.service", "ActiveState") == "inactive"
    clean.run("vmbusctl", "list")
    before = clean.unit("vmbusd.service", "MainPID")
    clean.install(packages.newer)
    assert clean.unit("vmbusd.service", "ActiveState") == "active"
    assert clean.unit("vmbusd.service", "MainPID") not in ("0", before)
    assert clean.run("vmbusctl", "list", "--no-legend") == ""


def test_a_purge_leaves_nothing(clean: Machine, packages: Packages) -> None:
    """A purge while a VM runs, and doesn't end in good order, leaves no trace of either."""
    clean.write("/etc/vmbus/vmbusd.toml", "stop_timeout = 1.0\n")
    before = files(clean)
    clean.install(packages.current)
    clean.run("vmbusctl", "create", "--name", "running", *guest("sleep 1000"))
    clean.run("vmbusctl", "start", "running", deadline=LONG)
    assert len(clean.processes("vmbus")) >= 2
    assert files(clean) > before
    clean.run("dpkg", "--purge", "vmbus", deadline=LONG)
    assert clean.processes("vmbus") == []
    assert clean.active_units("vmbus*") == []
    assert BUS not in clean.busctl("list", "--no-legend")
    assert files(clean) - before == set()


def test_images_outlive_the_package(clean: Machine, packages: Packages) -> None:
    """A purge leaves the images that somebody has put there."""
    clean.install(packages.current)
    clean.write("/var/lib/vmbus/images/disk.img", "theirs")
    clean.run("dpkg", "--purge", "vmbus")
    assert clean.run("cat", "/var/lib/vmbus/images/disk.img") == "theirs"
