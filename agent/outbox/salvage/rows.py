"""The rows of our tables: told by the shape of the record alone, and checked as the schema would.

A page does not say which table it belongs to, but no two tables have records of one shape
(`agent.outbox.schema`). A row that breaks a CHECK of the schema is damaged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import cast, get_args

import msgspec

from agent.event import DIGEST_BYTES, Kind
from agent.outbox.records import TOKEN_DIGEST_BYTES, App, Ledger, Reason, State, app_of, named
from agent.outbox.salvage.pages import Shape, Value
from agent.settings import UPSTREAM_NAME

_KINDS = frozenset(get_args(Kind))
_REASONS = frozenset(get_args(Reason))
_STATES = frozenset(get_args(State))

_LEDGER_COLUMNS = (
    "last_seq",
    "accepted",
    "delivered",
    "pending",
    "dead",
    "discarded",
    "evicted",
    "duplicates",
    "conflicts",
    "paused",
    "indexed_upto",
    "paused_upstreams",
)
"""As far as the version had them."""


class Table(Enum):
    """The tables that matter."""

    SCHEMA = "sqlite_schema"
    LEDGER = "ledger"
    PENDING = "pending"
    DEAD = "dead"
    EVENT = "event"
    APP = "app"


ABOUT_EVENTS = frozenset({Table.EVENT, Table.PENDING, Table.DEAD})

_SHAPES = {
    Table.SCHEMA: re.compile(r"ttti[tn]"),
    Table.LEDGER: re.compile(r"ni{10}.*"),
    Table.PENDING: re.compile(r"ntiii[in]bt?"),
    Table.DEAD: re.compile(r"ntiit[in]tbt?"),
    Table.EVENT: re.compile(r"ntbti[in]t{0,2}"),
    Table.APP: re.compile(r"t[bn]i[in]i{6}"),
}
"""The columns of each table: null, integer, text or blob. The ledger may gain columns.

The last text is the upstream, which rows of before version 3 have not, in databases of any version;
behind that of an event stands the app, since version 4.
"""

_NAME = re.compile(UPSTREAM_NAME)
"""Of an upstream or an app."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    message_id: str
    digest: bytes
    state: State
    accepted_ms: int
    settled_ms: int | None
    upstream: str = ""
    app: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRow:
    kind: Kind
    lane: int
    queued_ms: int
    attempts: int
    failing_since_ms: int | None
    body: bytes
    upstream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadRow:
    kind: Kind
    lane: int
    attempts: int
    reason: Reason
    status: int | None
    answer: str
    body: bytes
    upstream: str = ""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    last_seq: int
    counters: Ledger

    @property
    def age(self) -> int:
        """Grows with every append and settlement: of two ledgers, tells which is older."""
        counters = self.counters
        return self.last_seq + counters.delivered + counters.discarded + counters.duplicates


Row = EventRow | PendingRow | DeadRow | LedgerRow | App


def table_of(shape: Shape) -> Table | None:
    """Return the table whose row a record can be."""
    return _table(tuple(map(_letter, shape.types)))


@lru_cache(maxsize=1024)
def _table(columns: tuple[str, ...]) -> Table | None:
    letters = "".join(columns)
    for table, pattern in _SHAPES.items():
        if pattern.fullmatch(letters):
            return table
    return None


def row_of(table: Table, values: Sequence[Value]) -> Row | None:
    """Return a row by the columns of its record; None if it breaks what the schema demands."""
    try:
        match table:
            case Table.EVENT:
                return _event(*values[1:])
            case Table.PENDING:
                return _pending(*values[1:])
            case Table.DEAD:
                return _dead(*values[1:])
            case Table.LEDGER:
                return _ledger(values[1:])
            case Table.APP:
                return _app(values)
            case Table.SCHEMA:
                return None
    except UnicodeDecodeError:
        return None


def root_page(values: Sequence[Value]) -> int:
    """Return the root page that a row of the schema names. Source: the format, 2.6."""
    return cast(int, values[3])


class _Body(msgspec.Struct, rename="camel"):
    """What events of all kinds have: an id, and a user under one of two names."""

    message_id: str
    user_id: str | None = None
    anonymous_id: str | None = None


_decoder = msgspec.json.Decoder(_Body)


