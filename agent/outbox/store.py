"""The SQL verbs: each changes the rows and the ledger together, inside the writer's transaction.

`Store` knows SQL and no policy: when to call a verb, and what a full disk means, is the writer's.
It runs in the thread of the write connection (`Database.transact`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, assert_never

import msgspec

from agent.event import Event
from agent.outbox.apps import Apps, shared
from agent.outbox.backlogs import Backlogs
from agent.outbox.ids import Id, KnownIds, id_of, key_of
from agent.outbox.procedures import Keyed, KnownError, Procedures, part
from agent.outbox.records import Ack, Appended, Bury, Retry, Settlement, State

_LAST_SEQ = """
SELECT last_seq
  FROM ledger
"""

_DIGEST = """
SELECT digest
  FROM event
 WHERE seq = :seq
"""

_ID = """
SELECT upstream, message_id
  FROM event
 WHERE seq = :seq
   AND state = :state
"""

_COUNT_DUPLICATES = """
UPDATE ledger
   SET duplicates = duplicates + :duplicates,
       conflicts  = conflicts + :conflicts
"""

_DELETE_PENDING = """
DELETE FROM pending
 WHERE seq IN (SELECT value FROM json_each(:seqs))
"""

_FORGET = """
DELETE FROM event
 WHERE seq = :seq
   AND state = :state
"""

_DELETE_EXPIRED = """
DELETE FROM dead
 WHERE seq = :seq
   AND reason = 'expired'
"""

_MARK_EXPIRED_DELIVERED = """
UPDATE event
   SET state = 'delivered',
       settled_ms = :now_ms
 WHERE seq = :seq
   AND state = 'dead'
"""

_COUNT_EXPIRED_DELIVERED = """
UPDATE ledger
   SET dead      = dead - 1,
       delivered = delivered + 1
"""

_COUNT_ATTEMPT = """
UPDATE pending
   SET attempts = attempts + 1,
       failing_since_ms = COALESCE(failing_since_ms, :now_ms)
 WHERE seq = :seq
"""

_INSERT_DEAD = """
INSERT INTO dead (seq, kind, lane, attempts, reason, status, answer, body, upstream)
SELECT seq, kind, lane, attempts + :attempts, :reason, :status, :answer, body, upstream
  FROM pending
 WHERE seq = :seq
    ON CONFLICT (seq) DO NOTHING
"""

_MARK_DEAD = """
UPDATE event
   SET state = 'dead',
       settled_ms = :now_ms
 WHERE seq = :seq
   AND state = 'pending'
"""

_COUNT_BURIED = """
UPDATE ledger
   SET pending = pending - :n,
       dead    = dead + :n
"""

_OLDEST = """
SELECT seq, length(body)
  FROM pending
 ORDER BY seq
 LIMIT :limit
"""

_COUNT_EVICTED = """
UPDATE ledger
   SET pending   = pending - :n,
       discarded = discarded + :n,
       evicted   = evicted + :n
"""

# Only the front is looked at: behind an event that is young enough, all are.
_EXPIRED = """
SELECT seq
  FROM (SELECT seq, queued_ms
          FROM pending
         ORDER BY seq
         LIMIT :limit)
 WHERE queued_ms < :cutoff_ms
"""

_DELIVERED_BEFORE = """
SELECT seq
  FROM event
 WHERE state = 'delivered'
   AND settled_ms < :cutoff_ms
 ORDER BY settled_ms
 LIMIT :limit
"""

_PENDING = """
SELECT pending
  FROM ledger
"""

_TOUCH = """
UPDATE ledger
   SET last_seq = :last_seq
