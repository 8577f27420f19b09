"""Passwords: polkit's text agent is there while vmbusctl asks for what needs one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest

from tests.ctl import NOBODY, OF_NOBODY, VMBUSCTL, Running, on_path, vmbusctl
from tests.polkit import Agent, Answer, polkit, subject_of
from tests.rig import DEADLINE, Rig, Service, guest
from vmbus.bus.connection import Connection

#: Notes its arguments, says that it is registered when it is let to, and goes on until SIGTERM.
PKTTYAGENT = """#!/usr/bin/python3 -IS
import os, signal, sys
told = os.open(sys.argv[0] + ".told", os.O_WRONLY)
os.write(told, f"{os.getpid()} {' '.join(sys.argv[1:])}\\n".encode())
os.read(os.open(sys.argv[0] + ".let", os.O_RDONLY), 1)
(notify,) = (int(each[12:]) for each in sys.argv if each.startswith("--notify-fd="))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.close(notify)
signal.sigwait([signal.SIGTERM])
os.write(told, b"ended")
"""


class StandIn:
    """What a stand-in for pkttyagent tells, and when it is let to say that it is registered."""

    def __init__(self, directory: Path) -> None:
        self.path = on_path(directory, pkttyagent=PKTTYAGENT)
        program = directory / "pkttyagent"
        self._fds = []
        for end in ("told", "let"):
            fifo = f"{program}.{end}"
            os.mkfifo(fifo)
            os.chmod(fifo, 0o666)
            self._fds.append(os.open(fifo, os.O_RDWR))

    def told(self, wanted: bytes) -> str:
        """Wait for what it tells; gives all of it that is new."""
        heard = b""
        while wanted not in heard:
            assert select.select([self._fds[0]], [], [], DEADLINE)[0], heard
            heard += os.read(self._fds[0], 4096)
        return heard.decode()

    def let(self) -> None:
        os.write(self._fds[1], b"!")

    def was_run(self) -> bool:
        """Whether it has told anything that was not heard."""
        return bool(select.select([self._fds[0]], [], [], 0)[0])

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture(scope="module")
def guarded(system_rig: Rig) -> Iterator[Service]:
    """A service on a system bus where nobody may create a VM without a password."""
    with polkit(system_rig):
        yield Service(system_rig, user="vmbus")


@pytest.fixture
def standin(guarded: Service, tmp_path: Path) -> Iterator[StandIn]:
    directory = guarded.rig.directory / tmp_path.name
    directory.mkdir(mode=0o755)
    with contextlib.closing(StandIn(directory)) as standin:
        yield standin


def create(rig: Rig) -> list[str]:
    """A command that needs a password; its kernel can be read by all."""
    kernel = guest(rig.directory)
    kernel.chmod(0o644)
    return ["create", "--kernel", str(kernel)]


@pytest.fixture
def creating(guarded: Service, standin: StandIn, terminal: tuple[int, int]) -> Iterator[Running]:
    """A vmbusctl of nobody's at a terminal, which is to create a VM."""
    with at_terminal(guarded.rig, terminal[1], standin.path) as creating:
        yield creating


def at_terminal(rig: Rig, terminal: int, environment: Mapping[str, str]) -> Running:
    return Running(rig, *create(rig), program=OF_NOBODY, terminal=terminal, environment=environment)


@contextlib.asynccontextmanager
async def dialogs(rig: Rig, asker: Running, answer: Answer | None) -> AsyncIterator[Agent]:
    """Who does what the stand-in only seems to do."""
    subject = subject_of(asker.process.pid, NOBODY)
    agent = Agent(await Connection.open(rig.address), subject, answer, "C")
    async with contextlib.aclosing(agent):
        await agent.register()
        yield agent


async def test_agent_is_there_before_the_call_and_gone_after_it(
    guarded: Service, standin: StandIn, creating: Running, terminal: tuple[int, int]
) -> None:
    """It is for this process, next to a desktop's; what it grants is done."""
    number, *arguments = standin.told(b"\n").split()
    assert arguments[0].startswith("--notify-fd=")
    assert arguments[1:] == ["--fallback", "--process", str(creating.process.pid)]
    assert os.readlink(f"/proc/{number}/fd/0") == "/dev/null"
    async with dialogs(guarded.rig, creating, Answer.GRANT) as granting:
        # It is not registered, and so nothing was asked yet.
        assert creating.goes_on()
        assert granting.requests == []
        standin.let()
        asked = await granting.asked()
        assert await asyncio.to_thread(creating.status) == 0
    assert asked.action == "org.vmbus1.create"
    assert standin.told(b"ended") == "ended"
    assert not Path(f"/proc/{number}").exists()
    assert creating.until(terminal[0], b"\n").startswith(b"vm-")


async def test_agent_ends_with_a_command_that_fails(standin: StandIn, creating: Running) -> None:
    """Whose error names the action."""
    standin.told(b"\n")
    standin.let()
    assert creating.status() == 1
    (line,) = creating.rest(creating.stderr).splitlines()
    assert "org.vmbus1.create" in line
    standin.told(b"ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_agent_ends_with_a_command_that_is_ended(
    guarded: Service, standin: StandIn, creating: Running, number: signal.Signals
) -> None:
    """While it is asking, and whether or not the command could do anything about it."""
    standin.told(b"\n")
    async with dialogs(guarded.rig, creating, None) as asking:
        standin.let()
        request = await asking.asked()
        creating.process.send_signal(number)
        standin.told(b"ended")
        await asking.gave_up(request)
    assert creating.status() in (128 + number, -number)


@pytest.mark.parametrize("programs", [{"pkttyagent": "#!/bin/sh\nexit 1\n"}, {}])
def test_command_goes_on_without_an_agent(
    guarded: Service, terminal: tuple[int, int], tmp_path: Path, programs: dict[str, str]
) -> None:
    """One that can't register says so itself; one that isn't installed is no matter."""
    directory = guarded.rig.directory / tmp_path.name
    directory.mkdir(mode=0o755)
    path = on_path(directory, **programs) if programs else {"PATH": str(directory)}
    with at_terminal(guarded.rig, terminal[1], path) as creating:
        assert creating.status() == 1
        (line,) = creating.rest(creating.stderr).splitlines()
        assert "org.vmbus1.create" in line


@pytest.mark.parametrize(
    ("program", "arguments", "sits"),
    [
        (OF_NOBODY, ["--no-ask-password", "create"], True),
        (OF_NOBODY, ["create", "--no-ask-password"], True),
        (OF_NOBODY, ["create"], False),
        (VMBUSCTL, ["create"], True),
        (OF_NOBODY, ["list"], True),
        (OF_NOBODY, ["status"], True),
        (OF_NOBODY, ["wait", "nobody"], True),
    ],
)
def test_nobody_is_asked(
    guarded: Service,
    standin: StandIn,
    terminal: tuple[int, int],
    program: tuple[str, ...],
    arguments: list[str],
    sits: bool,
) -> None:
    """Who doesn't want it, doesn't sit at a terminal, may do everything, or only looks."""
    standin.let()
    creates = "create" in arguments
    if creates:
        arguments = [*arguments, *create(guarded.rig)[1:]]
    ends = {"stdin": terminal[1]} if sits else {}
    allowed = program is VMBUSCTL or arguments[0] in ("list", "status")
    done = vmbusctl(
        guarded.rig,
        *arguments,
        code=0 if allowed else 1,
        environment=standin.path,
        program=program,
        **ends,
    )
    assert not standin.was_run()
    if creates and not allowed:
        assert "org.vmbus1.create needs authentication" in done.stderr
