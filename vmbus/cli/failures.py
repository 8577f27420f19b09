"""What failed, why, and what to do next, in one line."""

from __future__ import annotations

from .. import errors
from ..client import RemoteError
from ..events import EventsLost
from .text import clean

_STANDARD = "org.freedesktop.DBus.Error."
_NOT_RUNNING = ("ServiceUnknown", "NameHasNoOwner", "Spawn.")

_VERSIONS = 'compare "vmbusctl --version" to "vmbusctl status"'
#: The next step; `what` is here the NAME that the command was for, or the command.
_HINTS: dict[type[Exception], str] = {
    errors.VMBusError: "see the service's log",
    errors.InvalidConfig: 'see "vmbusctl create --help"',
    errors.InvalidState: 'see "vmbusctl status {what}"',
    errors.NoSuchVM: 'see "vmbusctl list"',
    errors.NameExists: 'choose another name, or see "vmbusctl remove"',
    errors.StartFailed: 'see "vmbusctl logs {what}"',
    errors.LimitExceeded: 'see "vmbusctl remove", or have the limit raised in vmbusd.toml',
    errors.NotSupported: 'see "vmbusctl create --help" for --vmm and what a VM is made with',
    errors.VMMUnavailable: 'see "vmbusctl status" for those that there are',
    errors.ControlFailed: 'see "vmbusctl status {what}"',
    errors.TimedOut: 'try it again, or see "vmbusctl kill"',
    errors.AccessDenied: "try it as the user who created the VM, or as root",
    errors.InteractiveAuthorizationRequired: "try it in a terminal, or as root",
    errors.InvalidArgs: 'see "vmbusctl --help"',
    errors.UnknownObject: 'see "vmbusctl list"',
    errors.UnknownInterface: _VERSIONS,
    errors.UnknownMethod: _VERSIONS,
    errors.UnknownProperty: _VERSIONS,
    errors.PropertyReadOnly: _VERSIONS,
    TimeoutError: "try it again, or see the service's log",
    EventsLost: "try it again",
}


class Failure(Exception):
    """A command that failed for a known cause. `what` is a command, or the NAME it was for."""

    def __init__(self, what: str, reason: str, hint: str = "") -> None:
        super().__init__(": ".join([what, reason]))
        self.what = what
        self.reason = reason
        self.hint = hint

    def line(self) -> str:
        """The one line for people."""
        hint = f" ({self.hint})" if self.hint else ""
        return clean(f"vmbusctl: {self.what}: {self.reason}{hint}")


#: What a command may meet; anything else is a bug.
EXPECTED = (errors.VMBusError, RemoteError, OSError, EventsLost)


def explain(what: str, error: Exception, *, user: bool) -> Failure:
    """The failure that one of the EXPECTED errors stands for."""
    if isinstance(error, RemoteError):
        return _remote(what, error, user=user)
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return _system(what, error)
    reason = str(error) or "no answer in time"
    return Failure(what, reason, _HINTS.get(type(error), "").format(what=what))


def is_away(error: Exception) -> bool:
    """Whether an error stands for a service that isn't there, or is about to leave."""
    if isinstance(error, RemoteError):
        return error.name.removeprefix(_STANDARD).startswith((*_NOT_RUNNING, "NoReply"))
    return type(error) is errors.VMBusError and str(error) == errors.ENDING


def no_bus(what: str, error: OSError, *, user: bool) -> Failure:
    """The failure to reach a bus at all."""
    which, other = ("session", "without") if user else ("system", "with")
    reason = error.strerror or str(error) or "no answer in time"
    return Failure(what, f"can't reach the {which} bus: {reason}", f"try {other} --user")


def _remote(what: str, error: RemoteError, *, user: bool) -> Failure:
    short = error.name.removeprefix(_STANDARD)
    if short.startswith(_NOT_RUNNING):
        start = "vmbusd --user" if user else "systemctl start vmbusd"
        return Failure(what, "the service is not running", f'start it with "{start}"')
    if short == "NoReply":
        return Failure(what, "the service went away before it answered", "try it again")
    return Failure(what, error.text or error.name, _HINTS[errors.VMBusError])


def _system(what: str, error: OSError) -> Failure:
    reason = error.strerror or str(error)
    if isinstance(error, ConnectionError):
        return Failure(what, reason, _HINTS[EventsLost])
    return Failure(what, f"{error.filename}: {reason}" if error.filename else reason)
