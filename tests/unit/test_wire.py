"""The codec: every type there and back, nothing out that a bus would hang up for, garbage in."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import frames
from tests.conftest import LIBRARIES
from tests.frames import Var
from vmbus.bus import layout, marshal, wire
from vmbus.bus.unmarshal import header_fields

MIB = 1024 * 1024


def dressed(value: Any, variant: Any = wire.Variant) -> Any:
    """A value in which every Var is a Variant of that kind."""
    if isinstance(value, Var):
        return variant(value.signature, dressed(value.value, variant))
    if isinstance(value, dict):
        return {key: dressed(item, variant) for key, item in value.items()}
    if isinstance(value, list):
        return [dressed(item, variant) for item in value]
    return value


def bare(value: Any) -> Any:
    """The reverse of it, whatever the kind; tuples are lists."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bare(item) for item in value]
    if hasattr(value, "signature"):
        return Var(value.signature, bare(value.value))
    return value


VALUES: list[tuple[str, list[Any]]] = [
    ("", []),
    ("y", [255]),
    ("bb", [True, False]),
    ("nq", [-(1 << 15), (1 << 16) - 1]),
    ("iu", [-(1 << 31), (1 << 32) - 1]),
    ("xt", [-(1 << 63), (1 << 64) - 1]),
    ("yd", [1, -1.5e300]),
    ("s", [""]),
    ("s", ["grüße \N{GRINNING FACE} \ufffe"]),
    ("og", ["/org/vmbus1/vm/7", "a{sv}"]),
    ("h", [3]),
    ("ay", [b"\0\1\xff"]),
    ("as", [["a", "", "c"]]),
    ("yat", [1, []]),
    ("a(yx)", [[[1, -1], [2, -2]]]),
    ("(s(iu)as)", [["a", [-1, 1], ["b"]]]),
    ("a{uas}", [{7: ["x", "y"], 8: []}]),
    ("v", [Var("v", Var("v", Var("s", "deep")))]),
    ("a{sv}", [{"b": Var("b", True), "fd": Var("h", 0), "t": Var("t", 1 << 40)}]),
    ("a{sv}", [{"disks": Var("aa{sv}", [{"image": Var("s", "/a")}, {}])}]),
    ("a{oa{sa{sv}}}", [{"/a": {"i.f": {"p": Var("as", ["x"])}}, "/b": {}}]),
    ("sa{sv}as", ["i.f", {"p": Var("(ii)", [1, 2])}, ["q"]]),
]
HEADERS: list[dict[str, Any]] = [
    {"path": "/a/b", "interface": "a.b", "member": "M", "destination": ":1.2", "flags": 5},
    {"path": "/", "member": "M"},
    {"kind": wire.Kind.SIGNAL, "path": "/a", "interface": "a.b", "member": "M"},
    {"kind": wire.Kind.RETURN, "destination": ":1.2", "reply_serial": (1 << 32) - 1},
    {"kind": wire.Kind.ERROR, "error_name": "a.b.Error", "reply_serial": 1, "flags": 1},
]
both_orders = pytest.mark.parametrize("order", frames.ORDERS)


@pytest.mark.parametrize(("signature", "body"), VALUES)
def test_values_come_back_as_they_were(signature: str, body: list[Any]) -> None:
    message = wire.Message(path="/a", member="M", signature=signature, body=dressed(body), serial=7)
    got = wire.decode(wire.encode(message))
    assert (got.signature, bare(got.body)) == (signature, body)


@pytest.mark.parametrize("fields", HEADERS)
def test_headers_come_back_as_they_were(fields: dict[str, Any]) -> None:
    sent = wire.Message(serial=(1 << 32) - 1, **fields)
    got = wire.decode(wire.encode(sent))
    for name in ("path", "interface", "member", "destination", "error_name", "flags", "serial"):
        assert getattr(got, name) == getattr(sent, name), name
    assert got.kind == sent.kind
    assert (got.reply_serial or None) == sent.reply_serial


