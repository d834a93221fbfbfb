"""The outbox against a model of it, through restarts and crashes.

Random programs append (new ids, repeated ids with the same or another body, several in one call,
several calls at once), settle, requeue, discard, expire, prune, pause, restart, and crash. After
each step the database must equal the model row for row, and its own sums must hold.

A crash takes a copy of the database and its log at an arbitrary moment of the work, as a kill -9
leaves them, and goes on from the copy. The writer commits what one step hands it in a known order
of transactions, so the copy must equal the model after a prefix of them, and that prefix must hold
everything that was acknowledged before the copy was taken.

The usual run takes some 25 s. `OUTBOX_MODEL_EXAMPLES=500` asks for so many programs of each
kind, and new ones at each run. What a power cut does to a write that was not synced, copies of files cannot show.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from outboxes import used_bytes

from agent.errors import OutboxFullError
from agent.event import Event, lane_of
from agent.outbox import ids, letters, pauses
from agent.outbox.access import open_own_reader, open_reader
from agent.outbox.reader import Reader
from agent.outbox.records import (
    Ack,
    App,
    Appended,
    Bury,
    Ledger,
    Policy,
    Quotas,
    Reason,
    Receipt,
    Retry,
    Selection,
    Settlement,
    State,
)
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer

T = TypeVar("T")

EXAMPLES = int(os.environ.get("OUTBOX_MODEL_EXAMPLES", "0"))

LIMIT_S = 60.0
"""A step that takes longer hangs."""

STATES: tuple[State, ...] = ("pending", "dead", "delivered")

SLACK_BYTES = 3 * 4096
"""What an event takes is estimated; here and there a page is split that was not foreseen."""


@pytest.fixture(autouse=True)
def _few_recent_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ids go from memory to the index all the time, not after thousands of events."""
    monkeypatch.setattr(ids, "RECENT", 6)
    monkeypatch.setattr(ids, "SLICE", 2)


