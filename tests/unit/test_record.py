"""What is kept of VMs on disk: that it comes back whole, or is known to be damaged."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.doubles import a_config, fill_disk
from vmbus.files import OpenFile
from vmbus.model import record as records
from vmbus.model.identity import Requester
from vmbus.model.record import Counters, Record, Store
from vmbus.model.state import State
from vmbus.reasons import Reason
from vmbus.spec import Net, VMConfig, host_cpus, host_memory_mib
from vmbus.vmm.run import Trace

pytestmark = pytest.mark.usefixtures("files_closed")


@pytest.fixture
def config(tmp_path: Path, files_closed: None) -> Iterator[VMConfig]:
    with a_config(tmp_path) as config:
        yield config


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of all VMs."""
    return tmp_path / "vm"


@pytest.fixture
def store(place: Path) -> Store:
    store = Store(place)
    assert store.open() == []
    return store


def _record(config: VMConfig, id: int = 7, **changes: Any) -> Record:
    """One in which no value is like another."""
    values: dict[str, Any] = {
        "id": id,
        "name": f"guest-{id}",
        "cid": 2048 + id,
        "requester": Requester(1000, 4711, "labël", ":1.5"),
        "config": config,
        "vmm": "crosvm",
        "kvm": True,
        "vsock": True,
        "state": State.STOPPING,
        "traces": [Trace(12, 1 << 40), Trace(13, 5)],
        "created": 1_700_000_000_000_001,
        "started": 1_700_000_000_000_002,
        "died": 1_700_000_000_000_003,
        "reason": Reason.CRASH,
        "status": -11,
        "last_words": "it said \"'\\ ünd\N{REPLACEMENT CHARACTER}",
        "asked_for": Reason.STOPPED,
        "killed_for": Reason.HANGUP,
        "halted": True,
        "ends_by": 12345.678901234,
    }
    return Record.model_construct(**(values | changes))


def _save(store: Store, record: Record) -> Path:
    directory = store.directory_of(record.id)
    directory.mkdir(exist_ok=True)
    store.save(record)
    return directory


def _seen(place: Path) -> list[Record]:
    """What the next service sees."""
    return Store(place).open()


def _values(record: Record) -> dict[str, Any]:
    """All of it, files by what is known of them."""
    values = {name: getattr(record, name) for name in Record.model_fields}
    values["config"] = record.config.model_dump()
    return values


# There and back


EVERY_KEY: dict[str, Any] = {
    "name": "guest-7",
    "vmm": "crosvm",
    "params": "a=\"b\" 'c' \\ ünd",
    "memory_mib": 64,
    "cpus": 1,
    "vsock": False,
    "protected": True,
    "balloon": False,
    "gdb_port": 1234,
    "kill_on_disconnect": True,
    "collect": "on-death",
    "initrd": "{}/initrd",
    "shared_dirs": [
        {"source": "/etc", "tag": "etc", "writable": True},
        {"source": "{}", "tag": "tmp"},
    ],
    "disks": [
        {"image": "{}/one", "id": "a.b", "direct": True},
        {"image": "{}/two", "writable": True},
    ],
}
NETS = [
    Net.model_construct(tap=OpenFile(-1, "tap0", writable=True, size=0), mac="02:00:00:00:00:01"),
    Net.model_construct(tap=OpenFile(1 << 20, "tap1", writable=True, size=0), mac=None),
]


def _there(value: Any, directory: Path) -> Any:
    """Paths filled in."""
    if isinstance(value, list):
        return [_there(each, directory) for each in value]
    if isinstance(value, dict):
        return {key: _there(each, directory) for key, each in value.items()}
    return value.replace("{}", str(directory)) if isinstance(value, str) else value


