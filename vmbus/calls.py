"""One call of the service by a client: its types from the contract, its errors as exceptions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from . import errors
from .bus.connection import Connection, RemoteError
from .bus.contract import BUS_NAME, interfaces
from .bus.wire import Kind, Message, WireError
from .errors import InvalidArgs, InvalidConfig

#: What the bus answers in the place of a service that isn't there, or left over the call.
_GONE = ("NoReply", "ServiceUnknown", "NameHasNoOwner", "Disconnected")

_ERRORS = {
    kind.dbus_name: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.VMBusError)
}


class ServiceGone(RemoteError):
    """The service is not running, or left before it answered; what it had begun may go on."""


async def call(
    connection: Connection,
    target: tuple[str, str, str],
    args: Sequence[Any],
    *,
    fds: Sequence[int],
    flags: int,
    timeout: float | None,
) -> Message:
    """Call a method: its object, interface and name. Descriptors come only where it gives one."""
    path, interface, member = target
    types = interfaces()[interface].methods.get(member)
    if types is None:
        raise errors.UnknownMethod(f"{interface} has no method {member}")
    try:
        reply = await connection.call(
            BUS_NAME,
            path,
            interface,
            member,
            types.takes,
            args,
            fds=fds,
            flags=flags,
            timeout=timeout,
        )
    except RemoteError as error:
        raise _typed(error) from None
    except WireError as error:
        raise InvalidArgs(f"{member} can't be carried by the bus: {error}") from None
    except TimeoutError:
        raise TimeoutError(f"no answer to {member} in {timeout:g} s") from None
    if reply.signature != types.gives or len(reply.fds) != types.gives.count("h"):
        close_all(reply.fds)
        raise RemoteError(errors.VMBusError.dbus_name, f"{member} was answered wrongly")
    return reply


def refusal(received: Message) -> Message:
    """The answer to a call that was made to a client."""
    return Message(
        kind=Kind.ERROR,
        destination=received.sender,
        reply_serial=received.serial,
        error_name=errors.UnknownMethod.dbus_name,
        signature="s",
        body=["this is a client, it has no methods"],
    )


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came along with a message."""
    for fd in fds:
        os.close(fd)


def _typed(error: RemoteError) -> Exception:
    short = error.name.removeprefix("org.freedesktop.DBus.Error.")
    if short in _GONE or short.startswith("Spawn."):
        return ServiceGone(error.name, error.text)
    kind = _ERRORS.get(error.name)
    if kind is None:
        return error
    # The problems come as one text; taken apart and put together it might not be the same.
    return InvalidConfig([error.text]) if kind is InvalidConfig else kind(error.text)
