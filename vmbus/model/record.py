"""What the service keeps of each VM on disk, so that the next one can go on where it ended.

One directory a VM, one file in it, which is replaced whole; the one before it stays beside it, for
the case that the newer is damaged. Nothing here outlives the boot: nor does any VM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..files import OpenFile
from ..guest.report import Payload
from ..reasons import Reason
from ..spec import VMConfig
from ..vmm.run import Trace
from .identity import Requester
from .state import State

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORD, _OLDER, _NEWER = "record.json", "record.old", "record.new"
_TOLD = "told"
_COUNTERS, _NEWER_COUNTERS = "counters.json", "counters.new"


class Record(BaseModel):
    """One VM, as it is written down. Times are microseconds since the epoch.

    asked_for, killed_for: what it is about to end for. halted: whether its vCPUs were to stop.
    ends_by: when a Stop runs out of time, in seconds since boot. ready_by: see Ledger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    id: int
    name: str
    cid: int
    requester: Requester
    config: VMConfig
    vmm: str
    kvm: bool
    vsock: bool
    state: State
    traces: list[Trace]
    created: int
    started: int
    died: int
    reason: Reason | None
    status: int
    last_words: str
    asked_for: Reason | None
    killed_for: Reason | None
    halted: bool
    ends_by: float
    payload: Payload = Payload.NONE
    payload_status: int = -1
    status_text: str = ""
    ready_by: float = 0.0


class Counters(BaseModel):
    """Where ids and CIDs go on, and for whom: neither is worth anything in another boot.

    bus: the bus on which the connections of requesters have their names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    boot: str
    bus: str = ""
    last_id: int = 0
    last_cid: int = 0


class _WrittenFiles:
    """Files as a record has them: without their descriptors."""

    def open(self, source: object, *, writable: bool) -> OpenFile:
        return _lost(source)

    def open_disk(self, source: object, *, writable: bool) -> OpenFile:
        return _lost(source)

    def open_tap(self, source: object) -> OpenFile:
        return _lost(source)

    def directory(self, source: object) -> OpenFile:
        return _lost(source)


def _lost(source: object) -> OpenFile:
    try:
        return OpenFile.lost(source)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what is known of a file: {error}") from None


class Store:
    """The directory of all VMs. What writes to it raises OSError, with nothing changed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.counters = Counters(boot=_BOOT_ID.read_text().strip())

    def open(self) -> list[Record]:
        """Make the directory ready, and return what the service before us left, oldest first."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._read_counters()
        if found is not None and found.boot != self.counters.boot:
            log.info("%s is of another boot; nothing in it is left to find", self._directory)
            shutil.rmtree(self._directory)
            self._directory.mkdir(mode=0o700)
            found = None
        (self._directory / "counters.new").unlink(missing_ok=True)
        records = sorted(self._records(), key=lambda record: record.id)
        self.counters = (found or self.counters).model_copy(
            update={
                "last_id": max([found.last_id if found else 0, *(each.id for each in records)]),
                "last_cid": max([found.last_cid if found else 0, *(each.cid for each in records)]),
            }
        )
        return records

    def count(self, **changes: Any) -> None:
        """Remember how far ids and CIDs have got, or on which bus we are."""
        counters = self.counters.model_copy(update=changes)
        if counters != self.counters:
            newer = f"{self._directory}/{_NEWER_COUNTERS}"
            _write(newer, counters.model_dump_json())
            os.replace(newer, f"{self._directory}/{_COUNTERS}")
            self.counters = counters

    def directory_of(self, id: int) -> Path:
        return self._directory / str(id)

    def save(self, record: Record) -> None:
        """Write a VM down."""
        directory = f"{self._directory}/{record.id}/"
        _write(directory + _NEWER, record.model_dump_json())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory + _OLDER)
        with contextlib.suppress(FileNotFoundError):
            os.link(directory + _RECORD, directory + _OLDER)
        os.replace(directory + _NEWER, directory + _RECORD)

    def told(self, id: int) -> None:
        """Remember that everybody knows of a VM's death: the shortest way there is to do so."""
        os.close(os.open(self.directory_of(id) / _TOLD, os.O_CREAT | os.O_CLOEXEC, 0o600))

    def was_told(self, id: int) -> bool:
        """Whether everybody knows of a VM's death."""
        return (self.directory_of(id) / _TOLD).exists()

    def delete(self, id: int) -> None:
        """Forget a VM and its files, all at once as far as the next service can see."""
        going = self._directory / f"removed-{id}"
        try:
            os.rename(self.directory_of(id), going)
        except OSError as error:
            log.warning("%s: %s", self.directory_of(id), error.strerror)
        shutil.rmtree(going, ignore_errors=True)

    def _read_counters(self) -> Counters | None:
        try:
            return Counters.model_validate_json((self._directory / _COUNTERS).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            # The ids of VMs that are gone may be given again; those that are there keep theirs.
            log.error("%s is damaged: %s", self._directory / _COUNTERS, _in_one_line(error))
            return None

    def _records(self) -> Iterator[Record]:
        for directory in self._directory.iterdir():
            if not directory.is_dir() or directory.name.startswith("damaged-"):
                continue
            found = _read(directory) if directory.name.isdecimal() else None
            if found is not None:
                yield found
            elif any((directory / name).exists() for name in (_RECORD, _OLDER)):
                self._set_aside(directory)
            else:
                shutil.rmtree(directory, ignore_errors=True)

    def _set_aside(self, directory: Path) -> None:
        """Keep what can't be read for people to look at; its VM, if it runs, is left alone."""
        if not directory.name.isdecimal():
            shutil.rmtree(directory, ignore_errors=True)
            return
        aside = directory.with_name(f"damaged-{directory.name}")
        log.error("no record in %s can be read; it is set aside as %s", directory, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)


def _read(directory: Path) -> Record | None:
    """The newest record that can be read."""
    for name in (_RECORD, _NEWER, _OLDER):
        try:
            text = (directory / name).read_text()
            record = Record.model_validate_json(text, context=_WrittenFiles())
            if str(record.id) == directory.name:
                return record
            log.error("%s is of another VM", directory / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.error("%s is damaged: %s", directory / name, _in_one_line(error))
    return None


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False, include_input=False)
        return json.dumps([(*each["loc"], each["msg"]) for each in problems[:3]])
    return str(error).replace("\n", " ")


def _write(path: str, text: str) -> None:
    """Write a file whole. Each change of each VM is, so this is the shortest way to do it."""
    data = text.encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(file, data) :]
    finally:
        os.close(file)