@pytest.mark.parametrize(
    "changes",
    [{}, EVERY_KEY, {"kernel": None, "bios": "{}/initrd"}],
    ids=["minimal", "every key", "bios"],
)
def test_record_comes_back_as_it_was(
    store: Store, place: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for name in ("initrd", "one", "two"):
        (tmp_path / name).write_bytes(bytes(512))
    with a_config(tmp_path, **_there(changes, tmp_path)) as config:
        record = _record(config)
        _save(store, record)
        (found,) = _seen(place)
        assert _values(found) == _values(record)
        assert type(found.state) is State
        assert all(type(each) is Trace for each in found.traces)
        assert [(file.fd, file.held) for file in found.config.files()] == [
            (-1, True) for _ in config.files()
        ]


def test_network_devices_come_back_as_they_were(
    store: Store, place: Path, config: VMConfig
) -> None:
    """One that is the name of a tap is no file that could be lost."""
    record = _record(config.model_copy(update={"net": NETS}))
    _save(store, record)
    (found,) = _seen(place)
    assert _values(found) == _values(record)
    assert [(net.tap.name, net.tap.held) for net in found.config.net] == [
        ("tap0", False),
        ("tap1", True),
    ]
    found.config.net[0].tap.check_open()
    with pytest.raises(ValueError, match=r"^tap1 is not open any more, since the service was rest"):
        found.config.net[1].tap.check_open()


def test_every_value_that_may_be_absent_may_be(store: Store, place: Path, config: VMConfig) -> None:
    nothing: dict[str, Any] = {"traces": [], "reason": None, "asked_for": None, "killed_for": None}
    record = _record(config, requester=Requester(0), last_words="", ends_by=0.0, **nothing)
    _save(store, record)
    assert [_values(each) for each in _seen(place)] == [_values(record)]


@pytest.mark.parametrize("state", list(State))
def test_every_state_comes_back(store: Store, place: Path, config: VMConfig, state: State) -> None:
    _save(store, _record(config, state=state))
    assert [each.state for each in _seen(place)] == [state]


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_comes_back(
    store: Store, place: Path, config: VMConfig, reason: Reason
) -> None:
    _save(store, _record(config, reason=reason, asked_for=reason, killed_for=reason))
    (found,) = _seen(place)
    assert (found.reason, found.asked_for, found.killed_for) == (reason, reason, reason)


def test_directory_whose_name_is_not_text_comes_back(
    store: Store, place: Path, tmp_path: Path
) -> None:
    """A caller can name it by a link; what counts is the name it really has."""
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    shared = [{"source": str(tmp_path / "link"), "tag": "odd"}]
    with a_config(tmp_path, shared_dirs=shared) as config:
        _save(store, _record(config))
    (found,) = _seen(place)
    assert found.config.shared_dirs[0].source.name == str(odd)


def test_vm_comes_back_on_a_host_that_has_become_smaller(
    store: Store, place: Path, config: VMConfig
) -> None:
    """CPUs go offline and memory away while a VM runs, and it runs on."""
    larger = {"memory_mib": host_memory_mib() + 1, "cpus": host_cpus() + 1}
    record = _record(config.model_copy(update=larger))
    _save(store, record)
    assert [_values(each) for each in _seen(place)] == [_values(record)]


def test_vms_come_back_oldest_first(store: Store, place: Path, config: VMConfig) -> None:
    for id in (10, 9, 100, 1):
        _save(store, _record(config, id))
    assert [each.id for each in _seen(place)] == [1, 9, 10, 100]


# Damage


def test_record_that_is_cut_off_anywhere_leaves_the_one_before(
    store: Store, place: Path, config: VMConfig
) -> None:
    _save(store, _record(config, state=State.STARTING))
    directory = _save(store, _record(config, state=State.RUNNING))
    whole = (directory / "record.json").read_bytes()
    for size in range(len(whole)):
        (directory / "record.json").write_bytes(whole[:size])
        assert [each.state for each in _seen(place)] == [State.STARTING]
    (directory / "record.json").write_bytes(whole)
    assert [each.state for each in _seen(place)] == [State.RUNNING]


def test_record_that_is_cut_off_anywhere_is_set_aside_where_there_is_no_other(
    store: Store, place: Path, config: VMConfig
) -> None:
    """With all that is beside it, and never in the way of another VM's."""
    directory = _save(store, _record(config))
    _save(store, _record(config, 8))
    (directory / "console.log").write_text("hello")
    aside = place / "damaged-7"
    whole = (directory / "record.json").read_bytes()
    for size in range(len(whole)):
        (directory / "record.json").write_bytes(whole[:size])
        for _ in range(2):
            assert [each.id for each in _seen(place)] == [8]
        assert (aside / "record.json").read_bytes() == whole[:size]
        assert (aside / "console.log").read_text() == "hello"
        aside.rename(directory)


def _with(**changes: Any) -> Any:
    return lambda text: json.dumps(json.loads(text) | changes).encode()


def _with_config(**changes: Any) -> Any:
    return lambda text: _with(config=json.loads(text)["config"] | changes)(text)


def _without(key: str) -> Any:
    return lambda text: json.dumps(
        {name: value for name, value in json.loads(text).items() if name != key}
    ).encode()


KERNEL = {"name": "x", "writable": False, "size": 0, "held": True}
DAMAGES = {
    "nothing": lambda _: b"",
    "zeros": lambda text: bytes(len(text)),
    "not text": lambda text: b"\xff" * len(text),
    "noise": lambda _: os.urandom(1000),
    "null": lambda _: b"null",
    "a list": lambda _: b"[]",
    "empty": lambda _: b"{}",
    "deep": lambda _: b"[" * 100_000,
    "twice": lambda text: text * 2,
    "another version": _with(version=2),
    "version 0": _with(version=0),
    "another VM's": _with(id=8),
    "a key too many": _with(more=1),
    "no cid": _without("cid"),
    "no traces": _without("traces"),
    "a state": _with(state="flying"),
    "a reason": _with(reason="boredom"),
    "a number": _with(created="soon"),
    "a trace": _with(traces=[{"pid": 1}]),
    "a requester": _with(requester={"pid": 1}),
    "no config": _with(config=None),
    "a key of the config": _with_config(more=1),
    "no memory": _with_config(memory_mib=0),
    "a file": _with_config(kernel="/etc/passwd"),
    "half a file": _with_config(kernel={"name": "x", "held": True}),
    "a file and more": _with_config(kernel=KERNEL | {"fd": 0}),
    "a disk": _with_config(disks=[{"image": None}]),
    "a tap": _with_config(net=[{"tap": "tap0"}]),
    "a directory": _with_config(shared_dirs=[{"source": 5, "tag": "x"}]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_record_that_is_damaged_leaves_the_one_before_or_is_set_aside(
    store: Store, place: Path, config: VMConfig, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is wrong is said in one line, which does not tell what stands there."""
    _save(store, _record(config, state=State.STARTING))
    directory = _save(store, _record(config))
    damaged = damage((directory / "record.json").read_bytes())
    (directory / "record.json").write_bytes(damaged)
    assert [each.state for each in _seen(place)] == [State.STARTING]
    (directory / "record.old").write_bytes(damaged)
    assert _seen(place) == []
    assert (place / "damaged-7" / "record.json").read_bytes() == damaged
    errors = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert [each.partition(" is ")[0] for each in errors[:3]] == [
        str(directory / name) for name in ("record.json", "record.json", "record.old")
    ]
    assert errors[3:] == [f"no record in {directory} can be read; it is set aside as damaged-7"]
    assert all("\n" not in each and len(each) < 1000 for each in errors)


def test_damaged_record_is_not_known_to_be_of_the_same_vm_again(
    store: Store, place: Path, config: VMConfig
) -> None:
    """What was set aside before under that number makes room for what is now."""
    for content in ("first", "second"):
        directory = store.directory_of(7)
        directory.mkdir()
        (directory / "record.json").write_text(content)
        assert _seen(place) == []
        assert (place / "damaged-7" / "record.json").read_text() == content


def test_record_that_is_no_file_is_set_aside(store: Store, place: Path, config: VMConfig) -> None:
    (store.directory_of(7) / "record.json").mkdir(parents=True)
    _save(store, _record(config, 8))
    assert [each.id for each in _seen(place)] == [8]
    assert (place / "damaged-7").is_dir()


def test_what_is_not_a_vms_is_removed(store: Store, place: Path, config: VMConfig) -> None:
    _save(store, _record(config))
    for name in ("9", "removed-5", "else"):
        (place / name / "tmp").mkdir(parents=True)
        (place / name / "tmp" / "control").touch()
    (place / "removed-5" / "record.json").write_text("anything")
    assert [each.id for each in _seen(place)] == [7]
    assert sorted(each.name for each in place.iterdir() if each.is_dir()) == ["7"]


# Where ids and CIDs go on


def _counted(place: Path) -> tuple[int, int, str]:
    store = Store(place)
    store.open()
    return store.counters.last_id, store.counters.last_cid, store.counters.bus


def test_counters_go_on(store: Store, place: Path) -> None:
    store.count(last_id=9)
    store.count(last_cid=3000, bus="abc")
    assert _counted(place) == (9, 3000, "abc")
    assert _counted(place) == (9, 3000, "abc")


@pytest.mark.parametrize("content", [None, "", "junk", "{}", '{"boot": 5}', "[1]"], ids=str)
def test_counters_that_are_lost_go_on_after_the_vms_that_are_there(
    store: Store, place: Path, config: VMConfig, content: str | None
) -> None:
    store.count(last_id=9, last_cid=3000, bus="abc")
    for id in (4, 6, 5):
        _save(store, _record(config, id, cid=2050 - id))
    (place / "counters.json").unlink()
    if content is not None:
        (place / "counters.json").write_text(content)
    assert _counted(place) == (6, 2046, "")


def test_counters_that_are_behind_the_vms_catch_up(
    store: Store, place: Path, config: VMConfig
) -> None:
    store.count(last_id=2, last_cid=2050, bus="abc")
    _save(store, _record(config, 5, cid=2060))
    assert _counted(place) == (5, 2060, "abc")


def test_nothing_outlives_the_boot(
    store: Store, place: Path, config: VMConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every process is gone by then, and their numbers are others'."""
    _save(store, _record(config))
    (place / "damaged-3").mkdir()
    store.count(last_id=9, last_cid=3000, bus="abc")
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(records, "_BOOT_ID", tmp_path / "boot")
    another = Store(place)
    assert another.open() == []
    assert another.counters == Counters(boot="another")
    assert list(place.iterdir()) == []
    assert place.stat().st_mode & 0o777 == 0o700
    another.count(last_id=1)
    assert _counted(place) == (1, 0, "")


# A full disk


FULL = pytest.mark.parametrize("name", ["record.new", "record.old", "record.json"])


@FULL
def test_record_that_cannot_be_written_changes_nothing(
    store: Store, place: Path, config: VMConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for state in (State.STARTING, State.RUNNING):
        _save(store, _record(config, state=state))
    with monkeypatch.context() as full:
        fill_disk(full, name)
        with pytest.raises(OSError, match="No space left on device"):
            store.save(_record(config, state=State.DEAD))
        assert [each.state for each in _seen(place)] == [State.RUNNING]
    store.save(_record(config, state=State.SUSPENDED))
    assert [each.state for each in _seen(place)] == [State.SUSPENDED]


@pytest.mark.parametrize("size", [0, 1, 100])
def test_record_of_which_a_part_can_be_written_changes_nothing(
    store: Store, place: Path, config: VMConfig, size: int
) -> None:
    directory = _save(store, _record(config, state=State.RUNNING))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.save(_record(config, state=State.DEAD))
        with pytest.raises(OSError, match="File too large"):
            store.count(last_cid=1 << 200, bus="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (directory / "record.new").stat().st_size == size
    assert [each.state for each in _seen(place)] == [State.RUNNING]
    assert store.counters.last_cid == _counted(place)[1] - 2055 == 0


def test_service_that_ends_between_two_steps_of_writing_has_written_it_or_not(
    store: Store, place: Path, config: VMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step was its last, the VM is there with what it was or with what it is."""
    _save(store, _record(config, state=State.RUNNING))
    directory = _save(store, _record(config, state=State.RUNNING))
    copies = place.parent / "copies"
    with monkeypatch.context() as watched:
        watched.setattr(os, "replace", _copying(copies, directory, os.replace))
        store.save(_record(config, state=State.DEAD))
    for copy in copies.iterdir():
        shutil.rmtree(directory)
        shutil.copytree(copy, directory)
        assert [each.state for each in _seen(place)] in ([State.RUNNING], [State.DEAD])
    assert (copies / "record.json").exists()


def _copying(copies: Path, directory: Path, really_replace: Any) -> Any:
    """Keeps how the directory looked before each step."""

    def replace(source: str, target: str) -> None:
        shutil.copytree(directory, copies / Path(target).name)
        really_replace(source, target)

    return replace


# Gone, and known to be


def test_deleted_vm_is_gone_at_once_for_the_next_service(
    store: Store, place: Path, config: VMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where ours ended while it was removing the files."""
    _save(store, _record(config))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(shutil, "rmtree", lambda *_, **__: None)
        store.delete(7)
    assert len(list(place.iterdir())) == 1
    assert _seen(place) == []
    assert list(place.iterdir()) == []


def test_deleting_leaves_nothing_and_the_others(
    store: Store, place: Path, config: VMConfig
) -> None:
    for id in (7, 8):
        _save(store, _record(config, id))
    store.delete(7)
    assert [each.name for each in place.iterdir()] == ["8"]
    assert [each.id for each in _seen(place)] == [8]


def test_deleting_what_is_gone_is_said_and_nothing_else(
    store: Store, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.delete(7)
    assert [each.message for each in caplog.records] == [f"{place}/7: No such file or directory"]


def test_death_that_was_told_is_known_by_the_next_service(
    store: Store, place: Path, config: VMConfig
) -> None:
    for id in (7, 8):
        _save(store, _record(config, id))
    for _ in range(2):
        store.told(7)
    assert [Store(place).was_told(id) for id in (7, 8)] == [True, False]
    store.delete(7)
    assert not store.was_told(7)
    with pytest.raises(FileNotFoundError):
        store.told(7)
