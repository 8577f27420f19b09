"""Where it is measured: a private system bus, the real polkitd, and a vmbusd of the user vmbus."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.client import DRIVER, CallFailed, Client, call_frame, get_frame
from tests.frames import Var
from tests.polkit import Polkit
from tests.rig import BUS, MANAGER, MANAGER_PATH, OBJECT_MANAGER, ROOT, VM, Rig, vmbusd

GUEST = ROOT / "build" / "guest"
#: Who calls vmbus: somebody whom polkit has to be asked for, unlike root.
CALLER = "nobody"
USER = "vmbus"
_RULES = """
polkit.addRule(function(action, subject) {
    return action.id.indexOf("org.vmbus1.") == 0 ? polkit.Result.YES : polkit.Result.NOT_HANDLED;
});
"""
_PLENTY = {"per_user": 1 << 20, "in_all": 1 << 20}
_LIMITS = dict.fromkeys(("vms", "memory", "calls", "consoles", "files"), _PLENTY)
LIST = call_frame(BUS, MANAGER_PATH, MANAGER, "List")
MANAGED = call_frame(BUS, MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects")


class Stage:
    """A bus, polkitd and vmbusd on it, with the D-Bus library of that name."""

    def __init__(
        self, library: str, settings: Mapping[str, Any], policies: Sequence[Path] = ()
    ) -> None:
        self._parts = contextlib.ExitStack()
        self.rig = Rig(system=True, policies=policies)
        self._parts.callback(self.rig.close)
        self.bus = str(self.rig.directory / "bus")
        polkit = Polkit(self.rig)
        polkit.rules(_RULES)
        polkit.start()
        self._parts.callback(polkit.kill)
        self._environment = {**self.rig.environment, "VMBUS_DBUS_LIBRARY": library}
        values = {"limits": _LIMITS, "shutdown_timeout": 10.0, **settings}
        self._argv = vmbusd(self.rig.directory, "", values, user=False)
        self._argv.remove("--verbose")
        self._argv.remove("--allow-root")
        runtime = self.rig.directory / "run"
        runtime.mkdir(mode=0o700)
        shutil.chown(runtime, USER, USER)
        self._log = self._parts.enter_context((self.rig.directory / "vmbusd.log").open("wb"))
        self._watch = self.client()
        rule = f"type='signal',sender='{DRIVER}',member='NameOwnerChanged',arg0='{BUS}'"
        self._watch.listen(rule)
        self._process: subprocess.Popen[bytes] | None = None
        self._parts.callback(self.stop)
        self.start()

    def start(self) -> float:
        """Start vmbusd. How long until it owned its name, in milliseconds."""
        before = time.perf_counter()
        self._process = subprocess.Popen(
            self._argv,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=self.rig.directory,
            user=USER,
            group=USER,
            extra_groups=[],
        )
        self._check_alive()
        return (self._name_changed() - before) * 1e3

    def _check_alive(self) -> None:
        """Wait for news of the name. Raises CallFailed when vmbusd ends before there are any."""
        pidfd = os.pidfd_open(self.pid)
        ended = pidfd in select.select([self._watch.socket.fileno(), pidfd], [], [])[0]
        os.close(pidfd)
        if ended:
            log = (self.rig.directory / "vmbusd.log").read_text()
            raise CallFailed(f"vmbusd ended: {log}")

    def _name_changed(self) -> float:
        """When the name's owner next changed."""
        return self._watch.until("NameOwnerChanged", "/org/freedesktop/DBus").at

    def stop(self) -> None:
        """SIGTERM, and its end."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        """SIGKILL, as if it had crashed."""
        self._end(subprocess.Popen.kill)

    def _end(self, how: Any) -> None:
        if self._process is not None:
            how(self._process)
            self._process.wait()
            self._process = None
            self._name_changed()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def resident(self) -> float:
        """The service's resident memory, in MiB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def busy(self) -> float:
        """How long the service has kept a CPU busy since it was started, in milliseconds."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((each / "schedstat").read_text().split()[0]) for each in tasks) / 1e6

    def client(self) -> Client:
        client = Client(self.bus, pwd.getpwnam(CALLER).pw_uid)
        self._parts.callback(client.close)
        return client

    def close(self) -> None:
        self._parts.close()


class Caller:
    """The calls of org.vmbus1 that are measured. Files are passed as descriptors."""

    def __init__(self, client: Client, vmm: str, params: str = "") -> None:
        self.client = client
        self._files = [os.open(GUEST / name, os.O_RDONLY) for name in ("vmlinuz", "initrd")]
        config = {"vmm": Var("s", vmm), "kernel": Var("h", 0), "initrd": Var("h", 1)}
        config["params"] = Var("s", params)
        create = call_frame(
            BUS, MANAGER_PATH, MANAGER, "Create", "a{sv}", config, fds=len(self._files)
        )
        #: A call of Create, and the descriptors that go with it.
        self.creation = create, self._files

    def create(self) -> str:
        return str(self.client.ask(*self.creation)[0])

    def vm(self, path: str, member: str) -> None:
        self.client.call(call_frame(BUS, path, VM, member))

    def get(self, path: str, name: str) -> Any:
        return self.client.ask(get_frame(BUS, path, VM, name))[0].value

    def listen(self) -> None:
        """Hear of every death."""
        self.client.listen(f"type='signal',interface='{VM}',member='Died'")

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def compile_package() -> None:
    """Have the service's bytecode there, which its own user may not write."""
    code = "import compileall, vmbus; compileall.compile_dir(vmbus.__path__[0], quiet=2)"
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)
