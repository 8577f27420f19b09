"""Fixtures: a bus, a service on it, a client, and the service's log where a test fails."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import polkit
from tests.ctl import Ctl, vmbusctl
from tests.rig import CROSVM, ROOT, Client, Rig, Service, listening

# Wherever the tests are run from.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / "build" / "hypothesis"))
# How fast a busy machine makes examples says nothing of what they are to show.
settings.register_profile("vmbus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmbus")
LIBRARIES = ("dbus_next", "dbus_fast")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A private session bus."""
    rig = Rig(system=False)
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def system_rig() -> Iterator[Rig]:
    """A private system bus, with the project's own policy."""
    rig = Rig(system=True)
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def service(rig: Rig) -> Service:
    """A vmbusd whose VMs run in the crosvm stand-in."""
    return Service(rig, {"crosvm": str(CROSVM), "kvm": "on"})


@pytest.fixture(scope="module", params=LIBRARIES)
def either_service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """The same on a bus of its own, once with each of the D-Bus libraries."""
    rig = Rig(system=False)
    environment = {"VMBUS_DBUS_LIBRARY": str(request.param)}
    yield Service(rig, {"crosvm": str(CROSVM), "kvm": "on"}, environment)
    rig.close()


@pytest.fixture
async def bus(service: Service) -> AsyncIterator[Client]:
    """A client that has heard every signal since the test began."""
    async with listening(service.rig) as connected:
        yield connected


@pytest.fixture
def own_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A session bus that a test may do with as it likes, and that is this process's own."""
    rig = Rig(system=False)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", rig.address)
    yield rig
    rig.close()


@pytest.fixture
def mortal(own_rig: Rig) -> Service:
    """A service of this test's own, to be killed and started anew."""
    return Service(own_rig, {"crosvm": str(CROSVM), "kvm": "on"})


@pytest.fixture
async def listener(mortal: Service) -> AsyncIterator[Client]:
    """A client that stays on the bus, whatever becomes of the service."""
    async with listening(mortal.rig) as connected:
        yield connected


@pytest.fixture
def ctl(service: Service) -> Ctl:
    """Run vmbusctl to its end, with an exit status that is expected."""
    return lambda *arguments, **options: vmbusctl(service.rig, *arguments, **options)


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A name that no other test has for its VM."""
    return tmp_path.name.replace("_", "-")[-40:].lstrip("-")


@pytest.fixture(scope="session")
def guest_files() -> tuple[Path, Path]:
    """The kernel and the initial RAM disk of a real Linux guest, as `make guest` builds them."""
    files = ROOT / "build" / "guest" / "vmlinuz", ROOT / "build" / "guest" / "initrd"
    for file in files:
        assert file.exists(), f"{file} is missing: run `make guest`"
    return files


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: the side of the user, and that of programs. It doesn't echo."""
    user, program = pty.openpty()
    settings = termios.tcgetattr(program)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(program, termios.TCSANOW, settings)
    yield user, program
    os.close(user)
    os.close(program)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """A polkitd that has crashed since the last test is no matter of the next one's."""
    for polkitd in list(polkit.running):
        if note := polkitd.ended_by_itself():
            item.add_report_section("setup", "polkitd", f"{note}: {polkitd.log[-2000:]}")
            polkitd.restart()
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.excinfo is not None:
        for polkitd in polkit.running:
            # Who asked it may have learnt of its end before us.
            if note := polkitd.ended_by_itself(within=1):
                call.excinfo.value.add_note(note)
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for value in item.funcargs.values():
            if isinstance(value, Service) and value.log.exists():
                report.sections.append(("vmbusd's log", value.log.read_text()[-20_000:]))
        # It can also miss the end of its own rules, and then stands still for 15 seconds.
        for polkitd in polkit.running:
            report.sections.append(("polkitd's log", polkitd.log[-2000:]))
    return report
