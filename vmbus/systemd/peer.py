"""A service of systemd's on the bus: called without being started, and believed by its owner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ..bus.connection import BUS_NAME, Connection, RemoteError
from ..bus.wire import Flag, Kind, Message


class Peer:
    """A well-known name with its one object and interface, whether somebody owns it or not.

    on_signal: gets the member and the arguments of its signals. Anybody can send a signal to us;
    those of others are dropped. on_owner: called when somebody else, or nobody, owns the name.
    """

    def __init__(
        self,
        connection: Connection,
        target: tuple[str, str, str],
        on_signal: Callable[[str, Sequence[Any]], None],
        on_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._name, self._path, self._interface = target
        self._on_signal = on_signal
        self._on_owner = on_owner
        self._signatures: dict[str, str] = {}
        self.owner = ""

    async def watch(self, signals: dict[str, str]) -> None:
        """Begin to hear signals, given with their signatures. Raises RemoteError or OSError."""
        self._signatures = signals
        rules = [f"sender='{BUS_NAME}',member='NameOwnerChanged',arg0='{self._name}'"]
        rules += [
            f"sender='{self._name}',interface='{self._interface}',member='{member}'"
            for member in signals
        ]
        for rule in rules:
            await self._connection.call_bus("AddMatch", "s", [f"type='signal',{rule}"])
        with contextlib.suppress(RemoteError):  # nobody owns it
            (owner,) = await self._connection.call_bus("GetNameOwner", "s", [self._name])
            self._owned_by(owner)

    def take(self, message: Message) -> None:
        """Take any signal of the connection."""
        if message.kind is not Kind.SIGNAL:
            return
        if message.sender == BUS_NAME:
            if message.member == "NameOwnerChanged" and message.body[0] == self._name:
                self._owned_by(message.body[2])
        elif message.sender == self.owner and message.interface == self._interface:
            member = message.member or ""
            if self._signatures.get(member) == message.signature:
                self._on_signal(member, message.body)

    async def call(self, member: str, signature: str, body: Sequence[Any]) -> Message:
        """See Connection.call."""
        return await self._connection.call(
            self._name,
            self._path,
            self._interface,
            member,
            signature,
            body,
            flags=Flag.NO_AUTOSTART,
        )

    def _owned_by(self, owner: str) -> None:
        if owner != self.owner:
            self.owner = owner
            self._on_owner()
