"""Tap devices, which are root's to make."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator

_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000


@contextlib.contextmanager
def open_tap(name: str, *, owner: int | None = None) -> Iterator[int]:
    """The descriptor of a tap, which goes with it."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if owner is not None:
            fcntl.ioctl(fd, _TUNSETOWNER, owner)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def idle_tap(name: str) -> Iterator[None]:
    """A tap that nobody has open."""
    with open_tap(name) as fd:
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    try:
        yield
    finally:
        with open_tap(name) as fd:
            fcntl.ioctl(fd, _TUNSETPERSIST, 0)
