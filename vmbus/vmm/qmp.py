"""The control of a QEMU over QMP: requests, and what its events say of its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

from ..errors import ControlFailed, TimedOut
from ..reasons import Reason

#: Seconds that a VMM which has ended gets for its last events to be read.
_LAST_EVENTS = 1.0
#: A VMM that sends more than this is not telling how it ended.
_MAX_EVENTS = 64
_ENDS = ("SHUTDOWN", "GUEST_PANICKED", "WATCHDOG")
_SHUTDOWN_REASONS = {
    "guest-shutdown": Reason.SHUTDOWN,
    "guest-reset": Reason.REBOOT,
    "host-qmp-system-reset": Reason.REBOOT,
    "subsystem-reset": Reason.REBOOT,
    "guest-panic": Reason.GUEST_PANIC,
    "host-qmp-quit": Reason.SHUTDOWN,
    "host-error": Reason.CRASH,
    "host-signal": Reason.SIGNAL,
}

# The library tells at length of every end of file; for us that is a VM's ordinary end.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class QemuControl:
    """A QMP session with one QEMU."""

    def __init__(self, client: QMPClient, events: EventListener, timeout: float) -> None:
        self._client = client
        self._events = events
        self._timeout = timeout

    @classmethod
    async def greet(cls, sock: socket.socket, timeout: float) -> QemuControl:
        """Open the session, which QEMU takes up once its machine runs. Raises ControlFailed.

        timeout: how long each request may take, in seconds.
        """
        client = QMPClient()
        events = EventListener(_ENDS, lambda _: len(events.history) < _MAX_EVENTS)
        client.register_listener(events)
        try:
            await client.connect(sock)
            return cls(client, events, timeout)
        except QMPError as error:
            raise ControlFailed(f"QEMU's control socket: {error}") from None

    async def request(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute a QMP command. Raises ControlFailed or TimedOut."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise TimedOut(f"QEMU did not answer in {self._timeout:g} s") from None
        except ExecuteError as error:
            raise ControlFailed(f"QEMU answered: {str(error)[:300]}") from None
        except QMPError as error:
            raise ControlFailed(f"QEMU's control socket: {error}") from None

    async def power_button(self) -> None:
        """See Control.power_button."""
        await self.request("system_powerdown")

    async def quit(self) -> None:
        """See Control.quit."""
        await self.request("quit")

    async def suspend(self) -> None:
        """See Control.suspend."""
        await self.request("stop")

    async def resume(self) -> None:
        """See Control.resume."""
        await self.request("cont")

    async def set_memory(self, size: int) -> None:
        """See Control.set_memory."""
        await self.request("balloon", {"value": size})

    async def memory(self) -> int:
        """See Control.memory."""
        try:
            return int((await self.request("query-balloon"))["actual"])
        except (KeyError, TypeError, ValueError):
            raise ControlFailed("QEMU's answer has no size of the memory") from None

    async def resize_disk(self, index: int, size: int) -> None:
        """See Control.resize_disk."""
        await self.request("block_resize", {"node-name": f"disk{index}", "size": size})

    def watch_memory(self, changed: Callable[[int], None]) -> None:
        """See Control.watch_memory."""

        def tell(event: Mapping[str, Any]) -> bool:
            data = event.get("data")
            if isinstance(data, dict) and isinstance(data.get("actual"), int):
                changed(data["actual"])
            return False

        self._client.register_listener(EventListener("BALLOON_CHANGE", tell))

    async def aclose(self) -> Reason | None:
        """See Control.aclose. Its last events may still be on their way."""
        try:
            async with asyncio.timeout(_LAST_EVENTS):
                while self._client.runstate is Runstate.RUNNING:
                    await self._client.runstate_changed()
        except TimeoutError:
            pass
        with contextlib.suppress(EOFError, OSError, QMPError):
            await self._client.disconnect()
        return told_by_events(self._events.clear())


def told_by_events(events: Iterable[Mapping[str, Any]]) -> Reason | None:
    """What QEMU's events say of its end: the cause, where one event caused the next."""
    reasons = {}
    for event in events:
        data = event.get("data")
        reasons[event.get("event")] = data.get("reason") if isinstance(data, dict) else None
    if "GUEST_PANICKED" in reasons:
        return Reason.GUEST_PANIC
    if "WATCHDOG" in reasons:
        return Reason.WATCHDOG
    return _SHUTDOWN_REASONS.get(str(reasons.get("SHUTDOWN")))
