"""Short read-only queries: for the forwarder, for `status`, and for a person looking in.

Each is one autocommit statement, fetched whole, and a search is several: a reader left open, or
open for long, would keep the write-ahead log from beginning anew, and it would grow without bound.
The connection comes from `agent.outbox.access`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec

from agent.errors import OutboxDamagedError, OutboxError
from agent.outbox import search
from agent.outbox.apps import APPS
from agent.outbox.database import is_damage
from agent.outbox.records import (
    App,
    Glance,
    Head,
    Ledger,
    Receipt,
    Salvage,
    Scan,
    Selection,
    State,
    app_of,
    named,
)
from agent.outbox.search import receipt_from, receipt_of

INLINE_BYTES = 4096
"""Bodies up to this size come with the head; larger ones are read when they are sent."""

_LAST = 2**63 - 1
"""No seq is higher."""

LOOKED = 20_000
"""Events of other upstreams that one query passes over at most: some 20 ms."""

# A CASE, and no AND: SQLite may look at both sides of that.
_URGENT = """CASE WHEN :names IS NULL THEN 0
             ELSE COALESCE(json_extract(CAST(body AS TEXT), '$.event')
                           IN (SELECT value FROM json_each(:names)), 0)
        END"""

# The name is that of `event`, whose rows are small: in `pending` it stands behind the body.
_COLUMNS = f"""
SELECT pending.seq, lane, message_id, kind, attempts, failing_since_ms, length(body),
       CASE
         WHEN event.upstream <> :upstream THEN NULL
         WHEN length(body) <= :inline_bytes THEN body
       END,
       CASE WHEN event.upstream <> :upstream THEN 0 ELSE {_URGENT} END,
       event.upstream
"""

# The default upstream's queue is all that is pending, with the events of the others passed over.
_QUEUE = """
  FROM pending
  JOIN event USING (seq)
 WHERE pending.seq > :after
"""

_QUEUE_NAMED = """
  FROM pending INDEXED BY pending_named
 CROSS JOIN event USING (seq)
 WHERE pending.upstream = :upstream
   AND pending.upstream <> ''
   AND pending.seq > :after
"""

_SCAN = """
 ORDER BY pending.seq
 LIMIT :limit
"""

_LANE = """
   AND lane = :lane
   AND event.upstream = :upstream
   AND pending.seq <= :upto
 ORDER BY pending.seq
 LIMIT :limit
"""

_NEXT = """
 ORDER BY pending.seq
 LIMIT 1
"""

# Where there is no need to look into `event`: behind a body on the same page the name is at hand.
_NAME = """
       CASE
         WHEN length(body) <= 1024 THEN pending.upstream
         ELSE (SELECT event.upstream FROM event WHERE event.seq = pending.seq)
       END
"""

_SKIP = f"""
SELECT MIN(CASE WHEN upstream = '' THEN seq END), MAX(seq), COUNT(*)
  FROM (SELECT seq, {_NAME} AS upstream
          FROM pending
         WHERE seq > :after
         ORDER BY seq
         LIMIT :looked)
"""  # noqa: S608  # fragments of this module

_WAITING = f"""
SELECT seq, lane, {_URGENT} AS urgent, {_NAME} AS upstream
  FROM pending
 WHERE seq > :after
"""  # noqa: S608  # fragments of this module

_WAITING_NAMED = f"""
SELECT seq, lane, {_URGENT} AS urgent, upstream
  FROM pending INDEXED BY pending_named
 WHERE upstream = :upstream
   AND upstream <> ''
   AND seq > :after
"""  # noqa: S608  # fragments of this module

# One row: to fetch thousands would wait for the interpreter lock at each.
_GLANCE = """
SELECT COUNT(*),
       MAX(seq),
       json_group_array(seq)    FILTER (WHERE upstream = :upstream),
       json_group_array(lane)   FILTER (WHERE upstream = :upstream),
       json_group_array(urgent) FILTER (WHERE upstream = :upstream)
"""

_STILL_PENDING = """
SELECT seq
  FROM pending
 WHERE seq IN (SELECT value FROM json_each(:seqs))
"""

_BODY = """
SELECT body
  FROM pending
 WHERE seq = :seq
"""

_LEDGER = """
SELECT accepted, delivered, pending, dead, discarded, evicted, duplicates, conflicts, paused,
       paused_upstreams
  FROM ledger
"""

_OLDEST = """
SELECT seq, queued_ms
  FROM pending
 WHERE seq >= :since
 ORDER BY seq
 LIMIT 1
"""

_OLDEST_NAMED = """
SELECT queued_ms
  FROM pending INDEXED BY pending_named
 WHERE upstream = :upstream
   AND upstream <> ''
 ORDER BY seq
 LIMIT 1
"""

_COUNTS = """
SELECT upstream, COUNT(*)
  FROM pending
 WHERE upstream <> ''
 GROUP BY upstream
