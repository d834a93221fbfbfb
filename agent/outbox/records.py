"""The plain values that go into and come out of the outbox. No SQL, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import msgspec

from agent.event import Kind

State = Literal["pending", "dead", "delivered"]

Reason = Literal["rejected", "gave_up", "expired"]
"""Why an event was set aside: refused by the upstream, answered 5xx to the end, or older than max_age."""


class Appended(Enum):
    """What became of an appended event."""

    STORED = "stored"
    REPLAYED = "replayed"
    CONFLICTING = "conflicting"
    """The id is known with another body; the first body stays."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The upstream has the event."""

    seq: int


@dataclass(frozen=True, slots=True)
class Retry:
    """The upstream answered about this very event, and it must be tried again: one more attempt."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bury:
    """The event is set aside after one more attempt, with what the upstream answered to it."""

    seq: int
    reason: Reason
    status: int | None
    answer: str


Settlement = Ack | Retry | Bury


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What the forwarder knows of a pending event. *body* is None where it is large: read it when sent.

    *seq* is the order of acceptance. *failing_since_ms* is the first answer about it, if any.
    *urgent* is 1 if its name is one of those that go in spite of a budget.
    """

    seq: int
    lane: int
    message_id: str
    kind: Kind
    attempts: int
    failing_since_ms: int | None
    body_bytes: int
    body: bytes | None
    urgent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The counters of promise 2: accepted = delivered + pending + dead + discarded, always.

    *evicted* is the part of *discarded* that `drop_oldest` took; *conflicts* the part of
    *duplicates* whose body differed.
    """

    accepted: int
    delivered: int
    pending: int
    dead: int
    discarded: int
    evicted: int
    duplicates: int
    conflicts: int
    paused: bool


class Salvage(msgspec.Struct, frozen=True):
    """What came of a damaged database, in events; *moved_to* is its file's name beside the outbox.

    *lost* counts what its own books say was there and could not be read.
    """

    state: Literal["running", "done", "failed"]
    moved_to: str
    pending: int
    dead: int
    delivered: int
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Where one event stands. *settled_ms* is when it was delivered or set aside."""

    seq: int
    message_id: str
    state: State
    kind: Kind | None
    accepted_ms: int
    settled_ms: int | None
    attempts: int
    failing_since_ms: int | None
    reason: Reason | None
    status: int | None
    answer: str | None
    body: bytes | None


class Selection(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename="camel",
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """Which events a person means; every given condition must hold, none given means all.

    It is also what the control API reads, so that a condition cannot be lost on the way.

    *event*, *user* and *message_ids* match exactly, *text* anywhere in the body;
    *accepted_before_ms* and *accepted_after_ms* bound the time of acceptance (Unix ms).
    """

    message_ids: tuple[str, ...] = ()
    event: str | None = None
    user: str | None = None
    reason: Reason | None = None
    text: str | None = None
    accepted_before_ms: int | None = None
    accepted_after_ms: int | None = None
