"""The service on a bus: what anybody may call, and what nobody can do to it by calling."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
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
    types_of,
    wrong_types,
)
from tests.frames import FULL_OF_VARIANTS, HUGE_CONFIGS, NOT_A_STRING, Var, nested
from tests.handmade import FakeBus, Raw, raw, until_gone
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
    listening,
    plain,
    refused,
    until_entries,
    vmbusd,
)
from vmbus.bus.connection import RemoteError
from vmbus.bus.wire import Kind

STANDARD = {INTROSPECTABLE, PEER, PROPERTIES}
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def nothing_failed_inside(request: pytest.FixtureRequest) -> Iterator[None]:
    """However it is called, the service is never surprised."""
    services = [each for each in request.node.funcargs.values() if isinstance(each, Service)]
    starts = [each.log.stat().st_size for each in services]
    yield
    for service, start in zip(services, starts, strict=True):
        log = service.log.read_text()[start:]
        assert not re.search(r"Traceback|^(WARNING|ERROR)|internal error", log, re.MULTILINE)


@pytest.fixture
def own_service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service and a bus that a test may break."""
    rig = Rig(system=False)
    environment = {"VMBUS_DBUS_LIBRARY": str(request.param)}
    yield Service(rig, {"crosvm": str(CROSVM), "kvm": "on"}, environment)
    rig.close()


on_either_library = pytest.mark.parametrize("own_service", LIBRARIES, indirect=True)


@pytest.fixture
async def bus(either_service: Service) -> AsyncIterator[Client]:
    """A client that has heard every signal since the test began; afterwards no VM is left."""
    async with listening(either_service.rig) as connected:
        yield connected
        await remove_all(connected)


@pytest.fixture
async def hand(either_service: Service) -> AsyncIterator[Raw]:
    async with raw(either_service.rig) as connected:
        yield connected


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return guest(tmp_path)


async def remove_all(bus: Client) -> None:
    async def remove(path: str) -> None:
        await bus.vm(path, "Kill")
        await bus.vm(path, "Remove")

    await asyncio.gather(*(remove(each[5]) for each in await listed(bus)))


async def listed(bus: Client) -> list[Any]:
    (rows,) = await bus.call(MANAGER_PATH, MANAGER, "List")
    assert isinstance(rows, list)
    return rows


async def create(bus: Client, kernel: Path, count: int) -> list[str]:
    return await asyncio.gather(*(bus.create(kernel=kernel) for _ in range(count)))


async def dead(bus: Client, directory: Path) -> str:
    """A VM whose life is over."""
    path = await bus.create(kernel=guest(directory))
    await bus.vm(path, "Start")
    await bus.vm(path, "Kill")
    return path


def is_clean(text: str) -> bool:
    return not re.search(r"Traceback|File \"|\.py\b|line \d", text)


# The contract, as its files and busctl have it


def flags_of(element: ElementTree.Element) -> str:
    """What busctl says of a property."""
    emits = [each.attrib["value"] for each in element.iterfind("annotation")]
    flags = {"const": "const", "invalidates": "emits-invalidation", "false": "-"}
    return flags[emits[0]] if emits and emits[0] != "true" else "emits-change"


def rows_of(interface: ElementTree.Element) -> set[tuple[str, ...]]:
    """What busctl has to show of an interface: name, type, signature, result, flags."""
    rows: set[tuple[str, ...]] = set()
    for each in interface:
        name = f".{each.attrib['name']}"
        if each.tag == "method":
            rows.add((name, "method", types_of(each) or "-", types_of(each, "out") or "-", "-"))
        elif each.tag == "signal":
            rows.add((name, "signal", types_of(each) or "-", "-", "-"))
        elif each.tag == "property":
            rows.add((name, "property", each.attrib["type"], flags_of(each)))
    return rows


# Introspection


async def test_introspection_leads_from_the_root_to_everything(bus: Client, kernel: Path) -> None:
    made = await create(bus, kernel, 12)
    found: dict[str, ElementTree.Element] = {}
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        (text,) = await bus.call(path, INTROSPECTABLE, "Introspect")
        found[path] = ElementTree.fromstring(text)
        children = [each.attrib["name"] for each in found[path].iterfind("node")]
        waiting += [f"{path.rstrip('/')}/{child}" for child in children]
    assert set(found) == {"/", "/org", MANAGER_PATH, f"{MANAGER_PATH}/vm", *made}
    own = {MANAGER_PATH: {MANAGER, OBJECT_MANAGER}, **{path: {VM} for path in made}}
    for path, node in found.items():
        names = {each.attrib["name"] for each in node.iterfind("interface")}
        assert names == own[path] | STANDARD if path in own else names <= STANDARD


