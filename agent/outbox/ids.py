"""Which messageIds the outbox knows: a sorted index on disk, and in memory what is not in it yet.

Ids are random, so an index that takes each one at once changes a page of its own for every event;
over a backlog of a million that is ten times what the event itself writes. So the newest ids stay
in memory, and go into the index many at a time, in its order:

    add ─▶ recent ──RECENT of them──▶ merging ──SLICE or more a transaction──▶ table `known`

After a crash nothing is missing: every event above `ledger.indexed_upto` is read into memory when
the outbox is opened. Index and memory hold hashes of messageIds, and neither is believed: an id is
known if there is an event of that seq with that id, for that upstream. Of two ids with the same hash
memory holds one; the other goes to the disk at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from itertools import count

import msgspec

RECENT = 16_384
"""Ids kept in memory until they are merged: some 2 MiB. Merged into a million, three share a page."""

SLICE = 1_024
"""Ids merged with one transaction, so that none takes long."""

Id = str | tuple[str, str]
"""What makes an event the same one: its messageId, for a named upstream with the name in front."""

Key = int | tuple[str, int]
"""What memory knows an id by: the hash of its messageId, for a named upstream with the name in front."""

_UNINDEXED = """
SELECT upstream, message_id, seq
  FROM event
 WHERE seq > (SELECT indexed_upto FROM ledger)
"""

_FIND = """
SELECT event.upstream, event.message_id, event.seq
  FROM known
  JOIN event USING (seq)
 WHERE known.id_hash IN (SELECT value FROM json_each(:id_hashes))
"""

_IS_INDEXED = """
SELECT 1
  FROM known
 WHERE id_hash = :id_hash
   AND seq = :seq
"""

_IS = """
SELECT 1
  FROM event
 WHERE seq = :seq
   AND message_id = :message_id
   AND upstream = :upstream
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


def id_of(upstream: str, message_id: str) -> Id:
    return (upstream, message_id) if upstream else message_id


def key_of(upstream: str, message_id: str) -> Key:
    """Return what memory knows that id by. Another one may have the same, once in centuries."""
    hashed = id_hash(message_id)
    return (upstream, hashed) if upstream else hashed


def hash_of(key: Key) -> int:
    """Return what the index has for *key*: the hash alone, for people look by messageId."""
    return key if isinstance(key, int) else key[1]


