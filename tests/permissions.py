"""Who may do what, tried: a system bus with polkit and a service, and a VM's whole life on it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.polkit import Answer, Caller, Polkit, agent, caller, polkit
from tests.rig import (
    CROSVM,
    MANAGER,
    MANAGER_PATH,
    STANDARD_ERROR,
    Client,
    Rig,
    Service,
    guest,
    listening,
    refused,
)
from tests.rig import (
    ROOT as PROJECT,
)
from vmbus.bus.authority import Access, Request
from vmbus.bus.connection import RemoteError

MIB = 1 << 20
ROOT, OWNER, OTHER = 0, 5, 6
CREATE, OWN, MANAGE = "org.vmbus1.create", "org.vmbus1.manage-own", "org.vmbus1.manage"
DONE = "done"
DENIED = STANDARD_ERROR + "AccessDenied"
INTERACTIVE = STANDARD_ERROR + "InteractiveAuthorizationRequired"
#: VMs with such names may be made by anybody, so that there is something to try things on.
GIVEN = """
polkit.addRule(function(action, subject) {
    if (action.lookup("verb") == "create" && action.lookup("vm").indexOf("given-") == 0)
        return polkit.Result.YES;
});
"""
numbers = itertools.count(1)
_BUS_WITH_LABELS = PROJECT / "tests" / "fakes" / "bus_with_labels.py"


# What is added to the stand-in for crosvm: a log of what it is asked for, before it obeys.
_NOTED = """
def noted(treat):
    def note(self, connection, name, value):
        with open({log!r}, "a") as file:
            file.write(f"{{os.getpid()}} {{name}}\\n")
        treat(self, connection, name, value)
    return note
Vm.treat = noted(Vm.treat)


if __name__ == "__main__":
"""


@dataclass(frozen=True)
class Who:
    """A user, and the label that the bus says a caller has; None: it says nothing of labels."""

    uid: int
    label: bytes | None = None


class Labels:
    """The bus, with labels for those to whom one is given here before their first call."""

    def __init__(self, rig: Rig, user: str) -> None:
        path = rig.directory / "bus-with-labels"
        self.address = f"unix:path={path}"
        self._known: dict[str, str] = {}
        self._table = rig.directory / "labels.json"
        self._write()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            argv = [sys.executable, str(_BUS_WITH_LABELS), str(listener.fileno())]
            self._process = subprocess.Popen(
                [*argv, str(rig.directory / "bus"), str(self._table)],
                user=user,
                group=user,
                extra_groups=[],
                cwd=rig.directory,
                pass_fds=[listener.fileno()],
            )

    @classmethod
    @contextlib.contextmanager
    def of(cls, rig: Rig, user: str) -> Iterator[Labels]:
        """For a program of this user's."""
        labels = cls(rig, user)
        try:
            yield labels
        finally:
            labels._process.kill()
            labels._process.wait()

    def put(self, who: Client, label: bytes) -> None:
        self._known[who.connection.unique_name] = label.hex()
        self._write()

    def _write(self) -> None:
        new = self._table.with_suffix(".new")
        new.write_text(json.dumps(self._known))
        new.chmod(0o644)
        new.rename(self._table)


class Place:
    """A system bus and a service on it, of the user vmbus, and what VMs are made of."""

    def __init__(self, rig: Rig, environment: Mapping[str, str] | None = None) -> None:
        self.rig = rig
        self.images = rig.directory / "images"
        self.images.mkdir()
        self._log = rig.directory / "requests"
        self._log.touch()
        self._log.chmod(0o666)
        crosvm = rig.directory / "crosvm"
        program, main = CROSVM.read_text().split('if __name__ == "__main__":\n')
        crosvm.write_text(program + _NOTED.format(log=str(self._log)) + main)
        crosvm.chmod(0o755)
        settings = {"crosvm": str(crosvm), "kvm": "on", "image_directories": [str(self.images)]}
        self.service = Service(rig, settings, environment, user="vmbus")
        self.kernel = guest(self.images)

    def config(self, name: str) -> dict[str, Any]:
        disk = self.images / f"{name}.img"
        disk.write_bytes(bytes(4096))
        disk.chmod(0o666)
        disks = [{"image": str(disk), "writable": True}]
        return {"name": name, "kernel": str(self.kernel), "disks": disks}

    async def given(self, owner: Client) -> str:
        """A VM of this caller's."""
        return await owner.create(**self.config(f"given-{next(numbers)}"))

    def requests(self, pid: int) -> list[str]:
        """What this VMM was asked for on its control socket, so far."""
        lines = (line.split() for line in self._log.read_text().splitlines())
        return [request for of, request in lines if of == str(pid)]


