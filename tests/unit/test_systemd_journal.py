"""Log records as the journal gets them, read from a socket as the journal reads them."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import socket
import struct
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmbus.model.identity import Identity, Requester
from vmbus.systemd.journal import MESSAGE_IDS, JournalHandler, journal_handler

pytestmark = pytest.mark.usefixtures("files_closed")

WEB = Identity(3, "web", 1002, Path("/nowhere"), Requester(uid=1000, pid=77))


class Journal:
    """The journal's end, and a logger that writes to it."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "journal")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.address)
        self.sock.setblocking(False)
        self.handler = JournalHandler("vmbusd", self.address)
        self.log = logging.Logger("vmbus.test")
        self.log.addHandler(self.handler)

    def entry(self) -> dict[str, str]:
        """The next entry, by the journal's rules. No field may come twice."""
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 1)
        for fd in fds:
            assert not data
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 0xF == 0xF
            with open(fd, "rb") as file:
                file.seek(0)
                data = file.read()
        pairs = list(_fields(data))
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def close(self) -> None:
        self.handler.close()
        self.sock.close()


def _fields(data: bytes) -> Iterator[tuple[str, str]]:
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", data)
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
        yield name.decode(), value.decode()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def test_an_entry_says_what_where_and_how_bad(journal: Journal) -> None:
    """Priorities are syslog's."""
    for level, priority in ((50, "2"), (40, "3"), (30, "4"), (20, "6"), (10, "7"), (35, "4")):
        journal.log.log(level, "it is %d", level)
        entry = journal.entry()
        assert (entry["MESSAGE"], entry["PRIORITY"]) == (f"vmbus.test: it is {level}", priority)
        assert entry["SYSLOG_IDENTIFIER"] == "vmbusd"
        assert Path(entry["CODE_FILE"]).name == "test_systemd_journal.py"
        assert entry["CODE_FUNC"] == "test_an_entry_says_what_where_and_how_bad"
        assert entry["CODE_LINE"].isdigit()
        assert not any(name.startswith("VMBUS_") for name in entry)


def test_a_record_about_a_vm_can_be_found_by_it(journal: Journal) -> None:
    """By its name, id, CID, and by who asked for it."""
    journal.log.info("hello", extra={"vm": WEB})
    entry = journal.entry()
    assert {name: value for name, value in entry.items() if name.startswith("VMBUS_")} == {
        "VMBUS_VM": "web",
        "VMBUS_VM_ID": "3",
        "VMBUS_CID": "1002",
        "VMBUS_REQUESTER_UID": "1000",
    }
    assert "MESSAGE_ID" not in entry


def test_beginnings_and_ends_have_ids_that_stay(journal: Journal) -> None:
    """Each another; what is no such event has none."""
    for event in ("created", "started", "died"):
        journal.log.info("now", extra={"vm": WEB, "event": event})
        assert journal.entry()["MESSAGE_ID"] == MESSAGE_IDS[event]
    assert len({uuid.UUID(each) for each in MESSAGE_IDS.values()}) == len(MESSAGE_IDS) == 3
    journal.log.info("now", extra={"vm": WEB, "event": "lunch"})
    assert "MESSAGE_ID" not in journal.entry()


@pytest.mark.parametrize(
    "hostile",
    ["x\nPRIORITY=0\nVMBUS_VM=db", "x\n", "\n", "a=b", "\nMESSAGE\n\x01\0\0\0\0\0\0\0", "\0\udc80"],
)
def test_no_text_can_pass_for_a_field(journal: Journal, hostile: str) -> None:
    """Whatever a guest, a caller or a VMM has put into it."""
    vm = Identity(3, hostile, 1002, Path("/nowhere"), Requester(uid=1000))
    journal.log.info("said: %s", hostile, extra={"vm": vm})
    entry = journal.entry()
    shown = hostile.encode("utf-8", "replace").decode()
    assert entry["MESSAGE"] == f"vmbus.test: said: {shown}"
    assert (entry["VMBUS_VM"], entry["PRIORITY"]) == (shown, "6")


def test_a_failure_comes_with_its_traceback_in_one_entry(journal: Journal) -> None:
    """Line breaks and all."""
    try:
        raise RuntimeError("no")
    except RuntimeError:
        journal.log.exception("internal error")
    lines = journal.entry()["MESSAGE"].splitlines()
    assert lines[:2] == ["vmbus.test: internal error", "Traceback (most recent call last):"]
    assert lines[-1] == "RuntimeError: no"


def test_an_entry_of_any_size_arrives(journal: Journal) -> None:
    """One that no datagram holds comes as a sealed file."""
    text = "x" * (8 << 20)
    journal.log.info("%s", text)
    assert journal.entry()["MESSAGE"] == f"vmbus.test: {text}"


def test_a_journal_that_hangs_holds_nobody_up(journal: Journal) -> None:
    """What it has no room for is lost, and the first entry after it says how much that was."""
    for number in range(2000):
        journal.log.info("%d", number)
    arrived = 0
    while True:
        try:
            journal.entry()
        except BlockingIOError:
            break
        arrived += 1
    assert 0 < arrived < 2000
    for expected in (str(2000 - arrived), None):
        journal.log.info("back")
        assert journal.entry().get("VMBUS_LOST") == expected


def test_a_journal_that_went_away_is_found_again(journal: Journal) -> None:
    """At the same address."""
    journal.sock.close()
    journal.log.info("to nobody")
    os.unlink(journal.address)
    journal.log.info("to nobody either")
    journal.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.sock.bind(journal.address)
    journal.log.info("back")
    assert journal.entry()["VMBUS_LOST"] == "2"


def test_the_journal_is_used_only_where_stderr_leads_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As JOURNAL_STREAM says; it may be inherited by somebody whose stderr was redirected."""
    with (tmp_path / "stderr").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        found = os.fstat(file.fileno())
        cases: list[tuple[str | None, bool]] = [
            (None, False),
            ("", False),
            ("8:1", False),
            (f"{found.st_dev}:{found.st_ino + 1}", False),
            (f"{found.st_dev}:{found.st_ino}", True),
        ]
        for value, expected in cases:
            if value is None:
                monkeypatch.delenv("JOURNAL_STREAM", raising=False)
            else:
                monkeypatch.setenv("JOURNAL_STREAM", value)
            handler = journal_handler("vmbusd")
            assert isinstance(handler, JournalHandler) is expected
            if handler is not None:
                handler.close()


@pytest.mark.parametrize("stderr", [None, io.StringIO()])
def test_a_process_without_stderr_has_no_journal(
    monkeypatch: pytest.MonkeyPatch, stderr: Any
) -> None:
    """Nor one whose stderr is no file."""
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    assert journal_handler("vmbusd") is None
