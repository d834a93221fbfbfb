"""The shell around the decisions: reads the outbox, sends, and records what became of each event.

The dispatcher reads on in the outbox and starts a runner for what lanes and breaker let go; a runner
sends one event after another as long as they let the next one go, so that while all is well the
dispatcher need not wake. Nothing waits on a timer while there is nothing to send.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, assert_never

import structlog

from agent.clock import Clock
from agent.errors import OutboxError
from agent.event import Kind
from agent.forward.backoff import Backoff
from agent.forward.breaker import Breaker, HalfOpen, Held, Open, Ticket
from agent.forward.disposition import (
    FRESH,
    Delivered,
    Failed,
    GiveUp,
    Misconfigured,
    Outcome,
    Record,
    Rejected,
    Unavailable,
    settlement,
)
from agent.forward.lanes import PER_LANE, Lanes
from agent.forward.upstream import Upstream
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Bury, Head, Retry, Settlement
from agent.outbox.writer import Writer

SCAN = 512
"""Events read from the outbox at once: a few ms of reading, and a 2 MiB answer at most."""

UNSETTLED = 256
"""Settlements that may wait for their commit. A crash sends so many again, and no more."""

BESIDE_INTAKE = 12
"""Attempts and settlements that may be under way while apps wait to be stored: on a small machine
the two share one processor, and an app that waits is worse than an event that waits."""

STOP_S = 4.0
"""How long attempts in flight may take once the agent stops; the rest is sent after the next start."""

_READ_AGAIN_S = 1.0
"""How long an outbox that cannot be read is left alone."""

log = structlog.get_logger()

FlowState = Literal["flowing", "backing_off", "held", "paused", "unconfigured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to forward. *ordered* keeps each user's events in order."""

    concurrency: int
    ordered: bool
    backoff: Backoff
    give_up: GiveUp
    hold_probe_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How forwarding stands, for people. *reason* is empty while all is well."""

    state: FlowState
    reason: str
    next_attempt_in_s: float | None
    last_error: str | None
    last_error_ms: int | None
    in_flight: int
    parked_users: int
    ambiguous: int


@dataclass(slots=True)
class _Trial:
    """An event that failed before: how often in a row, and what had been delivered by then."""

    strikes: int
    delivered_before: int
    since_s: float


class Forwarder:
    """Drains the outbox. Made by `forwarding`."""

    def __init__(
        self,
        *,
        writer: Writer,
        reader: Reader,
        upstream: Upstream | None,
        plan: Plan,
        clock: Clock,
        rng: random.Random,
        unconfigured: str = "",
        paused: bool = False,
    ) -> None:
        """*upstream* None means that none is configured; *unconfigured* then says what is missing."""
        self._writer = writer
        self._reader = reader
        self._upstream = upstream
        self._plan = plan
        self._clock = clock
        self._rng = rng
        self._unconfigured = unconfigured
        self._paused = paused
        self._lanes = Lanes(ordered=plan.ordered)
        self._breaker = Breaker(
            plan.backoff, ceiling=plan.concurrency, hold_probe_s=plan.hold_probe_s, rng=rng
        )
        self._wake = asyncio.Event()
        self._scan_due = True
        self._stopping = False
        self._in_flight = 0
        self._unsettled = 0
        self._trials: dict[int, _Trial] = {}
        self._delivered = 0
        self._ambiguous = 0
        self._withdrawn = 0
        self._stale_upto = 0
        self._stale = False
        """Whether the lanes are of a database that was replaced since."""
        self._last_error: str | None = None
        self._last_error_ms: int | None = None

    # --- what a person may ask ---

    def pause(self) -> None:
        """Send nothing more until `resume`; what is in flight ends."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._wake.set()

    def flush(self) -> None:
        """End every wait: try now."""
        self._breaker.flush(self._clock.monotonic_s())
        self._lanes.unpark()
        self._wake.set()

    def adopt(self, upstream: Upstream | None, plan: Plan, unconfigured: str = "") -> None:
        """Send to *upstream* and by *plan*, beginning now; what is in flight ends as it began."""
        self._upstream, self._unconfigured = upstream, unconfigured
        if plan.ordered != self._plan.ordered:
            self._stale = True  # other lanes, once nothing of these is under way
        self._plan = plan
        self._breaker.adopt(
            plan.backoff,
            ceiling=plan.concurrency,
            hold_probe_s=plan.hold_probe_s,
            now_s=self._clock.monotonic_s(),
        )
        self._lanes.unpark()
        self._wake.set()

    def link_changed(self) -> None:
        """The machine's network changed: try once before a backoff is over."""
        if self._breaker.probe_early(self._clock.monotonic_s()):
            self._lanes.unpark()  # each that failed with the link waits for itself, too
            self._wake.set()

    def flow(self) -> Flow:
        """Return how forwarding stands."""
        state, reason = self._state()
        opens_at_s = self._breaker.opens_at_s()
        waits = state in {"backing_off", "held"} and opens_at_s is not None
        return Flow(
            state=state,
            reason=reason,
            next_attempt_in_s=max(0.0, opens_at_s - self._clock.monotonic_s())
            if waits and opens_at_s is not None
            else None,
            last_error=self._last_error,
            last_error_ms=self._last_error_ms,
            in_flight=self._in_flight,
            parked_users=self._lanes.parked,
            ambiguous=self._ambiguous,
        )

    def _state(self) -> tuple[FlowState, str]:
        if self._upstream is None:
            return "unconfigured", self._unconfigured
        if self._paused:
            return "paused", "paused by a person; tranthor-agent resume ends it"
        if self._writer.rescuing:
            return "backing_off", "events of a damaged outbox are being read back; they go first"
        match self._breaker.state:
            case Open(_, _, why) | HalfOpen(Open(_, _, why)):
                return "backing_off", why
            case Held(_, why) | HalfOpen(Held(_, why)):
                return "held", why
            case _:
                parked = self._lanes.parked
                return "flowing", f"{parked} user(s) wait behind a failing event" if parked else ""

    # --- the dispatcher ---

    async def run(self) -> None:
        """Forward until stopped. Its owner is `forwarding`."""
        async with asyncio.TaskGroup() as attempts:
            follower = attempts.create_task(self._follow_appends())
            while not self._stopping:
                self._wake.clear()
                if self._upstream is not None:
                    await self._fill()
                now_s = self._clock.monotonic_s()
                while (taken := self._take(now_s)) is not None:
                    self._in_flight += 1
                    attempts.create_task(self._run_attempts(taken))
                await self._wait(now_s)
            follower.cancel()

    def stop(self) -> None:
        """Start nothing more; `run` ends when what is in flight is settled."""
        self._stopping = True
        self._wake.set()

    async def _follow_appends(self) -> None:
        while True:
            await self._writer.appended.wait()
            self._writer.appended.clear()
            self._scan_due = True
            self._wake.set()

    async def _fill(self) -> None:
        """Read on in the outbox where the lanes have room; an outbox that fails is left for a while."""
        try:
            await self._read_on()
        except OutboxError as exc:
            log.error("outbox.read_failed", error=str(exc))
            self._scan_due = True
            await asyncio.sleep(_READ_AGAIN_S)

    async def _read_on(self) -> None:
        if self._writer.rescuing:  # what comes back is older than what was accepted since
            self._stale = True
            return
        if self._stale:
            if self._in_flight or self._unsettled:
                return  # they belong to what was read before
            self._lanes = Lanes(ordered=self._plan.ordered)
            self._trials.clear()
            self._stale, self._scan_due = False, True
        lanes = self._lanes
        while (starved := lanes.starved()) is not None:
            key, last_seq = starved
            heads = await self._reader.lane(key, after=last_seq, upto=lanes.cursor, limit=PER_LANE)
            lanes.read_on(heads, complete=len(heads) < PER_LANE)
        if self._scan_due and lanes.room >= SCAN:
            self._scan_due = False
            heads = await self._reader.scan(after=lanes.cursor, limit=SCAN)
            lanes.scanned(heads)
            if len(heads) == SCAN:  # there may be more: after what came is on its way
                self._scan_due = True
                self._wake.set()

    def _take(self, now_s: float) -> tuple[Head, Ticket] | None:
        if self._upstream is None or self._stopping or self._writer.rescuing:
            return None
        if self._stale or self._unsettled >= UNSETTLED:
            return None
        due_at_s = self._due_at_s()
        if due_at_s is None or due_at_s > now_s:
            return None
        if self._writer.pressed and self._in_flight + self._unsettled >= BESIDE_INTAKE:
            return None  # the next commit changes that
        ticket = self._breaker.admit(now_s, in_flight=self._in_flight)
        if ticket is None:
            return None
        head = self._lanes.take(now_s)
        if head is None:
            raise AssertionError("lanes promised an event and have none")
        return head, ticket

    def _due_at_s(self) -> float | None:
        """Return from when lanes and breaker let an event go; None: only a change can bring that."""
        lanes_at_s = self._lanes.next_at_s()
        if self._paused or lanes_at_s is None:
            return None
        opens_at_s = self._breaker.opens_at_s()
        return lanes_at_s if opens_at_s is None else max(lanes_at_s, opens_at_s)

    async def _wait(self, now_s: float) -> None:
        """Wait for a change, or for the instant from which an event may go.

        An instant not behind *now_s* is no reason: what then kept `_take` from it ends with a change.
        """
        due_at_s = self._due_at_s()
        timed = due_at_s is not None and due_at_s > now_s
        with suppress(TimeoutError):
            async with asyncio.timeout(
                due_at_s - now_s if timed and due_at_s is not None else None
            ):
                await self._wake.wait()

    # --- an attempt ---

    async def _run_attempts(self, taken: tuple[Head, Ticket] | None) -> None:
        """Send *taken*, and what may go after it: while all is well no other task need wake."""
        try:
            while taken is not None:
                await self._attempt(*taken)
                # Not counted while it asks for the next one: the ceiling is for the others.
                self._in_flight -= 1
                taken = None if self._is_hungry() else self._take(self._clock.monotonic_s())
                self._in_flight += 1
                if self._in_flight < self._plan.concurrency:
                    self._wake.set()  # for others beside it
        finally:
            self._in_flight -= 1
            self._wake.set()

    def _is_hungry(self) -> bool:
        """Whether the dispatcher has to read on before more is sent."""
        lanes = self._lanes
        return lanes.starved() is not None or (self._scan_due and lanes.room >= SCAN)

    async def _attempt(self, head: Head, ticket: Ticket) -> None:
        try:
            body = await self._body(head)
            if body is None and self._writer.rescuing:
                raise OutboxError("its database is being replaced")  # noqa: TRY301  # as if unreadable
            if body is None:  # evicted or expired since it was read
                self._breaker.cancel(ticket, self._clock.monotonic_s())
                self._finish(head)
            else:
                self._conclude(head, ticket, await self._send(head.kind, body))
        except OutboxError as exc:
            log.error("outbox.read_failed", error=str(exc))
            now_s = self._clock.monotonic_s()
            self._breaker.cancel(ticket, now_s)
            self._lanes.again(head, until_s=now_s + _READ_AGAIN_S)

    async def _send(self, kind: Kind, body: bytes) -> Outcome:
        if self._upstream is None:  # taken away meanwhile
            return Unavailable(why=self._unconfigured)
        return await self._upstream.send(kind, body)

    async def _body(self, head: Head) -> bytes | None:
        """Return what to send; None if the event is not pending any more."""
        if self._withdrawn != self._writer.withdrawn:
            # Some went, and they were the oldest: what was read until now is read again.
            self._withdrawn = self._writer.withdrawn
            self._stale_upto = self._lanes.cursor
        if head.body is None or head.seq <= self._stale_upto:
            return await self._reader.body(head.seq)
        return head.body

    def _record(self, head: Head) -> Record:
        trial = self._trials.get(head.seq)
        if trial is None:
            return FRESH
        return Record(
            strikes=trial.strikes,
            for_s=self._clock.monotonic_s() - trial.since_s,
            proven=self._delivered > trial.delivered_before,
        )

    def _conclude(self, head: Head, ticket: Ticket, outcome: Outcome) -> None:
        """Carry out what the decisions make of *outcome*: for the event, its lane and the link."""
        now_ms = self._clock.wall_ms()
        record = self._record(head)
        change = settlement(head, outcome, record, now_ms=now_ms, give_up=self._plan.give_up)
        if change is not None:
            self._unsettled += 1
            self._writer.settle(change).add_done_callback(partial(self._settled, head, change))
        self._tell_breaker(ticket, outcome, proven=record.proven)
        match change:
            case Ack():
                self._delivered += 1
                self._finish(head)
            case Bury():
                self._finish(head)
            case Retry():
                since_ms = now_ms if head.failing_since_ms is None else head.failing_since_ms
                self._put_off(
                    replace(head, attempts=head.attempts + 1, failing_since_ms=since_ms),
                    outcome,
                    probe=False,
                )
            case None:
                self._put_off(head, outcome, probe=ticket.probe and not record.proven)
            case _:
                assert_never(change)

    def _settled(self, head: Head, change: Settlement, done: asyncio.Future[None]) -> None:
        self._unsettled -= 1
        self._wake.set()
        if isinstance(change, Bury) and not done.cancelled():
            # Without the answer, which may quote what the app sent: `show` has it.
            log.error(
                "event.dead_lettered",
                message_id=head.message_id,
                reason=change.reason,
                status=change.status,
            )

    def _finish(self, head: Head) -> None:
        self._trials.pop(head.seq, None)
        self._lanes.done(head)

    def _put_off(self, head: Head, outcome: Outcome, *, probe: bool) -> None:
        """Let other lanes go first; an event whose own failure this may be waits longer each time.

        A failed *probe* says nothing about its event, and what holds the queue nothing at first:
        another lane's is the next one.
        """
        now_s = self._clock.monotonic_s()
        trial = self._trials.setdefault(head.seq, _Trial(0, self._delivered, now_s))
        proven = self._delivered > trial.delivered_before
        if isinstance(outcome, Misconfigured):
            # A key revoked meanwhile looks the same, once; only what passes again in between clears it.
            trial.delivered_before = self._delivered
        if probe or (isinstance(outcome, Misconfigured) and not proven):
            self._lanes.again(head, until_s=None)
            return
        trial.strikes += 1
        wait_s = self._plan.backoff.wait_s(trial.strikes, self._rng)
        self._lanes.again(head, until_s=now_s + wait_s)

    def _tell_breaker(self, ticket: Ticket, outcome: Outcome, *, proven: bool) -> None:
        before, _ = self._state()
        now_s = self._clock.monotonic_s()
        match outcome:
            case Delivered():
                self._breaker.succeed(ticket)
            case Rejected(status, answer):
                self._note_error(f"{status}: {answer}")
                self._breaker.succeed(ticket)
            case Failed(status, answer):
                why = self._note_error(f"the upstream answers {status} {answer}".rstrip())
                self._breaker.falter(ticket, now_s, why)
            case Unavailable(why=why, retry_after_s=retry_after_s, ambiguous=ambiguous):
                self._note_error(why)
                self._ambiguous += ambiguous
                self._breaker.fail(ticket, now_s, why, retry_after_s=retry_after_s)
            case Misconfigured(why) if proven:
                # Others passed since it was first answered so: a firewall dislikes this one.
                self._note_error(why)
                self._breaker.cancel(ticket, now_s)
            case Misconfigured(why):
                self._note_error(why)
                self._breaker.hold(ticket, now_s, why)
            case _:
                assert_never(outcome)
        self._log_change(before)

    def _note_error(self, text: str) -> str:
        self._last_error, self._last_error_ms = text, self._clock.wall_ms()
        return text

    def _log_change(self, before: FlowState) -> None:
        state, reason = self._state()
        if state == before:
            return
        match state:
            case "held":
                log.error("forwarder.held", reason=reason)
            case "backing_off":
                log.warning("forwarder.backed_off", reason=reason)
            case _:
                log.info("forwarder.recovered", after=before)


@asynccontextmanager
async def forwarding(forwarder: Forwarder) -> AsyncIterator[Forwarder]:
    """Forward while the block runs; on leaving, let what is in flight end, up to `STOP_S`."""
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(forwarder.run())
        try:
            yield forwarder
        finally:
            forwarder.stop()
            _, late = await asyncio.wait([running], timeout=STOP_S)
            for task in late:
                task.cancel()
