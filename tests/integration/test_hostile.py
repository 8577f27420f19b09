"""Nothing that a caller can send hurts: neither the service, nor what it does for others."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest

from tests import frames
from tests.conftest import LIBRARIES
from tests.contract import (
    INTROSPECTABLE,
    METHODS,
    PEER,
    documented,
    home_of,
    samples,
    wrong_types,
)
from tests.frames import FULL_OF_VARIANTS, HUGE_CONFIGS, NOT_A_STRING, Var, nested
from tests.handmade import Raw, raw, until_gone
from tests.polkit import Caller, agent, caller, polkit
from tests.rig import (
    BUS,
    CROSVM,
    DEADLINE,
    ERROR,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    PROPERTIES,
    STANDARD_ERROR,
    VM,
    Client,
    Rig,
    Service,
    client,
    guest,
    plain,
)
from vmbus.bus.connection import BUS_NAME, BUS_PATH, RemoteError
from vmbus.bus.wire import Variant

MIB = 1024 * 1024
OWNER, NOBODY = 5, 65534
ANSWERED = "answered"
DENIED = STANDARD_ERROR + "AccessDenied"
INTERACTIVE = STANDARD_ERROR + "InteractiveAuthorizationRequired"
INVALID = STANDARD_ERROR + "InvalidArgs"
LIMITED = ERROR + "LimitExceeded"
BAD_CONFIG = ERROR + "InvalidConfig"
HUNG_UP = "the bus hung up"
#: The bus answers calls of one caller itself when more than these await their replies.
AT_ONCE = 100
#: Who is hostile may create VMs, as everybody at a desktop may.
RULES = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.vmbus1.create")
        return polkit.Result.YES;
});
"""
#: What a listener hears of a VM that is created, started, killed and removed.
LIFE = ["InterfacesAdded", "starting", "running", "dead", "Died", "InterfacesRemoved"]


@pytest.fixture(scope="module", params=LIBRARIES)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A vmbusd of the user vmbus, on a system bus of its own, with polkit."""
    rig = Rig(system=True)
    (images := rig.directory / "images").mkdir()
    settings = {"crosvm": str(CROSVM), "kvm": "on", "image_directories": [str(images)]}
    with polkit(rig, RULES):
        yield Service(rig, settings, {"VMBUS_DBUS_LIBRARY": str(request.param)}, user="vmbus")
        rig.close()


class Others:
    """An owner of two VMs, one that runs and is waited for and one of passed files; a listener."""

    def __init__(self, service: Service, owner: Caller, listener: Client) -> None:
        self.service = service
        self.owner = owner
        self.listener = listener
        self.kernel = guest(service.rig.directory / "images")
        self.log_start = service.log.stat().st_size

    async def begin(self) -> None:
        await self.listener.listen()
        await self.listener.listen("type='signal',interface='org.vmbus1.test.Hostile'")
        self.running = await self.start()
        with self.kernel.open() as file:
            self.idle = await self.owner.create(kernel=Variant("h", 0), fds=[file.fileno()])
        self.waiting = asyncio.create_task(self.owner.vm(self.running, "Wait"))
        self.pid = await self.owner.get(self.running, "Pid")
        self.name = await self.listener.connection.call_bus("GetNameOwner", "s", [BUS])
        self.fds = self.service.fds()
        self.resident = self.service.resident()

    async def start(self) -> str:
        """A VM of the owner's that runs."""
        path = await self.owner.create(kernel=self.kernel)
        await self.owner.vm(path, "Start")
        return path

    async def live(self) -> str:
        """The whole life of a VM of the owner's."""
        path = await self.start()
        await self.end(path)
        return path

    async def end(self, path: str) -> None:
        await self.owner.vm(path, "Kill")
        await self.owner.vm(path, "Remove")

    def history(self, path: str) -> list[str]:
        """What the listener has heard of a VM, in its order."""
        heard = []
        for message in self.listener.signals:
            if message.member in ("InterfacesAdded", "InterfacesRemoved"):
                heard += [message.member] if message.body[0] == path else []
            elif message.path == path and message.member == "PropertiesChanged":
                state = plain(message.body[1]).get("State")
                heard += [state] if state else []
            elif message.path == path:
                heard.append(message.member or "")
        return heard

    async def heard_from(self, hostile: Raw) -> None:
        """Wait until the bus has handed on all that was sent: what is sent now comes after it."""
        fields = [(frames.PATH, "/"), (frames.INTERFACE, "org.vmbus1.test.Hostile")]
        hostile.send(frames.frame(frames.SIGNAL, [*fields, (frames.MEMBER, "Over")]))
        await self.listener.until(lambda m: m.member == "Over" and m.sender == hostile.name)

    async def are_served(self) -> None:
        """The service answers, is the same, keeps nothing, and has let nothing go."""
        assert await self.owner.get(self.running, "State") == "running"
        assert await self.listener.connection.call_bus("GetNameOwner", "s", [BUS]) == self.name
        assert self.service.fds() == self.fds
        assert self.service.resident() - self.resident < 10 * MIB
        assert await self.owner.get(self.running, "Pid") == self.pid
        assert self.pid in self.service.children()
        assert not self.waiting.done()

    async def come_to_their_end(self) -> None:
        """All that was under way goes on to its end, and is heard of once."""
        await self.owner.vm(self.idle, "Start")
        await self.end(self.idle)
        await self.end(self.running)
        async with asyncio.timeout(DEADLINE):
            assert await self.waiting == ["killed", -9]
        assert await self.listener.get(MANAGER_PATH, "VMCount") == 0
        for path in (self.running, self.idle):
            assert self.history(path) == LIFE
        log = self.service.log.read_text()[self.log_start :]
        assert not re.search(r"Traceback|^(WARNING|ERROR)|internal error", log, re.MULTILINE)


