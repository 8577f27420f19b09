#!/usr/bin/env python3
"""Tell the desktop when a virtual machine dies.

Listens to the service on the system bus, or with --user on the session bus, and shows a
notification for every death that nobody asked for. It goes on when the service is restarted.
"""

import asyncio
import html
import sys

from dbus_next import Message, Variant
from dbus_next.aio import MessageBus

from vmbus.client import Died, VMBus

ASKED_FOR = ("shutdown", "stopped", "killed", "requester-gone", "host-shutdown")


def notification(death: Died) -> Message:
    """The call that shows it."""
    words = death.vm.last_words if death.vm is not None else ""
    # A guest can have an influence on these words, and a desktop reads them as markup.
    text = html.escape(words or f"status {death.status}")
    title = f"{death.name}: {death.reason}"
    return Message(
        destination="org.freedesktop.Notifications",
        path="/org/freedesktop/Notifications",
        interface="org.freedesktop.Notifications",
        member="Notify",
        signature="susssasa{sv}i",
        body=["vmbus", 0, "computer-fail", title, text, [], {"urgency": Variant("y", 2)}, -1],
    )


async def main(*, user: bool) -> None:
    desktop = await MessageBus().connect()
    async with VMBus.connect(user=user) as bus, bus.deaths() as deaths:
        print("listening", flush=True)
        async for death in deaths:
            if death.reason not in ASKED_FOR:
                await desktop.call(notification(death))


if __name__ == "__main__":
    try:
        asyncio.run(main(user="--user" in sys.argv[1:]))
    except ConnectionError:
        sys.exit("notifier: the bus is gone")
