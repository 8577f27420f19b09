"""The project's template for python-dbusmock, on a rig's bus."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from .rig import BUS, DEADLINE, MANAGER_PATH, ROOT, Client, Rig

TEMPLATE = ROOT / "data" / "dbusmock" / "vmbus.py"
MOCK = "org.freedesktop.DBus.Mock"


def template() -> ModuleType:
    """The template as python-dbusmock loads it."""
    loader = importlib.import_module("dbusmock.mockobject")
    return cast(ModuleType, loader.load_module(str(TEMPLATE)))


def data_directory(directory: Path) -> Path:
    """A directory for XDG_DATA_DIRS with the template where python-dbusmock looks for it."""
    templates = directory / "python-dbusmock" / "templates"
    templates.mkdir(parents=True)
    (templates / "vmbus.py").symlink_to(TEMPLATE)
    return directory


class Mock:
    """A mock that runs, in the place of a service. data: where templates are, by XDG_DATA_DIRS."""

    def __init__(self, rig: Rig, parameters: object = None, *, data: Path | None = None) -> None:
        self.rig = rig
        self.log = rig.directory / "vmbusmock.log"
        name = str(TEMPLATE) if data is None else "vmbus"
        command = [sys.executable, "-m", "dbusmock", "--session", "--template", name]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--parameters", json.dumps(parameters or {})],
                env={**rig.environment, **({"XDG_DATA_DIRS": str(data)} if data else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        rig.gdbus("wait", "--timeout", f"{DEADLINE:.0f}", BUS)
        assert self.process.poll() is None, self.log.read_text()

    def fds(self) -> list[str]:
        """What its open descriptors are, sorted; numbers and inodes left out."""
        found = (os.readlink(each) for each in Path(f"/proc/{self.process.pid}/fd").iterdir())
        return sorted(each.partition(":[")[0] for each in found)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def mock(rig: Rig, parameters: object = None, *, data: Path | None = None) -> Iterator[Mock]:
    running = Mock(rig, parameters, data=data)
    try:
        yield running
    finally:
        running.kill()


async def control(bus: Client, member: str, signature: str, *args: Any) -> None:
    """Tell the mock what to do."""
    await bus.call(MANAGER_PATH, MOCK, member, signature, args)