@both_orders
@pytest.mark.parametrize(("signature", "body"), VALUES)
def test_what_others_send_is_read(signature: str, body: list[Any], order: str) -> None:
    data = frames.call("/a", "a.b", "M", signature, body, sender=":1.9", serial=77, order=order)
    got = wire.decode(data)
    assert (got.path, got.interface, got.member) == ("/a", "a.b", "M")
    assert (got.sender, got.serial, got.signature) == (":1.9", 77, signature)
    assert bare(got.body) == body


@pytest.mark.parametrize(("signature", "body"), VALUES)
def test_bodies_are_marshalled_as_the_specification_has_it(signature: str, body: list[Any]) -> None:
    assert wire.encode_body(signature, dressed(body)) == frames.body_of(signature, body)


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)
PATHS = st.lists(st.from_regex("[A-Za-z0-9_]+", fullmatch=True), max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)
#: A complete type, and values of it.
Typed = tuple[str, st.SearchStrategy[Any]]
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "y": st.integers(0, 255),
    "n": st.integers(-(1 << 15), (1 << 15) - 1),
    "q": st.integers(0, (1 << 16) - 1),
    "i": st.integers(-(1 << 31), (1 << 31) - 1),
    "u": st.integers(0, (1 << 32) - 1),
    "h": st.integers(0, (1 << 32) - 1),
    "x": st.integers(-(1 << 63), (1 << 63) - 1),
    "t": st.integers(0, (1 << 64) - 1),
    "d": st.floats(allow_nan=False),
}
BASIC = NUMBERS | {
    "b": st.booleans(),
    "s": TEXTS,
    "o": PATHS,
    "g": st.sampled_from(["", "s", "a{sv}"]),
}


def containers(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    """Types with these within."""

    def array(kind: Typed) -> Typed:
        values = st.binary(max_size=5) if kind[0] == "y" else st.lists(kind[1], max_size=3)
        return f"a{kind[0]}", values

    def mapping(kinds: tuple[Typed, Typed]) -> Typed:
        (key, keys), (value, values) = kinds
        return f"a{{{key}{value}}}", st.dictionaries(keys, values, max_size=3)

    def struct(kinds: list[Typed]) -> Typed:
        members = st.tuples(*(values for _, values in kinds)).map(list)
        return f"({''.join(kind for kind, _ in kinds)})", members

    def variant(kind: Typed) -> Typed:
        return "v", kind[1].map(lambda value: Var(kind[0], value))

    return st.one_of(
        inner.map(array),
        st.tuples(st.sampled_from(sorted(BASIC.items())), inner).map(mapping),
        st.lists(inner, min_size=1, max_size=3).map(struct),
        inner.map(variant),
    )


ANY_TYPE: st.SearchStrategy[Typed] = st.recursive(
    st.sampled_from(sorted(BASIC.items())), containers, max_leaves=6
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """Any values, and their signature."""
    kinds = draw(st.lists(ANY_TYPE, max_size=4))
    return "".join(kind for kind, _ in kinds), [draw(values) for _, values in kinds]


def by_the_library(library: str, message: wire.Message, values: list[Any]) -> bytes:
    """A message with these values as the library itself encodes it."""
    lib = wire._import_library(library)
    fields = {name: getattr(message, name) for name in message.__dataclass_fields__}
    kind, flags = fields.pop("kind"), fields.pop("flags")
    fields["unix_fds"] = list(fields.pop("fds"))
    fields["body"] = dressed(values, lib.Variant)
    del fields["sender"]
    whole = lib.Message(
        message_type=lib.MessageType(int(kind)), flags=lib.MessageFlag(flags), **fields
    )
    return bytes(whole._marshall(negotiate_unix_fd=True))


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=300, deadline=None, database=None)
@given(
    body=bodies(),
    fields=st.sampled_from(HEADERS),
    fds=st.lists(st.just(0), max_size=2),
    serial=st.integers(1, (1 << 32) - 1),
)
def test_what_is_sent_is_byte_for_byte_what_the_library_would_send(
    library: str, body: tuple[str, list[Any]], fields: dict[str, Any], fds: list[int], serial: int
) -> None:
    signature, values = body
    message = wire.Message(
        signature=signature, body=dressed(values), fds=fds, serial=serial, **fields
    )
    assert wire.encode(message) == by_the_library(library, message, values)


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=300, deadline=None, database=None)
@given(body=bodies(), order=st.sampled_from(frames.ORDERS))
def test_values_are_read_as_the_library_reads_them(
    library: str, body: tuple[str, list[Any]], order: str
) -> None:
    signature, values = body
    data = frames.call("/a", "a.b", "M", signature, values, sender=":1.9", serial=7, order=order)
    unmarshaller = wire._import_library(f"{library}._private.unmarshaller")
    read = unmarshaller.Unmarshaller(io.BytesIO(data)).unmarshall()
    assert bare(wire.decode(data).body) == values == bare(list(read.body))