@pytest.fixture(autouse=True)
def _one_group_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer wait until a step has handed in all: the model knows no other order."""
    monkeypatch.setattr(Writer, "_begin", lambda writer: writer._wake.set())


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """An event that the outbox knows. *rank* orders the queue, *seq* is learnt from the outbox."""

    event: Event
    rank: int
    queued_ms: int
    seq: int | None = None
    state: State = "pending"
    settled_ms: int | None = None
    attempts: int = 0
    failing_since_ms: int | None = None
    reason: Reason | None = None
    status: int | None = None
    answer: str | None = None

    def receipt(self) -> Receipt:
        delivered = self.state == "delivered"
        return Receipt(
            seq=0,
            message_id=self.event.message_id,
            state=self.state,
            kind=None if delivered else self.event.kind,
            accepted_ms=self.event.received_ms,
            settled_ms=self.settled_ms,
            attempts=0 if delivered else self.attempts,
            failing_since_ms=self.failing_since_ms if self.state == "pending" else None,
            reason=self.reason,
            status=self.status,
            answer=self.answer,
            body=None if delivered else self.event.body,
            app=self.event.app,
            lane=None if delivered else self.event.lane,
        )


@dataclass(frozen=True, slots=True)
class Requeue:
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    cutoff_ms: int
    limit: int


@dataclass(frozen=True, slots=True)
class Prune:
    cutoff_ms: int


@dataclass(frozen=True, slots=True)
class Pause:
    paused: bool


Verb = Requeue | Discard | Expire | Prune | Pause


@dataclass(frozen=True, slots=True)
class Work:
    """What one step hands to the writer at once: one group, then each verb in its transaction."""

    appends: tuple[tuple[Event, ...], ...] = ()
    settles: tuple[Settlement, ...] = ()
    verbs: tuple[Verb, ...] = ()
    now_ms: int = 0


@dataclass(frozen=True, slots=True)
class Total:
    """What became of the events of one app, but for what the rows of the world say."""

    accepted: int = 0
    delivered: int = 0
    discarded: int = 0


@dataclass
class World:
    """What the outbox must hold."""

    apps: dict[str, Total] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    ranks: int = 0
    accepted: int = 0
    delivered: int = 0
    discarded: int = 0
    evicted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    paused: bool = False

    def copy(self) -> "World":
        return replace(self, rows=dict(self.rows), apps=dict(self.apps))

    def listed(self, state: State) -> list[Row]:
        found = [row for row in self.rows.values() if row.state == state]
        return sorted(found, key=lambda row: row.rank)

    def ledger(self) -> Ledger:
        return Ledger(
            accepted=self.accepted,
            delivered=self.delivered,
            pending=len(self.listed("pending")),
            dead=len(self.listed("dead")),
            discarded=self.discarded,
            evicted=self.evicted,
            duplicates=self.duplicates,
            conflicts=self.conflicts,
            paused=self.paused,
        )

    def counted(self) -> list[App]:
        """Return what the outbox must say of each app; when it first met it is not of the model."""
        return [
            App(
                name=name,
                token_digest=None,
                created_ms=0,
                accepted=total.accepted,
                delivered=total.delivered,
                pending=len(self._of(name, "pending")),
                dead=len(self._of(name, "dead")),
                discarded=total.discarded,
                body_bytes=sum(
                    len(row.event.body)
                    for row in self._of(name, "pending") + self._of(name, "dead")
                ),
            )
            for name, total in sorted(self.apps.items())
        ]

    def held_bytes(self, app: str) -> int:
        rows = self._of(app, "pending") + self._of(app, "dead")
        return sum(len(row.event.body) + 256 for row in rows)

    def _of(self, app: str, state: State) -> list[Row]:
        return [row for row in self.listed(state) if row.event.app == app]

    def _count(self, event: Event, what: Literal["accepted", "delivered", "discarded"]) -> None:
        if event.app:
            total = self.apps.get(event.app, Total())
            self.apps[event.app] = replace(total, **{what: getattr(total, what) + 1})

    # What the writer may do.

    def append(self, event: Event) -> Appended:
        known = self.rows.get(event.message_id)
        if known is not None:
            self.duplicates += 1
            if known.event.digest == event.digest:
                return Appended.REPLAYED
            self.conflicts += 1
            return Appended.CONFLICTING
        self.accepted += 1
        self._count(event, "accepted")
        self.ranks += 1
        self.rows[event.message_id] = Row(event, self.ranks, event.received_ms)
        return Appended.STORED

    def settle(self, settlement: Settlement, *, now_ms: int, remember: bool) -> None:
        row = self._at(settlement.seq, "pending")
        if row is None and isinstance(settlement, Ack):
            # It expired while its request was under way.
            dead = self._at(settlement.seq, "dead")
            row = dead if dead is not None and dead.reason == "expired" else None
        if row is None:
            return
        match settlement:
            case Ack():
                self.delivered += 1
                self._count(row.event, "delivered")
                if remember:
                    self._put(Row(row.event, row.rank, 0, row.seq, "delivered", now_ms))
                else:
                    del self.rows[row.event.message_id]
            case Retry():
                since_ms = now_ms if row.failing_since_ms is None else row.failing_since_ms
                self._put(replace(row, attempts=row.attempts + 1, failing_since_ms=since_ms))
            case Bury():
                self._bury(row, settlement, now_ms)

    def evict_oldest(self) -> None:
        for row in self.listed("pending")[:1]:
            del self.rows[row.event.message_id]
            self._count(row.event, "discarded")
            self.discarded += 1
            self.evicted += 1

    def prune(self, cutoff_ms: int) -> int:
        old = [
            row
            for row in self.listed("delivered")
            if row.settled_ms is not None and row.settled_ms < cutoff_ms
        ]
        for row in old:
            del self.rows[row.event.message_id]
        return len(old)

    def perform(self, verb: Verb, *, now_ms: int) -> int:
        match verb:
            case Requeue(seqs):
                letters = [row for seq in seqs if (row := self._at(seq, "dead"))]
                for row in letters:
                    self.ranks += 1
                    self._put(Row(row.event, self.ranks, now_ms))
                return len(letters)
            case Discard(seqs):
                letters = [row for seq in seqs if (row := self._at(seq, "dead"))]
                for row in letters:
                    del self.rows[row.event.message_id]
                    self._count(row.event, "discarded")
                self.discarded += len(letters)
                return len(letters)
            case Expire(cutoff_ms, limit):
                front = self.listed("pending")[:limit]
                old = [row for row in front if row.queued_ms < cutoff_ms]
                for row in old:
                    bury = Bury(seq=0, reason="expired", status=None, answer="")
                    self._bury(row, bury, now_ms)
                return len(old)
            case Prune(cutoff_ms):
                return self.prune(cutoff_ms)
            case Pause(paused):
                self.paused = paused
                return 0

    def _bury(self, row: Row, bury: Bury, now_ms: int) -> None:
        self._put(
            replace(
                row,
                state="dead",
                settled_ms=now_ms,
                attempts=row.attempts + (bury.reason != "expired"),
                reason=bury.reason,
                status=bury.status,
                answer=bury.answer,
            )
        )

    def _at(self, seq: int, state: State) -> Row | None:
        for row in self.listed(state):
            if row.seq == seq:
                return row
        return None

    def _put(self, row: Row) -> None:
        self.rows[row.event.message_id] = row


Answers = list[list[Appended] | None]
"""One for each append call; None where it was refused for want of room."""


@dataclass(frozen=True, slots=True)
class History:
    """One way that some work may go: the world after 0, 1, 2 … of its transactions.

    *settled* and *appended* count the transactions after which settlements and appends are in.
    """

    worlds: list[World]
    settled: int
    appended: int
    answers: Answers
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Squeeze:
    """What want of room does to a group: ids forgotten, events evicted, calls refused."""

    forgets: bool
    evicts: int
    admits: tuple[bool, ...]


def histories(before: World, work: Work, policy: Policy, *, spacious: bool) -> Iterator[History]:
    """Yield every way in which *work* may go. Only want of room leaves a choice."""
    squeezes: list[Squeeze | None] = [None]
    if work.appends and not spacious:
        most = len(before.listed("pending")) if policy.evicts else 0
        every = product(*[[True, False]] * len(work.appends))
        squeezes += [
            Squeeze(forgets, evicts, admits)
            for forgets, evicts, admits in product([False, True], range(most + 1), every)
            if forgets or not evicts
        ]
    for squeeze in squeezes:
        history = _history(before, work, policy, squeeze)
        if history is not None:
            yield history


def _history(before: World, work: Work, policy: Policy, squeeze: Squeeze | None) -> History | None:
    worlds = [before, before.copy()]
    for settlement in work.settles:
        worlds[-1].settle(settlement, now_ms=work.now_ms, remember=policy.remember)
    if squeeze is None:
        settled = appended = 1  # in one transaction
    else:
        # Settlements make room, so they go first and alone.
        settled = 1
        if squeeze.forgets:
            if worlds[-1].listed("pending") and not policy.evicts:
                return None
            worlds.append(worlds[-1].copy())
            worlds[-1].prune(work.now_ms)
        for _ in range(squeeze.evicts):
            worlds.append(worlds[-1].copy())
            worlds[-1].evict_oldest()
        worlds.append(worlds[-1].copy())
        appended = len(worlds) - 1
    within = _within_quotas(worlds[1], work.appends, policy)
    admits = squeeze.admits if squeeze else [True] * len(work.appends)
    for events, admit in zip(work.appends, admits, strict=True):
        # A replay takes no room.
        if not admit and all(event.message_id in worlds[-1].rows for event in events):
            return None
    answers = [
        [worlds[-1].append(event) for event in events] if admit and fits else None
        for events, admit, fits in zip(work.appends, admits, within, strict=True)
    ]
    counts = []
    for verb in work.verbs:
        worlds.append(worlds[-1].copy())
        counts.append(worlds[-1].perform(verb, now_ms=work.now_ms))
    return History(worlds, settled, appended, answers, counts)


def _within_quotas(
    settled: World, calls: tuple[tuple[Event, ...], ...], policy: Policy
) -> list[bool]:
    """Return which calls the quotas let in, whatever room there is: each whole or not at all."""
    taken: Counter[str] = Counter()
    verdicts = []
    for events in calls:
        wanted: Counter[str] = Counter()
        for event in events:
            if event.message_id not in settled.rows:  # a replay takes no room
                wanted[event.app] += len(event.body) + 256
        over = any(
            settled.held_bytes(app) + taken[app] + wanted[app] > quota
            for app in wanted
            if app and (quota := policy.quotas.of(app)) is not None
        )
        verdicts.append(not over)
        if not over:
            taken += wanted
    return verdicts


# --- the outbox ---------------------------------------------------------------------------------


Seen = tuple[Ledger, list[App], list[list[tuple[Receipt, int | None]]]]
"""Everything that the outbox shows, without its seqs: the ledger, the apps, the events of each state."""


def expected(world: World) -> Seen:
    events = [
        [(row.receipt(), row.event.lane if state == "pending" else None) for row in rows]
        for state in STATES
        for rows in [world.listed(state)]
    ]
    return world.ledger(), world.counted(), events


async def observed(reader: Reader) -> tuple[Seen, dict[str, int]]:
    """Return what the outbox shows, and the seq of every event that it knows."""
    ledger = await reader.ledger()
    apps = [replace(app, created_ms=0) for app in await reader.apps()]
    lanes = {head.seq: head.lane for head in (await reader.scan(after=0, limit=1000)).heads}
    listed = [await reader.select(state, Selection(), limit=1000) for state in STATES]
    events = [
        [(replace(receipt, seq=0), lanes.get(receipt.seq)) for receipt in receipts]
        for receipts in listed
    ]
    seqs = {receipt.message_id: receipt.seq for receipts in listed for receipt in receipts}
    return (ledger, apps, events), seqs


SUMS = """
SELECT accepted - delivered - pending - dead - discarded,
       pending - (SELECT COUNT(*) FROM pending),
       pending - (SELECT COUNT(*) FROM event WHERE state = 'pending'),
       dead - (SELECT COUNT(*) FROM dead),
       dead - (SELECT COUNT(*) FROM event WHERE state = 'dead'),
       last_seq < (SELECT COALESCE(MAX(seq), 0) FROM event),
       (SELECT COUNT(*) FROM pending JOIN event USING (seq) WHERE state <> 'pending'),
       (SELECT COUNT(*) FROM dead JOIN event USING (seq) WHERE state <> 'dead'),
       (SELECT COUNT(*) - COUNT(DISTINCT message_id) FROM event),
       (SELECT COUNT(*) FROM event
         WHERE seq <= indexed_upto AND seq NOT IN (SELECT seq FROM known)),
       (SELECT COUNT(*) FROM known WHERE seq NOT IN (SELECT seq FROM event))
  FROM ledger
