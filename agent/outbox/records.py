"""The plain values that go into and come out of the outbox. No SQL, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec

from agent.event import Kind
from agent.settings import DEFAULT_UPSTREAM

State = Literal["pending", "dead", "delivered"]

Reason = Literal["rejected", "gave_up", "expired"]
"""Why an event was set aside: refused by the upstream, answered 5xx to the end, or older than max_age."""


def label(upstream: str) -> str:
    """Return what people call *upstream*; the default one is stored as the empty text."""
    return upstream or DEFAULT_UPSTREAM


def unlabel(text: str) -> str:
    """Return the upstream that people call *text*."""
    return "" if text == DEFAULT_UPSTREAM else text


def named(texts: str) -> frozenset[str]:
    """Return the upstreams of a list of labels with spaces between them."""
    return frozenset(map(unlabel, texts.split()))


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
    """The event is set aside, with what the upstream answered to the last attempt, if there was one."""

    seq: int
    reason: Reason
    status: int | None
    answer: str


Settlement = Ack | Retry | Bury


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
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
    upstream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What reading on in one upstream's queue brought: its *heads* as far as the seq *upto*.

    *more* says that there may be some behind it: not all was looked at.
    """

    heads: list[Head]
    upto: int
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """What waits in one upstream's queue as far as the seq *upto*, as (seq, lane, urgent).

    *more* as in `Scan`.
    """

    waiting: list[tuple[int, int, int]]
    upto: int
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The counters of promise 2: accepted = delivered + pending + dead + discarded, always.

    *evicted* is the part of *discarded* that `drop_oldest` took; *conflicts* the part of
    *duplicates* whose body differed. *paused_upstreams* are those that were paused by name.
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
    paused_upstreams: frozenset[str] = frozenset()

    def pauses(self, upstream: str) -> bool:
        """Return whether a person has paused *upstream*."""
        return self.paused or upstream in self.paused_upstreams


TOKEN_DIGEST_BYTES = 32
"""Of SHA-256."""

EVENT_OVERHEAD_BYTES = 256
"""What an event takes beside its body: id, index entry, page slack. An estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One app that posts: the SHA-256 of its token, and what became of its events.

    *token_digest* is None where it has none, *revoked_ms* until it is withdrawn. As in the ledger,
    accepted = delivered + pending + dead + discarded. *body_bytes* is of what is pending or dead.
    """

    name: str
    token_digest: bytes | None
    created_ms: int
    revoked_ms: int | None = None
    accepted: int = 0
    delivered: int = 0
    pending: int = 0
    dead: int = 0
    discarded: int = 0
    body_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """What it takes of the outbox: the bytes of its quota."""
        return self.body_bytes + EVENT_OVERHEAD_BYTES * (self.pending + self.dead)

    @property
    def has_token(self) -> bool:
        """Whether it is known by a token now."""
        return self.token_digest is not None and self.revoked_ms is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """How many bytes the outbox may hold of each app: *named* by name, *other* each other one.

    None: as many as there is room for.
    """

    named: Mapping[str, int | None] = field(default_factory=dict)
    other: int | None = None

    def of(self, app: str) -> int | None:
        return self.named.get(app, self.other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long things are kept. *max_age_s* None: pending events never expire."""

    max_age_s: float | None
    delivered_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator configured. *max_bytes* bounds the database; *remember* keeps delivered ids.

    *quotas* bounds what it holds of each app.
    """

    max_bytes: int
    evicts: bool
    remember: bool
    quotas: Quotas = field(default_factory=Quotas)


def app_of(columns: Sequence[Any]) -> App:
    """Return an app by the columns of its row, in their order."""
    return App(**dict(zip(App.__slots__, columns, strict=True)))


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
    """Where one event stands. *settled_ms* is when it was delivered or set aside.

    *body* and *lane* are None once it is delivered.
    """

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
    upstream: str = ""
    app: str = ""
    lane: int | None = None


Label = Annotated[str, msgspec.Meta(min_length=1)]
"""What people call an upstream; empty would be the default one, which has a name here."""

_Given = Annotated[str, msgspec.Meta(min_length=1)]
"""Empty is no condition that anybody means: of an app it would select the events of none."""

_Instant = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Unix ms; SQLite knows no larger integer."""


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

    *upstream* is by its label. *app*, *event*, *user* and *message_ids* match exactly, *text* anywhere in the body;
    *accepted_before_ms* and *accepted_after_ms* bound the time of acceptance (Unix ms).
    """

    message_ids: tuple[str, ...] = ()
    upstream: Label | None = None
    app: _Given | None = None
    event: _Given | None = None
    user: _Given | None = None
    reason: Reason | None = None
    text: _Given | None = None
    accepted_before_ms: _Instant | None = None
    accepted_after_ms: _Instant | None = None