class Ruled(Place):
    """One whose polkit is the real one; its bus may know labels."""

    def __init__(self, rig: Rig, polkitd: Polkit, labels: Labels | None = None) -> None:
        self.polkitd = polkitd
        self.labels = labels
        bus = {} if labels is None else {"DBUS_SYSTEM_BUS_ADDRESS": labels.address}
        super().__init__(rig, bus)

    @contextlib.asynccontextmanager
    async def caller(self, who: Who, *, interactive: bool = False) -> AsyncIterator[Caller]:
        async with caller(self.rig, who.uid, interactive=interactive) as found:
            if who.label is not None:
                assert self.labels is not None, "nobody says labels here"
                self.labels.put(found, who.label)
            yield found


@contextlib.contextmanager
def place(*, labels: bool = False) -> Iterator[Ruled]:
    rig = Rig(system=True)
    with contextlib.ExitStack() as stack:
        stack.callback(rig.close)
        polkitd = stack.enter_context(polkit(rig, GIVEN))
        vouching = stack.enter_context(Labels.of(rig, "vmbus")) if labels else None
        yield Ruled(rig, polkitd, vouching)


@contextlib.asynccontextmanager
async def observer(place: Place) -> AsyncIterator[Client]:
    """Root, who has heard every signal since, and cleans up in the end."""
    async with listening(place.rig) as root:
        yield root
        await clean(root)


async def clean(root: Client) -> None:
    (rows,) = await root.call(MANAGER_PATH, MANAGER, "List")
    for row in rows:
        await root.vm(row[-1], "Kill")
        await root.vm(row[-1], "Remove")


# The matrix


@dataclass(frozen=True)
class World:
    """What decides where nothing is the caller's own, and what is decided then."""

    name: str
    outcome: str
    rule: str = ""
    agent: Answer | None = None
    interactive: bool = False

    @property
    def rules(self) -> str:
        if not self.rule:
            return GIVEN
        return f"""{GIVEN}
            polkit.addRule(function(action, subject) {{
                if (action.id == "{CREATE}" || action.id == "{MANAGE}")
                    return polkit.Result.{self.rule};
            }});
        """


WORLDS = [
    World("a rule allows it", DONE, rule="YES"),
    World("a rule forbids it", DENIED, rule="NO", agent=Answer.GRANT, interactive=True),
    World("granted", DONE, agent=Answer.GRANT, interactive=True),
    World("refused", DENIED, agent=Answer.REFUSE, interactive=True),
    World("dismissed", DENIED, agent=Answer.DISMISS, interactive=True),
    World("nobody to ask", DENIED, interactive=True),
    World("not to be asked", INTERACTIVE, agent=Answer.GRANT),
    World("nobody, and not to be asked", INTERACTIVE),
]


@dataclass(frozen=True)
class Step:
    """A method, the state it is tried in, the one it leads to, and what the VMM is asked for."""

    member: str
    before: str
    after: str
    request: str = ""
    signature: str = ""
    body: tuple[Any, ...] = ()


#: A VM's life, in which every method finds it in a state that allows it.
LIFE = [
    Step("OpenConsole", "not-started", "not-started"),
    Step("OpenLog", "not-started", "not-started"),
    Step("Start", "not-started", "running", "VcpuPidTid"),
    Step("SetMemoryTarget", "running", "running", "BalloonCommand.Adjust", "t", (64 * MIB,)),
    Step("ResizeDisk", "running", "running", "DiskCommand", "ut", (0, 4 * MIB)),
    Step("Suspend", "running", "suspended", "SuspendVcpus"),
    Step("Resume", "suspended", "running", "ResumeVcpus"),
    Step("Stop", "running", "dead", "Powerbtn", "t", (0,)),
    Step("Remove", "dead", ""),
]
DEATH = [
    Step("Start", "not-started", "running", "VcpuPidTid"),
    Step("Kill", "running", "dead"),
]


