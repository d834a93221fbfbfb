"""Group commit, backpressure, and recovery from I/O faults: all that is written comes through here.

Callers hand in events and settlements and await the commit that holds them. The next transaction
is whatever queued while the last one synced; no timer. Everything else (requeue, prune, pause …)
is a verb of the store, run in a transaction of its own between two groups.

    append ─┐                    ┌─ BEGIN IMMEDIATE
    settle ─┼─▶ queue ─▶ take ──▶│  settle · admit · append     ─▶ fsync ─▶ futures resolve
    perform ┘   bounded          └─ COMMIT

What a failed transaction means:

| fault                    | appends                   | settlements               | the connection    |
| ------------------------ | ------------------------- | ------------------------- | ----------------- |
| disk full                | OutboxFullError           | alone, in their own one   | stays             |
| I/O, any other           | OutboxUnavailableError    | kept, applied after it    | reopened, checked |
| damage                   | OutboxUnavailableError    | kept, applied after it    | to a new database |

After a failed sync a row may still be there: the app retries with the same messageId. A damaged
database is set aside, and what can be read of it comes back by `agent.outbox.rescue`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from agent.clock import Clock
from agent.errors import (
    OutboxDamagedError,
    OutboxError,
    OutboxFullError,
    OutboxOverloadedError,
    OutboxUnavailableError,
)
from agent.event import Event
from agent.outbox import aside, database, lock, restore
from agent.outbox.database import Database
from agent.outbox.records import Appended, Settlement
from agent.outbox.room import Policy, Room
from agent.outbox.store import Store

__all__ = ["Policy", "Writer", "open_writer"]

T = TypeVar("T")

QUEUE_EVENTS = 4096
"""Events that may wait for a commit. At a commit of 5 ms that is far more than a machine sends."""

PRESSED_EVENTS = 16
"""Events that wait for a commit from which intake comes first."""

QUEUE_BYTES = 64 * 1024 * 1024
"""Bytes that may wait for a commit: a dozen bodies of the largest size."""

GROUP_BYTES = 4 * 1024 * 1024
"""Bytes of one transaction: bounds the write-ahead log and the wait of the last one in it."""

_SHORT_SETTLES = 4
"""Settlements in one transaction on a disk without room: at 5 MiB an event a few MiB of log."""

_TOO_ODD = 2
"""Contradictions between rows after which the database counts as damaged."""

_SEQS_A_MS = 12
_SEQS_A_SET = 44
"""A database that replaces a damaged one gives seqs above all that the damaged one can have given:
as if 2^12 events came each millisecond since 1970 or, where the clock is wrong, 2^44 in each."""

_DISK_FULL_INTERVAL_S = 1.0
"""How long settlements that do not fit on the disk wait before the next try."""

_LOOK_INTERVAL_S = 1.0
"""How long a full outbox may be called full after there is room again."""

_REOPEN_INTERVAL_S = 1.0
"""How long an outbox that failed is left alone before the next try to reopen it."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Append:
    events: Sequence[Event]
    body_bytes: int
    done: asyncio.Future[list[Appended]]


@dataclass(slots=True)
class _Settle:
    settlement: Settlement
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Group:
    """What is committed together."""

    appends: list[_Append]
    settles: list[_Settle]


_Results = list[list[Appended] | OutboxFullError]
"""What became of each append of a group, or why it was refused."""


@dataclass(slots=True)
class _Perform(Generic[T]):
    verb: Callable[[Store], T]
    done: asyncio.Future[T]


