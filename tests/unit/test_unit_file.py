"""The units, as far as that can be told without a systemd that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.rig import ROOT

UNIT = ROOT / "data" / "systemd" / "vmbusd.service"


def test_systemd_rates_the_sandbox_well() -> None:
    """systemd finds the service's exposure to be 3.0 at the most."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=30", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", [UNIT, UNIT.with_name("vmbus-machined.service")])
def test_systemd_knows_every_directive(unit: Path) -> None:
    """systemd finds no directive, value or system call in a unit that it doesn't know."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about = [line for line in done.stderr.splitlines() if unit.name in line]
    # Here it isn't installed, and may be in the other's.
    assert [line for line in about if "is not executable" not in line] == []
