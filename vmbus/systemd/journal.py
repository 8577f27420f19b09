"""Log records in the journal, with fields to search by: `journalctl VMBUS_VM=web`.

A record that is about a VM says so: `log.info("…", extra={"vm": identity})`; what begins or ends a
VM has besides `"event"`: one of `MESSAGE_IDS`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator

from ..model.identity import Identity

#: What `"event"` can be, with the id that the journal knows such an entry by, for ever.
MESSAGE_IDS = {
    "created": "72e99420c5e447b58e2308fc6575a6f6",
    "started": "40ac3d0dbba4428684c108984dc597e9",
    "died": "0619c355d9574c5ea92e461af72e46d5",
}
_SOCKET = "/run/systemd/journal/socket"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def journal_handler(identifier: str) -> logging.Handler | None:
    """A handler for the root logger where stderr leads to the journal, None where it doesn't.

    identifier: what the journal shows as the name of the program.
    """
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return None
    if os.environ.get("JOURNAL_STREAM") != f"{stderr.st_dev}:{stderr.st_ino}":
        return None
    return JournalHandler(identifier)


class JournalHandler(logging.Handler):
    """Sends each record as one entry, and waits for nobody.

    While the journal takes none, they are lost; the next entry says how many, in VMBUS_LOST.
    """

    def __init__(self, identifier: str, address: str = _SOCKET) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self._identifier = identifier
        self._address = address
        self._lost = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            entry = b"".join(_field(*each) for each in self._fields(record))
        except Exception:
            self.handleError(record)
            return
        try:
            self._send(entry)
            self._lost = 0
        except OSError:
            self._lost += 1

    def close(self) -> None:
        self._sock.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> Iterator[tuple[str, object]]:
        yield "MESSAGE", self.format(record)
        yield "PRIORITY", _priority(record.levelno)
        yield "SYSLOG_IDENTIFIER", self._identifier
        yield "CODE_FILE", record.pathname
        yield "CODE_LINE", record.lineno
        yield "CODE_FUNC", record.funcName
        vm = getattr(record, "vm", None)
        if isinstance(vm, Identity):
            yield "VMBUS_VM", vm.name
            yield "VMBUS_VM_ID", vm.id
            yield "VMBUS_CID", vm.cid
            yield "VMBUS_REQUESTER_UID", vm.requester.uid
        event = MESSAGE_IDS.get(getattr(record, "event", ""))
        if event is not None:
            yield "MESSAGE_ID", event
        if self._lost:
            yield "VMBUS_LOST", self._lost

    def _send(self, entry: bytes) -> None:
        try:
            self._sock.sendto(entry, self._address)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            with _sealed(entry) as fd:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                self._sock.sendmsg([b""], rights, 0, self._address)


def _field(name: str, value: object) -> bytes:
    data = str(value).encode("utf-8", "replace")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    # With its length before it, so that nothing in it can pass for another field.
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)


@contextlib.contextmanager
def _sealed(data: bytes) -> Iterator[int]:
    """A file of this content that nobody can change, as the journal wants it."""
    with open(
        os.memfd_create("vmbus-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb"
    ) as file:
        file.write(data)
        file.flush()
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        yield file.fileno()
