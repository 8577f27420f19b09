"""Random walks of several users over every method, against a model of what they may expect."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import stat
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    rule,
    run_state_machine_as_test,
)

from tests import contract, model
from tests.contract import INTROSPECTABLE, PEER
from tests.model import GUESTS, USERS, VM, Call, Config, Guest, World
from tests.polkit import Caller, Polkit, caller, polkit
from tests.rig import (
    BUS,
    CROSVM,
    DEADLINE,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    PROPERTIES,
    STANDARD_ERROR,
    Client,
    Rig,
    Service,
    guest,
    plain,
    refused,
    variant,
)
from tests.rig import VM as INTERFACE
from vmbus.bus.connection import Connection, RemoteError
from vmbus.bus.wire import Message, Variant

_T = TypeVar("_T")
#: A method of Steps, and its arguments.
Step = tuple[str, dict[str, Any]]
#: So many walks, each another one every time; without it a few, always the same.
WALKS = int(os.environ.get("VMBUS_WALKS", "0"))
NEVER = "/org/vmbus1/vm/4294967295"
RULES = f"""
polkit.addRule(function(action, subject) {{
    if (action.id == "org.vmbus1.create" && (subject.user == "games" || subject.user == "man"))
        return polkit.Result.YES;
    if (action.id == "org.vmbus1.manage" && subject.user == "man"
            && action.lookup("requester_uid") == "{model.ALICE}")
        return polkit.Result.YES;
}});
"""
METHODS = {member: takes for name, member, takes in contract.METHODS if name == INTERFACE}
PROPERTIES_OF_VM = {
    each.attrib["name"] for each in contract.documented()[INTERFACE].iterfind("property")
}
#: What nobody's config can be.
BAD_CONFIGS: list[dict[str, Any]] = [
    {"memory_mib": 1},
    {"memory_mib": "much"},
    {"name": "-a"},
    {"colour": "red"},
    {"bios": "/nowhere"},
    {"disks": [{"image": "/etc/passwd"}]},
    {"collect": "never"},
    {"gdb_port": 80},
]


class Listener(Client):
    """It hears every signal."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.news = asyncio.Event()

    def _handle(self, message: Message) -> None:
        super()._handle(message)
        self.news.set()

    async def until_pid(self, path: str) -> None:
        """Wait until a VM is said to have a process."""

        def says_so(message: Message) -> bool:
            changed = [each for each in plain(message.body) if isinstance(each, dict)]
            return message.path == path and any(each.get("Pid") for each in changed)

        await self.until(says_so)


