"""The tables, and how an older database becomes a current one.

    event     one row per known messageId: the idempotency memory and the state machine
    known     finds an event by its messageId, through a hash of it (outbox.ids)
    pending   the queue: what the upstream does not have yet
    dead      dead letters, with the upstream's last answer
    ledger    one row of counters, whose CHECK is promise 2
    salvage   one row per damaged database that was set aside (outbox.rescue), by its file's name
    app       one row per app: the digest of its token, and what became of its events (outbox.apps)

An event's bytes live in `pending` or `dead` and go when it is delivered; its small row in
`event` stays for `outbox.delivered_retention`. Rows leave `pending` at the front, so whole pages
come free. `seq` is the order of acceptance; the writer assigns it from `ledger.last_seq`, never
twice, so a reader's cursor cannot skip an event.

`upstream` is the name of the one an event is for, empty for the default one. An event is its
upstream and its messageId: the same id for two upstreams is two events.

An event is stored by writing at the end of two tables and in the ledger: nothing that is written
for each event is ordered by anything random, or a backlog would slow down the intake.
"""

from __future__ import annotations

import sqlite3

_V1 = (
    """
    CREATE TABLE event (
        seq         INTEGER PRIMARY KEY,
        message_id  TEXT    NOT NULL UNIQUE,
        digest      BLOB    NOT NULL CHECK (length(digest) = 16),
        state       TEXT    NOT NULL CHECK (state IN ('pending', 'dead', 'delivered')),
        accepted_ms INTEGER NOT NULL,
        settled_ms  INTEGER CHECK ((settled_ms IS NULL) = (state = 'pending'))
    ) STRICT
    """,
    # Prunes what was remembered long enough (store.prune).
    """
    CREATE INDEX event_delivered ON event (settled_ms) WHERE state = 'delivered'
    """,
    """
    CREATE TABLE pending (
        seq              INTEGER PRIMARY KEY,
        kind             TEXT    NOT NULL
                         CHECK (kind IN ('track', 'identify', 'page', 'screen', 'group')),
        lane             INTEGER NOT NULL,
        queued_ms        INTEGER NOT NULL,
        attempts         INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
        failing_since_ms INTEGER CHECK ((failing_since_ms IS NULL) = (attempts = 0)),
        body             BLOB    NOT NULL
    ) STRICT
    """,
    # Reads on in one user's events (reader.lane).
    """
    CREATE INDEX pending_lane ON pending (lane, seq)
    """,
    """
    CREATE TABLE dead (
        seq      INTEGER PRIMARY KEY,
        kind     TEXT    NOT NULL
                 CHECK (kind IN ('track', 'identify', 'page', 'screen', 'group')),
        lane     INTEGER NOT NULL,
        attempts INTEGER NOT NULL CHECK (attempts >= 0),
        reason   TEXT    NOT NULL CHECK (reason IN ('rejected', 'gave_up', 'expired')),
        status   INTEGER,
        answer   TEXT    NOT NULL,
        body     BLOB    NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE ledger (
        id         INTEGER PRIMARY KEY CHECK (id = 1),
        last_seq   INTEGER NOT NULL DEFAULT 0 CHECK (last_seq >= 0),
        accepted   INTEGER NOT NULL DEFAULT 0,
        delivered  INTEGER NOT NULL DEFAULT 0 CHECK (delivered >= 0),
        pending    INTEGER NOT NULL DEFAULT 0 CHECK (pending >= 0),
        dead       INTEGER NOT NULL DEFAULT 0 CHECK (dead >= 0),
        discarded  INTEGER NOT NULL DEFAULT 0 CHECK (discarded >= 0),
        evicted    INTEGER NOT NULL DEFAULT 0 CHECK (evicted BETWEEN 0 AND discarded),
        duplicates INTEGER NOT NULL DEFAULT 0 CHECK (duplicates >= 0),
        conflicts  INTEGER NOT NULL DEFAULT 0 CHECK (conflicts BETWEEN 0 AND duplicates),
        paused     INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)),
        CHECK (accepted = delivered + pending + dead + discarded)
    ) STRICT
    """,
    """
    INSERT INTO ledger (id) VALUES (1)
    """,
)

