"""How much one user, and all together, may take of the host through the service."""

from __future__ import annotations

import enum
from collections import Counter

from ..errors import LimitExceeded
from ..settings import Limit, LimitSettings


class Kind(enum.Enum):
    """What is limited; the value completes the sentence "there can be no more than N ..."."""

    VMS = "VMs"
    MEMORY = "MiB of memory in VMs that run"
    CALLS = "calls under way"
    CONSOLES = "open consoles"
    FILES = "open files of VMs that have not been started"


class Lease:
    """A share that was taken; it is given back once, however often `release` is called."""

    __slots__ = ("_amount", "_kind", "_limits", "_uid")

    def __init__(self, limits: Limits, kind: Kind, uid: int, amount: int) -> None:
        self._limits = limits
        self._kind = kind
        self._uid = uid
        self._amount = amount

    def release(self) -> None:
        """Give it back."""
        amount, self._amount = self._amount, 0
        self._limits.give(self._kind, self._uid, amount)


class Limits:
    """What is taken, by user and in all."""

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._taken: dict[Kind, Counter[int]] = {kind: Counter() for kind in Kind}
        self._in_all: Counter[Kind] = Counter()

    def take(self, kind: Kind, uid: int, amount: int = 1, *, firm: bool = True) -> Lease:
        """Take a share. Raises LimitExceeded, with nothing taken, unless it is not `firm`."""
        limit: Limit = getattr(self._limits, kind.name.lower())
        if firm and self._taken[kind][uid] + amount > limit.per_user:
            raise LimitExceeded(f"a user can have no more than {limit.per_user} {kind.value}")
        if firm and self._in_all[kind] + amount > limit.in_all:
            raise LimitExceeded(f"there can be no more than {limit.in_all} {kind.value}")
        self._taken[kind][uid] += amount
        self._in_all[kind] += amount
        return Lease(self, kind, uid, amount)

    def give(self, kind: Kind, uid: int, amount: int) -> None:
        """Take back what a lease had."""
        self._in_all[kind] -= amount
        self._taken[kind][uid] -= amount
        if self._taken[kind][uid] <= 0:
            del self._taken[kind][uid]


class Shares:
    """What one VM has of what its requester may take. Made at Create; raises LimitExceeded.

    firm: false for a VM that is there already, whatever the limits have become since.
    """

    def __init__(self, limits: Limits, uid: int, *, files: int, firm: bool = True) -> None:
        self._limits = limits
        self._uid = uid
        self._vm = limits.take(Kind.VMS, uid, firm=firm)
        self._memory: Lease | None = None
        try:
            self._files = limits.take(Kind.FILES, uid, files, firm=firm)
        except LimitExceeded:
            self._vm.release()
            raise

    def run(self, memory: int) -> None:
        """The VM is to run with so much memory, in MiB. Raises LimitExceeded."""
        self._memory = self._limits.take(Kind.MEMORY, self._uid, memory)

    def runs(self, memory: int) -> None:
        """The VM runs with so much memory already, whatever the limits have become since."""
        self._memory = self._limits.take(Kind.MEMORY, self._uid, memory, firm=False)

    def console(self, uid: int) -> Lease:
        """A user opens its console, whoever that is. Raises LimitExceeded."""
        return self._limits.take(Kind.CONSOLES, uid)

    def close_files(self) -> None:
        """Its files are the VMM's by now, or nobody's."""
        self._files.release()

    def end(self) -> None:
        """It runs no more."""
        if self._memory is not None:
            self._memory.release()

    def forget(self) -> None:
        """It exists no more."""
        self.end()
        self.close_files()
        self._vm.release()
