"""Vsock: on the kernel's own where it reaches anybody, and always on sockets that stand in for it.

The stand-ins are AF_UNIX with abstract names, which has packets, and TCP, where a connection may
have to wait: the same code, other families of addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.doubles import DEADLINE, FakeDriver, FakeHost, Recorder
from vmbus.errors import ControlFailed, TimedOut
from vmbus.guest import vsock
from vmbus.guest.port import PAUSE
from vmbus.guest.report import Payload, Report
from vmbus.guest.vsock import LIFETIME, MAX_CONNECTIONS, Family, Listener, connect
from vmbus.model.identity import Requester
from vmbus.model.limits import Limits
from vmbus.model.machine import Machine
from vmbus.model.record import Store
from vmbus.model.registry import Registry
from vmbus.model.surroundings import Surroundings
from vmbus.settings import Settings
from vmbus.vmm.base import Driver

pytestmark = pytest.mark.usefixtures("nothing_left")

PORT = 20_000 + os.getpid() % 10_000
#: By the kernel's own, a host is its own guest.
LOCAL = 1


def _name(cid: int, port: int) -> bytes:
    host = cid in (socket.VMADDR_CID_ANY, 2)
    return f"\0vmbus-test-{os.getpid()}-{'host' if host else cid}-{port}".encode()


STANDIN = Family(
    socket.AF_UNIX,
    address=_name,
    cid=lambda address: int(address.decode().split("-")[-2]),
)
TCP = Family(socket.AF_INET, address=lambda cid, port: (f"127.0.0.{cid}", port))


def _loops_back() -> bool:
    """Whether this kernel has a vsock that leads anywhere."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as there:
        there.bind((socket.VMADDR_CID_ANY, PORT))
        there.listen()
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as here:
            here.settimeout(1)
            with contextlib.suppress(OSError):
                here.connect((LOCAL, PORT))
                return True
    return False


KERNEL = [pytest.param(Family(), id="kernel")] if _loops_back() else []
FAMILIES = [pytest.param(STANDIN, id="standin"), *KERNEL]


class Guests:
    """Some guests, and who hears those whose CIDs are known."""

    def __init__(self, family: Family, *known: int) -> None:
        self.family = family
        self.reports: list[Report] = []
        self._known = known
        self.begin()
        self._news = asyncio.Event()
        self._socks: list[socket.socket] = []
        self._ports = iter(range(900, 1000))

    def begin(self, kept: int | None = None) -> int:
        """Listen, with the socket that a listener before had if that was kept."""
        self.listener = Listener(self.family, lambda cid: self.hear if cid in self._known else None)
        if kept is not None:
            self.listener.adopt(kept)
        return self.listener.open(PORT)

    def hear(self, report: Report) -> None:
        self.reports.append(report)
        self._news.set()

    async def until(self, count: int) -> list[Report]:
        async with asyncio.timeout(DEADLINE):
            while len(self.reports) < count:
                self._news.clear()
                await self._news.wait()
        return self.reports

    def calls(self, cid: int = LOCAL) -> socket.socket:
        """A connection of a guest's, from a privileged port, as systemd makes it."""
        sock = socket.socket(self.family.number, socket.SOCK_SEQPACKET)
        self._socks.append(sock)
        sock.settimeout(DEADLINE)
        if self.family is STANDIN:
            sock.bind(_name(cid, next(self._ports)))
        host = 2 if self.family is STANDIN else LOCAL
        sock.connect(self.family.address(host, PORT))
        return sock

    def close(self) -> None:
        self.listener.close()
        for sock in self._socks:
            sock.close()


@pytest.fixture(params=FAMILIES)
async def guests(request: pytest.FixtureRequest) -> AsyncIterator[Guests]:
    """A guest that has a VM, on each family that there is."""
    found = Guests(request.param, LOCAL)
    yield found
    found.close()


@pytest.fixture
async def crowd() -> AsyncIterator[Guests]:
    """Two guests that have VMs, and others."""
    found = Guests(STANDIN, 5, 6)
    yield found
    found.close()


async def _hangs_up(sock: socket.socket) -> None:
    """The other end closes the connection."""
    sock.setblocking(False)
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""


async def test_guest_reports_as_systemd_does(guests: Guests) -> None:
    """A connection a message, whose last line has no end; the CID says whose it is."""
    for message in (b"STATUS=Booting\n", b"READY=1\nSTATUS=Up", b"EXIT_STATUS=3"):
        with guests.calls() as sock:
            sock.send(message)
        await guests.until(len(guests.reports) + 1)
    assert guests.reports == [
        Report(status="Booting"),
        Report(Payload.READY, status="Up"),
        Report(Payload.FINISHED, exit_status=3),
    ]


