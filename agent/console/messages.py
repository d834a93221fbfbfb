"""What the control API is asked and what it answers, as types: they validate, and they describe it.

Beside these: `Status`, the receipts, and `Refusal` for every error. What of them only the description
needs is in their `msgspec.Meta`, and costs nothing when they are read.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from agent.console.receipts import EventView
from agent.outbox.records import Label, Selection, State

EVENTS_LIMIT = 1000
"""Events in one answer at most; `after` reads on."""

_LARGEST_SEQ = 2**63 - 1
"""SQLite's largest integer."""

_WAIT = msgspec.Meta(
    description="Answer once the event is delivered or dead, or after so many seconds: 60 at most.",
    extra_json_schema={"pattern": r"^([0-5]?[0-9](\.[0-9]{1,3})?|60)s?$"},
)


class EventQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of GET events/{messageId}. *upstream* is a label; without: the first that knows the id."""

    upstream: Label | None = None
    wait: Annotated[str, _WAIT] = "0"


class EventsQuery(Selection, frozen=True, kw_only=True):
    """The query of GET events. *after* is the seq that the page before ended with."""

    state: State = "pending"
    after: Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_SEQ)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=EVENTS_LIMIT)] = 50


class DeadRequest(Selection, frozen=True, kw_only=True):
    """Which dead letters: by a condition, or *all* said in so many words."""

    all: bool = False


class SteeringQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of pause, resume and flush. *upstream* is a label; without: all of them."""

    upstream: Label | None = None


class EventsPage(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Events, oldest first. *next_after* is for the next page; null where this is the last."""

    events: list[EventView]
    next_after: int | None


class Requeued(msgspec.Struct, frozen=True):
    """How many dead letters are pending again."""

    requeued: int


class Discarded(msgspec.Struct, frozen=True):
    """How many dead letters are gone for good."""

    discarded: int


class Health(msgspec.Struct, frozen=True):
    """That the process answers, or that it accepts events."""

    status: Literal["ok", "ready"]
