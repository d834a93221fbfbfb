"""The shell around the decisions: reads the outbox, sends, and records what became of each event.

The dispatcher reads on in the outbox and starts a runner for what lanes, breaker and budget let go;
a runner sends one claim after another as long as they let the next one go, so that while all is
well the dispatcher need not wake. Nothing waits on a timer while there is nothing to send.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import assert_never

import structlog

from agent.clock import Clock
from agent.errors import OutboxError
from agent.flow import Flow, FlowState, Wait
from agent.forward import breaker, gate
from agent.forward.batch import MAX_BATCH_BYTES, envelope
from agent.forward.breaker import Breaker, Closed, Ticket
from agent.forward.budget import KeptBack
from agent.forward.claims import Claim
from agent.forward.disposition import (
    TOO_LARGE,
    Delivered,
    Failed,
    Misconfigured,
    Outcome,
    Rejected,
    Split,
    Unavailable,
    error_of,
    is_blamed,
    may_be_stored,
    verdict,
)
from agent.forward.lanes import ITEM_BYTES
from agent.forward.plan import Plan
from agent.forward.recording import Conclusion, Recording
from agent.forward.spending import Spending
from agent.forward.supply import Supply
from agent.forward.tally import Tally
from agent.forward.trials import Trials
from agent.forward.upstream import Endpoint, Upstream
from agent.forward.waits import wait_of
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Bury, Head, Retry, Settlement
from agent.outbox.writer import Writer

STOP_S = 4.0
"""How long attempts in flight may take once the agent stops; the rest is sent after the next start."""

_READ_AGAIN_S = 1.0
"""How long an outbox that cannot be read is left alone."""

log = structlog.get_logger()


class Forwarder:
    """Drains the outbox. Made by `forwarding`."""

    def __init__(
        self,
        *,
        writer: Writer,
        reader: Reader,
        upstream: Upstream | None,
        plan: Plan,
        tally: Tally,
        clock: Clock,
        rng: random.Random,
        unconfigured: str = "",
        paused: bool = False,
        name: str = "",
    ) -> None:
        """*upstream* None means that none is configured; *unconfigured* then says what is missing.

        *name* is the upstream's, empty for the default one: it sends what is stored under it.
        """
        self._name = name
        self._log = log.bind(upstream=name) if name else log
        self._writer = writer
        self._reader = reader
        self._upstream = upstream
        self._plan = plan
        self._tally = tally
        self._clock = clock
        self._rng = rng
        self._unconfigured = unconfigured
        self._paused = paused
        self._supply = Supply(reader, writer, clock, name=name, ordered=plan.ordered)
        self._breaker = Breaker(
            plan.backoff, ceiling=plan.concurrency, hold_probe_s=plan.hold_probe_s, rng=rng
        )
        self._spending = Spending(plan.budget, clock, tally)
        self._wake = asyncio.Event()
        self._stopping = False
        self._in_flight = 0
        self._recording = Recording(writer, self._recorded)
        self._trials = Trials()
        self._sent: dict[int, Claim] = {}
        """Claims under way, or whose delivery is not recorded yet."""
        self._fit = plan.fit
        self._recollected = False
        self._kept_back: KeptBack | None = None
        """What the budget waits for."""
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
        self._supply.lanes.unpark()
        self._wake.set()

    def adopt(self, upstream: Upstream | None, plan: Plan, unconfigured: str = "") -> None:
        """Send to *upstream* and by *plan*, beginning now; what is in flight ends as it began."""
        self._upstream, self._unconfigured = upstream, unconfigured
        if _claims_by(plan) != _claims_by(self._plan):
            self._supply.stale = True  # other lanes, once nothing of these is under way
        if plan.budget != self._plan.budget:
            self._spending = Spending(plan.budget, self._clock, self._tally)
        self._plan = plan
        self._fit = plan.fit
        self._breaker.adopt(
            plan.backoff,
            ceiling=plan.concurrency,
            hold_probe_s=plan.hold_probe_s,
            now_s=self._clock.monotonic_s(),
        )
        self._supply.lanes.unpark()
        self._wake.set()

    def link_changed(self) -> None:
        """The machine's network changed: try once before a backoff is over."""
        if self._breaker.probe_early(self._clock.monotonic_s()):
            self._supply.lanes.unpark()  # each that failed with the link waits for itself, too
            self._wake.set()

    def flow(self) -> Flow:
        """Return how forwarding stands."""
        now_s = self._clock.monotonic_s()
        self._kept_back = self._spending.kept_back(now_s)
        state, reason = self._state()
        until_s = gate.until_s(
            state, kept_back=self._kept_back, opens_at_s=self._breaker.opens_at_s(), now_s=now_s
        )
        if state == "flowing" and until_s is not None:
            reason = gate.RESTING
        return Flow(
            state=state,
            reason=reason,
            next_attempt_in_s=None if until_s is None else max(0.0, until_s - now_s),
            last_error=self._last_error,
            last_error_ms=self._last_error_ms,
            in_flight=self._in_flight,
            limit=self._breaker.limit,
            parked_users=self._supply.lanes.parked,
            ambiguous=self._tally.resent,
        )

    def wait_of(self, seq: int, lane: int) -> Wait:
        """Return what keeps a pending event from being delivered now."""
        place = self._supply.lanes.place(seq, lane)
        sent = next((claim for claim in self._sent.values() if claim.holds(seq)), None)
        claim = sent or place.claim
        return wait_of(
            self.flow(),
            place,
            sent=sent is not None,
            last_error=None if claim is None else self._trials.last_error(claim),
            now_s=self._clock.monotonic_s(),
        )

    def _state(self, link: breaker.State | None = None) -> tuple[FlowState, str]:
        """Return how forwarding stands, and why; *link* is the breaker's state, None: that of now."""
        return gate.state_of(
            unconfigured=self._unconfigured if self._upstream is None else None,
            paused=self._paused,
            rescuing=self._writer.rescuing,
            link=link or self._breaker.state,
            kept_back=self._kept_back,
            parked_users=self._supply.lanes.parked,
        )

    # --- the dispatcher ---

    async def run(self) -> None:
        """Forward until stopped. Its owner is `forwarding`."""
        try:
            async with asyncio.TaskGroup() as attempts:
                follower = attempts.create_task(self._follow_appends())
                await self._dispatch(attempts)
                follower.cancel()
        finally:  # the next start would send again what is still gathered
            self._recording.hand_over()

    async def _dispatch(self, attempts: asyncio.TaskGroup) -> None:
        while not self._stopping:
            self._wake.clear()
            if self._upstream is not None:
                await self._fill()
            now_s = self._clock.monotonic_s()
            while (taken := self._take(now_s)) is not None:
                self._in_flight += 1
                attempts.create_task(self._run_attempts(taken))
            await self._wait(now_s)

    def stop(self) -> None:
        """Start nothing more; `run` ends when what is in flight is settled."""
        self._stopping = True
        self._wake.set()

    async def _follow_appends(self) -> None:
        appended = self._writer.appended.of(self._name)
        while True:
            await appended.wait()
            appended.clear()
            self._supply.arrived()
            self._wake.set()

    async def _fill(self) -> None:
        """Read on where the lanes have room; an outbox that fails is left for a while."""
        try:
            if self._writer.rescuing:  # what comes back is older than what was accepted since
                self._supply.stale = True
                return
            if not self._recollected:
                await self._recollect()
                self._recollected = True
            if self._supply.stale:
                if self._in_flight or self._recording.unsettled:
                    return  # they belong to what was read before
                self._supply.renew(ordered=self._plan.ordered)
                self._trials.clear()
            if await self._supply.read_on(urgent=self._plan.urgent, flows=self._flows):
                self._wake.set()  # for more, after what came is on its way
        except OutboxError as exc:
            log.error("outbox.read_failed", error=str(exc))
            self._supply.arrived()
            await asyncio.sleep(_READ_AGAIN_S)

    @property
    def _flows(self) -> bool:
        return isinstance(self._breaker.state, Closed) and not self._paused

    async def _recollect(self) -> None:
        """Forget the doubts about what is delivered by now: it was recorded, and then came the end."""
        doubtful = self._tally.doubtful
        pending = await self._reader.still_pending(doubtful)
        self._tally.clear([seq for seq in doubtful if seq not in pending])

    def _take(self, now_s: float) -> tuple[Claim, Ticket] | None:
        if self._upstream is None or self._stopping or self._writer.rescuing:
            return None
        if self._supply.stale:
            return None
        if gate.is_crowded(
            in_flight=self._in_flight,
            unsettled=self._recording.unsettled,
            batch=self._plan.batch,
            pressed=self._writer.pressed,
        ):
            return None  # the next commit changes that
        due_at_s = self._due_at_s(now_s)
        if due_at_s is None or due_at_s > now_s:
            return None
        ticket = self._breaker.admit(now_s, in_flight=self._in_flight)
        if ticket is None:
            return None
        urgent = self._kept_back is not None
        claim = self._supply.lanes.take(now_s, fit=self._fit, urgent=urgent)
        if claim is None:
            self._breaker.cancel(ticket, now_s)
            return None
        if urgent and not self._trials.holds(claim):
            # Made while all might go, and not sent since: only a claim that failed goes whole.
            claim = self._supply.lanes.only_urgent(claim)
        return claim, ticket

    def _due_at_s(self, now_s: float) -> float | None:
        """Return from when an event may go; None: only a change can bring that."""
        self._kept_back = self._spending.kept_back(now_s)
        return gate.due_at_s(
            self._supply.lanes,
            paused=self._paused,
            kept_back=self._kept_back,
            opens_at_s=self._breaker.opens_at_s(),
        )

    async def _wait(self, now_s: float) -> None:
        """Wait for a change, or for the instant from which an event may go.

        An instant not behind *now_s* is no reason: what then kept `_take` from it ends with a change.
        """
        due_at_s = self._due_at_s(now_s)
        instants = [due_at_s] if due_at_s is not None else []
        if (ahead_at_s := self._supply.looks_ahead_at_s(flows=self._flows)) is not None:
            instants.append(ahead_at_s)
        due_at_s = min((at_s for at_s in instants if at_s > now_s), default=None)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if due_at_s is None else due_at_s - now_s):
                await self._wake.wait()

    # --- an attempt ---

    async def _run_attempts(self, taken: tuple[Claim, Ticket] | None) -> None:
        """Send *taken*, and what may go after it: while all is well no other task need wake."""
        try:
            while taken is not None:
                await self._attempt(*taken)
                # Not counted while it asks for the next one: the ceiling is for the others.
                self._in_flight -= 1
                taken = self._take(self._clock.monotonic_s())
                self._in_flight += 1
                if self._supply.hungry or self._in_flight < self._plan.concurrency:
                    self._wake.set()  # for others beside it
        finally:
            self._in_flight -= 1
            self._wake.set()

    async def _attempt(self, claim: Claim, ticket: Ticket) -> None:
        read = await self._read(claim, ticket)
        if read is None:
            return
        claim, bodies = read
        endpoint, body = self._request(claim, bodies)
        self._sent[claim.key] = claim
        self._tally.sending(bodies)
        # Before it is sent: others ask meanwhile.
        self._spending.pay(self._clock.monotonic_s(), events=len(bodies), body_bytes=len(body))
        outcome = await self._send(endpoint, body)
        if isinstance(outcome, Rejected) and outcome.status == TOO_LARGE and len(bodies) > 1:
            self._fit = self._fit.below(len(body))
        self._conclude(claim, ticket, outcome)

    async def _read(self, claim: Claim, ticket: Ticket) -> tuple[Claim, dict[int, bytes]] | None:
        """Return what is still to be sent of *claim*, and its bodies by seq; None: nothing now."""
        try:
            bodies = await self._supply.bodies(claim)
        except OutboxError as exc:
            log.error("outbox.read_failed", error=str(exc))
            now_s = self._clock.monotonic_s()
            self._breaker.cancel(ticket, now_s)
            self._supply.lanes.again(claim, until_s=now_s + _READ_AGAIN_S)
            return None
        gone = [head for head in claim.heads if head.seq not in bodies]
        if gone:  # evicted or expired since it was read
            claim = self._without(claim, gone)
        if not claim.heads:
            self._breaker.cancel(ticket, self._clock.monotonic_s())
            self._trials.over(claim)
            return None
        too_late = not self._breaker.stands(ticket) or self._paused or self._stopping
        if too_late or (gone and self._is_urgent_no_more(claim)):
            self._breaker.cancel(ticket, self._clock.monotonic_s())
            self._supply.lanes.again(claim, until_s=None)  # something changed while it was read
            return None
        return claim, bodies

    def _without(self, claim: Claim, gone: list[Head]) -> Claim:
        """Return *claim* without what is *gone* from the outbox, whose lanes move on."""
        self._tally.clear(head.seq for head in gone)
        self._supply.lanes.done(gone)
        return claim.without(gone)

    def _is_urgent_no_more(self, claim: Claim) -> bool:
        """Return whether *claim* was let go for an urgent event that is gone."""
        return self._kept_back is not None and not self._supply.lanes.is_urgent(claim)

    async def _send(self, endpoint: Endpoint, body: bytes) -> Outcome:
        if self._upstream is None:  # taken away meanwhile
            return Unavailable(why=self._unconfigured)
        return await self._upstream.send(endpoint, body)

    def _request(self, claim: Claim, bodies: Mapping[int, bytes]) -> tuple[Endpoint, bytes]:
        """Return where to send what. A single event too large for the envelope goes without one."""
        first = claim.heads[0]
        alone = bodies[first.seq]
        single = self._plan.batch == 1 or len(alone) + ITEM_BYTES > MAX_BATCH_BYTES
        if len(claim.heads) == 1 and single:
            return first.kind, alone
        return "batch", envelope((head.kind, bodies[head.seq]) for head in claim.heads)

    # --- what comes of it ---

    def _conclude(self, claim: Claim, ticket: Ticket, outcome: Outcome) -> None:
        """Carry out what the decisions make of *outcome*: for the events, their lanes and the link."""
        now_s, now_ms = self._clock.monotonic_s(), self._clock.wall_ms()
        record = self._trials.record(claim, outcome, now_s)
        decided = verdict(claim, outcome, record, give_up=self._plan.give_up)
        if not isinstance(outcome, Delivered):
            self._last_error, self._last_error_ms = error_of(outcome), now_ms
            if not may_be_stored(claim, outcome):
                self._tally.clear(head.seq for head in claim.heads)
        self._tell_breaker(claim, ticket, outcome, now_s, proven=record.proven)
        if isinstance(decided, tuple):
            self._record(claim, decided)
        blamed = is_blamed(outcome, record, probe=ticket.probe)
        match decided:
            case Split(at):
                del self._sent[claim.key]
                self._fit = self._fit.narrowed(len(claim.heads))
                self._trials.struck(claim, outcome, now_s, blamed=blamed)
                self._trials.part(claim, self._supply.lanes.split(claim, at=at))
            case (Ack() | Bury(), *_):
                if isinstance(outcome, Delivered):
                    self._fit = self._fit.widened(self._plan.batch)
                    self._trials.delivered()
                self._trials.over(claim)
                self._supply.lanes.done(claim.heads)
            case (Retry(), *_):
                self._put_off(claim.tried(now_ms), outcome, now_s, blamed=blamed)
            case _:
                self._put_off(claim, outcome, now_s, blamed=blamed)

    def _record(self, claim: Claim, changes: tuple[Settlement, ...]) -> None:
        self._recording.add(claim, changes)
        if gate.is_to_record(
            in_flight=self._in_flight,
            gathered=self._recording.gathered,
            failed=not all(isinstance(change, Ack) for change in changes),
            pressed=self._writer.pressed,
        ):
            self._recording.hand_over()

    def _recorded(self, settled: list[Conclusion]) -> None:
        """Go on by what is recorded; nothing is, where the writer gave up."""
        self._wake.set()
        final = []
        for claim, changes in settled:
            seqs = [change.seq for change in changes if not isinstance(change, Retry)]
            if seqs:
                del self._sent[claim.key]
                final += seqs
            self._tell_of_buried(claim, changes)
        self._tally.settled(final)
        self._supply.settled(final)

    def _tell_of_buried(self, claim: Claim, changes: tuple[Settlement, ...]) -> None:
        for head, change in zip(claim.heads, changes, strict=True):
            if isinstance(change, Bury):
                # Without the answer, which may quote what the app sent: `show` has it.
                self._log.error(
                    "event.dead_lettered",
                    message_id=head.message_id,
                    reason=change.reason,
                    status=change.status,
                )

    def _put_off(self, claim: Claim, outcome: Outcome, now_s: float, *, blamed: bool) -> None:
        """Let other lanes go first; a claim whose own failure this may be waits longer each time."""
        del self._sent[claim.key]
        strikes = self._trials.struck(claim, outcome, now_s, blamed=blamed)
        wait_s = self._plan.backoff.wait_s(strikes, self._rng) if blamed else None
        self._supply.lanes.again(claim, until_s=None if wait_s is None else now_s + wait_s)

    def _tell_breaker(
        self, claim: Claim, ticket: Ticket, outcome: Outcome, now_s: float, *, proven: bool
    ) -> None:
        link = self._breaker.state
        why = error_of(outcome)
        match outcome:
            case Delivered():
                self._breaker.succeed(ticket, now_s, delivered=len(claim.heads))
            case Rejected():
                self._breaker.succeed(ticket, now_s, delivered=0)
            case Failed():
                self._breaker.falter(ticket, now_s, why)
            case Unavailable(retry_after_s=None, too_much=True):
                self._breaker.push_back(ticket, now_s, why)
            case Unavailable(retry_after_s=retry_after_s):
                self._breaker.fail(ticket, now_s, why, retry_after_s=retry_after_s)
            case Misconfigured() if proven:
                # Others passed since it was first answered so: a firewall dislikes this one.
                self._breaker.cancel(ticket, now_s)
            case Misconfigured():
                self._breaker.hold(ticket, now_s, why)
            case _:
                assert_never(outcome)
        if self._breaker.state is not link:
            self._log_change(link)

    def _log_change(self, link: breaker.State) -> None:
        before, _ = self._state(link)
        state, reason = self._state()
        if state == before:
            return
        match state:
            case "held":
                self._log.error("forwarder.held", reason=reason)
            case "backing_off":
                self._log.warning("forwarder.backed_off", reason=reason)
            case _:
                self._log.info("forwarder.recovered", after=before)


def _claims_by(plan: Plan) -> tuple[object, ...]:
    return plan.ordered, plan.urgent, plan.batch > 1


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
