"""The real polkit on a private system bus: its daemon, its rules, its dialogs, and its subjects."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rig import BUS, DEADLINE, ROOT, Client, Rig, plain
from vmbus.bus.connection import Connection, RemoteError
from vmbus.bus.wire import Flag, Kind, Message, Variant

AUTHORITY = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
MOCK = "org.freedesktop.DBus.Mock"
AGENT_PATH = "/org/vmbus1/test/Agent"

# polkitd's directories are fixed when it is compiled. In a mount namespace of its own they can be
# others. Nothing below forks: polkitd is the very process that was started.
_IN_A_NAMESPACE = """
mount --bind "$1" /usr/share/polkit-1/actions &&
mount -t tmpfs none /usr/share/polkit-1/rules.d &&
mount --bind "$2" /etc/polkit-1/rules.d &&
mount --bind "$3" /usr/share/locale &&
exec /usr/lib/polkit-1/polkitd
"""
#: All that are meant to run now.
running: list[Polkit] = []


class Polkit:
    """A polkitd on a rig's bus, with the project's actions and no rules but those given here."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = rig.directory / "polkitd.log"
        # All of this is to be read by the user polkitd, whatever umask and home we have.
        self.actions, self.rules_directory = rig.directory / "actions", rig.directory / "rules.d"
        for directory in (self.actions, self.rules_directory):
            directory.mkdir()
            directory.chmod(0o755)
        for file in (ROOT / "data" / "polkit-1" / "actions").glob("*.policy"):
            shutil.copyfile(file, self.actions / file.name)
            (self.actions / file.name).chmod(0o644)
        self.locales, self.catalogues = rig.directory / "locales", rig.directory / "catalogues"
        self._translate("de", "de_DE.UTF-8")
        self._generation = 0

    def _translate(self, language: str, locale: str) -> None:
        """Make a locale, which but for its name is C.UTF-8, and the project's texts in it."""
        directory = self.catalogues / language / "LC_MESSAGES"
        catalogue = directory / "vmbus.mo"
        directory.mkdir(parents=True)
        texts = ROOT / "po" / f"{language}.po"
        subprocess.run(["msgfmt", "--check", "-o", catalogue, texts], check=True, timeout=DEADLINE)
        for each in (self.catalogues, directory.parent, directory, catalogue):
            each.chmod(0o755)
        self.locales.mkdir(mode=0o755)
        (self.locales / locale).symlink_to("/usr/lib/locale/C.utf8")

    def start(self) -> None:
        """Start it, and wait until it owns its name."""
        assert self.process is None, "polkitd runs already"
        seen = len(self.log)
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", _IN_A_NAMESPACE, "sh"]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, self.actions, self.rules_directory, self.catalogues],
                env={**self.rig.environment, "LC_ALL": "C.UTF-8", "LOCPATH": str(self.locales)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        running.append(self)
        self._until_logged(f"Acquired the name {AUTHORITY} ", seen)

    def rules(self, text: str) -> None:
        """Replace its rules, and return when polkitd goes by them. No JavaScript beyond ES5!"""
        for old in self.rules_directory.iterdir():
            old.unlink()
        self._generation += 1
        name = f"{self._generation}.rules"
        file = self.rig.directory / name
        file.write_text(f'{text}\npolkit.log("{name} is in force");\n')
        file.chmod(0o644)
        file.rename(self.rules_directory / name)
        if self.process is not None:
            # By inotify, and more than once; no request is looked at in the course of a reload.
            self._until_logged(f"{name} is in force", 0, f"compiling script .*/{name}:")

    @property
    def log(self) -> str:
        """What it said, and what its rules said with polkit.log()."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def _until_logged(self, text: str, seen: int, failure: str = r"\Z.") -> None:
        end = time.monotonic() + DEADLINE
        while text not in (said := self.log[seen:]):
            assert self.process is not None
            ended = self.ended_by_itself()
            assert ended is None, f"{ended}: {said}"
            assert not re.search(failure, said), said
            assert time.monotonic() < end, f"polkitd did not say '{text}': {said}"
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        """SIGSTOP makes it hang, SIGCONT go on."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """It dies, and with it every agent's registration and every dialog."""
        if self.process is not None:
            running.remove(self)
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def ended_by_itself(self, within: float = 0) -> str | None:
        """How, if it has, or does in so many seconds: polkit 122 crashes now and then."""
        if self.process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(within)
            return f"polkitd ended by itself with {status}"
        return None


@contextlib.contextmanager
def polkit(rig: Rig, rules: str | None = None) -> Iterator[Polkit]:
    """A polkitd that runs."""
    polkitd = Polkit(rig)
    if rules is not None:
        polkitd.rules(rules)
    try:
        polkitd.start()
        yield polkitd
    finally:
        polkitd.kill()


class Mock:
    """python-dbusmock's polkitd on a rig's bus: it knows actions only, and hangs as it is told."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        with (rig.directory / "dbusmock.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dbusmock", "--system", "--template", "polkitd"],
                env=rig.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=rig.directory,
                # The only one who may own the name.
                user="polkitd",
                group="polkitd",
                extra_groups=[],
            )
        said = rig.gdbus("wait", "--timeout", f"{DEADLINE:.0f}", AUTHORITY)
        assert not said, said

    @contextlib.asynccontextmanager
    async def control(self) -> AsyncIterator[Control]:
        """Root, who tells it what to do and hears what it is called for."""
        connection = await Connection.open(self.rig.address)
        async with contextlib.aclosing(connection):
            control = Control(connection)
            await control.listen(f"type='signal',interface='{MOCK}'")
            yield control

    def kill(self) -> None:
        """It dies, whatever it was asked."""
        self.process.kill()
        self.process.wait()


class Control(Client):
    """Of a Mock. Its signals are the mock's, one for every call of a method of polkit's."""

    async def tell(self, member: str, signature: str = "", *body: Any) -> None:
        """Call a method of python-dbusmock, or of its template."""
        await self.connection.call(AUTHORITY, AUTHORITY_PATH, MOCK, member, signature, body)

    async def answer(self, signature: str, code: str) -> None:
        """From now on it answers every question like that: `code` sets `ret`, or raises."""
        await self.tell(
            "AddMethod",
            "sssss",
            AUTHORITY_INTERFACE,
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
            signature,
            code,
        )

    async def called(self, member: str, wanted: Callable[[list[Any]], bool]) -> list[Any]:
        """The arguments of the first call of this method, past or to come, that are wanted."""

        def is_it(message: Message) -> bool:
            if message.member != "MethodCalled":
                return False
            name, arguments = plain(message.body)
            return bool(name == member and wanted(arguments))

        return list(plain((await self.until(is_it)).body)[1])


@contextlib.contextmanager
def mock(rig: Rig) -> Iterator[Mock]:
    polkitd = Mock(rig)
    try:
        yield polkitd
    finally:
        polkitd.kill()


# Callers. What the bus knows of one is the process that connected; so that is a process of its
# own, of that user, which then hands its connection over.

_CALLER = """
import os, socket, sys
mine = socket.socket(fileno=int(sys.argv[1]))
bus = socket.socket(socket.AF_UNIX)
bus.connect(sys.argv[2])
def say(line):
    bus.sendall(line + b"\\r\\n")
    return bus.recv(4096)
if not say(b"\\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode()).startswith(b"OK "):
    sys.exit("the bus refused us")
say(b"NEGOTIATE_UNIX_FD")
bus.sendall(b"BEGIN\\r\\n")
socket.send_fds(mine, [b"!"], [bus.fileno()])
bus.close()
mine.recv(1)
"""


def subject_of(pid: int, uid: int) -> list[Any]:
    """A process, as polkit calls it."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    started = int(after_name.split()[19])
    details = {"pid": Variant("u", pid), "start-time": Variant("t", started)}
    return ["unix-process", {**details, "uid": Variant("i", uid)}]


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
        return subject_of(self.process.pid, self.uid)

    async def call(self, *what: Any, interactive: bool | None = None, **options: Any) -> list[Any]:
        """See Client.call. An error reply is a RemoteError, whose `name` is the error's."""
        allowed = self.interactive if interactive is None else interactive
        options["flags"] = Flag.ALLOW_INTERACTIVE_AUTHORIZATION if allowed else 0
        reply = await self.connection.call(BUS, *what, timeout=DEADLINE, **options)
        return list(reply.fds) if reply.fds else [plain(value) for value in reply.body]


@contextlib.asynccontextmanager
async def caller(rig: Rig, uid: int, *, interactive: bool = False) -> AsyncIterator[Caller]:
    """A client of the user `uid`, who must be in passwd."""
    user = pwd.getpwuid(uid)
    ours, theirs = socket.socketpair()
    argv = ["/usr/bin/python3", "-I", "-S", "-c", _CALLER, str(theirs.fileno())]
    with ours, theirs:
        process = subprocess.Popen(
            [*argv, rig.directory / "bus"],
            user=uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            cwd="/",
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            async with contextlib.aclosing(await _handed_over(ours)) as connection:
                yield Caller(connection, process, uid, interactive)
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
    """What becomes of a dialog: how its agent ends."""

    GRANT = "Granted"
    REFUSE = "Refused"
    FAIL = "Failed"
    DISMISS = "Cancelled"


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

    def __init__(
        self, connection: Connection, subject: list[Any], answer: Answer | None, locale: str
    ) -> None:
        self.connection = connection
        self.subject = subject
        self.locale = locale
        #: None: the dialog stays open until `close_all`, or until polkit cancels it.
        self.answer = answer
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self._open: dict[str, asyncio.Future[Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        connection.handler = self._handle

    async def register(self) -> None:
        """Anew, too, after polkitd was started anew."""
        body = [self.subject, self.locale, AGENT_PATH]
        await self._authority("RegisterAuthenticationAgent", "(sa{sv})ss", body)

    async def asked(self, count: int = 1) -> Request:
        """The dialog with this number, from 1, once it is shown."""
        await self._until(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    async def gave_up(self, request: Request) -> None:
        """Wait until polkit has withdrawn this dialog."""
        await self._until(lambda: request.cookie in self.cancelled)

    def close_all(self, answer: Answer) -> None:
        """End every open dialog like that."""
        while self._open:
            self._open.popitem()[1].set_result(answer)

    async def _until(self, holds: Callable[[], bool]) -> None:
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
            if dialog := self._open.pop(cookie, None):
                dialog.set_result(Answer.DISMISS)
            self._reply(message)
        self._news.set()

    async def _authenticate(self, message: Message) -> None:
        request = Request(*plain(message.body))
        dialog = self._open[request.cookie] = asyncio.get_running_loop().create_future()
        self.requests.append(request)
        self._news.set()
        if self.answer is not None:
            self._open.pop(request.cookie).set_result(self.answer)
        answer = await dialog
        if answer is Answer.GRANT:
            body = [os.getuid(), request.cookie, message.body[5][0]]
            with contextlib.suppress(RemoteError):  # it shows in what polkit decides
                await self._authority("AuthenticationAgentResponse2", "us(sa{sv})", body)
        failed = answer in (Answer.FAIL, Answer.DISMISS)
        self._reply(message, answer.value if failed else None)

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
    rig: Rig, asker: Caller, answer: Answer | None = None, locale: str = "C"
) -> AsyncIterator[Agent]:
    """An agent, run by root, for what `asker` wants. With no answer its dialogs stay open."""
    found = Agent(await Connection.open(rig.address), asker.subject, answer, locale)
    async with contextlib.aclosing(found):
        await found.register()
        yield found
