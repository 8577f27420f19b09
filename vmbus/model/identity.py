"""Who a VM is, who asked for it, and who is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .machine import Machine


@dataclass(frozen=True, slots=True)
class Requester:
    """Who called Create, as the bus vouches for it. `sid` is empty where there is no label.

    connection: the unique name on the bus, good for as long as the bus itself is there.
    """

    uid: int
    pid: int = 0
    sid: str = ""
    connection: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a VM is called, for as long as it exists."""

    id: int
    name: str
    cid: int
    directory: Path
    requester: Requester


class Observer(Protocol):
    """Who is told of changes, in the order in which they happen."""

    def added(self, vm: Machine) -> None:
        """The VM exists."""

    def restored(self, vm: Machine) -> None:
        """The VM exists, and did so before the service."""

    def changed(self, vm: Machine, names: Sequence[str]) -> None:
        """These attributes of the VM have new values."""

    def died(self, vm: Machine) -> None:
        """The VM is dead or failed, and `changed` has said so.

        When everybody has been told, `vm.death_was_told` is to be called.
        """

    def removed(self, vm: Machine) -> None:
        """The VM exists no more."""
