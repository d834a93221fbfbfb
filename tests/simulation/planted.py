"""Bugs for the simulation to find: put into the agent from outside, while a test looks for them.

Each breaks what the seeds must hold in one way that a review could overlook.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from agent.forward import disposition, upstream
from agent.forward.backoff import Backoff
from agent.forward.breaker import Breaker, Closed, HalfOpen, Ticket
from agent.forward.budget import Meter, Window
from agent.forward.census import Census
from agent.forward.claims import Claim, part
from agent.forward.concurrency import Limit
from agent.forward.disposition import (
    Delivered,
    GiveUp,
    Outcome,
    Rejected,
    Response,
    Unavailable,
    Verdict,
)
from agent.forward.forwarder import Forwarder
from agent.forward.lanes import Lanes, _Lane
from agent.forward.supply import Supply
from agent.forward.tally import Tally
from agent.outbox import ids, reader
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Bury, Head, Settlement
from agent.outbox.store import Store

Bug = Callable[[pytest.MonkeyPatch], None]

# --- order ---


def lane_of_each_event(patch: pytest.MonkeyPatch) -> None:
    """Send an event while an earlier one of its user is on its way."""
    patch.setattr(Lanes, "_key", lambda _, head: head.seq)


def failed_goes_last(patch: pytest.MonkeyPatch) -> None:
    """Let an event that must be sent again go behind the next of its user."""
    again = Lanes.again

    def again_last(self: Lanes, claim: Claim, *, until_s: float | None) -> None:
        lane = self._lanes[self._key(claim.heads[0])]
        if len(claim.heads) == 1 and lane.queue:
            claim, lane.queue[0] = Claim.of([lane.queue[0]]), claim.heads[0]
        again(self, claim, until_s=until_s)

    patch.setattr(Lanes, "again", again_last)


def reads_on_too_far(patch: pytest.MonkeyPatch) -> None:
    """Forget what waited behind an event that was put off."""
    drop_queue = Lanes._drop_queue

    def drop_and_skip(self: Lanes, lane: _Lane, last_seq: int) -> None:
        drop_queue(self, lane, lane.queue[-1].seq)

    patch.setattr(Lanes, "_drop_queue", drop_and_skip)


def split_loses_order(patch: pytest.MonkeyPatch) -> None:
    """Let what waits behind the first part of a split batch go in another order."""

    def part_badly(
        claim: Claim, lane_of: Callable[[Head], int], *, at: int | None
    ) -> tuple[list[Claim], list[Head]]:
        parts, behind = part(claim, lane_of, at=at)
        return parts, behind[::-1]

    patch.setattr("agent.forward.lanes.part", part_badly)


def split_by_events(patch: pytest.MonkeyPatch) -> None:
    """Halve a refused batch without a look at whose events they are."""

    def halve(
        claim: Claim, lane_of: Callable[[Head], int], *, at: int | None
    ) -> tuple[list[Claim], list[Head]]:
        middle = len(claim.heads) // 2
        return [Claim.of(list(claim.heads[:middle])), Claim.of(list(claim.heads[middle:]))], []

    patch.setattr("agent.forward.lanes.part", halve)


def overtakes_unread(patch: pytest.MonkeyPatch) -> None:
    """Take in a fresh event though its user may have others that were not read yet."""
    patch.setattr(Census, "holds", lambda *_: False)


def reads_settled(patch: pytest.MonkeyPatch) -> None:
    """Take in once more what was settled while it was read."""

    def settled(self: Supply, seqs: list[int]) -> None:
        self.lanes.settled(seqs)

    patch.setattr(Supply, "settled", settled)


def behind_urgent(patch: pytest.MonkeyPatch) -> None:
    """Send what stands behind an urgent event together with it."""
    mark_urgent = Lanes._mark_urgent
    patch.setattr(
        Lanes, "_mark_urgent", lambda self, lane, seq: mark_urgent(self, lane, seq + 1000)
    )


# --- conservation ---


def ack_dropped(patch: pytest.MonkeyPatch) -> None:
    """Lose one of several acks in a transaction."""
    settle = Store.settle

    def settle_most(self: Store, settlements: Iterable[Settlement], **how: Any) -> None:
        kept = list(settlements)
        if sum(isinstance(each, Ack) for each in kept) > 1:
            kept.remove(next(each for each in kept if isinstance(each, Ack)))
        settle(self, kept, **how)

    patch.setattr(Store, "settle", settle_most)


def ids_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Forget the newest ids in a crash: an app's retry is stored a second time."""
    patch.setattr(ids, "_UNINDEXED", f"{ids._UNINDEXED} AND FALSE")


def buried_for_a_key(patch: pytest.MonkeyPatch) -> None:
    """Take a revoked key for the event's own fault."""
    patch.setattr(disposition, "_EVENT_AT_FAULT", frozenset({400, 401, 415, 422}))