async def test_introspection_is_the_contract(bus: Client, kernel: Path) -> None:
    (path,) = await create(bus, kernel, 1)
    for name, interface in documented().items():
        (text,) = await bus.call(home_of(name, path), INTROSPECTABLE, "Introspect")
        told = ElementTree.fromstring(text).find(f"interface[@name='{name}']")
        assert told is not None
        assert ElementTree.canonicalize(
            ElementTree.tostring(told), strip_text=True
        ) == ElementTree.canonicalize(ElementTree.tostring(interface), strip_text=True)


async def test_busctl_shows_the_tree(bus: Client, either_service: Service, kernel: Path) -> None:
    made = await create(bus, kernel, 2)
    shown = either_service.rig.busctl("tree", "--list", BUS).splitlines()
    assert {MANAGER_PATH, *made} <= set(shown)


async def test_busctl_shows_the_contract(
    bus: Client, either_service: Service, kernel: Path
) -> None:
    (path,) = await create(bus, kernel, 1)
    for name, interface in documented().items():
        text = either_service.rig.busctl("introspect", BUS, home_of(name, path), name)
        shown = set()
        for line in text.splitlines()[1:]:
            member, kind, signature, *rest = line.split()
            # What stands between is a property's value.
            shown.add((member, kind, signature, *(rest[-1:] if kind == "property" else rest)))
        assert shown == rows_of(interface)


async def test_gdbus_shows_the_contract(bus: Client, either_service: Service, kernel: Path) -> None:
    (path,) = await create(bus, kernel, 1)
    text = either_service.rig.gdbus("introspect", "-d", BUS, "-o", "/", "--recurse")
    for node in ("/", MANAGER_PATH, path):
        assert f"node {node} {{" in text
    for name, interface in documented().items():
        assert f"interface {name} {{" in text
        for each in interface:
            assert each.attrib["name"] in text


# Properties


async def test_get_and_get_all_agree_and_have_the_types_of_the_contract(
    bus: Client, kernel: Path
) -> None:
    (vm,) = await create(bus, kernel, 1)
    for name, interface in documented().items():
        path = home_of(name, vm)
        every = await bus.connection.call(BUS, path, PROPERTIES, "GetAll", "s", [name])
        types = {
            each.attrib["name"]: each.attrib["type"] for each in interface.iterfind("property")
        }
        assert {key: value.signature for key, value in every.body[0].items()} == types
        for key, value in every.body[0].items():
            assert await bus.get(path, key) == plain(value)


async def test_properties_need_no_interface_name(bus: Client, kernel: Path) -> None:
    (path,) = await create(bus, kernel, 1)
    assert await bus.call(path, PROPERTIES, "Get", "ss", ["", "Id"]) == [int(path.split("/")[-1])]
    assert await bus.call(path, PROPERTIES, "GetAll", "s", [""]) == [await bus.get_all(path)]


@pytest.mark.parametrize("interface", sorted(STANDARD))
async def test_interfaces_without_properties_have_none(bus: Client, interface: str) -> None:
    assert await bus.call(MANAGER_PATH, PROPERTIES, "GetAll", "s", [interface]) == [{}]