"""


def audit(path: Path) -> None:
    """Check the rows against the ledger, and the file against itself."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute(SUMS).fetchall() == [(0,) * 11]


def take_copy(outbox: Path, into: Path) -> None:
    """Copy database and log as they would stand after a kill -9 at this moment.

    Two files are not copied at once. If the log began anew in between (its header then has new
    salts), the pair is one that no crash leaves, and is taken again.
    """
    log = outbox.with_name(f"{outbox.name}-wal")
    while True:
        before = log.read_bytes()[:32]
        pair = outbox.read_bytes(), log.read_bytes()
        if before == pair[1][:32] == log.read_bytes()[:32]:
            break
    into.parent.mkdir()
    into.write_bytes(pair[0])
    into.with_name(f"{into.name}-wal").write_bytes(pair[1])


class FakeClock:
    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        raise AssertionError("the outbox measures no waits")


class Life:
    """A writer from its opening to its end, in a task of its own."""

    def __init__(self, path: Path, policy: Policy, clock: FakeClock) -> None:
        self._over = asyncio.Event()
        self._opened: asyncio.Future[Writer] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(path, policy, clock))

    async def writer(self) -> Writer:
        either: list[asyncio.Future[Any]] = [self._task, self._opened]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._opened.done():
            await self._task
        return self._opened.result()

    async def end(self) -> None:
        self._over.set()
        await self._task

    async def _live(self, path: Path, policy: Policy, clock: FakeClock) -> None:
        async with open_writer(path, policy, clock) as writer:
            self._opened.set_result(writer)
            await self._over.wait()


