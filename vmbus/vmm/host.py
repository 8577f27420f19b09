"""What this host can run: which VMMs are there, and whether KVM really works."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
from pathlib import Path

from ..errors import VMMUnavailable
from ..settings import Settings
from .base import Driver
from .crosvm import Crosvm
from .process import Process
from .qemu import Qemu

log = logging.getLogger(__name__)

_PROBE = Path(__file__).with_name("kvmprobe.py")
#: Seconds for the whole probe; it gives itself less.
_PROBE_TIMEOUT = 5.0


class Host:
    """The VMMs of this host. The KVM probe runs at most once, when somebody first asks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._crosvm = shutil.which(settings.crosvm)
        self._qemu = shutil.which(settings.qemu)
        self._probing: asyncio.Task[str] | None = None

    async def kvm_problem(self) -> str:
        """Why KVM can't be used, or an empty string where it can."""
        if self._settings.kvm != "probe":
            return "" if self._settings.kvm == "on" else "KVM is switched off in the settings"
        if self._probing is None:
            self._probing = asyncio.create_task(_probe_kvm(), name="kvm-probe")
        return await asyncio.shield(self._probing)

    async def available(self) -> list[str]:
        """The names of the VMMs that can be used."""
        names = []
        for choice in ("crosvm", "qemu"):
            try:
                names.append((await self.driver(choice)).name)
            except VMMUnavailable:
                continue
        return names

    async def driver(self, choice: str) -> Driver:
        """The driver for a choice of Create's. Raises VMMUnavailable, saying what is missing."""
        if choice == "auto":
            return await self._best()
        if choice == "crosvm":
            if self._crosvm is None:
                raise VMMUnavailable(f"crosvm is not installed ({self._settings.crosvm})")
            problem = await self.kvm_problem()
            if problem:
                raise VMMUnavailable(f"crosvm needs KVM: {problem}")
            return Crosvm(self._crosvm)
        if self._qemu is None:
            raise VMMUnavailable(f"QEMU is not installed ({self._settings.qemu})")
        return Qemu(self._qemu, self._settings.qemu_machine)

    async def _best(self) -> Driver:
        problems = []
        for choice in ("crosvm", "qemu"):
            try:
                return await self.driver(choice)
            except VMMUnavailable as error:
                problems.append(str(error))
        raise VMMUnavailable("; ".join(problems))

    async def aclose(self) -> None:
        """End a probe that is under way."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})


async def _probe_kvm() -> str:
    """Run a tiny guest in a child, since one that hangs can only be got rid of with its process."""
    try:
        process = Process.spawn([sys.executable, "-I", "-S", str(_PROBE)], ())
    except OSError as error:
        return f"the probe could not be started: {error.strerror}"
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT):
            status = await asyncio.shield(process.exited)
    except TimeoutError:
        process.kill()
        return "a probe guest hangs"
    except asyncio.CancelledError:
        process.kill()
        raise
    if status == 0:
        return ""
    problem = process.stderr_tail().strip() or f"the probe ended with status {status}"
    log.info("KVM is not usable: %s", problem)
    return problem
