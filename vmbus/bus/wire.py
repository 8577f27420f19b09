"""Messages there and back, and the D-Bus library, reduced to what vmbus takes from it: the way in.

This is the only module that imports dbus-next (or dbus-fast, which has the same interface and is
used where it is installed): it finds the bus, authenticates and says Hello. Everything above sees
`Message` and `Variant` alone.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import layout, marshal, unmarshal
from .layout import MAX_MESSAGE
from .layout import Variant as Variant

#: How long connecting, authenticating and Hello may take together, in seconds.
CONNECT_TIMEOUT = 10.0


def _library_name() -> str:
    chosen = os.environ.get("VMBUS_DBUS_LIBRARY")
    if chosen in ("dbus_next", "dbus_fast"):
        return chosen
    return "dbus_fast" if importlib.util.find_spec("dbus_fast") else "dbus_next"


def _import_library(name: str) -> Any:
    # Where PyGObject is installed dbus-next would load all of GLib, for a main loop not ours.
    loaded = sys.modules.get("gi.repository")
    sys.modules["gi.repository"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["gi.repository"]
        if loaded is not None:
            sys.modules["gi.repository"] = loaded


LIBRARY = _library_name()
_aio: Any = _import_library(f"{LIBRARY}.aio")


class Kind(enum.IntEnum):
    CALL = 1
    RETURN = 2
    ERROR = 3
    SIGNAL = 4


class Flag(enum.IntFlag):
    NO_REPLY_EXPECTED = 1
    NO_AUTOSTART = 2
    ALLOW_INTERACTIVE_AUTHORIZATION = 4


class WireError(Exception):
    """A message that can't be encoded or decoded."""


class TooMuch(WireError):
    """A message that is not decoded for what there is in it. Says how much there can be."""


@dataclass(slots=True)
class Message:
    """One D-Bus message. `fds` are open descriptors; whoever holds the message owns them."""

    kind: Kind = Kind.CALL
    destination: str | None = None
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    signature: str = ""
    body: Sequence[Any] = ()
    flags: int = 0
    error_name: str | None = None
    reply_serial: int | None = None
    sender: str | None = None
    serial: int = 0
    fds: Sequence[int] = ()


def decode(frame: bytes) -> Message:
    """Decode one whole message, without its descriptors. Raises WireError."""
    try:
        fields, body = unmarshal.read(frame)
    except unmarshal.TooMuch as error:
        raise TooMuch(str(error)) from error
    except Exception as error:
        raise WireError(f"{type(error).__name__}: {error}") from error
    return Message(
        kind=Kind(frame[1]),
        destination=fields.get(layout.DESTINATION),
        path=fields.get(layout.PATH),
        interface=fields.get(layout.INTERFACE),
        member=fields.get(layout.MEMBER),
        signature=fields.get(layout.SIGNATURE, ""),
        body=body,
        flags=frame[2],
        error_name=fields.get(layout.ERROR_NAME),
        reply_serial=fields.get(layout.REPLY_SERIAL),
        sender=fields.get(layout.SENDER),
        serial=fields[0],
    )


def encode(message: Message) -> bytes:
    """Encode a message. Raises WireError for what a bus would disconnect us for."""
    return encode_with_body(message, encode_body(message.signature, message.body))


def encode_with_body(message: Message, body: bytes) -> bytes:
    """Encode a message whose body is marshalled already. Raises WireError."""
    fields = (
        (layout.PATH, message.path),
        (layout.INTERFACE, message.interface),
        (layout.MEMBER, message.member),
        (layout.ERROR_NAME, message.error_name),
        (layout.REPLY_SERIAL, message.reply_serial),
        (layout.DESTINATION, message.destination),
        (layout.SIGNATURE, message.signature or None),
        (layout.UNIX_FDS, len(message.fds) or None),
    )
    known = [(code, value) for code, value in fields if value is not None]
    try:
        head = marshal.header(message.kind, message.flags, message.serial, len(body), known)
    except Exception as error:
        raise WireError(f"{type(error).__name__}: {error}") from error
    if len(head) + len(body) > MAX_MESSAGE:
        size = len(head) + len(body)
        raise WireError(f"a message of {size} bytes is larger than {MAX_MESSAGE}")
    return head + body


def encode_body(signature: str, body: Sequence[Any]) -> bytes:
    """Marshal values as they stand in a message of that signature. Raises WireError."""
    try:
        return marshal.body(signature, body)
    except Exception as error:
        raise WireError(f"{type(error).__name__}: {error}") from error


class _Bus(_aio.MessageBus):  # type: ignore[misc]
    def _setup_socket(self) -> None:
        # dbus-next connects here, and forgets its socket when it can't.
        try:
            super()._setup_socket()
        except BaseException:
            if getattr(self, "_sock", None) is not None:
                self._stream.close()
                self._sock.close()
            raise

    async def _auth_readline(self) -> str:
        # The library's own loop never ends, and never yields, when the bus hangs up here.
        line = b""
        while not line.endswith(b"\r\n"):
            chunk = await self._loop.sock_recv(self._sock, 256)
            if not chunk or len(line) > 4096:
                raise ConnectionError("the bus hung up during authentication")
            line += chunk
        return line[:-2].decode("ascii", "replace")


async def join(address: str) -> tuple[socket.socket, str]:
    """Connect, authenticate and say Hello.

    Returns the socket, from now on the caller's to read, write and close, and the unique name.
    Raises OSError or TimeoutError when there is no bus to talk to.
    """
    try:
        bus = _Bus(bus_address=address, negotiate_unix_fd=True)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await bus.connect()
        except BaseException:
            _abandon(bus)
            raise
    except TimeoutError:
        raise TimeoutError(f"it did not answer within {CONNECT_TIMEOUT:g} s") from None
    except OSError:
        raise
    except EOFError:
        raise ConnectionError("the bus hung up") from None
    except Exception as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    loop = asyncio.get_running_loop()
    loop.remove_reader(bus._fd)
    loop.remove_writer(bus._fd)
    # The library's objects go; the connection itself stays in our own descriptor.
    ours = socket.socket(fileno=os.dup(bus._fd))
    ours.setblocking(False)
    name = str(bus.unique_name)
    bus._stream.close()
    bus._sock.close()
    if not name.startswith(":"):
        # dbus-next takes the text of an error for the name.
        ours.close()
        raise ConnectionError(f"the bus refused us: {name}")
    return ours, name


def _abandon(bus: Any) -> None:
    sock = getattr(bus, "_sock", None)
    if sock is None or sock.fileno() < 0:
        return
    loop = asyncio.get_running_loop()
    loop.remove_reader(sock.fileno())
    loop.remove_writer(sock.fileno())
    bus._stream.close()
    sock.close()
