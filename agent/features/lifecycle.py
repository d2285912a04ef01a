"""The lifecycle of a feature: one table, and nothing beside it.

Pure. An (state, event) pair that is not listed raises, and changes nothing.
The diagram in docs/lifecycle.md is made from this table
(`python -m agent.features.lifecycle`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from agent.errors import IllegalTransitionError


class State(enum.Enum):
    """What a feature does; values as in FeatureState of vehicle_service.proto."""

    LOCKED = 1
    PENDING = 2
    ACTIVATING = 3
    ACTIVE = 4
    HELD = 5
    DEACTIVATING = 6
    FAULT = 7
    SUSPENDED = 8


class Event(enum.Enum):
    """What can happen to a feature."""

    ENTITLED = "a live right is there"
    ENDED = "no live right is there"
    SUSPENDED = "the right rests: a quota or the grace has run out, or the journal is dead"
    READY = "the activation condition holds"
    MISSED = "the activation condition or the right was gone before anything was sent"
    CONFIRMED = "the ECU reports it on, after it was asked"
    ADOPTED = "the ECU reports it on already, under a live right"
    OFF_SEEN = "the ECU reports it off, though it should be on"
    STILL_ON = "the ECU reports it on, or holds a token to burn, without a right"
    RENEW = "a newer token is there and may be written"
    DENIED = "the ECU refused or kept silent"
    RELEASABLE = "the release condition holds, or the ignition is off, or the hold is over"
    RELEASED = "the ECU reports it off, after it was asked"
    RETRY = "the backoff is over"


class Action(enum.Enum):
    """What the engine does on a transition."""

    READ_BACK = "ask the ECU what it does"
    ACTIVATE = "send the token, then read back"
    RELEASE = "send the release or the burning token, then read back"
    START_METERS = "begin to meter"
    STOP_METERS = "end metering and close the windows"
    BACK_OFF = "wait before the next try"


_S, _E, _A = State, Event, Action

TABLE: Mapping[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (_S.LOCKED, _E.ENTITLED): (_S.PENDING, (_A.READ_BACK,)),
    (_S.LOCKED, _E.SUSPENDED): (_S.SUSPENDED, ()),
    # Found on at start, or by the periodic read-back, without a right.
    (_S.LOCKED, _E.STILL_ON): (_S.HELD, ()),
    (_S.PENDING, _E.READY): (_S.ACTIVATING, (_A.ACTIVATE,)),
    # After a restart: on under a live right, so nothing is written.
    (_S.PENDING, _E.ADOPTED): (_S.ACTIVE, (_A.START_METERS,)),
    (_S.PENDING, _E.ENDED): (_S.LOCKED, (_A.READ_BACK,)),
    (_S.PENDING, _E.SUSPENDED): (_S.SUSPENDED, ()),
    (_S.PENDING, _E.DENIED): (_S.FAULT, (_A.BACK_OFF,)),
    (_S.ACTIVATING, _E.CONFIRMED): (_S.ACTIVE, (_A.START_METERS,)),
    (_S.ACTIVATING, _E.DENIED): (_S.FAULT, (_A.BACK_OFF,)),
    (_S.ACTIVATING, _E.MISSED): (_S.PENDING, ()),
    # The request may have been carried out already: release it like an active one.
    (_S.ACTIVATING, _E.ENDED): (_S.HELD, ()),
    (_S.ACTIVATING, _E.SUSPENDED): (_S.HELD, ()),
    (_S.ACTIVE, _E.ENDED): (_S.HELD, ()),
    (_S.ACTIVE, _E.SUSPENDED): (_S.HELD, ()),
    (_S.ACTIVE, _E.RENEW): (_S.ACTIVE, (_A.ACTIVATE,)),
    # A renewal that failed takes nothing away: the older token still serves.
    (_S.ACTIVE, _E.DENIED): (_S.ACTIVE, (_A.BACK_OFF,)),
    # The ECU was reset, or ended a limit of its own: switched on again when ready.
    (_S.ACTIVE, _E.OFF_SEEN): (_S.PENDING, (_A.STOP_METERS,)),
    # A new grant in HELD goes on where the old one ended.
    (_S.HELD, _E.ENTITLED): (_S.PENDING, (_A.READ_BACK,)),
    (_S.HELD, _E.RELEASABLE): (_S.DEACTIVATING, (_A.RELEASE,)),
    (_S.DEACTIVATING, _E.RELEASED): (_S.LOCKED, (_A.STOP_METERS,)),
    (_S.DEACTIVATING, _E.DENIED): (_S.HELD, (_A.BACK_OFF,)),
    (_S.FAULT, _E.RETRY): (_S.PENDING, (_A.READ_BACK,)),
    (_S.FAULT, _E.ENDED): (_S.HELD, ()),
    (_S.FAULT, _E.SUSPENDED): (_S.SUSPENDED, ()),
    (_S.SUSPENDED, _E.STILL_ON): (_S.HELD, ()),
    (_S.SUSPENDED, _E.ENTITLED): (_S.PENDING, (_A.READ_BACK,)),
    (_S.SUSPENDED, _E.ENDED): (_S.LOCKED, (_A.READ_BACK,)),
}

METERED = frozenset({State.ACTIVE, State.HELD, State.DEACTIVATING})
"""States in which a feature that was switched on is metered."""


def transition(feature_id: str, state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """Returns the next state and what to do.

    Raises:
        IllegalTransitionError: the pair is not listed; nothing has changed.
    """
    row = TABLE.get((state, event))
    if row is None:
        raise IllegalTransitionError(feature_id, state=state.name, event=event.name)
    return row


def diagram() -> str:
    """Returns the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> LOCKED"]
    for (state, event), (target, actions) in TABLE.items():
        doing = f" / {', '.join(a.name for a in actions)}" if actions else ""
        lines.append(f"    {state.name} --> {target.name}: {event.name}{doing}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
