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

After a failed sync a row may still be there: the app retries with the same messageId. The queues
are `agent.outbox.intake`'s, the connection `agent.outbox.opening`'s.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent.clock import Clock
from agent.errors import OutboxError, OutboxUnavailableError
from agent.event import Event
from agent.outbox import database, files, lock
from agent.outbox.intake import Group, Intake, Perform, refuse, reject, resolve
from agent.outbox.news import News
from agent.outbox.opening import Opening
from agent.outbox.records import App, Appended, Policy, Retry, Settlement
from agent.outbox.room import Results, Room
from agent.outbox.store import Store
from agent.outbox.waiters import Waiters

__all__ = ["Policy", "Writer", "open_writer"]

T = TypeVar("T")

_SHORT_SETTLES = 1
"""Calls of `settle` in one transaction on a disk without room. To bury events of 5 MiB writes as much into
the log, and again into the database: that fits into the reserve once, and not twice."""

_DISK_FULL_INTERVAL_S = 1.0
"""How long settlements that do not fit on the disk wait before the next try."""

_LOOK_INTERVAL_S = 1.0
"""How long a full outbox may be called full after there is room again."""

_REOPEN_INTERVAL_S = 1.0
"""How long an outbox that failed is left alone before the next try to reopen it."""

_NOTHING = Group()

log = structlog.get_logger()