def message_id_in(body: bytes) -> str | None:
    """Return the messageId of a body; None unless it is the JSON of an event."""
    try:
        event = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return event.message_id if event.user_id or event.anonymous_id else None


def _letter(kind: int) -> str:
    """Return the storage class of a serial type. Source: the format, 2.1."""
    if kind >= 12:
        return "t" if kind & 1 else "b"
    return "n" if kind == 0 else "f" if kind == 7 else "i"


def _event(
    message_id: Value,
    digest: Value,
    state: Value,
    accepted_ms: Value,
    settled_ms: Value,
    upstream: Value = b"",
    app: Value = b"",
) -> EventRow | None:
    row = EventRow(
        message_id=_text(message_id),
        digest=cast(bytes, digest),
        state=cast(State, _text(state)),
        accepted_ms=cast(int, accepted_ms),
        settled_ms=cast(int | None, settled_ms),
        upstream=_text(upstream),
        app=_text(app),
    )
    sound = (
        len(row.digest) == DIGEST_BYTES
        and row.state in _STATES
        and (row.settled_ms is None) == (row.state == "pending")
        and _is_name(row.upstream)
        and _is_name(row.app)
    )
    return row if sound else None


def _pending(
    kind: Value,
    lane: Value,
    queued_ms: Value,
    attempts: Value,
    failing_since_ms: Value,
    body: Value,
    upstream: Value = b"",
) -> PendingRow | None:
    row = PendingRow(
        kind=cast(Kind, _text(kind)),
        lane=cast(int, lane),
        queued_ms=cast(int, queued_ms),
        attempts=cast(int, attempts),
        failing_since_ms=cast(int | None, failing_since_ms),
        body=cast(bytes, body),
        upstream=_text(upstream),
    )
    sound = (
        row.kind in _KINDS
        and row.attempts >= 0
        and (row.failing_since_ms is None) == (row.attempts == 0)
        and _is_name(row.upstream)
    )
    return row if sound else None


def _dead(
    kind: Value,
    lane: Value,
    attempts: Value,
    reason: Value,
    status: Value,
    answer: Value,
    body: Value,
    upstream: Value = b"",
) -> DeadRow | None:
    row = DeadRow(
        kind=cast(Kind, _text(kind)),
        lane=cast(int, lane),
        attempts=cast(int, attempts),
        reason=cast(Reason, _text(reason)),
        status=cast(int | None, status),
        answer=_text(answer),
        body=cast(bytes, body),
        upstream=_text(upstream),
    )
    sound = (
        row.kind in _KINDS
        and row.attempts >= 0
        and row.reason in _REASONS
        and _is_name(row.upstream)
    )
    return row if sound else None


def _ledger(values: Sequence[Value]) -> LedgerRow | None:
    found = dict(zip(_LEDGER_COLUMNS, values, strict=False))
    names = found.pop("paused_upstreams", b"")
    counts = cast(dict[str, int], found)
    counts.pop("indexed_upto", 0)
    last_seq, paused = counts.pop("last_seq"), counts.pop("paused")
    paused_upstreams = named(names.decode() if isinstance(names, bytes) else "")
    ledger = Ledger(**counts, paused=bool(paused), paused_upstreams=paused_upstreams)
    kept = ledger.delivered + ledger.pending + ledger.dead + ledger.discarded
    sound = min(last_seq, *counts.values()) >= 0 and ledger.accepted == kept and paused in {0, 1}
    return LedgerRow(last_seq, ledger) if sound else None


def _app(values: Sequence[Value]) -> App | None:
    name, *rest = values
    app = app_of([_text(name), *rest])
    kept = app.delivered + app.pending + app.dead + app.discarded
    sound = (
        bool(app.name)
        and _is_name(app.name)
        and (
            app.revoked_ms is None
            if app.token_digest is None
            else len(app.token_digest) == TOKEN_DIGEST_BYTES
        )
        and app.accepted == kept
        and min(app.delivered, app.pending, app.dead, app.discarded, app.body_bytes) >= 0
    )
    return app if sound else None


def _is_name(name: str) -> bool:
    return not name or _NAME.fullmatch(name) is not None


def _text(value: Value) -> str:
    return cast(bytes, value).decode()
