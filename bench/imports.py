"""What the service's start is made of: its imports, one by one."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict

from bench.plan import LIBRARIES
from bench.samples import VMBUS

_RUNS = 10
#: Modules that take less, in milliseconds, are left out.
_LEAST = 1.0


def slowest() -> dict[str, float]:
    """Milliseconds that each module takes without those it imports itself, the slowest first.

    Each is the least of several runs: what else the machine does can only make it more.
    """
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(_RUNS):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import vmbus.daemon"],
            env={"VMBUS_DBUS_LIBRARY": LIBRARIES[VMBUS]},
            cwd="/",
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        # The first line has the columns' names.
        for line in done.stderr.splitlines()[1:]:
            own, _, name = line.removeprefix("import time:").split("|")
            found[name.strip()].append(int(own) / 1e3)
    least = {name: min(each) for name, each in found.items()}
    whole = {"all": sum(least.values())}
    return whole | {
        name: least[name]
        for name in sorted(least, key=lambda name: least[name], reverse=True)
        if least[name] >= _LEAST
    }
