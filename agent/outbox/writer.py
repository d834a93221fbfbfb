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
from contextlib import asynccontextmanager, suppress
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
from agent.outbox import database, lock
from agent.outbox.records import Appended, Settlement
from agent.outbox.reserve import Reserve
from agent.outbox.store import Store

T = TypeVar("T")

QUEUE_EVENTS = 4096
"""Events that may wait for a commit. At a commit of 5 ms that is far more than a machine sends."""

QUEUE_BYTES = 64 * 1024 * 1024
"""Bytes that may wait for a commit: a dozen bodies of the largest size."""

GROUP_BYTES = 4 * 1024 * 1024
"""Bytes of one transaction: bounds the write-ahead log and the wait of the last one in it."""

_ROW_OVERHEAD_BYTES = 256
"""What an event takes beside its body: id, index entries, page slack. Corrected after each commit."""

_BARE_BYTES = 40 * 1024
"""What an outbox without events takes; an event that does not fit beside it never will."""

_EVICT_LIMIT = 10_000
_PRUNE_LIMIT = 1_000
"""Rows evicted and ids forgotten in one transaction at most, to keep it short."""

_SHORT_SETTLES = 4
"""Settlements in one transaction on a disk without room: at 5 MiB an event a few MiB of log."""

_DISK_FULL_INTERVAL_S = 1.0
"""How long settlements that do not fit on the disk wait before the next try."""

