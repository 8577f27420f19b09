"""The parts that tests run against: a private bus, a vmbusd on it, and clients."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmbus.bus.connection import Connection, RemoteError
from vmbus.bus.wire import Kind, Message, Variant
from vmbus.vmm.pidfd import began

ROOT = Path(__file__).parent.parent
CROSVM = ROOT / "tests" / "fakes" / "crosvm"
BUS = "org.vmbus1"
MANAGER_PATH = "/org/vmbus1"
MANAGER = "org.vmbus1.Manager"
VM = "org.vmbus1.VirtualMachine"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
#: Seconds after which something that should have happened won't.
DEADLINE = 20.0
ERROR = "org.vmbus1.Error."
STANDARD_ERROR = "org.freedesktop.DBus.Error."
#: What the bus answers in the place of a service that isn't there (any more).
GONE = {f"{STANDARD_ERROR}NoReply", f"{STANDARD_ERROR}ServiceUnknown"}

_SYSTEM_BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{services}</servicedir>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <includedir>{policy}</includedir>
  <include ignore_missing="yes">/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
  <policy context="default">
    <allow send_destination="org.freedesktop.login1"/>
  </policy>
  <policy user="root">
    <allow own="org.freedesktop.login1"/>
  </policy>
{others}
</busconfig>
"""


_SESSION_BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <include>/usr/share/dbus-1/session.conf</include>
  <listen>unix:path={socket}</listen>
  <servicedir>{services}</servicedir>
