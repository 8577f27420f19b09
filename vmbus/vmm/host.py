"""What this host can run: which VMMs are there, and whether KVM really works."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from pathlib import Path

from ..errors import NotSupported, VMMUnavailable
from ..settings import Settings
from ..spec import VMConfig
from .base import Driver
from .crosvm import Crosvm
from .process import Process
from .qemu import Qemu
from .virtiofsd import DIRECTORIES as VIRTIOFSD_PLACES
from .virtiofsd import Virtiofsd

log = logging.getLogger(__name__)

VSOCK_DEVICE = Path("/dev/vhost-vsock")
_PROBE = Path(__file__).with_name("kvmprobe.py")
#: Seconds for the whole probe; it gives itself less.
_PROBE_TIMEOUT = 5.0


class Host:
    """The VMMs of this host. The KVM probe runs at most once, when somebody first asks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._crosvm = shutil.which(settings.crosvm)
        self._qemu = shutil.which(settings.qemu)
        places = os.pathsep.join((os.environ.get("PATH", os.defpath), *VIRTIOFSD_PLACES))
        virtiofsd = shutil.which(settings.virtiofsd, path=places)
        self._virtiofsd = Virtiofsd(virtiofsd) if virtiofsd else None
        #: Whether guests can have a vsock device.
        self.vsock = os.access(VSOCK_DEVICE, os.R_OK | os.W_OK)
        self._probing: asyncio.Task[str] | None = None

    async def kvm_problem(self) -> str:
        """Why KVM can't be used, or an empty string where it can."""
        if self._settings.kvm != "probe":
            return "" if self._settings.kvm == "on" else "KVM is switched off in the settings"
        if self._probing is None:
            self._probing = asyncio.create_task(_probe_kvm(), name="kvm-probe")
        return await asyncio.shield(self._probing)

    async def available(self) -> list[str]:
        """The names of the VMMs that can be used, best first."""
        drivers, _ = self._drivers("auto", await self.kvm_problem())
        return [driver.name for driver in drivers]

    def driver_named(self, name: str) -> Driver:
        """The driver of a VMM that runs already, whether or not another could be started."""
        if name == Crosvm.name:
            return Crosvm(self._crosvm or self._settings.crosvm)
        return Qemu(self._qemu or self._settings.qemu, self._settings.qemu_machine, self._virtiofsd)

    def driver(self, config: VMConfig, kvm_problem: str) -> Driver:
        """The first VMM of a config's choice that is there and can do all of it. May block.

        Raises VMMUnavailable or NotSupported, saying what is missing.
        """
        drivers, missing = self._drivers(config.vmm, kvm_problem)
        if config.vsock and not self.vsock:
            raise NotSupported(f"vsock: this host has no {VSOCK_DEVICE} that the service may open")
        unsupported = []
        for driver in drivers:
            problems = driver.unsupported(config)
            if not problems:
                return driver
            unsupported += problems
        if unsupported:
            raise NotSupported("; ".join(unsupported))
        raise VMMUnavailable("; ".join(missing))

    def _drivers(self, choice: str, kvm_problem: str) -> tuple[list[Driver], list[str]]:
        """The VMMs that a choice allows and that are there, best first; and why others aren't."""
        drivers: list[Driver] = []
        missing = []
        if choice in ("auto", "crosvm"):
            if self._crosvm is None:
                missing.append(f"crosvm is not installed ({self._settings.crosvm})")
            elif kvm_problem:
                missing.append(f"crosvm needs KVM: {kvm_problem}")
            else:
                drivers.append(Crosvm(self._crosvm))
        if choice in ("auto", "qemu"):
            if self._qemu is None:
                missing.append(f"QEMU is not installed ({self._settings.qemu})")
            else:
                drivers.append(Qemu(self._qemu, self._settings.qemu_machine, self._virtiofsd))
        return drivers, missing

    async def aclose(self) -> None:
        """End a probe that is under way."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})


async def _probe_kvm() -> str:
    """Run a tiny guest in a child, since one that hangs can only be got rid of with its process."""
    try:
        process = Process.spawn([sys.executable, "-I", "-S", str(_PROBE)], ())
        process.release()
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