_REOPEN_INTERVAL_S = 1.0
"""How long an outbox that failed is left alone before the next try to reopen it."""

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
        self._busy = False
        self._db: aiosqlite.Connection | None = None
        self._store: Store | None = None
        self._used_bytes = 0
        self._free_bytes = 0
        self._reserve = Reserve(path, max_bytes=policy.max_bytes)

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
        waiting = self._busy or self._appends or self._settles or self._performs
        return self.fault is None and bool(waiting)

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
                    self._busy = False
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
        settles = self._take_settles()
        self._busy = True
        if appends or settles:
            await self._commit_group(appends, settles)
        if settles and not self._reserve.held:
            await self._checkpoint()
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

    def _take_settles(self) -> list[_Settle]:
        """Take all, or few on a disk without room: to delete large events fills the log, too."""
        limit = len(self._settles) if self._reserve.held else _SHORT_SETTLES
        return [self._settles.popleft() for _ in range(min(limit, len(self._settles)))]

    async def _checkpoint(self) -> None:
        """Empty the log into the database, so that it need not grow; a failure shows at the next write."""
        with suppress(sqlite3.Error):
            await self._connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")

    async def _commit_group(self, appends: list[_Append], settles: list[_Settle]) -> None:
        try:
            if not self._reserve.held:
                appends = self._admit_into_free_pages(appends)
            if self._over_quota(appends) > 0:
                # They make room, so they go first and alone.
                await self._commit([], settles)
                settles = []
                appends = await self._admit(appends)
            await self._commit(appends, settles)
        except sqlite3.Error as exc:
            self._settles.extendleft(reversed(settles))
            if not _is_full(exc):
                self._break(exc)
                _fail(appends, OutboxUnavailableError(self.fault))
            elif appends:
                # The settlements are tried again without them.
                _fail(appends, self._disk_full())
            else:
                await self._wait_for_disk()

    async def _commit(self, appends: list[_Append], settles: list[_Settle]) -> None:
        """Commit a group and answer those who wait for it."""
        if not appends and not settles:
            return
        results = await self._transact(appends, settles)
        for job, result in zip(appends, results, strict=True):
            _resolve(job.done, result)
        for settle in settles:
            _resolve(settle.done, None)
        if any(Appended.STORED in result for result in results):
            self.full = None
            self.appended.set()

    async def _wait_for_disk(self) -> None:
        """Settlements do not fit on the disk: use the reserve, or wait for room."""
        self._disk_full()
        if self._reserve.release():
            log.warning("outbox.reserve_released", path=str(self.path))
            await self._checkpoint()
        elif self._stopping:
            self._abandon_settles()
        else:
            await asyncio.sleep(_DISK_FULL_INTERVAL_S)

    def _admit_into_free_pages(self, appends: list[_Append]) -> list[_Append]:
        """Return the appends that fit without growing the file, unless the reserve is held again."""
        if not appends or self._reserve.keep():
            return appends
        admitted: list[_Append] = []
        room = self._free_bytes // 2
        for job in appends:
            if _footprint(job) <= room:
                room -= _footprint(job)
                admitted.append(job)
            else:
                _reject(job.done, self._disk_full())
        return admitted

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
            self._used_bytes, self._free_bytes = await self._store.space()
            await db.commit()
        except BaseException:  # when cancelled, too: the next BEGIN must find no transaction
            if db.in_transaction:
                await db.rollback()
            raise
        self.commits += 1

    # --- the quota ---

    def _over_quota(self, appends: list[_Append]) -> int:
        """Return by how many bytes the outbox would outgrow its quota."""
        if not appends:
            return 0
        return self._used_bytes + sum(map(_footprint, appends)) - self._policy.max_bytes

    async def _admit(self, appends: list[_Append]) -> list[_Append]:
        """Make room as far as the policy lets, and return the appends that fit; refuse the others."""
        possible = [
            job for job in appends if _footprint(job) + _BARE_BYTES <= self._policy.max_bytes
        ]
        while (over := self._over_quota(possible)) > 0 and await self._make_room(over):
            pass
        admitted: list[_Append] = []
        room = self._policy.max_bytes - self._used_bytes
        for job in appends:
            if _footprint(job) <= room:
                room -= _footprint(job)
                admitted.append(job)
            elif await self._knows(job):  # a replay takes no room, and is answered as ever
                admitted.append(job)
            else:
                self.full = (
                    f"the outbox holds {self._used_bytes} of {self._policy.max_bytes} bytes"
                    " (outbox.max_size); it takes events again when some were delivered or"
                    " discarded"
                )
                _reject(job.done, OutboxFullError(self.full))
        return admitted

    async def _knows(self, job: _Append) -> bool:
        if self._store is None:
            raise AssertionError("a connection without its store")
        for event in job.events:
            if not await self._store.knows(event):
                return False
        return True

    async def _make_room(self, room_bytes: int) -> int:
        """Discard the oldest pending events, if that is the policy; return how many rows went.

        The oldest delivered ids are forgotten, too; without that policy only when nothing is
        pending, for then nothing else would ever make room.
        """
        forgotten = evicted = 0
        async with self._transaction() as store:
            if self._policy.evicts or not await store.pending():
                forgotten = await store.prune(self._clock.wall_ms(), limit=_PRUNE_LIMIT)
            if self._policy.evicts:
                evicted = await store.evict(room_bytes, limit=_EVICT_LIMIT)
        if evicted:
            log.warning("outbox.events_evicted", events=evicted, max_bytes=self._policy.max_bytes)
        if forgotten:
            log.warning("outbox.delivered_ids_forgotten", ids=forgotten, why="outbox full")
        return forgotten + evicted

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
    def withdrawn(self) -> int:
        """How many pending events were evicted or expired since the outbox was opened."""
        return 0 if self._store is None else self._store.withdrawn

    @property
    def used_bytes(self) -> int:
        """Bytes of the database in use, after the last commit."""
        return self._used_bytes

    async def open(self) -> None:
        """Open, recover and migrate the database. Raises `OutboxError` if it cannot be used."""
        db = await database.connect(self.path)
        try:
            store = await Store.on(db)
            self._used_bytes, self._free_bytes = await store.space()
        except sqlite3.Error as exc:
            await db.close()
            raise OutboxError(
                f"{self.path}: damaged ({exc}); move it aside together with its -wal and -shm"
                " files: the agent then starts with a new one"
            ) from exc
        self._db, self._store = db, store
        self._reserve.keep()

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
                self._reserve.release()

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