</busconfig>
"""


class Rig:
    """A private bus in a directory of its own, and what was started on it.

    policies: of others who are to own names on it, where it is a system bus.
    """

    def __init__(self, *, system: bool, policies: Sequence[Path] = ()) -> None:
        self.system = system
        # Short, since socket paths are; readable by all, since other users are clients too.
        self.directory = Path(tempfile.mkdtemp(prefix="vmbus-"))
        self.directory.chmod(0o755)
        socket = self.directory / "bus"
        (self.directory / "services").mkdir()
        config = self.directory / "bus.conf"
        config.write_text(
            (_SYSTEM_BUS if system else _SESSION_BUS).format(
                socket=socket,
                services=self.directory / "services",
                policy=ROOT / "data" / "dbus-1" / "system.d",
                others="\n".join(f"  <include>{file}</include>" for file in policies),
            )
        )
        command = ["dbus-daemon", "--nofork", "--nopidfile", "--print-address=1"]
        # An address given here is the only one, whatever the files included say.
        command += [f"--config-file={config}", f"--address=unix:path={socket}"]
        self._daemon = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={key: each for key, each in os.environ.items() if not key.startswith("XDG_")},
        )
        assert self._daemon.stdout is not None
        self.address = self._daemon.stdout.readline().strip()
        assert self.address, "the bus did not start"
        self.services: list[Service] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find this bus and no other."""
        kind = "SYSTEM" if self.system else "SESSION"
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("DBUS_")
        }
        environment[f"DBUS_{kind}_BUS_ADDRESS"] = self.address
        environment["XDG_RUNTIME_DIR"] = str(self.directory)
        return environment

    @property
    def bus_option(self) -> str:
        return "--system" if self.system else "--user"

    def command(
        self, *argv: str, deadline: float = DEADLINE, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a client program to its end."""
        return subprocess.run(
            argv,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
            **options,
        )

    def busctl(self, *arguments: str) -> str:
        """What busctl prints, on either stream."""
        done = self.command("busctl", self.bus_option, *arguments)
        return (done.stdout + done.stderr).strip()

    def gdbus(self, verb: str, *arguments: str, **options: Any) -> str:
        """What gdbus prints, on either stream."""
        bus = "--system" if self.system else "--session"
        done = self.command("gdbus", verb, bus, *arguments, **options)
        return (done.stdout + done.stderr).strip()

    def close(self) -> None:
        for service in self.services:
            service.close()
        self._daemon.kill()
        self._daemon.wait()
        assert self._daemon.stdout is not None
        self._daemon.stdout.close()
        shutil.rmtree(self.directory)

    def kill_bus(self) -> None:
        """The bus goes away, with everybody on it."""
        self._daemon.kill()
        self._daemon.wait()


def vmbusd(
    directory: Path, suffix: str, settings: Mapping[str, object] | None = None, *, user: bool
) -> list[str]:
    """The command line of a vmbusd that has its settings and its state in this directory."""
    # Whatever memory the host has: stand-ins take none of it.
    memory = {"memory": {"per_user": 1 << 20, "in_all": 1 << 20}}
    values: dict[str, object] = {
        "kvm": "off",
        "shutdown_timeout": 1.0,
        "limits": memory,
        **(settings or {}),
    }
    config = directory / f"vmbusd{suffix}.toml"
    config.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()))
    command = [sys.executable, "-m", "vmbus.daemon", "--verbose"]
    command += ["--config", str(config), "--runtime-dir", str(directory / f"run{suffix}")]
    return [*command, "--user" if user else "--allow-root"]


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    # JSON's strings, numbers, booleans and flat lists are TOML's.
    return json.dumps(value)


# What a service manager does between fork and exec.
_HAND_OVER = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(fds):
    os.dup2(fd, 1000 + number)
for number in range(len(fds)):
    os.dup2(1000 + number, 3 + number)
os.closerange(3 + len(fds), 2000)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.argv[2], sys.argv[2:])
"""


_NAME_HAS_OWNER = (
    "--dest=org.freedesktop.DBus",
    "--object-path=/org/freedesktop/DBus",
    "--method=org.freedesktop.DBus.NameHasOwner",
)


class Service:
    """A vmbusd on a rig's bus; of the user `user`, if that is named."""

    def __init__(
        self,
        rig: Rig,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        user: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.rig = rig
        self.number = len(rig.services)
        rig.services.append(self)
        self.runtime = rig.directory / f"run{self.number}"
        self.log = rig.directory / f"vmbusd{self.number}.log"
        self.argv = vmbusd(rig.directory, f"{self.number}", settings, user=not rig.system)
        self.argv += options
        self.environment = {**rig.environment, "PYTHONWARNINGS": "error", **(environment or {})}
        if user is not None:
            self.argv.remove("--allow-root")
            self.runtime.mkdir(mode=0o700)
            shutil.chown(self.runtime, user, user)
        self._user = user
        self.start()

    def start(
        self, *program: str | Path, kept: Mapping[str, int] | None = None, **environment: str
    ) -> None:
        """Start it, with the state that one before it may have left, and wait for its name.

        program: what to run in place of the daemon's own module. kept: descriptors to hand over, as
        a service manager does.
        """
        argv = self.argv
        if program:
            argv = [sys.executable, *map(str, program), *self.argv[3:]]
        if kept:
            argv = [sys.executable, "-c", _HAND_OVER, ",".join(map(str, kept.values())), *argv]
            environment["LISTEN_FDNAMES"] = ":".join(kept)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                env={**self.environment, **environment},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.rig.directory,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                pass_fds=tuple((kept or {}).values()),
            )
        self._wait_for_name()

    def crash(self) -> None:
        """SIGKILL to it alone."""
        self.process.kill()
        self.process.wait(DEADLINE)
        # The bus may take a moment to see it.
        while "true" in self.rig.gdbus("call", *_NAME_HAS_OWNER, BUS):
            pass

    def _wait_for_name(self) -> None:
        bus = "--system" if self.rig.system else "--session"
        waiting = subprocess.Popen(["gdbus", "wait", bus, BUS], env=self.rig.environment)
        try:
            first_to_end = [os.pidfd_open(each.pid) for each in (waiting, self.process)]
            ready, _, _ = select.select(first_to_end, [], [], DEADLINE)
            for fd in first_to_end:
                os.close(fd)
            assert first_to_end[1] not in ready, f"vmbusd ended: {self.log.read_text()}"
            assert ready, f"vmbusd does not own its name: {self.log.read_text()}"
        finally:
            waiting.kill()
            waiting.wait()

    def fds(self) -> list[str]:
        """What its open descriptors are, sorted; numbers and inodes left out."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(link).partition(":[")[0])
        return sorted(found)

    def resident(self) -> int:
        """Its resident memory, in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def children(self) -> list[int]:
        """Its child processes."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def terminate(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        """End it, and with it the VMs, which it would leave running."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid, _ in self.traces():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def traces(self) -> list[tuple[int, int]]:
        """See `running`."""
        return running(self.runtime)


def running(runtime: Path) -> list[tuple[int, int]]:
    """The processes of VMs that run, by a service's records: number, and beginning in ticks."""
    found = []
    for file in runtime.glob("vm/*/record.json"):
        record = json.loads(file.read_text())
        for trace in record["traces"]:
            with contextlib.suppress(OSError):
                if began(trace["pid"]) == trace["began"]:
                    found.append((trace["pid"], trace["began"]))
    return found


class Client:
    """A caller on the bus, with every signal that vmbus sent since it came."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.signals: list[Message] = []
        self._arrived = asyncio.Event()
        connection.handler = self._handle

    def _handle(self, message: Message) -> None:
        for fd in message.fds:
            os.close(fd)
        if message.kind is Kind.SIGNAL:
            self.signals.append(message)
            self._arrived.set()

    async def listen(self, rule: str = f"type='signal',sender='{BUS}'") -> None:
        await self.connection.call_bus("AddMatch", "s", [rule])

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        """Call, and give the plain values of the reply; descriptors in their places."""
        reply = await self.connection.call(
            BUS, path, interface, member, signature, body, fds=fds, timeout=DEADLINE
        )
        if reply.fds:
            return list(reply.fds)
        return [plain(value) for value in reply.body]

    async def create(self, *, fds: Sequence[int] = (), **config: Any) -> str:
        """Create a VM from a config of Variants, or of plain strings, booleans and integers."""
        body = [{key: variant(value) for key, value in config.items()}]
        (path,) = await self.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", body, fds=fds)
        return str(path)

    async def run(self, kernel: Path, **config: Any) -> str:
        """Create a VM and start it."""
        path = await self.create(kernel=kernel, **config)
        await self.vm(path, "Start")
        return path

    async def vm(self, path: str, member: str, signature: str = "", *body: Any) -> list[Any]:
        return await self.call(path, VM, member, signature, body)

    async def get(self, path: str, name: str) -> Any:
        interface = MANAGER if path == MANAGER_PATH else VM
        return (await self.call(path, PROPERTIES, "Get", "ss", [interface, name]))[0]

    async def get_all(self, path: str) -> dict[str, Any]:
        values = await self.call(path, PROPERTIES, "GetAll", "s", [VM])
        assert isinstance(values[0], dict)
        return values[0]

    async def until(self, wanted: Any) -> Message:
        """The first signal, past or to come, for which `wanted(message)` holds."""
        async with asyncio.timeout(DEADLINE):
            while True:
                self._arrived.clear()
                for message in self.signals:
                    if wanted(message):
                        return message
                await self._arrived.wait()

    async def until_state(self, path: str, state: str) -> None:
        """Wait for a PropertiesChanged that says so."""

        def says_so(message: Message) -> bool:
            dicts = [each for each in plain(message.body) if isinstance(each, dict)]
            return message.path == path and any(each.get("State") == state for each in dicts)

        await self.until(says_so)

    async def until_stopping(self, path: str) -> None:
        """Wait until the VM is said to be about to end."""
        await self.until_state(path, "stopping")

    async def died(self, path: str) -> list[Any]:
        """The arguments of a VM's Died."""
        message = await self.until(lambda m: m.member == "Died" and m.path == path)
        return list(message.body)

    def of(self, path: str) -> list[Message]:
        return [message for message in self.signals if message.path == path]


@contextlib.asynccontextmanager
async def client(rig: Rig) -> AsyncIterator[Client]:
    connection = await Connection.open(rig.address)
    try:
        yield Client(connection)
    finally:
        await connection.aclose()


@contextlib.asynccontextmanager
async def listening(rig: Rig) -> AsyncIterator[Client]:
    """A client that hears every signal from now on."""
    async with client(rig) as connected:
        await connected.listen()
        yield connected


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a program that leads a session, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(DEADLINE)


@contextlib.asynccontextmanager
async def refused(name: str) -> AsyncIterator[list[str]]:
    """The calls within end in this error; gives its text."""
    texts: list[str] = []
    try:
        yield texts
    except RemoteError as error:
        if error.name in GONE - {name}:
            raise  # the service did not refuse it, but died over it
        assert error.name == name, f"{error.name}: {error.text}"
        texts.append(error.text)
    else:
        raise AssertionError(f"no {name}")


def kernel_version() -> tuple[int, int]:
    """This host's Linux."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()))


def variant(value: Any) -> Any:
    """A plain value in the D-Bus type that a caller would likely take for it."""
    if isinstance(value, Variant):
        return value
    if isinstance(value, bool):
        return Variant("b", value)
    if isinstance(value, int):
        return Variant("u" if 0 <= value < 1 << 32 else "x", value)
    if isinstance(value, list):
        return Variant("aa{sv}", [{k: variant(v) for k, v in each.items()} for each in value])
    return Variant("s", str(value))


def plain(value: Any) -> Any:
    """A value without Variants and tuples, whatever library made it."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def guest(directory: Path, **directives: Any) -> Path:
    """A kernel for the crosvm stand-in whose guest does as it is told."""
    path = directory / f"guest-{len(list(directory.iterdir()))}"
    path.write_text("#!vmbus-test-guest\n" + json.dumps(directives))
    return path


def until_reaped(pid: int) -> None:
    """PID 1 may take its time to reap what it inherited."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(fd, 0)  # the kernel says POLLHUP, unasked, when it is reaped
            assert poll.poll(DEADLINE * 1000)
        finally:
            os.close(fd)


async def until_entries(directory: Path, count: int) -> None:
    """Wait until a directory has so many entries."""
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(inotify, os.fsencode(directory), 0x100) >= 0  # IN_CREATE
    loop = asyncio.get_running_loop()
    created = asyncio.Event()
    loop.add_reader(inotify, created.set)
    try:
        async with asyncio.timeout(DEADLINE):
            while len(os.listdir(directory)) < count:
                await created.wait()
                created.clear()
                with contextlib.suppress(BlockingIOError):
                    os.read(inotify, 65536)
    finally:
        loop.remove_reader(inotify)
        os.close(inotify)