_V2 = (
    """
    CREATE TABLE known (
        id_hash INTEGER NOT NULL,
        seq     INTEGER NOT NULL,
        PRIMARY KEY (id_hash, seq)
    ) STRICT, WITHOUT ROWID
    """,
    """
    INSERT INTO known (id_hash, seq)
    SELECT id_hash(message_id), seq
      FROM event
     ORDER BY 1
    """,
    # The same without UNIQUE, whose index the newest ids would hit all over.
    """
    CREATE TABLE event_2 (
        seq         INTEGER PRIMARY KEY,
        message_id  TEXT    NOT NULL,
        digest      BLOB    NOT NULL CHECK (length(digest) = 16),
        state       TEXT    NOT NULL CHECK (state IN ('pending', 'dead', 'delivered')),
        accepted_ms INTEGER NOT NULL,
        settled_ms  INTEGER CHECK ((settled_ms IS NULL) = (state = 'pending'))
    ) STRICT
    """,
    """
    INSERT INTO event_2 (seq, message_id, digest, state, accepted_ms, settled_ms)
    SELECT seq, message_id, digest, state, accepted_ms, settled_ms
      FROM event
    """,
    """
    DROP TABLE event
    """,
    """
    ALTER TABLE event_2 RENAME TO event
    """,
    # Prunes what was remembered long enough (store.prune).
    """
    CREATE INDEX event_delivered ON event (settled_ms) WHERE state = 'delivered'
    """,
    # A user's events are found by walking the queue, where what is left of it is mostly theirs.
    """
    DROP INDEX pending_lane
    """,
    """
    ALTER TABLE ledger
      ADD COLUMN indexed_upto INTEGER NOT NULL DEFAULT 0
                 CHECK (indexed_upto BETWEEN 0 AND last_seq)
    """,
    """
    UPDATE ledger
       SET indexed_upto = last_seq
    """,
    """
    CREATE TABLE salvage (
        name      TEXT    PRIMARY KEY,
        state     TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed')),
        found_ms  INTEGER NOT NULL,
        floor     INTEGER NOT NULL CHECK (floor >= 0),
        pending   INTEGER NOT NULL DEFAULT 0 CHECK (pending >= 0),
        dead      INTEGER NOT NULL DEFAULT 0 CHECK (dead >= 0),
        delivered INTEGER NOT NULL DEFAULT 0 CHECK (delivered >= 0),
        lost      INTEGER NOT NULL DEFAULT 0 CHECK (lost >= 0)
    ) STRICT
    """,
)

# Adding a column reads a STRICT table to its end, and writes none of it.
_V3 = (
    """
    ALTER TABLE event
      ADD COLUMN upstream TEXT NOT NULL DEFAULT ''
    """,
    """
    ALTER TABLE pending
      ADD COLUMN upstream TEXT NOT NULL DEFAULT ''
    """,
    """
    ALTER TABLE dead
      ADD COLUMN upstream TEXT NOT NULL DEFAULT ''
    """,
    # The queue of a named upstream (reader.scan), and how many wait in it (store). Without named
    # ones it is empty, and costs nothing.
    """
    CREATE INDEX pending_named ON pending (upstream, seq) WHERE upstream <> ''
    """,
    # Those that a person paused by name, as records.label has it, with spaces between them. In the
    # ledger, for that survives damage.
    """
    ALTER TABLE ledger
      ADD COLUMN paused_upstreams TEXT NOT NULL DEFAULT ''
    """,
)

# `app` stands in `event` alone, whose rows are small; an index on it would be written for each event.
_V4 = (
    """
    ALTER TABLE event
      ADD COLUMN app TEXT NOT NULL DEFAULT ''
    """,
    # The counters have the CHECK of the ledger, for each app by itself. body_bytes is of what is
    # pending or dead.
    """
    CREATE TABLE app (
        name         TEXT    PRIMARY KEY,
        token_digest BLOB    CHECK (length(token_digest) = 32),
        created_ms   INTEGER NOT NULL,
        revoked_ms   INTEGER CHECK (revoked_ms IS NULL OR token_digest IS NOT NULL),
        accepted     INTEGER NOT NULL CHECK (accepted >= 0),
        delivered    INTEGER NOT NULL CHECK (delivered >= 0),
        pending      INTEGER NOT NULL CHECK (pending >= 0),
        dead         INTEGER NOT NULL CHECK (dead >= 0),
        discarded    INTEGER NOT NULL CHECK (discarded >= 0),
        body_bytes   INTEGER NOT NULL CHECK (body_bytes >= 0),
        CHECK (accepted = delivered + pending + dead + discarded)
    ) STRICT
    """,
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_V1, _V2, _V3, _V4)
"""Statements that lead from user_version n to n + 1. Append only: databases in the field ran these."""

VERSION = len(MIGRATIONS)

APPLICATION_ID = 0x54724167
"""Marks the file as ours ("TrAg"), for file(1) and against opening another program's database."""


def migrate(db: sqlite3.Connection, found: int) -> None:
    """Bring a database of user_version *found* to `VERSION`, one transaction a version.

    The statements may use the SQL function `id_hash`.
    """
    for version in range(found, VERSION):
        db.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[version]:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {version + 1}")
        db.commit()
