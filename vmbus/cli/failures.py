"""What failed, why, and what to do next, in one line."""

from __future__ import annotations

from .. import errors
from ..client import RemoteError
from ..events import EventsLost
from .text import clean

_STANDARD = "org.freedesktop.DBus.Error."
_NOT_RUNNING = ("ServiceUnknown", "NameHasNoOwner", "Spawn.")

#: The next step; `what` is here the NAME that the command was for.
_HINTS: dict[type[Exception], str] = {
    errors.NoSuchVM: 'see "vmbusctl list"',
    errors.UnknownObject: 'see "vmbusctl list"',
    errors.InvalidState: 'see "vmbusctl status {what}"',
    errors.StartFailed: 'see "vmbusctl logs {what}"',
    errors.NameExists: 'choose another name, or see "vmbusctl remove"',
    errors.AccessDenied: "try it as the user who created the VM, or as root",
    errors.InteractiveAuthorizationRequired: "try it in a terminal, or as root",
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
        return Failure(what, "the service went away before it answered")
    return Failure(what, error.text or error.name)


def _system(what: str, error: OSError) -> Failure:
    reason = error.strerror or str(error)
    return Failure(what, f"{error.filename}: {reason}" if error.filename else reason)