@pytest.fixture
async def others(service: Service) -> AsyncIterator[Others]:
    async with caller(service.rig, OWNER) as owner, client(service.rig) as listener:
        them = Others(service, owner, listener)
        await them.begin()
        yield them
        them.waiting.cancel()
        await asyncio.wait([them.waiting])
        (rows,) = await listener.call(MANAGER_PATH, MANAGER, "List")
        for row in rows:
            await listener.vm(row[-1], "Kill")
            await listener.vm(row[-1], "Remove")


@pytest.fixture
async def hostile(service: Service) -> AsyncIterator[Raw]:
    async with raw(service.rig, NOBODY) as connected:
        yield connected


# What is sent


async def outcome(hostile: Raw, serial: int) -> str:
    try:
        await hostile.reply(serial)
    except RemoteError as error:
        return error.name
    except ConnectionError:
        return HUNG_UP
    return ANSWERED


async def outcomes(hostile: Raw, serials: Iterable[int]) -> Counter[str]:
    """How calls end, which are made as their serials are taken, not too many at once."""
    found: Counter[str] = Counter()
    under_way: deque[int] = deque()
    for serial in serials:
        under_way.append(serial)
        if len(under_way) == AT_ONCE:
            found[await outcome(hostile, under_way.popleft())] += 1
    for serial in under_way:
        found[await outcome(hostile, serial)] += 1
    return found


async def one_by_one(others: Others, messages: Iterable[tuple[bytes, int]]) -> Counter[str]:
    """How messages end, each with so many descriptors, on new connections as the bus hangs up."""
    found: Counter[str] = Counter()
    serials = itertools.count(100)
    async with contextlib.AsyncExitStack() as stack:
        fd = stack.enter_context(others.kernel.open()).fileno()
        one = await stack.enter_async_context(raw(others.service.rig, NOBODY))
        for (data, fds), serial in zip(messages, serials, strict=False):
            if one.closed.is_set():
                one = await stack.enter_async_context(raw(others.service.rig, NOBODY))
            one.send(data[:8] + serial.to_bytes(4, "little") + data[12:], [fd] * fds)
            found[await outcome(one, serial)] += 1
    return found


def create(config: dict[str, Any], **options: Any) -> bytes:
    return frames.call(
        MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], destination=BUS, **options
    )


async def wrong_signatures(hostile: Raw, others: Others) -> None:
    """Every method, with types that it doesn't take."""
    calls = (
        hostile.send_call(
            home_of(interface, others.running), interface, member, wrong, samples(wrong)
        )
        for interface, member, right in METHODS
        for wrong in wrong_types(right)
    )
    assert set(await outcomes(hostile, calls)) == {INVALID}


def configs_of(values: list[Var], many: int) -> Iterator[tuple[bytes, int]]:
    """Configs of so many of these values each."""
    for start in range(0, len(values), many):
        some = values[start : start + many]
        yield create({f"key{number}": value for number, value in enumerate(some)}), 0