def verb_of(verb: Verb, now_ms: int) -> Callable[[Store], int]:
    """Return *verb* as the store knows it; it returns how many events changed."""

    def run(store: Store) -> int:
        match verb:
            case Requeue(seqs):
                return letters.requeue(store, seqs, now_ms=now_ms)
            case Discard(seqs):
                return letters.discard(store, seqs)
            case Expire(cutoff_ms, limit):
                return store.expire(cutoff_ms, now_ms=now_ms, limit=limit)
            case Prune(cutoff_ms):
                return store.prune(cutoff_ms, limit=1000)
            case Pause(paused):
                (pauses.pause if paused else pauses.resume)(store)
                return 0

    return run


class Begun:
    """Work that was handed to a writer, all of it before the writer could start on any."""

    def __init__(self, writer: Writer, work: Work) -> None:
        create = asyncio.get_running_loop().create_task
        self.appends = [writer.append(events) for events in work.appends]
        self.verbs = [
            create(writer.perform(verb_of(verb, now_ms=work.now_ms))) for verb in work.verbs
        ]
        self.settles = [writer.settle(settlement) for settlement in work.settles]

    async def finished(self) -> None:
        everything: list[asyncio.Future[Any]] = [*self.appends, *self.verbs, *self.settles]
        if everything:
            _, late = await asyncio.wait(everything, timeout=LIMIT_S)
            assert not late, "the writer hangs"
        for append in self.appends:
            assert isinstance(append.exception(), OutboxFullError | None)

    def allows(self, history: History) -> bool:
        """Whether everything that was answered so far was answered as *history* has it."""
        return all(
            answer == (None if call.exception() else call.result())
            for call, answer in zip(self.appends, history.answers, strict=True)
            if call.done()
        ) and all(
            count == call.result()
            for call, count in zip(self.verbs, history.counts, strict=True)
            if call.done()
        )

    def acknowledged(self, history: History) -> int:
        """Return how many transactions of *history* were acknowledged so far."""
        verbs = [i for i, call in enumerate(self.verbs, 1) if call.done()]
        if verbs:
            return history.appended + max(verbs)
        if any(call.done() and not call.exception() for call in self.appends):
            return history.appended
        return history.settled if any(call.done() for call in self.settles) else 0


