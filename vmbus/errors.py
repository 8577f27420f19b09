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
    """The config can't be; the text names every problem, and so does `problems`."""

    dbus_name = _OWN + "InvalidConfig"

    def __init__(self, problems: Sequence[str]) -> None:
        shown = list(problems[:_MAX_PROBLEMS])
        if len(problems) > _MAX_PROBLEMS:
            shown.append(f"and {len(problems) - _MAX_PROBLEMS} more problems")
        super().__init__("; ".join(shown))
        self.problems = tuple(problems)


class InvalidState(VMBusError):
    """What was asked for can't be done in the state that the VM is in."""

    dbus_name = _OWN + "InvalidState"


class NoSuchVM(VMBusError):
    """There is no VM of that name or CID, or it was removed meanwhile."""

    dbus_name = _OWN + "NoSuchVM"


class NameExists(VMBusError):
    """Another VM has that name."""

    dbus_name = _OWN + "NameExists"


class StartFailed(VMBusError):
    """The VMM ended, or was ended, before the VM ran; the text has its own last words."""

    dbus_name = _OWN + "StartFailed"


class LimitExceeded(VMBusError):
    """The caller, or all callers, have as much of something as they may; or a call is too large."""

    dbus_name = _OWN + "LimitExceeded"


class NotSupported(VMBusError):
    """The VMM, the host or this VM has no such thing."""

    dbus_name = _OWN + "NotSupported"


class VMMUnavailable(VMBusError):
    """The VMM can't be used on this host, or none can."""

    dbus_name = _OWN + "VMMUnavailable"


class ControlFailed(VMBusError):
    """The VMM, or the guest, has refused to do it."""

    dbus_name = _OWN + "ControlFailed"


class TimedOut(VMBusError):
    """The VMM has not answered in time."""

    dbus_name = _OWN + "TimedOut"


class AccessDenied(VMBusError):
    """Who may do this was decided, and the caller may not."""

    dbus_name = _STANDARD + "AccessDenied"


class InteractiveAuthorizationRequired(VMBusError):
    """The user would be asked for a password, but the call didn't allow that."""

    dbus_name = _STANDARD + "InteractiveAuthorizationRequired"


class InvalidArgs(VMBusError):
    """An argument has a value, or the call types, that can't be."""

    dbus_name = _STANDARD + "InvalidArgs"


class UnknownObject(VMBusError):
    """There is no such object, or no longer."""

    dbus_name = _STANDARD + "UnknownObject"


class UnknownInterface(VMBusError):
    """The object has no such interface."""

    dbus_name = _STANDARD + "UnknownInterface"


class UnknownMethod(VMBusError):
    """The interface has no such method."""

    dbus_name = _STANDARD + "UnknownMethod"


class UnknownProperty(VMBusError):
    """The interface has no such property."""

    dbus_name = _STANDARD + "UnknownProperty"


class PropertyReadOnly(VMBusError):
    """Properties can't be set."""

    dbus_name = _STANDARD + "PropertyReadOnly"
