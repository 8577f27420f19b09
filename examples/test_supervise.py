"""A tool's tests against the mock that vmbus brings along, with its extra "mock"."""

import asyncio
from pathlib import Path

import pytest
from supervise import supervise

from vmbus import errors
from vmbus.client import Changed, Events, VMBus
from vmbus.testing import Mock

pytest_plugins = ["vmbus.testing"]
pytestmark = pytest.mark.asyncio


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Nobody boots it, but it must be a file."""
    path = tmp_path / "vmlinuz"
    path.touch()
    return path


async def _running(events: Events) -> str:
    """The next VM that runs."""
    async with asyncio.timeout(20):
        async for event in events:
            if isinstance(event, Changed) and event.values.get("state") == "running":
                return event.path
    raise AssertionError("the events ended")


async def test_a_vm_that_crashes_is_replaced(vmbus_mock: Mock, kernel: Path) -> None:
    async with VMBus.session() as bus, await bus.events() as events:
        supervising = asyncio.create_task(supervise(bus, kernel=kernel))
        first = await _running(events)
        vmbus_mock.Die(first, "crash", 1)
        second = await _running(events)
        assert first != second
        vmbus_mock.Die(second, "shutdown", 0)
        async with asyncio.timeout(20):
            assert (await supervising).reason == "shutdown"
        assert await bus.vms() == []


async def test_a_start_that_fails_is_no_reason_to_go_on(vmbus_mock: Mock, kernel: Path) -> None:
    vmbus_mock.FailNextStart("no luck")
    async with VMBus.session() as bus:
        with pytest.raises(errors.StartFailed, match="no luck"):
            await supervise(bus, kernel=kernel)
        assert await bus.vms() == []
