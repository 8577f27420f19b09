"""What the service may do beyond its user's rights: nothing, now and later."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_PR_SET_NO_NEW_PRIVS = 38
_STATUS = Path("/proc/self/status")
#: The bounding set isn't among them: it gives nothing, and only the privileged can empty it.
_SETS = {
    "CapEff": "effective",
    "CapPrm": "permitted",
    "CapInh": "inheritable",
    "CapAmb": "ambient",
}


class Privileged(Exception):
    """The process has rights that it must not have; says which, and what to do about it."""


def check_unprivileged() -> None:
    """Raise Privileged for root, and for a process that has capabilities or can pass some on."""
    if os.geteuid() == 0:
        raise Privileged("it needs no privilege and won't run as root; start it as the user vmbus")
    found = dict(re.findall(r"^(Cap\w+):\t([0-9a-f]+)$", _STATUS.read_text(), re.MULTILINE))
    held = [name for key, name in _SETS.items() if int(found[key], 16)]
    if held:
        raise Privileged(
            f"it needs no privilege and won't run with capabilities ({', '.join(held)}); start it "
            "without AmbientCapabilities=, or by setpriv --ambient-caps=-all --inh-caps=-all"
        )


def gain_none() -> None:
    """See that neither this process nor any that it spawns gains rights by what it executes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs can't be set")