NO_SUCH = [
    # path, interface, member, signature, values, error, what it names
    (MANAGER_PATH, MANAGER, "Destroy", "", [], "UnknownMethod", "Destroy"),
    (MANAGER_PATH, None, "Destroy", "", [], "UnknownMethod", "Destroy"),
    (MANAGER_PATH, VM, "Start", "", [], "UnknownInterface", VM),
    (MANAGER_PATH, "a.b", "List", "", [], "UnknownInterface", "a.b"),
    ("/org/vmbus1/vm/999", VM, "Start", "", [], "UnknownObject", "/org/vmbus1/vm/999"),
    ("/org/vmbus1/vm", VM, "Start", "", [], "UnknownInterface", VM),
    ("/elsewhere", INTROSPECTABLE, "Introspect", "", [], "UnknownObject", "/elsewhere"),
    ("/elsewhere", PROPERTIES, "GetAll", "s", [""], "UnknownObject", "/elsewhere"),
    (MANAGER_PATH, PROPERTIES, "Get", "ss", [MANAGER, "Size"], "UnknownProperty", "Size"),
    (MANAGER_PATH, PROPERTIES, "Get", "ss", [MANAGER, ""], "UnknownProperty", "''"),
    (MANAGER_PATH, PROPERTIES, "Get", "ss", ["", "Size"], "UnknownProperty", "Size"),
    (MANAGER_PATH, PROPERTIES, "Get", "ss", [VM, "Id"], "UnknownInterface", VM),
    (MANAGER_PATH, PROPERTIES, "Get", "ss", [PEER, "Id"], "UnknownProperty", "Id"),
    (MANAGER_PATH, PROPERTIES, "GetAll", "s", ["no.such"], "UnknownInterface", "no.such"),
    (
        MANAGER_PATH,
        PROPERTIES,
        "Set",
        "ssv",
        [MANAGER, "Size", Var("u", 1)],
        "UnknownProperty",
        "Size",
    ),
    (
        MANAGER_PATH,
        PROPERTIES,
        "Set",
        "ssv",
        [MANAGER, "VMCount", Var("u", 1)],
        "PropertyReadOnly",
        "VMCount",
    ),
    (
        MANAGER_PATH,
        PROPERTIES,
        "Set",
        "ssv",
        ["", "VMCount", Var("s", "")],
        "PropertyReadOnly",
        "VMCount",
    ),
]


@pytest.mark.parametrize(
    ("path", "interface", "member", "signature", "values", "error", "named"),
    NO_SUCH,
)
async def test_what_does_not_exist_is_said_by_name(
    hand: Raw,
    bus: Client,
    path: str,
    interface: str | None,
    member: str,
    signature: str,
    values: list[Any],
    error: str,
    named: str,
) -> None:
    async with refused(STANDARD_ERROR + error) as texts:
        await hand.call(path, interface, member, signature, values)
    assert named in texts[0]
    assert is_clean(texts[0])


@pytest.mark.parametrize(
    ("path", "member", "signature", "values"),
    [
        (MANAGER_PATH, "List", "", []),
        (MANAGER_PATH, "GetManagedObjects", "", []),
        (MANAGER_PATH, "Introspect", "", []),
        (MANAGER_PATH, "Get", "ss", ["", "Version"]),
        (MANAGER_PATH, "GetAll", "s", [MANAGER]),
        ("/", "Introspect", "", []),
        ("/", "Ping", "", []),
    ],
)
async def test_the_interface_may_be_left_out(
    hand: Raw, path: str, member: str, signature: str, values: list[Any]
) -> None:
    await hand.call(path, None, member, signature, values)


@pytest.mark.parametrize("path", ["/", "/org", MANAGER_PATH, "/org/vmbus1/vm/99", "/no/such"])
async def test_every_path_has_a_peer(bus: Client, path: str) -> None:
    assert await bus.call(path, PEER, "Ping") == []
    assert await bus.call(path, PEER, "GetMachineId") == [
        Path("/etc/machine-id").read_text().strip()
    ]


# ObjectManager, and what is told of changes