async def test_several_messages_on_one_connection(guests: Guests) -> None:
    """A packet that is cut says nothing of the next."""
    sock = guests.calls()
    for message in (b"STATUS=a", b"READ", b"Y=1", b"READY=1"):
        sock.send(message)
    assert (await guests.until(4))[0].status == "a"
    assert [report.payload for report in guests.reports[1:]] == ["none", "none", "ready"]


async def test_stranger_is_sent_away(crowd: Guests) -> None:
    """A CID of no VM's: nobody hears what it says."""
    stranger = crowd.calls(cid=77)
    stranger.send(b"READY=1")
    await _hangs_up(stranger)
    with crowd.calls(5) as sock:
        sock.send(b"STATUS=mine")
    assert await crowd.until(1) == [Report(status="mine")]


async def test_guest_that_holds_connections_holds_up_no_other(crowd: Guests) -> None:
    """Each has so many; what it makes beyond them is closed at once, and others are heard."""
    held = [crowd.calls(5) for _ in range(MAX_CONNECTIONS)]
    for extra in [crowd.calls(5) for _ in range(20)]:
        await _hangs_up(extra)
    with crowd.calls(6) as sock:
        sock.send(b"READY=1")
    assert await crowd.until(1) == [Report(Payload.READY)]
    held[0].send(b"STATUS=still here")
    assert (await crowd.until(2))[1].status == "still here"


async def test_connection_that_is_over_makes_room_for_another(crowd: Guests) -> None:
    held = [crowd.calls(5) for _ in range(MAX_CONNECTIONS)]
    for sock in held:
        sock.send(b"STATUS=one of many")
        sock.shutdown(socket.SHUT_WR)
    for sock in held:
        await _hangs_up(sock)
    crowd.calls(5).send(b"READY=1")
    assert (await crowd.until(MAX_CONNECTIONS + 1))[-1] == Report(Payload.READY)


async def test_connection_ends_in_time(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one on which nothing is ever said."""
    assert LIFETIME <= 60
    monkeypatch.setattr(vsock, "LIFETIME", 0.05)
    await _hangs_up(guests.calls())


async def test_flood_is_heard_in_small_pieces_with_pauses(guests: Guests) -> None:
    sock = guests.calls()
    times = []
    for count in range(1, 5):
        sock.send(b"STATUS=flood")
        sock.send(b"STATUS=flood")
        await guests.until(count)
        times.append(asyncio.get_running_loop().time())
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) > PAUSE / 2


async def test_next_service_hears_who_called_meanwhile(guests: Guests) -> None:
    """Where the socket was kept: it is the same one."""
    guests.listener.close()
    kept = os.dup(guests.begin())
    guests.listener.close()
    sock = guests.calls()
    sock.send(b"READY=1")
    guests.begin(kept)
    assert await guests.until(1) == [Report(Payload.READY)]


async def test_socket_that_was_kept_for_another_port_is_not_used(guests: Guests) -> None:
    guests.listener.close()
    kept = os.dup(guests.begin())
    guests.listener.close()
    guests.listener.adopt(kept)
    with socket.socket(fileno=os.dup(guests.listener.open(PORT + 1))) as now:
        assert now.getsockname() == guests.family.address(socket.VMADDR_CID_ANY, PORT + 1)


async def test_port_that_is_taken(guests: Guests) -> None:
    """An error, and nothing is left open."""
    with pytest.raises(OSError) as raised:
        Listener(guests.family, lambda _: None).open(PORT)
    assert raised.value.errno == errno.EADDRINUSE


async def test_host_without_descriptors_hears_them_later(
    crowd: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not spin meanwhile: it looks again after a while."""
    monkeypatch.setattr(vsock, "_RETRY", 0.05)
    real = crowd.listener._sock
    assert real is not None
    failures = 0

    class Exhausted:
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal failures
            failures += 1
            crowd.listener._sock = real
            raise OSError(errno.EMFILE, "Too many open files")

        def fileno(self) -> int:
            assert real is not None
            return real.fileno()

    crowd.listener._sock = Exhausted()  # type: ignore[assignment]
    with crowd.calls(5) as sock:
        sock.send(b"READY=1")
    assert await crowd.until(1) == [Report(Payload.READY)]
    assert failures == 1


# All VMs of a service


class Kept:
    """A place where descriptors outlive the service."""

    lasting = True

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}

    def store(self, name: str, fd: int) -> None:
        self.forget(name)
        self.fds[name] = os.dup(fd)

    def forget(self, name: str) -> None:
        if name in self.fds:
            os.close(self.fds.pop(name))


class VsockHost(FakeHost):
    """A host with one driver, and with a vsock."""

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__(driver)
        self.vsock = True

    def driver_named(self, name: str) -> Driver:
        assert self.fake is not None
        return self.fake