# --- the programs -------------------------------------------------------------------------------

SIZES = (40, 900, 6000)
"""Bytes of a body: small, a few to a page, and over pages of its own."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An event to append. *number* gives its id: there are few, so that they repeat."""

    number: int
    size: int
    version: int
    user: int
    app: str

    def event(self, now_ms: int) -> Event:
        sent = f"{self.number}/{self.version}/{self.user}/".ljust(self.size, "x").encode()
        return Event(
            message_id=f"id-{self.number}",
            kind="track",
            lane=lane_of(user_id=str(self.user), anonymous_id=None),
            digest=hashlib.blake2b(sent, digest_size=16).digest(),
            received_ms=now_ms,
            body=sent + str(now_ms).encode(),  # as stamped: an app's retry differs here
            app=self.app,
        )


drafts = st.builds(
    Draft,
    number=st.integers(0, 24),
    size=st.sampled_from(SIZES),
    version=st.sampled_from([0, 0, 0, 1]),
    user=st.integers(0, 2),
    app=st.sampled_from(["", "pos", "kiosk"]),
)
calls = st.lists(st.lists(drafts, max_size=4), max_size=3)
marks = st.integers(0, 10_000)
"""Points at an event, whichever there are."""
settlings = st.lists(st.tuples(st.sampled_from(["ack", "ack", "retry", "bury"]), marks), max_size=5)
moments = st.sampled_from([*range(0, 1000, 50), 1500, 3000])
"""Turns of the event loop, of some 5 µs each: a commit takes a few hundred."""
ages_ms = st.sampled_from([-1, 0, 1, 1000, 3_600_000, 30 * 86_400_000])
wishes = st.lists(
    st.one_of(
        st.tuples(st.just("requeue"), st.lists(marks, max_size=3)),
        st.tuples(st.just("discard"), st.lists(marks, max_size=3)),
        st.tuples(st.just("expire"), st.tuples(ages_ms, st.sampled_from([1, 3, 500]))),
        st.tuples(st.just("prune"), ages_ms),
        st.tuples(st.just("pause"), st.booleans()),
    ),
    max_size=2,
)