@both_orders
def test_flags_from_the_future_are_ignored(order: str) -> None:
    got = wire.decode(frames.call("/a", "a.b", "M", flags=0xF9, order=order))
    assert got.flags & wire.Flag.NO_REPLY_EXPECTED


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        pytest.param("s", ["a\0b"], id="NUL"),
        pytest.param("as", [["a", "\0"]], id="NUL in an array"),
        pytest.param("(ss)", [["a", "\0"]], id="NUL in a struct"),
        pytest.param("a{sv}", [{"a\0": Var("s", "b")}], id="NUL in a key"),
        pytest.param("a{sv}", [{"a": Var("v", Var("as", ["\0"]))}], id="NUL in a variant"),
        pytest.param("s", ["\udc80"], id="not UTF-8"),
        pytest.param("o", ["no path"], id="not a path"),
        pytest.param("o", ["/a\0"], id="path with NUL"),
        pytest.param("s", [1], id="wrong type"),
        pytest.param("s", [None], id="no value"),
        pytest.param("u", [-1], id="below its range"),
        pytest.param("q", [1 << 16], id="above its range"),
        pytest.param("ss", ["a"], id="too few"),
        pytest.param("s", ["a", "b"], id="too many"),
        pytest.param("(ss)", [["a"]], id="a struct too short"),
        pytest.param("a{", [{}], id="not a signature"),
        pytest.param("ay", [bytes(33 * MIB)], id="too large"),
    ],
)
def test_what_a_bus_would_hang_up_for_is_not_encoded(signature: str, body: list[Any]) -> None:
    message = wire.Message(path="/a", member="M", signature=signature, body=dressed(body), serial=1)
    with pytest.raises(wire.WireError):
        wire.encode(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "no path", "member": "M"},
        {"path": "/a", "member": "no member"},
        {"path": "/a"},
        {"path": "/a", "member": "M", "interface": "nodots"},
        {"path": "/a", "member": "M", "destination": "\0"},
        {"kind": wire.Kind.ERROR, "reply_serial": 1},
    ],
)
def test_headers_that_no_bus_takes_are_not_encoded(fields: dict[str, Any]) -> None:
    with pytest.raises(wire.WireError):
        wire.encode(wire.Message(serial=1, **fields))


@pytest.mark.parametrize(
    ("signature", "body"), [each for each in VALUES if each[0].startswith("a{")]
)
def test_a_body_marshalled_before_makes_the_same_message(signature: str, body: list[Any]) -> None:
    fields: dict[str, Any] = {"kind": wire.Kind.RETURN, "reply_serial": 9, "serial": 3}
    whole = wire.Message(signature=signature, body=dressed(body), **fields)
    empty = wire.Message(signature=signature, body=[{}], **fields)
    body_alone = wire.encode_body(signature, dressed(body))
    assert wire.encode_with_body(empty, body_alone) == wire.encode(whole)


