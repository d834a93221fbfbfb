"""The one connection that writes: group commit, backpressure, quota, and recovery from I/O faults.

Callers hand in events and settlements and await the commit that holds them. The next transaction
is whatever queued while the last one synced; no timer. Everything else (requeue, prune, pause …)
is a verb of the store, run in a transaction of its own between two groups.

    append ─┐                    ┌─ BEGIN IMMEDIATE
    settle ─┼─▶ queue ─▶ take ──▶│  settle · evict · append     ─▶ fsync ─▶ futures resolve
    perform ┘   bounded          └─ COMMIT

What a failed transaction means:

| fault                    | appends                   | settlements               | the connection    |
| ------------------------ | ------------------------- | ------------------------- | ----------------- |
| disk or quota full       | OutboxFullError           | alone, in their own one   | stays             |
| I/O, corruption, any other | OutboxUnavailableError  | kept, applied after it    | reopened, checked |

After a failed sync a row may still be there: the app retries with the same messageId.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import aiosqlite
import structlog

from agent.clock import Clock
from agent.errors import (
    OutboxError,
    OutboxFullError,
    OutboxOverloadedError,
    OutboxUnavailableError,
)
from agent.event import Event
from agent.outbox import lock, schema
from agent.outbox.records import Appended, Settlement
from agent.outbox.store import Store

T = TypeVar("T")

QUEUE_EVENTS = 4096
"""Events that may wait for a commit. At a commit of 5 ms that is far more than a machine sends."""

QUEUE_BYTES = 64 * 1024 * 1024
"""Bytes that may wait for a commit: a dozen bodies of the largest size."""

GROUP_BYTES = 16 * 1024 * 1024
"""Bytes of one transaction: bounds the write-ahead log and the wait of the last one in it."""

_ROW_OVERHEAD_BYTES = 256
"""What an event takes beside its body: id, index entries, page slack. Corrected after each commit."""

_EVICT_LIMIT = 10_000
_PRUNE_LIMIT = 1_000
"""Rows evicted and ids forgotten in one transaction at most, to keep it short."""

_REOPEN_INTERVAL_S = 1.0
"""How long an outbox that failed is left alone before the next try to reopen it."""

_BUSY_TIMEOUT_S = 5.0
"""A reader that recovers the log after a crash holds the database for moments; nobody else does."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator configured. *max_bytes* bounds the database; *remember* keeps delivered ids."""

    max_bytes: int
    evicts: bool
    remember: bool


@dataclass(slots=True)
class _Append:
    events: Sequence[Event]
    done: asyncio.Future[list[Appended]]

    @property
    def body_bytes(self) -> int:
        return sum(len(event.body) for event in self.events)


@dataclass(slots=True)
class _Settle:
    settlement: Settlement
    done: asyncio.Future[None]


@dataclass(slots=True)
class _Perform(Generic[T]):
    verb: Callable[[Store], Awaitable[T]]
    done: asyncio.Future[T]