async def assert_managed_objects_are_right(bus: Client) -> None:
    (managed,) = await bus.call(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects")
    rows = await listed(bus)
    every = await asyncio.gather(*(bus.get_all(row[5]) for row in rows))
    assert managed == {
        row[5]: {VM: properties} for row, properties in zip(rows, every, strict=True)
    }


@pytest.mark.parametrize("count", [0, 1, 2, 50])
async def test_managed_objects_are_all_vms_with_all_properties(
    bus: Client, kernel: Path, count: int
) -> None:
    await create(bus, kernel, count)
    await assert_managed_objects_are_right(bus)
    assert len(await listed(bus)) == count
    assert await bus.get(MANAGER_PATH, "VMCount") == count


async def test_managed_objects_follow_every_change(bus: Client, tmp_path: Path) -> None:
    # Names of every length move what stands behind them to every alignment.
    kernel = guest(tmp_path)
    made = [await bus.create(kernel=kernel, name="n" * length) for length in range(1, 18)]
    await assert_managed_objects_are_right(bus)
    await bus.vm(made[3], "Start")
    await assert_managed_objects_are_right(bus)
    await bus.vm(made[3], "Kill")
    await assert_managed_objects_are_right(bus)
    for path in (made[16], made[0], made[3]):
        await bus.vm(path, "Remove")
        await assert_managed_objects_are_right(bus)


async def test_objects_are_announced_by_their_manager(bus: Client, kernel: Path) -> None:
    (path,) = await create(bus, kernel, 1)
    properties = await bus.get_all(path)
    await bus.vm(path, "Remove")
    await bus.until(lambda m: m.member == "InterfacesRemoved")
    told = [(m.path, m.member, plain(m.body)) for m in bus.signals if m.interface == OBJECT_MANAGER]
    assert told == [
        (MANAGER_PATH, "InterfacesAdded", [path, {VM: properties}]),
        (MANAGER_PATH, "InterfacesRemoved", [path, [VM]]),
    ]
    counts = [plain(m.body) for m in bus.of(MANAGER_PATH) if m.interface == PROPERTIES]
    assert counts == [[MANAGER, {"VMCount": number}, []] for number in (1, 0)]


async def test_what_properties_changed_tells_is_what_can_be_read(
    bus: Client, tmp_path: Path
) -> None:
    last = {"Powerbtn": {"error": "no\x1b\u200b\x00 end"}}
    path = await bus.create(kernel=guest(tmp_path, on=last))
    shown = await bus.get_all(path)
    await bus.vm(path, "Start")
    await bus.vm(path, "Stop", "t", 0)
    await bus.died(path)
    for message in bus.of(path):
        if message.member == "PropertiesChanged":
            interface, changed, invalidated = plain(message.body)
            assert interface == VM
            assert set(invalidated) <= {"MemoryActual"}
            shown |= changed
    assert shown == await bus.get_all(path)
    assert shown["State"] == "dead"
    assert "end" in shown["LastWords"]


# Who wants no answer, and who asks wrongly


@pytest.mark.parametrize(
    ("interface", "member", "signature", "values"),
    [
        (MANAGER, "List", "", []),
        (MANAGER, "Nonsense", "", []),
        (MANAGER, "GetVM", "s", ["nobody"]),
        (MANAGER, "Create", "a{sv}", [{}]),
        (PROPERTIES, "GetAll", "s", [MANAGER]),
    ],
)
async def test_who_wants_no_reply_gets_none(
    hand: Raw, interface: str, member: str, signature: str, values: list[Any]
) -> None:
    await hand.call(MANAGER_PATH, PEER, "Ping")
    before = len(hand.came)
    hand.send_call(MANAGER_PATH, interface, member, signature, values, flags=1)
    # A Create that is answered comes after it, since it does the same and more.
    async with refused(ERROR + "InvalidConfig"):
        await hand.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [{}])
    assert len(hand.came) == before + 1


async def test_descriptors_that_nobody_wants_do_not_stay(
    hand: Raw, bus: Client, either_service: Service, kernel: Path
) -> None:
    (path,) = await create(bus, kernel, 1)
    before = either_service.fds()
    for member in ("OpenLog", "OpenConsole") * 20:
        hand.send_call(path, VM, member, flags=1)
    for _ in range(20):
        await hand.call(path, VM, "OpenLog")
    assert either_service.fds().count("/") <= before.count("/")
    assert len(either_service.fds()) - len(before) <= 20  # the consoles, until their ends are seen


@pytest.mark.parametrize(("interface", "member", "right"), METHODS)
async def test_wrong_types_are_told_the_right_ones(
    hand: Raw, bus: Client, kernel: Path, interface: str, member: str, right: str
) -> None:
    (path,) = await create(bus, kernel, 1)
    for signature in wrong_types(right):
        async with refused(STANDARD_ERROR + "InvalidArgs") as texts:
            await hand.call(
                home_of(interface, path), interface, member, signature, samples(signature)
            )
        assert f"'{right}'" in texts[0] and f"'{signature}'" in texts[0]
    assert await bus.get(path, "State") == "not-started"


@pytest.mark.parametrize("order", frames.ORDERS)
async def test_either_byte_order_is_understood(
    hand: Raw, bus: Client, kernel: Path, order: str
) -> None:
    config = {"kernel": Var("s", str(kernel)), "name": Var("s", "än"[1:]), "cpus": Var("x", 1)}
    (path,) = await hand.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], order=order)
    assert await hand.call(MANAGER_PATH, MANAGER, "GetVM", "s", ["n"], order=order) == [path]
    async with refused(STANDARD_ERROR + "InvalidArgs"):
        await hand.call(MANAGER_PATH, MANAGER, "GetVM", "u", [1], order=order)


# Descriptors


