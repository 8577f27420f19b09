"""Fixtures for pytest: a mock of the service, on a bus of the tests' own.

pytest_plugins = ["vmbus.testing"]

async def test_a_crash(vmbus_mock: Mock, tmp_path: Path) -> None:
    ...
    vmbus_mock.Die(vm.path, "crash", 1)

Other programs' tests have it by `python3 -m dbusmock --template "$(python3 -m vmbus.testing)"`.

PYTEST_DONT_REWRITE: there is no assertion here, and tests may import it before pytest does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

import pytest
from dbusmock import BusType, SpawnedMock
from dbusmock.testcase import PrivateDBus

__all__ = ["TEMPLATE", "Mock", "vmbus_mock", "vmbus_mock_system"]

pytest_plugins = ["dbusmock.pytest_fixtures"]

_HERE = Path(__file__).parent
_PLACES = (_HERE / "dbusmock", _HERE.parent / "data" / "dbusmock")
#: The template for python-dbusmock, where it is installed or in the project's own tree.
TEMPLATE = next(each / "vmbus.py" for each in _PLACES if each.is_dir())


class Mock(Protocol):
    """The mock's controls, as the template documents them. vm: an object path."""

    def Die(self, vm: str, reason: str, status: int) -> None: ...

    def FailNextStart(self, words: str) -> None: ...

    def FailNext(self, member: str, error: str, text: str) -> None: ...

    def SetPayloadState(self, vm: str, state: str) -> None: ...

    def SetPayloadExitStatus(self, vm: str, status: int) -> None: ...

    def SetStatusText(self, vm: str, text: str) -> None: ...


@pytest.fixture
def vmbus_mock(dbusmock_session: PrivateDBus) -> Iterator[Mock]:
    """A mock on a session bus, where `VMBus.session` finds it."""
    with SpawnedMock.spawn_with_template(str(TEMPLATE), bustype=BusType.SESSION) as spawned:
        yield cast(Mock, spawned.obj)


@pytest.fixture
def vmbus_mock_system(dbusmock_system: PrivateDBus) -> Iterator[Mock]:
    """A mock on a system bus, where `VMBus.system` finds it."""
    with SpawnedMock.spawn_with_template(str(TEMPLATE), bustype=BusType.SYSTEM) as spawned:
        yield cast(Mock, spawned.obj)


if __name__ == "__main__":
    print(TEMPLATE)
