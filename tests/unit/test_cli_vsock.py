"""What vmbusctl vsock copies between its streams and a guest's."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.rig import DEADLINE

_JOIN = """
import asyncio, socket, sys
from vmbus.cli.vsock import join
with socket.socket(fileno=int(sys.argv[1])) as stream:
    asyncio.run(join(stream))
"""


class Joined:
    """A process that has joined its streams to a guest's, and the guest's end."""

    def __init__(self, guest: socket.socket, ours: socket.socket) -> None:
        guest.settimeout(DEADLINE)
        self.guest = guest
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _JOIN, str(ours.fileno())],
            pass_fds=[ours.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def end(self) -> tuple[int, bytes, bytes]:
        """Its exit status, and all that it printed."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, stdout, stderr


@contextlib.contextmanager
def joined(guest: socket.socket, ours: socket.socket) -> Iterator[Joined]:
    with guest, ours:
        found = Joined(guest, ours)
        ours.close()
        try:
            yield found
        finally:
            found.process.kill()
            found.process.communicate()


@pytest.fixture
def a_join() -> Iterator[Joined]:
    with joined(*socket.socketpair()) as found:
        yield found


def test_both_ways_until_the_guest_closes(a_join: Joined) -> None:
    """The end of stdin is the end of what the guest hears, not of what it says."""
    assert a_join.process.stdin is not None
    a_join.process.stdin.write(b"question" * 5_000)
    a_join.process.stdin.close()
    a_join.process.stdin = None
    heard = b""
    while data := a_join.guest.recv(65536):
        heard += data
    assert heard == b"question" * 5_000
    a_join.guest.sendall(b"answer")
    a_join.guest.close()
    assert a_join.end() == (0, b"answer", b"")


def test_guest_that_closes_ends_it_whatever_stdin_does(a_join: Joined) -> None:
    a_join.guest.sendall(b"goodbye")
    a_join.guest.close()
    assert a_join.process.stdout is not None
    assert a_join.process.stdout.read() == b"goodbye"
    assert a_join.process.wait(DEADLINE) == 0


def test_guest_that_resets_the_stream_ends_it_quietly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        guest, _ = server.accept()
    guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with joined(guest, ours) as found:
        guest.close()
        assert found.end() == (0, b"", b"")