@pytest.mark.parametrize("index", [1, 2, 15, (1 << 31) - 1, (1 << 32) - 1])
async def test_a_descriptor_that_did_not_come_is_missed(
    hand: Raw, either_service: Service, kernel: Path, index: int
) -> None:
    await hand.call(MANAGER_PATH, MANAGER, "List")
    before = either_service.fds()
    with kernel.open() as file:
        async with refused(STANDARD_ERROR + "InvalidArgs") as texts:
            config = {"kernel": Var("h", index)}
            await hand.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], fds=[file.fileno()])
    assert "only 1 came" in texts[0]
    assert either_service.fds() == before


@pytest.mark.parametrize("count", [1, 16])
async def test_descriptors_leak_nowhere(
    hand: Raw, bus: Client, either_service: Service, tmp_path: Path, count: int
) -> None:
    path = await dead(bus, tmp_path)
    strangers = [(MANAGER, "Nonsense", "s"), ("a.b", "List", ""), (VM, "Create", "a{sv}")]
    before = either_service.fds()
    with guest(tmp_path).open() as file:
        fds = [file.fileno()] * count
        for interface, member, signature in [*METHODS, *strangers]:
            for given in {signature, "d"}:
                if (interface, member, given) == (VM, "Remove", ""):
                    continue
                try:
                    await hand.call(
                        home_of(interface, path), interface, member, given, samples(given), fds=fds
                    )
                except RemoteError as error:
                    assert is_clean(error.text)
        for kind in ("s", "h", "ah", "v"):
            config = {
                "kernel": Var(kind, {"s": "/nowhere", "h": 0, "ah": [0]}.get(kind, Var("h", 0)))
            }
            bad = {**config, "cpus": Var("s", "many")}
            with pytest.raises(RemoteError):
                await hand.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [bad], fds=fds)
        assert either_service.fds() == before
        await hand.call(path, VM, "Remove", fds=fds)
    assert len(either_service.fds()) <= len(before)


# Size and depth


@pytest.mark.parametrize("depth", [6, 60])
async def test_variants_in_variants_are_refused(hand: Raw, depth: int) -> None:
    value = nested(depth)
    async with refused(STANDARD_ERROR + "InvalidArgs") as texts:
        await hand.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [{"name": value}])
    assert "nested" in texts[0]
    async with refused(STANDARD_ERROR + "PropertyReadOnly"):
        await hand.call(MANAGER_PATH, PROPERTIES, "Set", "ssv", [MANAGER, "Version", value])


@pytest.mark.parametrize("name", HUGE_CONFIGS)
async def test_a_huge_config_has_a_short_answer(hand: Raw, name: str) -> None:
    error = "LimitExceeded" if name in FULL_OF_VARIANTS else "InvalidConfig"
    async with refused(ERROR + error) as texts:
        await hand.call(MANAGER_PATH, MANAGER, "Create", "a{sv}", [HUGE_CONFIGS[name]])
    assert len(texts[0]) < 8000
    assert is_clean(texts[0])


async def test_a_message_too_large_is_refused_and_the_next_understood(
    hand: Raw, either_service: Service, kernel: Path
) -> None:
    await hand.call(MANAGER_PATH, MANAGER, "List")
    before = either_service.fds()
    config = {"kernel": Var("h", 0), "params": Var("s", "x" * 2 * MIB)}
    with kernel.open() as file:
        async with refused(ERROR + "LimitExceeded") as texts:
            await hand.call(
                MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], fds=[file.fileno()] * 16
            )
    assert "KiB" in texts[0]
    assert await hand.call(MANAGER_PATH, PEER, "Ping") == []
    assert either_service.fds() == before


async def test_hostile_signatures_cost_little_memory(hand: Raw, either_service: Service) -> None:
    letters = "ybnqiuxt"
    await hand.call(MANAGER_PATH, MANAGER, "List")
    before = either_service.resident()
    serial = 0
    for number in range(3000):
        own = "".join(letters[number >> shift & 7] for shift in range(0, 15, 3))
        signature = f"a({own}{'y' * 120})"
        value = Var(signature, [])
        if number % 2:
            serial = hand.send_call(MANAGER_PATH, PEER, "Ping", signature, [[]])
        else:
            serial = hand.send_call(
                MANAGER_PATH, PROPERTIES, "Set", "ssv", [MANAGER, "Version", value]
            )
    async with refused(STANDARD_ERROR + "InvalidArgs"):
        await hand.reply(serial)
    # Without a bound it is some 60 MB.
    assert either_service.resident() - before < 30 * MIB