@pytest.mark.parametrize("signature", ["a{sv}", "sa{sv}as", "a{oa{sa{sv}}}"])
def test_entries_marshalled_before_stand_for_their_dict(signature: str) -> None:
    values = [("Id", "t", 7), ("Name", "s", "web"), ("Up", "b", True), ("VMMs", "as", ("a", "b"))]
    properties = {key: wire.Variant(kind, value) for key, kind, value in values}

    def body(within: Any) -> list[Any]:
        return {
            "a{sv}": [within],
            "sa{sv}as": ["i.f", within, ["gone"]],
            "a{oa{sa{sv}}}": [{"/a": {"i.f": within}, "/b": {"i.f": within}}],
        }[signature]

    for _ in range(2):
        marshalled = wire.encode_body(signature, body(marshal.entries(values)))
        assert marshalled == wire.encode_body(signature, body(properties))


def test_a_body_marshalled_before_can_be_too_large() -> None:
    message = wire.Message(path="/a", member="M", signature="ay", body=[b""], serial=1)
    with pytest.raises(wire.WireError, match="larger than"):
        wire.encode_with_body(message, bytes(32 * MIB))


VALID = [
    frames.call("/a", "a.b", "M", signature, body, sender=":1.2", destination="a.b", order=order)
    for signature, body in VALUES
    for order in frames.ORDERS
]


@settings(max_examples=400, deadline=None, database=None)
@given(
    data=st.sampled_from(VALID),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400) | st.none(),
)
def test_garbage_is_a_wire_error_and_nothing_else(
    data: bytes, flips: list[tuple[int, int]], cut: int | None
) -> None:
    broken = bytearray(data)
    for place, value in flips:
        broken[place % len(broken)] = value
    with contextlib.suppress(wire.WireError):
        wire.decode(bytes(broken[:cut]))


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


VARIANT = frames.call("/a", "a.b", "M", "v", [Var("s", "hi")])
STRINGS = frames.call("/a", "a.b", "M", "as", [["hi"]])


def nested(depth: int) -> Var:
    value = Var("s", "core")
    for _ in range(depth - 1):
        value = Var("v", value)
    return value


@pytest.mark.parametrize(
    "data",
    [
        # Each of these made one of the libraries crash, loop, or answer without an error.
        pytest.param(changed(VARIANT, b"\1s\0\0", b"\0\0\0\0"), id="variant of no type"),
        pytest.param(changed(VARIANT, b"\1s\0", b"\2ss"), id="variant of two types"),
        pytest.param(
            changed(STRINGS, b"\2\0\0\0hi", b"\xff\xff\xff\xffhi"), id="length that wraps"
        ),
        pytest.param(changed(STRINGS, b"\7\0\0\0", b"\xff\xff\xff\xff"), id="array that wraps"),
        pytest.param(changed(STRINGS, b"\2as\0", b"\2{s\0"), id="entry outside of an array"),
        pytest.param(VARIANT[:-3], id="cut off"),
        pytest.param(VARIANT + b"\0", id="with something behind it"),
        pytest.param(VARIANT[:8], id="half a header"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"x" + VARIANT[1:], id="byte order x"),
        pytest.param(frames.call("/a", "a.b", "M", "v", [nested(65)]), id="too deep"),
        pytest.param(b"l\1\0\1" + bytes(12), id="no fields"),
        pytest.param(frames.frame(1, [(1, Var("s", "/a")), (3, "M")]), id="path of type s"),
        pytest.param(frames.frame(1, [(1, "/a"), (3, "M"), (8, Var("s", "s"))], b"\0" * 8), id="s"),
        pytest.param(frames.frame(1, [(1, "/a"), (3, "M")], b"\0" * 8), id="no signature"),
        pytest.param(frames.frame(1, [(1, "/a"), (3, "M"), (8, "s")]), id="no body"),
        pytest.param(frames.frame(9, [(1, "/a"), (3, "M")]), id="kind 9"),
        pytest.param(frames.frame(1, [(1, "/a")]), id="call without member"),
        pytest.param(frames.frame(4, [(1, "/a"), (3, "M")]), id="signal without interface"),
        pytest.param(frames.frame(3, [(5, 1)]), id="error without name"),
        pytest.param(frames.frame(2, [(1, "/a")]), id="reply to nothing"),
    ],
)
def test_what_no_bus_lets_through_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(data)