class Writer:
    """The open outbox, to write to. Made by `open_writer`."""

    def __init__(self, path: Path, policy: Policy, clock: Clock) -> None:
        self.path = path
        self.fault: str | None = None
        """Why nothing can be written right now, for `status`; None while all is well."""
        self.full: str | None = None
        """Why the last event was refused for want of room; None once one was stored again."""
        self.appended = asyncio.Event()
        """Set at each commit that made events pending; whoever waits for it clears it."""
        self.commits = 0
        """Transactions committed so far: the writer's progress, for the watchdog."""
        self._policy = policy
        self._clock = clock
        self._appends: deque[_Append] = deque()
        self._settles: deque[_Settle] = deque()
        self._performs: deque[_Perform[Any]] = deque()
        self._queued_events = 0
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._db: aiosqlite.Connection | None = None
        self._store: Store | None = None
        self._used_bytes = 0

    # --- what callers ask ---

    async def append(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events* in one transaction; return what became of each once that is synced.

        Raises `OutboxOverloadedError`, `OutboxFullError` or `OutboxUnavailableError`.
        """
        if self.fault is not None:
            raise OutboxUnavailableError(self.fault)
        job = _Append(events, asyncio.get_running_loop().create_future())
        if (
            self._queued_events + len(events) > QUEUE_EVENTS
            or self._queued_bytes + job.body_bytes > QUEUE_BYTES
        ):
            raise OutboxOverloadedError(
                f"{self._queued_events} events wait to be stored already"
                f" (at most {QUEUE_EVENTS}, {QUEUE_BYTES} bytes); send again shortly"
            )
        self._queued_events += len(events)
        self._queued_bytes += job.body_bytes
        self._appends.append(job)
        self._wake.set()
        return await job.done

    def settle(self, settlement: Settlement) -> asyncio.Future[None]:
        """Record what became of an attempt; the future resolves when that is synced."""
        job = _Settle(settlement, asyncio.get_running_loop().create_future())
        self._settles.append(job)
        self._wake.set()
        return job.done

    async def perform(self, verb: Callable[[Store], Awaitable[T]]) -> T:
        """Run *verb* in a transaction of its own. Raises as `append` does."""
        if self.fault is not None:
            raise OutboxUnavailableError(self.fault)
        job: _Perform[Any] = _Perform(verb, asyncio.get_running_loop().create_future())
        self._performs.append(job)
        self._wake.set()
        result: T = await job.done
        return result

    @property
    def backlogged(self) -> bool:
        """Whether something waits that could be written: without a fault, `commits` then grows."""
        return self.fault is None and bool(self._appends or self._settles or self._performs)

    def stop(self) -> None:
        """Let `run` end once what is queued was committed. Never cancel it: its thread goes on."""
        self._stopping = True
        self._wake.set()

    # --- the loop ---

    async def run(self) -> None:
        """Commit groups until stopped. Its owner is `open_writer`."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.fault is not None or self._appends or self._settles or self._performs:
                if self.fault is None:
                    await self._turn()
                elif self._stopping:
                    break
                else:
                    await asyncio.sleep(_REOPEN_INTERVAL_S)
                    await self._reopen()
            if self._stopping:
                self._abandon_settles()
                return

    async def _turn(self) -> None:
        appends = self._take_appends()
        settles = list(self._settles)
        self._settles.clear()
        if appends or settles:
            await self._commit_group(appends, settles)
        while self._performs and self.fault is None:
            await self._commit_verb(self._performs.popleft())

    def _take_appends(self) -> list[_Append]:
        taken: list[_Append] = []
        group_bytes = 0
        while self._appends and group_bytes < GROUP_BYTES:
            job = self._appends.popleft()
            group_bytes += job.body_bytes
            self._queued_events -= len(job.events)
            self._queued_bytes -= job.body_bytes
            taken.append(job)
        return taken

    async def _commit_group(self, appends: list[_Append], settles: list[_Settle]) -> None:
        try:
            appends = await self._admit(appends)
            results = await self._transact(appends, settles)
        except sqlite3.Error as exc:
            self._settles.extendleft(reversed(settles))
            if not _is_full(exc):
                self._break(exc)
                _fail(appends, OutboxUnavailableError(self.fault))
            elif appends:
                # The settlements are tried again without them: they make room.
                _fail(appends, self._disk_full())
            else:
                self._disk_full()
                await asyncio.sleep(_REOPEN_INTERVAL_S)
            return
        if appends:
            self.full = None
        for job, result in zip(appends, results, strict=True):
            _resolve(job.done, result)
        for settle in settles:
            _resolve(settle.done, None)
        if any(Appended.STORED in result for result in results):
            self.appended.set()

    async def _transact(
        self, appends: list[_Append], settles: list[_Settle]
    ) -> list[list[Appended]]:
        async with self._transaction() as store:
            if settles:
                await store.settle(
                    [job.settlement for job in settles],
                    now_ms=self._clock.wall_ms(),
                    remember=self._policy.remember,
                )
            outcomes = iter(
                await store.append([event for job in appends for event in job.events])
                if appends
                else ()
            )
        return [[next(outcomes) for _ in job.events] for job in appends]

    async def _commit_verb(self, job: _Perform[Any]) -> None:
        try:
            async with self._transaction() as store:
                result = await job.verb(store)
        except sqlite3.Error as exc:
            if _is_full(exc):
                _reject(job.done, self._disk_full())
            else:
                self._break(exc)
                _reject(job.done, OutboxUnavailableError(self.fault))
        else:
            _resolve(job.done, result)
            self.appended.set()  # a requeue makes events pending, too

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Store]:
        """Commit what the block did, or roll it back."""
        db = self._connection
        if self._store is None:
            raise AssertionError("a connection without its store")
        await db.execute("BEGIN IMMEDIATE")
        try:
            yield self._store
            self._used_bytes = await self._store.used_bytes()
            await db.commit()
        except BaseException:
            if db.in_transaction:
                await db.rollback()
            raise
        self.commits += 1

    # --- the quota ---

    async def _admit(self, appends: list[_Append]) -> list[_Append]:
        """Return the appends that fit the quota; refuse the others, or make room by policy."""
        wanted = sum(map(_footprint, appends))
        if not appends or self._used_bytes + wanted <= self._policy.max_bytes:
            return appends
        await self._make_room(self._used_bytes + wanted - self._policy.max_bytes)
        if self._policy.evicts:
            return appends
        admitted: list[_Append] = []
        room = self._policy.max_bytes - self._used_bytes
        for job in appends:
            room -= _footprint(job)
            if room >= 0:
                admitted.append(job)
            else:
                self.full = (
                    f"the outbox holds {self._used_bytes} of {self._policy.max_bytes} bytes"
                    " (outbox.max_size); it takes events again when some were delivered or"
                    " discarded"
                )
                _reject(job.done, OutboxFullError(self.full))
        return admitted

    async def _make_room(self, room_bytes: int) -> None:
        """Forget delivered ids, oldest first; with `drop_oldest`, discard pending events, too."""
        evicted = 0
        async with self._transaction() as store:
            pruned = await store.prune(self._clock.wall_ms(), limit=_PRUNE_LIMIT)
            if self._policy.evicts:
                evicted = await store.evict(room_bytes, limit=_EVICT_LIMIT)
        if evicted:
            log.warning("outbox.events_evicted", events=evicted, max_bytes=self._policy.max_bytes)
        if pruned:
            log.warning("outbox.delivered_ids_forgotten", ids=pruned, reason="outbox full")

    def _disk_full(self) -> OutboxFullError:
        self.full = f"{self.path.parent}: no space left on the disk; free some"
        return OutboxFullError(self.full)

    # --- the connection ---

    @property
    def _connection(self) -> aiosqlite.Connection:
        if self._db is None:
            raise AssertionError("the writer is used outside its life")
        return self._db

    @property
    def used_bytes(self) -> int:
        """Bytes of the database in use, after the last commit."""
        return self._used_bytes

    async def open(self) -> None:
        """Open, recover and migrate the database. Raises `OutboxError` if it cannot be used."""
        self._db = await _connect(self.path)
        self._store = await Store.on(self._db)
        self._used_bytes = await self._store.used_bytes()

    async def close(self) -> None:
        """Checkpoint and close; what is committed stays whatever happens here."""
        db, self._db, self._store = self._db, None, None
        if db is not None:
            try:
                await db.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as exc:
                log.warning("outbox.checkpoint_failed", path=str(self.path), error=str(exc))
            finally:
                await db.close()

    def _break(self, exc: sqlite3.Error) -> None:
        """Stop acknowledging: after a failed write or sync this connection's word means nothing."""
        self.fault = f"{self.path}: {exc} ({getattr(exc, 'sqlite_errorname', 'SQLITE_ERROR')})"
        log.error("outbox.failed", path=str(self.path), error=str(exc))
        _fail(self._appends, OutboxUnavailableError(self.fault))
        self._appends.clear()
        self._queued_events = self._queued_bytes = 0
        while self._performs:
            _reject(self._performs.popleft().done, OutboxUnavailableError(self.fault))

    async def _reopen(self) -> None:
        """Try once to get a sound connection; `fault` stays while there is none."""
        db, self._db, self._store = self._db, None, None
        try:
            if db is not None:
                await db.close()
        except sqlite3.Error as exc:
            log.warning("outbox.close_failed", path=str(self.path), error=str(exc))
        try:
            await self.open()
        except (sqlite3.Error, OutboxError) as exc:
            self.fault = str(exc)
            return
        self.fault = None
        log.info("outbox.reopened", path=str(self.path))

    def _abandon_settles(self) -> None:
        """Those events stay pending and are sent again after the next start."""
        while self._settles:
            self._settles.popleft().done.cancel()