class Place:
    """A system bus with polkit and a service, users on it, and one who listens."""

    def __init__(self, rig: Rig, polkitd: Polkit, runner: asyncio.Runner) -> None:
        self.rig = rig
        self.polkitd = polkitd
        self.runner = runner
        self.images = rig.directory / "images"
        self.images.mkdir()
        limits = {
            "vms": {"per_user": model.VMS_OF_A_USER, "in_all": model.VMS_IN_ALL},
            "memory": {
                "per_user": model.RUNNING_OF_A_USER * model.MEMORY_MIB,
                "in_all": model.RUNNING_IN_ALL * model.MEMORY_MIB,
            },
        }
        self.service = Service(
            rig,
            {
                "crosvm": str(CROSVM),
                "kvm": "on",
                "image_directories": [str(self.images)],
                "limits": limits,
            },
            user="vmbus",
        )
        self.kernels = {each.name: self._kernel(each) for each in GUESTS}
        self.numbers = itertools.count(1)
        #: Seconds that the service has to come to what is expected.
        self.patience = DEADLINE
        self.run(self._open())

    def _kernel(self, each: Guest) -> str:
        path = guest(self.images, **(each.directives or {}))
        if each.directives is None:
            path.write_bytes(b"nothing that boots")
        return str(path)

    async def _open(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        connection = await Connection.open(self.rig.address)
        self._stack.push_async_callback(connection.aclose)
        self.listener = Listener(connection)
        await self.listener.listen()
        await self.listener.listen(f"type='signal',member='NameOwnerChanged',arg0='{BUS}'")
        self.seats = [await Seat.taken(self, uid) for uid in (*USERS, *USERS)]
        # The first of everything opens what stays open.
        path = await self.listener.create(kernel=self.kernels["steady"], memory_mib=16)
        await self.listener.vm(path, "Start")
        await self.listener.vm(path, "Kill")
        await self.listener.vm(path, "Remove")
        self.files = self.service.fds()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(work)

    async def aclose(self) -> None:
        for seat in self.seats:
            await seat.leave()
        await self._stack.aclose()


class Seat:
    """A user's connection; another takes its place when it leaves."""

    def __init__(self, place: Place, uid: int) -> None:
        self.place = place
        self.uid = uid
        self.stack = contextlib.AsyncExitStack()
        self.caller: Caller
        self.number = 0

    @classmethod
    async def taken(cls, place: Place, uid: int) -> Seat:
        seat = cls(place, uid)
        await seat.sit()
        return seat

    async def sit(self) -> None:
        self.number = next(self.place.numbers)
        self.caller = await self.stack.enter_async_context(caller(self.place.rig, self.uid))
        await self.introduce()

    async def introduce(self) -> None:
        """From now on the service knows whose its calls are, and takes each as it comes."""
        async with refused(
            model.INVALID_CONFIG if self.uid in model.CREATORS else model.INTERACTIVE
        ):
            await self.caller.create()

    async def leave(self) -> None:
        await self.stack.aclose()

    async def ping(self) -> None:
        """The service has taken every call before this one."""
        await self.caller.call(MANAGER_PATH, PEER, "Ping")


class Seen:
    """What can be seen of the service from outside, at one moment."""

    def __init__(
        self, rows: list[Any], objects: dict[str, Any], count: int, signals: list[Message]
    ) -> None:
        self.rows = {row[-1]: row for row in rows}
        self.objects = objects
        self.count = count
        self.signals = signals

    @classmethod
    async def now(cls, who: Client, listener: Client) -> Seen:
        """What `who` is told, and what the listener has heard."""
        (rows,), (objects,), count = await asyncio.gather(
            who.call(MANAGER_PATH, MANAGER, "List"),
            who.call(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects"),
            who.get(MANAGER_PATH, "VMCount"),
        )
        return cls(rows, objects, count, list(listener.signals))

    def problems(self, world: World, paths: dict[int, str]) -> Iterator[str]:
        """How this differs from what a world looks like."""
        existing = {paths[vm.key] for vm in world.existing}
        if not existing == set(self.rows) == set(self.objects) or self.count != len(existing):
            yield f"there are {set(self.rows)}, {set(self.objects)}, {self.count}: not {existing}"
            return
        cids = {row[3] for row in self.rows.values()}
        if len(cids) != len(existing) or not all(2048 <= cid <= 65535 for cid in cids):
            yield f"CIDs {cids}"
        for vm in world.vms:
            path = paths[vm.key]
            if vm.exists:
                yield from self._of_object(vm, path)
            yield from self._of_signals(vm, path)

    def _of_object(self, vm: VM, path: str) -> Iterator[str]:
        values = self.objects[path][INTERFACE]
        number = int(path.rpartition("/")[2])
        name = vm.name or f"vm-{number}"
        row = [number, name, vm.state, values["CID"], vm.owner, path]
        if self.rows[path] != row:
            yield f"List has {self.rows[path]}, not {row}"
        end = vm.end or model.End("", 0)
        expected = {
            "Id": number,
            "Name": name,
            "State": vm.state,
            "RequesterUid": vm.owner,
            "DeathReason": end.reason,
            "ExitStatus": end.status,
            "MemoryMiB": model.MEMORY_MIB,
            "CPUs": 1,
            "VMM": "crosvm",
            "Protected": False,
        }
        shown = {key: values[key] for key in expected}
        if shown != expected or set(values) != PROPERTIES_OF_VM:
            yield f"{path} is {values}, not {expected}"
        truths = {
            "StartedTimestamp": vm.ran,
            "DiedTimestamp": vm.end is not None,
            "MemoryActual": vm.ran and vm.alive,
            "CreatedTimestamp": True,
            "RequesterPid": True,
        }
        if vm.ran or not vm.alive:
            truths["Pid"] = vm.alive
        if vm.end is None or (vm.ran and end.reason in ("shutdown", "reboot", "stopped")):
            truths["LastWords"] = False
        if wrong := [key for key, truth in truths.items() if bool(values[key]) != truth]:
            yield f"{path}: {wrong} of {values}"

    def _of_signals(self, vm: VM, path: str) -> Iterator[str]:
        mine = [m for m in self.signals if path in (m.path, plain(m.body)[0])]
        told = [_told(message) for message in mine]
        once = {"InterfacesAdded": 1, "InterfacesRemoved": 0 if vm.exists else 1}
        once["Died"] = 1 if vm.end is not None else 0
        for name, count in once.items():
            if told.count(name) != count:
                yield f"{path}: {told.count(name)} times {name}"
                return
        states = [each for each in told if each in (*model.ALIVE, *model.OVER)]
        if states[-1:] != ([] if vm.state == "not-started" else [vm.state]):
            yield f"{path} was told to be {states}, not {vm.state}"
        elif vm.end is not None:
            ends = told.index(vm.state)
            if len([each for each in told if each in model.OVER]) != 1:
                yield f"{path}: more than one end: {told}"
            if told[0] != "InterfacesAdded" or not ends < told.index("Died"):
                yield f"{path}: in the wrong order: {told}"
            died = mine[told.index("Died")].body
            if list(died[1:]) != [vm.end.reason, vm.end.status]:
                yield f"{path} died of {died}, not of {vm.end}"
            changed = plain(mine[ends].body)[1]
            if (changed.get("DeathReason"), changed.get("ExitStatus")) != tuple(died[1:]):
                yield f"{path}: PropertiesChanged has {changed}, Died has {died}"
        if not vm.exists and told[-1:] != ["InterfacesRemoved"]:
            yield f"{path}: a signal after its removal: {told}"


def _told(message: Message) -> str:
    """A state that is announced, or the signal's name."""
    if message.member != "PropertiesChanged":
        return str(message.member)
    return str(plain(message.body)[1].get("State", message.member))


class Walk:
    """One walk: every world that things can be in, and how the service is kept to them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.worlds = {World()}
        self.paths: dict[int, str] = {}
        self.disks: dict[int, str] = {}
        self.calls: dict[int, asyncio.Task[tuple[str, str, list[Any]]]] = {}
        #: Methods with how they ended, and why VMs died.
        self.seen: set[str] = set()
        place.listener.signals.clear()

    @property
    def world(self) -> World:
        """One of those that things can be in; to all eyes they are the same."""
        return min(self.worlds, key=repr)

    # What is done

    async def create(self, *wanted: tuple[Seat, Config, dict[str, Any], bool]) -> None:
        """Creates at once, with what their configs have besides."""
        calls = []
        for seat, config, body, interactive in wanted:
            number = next(self.place.numbers)
            body = {"kernel": self.place.kernels[config.guest.name], **body}
            if config.disk:
                body["disks"] = [{"image": self._disk(number, config.disk), "writable": True}]
            calls.append(self._call(number, seat, "Create", interactive, config=config))
            config_arg = {key: variant(value) for key, value in body.items()}
            self._send(calls[-1], seat, MANAGER_PATH, MANAGER, "a{sv}", config_arg)
        await self._come_to_rest([seat for seat, *_ in wanted], calls)

    async def call(self, vm: VM, *wanted: tuple[Seat, str, tuple[int, ...], bool]) -> None:
        """Calls on one VM, at once."""
        calls = []
        for seat, method, args, interactive in wanted:
            number = next(self.place.numbers)
            calls.append(self._call(number, seat, method, interactive, vm=vm.key, args=args))
            self._send(calls[-1], seat, self.paths[vm.key], INTERFACE, METHODS[method], *args)
        await self._come_to_rest([seat for seat, *_ in wanted], calls)

    async def stop_all(self, seat: Seat, timeout: int, interactive: bool) -> None:
        call = self._call(next(self.place.numbers), seat, "StopAll", interactive, args=(timeout,))
        self._send(call, seat, MANAGER_PATH, MANAGER, "t", timeout)
        await self._come_to_rest([seat], [call])

    async def leave(self, seat: Seat) -> None:
        """A connection closes, and its user comes back with another."""
        number = seat.number
        await seat.leave()
        for call in {call for world in self.worlds for call in world.calls}:
            if call.connection == number and (task := self.calls.pop(call.number, None)):
                await asyncio.gather(task, return_exceptions=True)
        self.worlds = {world.left(number) for world in self.worlds}
        try:
            await self._come_to_rest([], [])
        finally:
            await seat.sit()

    async def strike(self, vm: VM, number: int) -> None:
        """Somebody on the host sends the VMM a signal."""
        pid = await self.place.listener.get(self.paths[vm.key], "Pid")
        os.kill(pid, number)
        self.worlds = {world.struck(vm.key, number) for world in self.worlds}
        await self._come_to_rest([], [])

    async def crash(self) -> None:
        """The service is killed, and started again."""
        listener = self.place.listener
        for vm in {vm for world in self.worlds for vm in world.vms if vm.state == "starting"}:
            # Until it has a process nothing of it outlives the service.
            await listener.until_pid(self.paths[vm.key])
        # Whatever was told is known to have been told.
        await listener.call(MANAGER_PATH, PEER, "Ping")
        (name,) = await listener.connection.call_bus("GetNameOwner", "s", [BUS])
        self.place.service.crash()
        await listener.until(lambda m: m.body == [BUS, name, ""])
        self.place.service.start()
        for seat in self.place.seats:
            await seat.introduce()
        self.worlds = {world.served_anew() for world in self.worlds}
        await self._come_to_rest([], [])

    async def remove_all(self) -> None:
        """Root ends it; nothing is left then, and nobody waits."""
        root = self.place.seats[0]
        while self.world.existing:
            vm = self.world.existing[0]
            await self.call(vm, (root, "Kill", (), False))
            if self.world.vm(vm.key).exists:
                await self.call(vm, (root, "Remove", (), False))
        assert not self.calls
        service = self.place.service
        assert service.fds() == self.place.files
        assert service.children() == []
        assert os.listdir(service.runtime / "vm") == ["counters.json"]
        assert "Traceback" not in service.log.read_text()

    async def abandon(self) -> None:
        """After a failure: the next walk shall find nothing of this one.

        There may be hundreds until the shortest that fails is found.
        """
        self.place.patience = 2.0
        listener = self.place.listener
        for task in self.calls.values():
            task.cancel()
        await asyncio.gather(*self.calls.values(), return_exceptions=True)
        (rows,) = await listener.call(MANAGER_PATH, MANAGER, "List")
        for row in rows:
            with contextlib.suppress(RemoteError):
                await listener.vm(row[-1], "Kill")
                await listener.vm(row[-1], "Remove")

    # Reads and refusals, which change nothing

    async def read(self, seat: Seat, vm: VM) -> None:
        """Everybody may read everything."""
        path, who = self.paths[vm.key], seat.caller
        values = await who.get_all(path)
        memory = vm.memory if vm.ran and vm.alive else 0
        for name in sorted(PROPERTIES_OF_VM):
            expected = memory if name == "MemoryActual" else values[name]
            assert await who.get(path, name) == expected, name
        assert await who.call(MANAGER_PATH, MANAGER, "GetVM", "s", [values["Name"]]) == [path]
        assert await who.call(MANAGER_PATH, MANAGER, "GetVMByCID", "u", [values["CID"]]) == [path]
        seen = await Seen.now(who, self.place.listener)
        assert not list(seen.problems(self.world, self.paths))
        assert "crosvm" in await who.get(MANAGER_PATH, "AvailableVMMs")
        assert await who.get(MANAGER_PATH, "Version")
        (xml,) = await who.call(path, INTROSPECTABLE, "Introspect")
        assert INTERFACE in xml

    async def refused(self, seat: Seat, path: str, wrong: Wrong) -> None:
        here = MANAGER_PATH if wrong.interface == MANAGER or wrong.of_manager else path
        async with refused(wrong.error):
            await seat.caller.call(here, wrong.interface, wrong.member, wrong.signature, wrong.body)
        await self._come_to_rest([], [])

    async def unknown(self, seat: Seat, path: str) -> None:
        """There is no such VM, or none any more."""
        for method, signature in METHODS.items():
            async with refused(model.UNKNOWN_OBJECT):
                await seat.caller.vm(path, method, signature, *[0] * len(signature))
        async with refused(model.UNKNOWN_OBJECT):
            await seat.caller.get(path, "State")
        async with refused(model.UNKNOWN_OBJECT):
            await seat.caller.get_all(path)

    # How it is kept to the model

    def _disk(self, number: int, size: int) -> str:
        path = self.disks[number] = str(self.place.images / f"disk-{number}")
        with open(path, "xb") as disk:
            disk.truncate(size)
        os.chmod(path, 0o666)
        return path

    def _call(self, number: int, seat: Seat, method: str, interactive: bool, **what: Any) -> Call:
        return Call(number, seat.number, seat.uid, method, interactive=interactive, **what)

    def _send(
        self, call: Call, seat: Seat, path: str, interface: str, signature: str, *body: Any
    ) -> None:
        work = seat.caller.call(
            path, interface, call.method, signature, body, interactive=call.interactive
        )
        task = self.calls[call.number] = asyncio.create_task(_ended(call, work))
        task.add_done_callback(lambda _: self.place.listener.news.set())

    async def _come_to_rest(self, seats: list[Seat], calls: list[Call]) -> None:
        """Wait until all looks like one of the worlds that calls under way can have led to."""
        allowed = {each for world in self.worlds for each in world.outcomes(*calls)}
        news = self.place.listener.news
        await asyncio.gather(*(seat.ping() for seat in seats))
        try:
            async with asyncio.timeout(self.place.patience):
                while True:
                    news.clear()
                    seen = await Seen.now(self.place.listener, self.place.listener)
                    answers = self._answers()
                    assert any(answers <= set(each.answers) for each in allowed), (
                        f"answers {answers}, {self._texts()}: not as in {_shown(allowed)}"
                    )
                    found = {each for each in allowed if answers == set(each.answers)}
                    found = {each for each in found if not self._problems(each, seen)}
                    if found:
                        break
                    await news.wait()
        except TimeoutError:
            problems = [self._problems(each, seen) for each in allowed]
            raise AssertionError(f"{answers}, {problems}: not {_shown(allowed)}") from None
        self._go_on_from(found)

    def _answers(self) -> set[tuple[int, str, model.End | None]]:
        """What has been answered in this step."""
        answers = set()
        for number, task in self.calls.items():
            if task.done():
                method, outcome, found = task.result()
                if (method, outcome) == ("Create", model.DONE):
                    self.paths[number] = found[0]
                waited = method == "Wait" and outcome == model.DONE
                answers.add((number, outcome, model.End(*found) if waited else None))
        return answers

    def _texts(self) -> list[Any]:
        return [task.result() for task in self.calls.values() if task.done()]

    def _problems(self, world: World, seen: Seen) -> list[str]:
        problems = list(seen.problems(world, self.paths))
        return problems + [
            f"{self.disks[vm.key]} has not {vm.disk} bytes"
            for vm in world.vms
            if vm.disk and os.stat(self.disks[vm.key]).st_size != vm.disk
        ]

    def _go_on_from(self, worlds: set[World]) -> None:
        ended = [task.result() for task in self.calls.values() if task.done()]
        self.seen |= {f"{method} {outcome.rpartition('.')[2]}" for method, outcome, _ in ended}
        ends = {vm.end for world in worlds for vm in world.vms if vm.end is not None}
        self.seen |= {end.reason for end in ends}
        self.calls = {number: task for number, task in self.calls.items() if not task.done()}
        for key, path in self.paths.items():
            name = f"vm-{path.rpartition('/')[2]}"
            worlds = {each if each.vm(key).name else each.named(key, name) for each in worlds}
        self.worlds = {each.heard() for each in worlds}


def _shown(worlds: Iterable[World]) -> str:
    return " or ".join(f"{each.answers} with {each.vms} and {each.calls}" for each in worlds)


async def _ended(call: Call, work: Awaitable[list[Any]]) -> tuple[str, str, list[Any]]:
    """How a call ends."""
    try:
        found = await work
    except RemoteError as error:
        return call.method, error.name, [error.text]
    if call.method in ("OpenConsole", "OpenLog"):
        (fd,) = found
        kind = os.fstat(fd).st_mode
        os.close(fd)
        assert stat.S_ISSOCK(kind) if call.method == "OpenConsole" else stat.S_ISREG(kind)
    return call.method, model.DONE, found


@dataclass(frozen=True)
class Wrong:
    """A call that is refused whoever makes it, whatever state the VM is in."""

    error: str
    interface: str
    member: str
    signature: str = ""
    body: tuple[Any, ...] = ()
    of_manager: bool = False


VALUE = Variant("s", "dead")
WRONG = [
    Wrong(model.INVALID_ARGS, INTERFACE, "Start", "s", ("now",)),
    Wrong(model.INVALID_ARGS, INTERFACE, "Stop"),
    Wrong(model.INVALID_ARGS, INTERFACE, "ResizeDisk", "tu", (1, 1)),
    Wrong(model.INVALID_ARGS, MANAGER, "Create", "s", ("a",)),
    Wrong(model.INVALID_ARGS, MANAGER, "GetVMByCID", "s", ("a",)),
    # What the contract doesn't name doesn't get through the bus.
    Wrong(model.DENIED, INTERFACE, "Explode"),
    Wrong(model.DENIED, "org.vmbus1.Debug", "Start"),
    Wrong(STANDARD_ERROR + "UnknownInterface", INTERFACE, "Start", of_manager=True),
    Wrong(STANDARD_ERROR + "UnknownInterface", PROPERTIES, "GetAll", "s", ("org.vmbus1.Debug",)),
    Wrong(STANDARD_ERROR + "UnknownInterface", PROPERTIES, "Get", "ss", (MANAGER, "Version")),
    Wrong(STANDARD_ERROR + "UnknownInterface", OBJECT_MANAGER, "GetManagedObjects"),
    Wrong(STANDARD_ERROR + "UnknownProperty", PROPERTIES, "Get", "ss", (INTERFACE, "Colour")),
    Wrong(
        STANDARD_ERROR + "PropertyReadOnly", PROPERTIES, "Set", "ssv", (INTERFACE, "State", VALUE)
    ),
    Wrong(model.NO_SUCH_VM, MANAGER, "GetVM", "s", ("nobody",)),
    Wrong(model.NO_SUCH_VM, MANAGER, "GetVMByCID", "u", (2,)),
]


# What can be walked

seats = st.integers(0, 2 * len(USERS) - 1)
#: Beyond those are the VM's owner's own.
seats_at_vm = st.integers(0, 4 * len(USERS) - 1)
#: Mostly none allows a dialog, which would find nobody to ask.
_seldom = st.sampled_from([False, False, False, True])
interactive = _seldom
which = st.integers(0, 3)
configs = st.builds(
    Config,
    name=st.sampled_from(["", "", "a", "b"]),
    guest=st.sampled_from([GUESTS[0]] * len(GUESTS) + GUESTS),
    kill_on_disconnect=st.booleans(),
    collect=_seldom,
    balloon=_seldom.map(lambda seldom: not seldom),
    disk=st.sampled_from([4096, 4096, 0]),
)
timeouts = st.sampled_from([0, 1, 50_000, 60_000_000])
arguments: dict[str, st.SearchStrategy[tuple[int, ...]]] = {
    "Stop": st.tuples(timeouts),
    "SetMemoryTarget": st.tuples(
        st.sampled_from([model.LEAST_MEMORY, model.MEMORY, 24 << 20, 1, model.MEMORY + 1])
    ),
    "ResizeDisk": st.tuples(
        st.sampled_from([0, 0, 0, 1]), st.sampled_from([4096, 8192, 1 << 20, 8192 + 511])
    ),
    "ConnectVsock": st.tuples(st.sampled_from([1023, 1024, 1 << 31])),
}


def _verbs(*methods: str) -> st.SearchStrategy[tuple[str, tuple[int, ...]]]:
    return st.one_of(
        [st.tuples(st.just(each), arguments.get(each, st.just(()))) for each in methods]
    )


#: More often than not, what only a VM that runs can do.
verbs = st.one_of(
    _verbs(*sorted(METHODS)), _verbs("Suspend", "Resume", "SetMemoryTarget", "ResizeDisk", "Start")
)


class PolkitdEnded(BaseException):
    """Ends a test at once, for no walk says anything of the service then."""


class Steps:
    """What can be done next in a walk."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.walk = Walk(place)
        self.sound = True

    def take(self, step: Step) -> None:
        name, arguments = step
        getattr(self, name)(**arguments)

    def go(self, step: Coroutine[Any, Any, None]) -> None:
        self.sound = False
        try:
            self.place.run(step)
        except AssertionError:
            if note := self.place.polkitd.ended_by_itself(within=1):
                raise PolkitdEnded(note) from None
            raise
        self.sound = True

    def finish(self) -> None:
        self.place.run(self.walk.remove_all() if self.sound else self.walk.abandon())

    def seat(self, number: int) -> Seat:
        return self.place.seats[number]

    def seat_at(self, vm: VM, number: int) -> Seat:
        owners = [seat for seat in self.place.seats if seat.uid == vm.owner]
        return (self.place.seats + owners * len(USERS))[number]

    def vm(self, number: int) -> VM:
        """One of those that run, the newest first, or if there are fewer one of the others.

        There is always one: what races have led to must not decide which steps can be taken.
        """
        if not self.walk.world.existing:
            self.go(self.walk.create((self.seat(0), Config(), _body(Config()), False)))
        vms = sorted(self.walk.world.existing, key=lambda vm: (vm.alive, vm.key), reverse=True)
        return vms[number % len(vms)]

    def create(self, seat: int, config: Config, interactive: bool, start: bool) -> None:
        wanted = (self.seat(seat), config, _body(config), interactive)
        self.go(self.walk.create(wanted))
        made = self.walk.world.existing[-1:]
        if start and made and made[0].state == "not-started":
            self.go(self.walk.call(made[0], (self.seat(seat), "Start", (), False)))

    def create_two_of_one_name(self, pair: list[int]) -> None:
        config = Config(name="both")
        wanted = [(self.seat(each), config, _body(config), False) for each in pair]
        self.go(self.walk.create(*wanted))

    def create_what_cannot_be(self, seat: int, bad: dict[str, Any]) -> None:
        self.go(self.walk.create((self.seat(seat), Config(valid=False), bad, False)))

    def call(self, seat: int, which: int, verb: Any, interactive: bool) -> None:
        vm = self.vm(which)
        self.go(self.walk.call(vm, (self.seat_at(vm, seat), *verb, interactive)))

    def call_at_once(self, which: int, calls: list[tuple[int, Any]]) -> None:
        vm = self.vm(which)
        wanted = [(self.seat_at(vm, seat), *verb, False) for seat, verb in calls]
        self.go(self.walk.call(vm, *wanted))

    def read(self, seat: int, which: int) -> None:
        self.go(self.walk.read(self.seat(seat), self.vm(which)))

    def call_wrongly(self, seat: int, which: int, wrong: Wrong) -> None:
        path = self.walk.paths[self.vm(which).key]
        self.go(self.walk.refused(self.seat(seat), path, wrong))

    def call_what_is_not_there(self, seat: int, which: int) -> None:
        gone = [self.walk.paths[vm.key] for vm in self.walk.world.vms if not vm.exists]
        path = ([NEVER, *gone])[-1 - which % (len(gone) + 1)]
        self.go(self.walk.unknown(self.seat(seat), path))

    def stop_all(self, seat: int, timeout: int, interactive: bool) -> None:
        self.go(self.walk.stop_all(self.seat(seat), timeout, interactive))

    def leave(self, which: int) -> None:
        """Who made a VM leaves, or if they have left already somebody else."""
        vm = self.vm(which)
        made_it = [seat for seat in self.place.seats if seat.number == vm.connection]
        self.go(self.walk.leave((made_it or self.place.seats)[0]))

    def strike(self, which: int, signal: int) -> None:
        vm = self.vm(which)
        if vm.ran and vm.alive:
            self.go(self.walk.strike(vm, signal))

    def crash(self) -> None:
        self.go(self.walk.crash())


def _body(config: Config) -> dict[str, Any]:
    """The keys of a config that are plain values."""
    body: dict[str, Any] = {
        "memory_mib": model.MEMORY_MIB,
        "balloon": config.balloon,
        "kill_on_disconnect": config.kill_on_disconnect,
        "collect": "on-death" if config.collect else "manual",
    }
    return {**body, "name": config.name} if config.name else body


def _step(name: str, weight: int, **arguments: Any) -> list[st.SearchStrategy[Step]]:
    """As often as that: among those of one_of each counts once."""
    return [st.tuples(st.just(name), st.fixed_dictionaries(arguments)) for _ in range(weight)]


steps = st.one_of(
    *_step("create", 6, seat=seats, config=configs, interactive=interactive, start=st.booleans()),
    *_step("create_two_of_one_name", 1, pair=st.lists(seats, min_size=2, max_size=2)),
    *_step("create_what_cannot_be", 1, seat=seats, bad=st.sampled_from(BAD_CONFIGS)),
    *_step("call", 8, seat=seats_at_vm, which=which, verb=verbs, interactive=interactive),
    *_step(
        "call_at_once",
        8,
        which=which,
        calls=st.lists(st.tuples(seats_at_vm, verbs), min_size=2, max_size=3),
    ),
    *_step("read", 1, seat=seats, which=which),
    *_step("call_wrongly", 1, seat=seats, which=which, wrong=st.sampled_from(WRONG)),
    *_step("call_what_is_not_there", 1, seat=seats, which=which),
    *_step("stop_all", 1, seat=seats, timeout=timeouts, interactive=interactive),
    *_step("leave", 3, which=which),
    *_step("strike", 2, which=which, signal=st.sampled_from([9, 15])),
    *_step("crash", 1),
)


class Machine(RuleBasedStateMachine):
    """A walk at random."""

    place: Place

    def __init__(self) -> None:
        super().__init__()
        self.steps = Steps(self.place)

    # The only rule, since of several Hypothesis leaves some out in each walk.
    @rule(step=steps)
    def take(self, step: Step) -> None:
        self.steps.take(step)

    def teardown(self) -> None:
        self.steps.finish()


# Walks by heart: what has to be met every time


def create(seat: int, *, start: bool = True, interactive: bool = False, **config: Any) -> Step:
    if "guest" in config:
        config["guest"] = next(each for each in GUESTS if each.name == config["guest"])
    made = Config(**config)
    return "create", {"seat": seat, "config": made, "interactive": interactive, "start": start}


def call(seat: int, method: str, *args: int, which: int = 0, interactive: bool = False) -> Step:
    verb = (method, args)
    return "call", {"seat": seat, "which": which, "verb": verb, "interactive": interactive}


def at_once(*calls: tuple[int, str, *tuple[int, ...]], which: int = 0) -> Step:
    wanted = [(seat, (method, tuple(args))) for seat, method, *args in calls]
    return "call_at_once", {"which": which, "calls": wanted}


def leave(which: int = 0) -> Step:
    return "leave", {"which": which}


def read(seat: int, which: int = 0) -> Step:
    return "read", {"seat": seat, "which": which}


def stop_all(seat: int, timeout: int = 0) -> Step:
    return "stop_all", {"seat": seat, "timeout": timeout, "interactive": False}


CRASH: Step = "crash", {}
GONE: Step = "call_what_is_not_there", {"seat": 3, "which": 1}
ROOT, ALICE, BOB, CAROL = range(len(USERS))
#: Who made the VM: the two connections of that user.
OWNER, OWNER_TOO = 2 * len(USERS), 2 * len(USERS) + 1
HOUR = 3_600_000_000
#: By name: what is done, and what must have come of it.
BY_HEART: dict[str, tuple[list[Step], set[str]]] = {
    "a connection leaves": (
        [
            create(ALICE, kill_on_disconnect=True, start=False),
            leave(),
            GONE,
            create(ALICE, kill_on_disconnect=True),
            leave(),
            create(BOB, kill_on_disconnect=True),
            call(OWNER_TOO, "Suspend"),
            leave(),
            create(BOB, kill_on_disconnect=True, guest="hangs", start=False),
            call(ROOT, "Start"),
            leave(),
            create(ALICE, kill_on_disconnect=True, guest="stubborn", collect=True),
            call(ROOT, "Stop", HOUR),
            leave(),
            GONE,
            create(ALICE),
            leave(),
            read(CAROL),
        ],
        {"requester-gone", "Start StartFailed", "Stop done"},
    ),
    "too many of a user": (
        [
            *[create(ALICE) for _ in range(5)],
            call(OWNER_TOO, "Start"),
            call(OWNER, "Kill"),
            create(BOB),
            call(ALICE, "Start", which=2),
            *[create(BOB, start=False) for _ in range(4)],
            call(ROOT, "Remove", which=7),
            create(BOB),
        ],
        {"Create LimitExceeded", "Start LimitExceeded", "killed"},
    ),
    "too many in all": (
        [
            *[create(seat) for seat in (ALICE, ALICE, BOB, BOB, ROOT, ROOT)],
            *[create(seat, start=False) for seat in (ALICE, BOB, ROOT, ROOT, ALICE)],
            call(ROOT, "Kill"),
            call(ROOT, "Kill"),
            *[call(OWNER, "Start", which=each) for each in (3, 4, 5)],
        ],
        {"Create LimitExceeded", "Start LimitExceeded"},
    ),
    "a beginning": (
        [
            create(ALICE, start=False),
            at_once((OWNER, "Start"), (OWNER_TOO, "Start"), (ROOT, "Start")),
            read(CAROL),
            create(ALICE, start=False),
            at_once((OWNER, "Start"), (OWNER_TOO, "Kill"), (ROOT, "Wait")),
            call(ROOT, "Kill"),
            create(ALICE, start=False, guest="hangs"),
            at_once((OWNER, "Start"), (OWNER_TOO, "Stop", 0), (OWNER_TOO, "Start")),
            create(ALICE, start=False),
            at_once((OWNER, "Start"), (OWNER_TOO, "Remove")),
            create(BOB, start=False),
            at_once((OWNER, "Start"), (OWNER, "Suspend"), (OWNER, "Resume")),
        ],
        {"Start done", "Start InvalidState"},
    ),
    "an end": (
        [
            create(ALICE, start=False),
            call(OWNER, "Wait"),
            call(OWNER, "Stop", 0),
            call(OWNER, "Kill"),
            call(OWNER, "Remove"),
            GONE,
            create(ALICE),
            call(CAROL, "Wait"),
            call(OWNER, "Remove"),
            at_once((OWNER, "Kill"), (OWNER_TOO, "Kill"), (ROOT, "Stop", 0)),
            at_once((OWNER, "Remove"), (OWNER_TOO, "Remove"), (BOB, "OpenLog")),
            create(ALICE, guest="stubborn"),
            call(OWNER, "Stop", 50_000),
            create(ALICE, guest="deaf"),
            call(OWNER, "Stop", 50_000),
            create(ALICE, guest="deaf"),
            call(OWNER, "Stop", HOUR),
            at_once((OWNER, "Start"), (OWNER, "Suspend"), (OWNER, "SetMemoryTarget", 24 << 20)),
            call(OWNER, "Kill"),
        ],
        {"Wait NoSuchVM", "Stop InvalidState", "Remove InvalidState", "killed", "Kill done"},
    ),
    "a name is taken": (
        [
            create(ALICE, name="a", start=False),
            create(BOB, name="a", start=False),
            call(ALICE, "Remove"),
            create(BOB, name="a"),
            call(BOB, "Stop", 0),
            create(ALICE, name="a"),
            call(BOB, "Remove"),
            create(ALICE, name="a", collect=True, guest="powers off"),
            create(BOB, name="a", start=False),
            ("create_two_of_one_name", {"pair": [ALICE, BOB]}),
        ],
        {"Create NameExists", "Create done", "stopped", "shutdown"},
    ),
    "gone with its death": (
        [
            step
            for guest in ("steady", "no kernel", "panics")
            for step in (
                create(ALICE, collect=True, start=False, guest=guest),
                call(CAROL, "Wait"),
                call(OWNER, "Start"),
                *([call(OWNER, "Kill")] if guest == "steady" else []),
                GONE,
            )
        ],
        {"Wait done", "Start StartFailed", "killed", "guest-panic"},
    ),
    "while it runs": (
        [
            create(ALICE, disk=4096),
            call(OWNER, "Suspend"),
            call(OWNER, "Suspend"),
            call(OWNER, "SetMemoryTarget", 24 << 20),
            read(CAROL),
            call(OWNER, "ResizeDisk", 0, 8192),
            call(OWNER, "ResizeDisk", 0, 4096),
            call(OWNER, "Resume"),
            call(OWNER, "Resume"),
            call(OWNER, "SetMemoryTarget", 16 << 20),
            call(OWNER, "SetMemoryTarget", 1),
            call(OWNER, "ResizeDisk", 1, 8192),
            call(OWNER, "OpenConsole"),
            at_once((OWNER, "Suspend"), (OWNER_TOO, "Resume"), (ROOT, "Suspend")),
            at_once((OWNER, "ResizeDisk", 0, 1 << 20), (ROOT, "Stop", 0)),
            call(OWNER, "OpenConsole"),
            create(BOB, disk=4096),
            at_once((OWNER, "SetMemoryTarget", 24 << 20), (ROOT, "ResizeDisk", 0, 1 << 20)),
            at_once((OWNER, "Suspend"), (OWNER, "Kill")),
            create(BOB, balloon=False),
            call(OWNER, "SetMemoryTarget", 24 << 20),
            create(BOB, guest="refuses"),
            call(OWNER, "Suspend"),
            create(ALICE, guest="fragile"),
            call(OWNER, "SetMemoryTarget", 24 << 20),
        ],
        {
            *("Suspend done", "Suspend InvalidState", "Suspend ControlFailed"),
            *("Resume done", "Resume InvalidState"),
            *("SetMemoryTarget done", "SetMemoryTarget InvalidArgs"),
            *("SetMemoryTarget NotSupported", "guest-panic"),
            *("ResizeDisk done", "ResizeDisk InvalidArgs"),
            *("OpenConsole done", "OpenConsole InvalidState"),
        },
    ),
    "the host goes down": (
        [
            create(ALICE, start=False),
            create(ALICE),
            create(ALICE, guest="hangs", start=False),
            call(OWNER, "Start"),
            create(BOB, guest="deaf", collect=True),
            create(BOB),
            call(OWNER, "Suspend"),
            create(ROOT, guest="deaf"),
            call(OWNER, "Stop", HOUR),
            stop_all(BOB),
            stop_all(ROOT, HOUR),
            call(OWNER, "Kill"),
            read(CAROL),
            stop_all(ROOT, 50_000),
            read(CAROL),
        ],
        {"StopAll InteractiveAuthorizationRequired", "StopAll done", "host-shutdown", "killed"},
    ),
    "by itself": (
        [
            step
            for guest in GUESTS
            if guest.then is not None or guest.fails is not None
            for step in (
                create(ALICE, guest=guest.name),
                call(CAROL, "Wait"),
                call(OWNER, "Remove"),
            )
        ],
        {"shutdown", "reboot", "guest-panic", "crash", "watchdog", "signal", "start-failed"},
    ),
    "somebody else": (
        [
            create(CAROL),
            create(ALICE, start=False),
            *[
                call(seat, method, *args, interactive=interactive)
                for method, args in [("Start", ()), ("Suspend", ()), ("Stop", (0,)), ("Remove", ())]
                for seat, interactive in [(CAROL, False), (CAROL, True)]
            ],
            *[call(BOB, each) for each in ("Start", "Suspend", "Resume", "OpenConsole", "OpenLog")],
            create(BOB),
            *[call(ALICE, each) for each in ("Suspend", "Kill", "OpenConsole", "OpenLog")],
            call(ROOT, "Kill"),
            call(CAROL, "Remove"),
            call(ALICE, "Remove"),
        ],
        {
            "Create InteractiveAuthorizationRequired",
            *(f"{method} AccessDenied" for method in ("Start", "Suspend", "Stop", "Remove")),
            *("Start done", "Suspend done", "Remove InteractiveAuthorizationRequired"),
        },
    ),
    "the service is killed": (
        [
            create(ALICE, start=False, name="a"),
            create(ALICE, disk=4096, kill_on_disconnect=True),
            call(OWNER, "Suspend"),
            call(CAROL, "Wait"),
            create(BOB, guest="panics"),
            create(BOB, guest="deaf"),
            call(OWNER, "Stop", HOUR),
            create(BOB, guest="hangs"),
            CRASH,
            read(CAROL),
            read(CAROL, which=3),
            create(BOB, name="a", start=False),
            call(OWNER, "Kill"),
            call(OWNER, "Kill"),
            call(OWNER, "Resume"),
            call(OWNER, "SetMemoryTarget", 24 << 20),
            call(OWNER, "ResizeDisk", 0, 8192),
            CRASH,
            leave(),
            call(ALICE, "Start", which=4),
        ],
        {"Wait NoReply", "Stop NoReply", "Start NoReply", "killed", "requester-gone", "guest-panic"}
        | {"Start StartFailed", "ResizeDisk NotSupported", "Create NameExists", "start-failed"},
    ),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    rig = Rig(system=True)
    try:
        with polkit(rig, RULES) as polkitd, asyncio.Runner() as runner:
            made = Place(rig, polkitd, runner)
            yield made
            made.run(made.aclose())
    finally:
        rig.close()


@pytest.fixture
def service(place: Place) -> Service:
    """For its log, where the test fails."""
    return place.service


@pytest.mark.parametrize("name", BY_HEART)
def test_walk_by_heart(place: Place, service: Service, name: str) -> None:
    """What a walk at random may miss leads where the contract says, and ends as it has to."""
    steps, ends = BY_HEART[name]
    walk = Steps(place)
    try:
        for step in steps:
            walk.take(step)
    finally:
        walk.finish()
    assert ends <= walk.walk.seen


def test_walk(place: Place, service: Service) -> None:
    """Whatever several users do, in turn or at once, is refused, or leads where the contract says.

    After each step every VM is compared with the model, as List, GetManagedObjects and the signals
    show it. At the end of each walk nothing is left of its VMs in the service.
    """

    class Here(Machine):
        pass

    Here.place = place
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=WALKS or 16,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=not WALKS,
            print_blob=True,
        ),
    )