"""

_SALVAGE = """
SELECT state, name, pending, dead, delivered, lost
  FROM salvage
 ORDER BY found_ms DESC
 LIMIT 1
"""


class Reader:
    """An open read-only connection. Made by `open_reader` and `open_own_reader`."""

    def __init__(self, db: aiosqlite.Connection, path: Path) -> None:
        self.path = path
        self._db = db
        self._front = 0
        self._passed_over = 0
        """Up to this seq nothing of the default upstream waited, when `_front` was the front."""

    async def close(self) -> None:
        await self._db.interrupt()  # nobody waits for a query that still runs
        await self._db.close()

    async def scan(
        self, upstream: str = "", *, after: int, limit: int, urgent: Sequence[str] = ()
    ) -> Scan:
        """Read on in the queue of *upstream* behind *after*, in order of acceptance.

        Looks at *limit* events, and where all are of other upstreams once more at `LOOKED`. Those
        whose event name is one of *urgent* are marked so.
        """
        queue = _QUEUE_NAMED if upstream else _QUEUE
        rows = await self._fetch(
            f"{_COLUMNS} {queue} {_SCAN}",
            upstream=upstream,
            after=after,
            limit=limit,
            inline_bytes=INLINE_BYTES,
            names=_names(urgent),
        )
        heads = self._heads(rows, upstream)
        upto = rows[-1][0] if rows else after
        if upstream or heads or len(rows) < limit or not rows:
            return Scan(heads=heads, upto=upto, more=len(rows) == limit)
        return await self._pass_over(upto)

    async def _pass_over(self, after: int) -> Scan:
        """Go on to the next event of the default upstream behind *after*, but not too far at once."""
        ((first, last, looked),) = await self._fetch(_SKIP, after=after, looked=LOOKED)
        if first is not None:
            return Scan(heads=[], upto=first - 1, more=True)
        return Scan(heads=[], upto=last or after, more=looked == LOOKED)

    async def lane(
        self,
        lane: int,
        upstream: str = "",
        *,
        after: int,
        upto: int,
        limit: int,
        urgent: Sequence[str] = (),
    ) -> Scan:
        """Read on in one lane of *upstream*: the next *limit* events with after < seq <= upto; as `scan`.

        Looks at some `LOOKED` events at most.
        """
        queue = _QUEUE_NAMED if upstream else _QUEUE
        reach = upto
        if upto - after > LOOKED:  # as many events may lie between
            sql = f"SELECT pending.seq {queue} {_NEXT}"
            rows = await self._fetch(sql, upstream=upstream, after=after)
            reach = min(upto, rows[0][0] + LOOKED) if rows else upto
        rows = await self._fetch(
            f"{_COLUMNS} {queue} {_LANE}",
            lane=lane,
            upstream=upstream,
            after=after,
            upto=reach,
            limit=limit,
            inline_bytes=INLINE_BYTES,
            names=_names(urgent),
        )
        heads = self._heads(rows, upstream)
        if len(heads) == limit:
            return Scan(heads=heads, upto=heads[-1].seq, more=True)
        return Scan(heads=heads, upto=reach, more=reach < upto)

    async def waiting(
        self, upstream: str = "", *, after: int, limit: int, urgent: Sequence[str] = ()
    ) -> Glance:
        """Look at the next *limit* pending events behind *after*, for those of *upstream*; as `scan`."""
        queue = _WAITING_NAMED if upstream else _WAITING
        ((looked, upto, *columns),) = await self._fetch(
            f"{_GLANCE} FROM ({queue} {_SCAN})",
            upstream=upstream,
            after=after,
            limit=limit,
            names=_names(urgent),
        )
        return Glance(
            waiting=list(zip(*map(msgspec.json.decode, columns), strict=True)),
            upto=upto if looked else after,
            more=looked == limit,
        )

    async def still_pending(self, seqs: Collection[int]) -> set[int]:
        """Return those of *seqs* that are pending."""
        rows = await self._fetch(_STILL_PENDING, seqs=msgspec.json.encode(list(seqs)).decode())
        return {seq for (seq,) in rows}

    async def body(self, seq: int) -> bytes | None:
        """Return the body of a pending event; None if it is not pending any more."""
        rows = await self._fetch(_BODY, seq=seq)
        return rows[0][0] if rows else None

    async def ledger(self) -> Ledger:
        """Return the counters; one row, whatever the size of the outbox."""
        ((*counters, paused, paused_upstreams),) = await self._fetch(_LEDGER)
        accepted, delivered, pending, dead, discarded, evicted, duplicates, conflicts = counters
        return Ledger(
            accepted=accepted,
            delivered=delivered,
            pending=pending,
            dead=dead,
            discarded=discarded,
            evicted=evicted,
            duplicates=duplicates,
            conflicts=conflicts,
            paused=bool(paused),
            paused_upstreams=named(paused_upstreams),
        )

    async def counts(self) -> dict[str, int]:
        """Count what is pending for each named upstream that has some, event by event."""
        return {row[0]: row[1] for row in await self._fetch(_COUNTS)}

    async def oldest_pending_ms(self, upstream: str | None = None) -> int | None:
        """Return when the first of the queue, or of that of one upstream, was queued (Unix ms)."""
        if upstream:
            rows = await self._fetch(_OLDEST_NAMED, upstream=upstream)
            return rows[0][0] if rows else None
        rows = await self._fetch(_OLDEST, since=0)
        if not rows or upstream is None:
            return rows[0][1] if rows else None
        ((front, _),) = rows
        first = await self._front_of_default(front)
        rows = [] if first is None else await self._fetch(_OLDEST, since=first)
        return rows[0][1] if rows else None

    async def _front_of_default(self, front: int) -> int | None:
        """Return the seq of the default upstream's first event.

        What was passed over once is not looked at again, for the queue grows at its end. Only where
        its *front* went back: then events of a damaged database were put before it.
        """
        after = self._passed_over if front >= self._front else 0
        while True:
            ((first, last, looked),) = await self._fetch(_SKIP, after=after, looked=LOOKED)
            after = first - 1 if first is not None else last or after
            self._front, self._passed_over = front, after
            if first is not None or looked < LOOKED:
                return first  # type: ignore[no-any-return]

    async def receipts(self, message_id: str) -> list[Receipt]:
        """Return where the events of that id stand, one for each upstream it was sent to."""
        query = search.by_message_id(message_id)
        found = [receipt_from(row) for row in await self._fetch(query.sql, **query.values)]
        return sorted(found, key=lambda receipt: receipt.upstream)

    async def receipt(self, message_id: str, upstream: str | None = None) -> Receipt | None:
        """Return where the event stands, the default upstream's before others'; None if not known."""
        return receipt_of(await self.receipts(message_id), upstream)

    async def select(
        self, state: State, selection: Selection, *, after: int = 0, limit: int
    ) -> list[Receipt]:
        """Return the next *limit* events in *state* that *selection* means, behind seq *after*.

        Bodies over `search.LISTED_BYTES` are left out. Those of delivered events are gone: a
        selection by user, event or text finds none there.
        """
        if not search.may_find(state, selection):
            return []
        if selection.message_ids:  # found by the index, not by a walk
            return await self._part(state, selection, after, _LAST, limit)
        found: list[Receipt] = []
        looked = search.PART_EVENTS
        while looked == search.PART_EVENTS:
            query = search.measuring(state, after=after)
            measured = await self._fetch(query.sql, **query.values)
            looked = len(measured)
            for upto in search.part_ends(measured):
                found += await self._part(state, selection, after, upto, limit - len(found))
                if len(found) == limit:
                    return found
                after = upto
        return found

    async def _part(
        self, state: State, selection: Selection, after: int, upto: int, limit: int
    ) -> list[Receipt]:
        query = search.selecting(state, selection, after=after, upto=upto, limit=limit)
        return [receipt_from(row) for row in await self._fetch(query.sql, **query.values)]

    async def apps(self) -> list[App]:
        """Return the apps that are known, in the order of their names."""
        return [app_of(row) for row in await self._fetch(APPS)]

    async def salvage(self) -> Salvage | None:
        """Return what came of the last damaged database, as long as it lies there."""
        rows = await self._fetch(_SALVAGE)
        known = Salvage(*rows[0]) if rows else None
        # Once a person has deleted the file, they need no reminding.
        return known if known and self.path.with_name(known.moved_to).exists() else None

    async def _fetch(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        try:
            return list(await self._db.execute_fetchall(sql, values))
        except sqlite3.Error as exc:
            if is_damage(exc):
                raise self._damaged(str(exc)) from exc
            raise OutboxError(f"{self.path}: cannot read the outbox ({exc})") from exc
        except UnicodeEncodeError as exc:
            raise OutboxError(f"{exc.object!r}: not valid text, so no event has it") from exc

    def _heads(self, rows: list[sqlite3.Row], upstream: str) -> list[Head]:
        """Return the heads among *rows* that are for *upstream*."""
        try:
            heads = msgspec.convert(rows, list[Head])
        except msgspec.ValidationError as exc:
            # A flipped bit can make one type of another, which SQLite does not mind when it reads.
            raise self._damaged(f"a row of the wrong types: {exc}") from exc
        return [head for head in heads if head.upstream == upstream]

    def _damaged(self, why: str) -> OutboxDamagedError:
        return OutboxDamagedError(f"{self.path}: damaged ({why})")


def _names(urgent: Sequence[str]) -> str | None:
    return msgspec.json.encode(urgent).decode() if urgent else None