class OutboxMachine(RuleBasedStateMachine):
    policy: Policy

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="outbox-model-"))
        self.lives = 0
        self.clock = FakeClock()
        self.world = World()
        self.seqs: dict[str, int] = {}
        self.stale: list[int] = []
        """Seqs that were given once, for settlements that come too late."""
        self.life: Life | None = None
        self.path = self.folder / "0" / "outbox.db"
        self.checkpoints_often = False

    @initialize(checkpoints_often=st.booleans())
    def start(self, checkpoints_often: bool) -> None:
        self.checkpoints_often = checkpoints_often
        self.run(self._open())

    # --- rules ---

    @rule(calls=calls, settlings=settlings, wishes=wishes)
    def work(
        self,
        calls: list[list[Draft]],
        settlings: list[tuple[str, int]],
        wishes: list[tuple[Literal["requeue"], Any]],
    ) -> None:
        self.run(self._work(self._plan(calls, settlings, wishes)))

    @rule(calls=calls, settlings=settlings, wishes=wishes, turns=moments)
    def crash(
        self,
        calls: list[list[Draft]],
        settlings: list[tuple[str, int]],
        wishes: list[tuple[Literal["requeue"], Any]],
        turns: int,
    ) -> None:
        self.run(self._crash(self._plan(calls, settlings, wishes), turns=turns))

    @rule()
    def restart(self) -> None:
        self.run(self._restart())

    @rule(wait_ms=st.sampled_from([1, 1000, 3_600_000, 7 * 86_400_000, -60_000]))
    def time_passes(self, wait_ms: int) -> None:
        self.clock.now_ms += wait_ms

    def teardown(self) -> None:
        try:
            if self.life is not None:
                self.run(self.life.end())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder)

    # --- their parts ---

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(coroutine, LIMIT_S))

    def _plan(
        self,
        calls: list[list[Draft]],
        settlings: list[tuple[str, int]],
        wishes: list[tuple[Literal["requeue"], Any]],
    ) -> Work:
        now_ms = self.clock.now_ms
        pending, dead = self._known("pending"), self._known("dead")
        settles: dict[int, Settlement] = {}
        for what, mark in settlings:
            seq = _pick(pending + dead[-1:] + self.stale[-2:], mark)
            # The forwarder has one outcome for an event at a time.
            settles.setdefault(seq, _settlement(what, seq))
        return Work(
            appends=tuple(tuple(draft.event(now_ms) for draft in call) for call in calls),
            settles=tuple(settles.values()),
            verbs=tuple(self._verb(what, how) for what, how in wishes),
            now_ms=now_ms,
        )

    def _known(self, state: State) -> list[int]:
        return [self.seqs[row.event.message_id] for row in self.world.listed(state)]

    def _verb(self, what: str, how: Any) -> Verb:
        dead = self._known("dead")
        match what:
            case "requeue":
                return Requeue(tuple({_pick(dead + self.stale[-1:], mark): None for mark in how}))
            case "discard":
                return Discard(tuple({_pick(dead + self.stale[-1:], mark): None for mark in how}))
            case "expire":
                return Expire(self.clock.now_ms - how[0], how[1])
            case "prune":
                return Prune(self.clock.now_ms - how)
            case _:
                return Pause(how)

    async def _open(self) -> Writer:
        self.life = Life(self.path, self.policy, self.clock)
        writer = await self.life.writer()
        if self.checkpoints_often:
            await writer.perform(lambda store: store.fetch("PRAGMA wal_autocheckpoint = 4"))
        return writer

    async def _work(self, work: Work) -> None:
        assert self.life is not None
        writer = await self.life.writer()
        spacious = await used_bytes(writer) < self.policy.max_bytes / 4
        begun = Begun(writer, work)
        await begun.finished()
        ways = [
            (history.worlds[-1], history)
            for history in histories(self.world, work, self.policy, spacious=spacious)
            if begun.allows(history)
        ]
        assert ways, "the answers are not what the model says"
        await self._match([world for world, _ in ways])
        assert await used_bytes(writer) <= self.policy.max_bytes + SLACK_BYTES

    async def _crash(self, work: Work, *, turns: int) -> None:
        assert self.life is not None
        writer, before = await self.life.writer(), self.life
        spacious = await used_bytes(writer) < self.policy.max_bytes / 4
        begun = Begun(writer, work)
        for _ in range(turns):
            await asyncio.sleep(0)  # the moment of the crash, not a wait for anything
        possible = [
            world
            for history in histories(self.world, work, self.policy, spacious=spacious)
            if begun.allows(history)
            for world in history.worlds[begun.acknowledged(history) :]
        ]
        assert possible, "the answers are not what the model says"
        self.lives += 1
        copy = self.folder / str(self.lives) / self.path.name
        take_copy(self.path, copy)

        await begun.finished()
        await before.end()
        shutil.rmtree(self.path.parent)
        self.path = copy
        await self._open()
        await self._match(possible)

    async def _restart(self) -> None:
        assert self.life is not None
        await self.life.end()
        left = sorted(file.name for file in self.path.parent.iterdir())
        assert left == ["outbox.db", "outbox.db.lock"]
        async with open_reader(self.path) as reader:
            seen, _ = await observed(reader)
        assert seen == expected(self.world)
        assert sorted(file.name for file in self.path.parent.iterdir()) == left
        await self._open()
        await self._match([self.world])

    async def _match(self, possible: list[World]) -> None:
        """Find the outbox among the *possible* worlds, and learn the seqs it gave."""
        audit(self.path)
        async with open_own_reader(self.path) as reader:
            seen, seqs = await observed(reader)
            oldest_ms = await reader.oldest_pending_ms()
        world = next((world for world in possible if expected(world) == seen), None)
        if world is None:
            assert seen == expected(possible[-1])
            raise AssertionError
        front = world.listed("pending")[:1]
        assert oldest_ms == (front[0].queued_ms if front else None)
        self._learn(world, seqs)

    def _learn(self, world: World, seqs: dict[str, int]) -> None:
        last = max(self.stale, default=0)
        for message_id, row in world.rows.items():
            seq = seqs[message_id]
            if row.seq is None:
                assert seq > last, "a seq was given twice, or behind a reader's cursor"
                self.stale.append(seq)
                world.rows[message_id] = replace(row, seq=seq)
            else:
                assert seq == row.seq, "an event changed its seq without being requeued"
        self.stale = sorted(self.stale)[-40:]
        self.world, self.seqs = world, seqs


