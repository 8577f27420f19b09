"""What vmbusctl says of what went wrong: one line, with the reason and the next step."""

from __future__ import annotations

import re

import pytest

from vmbus import errors
from vmbus.bus.connection import RemoteError
from vmbus.cli import exits
from vmbus.cli.failures import explain
from vmbus.cli.main import cli
from vmbus.events import EventsLost
from vmbus.reasons import Reason

STANDARD = "org.freedesktop.DBus.Error."
OWN: list[type[errors.VMBusError]] = [errors.VMBusError, *errors.VMBusError.__subclasses__()]
#: What a command may meet besides: from the bus, from the system, and from the client.
OTHERS = [
    RemoteError(f"{STANDARD}ServiceUnknown", "no such name"),
    RemoteError(f"{STANDARD}Spawn.ChildExited", "it ended"),
    RemoteError(f"{STANDARD}NoReply", "it left"),
    RemoteError("com.example.Odd", "something odd"),
    TimeoutError("no answer to List in 25 s"),
    ConnectionResetError("the connection to the bus is closed"),
    EventsLost("more than 4096 events were waiting to be read"),
]


def _made(kind: type[errors.VMBusError]) -> errors.VMBusError:
    return kind(["it is so"]) if kind is errors.InvalidConfig else kind("it is so")


@pytest.mark.parametrize(
    "error", [*map(_made, OWN), *OTHERS], ids=lambda error: getattr(error, "name", repr(error))
)
def test_line_has_the_reason_and_a_next_step_that_there_is(error: Exception) -> None:
    """Every error name of the contract has its own, and commands that it names exist."""
    line = explain("web", error, user=False).line()
    said = re.fullmatch(r"vmbusctl: web: (.+) \((.+)\)", line)
    assert said, line
    if isinstance(error, errors.VMBusError):
        assert said[1] == "it is so"
    for command in re.findall(r'"vmbusctl ([a-z]\S*?)[ "]', said[2]):
        assert command in cli.commands
    assert "{" not in line


def test_text_of_an_error_steers_no_terminal() -> None:
    line = explain("we\x1bb", errors.NoSuchVM("no\n\x1b[2J"), user=False).line()
    assert line.isprintable()


def test_every_reason_has_an_exit_status_that_the_help_tells() -> None:
    """And vmbusctl's own failures can be told from all of them."""
    table = exits.table()
    for reason in Reason:
        status = exits.exit_status(reason)
        assert re.search(rf"^ +{status}  .*\b{reason}\b", table, re.MULTILINE)
        assert status not in (exits.FAILED, exits.MISUSED)
        assert status < exits.BY_SIGNAL
    assert exits.exit_status("one of a newer service") == exits.exit_status(Reason.UNKNOWN)