async def attempt(who: Client, path: str, step: Step) -> str:
    """How a call ends."""
    try:
        found = await who.vm(path, step.member, step.signature, *step.body)
    except RemoteError as error:
        return error.name
    for fd in found:
        os.close(fd)
    return DONE


async def everything(root: Client, path: str) -> list[Any]:
    """All that a denied call must leave as it is; and who hears that has heard all before."""
    values = await root.get_all(path)
    return [values, await root.get(MANAGER_PATH, "VMCount"), len(root.signals)]


async def live(
    here: Place, root: Client, who: Client, path: str, steps: list[Step]
) -> dict[str, str]:
    """Lead a VM's life: what is denied root does. Gives how each call ended."""
    ended = {}
    pid = 0
    requests: list[str] = []
    for step in steps:
        before = await everything(root, path)
        assert before[0]["State"] == step.before
        ended[step.member] = await attempt(who, path, step)
        if ended[step.member] != DONE:
            assert await everything(root, path) == before, f"a denied {step.member} changed it"
            assert await attempt(root, path, step) == DONE
        if step.after:
            assert await root.get(path, "State") == step.after
        else:
            async with refused(STANDARD_ERROR + "UnknownObject"):
                await root.get(path, "State")
        if step.after == "running":
            pid = await root.get(path, "Pid")
        # Once for whoever was allowed to, and never for who was not.
        requests += [step.request] if step.request else []
        found = here.requests(pid)
        assert found == requests, f"{step.member}: the VMM was asked for {found}"
    return ended


async def create(here: Place, root: Client, who: Client) -> str:
    """How a Create ends."""
    before = await root.get(MANAGER_PATH, "VMCount"), len(root.signals)
    try:
        path = await who.create(**here.config(f"new-{next(numbers)}"))
    except RemoteError as error:
        after = await root.get(MANAGER_PATH, "VMCount"), len(root.signals)
        assert after == before, "a denied Create changed something"
        return error.name
    assert await root.get(MANAGER_PATH, "VMCount") == before[0] + 1
    assert isinstance(who, Caller)
    assert await root.get(path, "RequesterUid") == who.uid
    assert await root.get(path, "RequesterPid") == who.process.pid
    return DONE


async def try_everything(
    here: Ruled, root: Client, world: World, who: Who, owner: Who, *, own: bool
) -> None:
    """A cell of the matrix: all methods, on VMs of `owner`, where `world` decides.

    own: whether those count as the caller's own.
    """
    here.polkitd.rules(world.rules)
    async with contextlib.AsyncExitStack() as stack:
        asking = await stack.enter_async_context(here.caller(who, interactive=world.interactive))
        desktop = None
        if world.agent is not None:
            desktop = await stack.enter_async_context(agent(here.rig, asking, world.agent))
        async with here.caller(owner) as creator:
            path, other_path = [await here.given(creator) for _ in range(2)]
        found = {"Create": await create(here, root, asking)}
        found |= await live(here, root, asking, path, LIFE)
        found |= await live(here, root, asking, other_path, DEATH)
    all_of_it = DONE if own or who.uid == ROOT else world.outcome
    expected = {step.member: all_of_it for step in (*LIFE, *DEATH)}
    expected["Create"] = DONE if who.uid == ROOT else world.outcome
    assert found == expected
    if desktop is not None:
        # Start is in both lives. For one who is asked, every call is a dialog of its own.
        asked = (0 if own else len(LIFE) + len(DEATH)) + 1
        asks = world.interactive and not world.rule and who.uid != ROOT
        assert len(desktop.requests) == (asked if asks else 0)


def request_of(who: Client) -> Request:
    """To create a VM, without a dialog: what an authority of a test's own may be asked."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    sender = who.connection.unique_name
    return Request(sender, Access.CREATE, "create", "web", None, interactive=False, gone=gone)