@pytest.mark.parametrize("body", NOT_A_STRING.values(), ids=NOT_A_STRING.keys())
async def test_what_is_not_valid_does_not_come_through_the_bus(
    hand: Raw, bus: Client, body: bytes
) -> None:
    fields = [(1, MANAGER_PATH), (2, MANAGER), (3, "GetVM"), (6, BUS), (8, "s")]
    hand.send(frames.frame(frames.CALL, fields, body, serial=9))
    async with asyncio.timeout(DEADLINE):
        await hand.closed.wait()
    assert await listed(bus) == []


# Many at once


async def test_a_crowd_that_leaves_without_its_answers_is_forgotten(
    bus: Client, either_service: Service, kernel: Path
) -> None:
    await create(bus, kernel, 5)
    before = either_service.fds()
    async with raw(either_service.rig) as leaving:
        await leaving.call(MANAGER_PATH, MANAGER, "List")
        calls: list[tuple[str, str, str, list[Any]]] = [
            (PROPERTIES, "GetAll", "s", [MANAGER]),
            (OBJECT_MANAGER, "GetManagedObjects", "", []),
            (MANAGER, "Nonsense", "", []),
            (MANAGER, "Create", "a{sv}", [{}]),
        ]
        for call in itertools.islice(itertools.cycle(calls), 10_000):
            leaving.send_call(MANAGER_PATH, *call)
        await leaving.sent()
    # The bus has read all of it before it sees the end, and the service answers in order.
    await until_gone(bus, leaving.name)
    await assert_managed_objects_are_right(bus)
    assert either_service.fds() == before


async def test_a_listener_that_does_not_read_misses_nothing_and_harms_nobody(
    bus: Client, either_service: Service, kernel: Path
) -> None:
    async with raw(either_service.rig) as slow:
        rule = f"type='signal',sender='{BUS}',interface='{OBJECT_MANAGER}'"
        await slow.call_bus("AddMatch", "s", [rule])
        slow.stop_reading()
        made = []
        for _ in range(10):
            made += await create(bus, kernel, 60)
        await remove_all(bus)
        slow.go_on_reading()
        await slow.call(MANAGER_PATH, PEER, "Ping")
        told = [message.body[0] for message in slow.came if message.member == "InterfacesAdded"]
        gone = [message.body[0] for message in slow.came if message.member == "InterfacesRemoved"]
    assert told == sorted(made, key=number_of)
    assert sorted(gone) == sorted(made)


def number_of(path: str) -> int:
    return int(path.rpartition("/")[2])


# A bus that does as it likes


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeBus]:
    bus = FakeBus(tmp_path / "bus")
    yield bus
    bus.close()


class Started:
    """A vmbusd on a bus that may not let it get as far as owning its name."""

    def __init__(self, directory: Path, suffix: str, address: str, library: str) -> None:
        self.what = f"{suffix} with {library}"
        self.runtime = directory / f"run{suffix}{library}"
        argv = vmbusd(
            directory, f"{suffix}{library}", {"crosvm": str(CROSVM), "kvm": "on"}, user=True
        )
        environment = {
            **os.environ,
            "VMBUS_DBUS_LIBRARY": library,
            "DBUS_SESSION_BUS_ADDRESS": address,
            "PYTHONWARNINGS": "error",
        }
        self.process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)

    async def ended(self) -> tuple[int, str, float]:
        """Wait for its end. Gives its exit status, what it said, and the CPU seconds it took."""
        assert self.process.stderr is not None
        try:
            async with asyncio.timeout(2 * DEADLINE):
                said = await asyncio.to_thread(self.process.stderr.read)
        except TimeoutError:
            self.process.kill()
            raise
        self.process.stderr.close()
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, said, used.ru_utime + used.ru_stime


@pytest.fixture(params=LIBRARIES)
def on_fake(request: pytest.FixtureRequest, tmp_path: Path, fake: FakeBus) -> Iterator[Started]:
    started = Started(tmp_path, "", fake.address, request.param)
    yield started
    if started.process.returncode is None:
        started.process.kill()
        started.process.communicate()


CREDENTIALS = {"UnixUserID": Var("u", os.getuid()), "ProcessID": Var("u", 1)}


async def let_serve(fake: FakeBus) -> None:
    """Let it own its name, and let it know who :1.7 is."""
    await fake.begin()
    await fake.send(frames.call("/", PEER, "Ping", sender=":1.7"))
    await fake.answer("GetConnectionCredentials", "a{sv}", [CREDENTIALS])
    while (await fake.receive()).kind is not Kind.RETURN:
        pass


