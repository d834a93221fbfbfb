"""What is done for every event, append and ack, each as one statement.

Beside a busy event loop the database's thread gets the interpreter lock back from a call into SQLite
only when the loop pauses, and that takes longer than most statements: a transaction of ten calls left
the disk idle for most of the time. One statement is one call, a transaction of its own where none is
open, and SQLite carries all of it out without the interpreter.

SQLite has no stored procedures; a trigger on a view comes to the same. Views and triggers are temporary:
they belong to the write connection, and are not in the file.

    INSERT INTO incoming  ─▶  event · pending · ledger     all of its rows, or none if any is known
    INSERT INTO acked     ─▶  pending · event · ledger     one row, with the seqs as JSON
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import cache
from itertools import chain, repeat

import msgspec

from agent.event import Event
from agent.outbox.ids import Key, hash_of

MOST_ROWS = 256
"""Of one append: to prepare the statement for so many takes some 700 KiB, which stay with the process."""

MOST_BYTES = 1024 * 1024
"""Of the bodies of one append, if they are several: SQLite copies them twice to run it, and a prepared
statement keeps one of the copies until it is run again."""

_INSTALL = (
    # What a statement sets aside while it runs must not need the disk, which may be full.
    """
    PRAGMA temp_store = MEMORY
    """,
    """
    CREATE TEMP VIEW IF NOT EXISTS incoming AS
    SELECT NULL AS seq, NULL AS message_id, NULL AS id_hash, NULL AS digest, NULL AS kind,
           NULL AS lane, NULL AS received_ms, NULL AS body, NULL AS upstream, NULL AS app,
           NULL AS last_of
    """,
    """
    CREATE TEMP TRIGGER IF NOT EXISTS append INSTEAD OF INSERT ON incoming
      WHEN NEW.seq > 0
     BEGIN
           SELECT RAISE(ABORT, 'known')
             FROM known
             JOIN event USING (seq)
            WHERE known.id_hash = NEW.id_hash
              AND event.message_id = NEW.message_id
              AND event.upstream = NEW.upstream;
           INSERT INTO event (seq, message_id, digest, state, accepted_ms, upstream, app)
           VALUES (NEW.seq, NEW.message_id, NEW.digest, 'pending', NEW.received_ms, NEW.upstream,
                   NEW.app);
           INSERT INTO pending (seq, kind, lane, queued_ms, body, upstream)
           VALUES (NEW.seq, NEW.kind, NEW.lane, NEW.received_ms, NEW.body, NEW.upstream);
           UPDATE ledger
              SET last_seq = NEW.seq,
                  accepted = accepted + NEW.last_of,
                  pending  = pending + NEW.last_of
            WHERE NEW.last_of IS NOT NULL;
       END
    """,
    """
    CREATE TEMP VIEW IF NOT EXISTS acked AS
    SELECT NULL AS seqs, NULL AS now_ms
    """,
    # changes() is of the statement before, within the same trigger.
    """
    CREATE TEMP TRIGGER IF NOT EXISTS ack INSTEAD OF INSERT ON acked
     BEGIN
           DELETE FROM pending
            WHERE seq IN (SELECT value FROM json_each(NEW.seqs));
           UPDATE event
              SET state = 'delivered',
                  settled_ms = NEW.now_ms
            WHERE seq IN (SELECT value FROM json_each(NEW.seqs))
              AND state = 'pending';
           UPDATE ledger
              SET pending   = pending - changes(),
                  delivered = delivered + changes();
       END
    """,
)

_ACK = """
INSERT INTO acked (seqs, now_ms)
VALUES (:seqs, :now_ms)
"""

Keyed = tuple[Key, Event]
"""An event, with what memory knows its id by."""

_COLUMNS = 10
"""Of `incoming`, but for the last: only the last row says how many the statement has."""


def part(events: Sequence[Keyed]) -> list[Sequence[Keyed]]:
    """Part *events*, in their order, so that each part fits one append."""
    parts: list[Sequence[Keyed]] = []
    start = part_bytes = 0
    for end, (_, event) in enumerate(events):
        part_bytes += len(event.body)
        if end - start == MOST_ROWS or (part_bytes > MOST_BYTES and end > start):
            parts.append(events[start:end])
            start, part_bytes = end, len(event.body)
    return [*parts, events[start:]] if events else []


class KnownError(Exception):
    """One of the events to append is in the index of ids already; none was stored."""


class Procedures:
    """The two verbs, on the one write connection. Each is a transaction, unless one is open."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        for statement in _INSTALL:
            db.execute(statement)

    def append(self, events: Sequence[Keyed], *, first_seq: int) -> None:
        """Store new events that fit one append. Raises `KnownError`, and then has stored none."""
        # sqlite3 binds a bytearray as it is. For bytes, and for None, it looks for an adapter, which
        # takes longer than to copy an event.
        rows = [
            (
                seq,
                event.message_id,
                hash_of(key),
                bytearray(event.digest),
                event.kind,
                event.lane,
                event.received_ms,
                bytearray(event.body),
                event.upstream,
                event.app,
            )
            for seq, (key, event) in enumerate(events, first_seq)
        ]
        size = 1 << (len(rows) - 1).bit_length()
        filling = repeat(0, _COLUMNS * (size - len(rows)))
        values = [*filling, *chain.from_iterable(rows), len(rows)]
        try:
            self._db.execute(_insertion(size), values)
        except sqlite3.IntegrityError as exc:
            if exc.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_TRIGGER:
                raise KnownError from exc
            raise

    def ack(self, seqs: Sequence[int], *, now_ms: int) -> int:
        """Settle pending events as delivered; return how many still were pending."""
        before = self._db.total_changes
        self._db.execute(_ACK, {"seqs": msgspec.json.encode(seqs).decode(), "now_ms": now_ms})
        # Two rows for each, and once that of the ledger.
        return (self._db.total_changes - before) // 2


@cache
def _insertion(rows: int) -> str:
    """Return the statement for so many rows.

    They are powers of two: nine statements in all, which stay prepared. What is more than the events
    is rows of zeros, in front, which the trigger passes over.
    """
    row = ", ".join("?" * _COLUMNS)
    return " ".join(["INSERT INTO incoming VALUES", f"({row}, NULL)," * (rows - 1), f"({row}, ?)"])
