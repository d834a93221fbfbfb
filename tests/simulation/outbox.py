"""The outbox of a simulated machine: the real store's verbs and the real reader's queries, no threads.

Stands in for `agent.outbox.writer` and for the connection under `agent.outbox.reader`. The disk holds
what was committed; a crash leaves of the transaction under way all or nothing. Full, failing and
damaged disks are for `faults`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from simulation.judge import Judge
from simulation.virtual_time import World

from agent.errors import OutboxError
from agent.event import Event
from agent.outbox import schema
from agent.outbox.ids import id_hash
from agent.outbox.news import News
from agent.outbox.reader import Reader
from agent.outbox.records import Appended, Settlement
from agent.outbox.store import Store

Verb = Callable[[Store], object]

PRESSED_EVENTS = 16
"""Appends that wait from which intake comes first, as `agent.outbox.intake` has it."""


class Disk:
    """The database, over the lives of the agent."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.db.deserialize(_empty())
        self.db.create_function("id_hash", 1, id_hash, deterministic=True)

    def close(self) -> None:
        self.db.close()


@cache
def _empty() -> bytes:
    """Return a migrated database as it lies on a disk: to migrate one took as long as a small seed."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.create_function("id_hash", 1, id_hash, deterministic=True)
        schema.migrate(db, 0)
        return db.serialize()


@dataclass(slots=True)
class _Append:
    event: Event
    done: Callable[[bool], None]


@dataclass(slots=True)
class _Group:
    """What is committed together: appends and settlements, or a verb."""

    appends: list[_Append] = field(default_factory=list)
    settles: list[tuple[tuple[Settlement, ...], asyncio.Future[None]]] = field(default_factory=list)
    verb: Verb | None = None

    def __bool__(self) -> bool:
        return bool(self.appends or self.settles or self.verb)


class SimulatedWriter:
    """What the forwarder and the apps ask of a writer, for one life of the agent."""

    rescuing = False

    def __init__(
        self, disk: Disk, world: World, judge: Judge, *, commit_s: float, remembers: bool
    ) -> None:
        self.appended = News()
        self._store = Store(disk.db)
        self._db = disk.db
        self._world = world
        self._judge = judge
        self._commit_s = commit_s
        self._remembers = remembers
        self._rng = world.rng(f"disk/{judge.lives}")
        self._waiting = _Group()
        self._verbs: list[Verb] = []
        self._committing: _Group | None = None
        self._dead = False

    # --- what callers ask ---

    @property
    def pressed(self) -> bool:
        committing = 0 if self._committing is None else len(self._committing.appends)
        return committing + len(self._waiting.appends) > PRESSED_EVENTS

    @property
    def withdrawn(self) -> int:
        return self._store.withdrawn

    def append(self, event: Event, done: Callable[[bool], None]) -> None:
        """Store *event*; *done* hears whether the app is answered 204, or never hears."""
        self._waiting.appends.append(_Append(event, done))
        self._begin()

    def settle(self, *settlements: Settlement) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        self._judge.acted()
        if not self._dead:
            for settlement in settlements:
                self._judge.decided(settlement)
            self._waiting.settles.append((settlements, future))
            self._begin()
        return future

    def perform(self, verb: Verb) -> None:
        self._verbs.append(verb)
        self._begin()

    def stop(self) -> None:
        """Take and do nothing more."""
        self._dead = True

    def crash(self, *, committed: bool) -> None:
        """End without another word. *committed*: the transaction under way reached the disk."""
        self.stop()
        group, self._committing = self._committing, None
        if group is not None and committed:
            self._apply(group)
        for each in (*(group.appends if group else ()), *self._waiting.appends):
            each.done(False)

    def close(self) -> None:
        """End in order: what is queued is committed first."""
        for group in (self._committing, self._waiting):
            if group:
                self._apply(group)
                for each in group.appends:
                    each.done(True)
        self._committing, self._waiting = None, _Group()
        self.crash(committed=False)

    # --- transactions ---

    def _begin(self) -> None:
        if self._committing is not None or self._dead:
            return
        group, self._waiting = self._waiting, _Group()
        if not group and self._verbs:
            group.verb = self._verbs.pop(0)
        if group:
            self._committing = group
            self._world.after_here(self._commit_s * self._rng.uniform(0.5, 2.0), self._commit)

    def _commit(self) -> None:
        group = self._committing
        self._judge.acted()
        if self._dead or group is None:
            return
        self._committing = None
        stored = self._apply(group)
        for _, future in group.settles:
            if not future.done():
                future.set_result(None)
        for each in group.appends:
            each.done(True)
        if stored or group.verb:
            self.appended.set()
        self._begin()

    def _apply(self, group: _Group) -> bool:
        """Carry out *group* in a transaction, as the real writer does; return whether it stored any."""
        store = self._store
        self._db.execute("BEGIN IMMEDIATE")
        results: list[Appended] = []
        settlements = [each for together, _ in group.settles for each in together]
        if group.verb is not None:
            group.verb(store)
        if settlements:
            now_ms = self._world.wall_ms()
            store.settle(settlements, now_ms=now_ms, remember=self._remembers)
        if group.appends:
            first = store.last_seq + 1
            results = store.append([each.event for each in group.appends])
        self._db.execute("COMMIT")
        store.committed()
        if settlements:
            self._judge.books.settled(settlements)
        if group.appends:
            self._judge.books.stored(
                [each.event for each in group.appends], results, first_seq=first
            )
        if group.verb is not None:
            self._judge.books.look_again(self._db)
        return Appended.STORED in results


class SimulatedReader(Reader):
    """The real reader's queries on the simulated disk; each takes some time, and may fail."""

    def __init__(
        self, disk: Disk, world: World, judge: Judge, is_unreadable: Callable[[], bool]
    ) -> None:
        super().__init__(cast(Any, None), Path("simulated"))
        self._disk = disk
        self._world = world
        self._judge = judge
        self._is_unreadable = is_unreadable
        self._rng = world.rng(f"reader/{judge.lives}")

    async def _fetch(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        self._judge.acted()
        await self._pass(0.002)
        if self._is_unreadable():
            raise OutboxError("simulated: cannot read the outbox")
        rows = self._disk.db.execute(sql, values).fetchall()
        await self._pass(0.002)
        return rows

    async def _pass(self, at_most_s: float) -> None:
        passed = asyncio.get_running_loop().create_future()
        self._world.after_here(at_most_s * self._rng.random(), lambda: _resolve(passed))
        await passed


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done() and not future.get_loop().is_closed():
        future.set_result(None)