class Services:
    """Services in one directory, one after the other, on a host that has a vsock."""

    def __init__(self, directory: Path) -> None:
        self.recorder = Recorder()
        self.kept = Kept()
        self.driver = FakeDriver()
        self._directory = directory
        self._settings = Settings(notify_port=PORT)

    def begin(self) -> Registry:
        host = VsockHost(self.driver)
        store = Store(self._directory / "vm")
        around = Surroundings(self._settings, self.recorder, store, keep=self.kept, vsock=STANDIN)
        limits = Limits(self._settings.limits)
        registry = Registry(around, host, limits, image_directories=None)
        registry.restore("bus", {name: os.dup(fd) for name, fd in self.kept.fds.items()})
        registry.go_on()
        return registry

    async def create(self, registry: Registry, **config: object) -> Machine:
        kernel = self._directory / "kernel"
        kernel.touch()
        vm = await registry.create({"kernel": str(kernel), **config}, Requester(1000))
        await vm.start()
        return vm

    def close(self) -> None:
        self.driver.close()
        for name in list(self.kept.fds):
            self.kept.forget(name)


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    found = Services(tmp_path)
    yield found
    found.close()


def _calls(cid: int, message: bytes) -> socket.socket:
    """A message from a guest; the connection stays open."""
    sock = socket.socket(STANDIN.number, socket.SOCK_SEQPACKET)
    sock.bind(_name(cid, 999))
    sock.connect(_name(2, PORT))
    sock.send(message)
    return sock


async def test_report_is_of_the_vm_whose_cid_it_comes_from(services: Services) -> None:
    """And of no other; nobody hears a VM without a vsock, or one that is dead."""
    registry = services.begin()
    one, other = [await services.create(registry) for _ in range(2)]
    mute = await services.create(registry, vsock=False)
    with contextlib.ExitStack() as calls:
        for stranger in (mute.identity.cid, 77):
            await _hangs_up(calls.enter_context(_calls(stranger, b"READY=1")))
        calls.enter_context(_calls(one.identity.cid, b"READY=1\nSTATUS=up"))
        await services.recorder.until("changed payload status_text")
    assert [vm.payload for vm in (one, other, mute)] == ["ready", "starting", "starting"]
    assert one.status_text == "up"
    for vm in registry:
        await vm.kill()
    with _calls(other.identity.cid, b"READY=1") as late:
        await _hangs_up(late)
    assert other.payload == "starting"
    await registry.let_go()


async def test_report_waits_for_the_next_service(services: Services) -> None:
    """Where the socket is kept, a guest that calls while there is no service is heard later."""
    registry = services.begin()
    vm = await services.create(registry)
    await registry.let_go()
    with _calls(vm.identity.cid, b"READY=1"):
        registry = services.begin()
        await services.recorder.until("changed payload")
    found = registry.by_cid(vm.identity.cid)
    assert found.payload == "ready"
    await found.kill()
    await registry.let_go()


async def test_service_whose_port_is_taken_serves_all_the_same(services: Services) -> None:
    with socket.socket(STANDIN.number, socket.SOCK_SEQPACKET) as other:
        other.bind(_name(2, PORT))
        registry = services.begin()
        vm = await services.create(registry)
        assert vm.state == "running"
        await vm.kill()
        await registry.let_go()


# Connections to guests


@pytest.fixture(params=[pytest.param(TCP, id="standin"), *KERNEL])
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def guest_port(family: Family) -> Iterator[socket.socket]:
    """A program in the guest with the CID 1, which listens."""
    with socket.socket(family.number, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(family.address(LOCAL, PORT))
        sock.listen(0)
        yield sock


async def test_connection_to_a_port_of_a_guest(family: Family, guest_port: socket.socket) -> None:
    """A stream both ways, as any program takes it: its reads wait."""
    ours = await connect(family, LOCAL, PORT, DEADLINE)
    theirs, _ = guest_port.accept()
    with ours, theirs:
        ours.send(b"ping")
        assert theirs.recv(10) == b"ping"
        theirs.send(b"pong")
        assert os.get_blocking(ours.fileno())
        assert ours.recv(10) == b"pong"


async def test_port_where_nobody_listens(family: Family) -> None:
    with pytest.raises(ControlFailed, match=f"port {PORT + 2}: Connection re"):
        await connect(family, LOCAL, PORT + 2, DEADLINE)


@pytest.mark.usefixtures("guest_port")
async def test_guest_that_does_not_answer(family: Family) -> None:
    """Nobody takes what is queued at the port, and so the queue takes no more."""
    with contextlib.ExitStack() as queued, pytest.raises(TimedOut):
        for _ in range(10):
            queued.enter_context(await connect(family, LOCAL, PORT, 0.2))