"""

_PAGES = """
SELECT (SELECT page_count FROM pragma_page_count),
       (SELECT freelist_count FROM pragma_freelist_count),
       (SELECT page_size FROM pragma_page_size)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What the database takes, in bytes: *used* by something, *free* in pages that hold nothing."""

    used: int
    free: int


class Store:
    """The verbs, on the one write connection.

    Each expects an open transaction, but `append` and `settle`: these begin one, unless a single
    statement is all there is to do, which is a transaction by itself.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        """Read what is kept in memory of a migrated database."""
        self._db = db
        self._procedures = Procedures(db)
        self.ids = KnownIds(db)
        self.last_seq: int
        """The highest seq ever given."""
        ((self.last_seq,),) = self.fetch(_LAST_SEQ)
        self.withdrawn = 0
        """How many pending events were evicted or expired: whoever has read some must look again."""
        self.withdrawn_upto = 0
        """The highest seq among those."""
        self.apps = Apps(db)
        self.backlogs = Backlogs(db)
        self._withdrawing: list[int] = []
        """What the open transaction evicts and expires."""

    def committed(self) -> None:
        self.ids.committed()
        if self._withdrawing:
            self.withdrawn_upto = max(self.withdrawn_upto, *self._withdrawing)
            self.withdrawn += len(self._withdrawing)
            self._withdrawing = []
        self.apps.committed()
        self.backlogs.committed()

    def rolled_back(self) -> None:
        self.ids.rolled_back()
        self.apps.rolled_back()
        self.backlogs.rolled_back()
        self._withdrawing = []

    def begin(self) -> None:
        """Begin a transaction where none is open: before the first of several statements."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def append(self, events: Sequence[Event]) -> list[Appended]:
        """Queue the events whose ids are not known yet; return what became of each, in order."""
        fresh = [(key_of(event.upstream, event.message_id), event) for event in events]
        if not self.ids.may_be_new([key for key, _ in fresh]):
            fresh = self._not_recalled(fresh)
        parts = part(fresh)
        one_statement = (
            not self._db.in_transaction
            and len(parts) == 1
            and len(fresh) == len(events)
            and not self.ids.due
            and not any(event.app for event in events)
        )
        if not one_statement:
            self.begin()
        stored = [event for each in parts for event in self._append_fresh(each)]
        results = [Appended.STORED] * len(events)
        if len(stored) < len(events):
            results = self._tell_apart(events, stored)
        self.ids.merge()
        return results

    def _not_recalled(self, keyed: Sequence[Keyed]) -> list[Keyed]:
        """Return the first of each id that memory does not know."""
        first = dict[Id, Keyed]()
        for key, event in keyed:
            first.setdefault(_id(event), (key, event))
        recalled = self.ids.recall(first)
        return [first[event_id] for event_id in first if event_id not in recalled]

    def _append_fresh(self, fresh: Sequence[Keyed]) -> list[Event]:
        """Queue those of *fresh* that are not in the index either; return them."""
        try:
            self._insert(fresh)
        except KnownError:
            self.begin()
            known = self.ids.find([_id(event) for _, event in fresh])
            fresh = [(key, event) for key, event in fresh if _id(event) not in known]
            if fresh:
                self._insert(fresh)
        return [event for _, event in fresh]

    def _insert(self, fresh: Sequence[Keyed]) -> None:
        """Queue new events that fit one append. Raises `KnownError`, and then has queued none."""
        first = self.last_seq + 1
        # Burnt even if the transaction fails: a seq is never given twice.
        self.last_seq += len(fresh)
        self._procedures.append(fresh, first_seq=first)
        self.ids.add([key for key, _ in fresh], first)
        named = [event for _, event in fresh if event.upstream or event.app]
        self.backlogs.grow(event.upstream for event in named)
        for share in shared((event.app, event.body) for event in named):
            self.apps.take_in(share, "pending", now_ms=named[0].received_ms)

    def _tell_apart(self, events: Sequence[Event], stored: Iterable[Event]) -> list[Appended]:
        """Return what became of *events*, of which some were known; the first of an id was *stored*."""
        left = {_id(event) for event in stored}
        known = self.ids.find({_id(event) for event in events})
        results: list[Appended] = []
        for event in events:
            event_id = _id(event)
            if event_id in left:
                left.remove(event_id)
                results.append(Appended.STORED)
            else:
                results.append(self._compare(event, known[event_id]))
        self.change(
            _COUNT_DUPLICATES,
            duplicates=len(events) - results.count(Appended.STORED),
            conflicts=results.count(Appended.CONFLICTING),
        )
        return results

    def _compare(self, event: Event, seq: int) -> Appended:
        ((digest,),) = self.fetch(_DIGEST, seq=seq)
        return Appended.REPLAYED if event.digest == digest else Appended.CONFLICTING

    def knows_all(self, events: Sequence[Event]) -> bool:
        """Return whether each id is pending, dead or remembered as delivered."""
        ids = {_id(event) for event in events}
        return len(self.ids.find(ids)) == len(ids)

    def unknown(self, events: Sequence[Event]) -> list[Event]:
        """Return those whose id is not known yet."""
        known = self.ids.find({_id(event) for event in events})
        return [event for event in events if _id(event) not in known]

    def settle(self, settlements: Iterable[Settlement], *, now_ms: int, remember: bool) -> None:
        """Apply what the forwarder decided. Without *remember*, a delivered id is forgotten at once.

        An event that is no longer pending (evicted while it was sent) is passed over; an ack of
        one that expired meanwhile counts as delivered.
        """
        acks: list[int] = []
        retries: list[dict[str, Any]] = []
        buries: list[Bury] = []
        for settlement in settlements:
            match settlement:
                case Ack(seq):
                    acks.append(seq)
                case Retry(seq):
                    retries.append({"seq": seq, "now_ms": now_ms})
                case Bury():
                    buries.append(settlement)
                case _:
                    assert_never(settlement)
        one_statement = (
            not retries
            and not buries
            and remember
            and not self.backlogs.pending
            and not self.apps.holds("pending")
        )
        if not one_statement:
            self.begin()
        if acks:
            self._ack(acks, now_ms=now_ms, remember=remember)
        if retries:
            self.change_each(_COUNT_ATTEMPT, retries)
        if buries:
            self._bury(buries, attempts=1, now_ms=now_ms)

    def _ack(self, acks: list[int], *, now_ms: int, remember: bool) -> None:
        self._leave_queue(acks, "delivered")
        delivered = self._procedures.ack(acks, now_ms=now_ms)
        if not remember:
            self.forget(acks, "delivered")
        if delivered < len(acks):
            self._ack_expired(acks, now_ms=now_ms, remember=remember)

    def _ack_expired(self, acks: list[int], *, now_ms: int, remember: bool) -> None:
        """Count as delivered what expired while its request was under way."""
        self.begin()
        for seq in acks:
            shares = self.apps.shares([seq], "dead")
            if self.change(_DELETE_EXPIRED, seq=seq):
                self.apps.move(shares, "dead", "delivered")
                if remember:
                    self.change(_MARK_EXPIRED_DELIVERED, seq=seq, now_ms=now_ms)
                else:
                    self.forget([seq], "dead")
                self.change(_COUNT_EXPIRED_DELIVERED)

    def _bury(self, buries: Iterable[Bury], *, attempts: int, now_ms: int) -> int:
        """Set those aside that are still pending, after so many more *attempts*; return how many."""
        rows = [{**asdict(bury), "attempts": attempts, "now_ms": now_ms} for bury in buries]
        self.change_each(_INSERT_DEAD, rows)
        self._delete_pending([row["seq"] for row in rows], "dead")
        buried = self.change_each(_MARK_DEAD, rows)
        self.change(_COUNT_BURIED, n=buried)
        return buried

    def _delete_pending(
        self, seqs: list[int], to: Literal["delivered", "dead", "discarded"]
    ) -> None:
        self._leave_queue(seqs, to)
        self.change(_DELETE_PENDING, seqs=msgspec.json.encode(seqs).decode())

    def _leave_queue(self, seqs: list[int], to: Literal["delivered", "dead", "discarded"]) -> None:
        """Take those of *seqs* that are pending off the counts of their apps and upstreams."""
        self.apps.move(self.apps.shares(seqs, "pending"), "pending", to)
        self.backlogs.shrink(seqs)

    def evict(self, room_bytes: int, *, limit: int) -> int:
        """Discard the oldest pending, at most *limit*, until their bodies add up to *room_bytes*."""
        seqs: list[int] = []
        freed_bytes = 0
        for seq, body_bytes in self.fetch(_OLDEST, limit=limit):
            if freed_bytes >= room_bytes:
                break
            seqs.append(seq)
            freed_bytes += body_bytes
        self._delete_pending(seqs, "discarded")
        evicted = self.forget(seqs, "pending")
        self.change(_COUNT_EVICTED, n=evicted)
        self._withdrawing += seqs
        return evicted

    def expire(self, cutoff_ms: int, *, now_ms: int, limit: int) -> int:
        """Set aside those of the oldest *limit* pending that were queued before *cutoff_ms*."""
        seqs = [seq for (seq,) in self.fetch(_EXPIRED, cutoff_ms=cutoff_ms, limit=limit)]
        buries = [Bury(seq=seq, reason="expired", status=None, answer="") for seq in seqs]
        expired = self._bury(buries, attempts=0, now_ms=now_ms)
        self._withdrawing += seqs
        return expired

    def prune(self, cutoff_ms: int, *, limit: int) -> int:
        """Forget at most *limit* ids that were delivered before *cutoff_ms*; return how many."""
        seqs = [seq for (seq,) in self.fetch(_DELIVERED_BEFORE, cutoff_ms=cutoff_ms, limit=limit)]
        return self.forget(seqs, "delivered")

    def forget(self, seqs: Iterable[int], state: State) -> int:
        """Forget the events among *seqs* that are in *state*; return how many."""
        ids = self.ids_of(seqs, state)
        self.ids.forget(ids)
        return self.change_each(_FORGET, [{"seq": seq, "state": state} for _, seq in ids])

    def ids_of(self, seqs: Iterable[int], state: State) -> list[tuple[Id, int]]:
        """Return (id, seq) of the events among *seqs* that are in *state*."""
        return [
            (id_of(upstream, message_id), seq)
            for seq in seqs
            for upstream, message_id in self.fetch(_ID, seq=seq, state=state)
        ]

    def pending(self) -> int:
        """Return how many events are pending."""
        ((pending,),) = self.fetch(_PENDING)
        return pending  # type: ignore[no-any-return]

    def touch(self) -> None:
        """Write something that means nothing, to see whether it can be written: a seq is burnt.

        SQLite leaves a page alone that would be the same afterwards.
        """
        self.last_seq += 1
        self.change(_TOUCH, last_seq=self.last_seq)

    def space(self) -> Space:
        """Return what the database takes."""
        ((pages, free, page_bytes),) = self.fetch(_PAGES)
        return Space(used=(pages - free) * page_bytes, free=free * page_bytes)

    def vacuum(self, max_bytes: int) -> None:
        """Give up to *max_bytes* of free pages back to the filesystem."""
        ((_, free, page_bytes),) = self.fetch(_PAGES)
        # By a script, which steps the pragma to its end and commits first: `execute` frees one page.
        self._db.executescript(f"PRAGMA incremental_vacuum({min(free, max_bytes // page_bytes):d})")

    def change(self, sql: str, **values: Any) -> int:
        return self._db.execute(sql, values).rowcount

    def change_each(self, sql: str, rows: list[dict[str, Any]]) -> int:
        if not rows:
            return 0
        return self._db.executemany(sql, rows).rowcount

    def fetch(self, sql: str, **values: Any) -> list[Any]:
        return self._db.execute(sql, values).fetchall()


def _id(event: Event) -> Id:
    return id_of(event.upstream, event.message_id)
