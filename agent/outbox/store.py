"""The SQL verbs: each changes the rows and the ledger together, inside the writer's transaction.

`Store` knows SQL and no policy: when to call a verb, and what a full disk means, is the writer's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, assert_never

import aiosqlite

from agent.event import Event
from agent.outbox.records import Ack, Appended, Bury, Retry, Settlement

_LAST_SEQ = """
SELECT last_seq
  FROM ledger
"""

_INSERT_EVENT = """
INSERT INTO event (seq, message_id, digest, state, accepted_ms)
VALUES (:seq, :message_id, :digest, 'pending', :received_ms)
    ON CONFLICT (message_id) DO NOTHING
"""

_INSERTED = """
SELECT seq
  FROM event
 WHERE seq BETWEEN :first AND :last
"""

_DIGEST = """
SELECT digest
  FROM event
 WHERE message_id = :message_id
"""

_INSERT_PENDING = """
INSERT INTO pending (seq, kind, lane, queued_ms, body)
VALUES (:seq, :kind, :lane, :received_ms, :body)
"""

_COUNT_APPENDED = """
UPDATE ledger
   SET last_seq   = :last_seq,
       accepted   = accepted + :stored,
       pending    = pending + :stored,
       duplicates = duplicates + :duplicates,
       conflicts  = conflicts + :conflicts
"""

_DELETE_PENDING = """
DELETE FROM pending
 WHERE seq = :seq
"""

_MARK_DELIVERED = """
UPDATE event
   SET state = 'delivered',
       settled_ms = :now_ms
 WHERE seq = :seq
   AND state = 'pending'
"""

_FORGET_PENDING = """
DELETE FROM event
 WHERE seq = :seq
   AND state = 'pending'
"""

_COUNT_DELIVERED = """
UPDATE ledger
   SET pending   = pending - :n,
       delivered = delivered + :n
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
INSERT INTO dead (seq, kind, lane, attempts, reason, status, answer, body)
SELECT seq, kind, lane, attempts + :attempts, :reason, :status, :answer, body
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

_MARK_REQUEUED = """
UPDATE event
   SET seq = :new_seq,
       state = 'pending',
       settled_ms = NULL
 WHERE seq = :seq
   AND state = 'dead'
"""

_MOVE_REQUEUED = """
INSERT INTO pending (seq, kind, lane, queued_ms, body)
SELECT :new_seq, kind, lane, :now_ms, body
  FROM dead
 WHERE seq = :seq
"""

_DELETE_DEAD = """
DELETE FROM dead
 WHERE seq = :seq
"""

_COUNT_REQUEUED = """
UPDATE ledger
   SET last_seq = :last_seq,
       dead     = dead - :n,
       pending  = pending + :n
"""

_FORGET_DEAD = """
DELETE FROM event
 WHERE seq = :seq
   AND state = 'dead'
"""

_COUNT_DISCARDED_DEAD = """
UPDATE ledger
   SET dead      = dead - :n,
       discarded = discarded + :n
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

_PRUNE = """
DELETE FROM event
 WHERE seq IN (SELECT seq
                 FROM event
                WHERE state = 'delivered'
                  AND settled_ms < :cutoff_ms
                ORDER BY settled_ms
                LIMIT :limit)
"""

_PENDING = """
SELECT pending
  FROM ledger
"""

_SET_PAUSED = """
UPDATE ledger
   SET paused = :paused
"""

_PAGES = """
SELECT (SELECT page_count FROM pragma_page_count),
       (SELECT freelist_count FROM pragma_freelist_count),
       (SELECT page_size FROM pragma_page_size)