class Writer:
    """The open outbox, to write to. Made by `open_writer`."""

    def __init__(self, path: Path, policy: Policy, clock: Clock, owned: lock.Ownership) -> None:
        self.path = path
        self.fault: str | None = None
        """Why nothing can be written right now, for `status`; None while all is well."""
        self.appended = News()
        """Told of each commit that made events pending."""
        self.waiters = Waiters()
        """Told of each commit after which some are pending no longer."""
        self.commits = 0
        """Transactions committed so far: the writer's progress, for the watchdog."""
        self.opening = Opening(path, clock, owned)
        """What is known of the file, and of the damaged ones beside it."""
        self._operator_key = owned.operator_key
        self._policy = policy
        self._clock = clock
        self._room = Room(path, policy, clock)
        self._intake = Intake()
        self._wake = asyncio.Event()
        self._stopping = False
        self._committing: asyncio.Future[None] | None = None
        self._group = _NOTHING
        """What was taken last, in the database's thread: what a failure is about."""
        self._busy = False
        self._withdrawn_told = 0

    # --- what callers ask ---

    def append(self, events: Sequence[Event]) -> asyncio.Future[list[Appended]]:
        """Store *events* in one transaction; the future says what became of each once that is synced.

        Raises `OutboxOverloadedError` or `OutboxUnavailableError`; the future may raise these and
        `OutboxFullError`.
        """
        self._refuse_if_broken()
        stored = self._intake.append(events)
        self._begin()
        return stored

    def settle(self, *settlements: Settlement) -> asyncio.Future[None]:
        """Record what became of the events of an attempt; the future resolves when that is synced."""
        settled = self._intake.settle(settlements)
        self._begin()
        return settled

    def adopt(self, policy: Policy) -> None:
        """Go by *policy* from the next commit on."""
        self._policy = policy
        self._room.adopt(policy)

    async def perform(self, verb: Callable[[Store], T]) -> T:
        """Run *verb* in a transaction of its own, in the database's thread. Raises as `append` does."""
        self._refuse_if_broken()
        performed = self._intake.perform(verb)
        self._wake.set()
        return await performed

    def _refuse_if_broken(self) -> None:
        if self.fault is not None:
            raise OutboxUnavailableError(self.fault)

    @property
    def full(self) -> str | None:
        """Why the last event was refused for want of room; None once one was stored again."""
        return self._room.full

    @property
    def pressed(self) -> bool:
        """Whether so many events wait to be stored that deliveries should stand back."""
        return self._intake.pressed

    @property
    def backlogged(self) -> bool:
        """Whether something waits that could be written: without a fault, `commits` then grows."""
        return self.fault is None and (self._busy or self._waiting())

    @property
    def withdrawn(self) -> int:
        """How many pending events were evicted or expired in this life of the agent."""
        return self.opening.withdrawn

    @property
    def rescuing(self) -> bool:
        """Whether events of a damaged database are still to come back: nothing may overtake them."""
        return self.opening.rescuing

    @property
    def waiting(self) -> Mapping[str, int]:
        """How many events are pending for each named upstream that has some."""
        return self.opening.database.waiting if self.opening.is_open else {}

    @property
    def apps(self) -> Mapping[str, App] | None:
        """The apps that are known, by name; None while one may be missing."""
        opening = self.opening
        begins_anew = opening.rescuing and self.fault is not None
        if begins_anew or opening.tokens_unread or not opening.is_open:
            return None
        return opening.database.apps

    @property
    def operator_key(self) -> str:
        """What shows that a client may read the files of the outbox: it stands in the lock file."""
        return self._operator_key

    def suspect(self, damage: str) -> None:
        """A reader met damage: begin anew with an empty database, and salvage the damaged one."""
        self.opening.damage = damage
        self._wake.set()

    def tokens_read(self, name: str) -> None:
        """The apps' tokens of the damaged database *name* are known again."""
        self.opening.tokens_unread.discard(name)

    def salvaged(self, name: str) -> None:
        """Nothing more comes out of the damaged database *name*."""
        self.opening.salvaged(name)
        self._begin()  # with the settlements that waited for it
        self.appended.set()
        self.waiters.tell_all()

    def stop(self) -> None:
        """Let `run` end once what is queued was committed. Never cancel it: its thread goes on."""
        self._stopping = True
        self._wake.set()

    # --- the loop ---

    async def run(self) -> None:
        """Commit groups until stopped. Its owner is `open_writer`."""
        while True:
            await self._await_work()
            while self.fault is not None or self.opening.damage is not None or self._waiting():
                if self.fault is not None:
                    if self._stopping:
                        break
                    await asyncio.sleep(_REOPEN_INTERVAL_S)
                    await self._reopen()
                elif self.opening.damage is not None and self._committing is None:
                    self._break(self.opening.damage)
                else:
                    await self._turn()
                    self._busy = False
            if self._stopping:
                self._intake.abandon_settles()
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
            if await self._transact(self._room.look_for_room):
                self._room.full = None
        except Exception as exc:  # noqa: BLE001  # as in _follow_groups
            if not database.is_full(exc):
                self._fault(exc)

    def _waiting(self, *, performs: bool = True) -> bool:
        intake = self._intake
        settles = intake.settles and not self.rescuing
        waits = intake.appends or settles or (performs and intake.performs)
        return waits or self._committing is not None

    def _begin(self) -> None:
        """Let the disk begin with what is there now, not when the event loop has a moment."""
        if self._committing is None and self._may_begin():
            self._committing = self._commit_groups()
        self._wake.set()

    def _may_begin(self) -> bool:
        sound = self.fault is None and self.opening.damage is None and self.opening.is_open
        return sound and self._room.reserve.held and not self._busy

    def _commit_groups(self) -> asyncio.Future[None]:
        return self.opening.database.transact_all(self._next_group, self._conclude)

    async def _turn(self) -> None:
        self._busy = True
        if self._committing is not None:
            await self._follow_groups()
        if self.fault is None and self._waiting(performs=False):
            await self._follow_groups()  # what was queued before the verbs comes before them
        if not self._room.reserve.held:
            await self._rewind_log()
        while self._intake.performs and self.fault is None:
            await self._commit_verb(self._intake.take_perform())

    # --- groups ---

    async def _follow_groups(self) -> None:
        self._committing = self._committing or self._commit_groups()
        try:
            await self._committing
        except Exception as exc:  # noqa: BLE001  # rows of a damaged file can make anything fail
            await self._recover(exc)
        finally:
            self._committing = None

    def _next_group(self) -> Callable[[Store], tuple[Group, Results]] | None:
        """Take what waits now; None where nothing does, or something else has its turn.

        Called in the database's thread.
        """
        first = self._group.empty
        self._room.committed()  # or we would not be asked for another
        if not first and (self._intake.performs or not self._room.reserve.held):
            self._group = _NOTHING
            return None
        self._group = group = self._intake.take_group(settles=self._settles_at_once())
        if group.empty:
            return None
        return lambda store: (group, self._apply(store, group))

    def _settles_at_once(self) -> int | None:
        """Return how many settlements go into one transaction; None: all there are.

        Few on a disk without room: to delete large events fills the log, too. None of them while
        their events may not be back from a damaged database.
        """
        if self.rescuing:
            return 0
        return None if self._room.reserve.held else _SHORT_SETTLES

    def _apply(self, store: Store, group: Group) -> Results:
        """Carry out a group, as one transaction."""
        if group.settles and group.appends:
            store.begin()
        if group.settles:
            store.settle(
                chain.from_iterable(job.settlements for job in group.settles),
                now_ms=self._clock.wall_ms(),
                remember=self._policy.remember,
            )
        if not group.appends:
            return []
        return self._room.let_in(store, [job.events for job in group.appends])

    def _conclude(self, committed: tuple[Group, Results]) -> None:
        group, results = committed
        self.commits += 1
        self._intake.committed(group, results)
        if any(isinstance(result, list) and Appended.STORED in result for result in results):
            self._room.full = None
            self.appended.tell({event.upstream for job in group.appends for event in job.events})
        if self.waiters:
            self._tell_waiters(group)

    def _tell_waiters(self, group: Group = _NOTHING) -> None:
        changes = chain.from_iterable(job.settlements for job in group.settles)
        self.waiters.tell(change.seq for change in changes if not isinstance(change, Retry))
        if self._withdrawn_told != self.withdrawn:
            self._withdrawn_told = self.withdrawn
            self.waiters.tell_upto(self.opening.database.withdrawn_upto)

    async def _recover(self, exc: Exception) -> None:
        """Carry on after a group that could not be committed."""
        self._room.rolled_back()
        group, self._group = self._group, _NOTHING
        self._intake.rolled_back(group)
        if not database.is_full(exc):
            refuse(group.appends, self._fault(exc))
        elif group.appends:
            # The settlements are tried again without them.
            refuse(group.appends, self._room.disk_full())
        else:
            await self._wait_for_disk()

    async def _wait_for_disk(self) -> None:
        """Settlements do not fit on the disk: use the reserve, or wait for room."""
        self._room.disk_full()
        if self._room.reserve.held:
            log.warning("outbox.reserve_released", path=str(self.path))
            # At once, before another program takes the space: the log needs it to become reusable.
            await self._rewind_log(self._room.reserve.release)
        elif self._stopping:
            self._intake.abandon_settles()
        else:
            await asyncio.sleep(_DISK_FULL_INTERVAL_S)

    async def _rewind_log(self, before: Callable[[], object] = lambda: None) -> None:
        """Make the log reusable, so that it need not grow; a failure shows at the next write."""
        with suppress(sqlite3.Error):
            await self.opening.database.rewind_log(before)

    # --- verbs ---

    async def _commit_verb(self, job: Perform[Any]) -> None:
        try:
            result = await self._transact(job.verb)
        except Exception as exc:  # noqa: BLE001  # as in _follow_groups
            full = database.is_full(exc)
            reject(job.done, self._room.disk_full() if full else self._fault(exc))
        else:
            resolve(job.done, result)
            self.appended.set()  # a requeue makes events pending, too

    async def _transact(self, verb: Callable[[Store], T]) -> T:
        try:
            result = await self.opening.database.transact(verb)
        except BaseException:
            self._room.rolled_back()
            raise
        self.commits += 1
        self._room.committed()
        self._room.look_anew()
        self._tell_waiters()
        return result

    # --- faults ---

    def _fault(self, exc: Exception) -> OutboxUnavailableError:
        """Take it that the outbox failed; return what whoever waited is told."""
        self.opening.blame(exc)
        name = getattr(exc, "sqlite_errorname", type(exc).__name__)
        return self._break(f"{self.path}: {exc} ({name})")

    def _break(self, why: str) -> OutboxUnavailableError:
        """Stop acknowledging: after a failed write or sync this connection's word means nothing."""
        self.fault = why
        self._wake.set()
        self.opening.rescuing |= self.opening.damage is not None
        log.error("outbox.failed", path=str(self.path), error=why)
        unavailable = OutboxUnavailableError(why)
        self._intake.refuse_all(unavailable)
        return unavailable

    async def open(self) -> None:
        """Open the outbox, whatever state it is in. Raises `OutboxError` if it cannot be used."""
        await self.opening.open()
        self._room.reserve.keep()

    async def _reopen(self) -> None:
        """Try once to get a sound connection; `fault` stays while there is none."""
        await self.opening.abandon()
        try:
            await self.open()
            await self.opening.database.prove()
        except (sqlite3.Error, OutboxError) as exc:
            if not (isinstance(exc, sqlite3.Error) and database.is_full(exc)):
                self.fault = str(exc)
                return
            self._room.disk_full()
        self.fault = None
        self.appended.set()  # what a failed commit has written may be there
        log.info("outbox.reopened", path=str(self.path))

    async def close(self) -> None:
        """Close the outbox; what is committed stays whatever happens here."""
        closed = await self.opening.close()
        if closed and not (self._room.full and self._room.lacks_disk):
            # Else the next start needs it, and could not take it.
            self._room.reserve.release()


@asynccontextmanager
async def open_writer(path: Path, policy: Policy, clock: Clock) -> AsyncIterator[Writer]:
    """Own the outbox at *path* while the block runs: lock it, open it, commit, empty its log, close.

    Raises `OutboxLockedError` if another process owns it, `OutboxError` if it cannot be used.
    """
    try:
        files.make_folder(path.parent)
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
