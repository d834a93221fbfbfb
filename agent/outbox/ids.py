"""Which messageIds the outbox knows: a sorted index on disk, and in memory what is not in it yet.

Ids are random, so an index that takes each one at once changes a page of its own for every event;
over a backlog of a million that is ten times what the event itself writes. So the newest ids stay
in memory, and go into the index many at a time, in its order:

    add ─▶ recent ──RECENT of them──▶ merging ──SLICE or more a transaction──▶ table `known`

After a crash nothing is missing: every event above `ledger.indexed_upto` is read into memory when
the outbox is opened. The index holds hashes, and neither it nor the memory is believed: an id is
known if there is an event of that seq with that id.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from hashlib import blake2b

import msgspec

RECENT = 16_384
"""Ids kept in memory until they are merged: some 2 MiB. Merged into a million, three share a page."""

SLICE = 1_024
"""Ids merged with one transaction, so that none takes long."""

_UNINDEXED = """
SELECT message_id, seq
  FROM event
 WHERE seq > (SELECT indexed_upto FROM ledger)
"""

_FIND = """
SELECT event.message_id, event.seq
  FROM known
  JOIN event USING (seq)
 WHERE known.id_hash IN (SELECT value FROM json_each(:id_hashes))
"""

_IS = """
SELECT 1
  FROM event
 WHERE seq = :seq
   AND message_id = :message_id
"""

_INDEX = """
INSERT INTO known (id_hash, seq)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]')
  FROM json_each(:entries)
 WHERE TRUE
    ON CONFLICT DO NOTHING
"""

_SET_INDEXED = """
UPDATE ledger
   SET indexed_upto = :upto
"""

_FORGET = """
DELETE FROM known
 WHERE id_hash = :id_hash
   AND seq = :seq
"""


def id_hash(message_id: str) -> int:
    """Return the key of *message_id* in the index: 64 bits, signed as SQLite's integers are."""
    digest = blake2b(message_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class KnownIds:
    """The ids of all events, on the write connection.

    What a transaction changes holds for itself at once, for others once it is `committed`.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._recent: dict[str, int] = dict(db.execute(_UNINDEXED).fetchall())
        self._merging: dict[str, int] = {}
        self._unmerged: list[tuple[int, str]] = []
        """What of `_merging` is not in the index yet: (hash, messageId), the smallest hash last."""
        self._merging_upto = 0
        """The events up to this seq are all in the index or in `_merging`."""
        self._added: dict[str, int] = {}
        self._gone: list[tuple[str, int]] = []
        self._merged = 0
        """What the open transaction added, forgot and merged."""

    def find(self, message_ids: Collection[str]) -> dict[str, int]:
        """Return the seqs of those of *message_ids* that are known."""
        found: dict[str, int] = {}
        elsewhere: list[str] = []
        for message_id in message_ids:
            seq = (
                self._added.get(message_id)
                or self._recent.get(message_id)
                or self._merging.get(message_id)
            )
            if seq is not None and self._is(message_id, seq):
                found[message_id] = seq
            else:
                elsewhere.append(message_id)
        if elsewhere:
            wanted = set(elsewhere)
            id_hashes = msgspec.json.encode([id_hash(name) for name in elsewhere]).decode()
            rows = self._db.execute(_FIND, {"id_hashes": id_hashes})
            found |= {message_id: seq for message_id, seq in rows if message_id in wanted}
        return found

    def _is(self, message_id: str, seq: int) -> bool:
        row = self._db.execute(_IS, {"seq": seq, "message_id": message_id}).fetchone()
        return row is not None

    def add(self, message_id: str, seq: int) -> None:
        """Know the new event *seq*, the highest so far, by its id."""
        self._added[message_id] = seq

    def index(self, ids: Iterable[tuple[str, int]]) -> None:
        """Know events that are not new, as (messageId, seq): they go to the disk at once."""
        self._index(sorted((id_hash(message_id), seq) for message_id, seq in ids))

    def forget(self, ids: Iterable[tuple[str, int]]) -> None:
        """Forget events that are gone or have another seq now, as (messageId, old seq)."""
        gone = list(ids)
        rows = sorted((id_hash(message_id), seq) for message_id, seq in gone)
        self._db.executemany(_FORGET, [{"id_hash": key, "seq": seq} for key, seq in rows])
        self._gone += gone

    def merge(self) -> None:
        """Move a slice of what is in memory to the disk, if there is enough of it."""
        if not self._unmerged:
            if len(self._recent) < RECENT:
                return
            self._merging, self._recent = self._recent, {}
            self._merging_upto = max(self._merging.values())
            self._unmerged = sorted(
                ((id_hash(message_id), message_id) for message_id in self._merging), reverse=True
            )
        # Faster than events come in, however many a transaction brings, or memory would grow.
        self._merged = min(max(SLICE, 2 * len(self._added)), len(self._unmerged))
        gone = {
            message_id for message_id, seq in self._gone if self._merging.get(message_id) == seq
        }
        self._index(
            [
                (key, self._merging[message_id])
                for key, message_id in reversed(self._unmerged[-self._merged :])
                if message_id in self._merging and message_id not in gone
            ]
        )
        if self._merged == len(self._unmerged):
            self._db.execute(_SET_INDEXED, {"upto": self._merging_upto})

    def _index(self, entries: list[tuple[int, int]]) -> None:
        # One statement: `executemany` waits for the interpreter lock at each row.
        self._db.execute(_INDEX, {"entries": msgspec.json.encode(entries).decode()})

    def committed(self) -> None:
        """The transaction holds."""
        for message_id, seq in self._gone:
            for memory in (self._recent, self._merging):
                if memory.get(message_id) == seq:
                    del memory[message_id]
        self._recent.update(self._added)
        if self._merged:
            del self._unmerged[-self._merged :]
            if not self._unmerged:
                self._merging = {}
        self.rolled_back()

    def rolled_back(self) -> None:
        """The transaction never was."""
        self._added, self._gone, self._merged = {}, [], 0