async def test_a_bus_that_does_not_read_gets_everything_in_order(
    on_fake: Started, fake: FakeBus, kernel: Path
) -> None:
    await let_serve(fake)
    config = {"kernel": Var("s", str(kernel)), "params": Var("s", "p" * 300)}
    for serial in range(1, 601):
        call = frames.call(
            MANAGER_PATH, MANAGER, "Create", "a{sv}", [config], sender=":1.7", serial=serial
        )
        await fake.send(call)
    # All VMs are there, and the socket has long been full, before anything is read.
    await until_entries(on_fake.runtime / "vm", 601)
    added: list[int] = []
    answered: list[int] = []
    while len(answered) < 600:
        message = await fake.receive()
        if message.member == "InterfacesAdded":
            added.append(number_of(message.body[0]))
        elif message.kind is Kind.RETURN:
            answered.append(message.reply_serial or 0)
    assert added == list(range(1, 601))
    assert sorted(answered) == added
    fake.close()
    assert (await on_fake.ended())[0] == 1


@pytest.mark.parametrize("order", frames.ORDERS)
async def test_more_than_sixteen_descriptors_are_refused_and_closed(
    on_fake: Started, fake: FakeBus, kernel: Path, order: str
) -> None:
    await let_serve(fake)
    pid = on_fake.process.pid
    before = len(os.listdir(f"/proc/{pid}/fd"))
    with kernel.open() as file:
        for count in (17, 253):
            config = {"kernel": Var("h", 0)}
            call = frames.call(
                MANAGER_PATH,
                MANAGER,
                "Create",
                "a{sv}",
                [config],
                sender=":1.7",
                fds=count,
                order=order,
            )
            await fake.send(call, [file.fileno()] * count)
            reply = await fake.receive()
            assert reply.error_name == ERROR + "LimitExceeded"
            assert "at most 16" in reply.body[0]
    assert len(os.listdir(f"/proc/{pid}/fd")) == before


async def test_garbage_from_the_bus_is_refused(on_fake: Started, fake: FakeBus) -> None:
    await let_serve(fake)
    valid = frames.call(MANAGER_PATH, MANAGER, "GetVM", "s", ["x"], sender=":1.7", serial=5)
    await fake.send(valid.replace(b"\1\0\0\0x\0", b"\xff\xff\xff\xffx\0"))
    reply = await fake.receive()
    assert (reply.error_name, reply.reply_serial) == (STANDARD_ERROR + "InvalidArgs", 5)
    await fake.send(valid)
    assert (await fake.receive()).error_name == ERROR + "NoSuchVM"


async def test_whom_the_bus_does_not_vouch_for_is_denied(on_fake: Started, fake: FakeBus) -> None:
    await fake.begin()
    stranger = {"UnixUserID": Var("u", os.getuid() + 1)}
    for sender, found in ((":1.8", {}), (":1.9", stranger)):
        await fake.send(frames.call(MANAGER_PATH, MANAGER, "List", sender=sender, serial=5))
        await fake.answer("GetConnectionCredentials", "a{sv}", [found])
        while (reply := await fake.receive()).kind is Kind.SIGNAL:
            pass
        assert reply.error_name == STANDARD_ERROR + "AccessDenied"