def portal_believed(patch: pytest.MonkeyPatch) -> None:
    """Take every 2xx for the upstream's."""

    def believe(response: Response, answer: str) -> Outcome:
        return Delivered()

    patch.setattr(disposition, "_classify_success", believe)


def given_up_at_once(patch: pytest.MonkeyPatch) -> None:
    """Give an event up after so many attempts, however short the time."""
    verdict_on_one = disposition._verdict_on_one

    def impatient(*args: Any, give_up: GiveUp) -> Settlement | None:
        at_once = replace(give_up, after_s=0.0, unproven_after_s=0.0)
        return verdict_on_one(*args, give_up=at_once)

    patch.setattr(disposition, "_verdict_on_one", impatient)


def batch_buried(patch: pytest.MonkeyPatch) -> None:
    """Bury all that were in a batch which is refused."""
    original = disposition.verdict

    def bury(claim: Claim, outcome: Outcome, *args: Any, **how: Any) -> Verdict:
        if isinstance(outcome, Rejected) and len(claim.heads) > 1:
            return tuple(
                Bury(seq=head.seq, reason="rejected", status=outcome.status, answer=outcome.answer)
                for head in claim.heads
            )
        return original(claim, outcome, *args, **how)

    patch.setattr("agent.forward.forwarder.verdict", bury)


def withdrawal_unseen(patch: pytest.MonkeyPatch) -> None:
    """Send what expired or was evicted since it was read."""
    never = property(lambda _: 0, lambda _, __: None)
    patch.setattr(Store, "withdrawn", never, raising=False)


# --- bytes and duplicates ---


def body_encoded_anew(patch: pytest.MonkeyPatch) -> None:
    """Send the same JSON in other bytes once an event has failed."""
    heads = Reader._heads

    def heads_anew(self: Reader, rows: list[Any], upstream: str) -> list[Head]:
        return [
            msgspec.structs.replace(head, body=json.dumps(json.loads(head.body)).encode())
            if head.body and head.attempts
            else head
            for head in heads(self, rows, upstream)
        ]

    patch.setattr(reader.Reader, "_heads", heads_anew)


def doubt_untold(patch: pytest.MonkeyPatch) -> None:
    """Repeat a request whose answer was lost, and say nothing of it."""
    outcome_of = upstream._outcome_of

    def sure(exc: Exception) -> Outcome:
        outcome = outcome_of(exc)
        return replace(outcome, ambiguous=False) if isinstance(outcome, Unavailable) else outcome

    patch.setattr(upstream, "_outcome_of", sure)


def sending_untold(patch: pytest.MonkeyPatch) -> None:
    """Keep from the tally what is sent once more in the same life."""
    sending = Tally.sending

    def sending_first(self: Tally, seqs: Iterable[int]) -> int:
        return sending(self, [seq for seq in seqs if seq not in self._slots])

    patch.setattr(Tally, "sending", sending_first)


def doubt_not_kept(patch: pytest.MonkeyPatch) -> None:
    """Forget at the start what was under way when the agent was killed."""
    begin = Tally.__init__

    def begin_anew(self: Tally, *args: Any) -> None:
        begin(self, *args)
        self.clear(self.doubtful)

    patch.setattr(Tally, "__init__", begin_anew)


def company_changed(patch: pytest.MonkeyPatch) -> None:
    """Send a batch that broke off in other company."""
    again = Lanes.again

    def again_apart(self: Lanes, claim: Claim, *, until_s: float | None) -> None:
        if len(claim.heads) > 1 and len({head.lane for head in claim.heads}) > 1:
            self.split(claim, at=None)
            return
        again(self, claim, until_s=until_s)

    patch.setattr(Lanes, "again", again_apart)


def doubt_uncounted(patch: pytest.MonkeyPatch) -> None:
    """Know of no ambiguous outcome when asked."""
    flow = Forwarder.flow
    patch.setattr(Forwarder, "flow", lambda self: replace(flow(self), ambiguous=0))


# --- time ---


def retry_after_ignored(patch: pytest.MonkeyPatch) -> None:
    """Wait after a 429 as after any failure."""
    patch.setattr(disposition, "retry_after_s", lambda *_, **__: None)


def no_cap(patch: pytest.MonkeyPatch) -> None:
    """Double the wait for ever."""

    def wait_s(self: Backoff, n: int, rng: random.Random) -> float:
        return rng.uniform(0.0, self.base_s * 2 ** min(n - 1, 62))

    patch.setattr(Backoff, "wait_s", wait_s)


def late_answers_count(patch: pytest.MonkeyPatch) -> None:
    """Let the late answer to a request of before close the breaker."""
    succeed = Breaker.succeed

    def succeed_late(self: Breaker, ticket: Ticket, now_s: float, *, delivered: int) -> None:
        if ticket.epoch == self._epoch:
            succeed(self, ticket, now_s, delivered=delivered)
        else:
            self._enter(Closed())

    patch.setattr(Breaker, "succeed", succeed_late)


