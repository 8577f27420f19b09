"""Every error that vmbus tells its callers about, each with its name on the bus.

Raised anywhere below the bus, turned into a D-Bus error in one place, the gate. The message is for
people: what is wrong, and what would be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

_OWN = "org.vmbus1.Error."
_STANDARD = "org.freedesktop.DBus.Error."
#: How many problems one message names; a hostile config could have thousands.
_MAX_PROBLEMS = 40
#: What a service that ends says to whoever still waits for an answer.
ENDING = "the service is shutting down"


class VMBusError(Exception):
    """Base of all errors that may be told to a caller."""

    dbus_name: ClassVar[str] = _STANDARD + "Failed"


class InvalidConfig(VMBusError):
    """A config for Create that can't be; `problems` names every one of them."""

    dbus_name = _OWN + "InvalidConfig"

    def __init__(self, problems: Sequence[str]) -> None:
        shown = list(problems[:_MAX_PROBLEMS])
        if len(problems) > _MAX_PROBLEMS:
            shown.append(f"and {len(problems) - _MAX_PROBLEMS} more problems")
        super().__init__("; ".join(shown))
        self.problems = tuple(problems)


class InvalidState(VMBusError):
    dbus_name = _OWN + "InvalidState"


class NoSuchVM(VMBusError):
    dbus_name = _OWN + "NoSuchVM"


class NameExists(VMBusError):
    dbus_name = _OWN + "NameExists"


class StartFailed(VMBusError):
    dbus_name = _OWN + "StartFailed"


class LimitExceeded(VMBusError):
    dbus_name = _OWN + "LimitExceeded"


class NotSupported(VMBusError):
    dbus_name = _OWN + "NotSupported"


class VMMUnavailable(VMBusError):
    dbus_name = _OWN + "VMMUnavailable"


class ControlFailed(VMBusError):
    dbus_name = _OWN + "ControlFailed"


class TimedOut(VMBusError):
    dbus_name = _OWN + "TimedOut"


class AccessDenied(VMBusError):
    dbus_name = _STANDARD + "AccessDenied"


class InteractiveAuthorizationRequired(VMBusError):
    dbus_name = _STANDARD + "InteractiveAuthorizationRequired"


class InvalidArgs(VMBusError):
    dbus_name = _STANDARD + "InvalidArgs"


class UnknownObject(VMBusError):
    dbus_name = _STANDARD + "UnknownObject"


class UnknownInterface(VMBusError):
    dbus_name = _STANDARD + "UnknownInterface"


class UnknownMethod(VMBusError):
    dbus_name = _STANDARD + "UnknownMethod"


class UnknownProperty(VMBusError):
    dbus_name = _STANDARD + "UnknownProperty"


class PropertyReadOnly(VMBusError):
    dbus_name = _STANDARD + "PropertyReadOnly"
