"""The real polkit on a private system bus: its daemon, its rules, its dialogs, and its subjects."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig import BUS, DEADLINE, ROOT, Client, Rig, plain
from vmbus.bus.connection import Connection
from vmbus.bus.wire import Flag, Kind, Message, Variant

POLKITD = "/usr/lib/polkit-1/polkitd"
AUTHORITY = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
AGENT_PATH = "/org/vmbus1/test/Agent"

# polkitd's directories are fixed when it is compiled. In a mount namespace of its own they can be
# others. Nothing below forks: polkitd is the very process that was started.
_IN_A_NAMESPACE = """
mount --bind "$1" /usr/share/polkit-1/actions &&
mount --bind "$2" /usr/share/polkit-1/rules.d &&
mount --bind "$2" /etc/polkit-1/rules.d &&
mount --bind "$3" /etc/polkit-1/rules.d &&
exec "$4"
"""


class Polkit:
    """A polkitd on a rig's bus, with the project's actions and no rules but those given here."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = rig.directory / "polkitd.log"
        # All of this is to be read by the user polkitd, whatever umask and home we have.
        self.actions, self.rules_directory, self._empty = (
            rig.directory / name for name in ("actions", "rules.d", "none.d")
        )
        for directory in (self.actions, self.rules_directory, self._empty):
            directory.mkdir()
            directory.chmod(0o755)
        for file in (ROOT / "data" / "polkit-1" / "actions").glob("*.policy"):
            shutil.copyfile(file, self.actions / file.name)
            (self.actions / file.name).chmod(0o644)
        self._generation = 0

    def start(self) -> None:
        """Start it, and wait until it owns its name."""
        assert self.process is None, "polkitd runs already"
        seen = len(self.log)
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _IN_A_NAMESPACE, "sh"]
        command += map(str, (self.actions, self._empty, self.rules_directory, POLKITD))
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**self.rig.environment, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._until_logged(f"Acquired the name {AUTHORITY} ", seen)

    def rules(self, text: str, name: str = "50-test.rules") -> None:
        """Put a rules file in place, and return when polkitd goes by it. No later than ES5!"""
        self._generation += 1
        taken = f"{name} {self._generation} is in force"
        file = self.rig.directory / name
        file.write_text(f'{text}\npolkit.log("{taken}");\n')
        file.chmod(0o644)
        seen = len(self.log)
        file.rename(self.rules_directory / name)
        if self.process is not None:
            # Said in the course of a reload, during which no request is looked at.
            self._until_logged(taken, seen)

    @property
    def log(self) -> str:
        """What it said, and what its rules said with polkit.log()."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def _until_logged(self, text: str, seen: int) -> None:
        end = time.monotonic() + DEADLINE
        while text not in self.log[seen:]:
            assert self.process is not None
            assert self.process.poll() is None, f"polkitd ended: {self.log}"
            assert time.monotonic() < end, f"polkitd did not say '{text}': {self.log[seen:]}"
            time.sleep(0.001)

    def stop(self) -> None:
        """It hangs until `resume`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """It dies, and with it every agent's registration and every dialog."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()


@contextlib.contextmanager
def polkit(rig: Rig, rules: str | None = None) -> Iterator[Polkit]:
    """A polkitd that runs."""
    running = Polkit(rig)
    if rules is not None:
        running.rules(rules)
    try:
        running.start()
        yield running
    finally:
        running.kill()


# Callers. What the bus knows of one is the process that connected; so that is a process of its
# own, of that user, which then hands its connection over.

_CALLER = """
import array, os, socket, sys
mine = socket.socket(fileno=int(sys.argv[1]))
bus = socket.socket(socket.AF_UNIX)
bus.connect(sys.argv[2])
bus.sendall(b"\\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\\r\\n")
def line():
    text = b""
    while not text.endswith(b"\\r\\n"):
        byte = bus.recv(1)
        if not byte:
            sys.exit("the bus hung up")
        text += byte
    return text
if not line().startswith(b"OK "):
    sys.exit("the bus refused us")
bus.sendall(b"NEGOTIATE_UNIX_FD\\r\\n")
line()
bus.sendall(b"BEGIN\\r\\n")
socket.send_fds(mine, [b"!"], [bus.fileno()])
bus.close()
mine.recv(1)
"""


class Caller(Client):
    """A client that the bus takes for a process of its own, of any user."""

    def __init__(
        self, connection: Connection, process: subprocess.Popen[bytes], uid: int, interactive: bool
    ) -> None:
        super().__init__(connection)
        self.process = process
        self.uid = uid
        #: Whether its calls allow a dialog, where they don't say themselves.
        self.interactive = interactive

    @property
    def subject(self) -> list[Any]:
        """Its process, as polkit calls it."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        started = int(after_name.split()[19])
        details = {"pid": Variant("u", self.process.pid), "start-time": Variant("t", started)}
        return ["unix-process", {**details, "uid": Variant("i", self.uid)}]

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        interactive: bool | None = None,
        timeout: float = DEADLINE,
    ) -> list[Any]:
        """See Client.call. An error reply is a RemoteError, whose `name` is the error's."""
        allowed = self.interactive if interactive is None else interactive
        flags = Flag.ALLOW_INTERACTIVE_AUTHORIZATION if allowed else 0
        reply = await self.connection.call(
            BUS, path, interface, member, signature, body, fds=fds, flags=flags, timeout=timeout
        )
        return list(reply.fds) if reply.fds else [plain(value) for value in reply.body]