async def ten_thousand_signatures(hostile: Raw, others: Others) -> None:
    """Configs whose values are all of different types, as many in one as may be and more."""
    kinds = itertools.islice(itertools.product("ybnqiuxt", repeat=5), 10_000)
    short = [Var("".join(("a(", *kind, ")")), []) for kind in kinds]
    assert await one_by_one(others, configs_of(short, 125)) == {BAD_CONFIG: 80}
    assert await one_by_one(others, configs_of(short, 1000)) == {INVALID: 10}
    long = [Var(f"a({each.signature}{'y' * 240})", []) for each in short[:400]]
    calls = (
        hostile.send_call(MANAGER_PATH, PROPERTIES, "Set", "ssv", [MANAGER, "Version", value])
        for value in long
    )
    assert await outcomes(hostile, calls) == {STANDARD_ERROR + "PropertyReadOnly": 400}
    assert await one_by_one(others, configs_of(long, 400)) == {INVALID: 1}


def in_arrays(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [[value]]
    return value


def deep_values() -> Iterator[Var]:
    """Values in containers that stand in each other as deep as can be, and deeper."""
    for depth in (1, 4, 5, 16, 48, 60, 61, 62, 63, 64, 65, 200):
        yield nested(depth)
    for depth in (1, 2, 31, 32, 33, 64):
        yield Var("a" * depth + "n", [])
        yield Var("a(" * depth + "y" + ")" * depth, in_arrays(0, depth))
        yield Var("a(" * 16 + "v" + ")" * 16, in_arrays(nested(depth), 16))


async def deep_nesting(hostile: Raw, others: Others) -> None:
    """Variants, arrays and structs, as deep as the bus lets through and deeper."""
    values = list(deep_values())
    found = await one_by_one(others, ((create({"name": value}), 0) for value in values))
    assert set(found) == {INVALID, BAD_CONFIG, HUNG_UP}


WRONG_FIELDS = [
    (frames.PATH, ""),
    (frames.PATH, "x"),
    (frames.PATH, "//"),
    (frames.PATH, "/a/"),
    (frames.PATH, "/org/freedesktop/DBus/Local"),
    (frames.PATH, Var("s", "/")),
    (frames.INTERFACE, "nodot"),
    (frames.INTERFACE, "a..b"),
    (frames.INTERFACE, "org.freedesktop.DBus.Local"),
    (frames.MEMBER, ""),
    (frames.MEMBER, "a.b"),
    (frames.MEMBER, "1a"),
    (frames.MEMBER, "m" * 256),
    (frames.MEMBER, Var("u", 1)),
    (frames.DESTINATION, ""),
    (frames.DESTINATION, "nodot"),
    (frames.SIGNATURE, "("),
    (frames.SIGNATURE, "ss"),
]


def invalid() -> Iterator[bytes]:
    """What no bus lets through."""
    fields = [(frames.DESTINATION, BUS), (frames.INTERFACE, MANAGER), (frames.MEMBER, "GetVM")]
    fields += [(frames.PATH, MANAGER_PATH), (frames.SIGNATURE, "s")]
    right = frames.body_of("s", ["x"])
    for body in NOT_A_STRING.values():
        yield frames.frame(frames.CALL, fields, body)
    for code, value in WRONG_FIELDS:
        others = [field for field in fields if field[0] != code]
        yield frames.frame(frames.CALL, [*others, (code, value)], right)
    for kind in (0, frames.RETURN, frames.ERROR):
        yield frames.frame(kind, fields, right)
    for path in ("", "x", "//", "/a/", "/a//b", "/a-b", "/\xe4", "/a\0b"):
        yield create({"kernel": Var("o", path)})
    before, _, after = create({"name": Var("s", "x")}).rpartition(b"\1s\0")
    for letter in b"\0a(){}rez*":
        yield before + bytes([1, letter, 0]) + after
    whole = frames.frame(frames.CALL, fields, right)
    yield b"x" + whole[1:]
    yield whole[:3] + b"\2" + whole[4:]
    yield whole[:12] + b"\xff\xff\xff\xff" + whole[16:]


async def invalid_messages(hostile: Raw, others: Others) -> None:
    """NUL bytes, paths and names that are none: the bus hangs up."""
    found = await one_by_one(others, ((data, 0) for data in invalid()))
    assert set(found) == {HUNG_UP}


def with_descriptors(others: Others, count: int) -> Iterator[bytes]:
    """Every method, and some that don't exist, with so many descriptors that most don't take."""
    strangers = [(MANAGER, "Nonsense", "s"), ("a.b", "List", ""), (VM, "Create", "a{sv}")]
    for interface, member, right in [*METHODS, *strangers]:
        path = home_of(interface, others.running)
        for signature in {right, "d"} - ({""} if member == "Wait" else set()):
            yield frames.call(
                path, interface, member, signature, samples(signature), destination=BUS, fds=count
            )
        for signature, values in ("h", [count - 1]), ("ah", [list(range(count))]), ("h", [count]):
            yield frames.call(
                path, interface, member, signature, values, destination=BUS, fds=count
            )
    for index in (0, count - 1, count, 253, (1 << 31) - 1, (1 << 32) - 1):
        bad = Var("s", "many")
        yield create({"kernel": Var("h", index), "cpus": bad}, fds=count)
        yield create({"kernel": Var("v", Var("h", index)), "cpus": bad}, fds=count)
        yield create({"kernel": Var("ah", [index]), "cpus": bad}, fds=count)
        yield create({"disks": Var("aa{sv}", [{"image": Var("h", index)}])}, fds=count)


async def descriptors(hostile: Raw, others: Others) -> None:
    """As many as one message may carry, on every method, named in its arguments or not."""
    for count in (1, 16):
        messages = ((data, count) for data in with_descriptors(others, count))
        found = await one_by_one(others, messages)
        assert {INVALID, DENIED, INTERACTIVE, BAD_CONFIG, ANSWERED} < set(found)


async def more_descriptors_than_may_be(hostile: Raw, others: Others) -> None:
    """More than one message may carry, or others than it says: the bus hangs up."""
    ping = (MANAGER_PATH, PEER, "Ping")
    messages = [
        (frames.call(*ping, destination=BUS, fds=said), sent)
        for said, sent in ((17, 17), (253, 253), (2, 1), (1, 0), (0xFFFFFFFF, 1))
    ]
    assert await one_by_one(others, messages) == {HUNG_UP: len(messages)}


async def descriptors_of_every_kind(hostile: Raw, others: Others) -> None:
    """Directories, pipes, sockets and what else is open, as files of a VM."""
    ends = [*os.pipe(), *(each.detach() for each in socket.socketpair())]
    ends += [os.open("/", os.O_RDONLY), os.open(others.kernel, os.O_PATH)]
    ends += [os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDONLY)]
    ends += [os.memfd_create("empty"), os.eventfd(0), os.pidfd_open(os.getpid())]
    ends += [os.open("/proc/self/mem", os.O_RDONLY), os.open(others.kernel, os.O_WRONLY)]
    calls = (
        hostile.send_call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], fds=[end] * 2)
        for end in ends
        for config in (
            {"kernel": Var("h", 0), "initrd": Var("h", 1), "cpus": Var("s", "many")},
            {"disks": Var("aa{sv}", [{"image": Var("h", 0), "writable": Var("b", 1)}])},
            {"net": Var("aa{sv}", [{"tap": Var("h", 1)}])},
        )
    )
    assert await outcomes(hostile, calls) == {BAD_CONFIG: 3 * len(ends)}
    for end in ends:
        os.close(end)