@both_orders
def test_variants_may_be_nested_as_deep_as_a_bus_lets_them(order: str) -> None:
    data = frames.call("/a", "a.b", "M", "v", [nested(64)], order=order)
    assert bare(wire.decode(data).body) == [nested(64)]


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def with_variants(signatures: list[str]) -> bytes:
    values = {f"key{number}": Var(kind, []) for number, kind in enumerate(signatures)}
    return frames.call("/", "a.b", "M", "a{sv}", [values])


def test_variants_of_many_types_are_refused() -> None:
    """Each costs time and memory; of one type there may be any number."""
    pairs = [f"a({first}{second})" for first in "ynqiuxtd" for second in "ynqiuxtd"]
    assert len(wire.decode(with_variants(pairs)).body[0]) == 64
    assert len(wire.decode(with_variants(pairs * 10)).body[0]) == 640
    with pytest.raises(wire.WireError, match="too many types"):
        wire.decode(with_variants([f"a({each})" for each in pairs + [pair * 2 for pair in pairs]]))


def test_a_call_is_not_full_of_variants() -> None:
    """Each takes its time. What was asked for may have any number."""
    body = frames.body_of("av", [[Var("y", 1)] * 2000])
    names = [(1, "/a"), (2, "a.b"), (3, "M"), (8, "av")]
    with pytest.raises(wire.TooMuch, match="at most 1024 variants"):
        wire.decode(frames.frame(frames.CALL, names, body))
    reply = wire.decode(frames.frame(2, [(5, 1), (8, "av")], body))
    assert reply.body == [[wire.Variant("y", 1)] * 2000]


@pytest.mark.parametrize("more", ["", "y" * 60, "y" * 240])
def test_hostile_signatures_are_not_remembered_for_ever(more: str) -> None:
    letters = b"ybnqiuxt"
    template = frames.call("/a", "a.b", "M", "v", [Var(f"a(ddddd{more})", [])])
    before = resident()
    for number in range(10_000):
        own = bytes(letters[number >> shift & 7] for shift in range(0, 15, 3))
        wire.decode(template.replace(b"ddddd", own))
    assert resident() - before < 5 * MIB


# What is told of a message that can't be decoded, or isn't yet


EXTRA = [(each, body[0]) for each, body in VALUES if len(frames.split(each)) == 1]


@both_orders
@pytest.mark.parametrize(("signature", "value"), EXTRA)
def test_unknown_header_fields_hide_no_known_ones(signature: str, value: Any, order: str) -> None:
    fields = [
        (1, "/a"),
        (99, Var(signature, value)),
        (3, "M"),
        (0, Var("s", "")),
        (9, 2),
        (7, ":1.5"),
    ]
    data = frames.frame(frames.CALL, fields, serial=5, order=order)
    known = {0: 5, 1: "/a", 3: "M", layout.UNIX_FDS: 2, layout.SENDER: ":1.5"}
    assert header_fields(data) == known


@given(data=st.binary(max_size=200) | st.sampled_from(VALID).map(lambda data: data[:60]))
def test_header_fields_of_anything_are_a_dict(data: bytes) -> None:
    assert isinstance(header_fields(data), dict)


@settings(deadline=None)
@given(
    data=st.sampled_from(VALID),
    flips=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_header_fields_are_of_their_types_or_missing(
    data: bytes, flips: list[tuple[int, int]]
) -> None:
    broken = bytearray(data)
    for place, value in flips:
        broken[place % len(broken)] = value
    for code, value in header_fields(bytes(broken)).items():
        assert isinstance(value, int if code in (0, 5, 9) else str)


def test_fields_before_the_first_broken_one_are_told() -> None:
    data = frames.frame(frames.CALL, [(7, ":1.5"), (9, Var("s", "many")), (3, "M")], serial=8)
    assert header_fields(data) == {0: 8, 7: ":1.5"}