"""


class Store:
    """The verbs, on the one write connection. Each expects an open transaction."""

    def __init__(self, db: aiosqlite.Connection, last_seq: int) -> None:
        self._db = db
        self._last_seq = last_seq
        self.withdrawn = 0
        """How many pending events were evicted or expired: whoever has read some must look again."""

    @classmethod
    async def on(cls, db: aiosqlite.Connection) -> Store:
        """Return the store of a migrated database."""
        rows = await _fetch(db, _LAST_SEQ)
        return cls(db, rows[0][0])

    async def append(self, events: Sequence[Event]) -> list[Appended]:
        """Queue the events whose ids are not known yet; return what became of each, in order."""
        first, last = self._last_seq + 1, self._last_seq + len(events)
        rows = [
            {
                "seq": seq,
                "message_id": event.message_id,
                "digest": event.digest,
                "received_ms": event.received_ms,
                "kind": event.kind,
                "lane": event.lane,
                "body": event.body,
            }
            for seq, event in enumerate(events, first)
        ]
        # Burnt even if the transaction fails: a seq is never given twice.
        self._last_seq = last
        results = [Appended.STORED] * len(events)
        if await self._change_each(_INSERT_EVENT, rows) < len(rows):
            inserted = {seq for (seq,) in await _fetch(self._db, _INSERTED, first=first, last=last)}
            for i, row in enumerate(rows):
                if row["seq"] not in inserted:
                    results[i] = await self._known(events[i])
            rows = [row for row in rows if row["seq"] in inserted]
        await self._change_each(_INSERT_PENDING, rows)
        await self._change(
            _COUNT_APPENDED,
            last_seq=last,
            stored=len(rows),
            duplicates=len(events) - len(rows),
            conflicts=results.count(Appended.CONFLICTING),
        )
        return results

    async def _known(self, event: Event) -> Appended:
        ((digest,),) = await _fetch(self._db, _DIGEST, message_id=event.message_id)
        return Appended.REPLAYED if digest == event.digest else Appended.CONFLICTING

    async def knows(self, event: Event) -> bool:
        """Return whether the id is pending, dead or remembered as delivered."""
        return bool(await _fetch(self._db, _DIGEST, message_id=event.message_id))

    async def settle(
        self, settlements: Iterable[Settlement], *, now_ms: int, remember: bool
    ) -> None:
        """Apply what the forwarder decided. Without *remember*, a delivered id is forgotten at once.

        An event that is no longer pending (evicted while it was sent) is passed over; an ack of
        one that expired meanwhile counts as delivered.
        """
        acks: list[dict[str, Any]] = []
        retries: list[dict[str, Any]] = []
        buries: list[dict[str, Any]] = []
        for settlement in settlements:
            match settlement:
                case Ack(seq):
                    acks.append({"seq": seq, "now_ms": now_ms})
                case Retry(seq):
                    retries.append({"seq": seq, "now_ms": now_ms})
                case Bury():
                    buries.append(
                        {
                            "seq": settlement.seq,
                            "now_ms": now_ms,
                            "attempts": 1,
                            "reason": settlement.reason,
                            "status": settlement.status,
                            "answer": settlement.answer,
                        }
                    )
                case _:
                    assert_never(settlement)
        if acks:
            await self._change_each(_DELETE_PENDING, acks)
            delivered = await self._change_each(
                _MARK_DELIVERED if remember else _FORGET_PENDING, acks
            )
            await self._change(_COUNT_DELIVERED, n=delivered)
            if delivered < len(acks):
                await self._ack_expired(acks, remember=remember)
        if retries:
            await self._change_each(_COUNT_ATTEMPT, retries)
        if buries:
            await self._bury(buries)

    async def _ack_expired(self, acks: list[dict[str, Any]], *, remember: bool) -> None:
        """Count as delivered what expired while its request was under way."""
        for ack in acks:
            if await self._change(_DELETE_EXPIRED, seq=ack["seq"]):
                if remember:
                    await self._change(_MARK_EXPIRED_DELIVERED, **ack)
                else:
                    await self._change(_FORGET_DEAD, seq=ack["seq"])
                await self._change(_COUNT_EXPIRED_DELIVERED)

    async def _bury(self, rows: list[dict[str, Any]]) -> int:
        await self._change_each(_INSERT_DEAD, rows)
        await self._change_each(_DELETE_PENDING, rows)
        buried = await self._change_each(_MARK_DEAD, rows)
        await self._change(_COUNT_BURIED, n=buried)
        return buried

    async def requeue(self, seqs: Sequence[int], *, now_ms: int) -> int:
        """Put dead letters back, at the end of the queue in the order given; return how many."""
        first = self._last_seq + 1
        self._last_seq += len(seqs)
        rows = [
            {"seq": seq, "new_seq": new_seq, "now_ms": now_ms}
            for new_seq, seq in enumerate(dict.fromkeys(seqs), first)
        ]
        requeued = await self._change_each(_MARK_REQUEUED, rows)
        await self._change_each(_MOVE_REQUEUED, rows)
        await self._change_each(_DELETE_DEAD, rows)
        await self._change(_COUNT_REQUEUED, last_seq=self._last_seq, n=requeued)
        return requeued

    async def discard(self, seqs: Sequence[int]) -> int:
        """Delete dead letters for good; return how many."""
        rows = [{"seq": seq} for seq in seqs]
        discarded = await self._change_each(_FORGET_DEAD, rows)
        await self._change_each(_DELETE_DEAD, rows)
        await self._change(_COUNT_DISCARDED_DEAD, n=discarded)
        return discarded

    async def evict(self, room_bytes: int, *, limit: int) -> int:
        """Discard the oldest pending, at most *limit*, until their bodies add up to *room_bytes*."""
        rows: list[dict[str, Any]] = []
        freed = 0
        for seq, size in await _fetch(self._db, _OLDEST, limit=limit):
            if freed >= room_bytes:
                break
            rows.append({"seq": seq})
            freed += size
        await self._change_each(_DELETE_PENDING, rows)
        evicted = await self._change_each(_FORGET_PENDING, rows)
        await self._change(_COUNT_EVICTED, n=evicted)
        self.withdrawn += evicted
        return evicted

    async def expire(self, cutoff_ms: int, *, now_ms: int, limit: int) -> int:
        """Set aside those of the oldest *limit* pending that were queued before *cutoff_ms*."""
        seqs = await _fetch(self._db, _EXPIRED, cutoff_ms=cutoff_ms, limit=limit)
        expired = await self._bury(
            [
                {
                    "seq": seq,
                    "now_ms": now_ms,
                    "attempts": 0,
                    "reason": "expired",
                    "status": None,
                    "answer": "",
                }
                for (seq,) in seqs
            ]
        )
        self.withdrawn += expired
        return expired

    async def pending(self) -> int:
        """Return how many events are pending."""
        ((pending,),) = await _fetch(self._db, _PENDING)
        return pending  # type: ignore[no-any-return]

    async def prune(self, cutoff_ms: int, *, limit: int) -> int:
        """Forget at most *limit* ids that were delivered before *cutoff_ms*; return how many."""
        return await self._change(_PRUNE, cutoff_ms=cutoff_ms, limit=limit)

    async def set_paused(self, paused: bool) -> None:
        await self._change(_SET_PAUSED, paused=paused)

    async def space(self) -> tuple[int, int]:
        """Return the bytes of the database that hold something, and those of its free pages."""
        ((pages, free, page_bytes),) = await _fetch(self._db, _PAGES)
        return (pages - free) * page_bytes, free * page_bytes

    async def free_pages(self) -> int:
        """Return how many pages of the file hold nothing."""
        ((_, free, _),) = await _fetch(self._db, _PAGES)
        return free  # type: ignore[no-any-return]

    async def vacuum(self, pages: int) -> None:
        """Give up to *pages* free pages back to the filesystem.

        By a script, which steps the pragma to its end and commits first; `execute` frees one page.
        """
        await self._db.executescript(f"PRAGMA incremental_vacuum({pages:d})")

    async def _change(self, sql: str, **values: Any) -> int:
        return (await self._db.execute(sql, values)).rowcount

    async def _change_each(self, sql: str, rows: list[dict[str, Any]]) -> int:
        if not rows:
            return 0
        return (await self._db.executemany(sql, rows)).rowcount


async def _fetch(db: aiosqlite.Connection, sql: str, **values: Any) -> list[sqlite3.Row]:
    return list(await db.execute_fetchall(sql, values))