async def no_interface(hostile: Raw, others: Others) -> None:
    """Every method without the name of its interface: the bus denies what it can't tell."""
    calls = (
        hostile.send_call(home_of(interface, others.running), None, member, right, samples(right))
        for interface, member, right in METHODS
    )
    assert await outcomes(hostile, calls) == {DENIED: len(METHODS)}


def too_large() -> Iterator[tuple[bytes, int]]:
    """Calls as large as the bus lets through, and what is as large in each."""
    fields = [(frames.DESTINATION, BUS), (frames.PATH, MANAGER_PATH), (frames.SIGNATURE, "a{sv}")]
    fields += [(frames.INTERFACE, MANAGER), (frames.MEMBER, "Create")]
    entry = frames.body_of("a{sv}", [{"key": Var("t", 1)}])[8:]
    entries = (entry + bytes(-len(entry) % 8)) * (31 * MIB // 24)
    body = len(entries).to_bytes(4, "little") + bytes(4) + entries
    yield frames.frame(frames.CALL, fields, body), 0
    yield create({"params": Var("s", "p" * 4 * MIB)}, fds=16), 16
    yield create({"p" * 4 * MIB: Var("s", "")}, fds=16), 16
    for length in (MIB, 31 * MIB):
        path = "/" + "p" * length
        yield frames.call(path, MANAGER, "Create", destination=BUS, fds=16), 16


async def huge_messages(hostile: Raw, others: Others) -> None:
    """Many keys, long keys, long values, and the largest messages that there are."""
    calls = (
        hostile.send_call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [config])
        for config in HUGE_CONFIGS.values()
    )
    limited = len(FULL_OF_VARIANTS)
    found = {BAD_CONFIG: len(HUGE_CONFIGS) - limited, LIMITED: limited}
    assert await outcomes(hostile, calls) == found
    assert await one_by_one(others, too_large()) == {LIMITED: 5}


