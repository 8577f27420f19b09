"""What the service manager is told, and what it hands over, with sockets as it has them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import DEADLINE
from vmbus.systemd.notify import Manager, inherited

pytestmark = pytest.mark.usefixtures("nothing_left")


class Listening:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self.sock.setblocking(False)

    def read(self) -> tuple[str, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 4096, 16)
        return data.decode(), fds

    async def until_read(self) -> tuple[str, list[int]]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self.read()
            except BlockingIOError:
                there = asyncio.Event()
                loop.add_reader(self.sock, there.set)
                try:
                    await asyncio.wait_for(there.wait(), DEADLINE)
                finally:
                    loop.remove_reader(self.sock)


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listening]:
    address = f"@vmbus-test-{os.getpid()}" if request.param == "abstract" else f"{tmp_path}/notify"
    listening = Listening(address)
    yield listening
    listening.sock.close()


async def test_the_manager_is_told_how_the_service_is(listening: Listening) -> None:
    """Each call is one message in systemd's own words."""
    manager = Manager(listening.address)
    manager.ready()
    manager.status("3 VMs run")
    manager.stopping()
    assert [listening.read() for _ in range(3)] == [
        ("READY=1", []),
        ("STATUS=3 VMs run", []),
        ("STOPPING=1", []),
    ]
    manager.close()


async def test_a_status_is_one_line_whatever_is_in_it(listening: Listening) -> None:
    """A line break can't begin another assignment."""
    manager = Manager(listening.address)
    manager.status("web\nREADY=1\nMAINPID=1")
    assert listening.read() == ("STATUS=web READY=1 MAINPID=1", [])
    manager.close()


async def test_a_stored_descriptor_is_the_same_file_and_kept_whatever_becomes_of_it(
    listening: Listening,
) -> None:
    """It travels along, under its name, and systemd isn't to drop it at a hang-up."""
    manager = Manager(listening.address)
    pidfd = os.pidfd_open(os.getpid())
    manager.store("vm-1-pidfd", pidfd)
    manager.forget("vm-1-pidfd")
    text, (fd,) = listening.read()
    assert text.splitlines() == ["FDSTORE=1", "FDNAME=vm-1-pidfd", "FDPOLL=0"]
    assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text()
    assert listening.read() == ("FDSTOREREMOVE=1\nFDNAME=vm-1-pidfd", [])
    os.close(fd)
    os.close(pidfd)
    manager.close()


@pytest.mark.parametrize("name", ["", "a:b", "a\nREADY=1", "ü", "\x7f", "x" * 256])
async def test_a_name_that_systemd_refuses_is_refused_here(name: str) -> None:
    """With no manager as with one, so that it shows wherever it is tried."""
    with pytest.raises(ValueError, match="no name for a descriptor"):
        Manager().store(name, 0)
    with pytest.raises(ValueError, match="no name for a descriptor"):
        Manager().forget(name)


async def test_what_a_busy_manager_has_no_room_for_comes_later_and_in_order(
    listening: Listening,
) -> None:
    """Nothing waits for it, and descriptors may be closed by then."""
    manager = Manager(listening.address)
    count = 2000  # more than any queue takes
    for number in range(count):
        manager.status(str(number))
    reader, writer = os.pipe()
    manager.store("late", writer)
    os.close(writer)
    manager.ready()
    async with asyncio.timeout(DEADLINE):
        texts = [(await listening.until_read())[0] for _ in range(count)]
        assert texts == [f"STATUS={number}" for number in range(count)]
        stored, (fd,) = await listening.until_read()
        assert stored.startswith("FDSTORE=1\nFDNAME=late\n")
        assert await listening.until_read() == ("READY=1", [])
    os.write(fd, b"!")
    assert os.read(reader, 2) == b"!"
    os.close(fd)
    os.close(reader)
    manager.close()


async def test_what_still_waits_can_be_given_up(listening: Listening) -> None:
    """Closing leaves neither descriptors nor a watch of the socket behind."""
    manager = Manager(listening.address)
    for _ in range(2000):
        manager.store("stdin", 0)
    manager.close()
    received = 0
    while True:
        try:
            (fd,) = listening.read()[1]
        except BlockingIOError:
            break
        os.close(fd)
        received += 1
    assert 0 < received < 2000


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative", "/nowhere/notify", "@nobody"])
async def test_without_a_manager_nothing_happens(address: str) -> None:
    """Neither an error nor a descriptor that stays open."""
    manager = Manager(address)
    manager.ready()
    manager.status("fine")
    manager.store("stdin", 0)
    manager.forget("stdin")
    manager.stopping()
    manager.close()


async def test_a_manager_that_began_anew_is_told_as_before(tmp_path: Path) -> None:
    """Its socket has the same name and is another."""
    old = Listening(f"{tmp_path}/notify")
    manager = Manager(old.address)
    manager.ready()
    old.sock.close()
    manager.status("alone")
    Path(old.address).unlink()
    new = Listening(old.address)
    manager.status("again")
    assert new.read() == ("STATUS=again", [])
    new.sock.close()
    manager.close()


async def test_no_child_can_speak_in_our_name(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is taken out of the environment."""
    monkeypatch.setenv("NOTIFY_SOCKET", listening.address)
    manager = Manager.from_environment()
    assert "NOTIFY_SOCKET" not in os.environ
    manager.ready()
    assert listening.read() == ("READY=1", [])
    manager.close()


_INHERITING = """
import os
from vmbus.systemd.notify import inherited
print(inherited(), inherited())
print([os.get_inheritable(fd) for fd in (3, 4, 5)])
print([name for name in os.environ if name.startswith("LISTEN_")])
"""


def _started(environment: str) -> list[str]:
    """What a process says that has descriptors 3, 4 and 5 and this in its environment."""
    script = f"{environment} exec {sys.executable} -c '{_INHERITING}' 3<&0 4<&0 5<&0"
    done = subprocess.run(
        ["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_descriptors_come_by_name_and_go_no_further() -> None:
    """Several of one name come together; no child gets them, nor the variables."""
    given = "LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=vm-1:vm-2:vm-1"
    assert _started(given) == [
        "{'vm-1': [3, 5], 'vm-2': [4]} {}",
        "[False, False, False]",
        "[]",
    ]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", "{}"),
        ("LISTEN_PID=1 LISTEN_FDS=3 LISTEN_FDNAMES=a:b:c", "{}"),
        ("LISTEN_PID=$$ LISTEN_FDS=many", "{}"),
        ("LISTEN_PID=$$ LISTEN_FDS=-1", "{}"),
        ("LISTEN_PID=$$ LISTEN_FDS=2", "{'unknown': [3, 4]}"),
        ("LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a", "{'a': [3], 'unknown': [4]}"),
        (
            "LISTEN_PID=$$ LISTEN_FDS=99999999999 LISTEN_FDNAMES=a:b:c",
            "{'a': [3], 'b': [4], 'c': [5]}",
        ),
    ],
)
def test_what_is_not_for_us_or_makes_no_sense_is_left(given: str, found: str) -> None:
    """Another process' descriptors aren't touched; the variables go all the same."""
    first, _, variables = _started(given)
    assert (first, variables) == (f"{found} {{}}", "[]")


def test_a_process_that_was_handed_nothing_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it is run from a shell."""
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert inherited() == {}
