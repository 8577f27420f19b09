"""The states of a VM, the events that change them, and the one table that says how."""

from __future__ import annotations

import enum

from ..errors import InvalidState


class State(enum.StrEnum):
    """The values of the State property."""

    NOT_STARTED = "not-started"
    STARTING = "starting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    DEAD = "dead"
    FAILED = "failed"


class Event(enum.Enum):
    """What can happen to a VM; the value completes the sentence "can't ..."."""

    START = "be started"
    ANSWERED = "begin to run"
    SUSPEND = "be suspended"
    RESUME = "be resumed"
    ADJUST = "have its memory changed"
    RESIZE = "have a disk resized"
    CONNECT = "be connected to"
    STOP = "be stopped"
    EXITED = "end"
    REMOVE = "be removed"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.NOT_STARTED, Event.START): State.STARTING,
    (State.STARTING, Event.ANSWERED): State.RUNNING,
    (State.STARTING, Event.EXITED): State.FAILED,
    (State.STARTING, Event.STOP): State.STARTING,
    (State.RUNNING, Event.SUSPEND): State.SUSPENDED,
    (State.RUNNING, Event.ADJUST): State.RUNNING,
    (State.SUSPENDED, Event.ADJUST): State.SUSPENDED,
    (State.RUNNING, Event.RESIZE): State.RUNNING,
    (State.SUSPENDED, Event.RESIZE): State.SUSPENDED,
    (State.RUNNING, Event.CONNECT): State.RUNNING,
    (State.RUNNING, Event.STOP): State.STOPPING,
    (State.RUNNING, Event.EXITED): State.DEAD,
    (State.SUSPENDED, Event.RESUME): State.RUNNING,
    (State.SUSPENDED, Event.STOP): State.STOPPING,
    (State.SUSPENDED, Event.EXITED): State.DEAD,
    (State.STOPPING, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.EXITED): State.DEAD,
    (State.NOT_STARTED, Event.REMOVE): State.NOT_STARTED,
    (State.DEAD, Event.REMOVE): State.DEAD,
    (State.FAILED, Event.REMOVE): State.FAILED,
}

#: States in which a VMM process may exist.
ALIVE = frozenset({State.STARTING, State.RUNNING, State.SUSPENDED, State.STOPPING})
#: States that a VM never leaves.
OVER = frozenset({State.DEAD, State.FAILED})


def after(state: State, event: Event) -> State:
    """The state that follows. Raises InvalidState, naming where the event would be right."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        right = [str(before) for before, each in TRANSITIONS if each is event]
        raise InvalidState(
            f"a VM that is {state} can't {event.value}; it must be {' or '.join(right)}"
        ) from None