def _pick(seqs: list[int], mark: int) -> int:
    return seqs[mark % len(seqs)] if seqs else mark


def _settlement(what: str, seq: int) -> Settlement:
    match what:
        case "ack":
            return Ack(seq)
        case "retry":
            return Retry(seq)
        case _:
            return Bury(seq=seq, reason="rejected", status=400, answer="name: tröp\x00 big")


class RoomyMachine(OutboxMachine):
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=True)


class ForgetfulMachine(OutboxMachine):
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=False)


class RefusingMachine(OutboxMachine):
    """Full after a few events: without any, an outbox takes 36 KiB."""

    policy = Policy(max_bytes=60 * 1024, evicts=False, remember=True)


class EvictingMachine(OutboxMachine):
    """Drops the oldest after a few events."""

    policy = Policy(max_bytes=60 * 1024, evicts=True, remember=True)


class RationingMachine(OutboxMachine):
    """Has room, but for one app only for the smallest events, and for the other for a few."""

    policy = Policy(
        max_bytes=1 << 30,
        evicts=False,
        remember=True,
        quotas=Quotas(named={"pos": 1_500}, other=9_000),
    )


class RationingEvictingMachine(OutboxMachine):
    """Makes room for whom it lets in, and for nobody else."""

    policy = Policy(
        max_bytes=60 * 1024, evicts=True, remember=False, quotas=Quotas(named={"pos": 9_000})
    )


@pytest.mark.parametrize(
    "machine",
    [
        RoomyMachine,
        ForgetfulMachine,
        RefusingMachine,
        EvictingMachine,
        RationingMachine,
        RationingEvictingMachine,
    ],
)
def test_the_outbox_is_what_its_model_says(machine: type[OutboxMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES or 20,
            stateful_step_count=25,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