def id_hash(message_id: str) -> int:
    """Return the hash of *message_id*: 64 bits, signed as SQLite's integers are."""
    digest = blake2b(message_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class KnownIds:
    """The ids of all events, on the write connection.

    What a transaction changes holds for itself at once, for others once it is `committed`.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._recent: dict[Key, int] = {}
        self._merging: dict[Key, int] = {}
        self._unmerged: list[Key] = []
        """What of `_merging` is not in the index yet, the smallest hash last; some may be forgotten."""
        self._merging_upto = 0
        """The events up to this seq are all in the index or in `_merging`."""
        self._added: dict[Key, int] = {}
        self._gone: list[tuple[Key, int]] = []
        self._merged = 0
        """What the open transaction added, forgot and merged."""
        for upstream, message_id, seq in db.execute(_UNINDEXED):
            key = key_of(upstream, message_id)
            # Of those with the same hash all but one are in the index: any of them, not the later ones.
            if key not in self._recent or not self._is_indexed(key, seq):
                self._recent[key] = seq

    @property
    def due(self) -> bool:
        """Whether `merge` has something to do."""
        return bool(self._unmerged) or len(self._recent) >= RECENT

    def may_be_new(self, keys: Sequence[Key]) -> bool:
        """Return whether all of *keys* differ, and memory knows none: the index still may."""
        return len(set(keys)) == len(keys) and all(
            memory.keys().isdisjoint(keys) for memory in self._memories
        )

    @property
    def _memories(self) -> tuple[dict[Key, int], ...]:
        """The newest first: what was forgotten by the open transaction may stand in the others."""
        return self._added, self._recent, self._merging

    def recall(self, ids: Iterable[Id]) -> dict[Id, int]:
        """Return the seqs of those of *ids* that memory knows: the index may not have them yet."""
        found: dict[Id, int] = {}
        for event_id in ids:
            seq = self._held(_key(event_id))
            if seq is not None and self._is(event_id, seq):
                found[event_id] = seq
        return found

    def find(self, ids: Collection[Id]) -> dict[Id, int]:
        """Return the seqs of those of *ids* that are known."""
        found = self.recall(ids)
        elsewhere = {event_id for event_id in ids if event_id not in found}
        if elsewhere:
            id_hashes = [hash_of(_key(event_id)) for event_id in elsewhere]
            values = {"id_hashes": msgspec.json.encode(id_hashes).decode()}
            for upstream, message_id, seq in self._db.execute(_FIND, values):
                event_id = id_of(upstream, message_id)
                if event_id in elsewhere:
                    found[event_id] = seq
        return found

    def _held(self, key: Key) -> int | None:
        return next((memory[key] for memory in self._memories if key in memory), None)

    def _is_indexed(self, key: Key, seq: int) -> bool:
        values = {"id_hash": hash_of(key), "seq": seq}
        return self._db.execute(_IS_INDEXED, values).fetchone() is not None

    def _is(self, event_id: Id, seq: int) -> bool:
        upstream, message_id = _upstream_and_message_id(event_id)
        values = {"seq": seq, "message_id": message_id, "upstream": upstream}
        return self._db.execute(_IS, values).fetchone() is not None

    def add(self, keys: Sequence[Key], first_seq: int) -> None:
        """Know new events, whose seqs begin at *first_seq* and are the highest so far."""
        if self.may_be_new(keys):
            self._added.update(zip(keys, count(first_seq), strict=False))
            return
        for seq, key in enumerate(keys, first_seq):
            held = self._held(key)
            if held is None or (key, held) in self._gone:
                self._added[key] = seq
            else:
                self._index([(hash_of(key), seq)])

    def index(self, ids: Iterable[tuple[Id, int]]) -> None:
        """Know events that are not new, as (id, seq): they go to the disk at once."""
        self._index(sorted((hash_of(_key(event_id)), seq) for event_id, seq in ids))

    def move(self, event_id: Id, old_seq: int, new_seq: int) -> None:
        """Know an event by another seq, the highest so far."""
        self.forget([(event_id, old_seq)])
        self.add([_key(event_id)], new_seq)

    def forget(self, ids: Iterable[tuple[Id, int]]) -> None:
        """Forget events, as (id, seq)."""
        gone = [(_key(event_id), seq) for event_id, seq in ids]
        rows = sorted((hash_of(key), seq) for key, seq in gone)
        self._db.executemany(_FORGET, [{"id_hash": hashed, "seq": seq} for hashed, seq in rows])
        self._gone += gone

    def merge(self) -> None:
        """Move a slice of what is in memory to the disk, if there is enough of it."""
        if not self.due:
            return
        if not self._unmerged:
            self._merging, self._recent = self._recent, {}
            self._merging_upto = max(self._merging.values())
            self._unmerged = sorted(self._merging, key=hash_of, reverse=True)
        # Faster than events come in, however many a transaction brings, or memory would grow.
        self._merged = min(max(SLICE, 2 * len(self._added)), len(self._unmerged))
        gone = {seq for _, seq in self._gone}
        self._index(
            [
                (hash_of(key), seq)
                for key in reversed(self._unmerged[-self._merged :])
                if (seq := self._merging.get(key)) is not None and seq not in gone
            ]
        )
        if self._merged == len(self._unmerged):
            self._db.execute(_SET_INDEXED, {"upto": self._merging_upto})

    def _index(self, entries: list[tuple[int, int]]) -> None:
        # One statement: `executemany` waits for the interpreter lock at each row.
        self._db.execute(_INDEX, {"entries": msgspec.json.encode(entries).decode()})

    def committed(self) -> None:
        """The transaction holds."""
        for key, seq in self._gone:
            for memory in (self._recent, self._merging):
                if memory.get(key) == seq:
                    del memory[key]
        self._recent.update(self._added)
        if self._unmerged:
            del self._unmerged[len(self._unmerged) - self._merged :]
            if not self._unmerged:
                self._merging = {}
        self.rolled_back()

    def rolled_back(self) -> None:
        """The transaction never was."""
        self._added, self._gone, self._merged = {}, [], 0


def _key(event_id: Id) -> Key:
    return key_of(*_upstream_and_message_id(event_id))


def _upstream_and_message_id(event_id: Id) -> tuple[str, str]:
    return ("", event_id) if isinstance(event_id, str) else event_id