def own_wait_ignored(patch: pytest.MonkeyPatch) -> None:
    """Try an event that fails again as soon as the others let it."""
    again = Lanes.again

    def again_at_once(self: Lanes, claim: Claim, *, until_s: float | None) -> None:
        again(self, claim, until_s=None)

    patch.setattr(Lanes, "again", again_at_once)


def never_closes(patch: pytest.MonkeyPatch) -> None:
    """Stay half open although the probe was delivered."""
    succeed = Breaker.succeed

    def succeed_unless_probe(self: Breaker, *args: Any, **how: Any) -> None:
        if not isinstance(self.state, HalfOpen):
            succeed(self, *args, **how)

    patch.setattr(Breaker, "succeed", succeed_unless_probe)


def probes_many(patch: pytest.MonkeyPatch) -> None:
    """Send others beside the probe."""
    admit = Breaker.admit

    def admit_more(self: Breaker, now_s: float, *, in_flight: int) -> Ticket | None:
        if isinstance(self.state, HalfOpen) and in_flight < 2:
            return self._ticket(now_s)
        return admit(self, now_s, in_flight=in_flight)

    patch.setattr(Breaker, "admit", admit_more)


def ceiling_ignored(patch: pytest.MonkeyPatch) -> None:
    """Have as many requests under way as there are events."""
    admit = Breaker.admit

    def admit_all(self: Breaker, now_s: float, *, in_flight: int) -> Ticket | None:
        return admit(self, now_s, in_flight=0)

    patch.setattr(Breaker, "admit", admit_all)


def starts_at_the_ceiling(patch: pytest.MonkeyPatch) -> None:
    """Have as many under way after a recovery as before it."""

    def restart(self: Limit, now_s: float, *, took_s: float, events: int) -> None:
        self.rests_until_s = None

    patch.setattr(Limit, "restart", restart)


def too_much_ignored(patch: pytest.MonkeyPatch) -> None:
    """Go on as before when the upstream says it has too much."""
    patch.setattr(Limit, "refused", lambda *_, **__: 0.0)


def window_ignored(patch: pytest.MonkeyPatch) -> None:
    """Send at any time of day."""
    patch.setattr(Window, "holds", lambda *_: True)


def rate_ignored(patch: pytest.MonkeyPatch) -> None:
    """Pay for nothing."""
    patch.setattr(Meter, "spend", lambda *_, **__: None)


def pause_ignored(patch: pytest.MonkeyPatch) -> None:
    """Go on while paused."""
    patch.setattr(Forwarder, "pause", lambda _: None)


def wake_up_lost(patch: pytest.MonkeyPatch) -> None:
    """Resume, and tell nobody."""

    def resume(self: Forwarder) -> None:
        self._paused = False

    patch.setattr(Forwarder, "resume", resume)


def polls(patch: pytest.MonkeyPatch) -> None:
    """Look every few milliseconds whether something may be sent."""

    async def wait(self: Forwarder, now_s: float) -> None:
        await asyncio.sleep(0.005)

    patch.setattr(Forwarder, "_wait", wait)


def spins_while_open(patch: pytest.MonkeyPatch) -> None:
    """Wait for an open breaker by looking again and again."""
    due_at_s = Forwarder._due_at_s

    async def wait(self: Forwarder, now_s: float) -> None:
        if due_at_s(self, now_s) is not None and self._breaker.opens_at_s() is not None:
            await asyncio.sleep(0)
        else:
            await wait_well(self, now_s)

    wait_well = Forwarder._wait
    patch.setattr(Forwarder, "_wait", wait)


BUGS: dict[str, Bug] = {
    bug.__name__: bug
    for bug in (
        lane_of_each_event,
        failed_goes_last,
        reads_on_too_far,
        split_loses_order,
        split_by_events,
        overtakes_unread,
        reads_settled,
        behind_urgent,
        ack_dropped,
        ids_forgotten,
        buried_for_a_key,
        portal_believed,
        given_up_at_once,
        batch_buried,
        body_encoded_anew,
        withdrawal_unseen,
        doubt_untold,
        sending_untold,
        doubt_not_kept,
        doubt_uncounted,
        company_changed,
        retry_after_ignored,
        no_cap,
        late_answers_count,
        own_wait_ignored,
        never_closes,
        probes_many,
        ceiling_ignored,
        starts_at_the_ceiling,
        too_much_ignored,
        window_ignored,
        rate_ignored,
        pause_ignored,
        wake_up_lost,
        polls,
        spins_while_open,
    )
}


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Have *bug* in the agent while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        BUGS[bug](patch)
        yield
