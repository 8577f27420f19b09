"""python-dbusmock's logind on a private bus."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

from tests.rig import DEADLINE, Rig, client, plain
from vmbus.bus.wire import Variant
from vmbus.systemd.logind import LOGIND

PATH = "/org/freedesktop/login1"
MANAGER = f"{LOGIND}.Manager"
MOCK = "org.freedesktop.DBus.Mock"


class Logind:
    """A logind that runs, and what is asked of it from outside."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        bus = "--system" if rig.system else "--session"
        command = [sys.executable, "-m", "dbusmock", bus, "--template", "logind"]
        self._process = subprocess.Popen(command, env=rig.environment, stdout=subprocess.DEVNULL)
        done = rig.command("gdbus", "wait", bus, LOGIND)
        assert done.returncode == 0, done.stderr

    async def call(self, interface: str, member: str, signature: str = "", *body: Any) -> Any:
        async with client(self.rig) as outside:
            target = (LOGIND, PATH, interface, member)
            return plain((await outside.connection.call(*target, signature, body)).body)

    async def locks(self) -> list[Any]:
        """Those that are held: what, who, why and how."""
        (found,) = await self.call(MANAGER, "ListInhibitors")
        return [each[:4] for each in found]

    async def until(self, count: int) -> None:
        """Wait until so many are held: it hears of an end by its own pipe."""
        async with asyncio.timeout(DEADLINE):
            while len(await self.locks()) != count:
                pass

    async def prepare(self, *, begins: bool) -> None:
        """The host is about to shut down, or does not after all."""
        body = [MANAGER, "PrepareForShutdown", "b", [Variant("b", begins)]]
        await self.call(MOCK, "EmitSignal", "sssav", *body)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