@asynccontextmanager
async def open_writer(path: Path, policy: Policy, clock: Clock) -> AsyncIterator[Writer]:
    """Own the outbox at *path* while the block runs: lock it, open it, commit, checkpoint, close.

    Raises `OutboxLockedError` if another process owns it, `OutboxError` if it cannot be used.
    """
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as exc:
        raise OutboxError(
            f"{path.parent}: cannot create the outbox folder ({exc.strerror});"
            " set outbox.path to a place this user may write to"
        ) from exc
    async with lock.exclusive(path):
        writer = Writer(path, policy, clock)
        await writer.open()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(writer.run())
                try:
                    yield writer
                finally:
                    # Before the group could cancel it: what is queued is committed first.
                    writer.stop()
                    await asyncio.wait([running])
        finally:
            await writer.close()


async def _connect(path: Path) -> aiosqlite.Connection:
    db = aiosqlite.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
    try:
        await db
        ((found,),) = await db.execute_fetchall("PRAGMA user_version")
        _require_known(path, found)
        if found == 0:
            # Only takes hold before the first table is made.
            await db.execute_fetchall("PRAGMA auto_vacuum = INCREMENTAL")
        await db.execute_fetchall("PRAGMA journal_mode = WAL")
        await db.execute_fetchall("PRAGMA synchronous = FULL")
        # After a burst the write-ahead log shrinks back to this.
        await db.execute_fetchall("PRAGMA journal_size_limit = 8388608")
        await schema.migrate(db, found)
    except sqlite3.Error as exc:
        await db.close()
        raise OutboxError(
            f"{path}: cannot open the outbox ({exc}); check that the file is a tranthor-agent"
            " outbox, that this user may write to it and to its folder, and that the disk works"
        ) from exc
    except BaseException:
        await db.close()
        raise
    return db


def _require_known(path: Path, version: int) -> None:
    if version > schema.VERSION:
        raise OutboxError(
            f"{path}: written by a newer version (schema {version}, this one knows"
            f" {schema.VERSION}); install the newer version, or set outbox.path to a new file"
        )


def _is_full(exc: sqlite3.Error) -> bool:
    code = getattr(exc, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_FULL


def _footprint(job: _Append) -> int:
    return job.body_bytes + len(job.events) * _ROW_OVERHEAD_BYTES


def _fail(jobs: Iterable[_Append], exc: OutboxError) -> None:
    for job in jobs:
        _reject(job.done, exc)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # its caller was cancelled
        future.set_result(result)


def _reject(future: asyncio.Future[T], exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)
