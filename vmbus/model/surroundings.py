"""What all VMs have around them, and what each needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..guest.vsock import Family
from ..settings import Settings
from .identity import Observer
from .record import Store
from .watch import Watch

if TYPE_CHECKING:
    from .ledger import Ledger


class Keep(Protocol):
    """Where descriptors outlive the service, if it has such a place: the service manager."""

    def store(self, name: str, fd: int) -> None:
        """Keep a copy for the next service, under a name that no other has."""

    def forget(self, name: str) -> None:
        """Let go of what was kept under that name, if anything was."""


class Placement(Protocol):
    """Where the processes of a VM are put before they run. What fails there is not the VM's end."""

    async def put(self, vm: Ledger, pids: Sequence[int]) -> None:
        """Put them into a place of their own."""

    def clear(self, vm: Ledger) -> None:
        """End whatever is left in the place of a VM that has ended."""


class NoKeep:
    """No place: what is open ends with the service."""

    def store(self, name: str, fd: int) -> None:
        """See Keep.store."""

    def forget(self, name: str) -> None:
        """See Keep.forget."""


class Anywhere:
    """No place of their own."""

    async def put(self, vm: Ledger, pids: Sequence[int]) -> None:
        """See Placement.put."""

    def clear(self, vm: Ledger) -> None:
        """See Placement.clear."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a VM is given to live with."""

    settings: Settings
    observer: Observer
    store: Store
    keep: Keep = field(default_factory=NoKeep)
    placement: Placement = field(default_factory=Anywhere)
    watch: Watch = field(default_factory=Watch)
    vsock: Family = field(default_factory=Family)
