"""The table of states and events, against a grid that is written down apart from it."""

from __future__ import annotations

import itertools

import pytest

from vmbus.errors import InvalidState
from vmbus.model.state import ALIVE, OVER, TRANSITIONS, Event, State, after

# One row a state, one column an event; "." is InvalidState.
GRID = """
               START     ANSWERED  SUSPEND    RESUME   ADJUST     RESIZE
not-started    starting  .         .          .        .          .
starting       .         running   .          .        .          .
running        .         .         suspended  .        running    running
suspended      .         .         .          running  suspended  suspended
stopping       .         .         .          .        .          .
dead           .         .         .          .        .          .
failed         .         .         .          .        .          .

               CONNECT  STOP      EXITED  REMOVE
not-started    .        .         .       not-started
starting       .        starting  failed  .
running        running  stopping  dead    .
suspended      .        stopping  dead    .
stopping       .        stopping  dead    .
dead           .        .         .       dead
failed         .        .         .       failed
"""


def _grid() -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for half in GRID.strip().split("\n\n"):
        head, *rows = (line.split() for line in half.splitlines())
        for state, *cells in rows:
            found |= {(state, event): cell for event, cell in zip(head, cells, strict=True)}
    return found


EXPECTED = _grid()


def test_states_are_those_of_the_contract() -> None:
    names = "not-started starting running suspended stopping dead failed"
    assert [str(state) for state in State] == names.split()


def test_grid_has_every_state_and_event() -> None:
    pairs = itertools.product([str(state) for state in State], [event.name for event in Event])
    assert set(EXPECTED) == set(pairs)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("state", State, ids=str)
def test_every_event_in_every_state(state: State, event: Event) -> None:
    expected = EXPECTED[str(state), event.name]
    if expected == ".":
        with pytest.raises(InvalidState):
            after(state, event)
    else:
        assert after(state, event) == expected


@pytest.mark.parametrize(
    ("state", "event", "text"),
    [
        (
            State.RUNNING,
            Event.START,
            "a VM that is running can't be started; it must be not-started",
        ),
        (
            State.NOT_STARTED,
            Event.STOP,
            "a VM that is not-started can't be stopped; "
            "it must be starting or running or suspended or stopping",
        ),
        (
            State.STOPPING,
            Event.REMOVE,
            "a VM that is stopping can't be removed; it must be not-started or dead or failed",
        ),
        (State.DEAD, Event.RESUME, "a VM that is dead can't be resumed; it must be suspended"),
        (State.FAILED, Event.SUSPEND, "a VM that is failed can't be suspended; it must be running"),
        (
            State.STARTING,
            Event.ADJUST,
            "a VM that is starting can't have its memory changed; it must be running or suspended",
        ),
        (
            State.DEAD,
            Event.RESIZE,
            "a VM that is dead can't have a disk resized; it must be running or suspended",
        ),
    ],
)
def test_refusal_names_the_state_and_where_it_would_be_right(
    state: State, event: Event, text: str
) -> None:
    with pytest.raises(InvalidState) as refused:
        after(state, event)
    assert str(refused.value) == text


def test_alive_are_the_states_that_can_end() -> None:
    assert {state for state, event in TRANSITIONS if event is Event.EXITED} == ALIVE


def test_over_are_the_states_that_nothing_leaves() -> None:
    left = {state for (state, _), new in TRANSITIONS.items() if new is not state}
    assert set(State) - left == OVER