async def ten_thousand_calls_and_no_ear(hostile: Raw, others: Others) -> None:
    """Calls without end, whose replies nobody reads, with and without wanting any."""
    hostile.stop_reading()
    calls: list[tuple[str, str, str, str, list[Any]]] = [
        (MANAGER_PATH, MANAGER, "List", "", []),
        (MANAGER_PATH, PROPERTIES, "GetAll", "s", [MANAGER]),
        (MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects", "", []),
        (MANAGER_PATH, MANAGER, "Nonsense", "", []),
        (MANAGER_PATH, MANAGER, "GetVM", "d", [0.5]),
        (others.running, INTROSPECTABLE, "Introspect", "", []),
        (others.running, VM, "Kill", "", []),
        (others.running, VM, "Wait", "", []),
    ]
    for number, call in enumerate(itertools.islice(itertools.cycle(calls), 10_000)):
        hostile.send_call(*call, flags=number // len(calls) % 2)
        if number % 1000 == 0:
            await hostile.sent()


async def a_listener_with_no_ear(hostile: Raw, others: Others) -> None:
    """All signals there are are sent to one who never reads, and to one who does."""
    for rule in ("type='signal'", f"sender='{BUS}'", "path_namespace='/org/vmbus1'"):
        await hostile.call_bus("AddMatch", "s", [rule])
    hostile.stop_reading()
    lives = await asyncio.gather(*(others.live() for _ in range(10)))
    assert await others.listener.get(MANAGER_PATH, "VMCount") == 2
    assert [others.history(path) for path in lives] == [LIFE] * len(lives)


async def flags_and_kinds(hostile: Raw, others: Others) -> None:
    """Flags and kinds of messages that D-Bus doesn't know."""
    calls = (
        hostile.send_call(MANAGER_PATH, MANAGER, "GetVM", "s", ["x"], flags=flags)
        for flags in range(0, 256, 2)
    )
    assert await outcomes(hostile, calls) == {ERROR + "NoSuchVM": 128}
    for flags in range(1, 256, 2):
        hostile.send_call(MANAGER_PATH, MANAGER, "GetVM", "s", ["x"], flags=flags)
    fields = [(frames.DESTINATION, BUS), (frames.INTERFACE, PEER), (frames.MEMBER, "Ping")]
    for kind in range(5, 256):
        hostile.send(frames.frame(kind, [*fields, (frames.PATH, "/")], serial=kind))


async def replies_nobody_asked_for(hostile: Raw, others: Others) -> None:
    """Returns and errors, as if to the questions that the service asks the bus and polkit."""
    credentials = {"UnixUserID": Var("u", 0)}
    for destination, serial in itertools.product((BUS, others.name[0]), range(1, 200)):
        fields = [(frames.DESTINATION, destination), (frames.REPLY_SERIAL, serial)]
        for kind, body in (
            ("(bba{ss})", [[True, False, {}]]),
            ("a{sv}", [credentials]),
        ):
            data = frames.body_of(kind, body)
            hostile.send(frames.frame(frames.RETURN, [*fields, (frames.SIGNATURE, kind)], data))
        hostile.send(frames.frame(frames.ERROR, [*fields, (frames.ERROR_NAME, "a.b")]))


async def forged_signals(hostile: Raw, others: Others) -> None:
    """That others have left, that polkit has changed, that VMs have died."""
    gone = others.owner.connection.unique_name
    forged: list[tuple[str, str, str, str, str, list[Any]]] = [
        (BUS_NAME, BUS_PATH, BUS_NAME, "NameOwnerChanged", "sss", [gone, gone, ""]),
        (BUS_NAME, BUS_PATH, BUS_NAME, "NameOwnerChanged", "s", [gone]),
        (BUS_NAME, BUS_PATH, BUS_NAME, "NameLost", "s", [BUS]),
        ("org.freedesktop.PolicyKit1", "/", "org.freedesktop.PolicyKit1", "Changed", "", []),
        (BUS, others.running, VM, "Died", "usi", [3, "killed", -9]),
        (BUS, MANAGER_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", [others.running, [VM]]),
    ]
    for sender, path, interface, member, signature, values in forged:
        fields = [(frames.SENDER, sender), (frames.PATH, path), (frames.INTERFACE, interface)]
        fields += [(frames.MEMBER, member)]
        fields += [(frames.SIGNATURE, signature)] if signature else []
        body = frames.body_of(signature, values)
        for to in ([], [(frames.DESTINATION, BUS)], [(frames.DESTINATION, others.name[0])]):
            hostile.send(frames.frame(frames.SIGNAL, [*fields, *to], body))


async def other_places(hostile: Raw, others: Others) -> None:
    """Every method on objects that aren't there, or are something else."""
    places = ["/", "/org", "/org/vmbus1/vm", "/org/vmbus1/vm/0", "/org/vmbus1/vm/00", "/_"]
    places += [f"{others.running}/x", f"{others.running}0" * 1000, "/org/vmbus1/vm/" + "9" * 5000]
    places += [MANAGER_PATH, others.running]
    calls = (
        hostile.send_call(place, interface, member, right, samples(right))
        for place in places
        for interface, member, right in METHODS
        if place != home_of(interface, others.running)
    )
    found = await outcomes(hostile, calls)
    errors = {STANDARD_ERROR + each for each in ("UnknownObject", "UnknownInterface")}
    assert set(found) == {ANSWERED, *errors}


ODD_TEXTS = ["", "\x01\x1b[31m", "\u202e\ufeff\U0010ffff", "%s%n{0}", "../..", "\n", "n" * 100_000]


async def odd_texts(hostile: Raw, others: Others) -> None:
    """Names of VMs, properties and interfaces that aren't any, in all their places."""
    calls: list[tuple[str, str, str, str, list[Any]]] = []
    for text in ODD_TEXTS:
        value = Var("s", text)
        calls += [
            (MANAGER_PATH, MANAGER, "GetVM", "s", [text]),
            (MANAGER_PATH, MANAGER, "Create", "a{sv}", [{text: value}]),
            (MANAGER_PATH, MANAGER, "Create", "a{sv}", [{"name": value, "kernel": value}]),
            (others.running, PROPERTIES, "Get", "ss", [VM, text]),
            (others.running, PROPERTIES, "Get", "ss", [text or "no", text]),
            (others.running, PROPERTIES, "GetAll", "s", [text or "no"]),
            (others.running, PROPERTIES, "Set", "ssv", [text, text, value]),
        ]
    found = await outcomes(hostile, (hostile.send_call(*call) for call in calls))
    assert sum(found.values()) == len(calls) and ANSWERED not in found
    assert not {STANDARD_ERROR + "Failed", HUNG_UP} & found.keys()


async def setting_everything(hostile: Raw, others: Others) -> None:
    """Every property, with values of every kind."""
    values = [Var("s", ""), Var("u", 0), Var("as", []), nested(50)]
    calls = (
        hostile.send_call(
            home_of(name, others.running),
            PROPERTIES,
            "Set",
            "ssv",
            [name, each.attrib["name"], value],
        )
        for name, interface in documented().items()
        for each in interface.iterfind("property")
        for value in values
    )
    assert set(await outcomes(hostile, calls)) == {STANDARD_ERROR + "PropertyReadOnly"}


async def a_flood_of_pings(hostile: Raw, others: Others) -> None:
    """Pings and questions for the host's identity, as fast as they are answered."""
    members = ("Ping", "Ping", "GetMachineId")
    calls = (hostile.send_call("/", PEER, members[number % 3]) for number in range(1500))
    assert await outcomes(hostile, calls) == {ANSWERED: 1500}


async def waits_without_end(hostile: Raw, others: Others) -> None:
    """More calls that wait than one caller may have under way, for replies it doesn't want."""
    for _ in range(2000):
        hostile.send_call(others.running, VM, "Wait", flags=1)
    await hostile.sent()
    calls = (hostile.send_call(others.running, VM, "Wait") for _ in range(3))
    assert await outcomes(hostile, calls) == {LIMITED: 3}


async def others_vms(hostile: Raw, others: Others) -> None:
    """Every method of a VM, rightly called, by one who may not."""
    verbs = [each for each in METHODS if each[0] == VM and each[1] != "Wait"]
    calls = (
        hostile.send_call(path, interface, member, right, samples(right))
        for interface, member, right in verbs
        for path in (others.running, others.idle)
    )
    assert await outcomes(hostile, calls) == {INTERACTIVE: 2 * len(verbs)}


async def the_service_s_place(hostile: Raw, others: Others) -> None:
    """The service's name, its messages and its environment, asked of the bus."""
    asked: list[tuple[str, str, str, list[Any]]] = [
        (BUS_NAME, "RequestName", "su", [BUS, flags]) for flags in range(8)
    ]
    asked += [
        (BUS_NAME, "UpdateActivationEnvironment", "a{ss}", [{"VMBUS_DBUS_LIBRARY": "none"}]),
        (BUS_NAME, "AddMatch", "s", [f"eavesdrop='true',destination='{BUS}'"]),
        ("org.freedesktop.DBus.Monitoring", "BecomeMonitor", "asu", [[], 0]),
    ]
    calls = (hostile.send_call(BUS_PATH, *each, destination=BUS_NAME) for each in asked)
    assert await outcomes(hostile, calls) == {DENIED: len(asked)}


async def vms_that_go_with_their_creator(hostile: Raw, others: Others) -> None:
    """VMs of passed files, that are to go when their creator does, which is at once."""
    async with raw(others.service.rig, NOBODY) as leaving:
        config = {"kernel": Var("h", 0), "kill_on_disconnect": Var("b", 1)}
        with others.kernel.open() as file:
            calls = (
                leaving.send_call(
                    MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], fds=[file.fileno()]
                )
                for _ in range(100)
            )
            assert await outcomes(leaving, calls) == {ANSWERED: 100}
        assert await others.listener.get(MANAGER_PATH, "VMCount") == 102
    await until_gone(others.listener, leaving.name)
    # What comes together with the news is answered before the VMs go.
    await others.are_served()
    assert await others.listener.get(MANAGER_PATH, "VMCount") == 2


async def dialogs_that_stand(hostile: Raw, others: Others) -> None:
    """More calls than a bus lets a service ask polkit for, each with a dialog nobody answers."""
    rig = others.service.rig
    calls: list[asyncio.Task[Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            leaving = await stack.enter_async_context(caller(rig, NOBODY, interactive=True))
            await stack.enter_async_context(agent(rig, leaving))
            opening = [leaving.vm(others.running, "OpenLog") for _ in range(AT_ONCE)]
            calls += [asyncio.create_task(each) for each in opening]
        # Of no more than 128 can the service wait for polkit's answers.
        for ended in itertools.islice(asyncio.as_completed(calls), len(calls) - 128):
            with contextlib.suppress(RemoteError):
                await ended
        for fd in await others.owner.vm(others.running, "OpenLog"):
            os.close(fd)
    await asyncio.wait(calls)
    assert not [each for each in calls if each.exception() is None]


ATTACKS: list[Callable[[Raw, Others], Awaitable[None]]] = [
    wrong_signatures,
    ten_thousand_signatures,
    deep_nesting,
    invalid_messages,
    descriptors,
    more_descriptors_than_may_be,
    descriptors_of_every_kind,
    no_interface,
    huge_messages,
    ten_thousand_calls_and_no_ear,
    a_listener_with_no_ear,
    flags_and_kinds,
    replies_nobody_asked_for,
    forged_signals,
    other_places,
    odd_texts,
    setting_everything,
    a_flood_of_pings,
    waits_without_end,
    others_vms,
    dialogs_that_stand,
    the_service_s_place,
    vms_that_go_with_their_creator,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_nothing_that_is_sent_hurts(
    others: Others, hostile: Raw, attack: Callable[[Raw, Others], Awaitable[None]]
) -> None:
    """The service stays as it was, and others are served, while the hostile is there and after."""
    await attack(hostile, others)
    await others.heard_from(hostile)
    await others.are_served()
    hostile.close()
    await until_gone(others.listener, hostile.name)
    await others.are_served()
    await others.come_to_their_end()