@contextlib.asynccontextmanager
async def caller(rig: Rig, uid: int, *, interactive: bool = False) -> AsyncIterator[Caller]:
    """A client of the user `uid`, who must be in passwd."""
    user = pwd.getpwuid(uid)
    ours, theirs = socket.socketpair()
    path = rig.address.partition("unix:path=")[2].partition(",")[0]
    argv = ["/usr/bin/python3", "-I", "-S", "-c", _CALLER, str(theirs.fileno()), path]
    with ours, theirs:
        process = subprocess.Popen(
            argv,
            user=uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            cwd="/",
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            connection = await _handed_over(ours)
            try:
                yield Caller(connection, process, uid, interactive)
            finally:
                await connection.aclose()
        finally:
            process.kill()
            process.wait()


async def _handed_over(channel: socket.socket) -> Connection:
    channel.settimeout(DEADLINE)
    _, fds, _, _ = await asyncio.to_thread(socket.recv_fds, channel, 1, 1)
    assert fds, "a caller was refused by the bus, or could not be started"
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(False)
    connection = Connection(sock, "")
    (connection.unique_name,) = await connection.call_bus("Hello", "", [])
    return connection


# Dialogs


class Answer(enum.Enum):
    """What becomes of a dialog."""

    GRANT = "the right password is given"
    REFUSE = "it is closed, and no password was right"
    FAIL = "the agent fails"
    DISMISS = "the user closes it"


@dataclass(frozen=True)
class Request:
    """A dialog: what the user is shown."""

    action: str
    message: str
    icon: str
    details: dict[str, str]
    cookie: str
    identities: list[Any]


class Agent:
    """An authentication agent, as a desktop has one. `answer` is for every dialog to come."""

    def __init__(self, connection: Connection, subject: list[Any]) -> None:
        self.connection = connection
        self.subject = subject
        #: None: the dialog stays open until `close_all`, or until polkit cancels it.
        self.answer: Answer | None = Answer.GRANT
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self._open: dict[str, asyncio.Future[Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        connection.handler = self._handle

    async def register(self) -> None:
        """Anew, too, after polkitd was started anew."""
        await self._authority(
            "RegisterAuthenticationAgent", "(sa{sv})ss", [self.subject, "C", AGENT_PATH]
        )

    async def unregister(self) -> None:
        await self._authority(
            "UnregisterAuthenticationAgent", "(sa{sv})s", [self.subject, AGENT_PATH]
        )

    async def asked(self, count: int = 1) -> Request:
        """The dialog with this number, from 1, once it is shown."""
        await self._until(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    async def gave_up(self, request: Request) -> None:
        """Wait until polkit has withdrawn this dialog."""
        await self._until(lambda: request.cookie in self.cancelled)

    def close_all(self, answer: Answer) -> None:
        """End every open dialog like that."""
        for dialog in self._open.values():
            if not dialog.done():
                dialog.set_result(answer)

    async def _until(self, holds: Any) -> None:
        async with asyncio.timeout(DEADLINE):
            while not holds():
                self._news.clear()
                await self._news.wait()

    def _handle(self, message: Message) -> None:
        if message.kind is not Kind.CALL:
            return
        if message.member == "BeginAuthentication":
            task = asyncio.create_task(self._authenticate(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif message.member == "CancelAuthentication":
            (cookie,) = message.body
            self.cancelled.append(cookie)
            if cookie in self._open and not self._open[cookie].done():
                self._open[cookie].set_result(Answer.DISMISS)
            self._reply(message)
        self._news.set()

    async def _authenticate(self, message: Message) -> None:
        request = Request(*message.body)
        self.requests.append(request)
        dialog: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open[request.cookie] = dialog
        self._news.set()
        answer = self.answer or await dialog
        del self._open[request.cookie]
        if answer is Answer.GRANT:
            body = [os.getuid(), request.cookie, request.identities[0]]
            await self._authority("AuthenticationAgentResponse2", "us(sa{sv})", body)
        errors = {Answer.DISMISS: "Cancelled", Answer.FAIL: "Failed"}
        self._reply(message, errors.get(answer))

    def _reply(self, message: Message, error: str | None = None) -> None:
        answer = Message(kind=Kind.RETURN, destination=message.sender, reply_serial=message.serial)
        if error is not None:
            answer.kind = Kind.ERROR
            answer.error_name = f"{AUTHORITY}.Error.{error}"
            answer.signature, answer.body = "s", [error]
        self.connection.send(answer)

    async def _authority(self, member: str, signature: str, body: Sequence[Any]) -> Message:
        return await self.connection.call(
            AUTHORITY, AUTHORITY_PATH, AUTHORITY_INTERFACE, member, signature, body
        )

    async def aclose(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.connection.aclose()


@contextlib.asynccontextmanager
async def agent(
    caller: Caller, rig: Rig, answer: Answer | None = Answer.GRANT
) -> AsyncIterator[Agent]:
    """An agent, run by root, for what `caller` asks for."""
    found = Agent(await Connection.open(rig.address), caller.subject)
    found.answer = answer
    try:
        await found.register()
        yield found
    finally:
        await found.aclose()
