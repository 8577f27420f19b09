"""The units, as far as that can be told without a systemd that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.rig import ROOT

UNITS = sorted((ROOT / "data" / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_rates_the_sandbox_well(unit: Path) -> None:
    """systemd finds each service's exposure to be 3.0 at the most."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=30", "--no-pager", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_knows_every_directive(unit: Path) -> None:
    """systemd finds no directive, value or system call in a unit that it doesn't know."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # Of a template it speaks as of an instance.
    about = [line for line in done.stderr.splitlines() if unit.stem in line]
    # Here it isn't installed, and may be in the other's.
    assert [line for line in about if "is not executable" not in line] == []