class Writer:
    """The open outbox, to write to. Made by `open_writer`."""

    def __init__(self, path: Path, policy: Policy, clock: Clock, owned: lock.Ownership) -> None:
        self.path = path
        self.fault: str | None = None
        """Why nothing can be written right now, for `status`; None while all is well."""
        self.appended = asyncio.Event()
        """Set at each commit that made events pending; whoever waits for it clears it."""
        self.commits = 0
        """Transactions committed so far: the writer's progress, for the watchdog."""
        self.rescuing = False
        """Whether events of a damaged database are still to come back: nothing may overtake them."""
        self.unsalvaged: list[str] = []
        """The names of these databases."""
        self.damaged = asyncio.Event()
        """Set when there is something to salvage."""
        self._owned = owned
        self._policy = policy
        self._clock = clock
        self._room = Room(path, policy, clock)
        self._appends: deque[_Append] = deque()
        self._settles: deque[_Settle] = deque()
        self._performs: deque[_Perform[Any]] = deque()
        self._queued_events = 0
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._committing: asyncio.Future[None] | None = None
        self._group = _Group([], [])
        """What was taken last, in the database's thread: what a failure is about."""
        self._busy = False
        self._damage: str | None = None
        self._first = True
        self._last_seq = 0
        self._contradictions = 0
        self._db: Database | None = None

    # --- what callers ask ---

    def append(self, events: Sequence[Event]) -> asyncio.Future[list[Appended]]:
        """Store *events* in one transaction; the future says what became of each once that is synced.

        Raises `OutboxOverloadedError` or `OutboxUnavailableError`; the future may raise these and
        `OutboxFullError`.
        """
        if self.fault is not None:
            raise OutboxUnavailableError(self.fault)
        body_bytes = sum(len(event.body) for event in events)
        if (
            self._queued_events + len(events) > QUEUE_EVENTS
            or self._queued_bytes + body_bytes > QUEUE_BYTES
        ):
            raise OutboxOverloadedError(
                f"{self._queued_events} events wait to be stored already"
                f" (at most {QUEUE_EVENTS}, {QUEUE_BYTES} bytes); send again shortly"
            )
        job = _Append(events, body_bytes, asyncio.get_running_loop().create_future())
        self._queued_events += len(events)
        self._queued_bytes += body_bytes
        self._appends.append(job)
        self._begin()
        return job.done

    def settle(self, settlement: Settlement) -> asyncio.Future[None]:
        """Record what became of an attempt; the future resolves when that is synced."""
        job = _Settle(settlement, asyncio.get_running_loop().create_future())
        self._settles.append(job)
        self._begin()
        return job.done

    def adopt(self, policy: Policy) -> None:
        """Go by *policy* from the next commit on."""
        self._policy = policy
        self._room.adopt(policy)

    async def perform(self, verb: Callable[[Store], T]) -> T:
        """Run *verb* in a transaction of its own, in the database's thread. Raises as `append` does."""
        if self.fault is not None:
            raise OutboxUnavailableError(self.fault)
        job: _Perform[Any] = _Perform(verb, asyncio.get_running_loop().create_future())
        self._performs.append(job)
        self._wake.set()
        result: T = await job.done
        return result

    @property
    def full(self) -> str | None:
        """Why the last event was refused for want of room; None once one was stored again."""
        return self._room.full

    @property
    def pressed(self) -> bool:
        """Whether apps wait for more than a commit or two can bring: what can wait should."""
        return self._queued_events > PRESSED_EVENTS

    @property
    def backlogged(self) -> bool:
        """Whether something waits that could be written: without a fault, `commits` then grows."""
        return self.fault is None and (self._busy or self._waiting())

    def _waiting(self, *, performs: bool = True) -> bool:
        settles = self._settles and not self.rescuing
        waits = self._appends or settles or (performs and self._performs)
        return bool(waits) or self._committing is not None

    @property
    def withdrawn(self) -> int:
        """How many pending events were evicted or expired since the outbox was opened."""
        return 0 if self._db is None else self._db.withdrawn

    def suspect(self, damage: str) -> None:
        """A reader met damage: begin anew with an empty database, and salvage the damaged one."""
        self._damage = damage
        self._wake.set()

    def salvaged(self, name: str) -> None:
        """Nothing more comes out of the damaged database *name*."""
        self.unsalvaged = [other for other in self.unsalvaged if other != name]
        self.rescuing = bool(self.unsalvaged)
        self._begin()  # with the settlements that waited for it
        self.appended.set()

    def stop(self) -> None:
        """Let `run` end once what is queued was committed. Never cancel it: its thread goes on."""
        self._stopping = True
        self._wake.set()

    # --- the loop ---

    async def run(self) -> None:
        """Commit groups until stopped. Its owner is `open_writer`."""
        while True:
            await self._await_work()
            while self.fault is not None or self._damage is not None or self._waiting():
                if self._damage is not None and self.fault is None and self._committing is None:
                    self._break(self._damage)
                elif self.fault is None:
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

    async def _await_work(self) -> None:
        """Wait until something is to be written; meanwhile look whether a full outbox still is."""
        while not self._wake.is_set() and self.fault is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_INTERVAL_S if self._room.full else None):
                    await self._wake.wait()
                    break
            await self._look_again()
        self._wake.clear()

    async def _look_again(self) -> None:
        try:
            if await self._transact(self._room.has_some):
                self._room.full = None
        except Exception as exc:  # noqa: BLE001  # as in _follow_groups
            if not database.is_full(exc):
                self._fault(exc)

    def _begin(self) -> None:
        """Let the disk begin with what is there now, not when the event loop has a moment."""
        if self._committing is None and self._may_begin():
            self._committing = self._commit_groups()
        self._wake.set()

    def _may_begin(self) -> bool:
        sound = self.fault is None and self._damage is None and self._db is not None
        return sound and self._room.reserve.held and not self._busy

    def _commit_groups(self) -> asyncio.Future[None]:
        return self._database.transact_all(self._next_group, self._conclude)

    async def _turn(self) -> None:
        self._busy = True
        if self._committing is not None:
            await self._follow_groups()
        if self.fault is None and self._waiting(performs=False):
            await self._follow_groups()  # what was queued before the verbs comes before them
        if not self._room.reserve.held:
            await self._begin_log_again()
        while self._performs and self.fault is None:
            await self._commit_verb(self._performs.popleft())

    async def _follow_groups(self) -> None:
        self._committing = self._committing or self._commit_groups()
        try:
            await self._committing
        except Exception as exc:  # noqa: BLE001  # rows of a damaged file can make anything fail
            await self._recover(exc)
        finally:
            self._committing = None

    def _next_group(self) -> Callable[[Store], tuple[_Group, _Results]] | None:
        """Take what waits now; None where nothing does, or something else has its turn.

        Called in the database's thread.
        """
        first = not self._group.appends and not self._group.settles
        self._room.committed()  # or we would not be asked for another
        if not first and (self._performs or not self._room.reserve.held):
            self._group = _Group([], [])
            return None
        self._group = group = _Group(self._take_appends(), self._take_settles())
        if not group.appends and not group.settles:
            return None
        return lambda store: (group, self._apply(store, group))

    def _take_appends(self) -> list[_Append]:
        taken: list[_Append] = []
        group_bytes = 0
        while self._appends and group_bytes < GROUP_BYTES:
            job = self._appends.popleft()
            group_bytes += job.body_bytes
            taken.append(job)
        return taken

    def _take_settles(self) -> list[_Settle]:
        """Take all, or few on a disk without room: to delete large events fills the log, too.

        None while their events may not be back from a damaged database.
        """
        if self.rescuing:
            return []
        limit = len(self._settles) if self._room.reserve.held else _SHORT_SETTLES
        return [self._settles.popleft() for _ in range(min(limit, len(self._settles)))]

    async def _begin_log_again(self, before: Callable[[], object] = lambda: None) -> None:
        """Make the log reusable, so that it need not grow; a failure shows at the next write."""
        with suppress(sqlite3.Error):
            await self._database.begin_log_again(before)

    def _conclude(self, committed: tuple[_Group, _Results]) -> None:
        """Answer those who waited for a commit that is synced."""
        group, results = committed
        self.commits += 1
        self._forget_queued(group)
        for job, result in zip(group.appends, results, strict=True):
            if isinstance(result, OutboxFullError):
                _reject(job.done, result)
            else:
                _resolve(job.done, result)
        for settle in group.settles:
            _resolve(settle.done, None)
        if any(isinstance(result, list) and Appended.STORED in result for result in results):
            self._room.full = None
            self.appended.set()

    async def _recover(self, exc: Exception) -> None:
        """Carry on after a group that could not be committed."""
        self._room.rolled_back()
        group, self._group = self._group, _Group([], [])
        self._settles.extendleft(reversed(group.settles))
        self._forget_queued(group)
        if not database.is_full(exc):
            self._fault(exc)
            _fail(group.appends, OutboxUnavailableError(self.fault))
        elif group.appends:
            # The settlements are tried again without them.
            _fail(group.appends, self._room.disk_full())
        else:
            await self._wait_for_disk()

    def _forget_queued(self, group: _Group) -> None:
        self._queued_events -= sum(len(job.events) for job in group.appends)
        self._queued_bytes -= sum(job.body_bytes for job in group.appends)

    def _apply(self, store: Store, group: _Group) -> _Results:
        """Carry out a group, in its transaction."""
        if group.settles:
            store.settle(
                [job.settlement for job in group.settles],
                now_ms=self._clock.wall_ms(),
                remember=self._policy.remember,
            )
        if not group.appends:
            return []
        calls = [job.events for job in group.appends]
        refusals = self._room.admit(store, calls)
        admitted = [
            event
            for events, refusal in zip(calls, refusals, strict=True)
            if refusal is None
            for event in events
        ]
        outcomes = iter(store.append(admitted) if admitted else ())
        return [
            [next(outcomes) for _ in events] if refusal is None else refusal
            for events, refusal in zip(calls, refusals, strict=True)
        ]

    async def _wait_for_disk(self) -> None:
        """Settlements do not fit on the disk: use the reserve, or wait for room."""
        self._room.disk_full()
        if self._room.reserve.held:
            log.warning("outbox.reserve_released", path=str(self.path))
            # At once, before another program takes the space: the log needs it to become reusable.
            await self._begin_log_again(self._room.reserve.release)
        elif self._stopping:
            self._abandon_settles()
        else:
            await asyncio.sleep(_DISK_FULL_INTERVAL_S)

    async def _commit_verb(self, job: _Perform[Any]) -> None:
        try:
            result = await self._transact(job.verb)
        except Exception as exc:  # noqa: BLE001  # as in _follow_groups
            if database.is_full(exc):
                _reject(job.done, self._room.disk_full())
            else:
                self._fault(exc)
                _reject(job.done, OutboxUnavailableError(self.fault))
        else:
            _resolve(job.done, result)
            self.appended.set()  # a requeue makes events pending, too

    async def _transact(self, verb: Callable[[Store], T]) -> T:
        try:
            result = await self._database.transact(verb)
        except BaseException:
            self._room.rolled_back()
            raise
        self.commits += 1
        self._room.committed()
        return result

    # --- the connection ---

    @property
    def _database(self) -> Database:
        if self._db is None:
            raise AssertionError("the writer is used outside its life")
        return self._db

    async def open(self) -> None:
        """Open, recover and migrate the database. Raises `OutboxError` if it cannot be used.

        A damaged one of ours is set aside, and a new one begun.
        """
        damage, self._damage = self._damage, None
        first, self._first = self._first, False
        try:
            if first:
                aside.finish_moves(self.path)
            if damage is None:
                damage = await self._connect(first=first)
            if damage is not None:
                await self._begin_anew(damage)
            self._owned.hold(self.path)
            self._owned.prove()
            await self._note_sets()
        except OSError as exc:
            raise OutboxError(f"{self.path.parent}: {exc.strerror} ({exc.filename})") from exc
        self._room.reserve.keep()

    async def _connect(self, *, first: bool) -> str | None:
        """Open the database; return what is wrong with it if it is damaged."""
        try:
            self._db = await database.connect(self.path, first=first)
        except OutboxDamagedError as exc:
            return str(exc)
        return None

    async def _begin_anew(self, damage: str) -> None:
        if not self._owned.proven and not await asyncio.to_thread(_has_survivors, self.path):
            raise OutboxError(
                f"{damage}; it was never a tranthor-agent outbox, so it is left alone:"
                " set outbox.path to a file of its own"
            )
        self.rescuing = True
        try:
            name = aside.set_aside(self.path, self._clock.wall_ms())
        except OSError as exc:
            raise OutboxError(
                f"{damage}; it cannot be moved aside ({exc.strerror}): move it, its -wal and its"
                " -shm file by hand"
            ) from exc
        log.error("outbox.set_aside", path=str(self.path), moved_to=name, damage=damage)
        self._db = await database.connect(self.path, first=False)

    async def _note_sets(self) -> None:
        """Find out which damaged databases beside this one are still to be salvaged."""
        now_ms = self._clock.wall_ms()
        names = aside.unsalvaged_sets(self.path)
        floor = max(
            self._last_seq,
            now_ms << _SEQS_A_MS,
            aside.count_sets(self.path) << _SEQS_A_SET,
        )
        self.unsalvaged = await self._database.transact(
            lambda store: restore.note_sets(store, names, now_ms=now_ms, floor=floor)
        )
        self.rescuing = bool(self.unsalvaged)
        if self.rescuing:
            self.damaged.set()

    async def close(self) -> None:
        """Checkpoint and close; what is committed stays whatever happens here."""
        db, self._db = self._db, None
        if db is not None:
            try:
                await db.checkpoint()
            except sqlite3.Error as exc:
                log.warning("outbox.checkpoint_failed", path=str(self.path), error=str(exc))
            finally:
                await db.close()
                if not (self._room.full and self._room.lacks_disk):
                    # Else the next start needs it, and could not take it.
                    self._room.reserve.release()

    def _fault(self, exc: Exception) -> None:
        if database.is_odd(exc):
            log.error("outbox.contradicted", path=str(self.path), exc_info=exc)
            self._contradictions += 1
        # Once may be a bug of ours. Twice it is no better than damage; but that helps once at most.
        if database.is_damage(exc) or self._contradictions == _TOO_ODD:
            self._damage = f"{self.path}: damaged ({exc})"
        name = getattr(exc, "sqlite_errorname", type(exc).__name__)
        self._break(f"{self.path}: {exc} ({name})")

    def _break(self, why: str) -> None:
        """Stop acknowledging: after a failed write or sync this connection's word means nothing."""
        self.fault = why
        self._wake.set()
        self.rescuing = self.rescuing or self._damage is not None
        log.error("outbox.failed", path=str(self.path), error=why)
        _fail(self._appends, OutboxUnavailableError(self.fault))
        self._appends.clear()
        self._queued_events = self._queued_bytes = 0
        while self._performs:
            _reject(self._performs.popleft().done, OutboxUnavailableError(self.fault))

    async def _reopen(self) -> None:
        """Try once to get a sound connection; `fault` stays while there is none."""
        db, self._db = self._db, None
        try:
            if db is not None:
                self._last_seq = db.last_seq
                await db.close()
        except sqlite3.Error as exc:
            log.warning("outbox.close_failed", path=str(self.path), error=str(exc))
        try:
            await self.open()
            await self._database.prove()
        except (sqlite3.Error, OutboxError) as exc:
            if not (isinstance(exc, sqlite3.Error) and database.is_full(exc)):
                self.fault = str(exc)
                return
            self._room.disk_full()
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
        _make_folder(path.parent)
    except OSError as exc:
        raise OutboxError(
            f"{path.parent}: cannot create the outbox folder ({exc.strerror});"
            " set outbox.path to a place this user may write to"
        ) from exc
    async with lock.exclusive(path) as owned:
        writer = Writer(path, policy, clock, owned)
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


def _make_folder(folder: Path) -> None:
    """Make *folder* if need be, for good: a power cut must not take it with all that is in it."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    for each in made:
        aside.sync_folder(each.parent)


def _has_survivors(path: Path) -> bool:
    from agent.outbox.salvage import surviving  # noqa: PLC0415  # seldom needed

    return any(True for _ in surviving(path))


def _fail(jobs: Iterable[_Append], exc: OutboxError) -> None:
    for job in jobs:
        _reject(job.done, exc)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # its caller was cancelled
        future.set_result(result)


def _reject(future: asyncio.Future[T], exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)