async def hang_up(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    pass


async def hang_up_asked(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.readline()


async def reject(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"REJECTED DBUS_COOKIE_SHA1\r\n")
    await reader.read()


async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"x" * 100_000)
    await reader.read()


async def babble_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff\r\n" * 1000)
    await reader.read()


async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def authenticate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for answer in (b"OK 0123456789abcdef\r\n", b"AGREE_UNIX_FD\r\n", b""):
        await reader.readline()
        writer.write(answer)


async def hang_up_at_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await authenticate(reader, writer)
    await reader.read(1)


async def say_nothing_to_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await authenticate(reader, writer)
    await reader.read()


async def refuse_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await authenticate(reader, writer)
    await reader.read(1)
    fields = [(frames.ERROR_NAME, "a.b.Full"), (frames.REPLY_SERIAL, 1), (frames.SIGNATURE, "s")]
    writer.write(frames.frame(frames.ERROR, fields, frames.body_of("s", ["the bus is full"])))
    await reader.read()


async def hang_up_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await authenticate(reader, writer)
    await reader.read(1)
    fields = [(frames.REPLY_SERIAL, 1), (frames.SIGNATURE, "s")]
    writer.write(frames.frame(frames.RETURN, fields, frames.body_of("s", [":1.0"])))
    while b"AddMatch" not in await reader.read(65536):
        pass


CONNECTING = "can't connect to the bus at unix:path="
BAD_BUSES = {
    hang_up: CONNECTING,
    hang_up_asked: CONNECTING,
    reject: CONNECTING,
    babble: CONNECTING,
    babble_lines: CONNECTING,
    say_nothing: "did not answer within",
    hang_up_at_hello: CONNECTING,
    say_nothing_to_hello: "did not answer within",
    refuse_hello: CONNECTING,
    hang_up_later: "the connection to the bus is gone",
}


async def test_a_bad_bus_ends_the_service_with_a_reason_and_without_a_spin(
    tmp_path: Path,
) -> None:
    """All at once, since some of them take their whole ten seconds."""
    started: list[tuple[Started, str]] = []
    servers = []
    for number, (behave, message) in enumerate(BAD_BUSES.items()):
        path = tmp_path / str(number)
        servers.append(await asyncio.start_unix_server(closing(behave), path))
        for library in LIBRARIES:
            one = Started(tmp_path, behave.__name__, f"unix:path={path}", library)
            started.append((one, message))
    for library in LIBRARIES:
        for name, address in (("nothing", f"unix:path={tmp_path}/no"), ("nonsense", "nonsense")):
            started.append((Started(tmp_path, name, address, library), "can't connect to the bus"))
    ends = await asyncio.gather(*(each.ended() for each, _ in started))
    for server in servers:
        server.close()
    for (each, message), (status, said, cpu) in zip(started, ends, strict=True):
        last = said.rstrip().rpartition("\n")[2]
        assert status == 1, f"{each.what}: {said}"
        assert re.fullmatch(rf"ERROR vmbusd: .*{message}.*[^:\s]", last), f"{each.what}: {said}"
        assert not re.search("Traceback|Warning|never retrieved", said), f"{each.what}: {said}"
        assert cpu < 5, f"{each.what} took {cpu} s of CPU"


def closing(behave: Any) -> Any:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    return handle


# The end


@on_either_library
async def test_a_second_service_does_not_start(
    own_service: Service, kernel: Path, tmp_path: Path
) -> None:
    """Neither where the first one has its state, nor anywhere else on its bus."""
    async with client(own_service.rig) as bus:
        path = await bus.create(kernel=kernel)
        for options, why in (
            ([], f"the runtime directory {own_service.runtime} is used by another vmbusd"),
            (["--runtime-dir", str(tmp_path)], "org.vmbus1 is owned by another process already"),
        ):
            done = subprocess.run(
                [*own_service.argv, *options],
                env=own_service.environment,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
                check=False,
            )
            assert done.returncode == 1
            assert f"ERROR vmbusd: {why}" in done.stderr
            assert "Traceback" not in done.stderr
        # It has not touched what the first one keeps in the same directory.
        await bus.vm(path, "Start")


@on_either_library
def test_the_service_ends_with_its_bus(own_service: Service) -> None:
    own_service.rig.kill_bus()
    assert own_service.process.wait(DEADLINE) == 1
    log = own_service.log.read_text()
    assert re.search(r"^ERROR vmbusd: the connection to the bus is gone: .*\w", log, re.MULTILINE)
    assert "Traceback" not in log


@on_either_library
async def test_told_to_end_it_answers_everybody_and_gives_its_name_back(
    own_service: Service, tmp_path: Path
) -> None:
    async with listening(own_service.rig) as bus:
        await bus.listen("type='signal',member='NameOwnerChanged',arg0='org.vmbus1'")
        kernel = guest(tmp_path)
        running, idle = [await bus.create(kernel=kernel) for _ in range(2)]
        await bus.vm(running, "Start")
        waits = [asyncio.create_task(bus.vm(path, "Wait")) for path in (running, idle)]
        await bus.call(MANAGER_PATH, PEER, "Ping")
        assert await asyncio.to_thread(own_service.terminate) == 0
        for wait in waits:
            with pytest.raises(RemoteError, match="shutting down"):
                await wait
        released = await bus.until(lambda m: m.member == "NameOwnerChanged")
        assert released.body[2] == ""


@on_either_library
def test_told_to_end_as_soon_as_it_serves_it_ends_well(own_service: Service) -> None:
    assert own_service.terminate() == 0
