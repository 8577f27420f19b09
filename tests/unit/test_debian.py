"""The Debian package's definition, as far as that can be told without building it."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.rig import ROOT

DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.mark.parametrize("dependency", [each for each in DEPENDENCIES if ">= '3.15'" not in each])
def test_the_package_has_every_dependency_new_enough(dependency: str) -> None:
    """What pyproject.toml asks for is pinned to be brought along, or asked for of Debian."""
    found = re.match(r"([\w.-]+)[>=]=([\d.]+)", dependency)
    assert found
    name, version = found.groups()
    control = (ROOT / "debian" / "control").read_text()
    vendored = (ROOT / "debian" / "vendor.txt").read_text()
    pinned = re.search(rf"^{re.escape(name)}==([\d.]+)$", vendored, re.MULTILINE)
    if pinned:
        assert _numbers(pinned[1]) >= _numbers(version)
    else:
        asked = rf"^ python3-{re.escape(name)} \(>= {re.escape(version)}\),?$"
        assert len(re.findall(asked, control, re.MULTILINE)) == 2, "to build, and to run"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]
