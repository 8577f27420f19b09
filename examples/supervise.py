#!/usr/bin/env python3
"""Keep a virtual machine running: whenever one dies by itself, start another.

    supervise.py KERNEL [INITRD]

Ends when the guest shuts down, or when somebody stops or kills it. test_supervise.py shows how such
a tool is tested without any virtual machine.
"""

import asyncio
import sys
from typing import Unpack

from vmbus.client import Config, Death, VMBus

MEANT = ("shutdown", "stopped", "killed", "host-shutdown")


async def supervise(bus: VMBus, **config: Unpack[Config]) -> Death:
    """Run one VM after the other; returns how the last one died."""
    while True:
        # The VM is removed at the end of the block, whatever happens in it.
        async with await bus.create(**config) as vm:
            await vm.start()
            death = await vm.wait()
        print(f"supervise: died: {death.reason}", flush=True)
        if death.reason in MEANT:
            return death


async def main(kernel: str, initrd: str | None = None) -> None:
    async with VMBus.session() as bus:
        await supervise(bus, kernel=kernel, initrd=initrd, params="console=ttyS0")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
