"""What a person asks of the outbox, as SQL: one event by its id, and all that a selection means.

Says what to read and what a row means; `agent.outbox.reader` reads. Each statement gives the fields
of a `Receipt`, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.errors import OutboxError
from agent.outbox.ids import id_hash
from agent.outbox.records import Receipt, Selection, State, unlabel

LISTED_BYTES = 65_536
"""Larger bodies are left out of a listing, which may have a thousand rows; `receipt` has them."""

PART_EVENTS = 1_000
"""Events in one part of a search at most. To measure them reads a page of each, if they are large."""

_PART_BYTES = 4 * 1024 * 1024
"""Bodies in one part, not counting the rest of its last one: to look into them takes 10 to 50 ms."""

_RECEIPT = """
SELECT event.seq,
       event.message_id,
       event.state,
       COALESCE(pending.kind, dead.kind),
       event.accepted_ms,
       event.settled_ms,
       COALESCE(pending.attempts, dead.attempts, 0),
       pending.failing_since_ms,
       dead.reason,
       dead.status,
       dead.answer,
       COALESCE(pending.body, dead.body),
       event.upstream,
       event.app,
       COALESCE(pending.lane, dead.lane)
  FROM event
  LEFT JOIN pending ON pending.seq = event.seq
  LEFT JOIN dead    ON dead.seq = event.seq
"""

# The newest ids are in no index yet (outbox.ids): these few events are walked through.
_KNOWN = """seq IN (SELECT seq
                     FROM known
                    WHERE id_hash IN (SELECT value FROM json_each(:id_hashes))
                    UNION ALL
                   SELECT seq
                     FROM event
                    WHERE seq > (SELECT indexed_upto FROM ledger)
                      AND message_id IN (SELECT value FROM json_each(:message_ids)))
          AND message_id IN (SELECT value FROM json_each(:message_ids))"""

_BY_MESSAGE_ID = f"{_RECEIPT} WHERE event.{_KNOWN}"

_ROWS: dict[State, str] = {
    "pending": """
SELECT seq, message_id, state, kind, accepted_ms, settled_ms, attempts,
       failing_since_ms, NULL AS reason, NULL AS status, NULL AS answer,
       CASE WHEN length(body) <= :listed_bytes THEN body END, event.upstream, app, lane
  FROM pending
  JOIN event USING (seq)
""",
    "dead": """
SELECT seq, message_id, state, kind, accepted_ms, settled_ms, attempts,
       NULL AS failing_since_ms, reason, status, answer,
       CASE WHEN length(body) <= :listed_bytes THEN body END, event.upstream, app, lane
  FROM dead
  JOIN event USING (seq)
""",
    "delivered": """
SELECT seq, message_id, state, NULL AS kind, accepted_ms, settled_ms, 0 AS attempts,
       NULL AS failing_since_ms, NULL AS reason, NULL AS status, NULL AS answer, NULL AS body,
       upstream, app, NULL AS lane
  FROM event
""",
}

# A flipped bit can make NULL of a body.
_MEASURED: dict[State, str] = {
    "pending": "SELECT seq, COALESCE(length(body), 0) FROM pending",
    "dead": "SELECT seq, COALESCE(length(body), 0) FROM dead",
    "delivered": "SELECT seq, 0 FROM event",
}

_CONDITIONS = {
    "message_ids": _KNOWN,
    "upstream": "event.upstream = :upstream",
    "app": "event.app = :app",
    # Not by lane: an event that has both ids lies in the lane of its userId.
    "user": """:user IN (json_extract(CAST(body AS TEXT), '$.userId'),
              json_extract(CAST(body AS TEXT), '$.anonymousId'))""",
    "event": ":event = json_extract(CAST(body AS TEXT), '$.event')",
    "text": "instr(CAST(body AS TEXT), :text) > 0",
    "reason": "reason = :reason",
    "accepted_before_ms": "accepted_ms < :accepted_before_ms",
    "accepted_after_ms": "accepted_ms >= :accepted_after_ms",
}
"""What each given field of a `Selection` asks of a row."""

_CONDITIONS_ON_BODIES = frozenset({"user", "event", "text"})


@dataclass(frozen=True, slots=True)
class Query:
    """A statement with the *values* of its parameters."""

    sql: str
    values: dict[str, Any]


def by_message_id(message_id: str) -> Query:
    """Return what finds the events of that id. Raises `OutboxError` for an id that none can have."""
    return Query(_BY_MESSAGE_ID, _ids((message_id,)))


def may_find(state: State, selection: Selection) -> bool:
    """Return whether there can be events in *state* that *selection* means."""
    return state != "delivered" or not _given(selection) & (_CONDITIONS_ON_BODIES | {"reason"})


def measuring(state: State, *, after: int) -> Query:
    """Return what gives (seq, bytes of the body) for the next `PART_EVENTS` events behind seq *after*."""
    sql = f"{_MEASURED[state]} WHERE seq > :after ORDER BY seq LIMIT :limit"
    return Query(sql, {"after": after, "limit": PART_EVENTS})


def part_ends(measured: Sequence[Sequence[int]]) -> list[int]:
    """Return the last seq of each part of a search, by what `measuring` gives."""
    ends: list[int] = []
    part_bytes = 0
    for seq, body_bytes in measured:
        part_bytes += body_bytes
        if part_bytes >= _PART_BYTES or seq == measured[-1][0]:
            ends.append(seq)
            part_bytes = 0
    return ends


def selecting(state: State, selection: Selection, *, after: int, upto: int, limit: int) -> Query:
    """Return what finds the next *limit* events in *state* with after < seq <= upto.

    Raises `OutboxError` for an id that no event can have.
    """
    given = [_CONDITIONS[name] for name in _given(selection)]
    conditions = ["state = :state", "seq > :after", "seq <= :upto", *given]
    values = {
        "state": state,
        "after": after,
        "upto": upto,
        "limit": limit,
        "listed_bytes": LISTED_BYTES,
        **_ids(selection.message_ids),
        "upstream": None if selection.upstream is None else unlabel(selection.upstream),
        "app": selection.app,
        "event": selection.event,
        "user": selection.user,
        "text": selection.text,
        "reason": selection.reason,
        "accepted_before_ms": selection.accepted_before_ms,
        "accepted_after_ms": selection.accepted_after_ms,
    }
    where = " AND ".join(conditions)
    return Query(f"{_ROWS[state]} WHERE {where} ORDER BY seq LIMIT :limit", values)


def receipt_from(columns: Sequence[Any]) -> Receipt:
    """Return a receipt by the columns of its row, in their order."""
    return Receipt(**dict(zip(Receipt.__slots__, columns, strict=True)))


def receipt_of(receipts: Iterable[Receipt], upstream: str | None) -> Receipt | None:
    """Return that of *upstream*; None: the first."""
    return next((each for each in receipts if upstream in {None, each.upstream}), None)


def _given(selection: Selection) -> set[str]:
    return {name for name in _CONDITIONS if getattr(selection, name) not in (None, ())}


def _ids(message_ids: tuple[str, ...]) -> dict[str, str]:
    try:
        id_hashes = [id_hash(message_id) for message_id in message_ids]
    except UnicodeEncodeError as exc:
        raise OutboxError(f"{exc.object!r}: not valid text, so no event has it") from exc
    return {
        "message_ids": msgspec.json.encode(message_ids).decode(),
        "id_hashes": msgspec.json.encode(id_hashes).decode(),
    }
