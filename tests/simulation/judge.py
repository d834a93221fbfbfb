"""What must hold in every world, and who sees that it does.

The judge hears of everything at the moment it happens: what the agent sends, what it is answered,
what it decides, what is committed, what the upstream stores. It keeps a model of its own and believes
nothing that the agent says of itself, but for `flow()`, which people believe, too.

The first complaint ends the run. Instants are true seconds, but for those of the machine's monotonic
clock, by which the agent waits.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from simulation.books import Books
from simulation.limits import READING_S, Spending, Throttle
from simulation.pace import Pace
from simulation.scenario import Choices
from simulation.together import torn
from simulation.tracked import Attempt, Tracked, carried
from simulation.virtual_time import World

from agent.flow import Flow
from agent.forward.backoff import Backoff
from agent.forward.disposition import (
    RETRY_AFTER_MAX_S,
    Delivered,
    Failed,
    Outcome,
    Rejected,
    Unavailable,
)
from agent.forward.forwarder import Forwarder
from agent.outbox.records import Ack, Bury, Settlement

REST_S = 15.0
"""How long the agent rests at most when it is told of too much, and not for how long."""

ROUNDING_S = 1e-6
"""What floating point may make of an instant."""


class ObservedBackoff(Backoff):
    """The real one, which remembers the waits it gave."""

    __slots__ = ("judge",)
    judge: Judge

    def wait_s(self, n: int, rng: object) -> float:
        wait_s = super().wait_s(n, rng)  # type: ignore[arg-type]
        self.judge.drew(wait_s)
        return wait_s


class Judge:
    """See the module."""

    def __init__(
        self,
        world: World,
        choices: Choices,
        on_complaint: Callable[[], None],
        on_action: Callable[[], None],
    ) -> None:
        self.complaint: str | None = None
        self.lives = 0
        self.books = Books(world, choices, self.complain)
        self.attempts = 0
        self.quiet = False
        """Whether everything is done, so that nothing may stir."""
        self.stored_twice = 0
        """How often the upstream stored what it had already."""
        self._world = world
        self._choices = choices
        self._on_complaint = on_complaint
        self._on_action = on_action
        self._pace = Pace(world)
        self._last_delivery_s = -1.0
        self._forwarder: Forwarder | None = None
        self._resent = 0
        """How many repeats the agent told of last."""
        self._doubtful = 0
        """How many events were sent again that could not be known not to have arrived."""
        # Of the current life:
        self._throttle = Throttle(choices)
        self._spending = Spending(world, choices)
        self._in_flight: set[Tracked] = set()
        self._probe: Attempt | None = None
        self._blocked = False
        self._opens_s = 0.0
        self._told_s = 0.0
        """Until when nothing would pass, as the upstream said; and as the agent understood it."""
        self._heard_s = 0.0
        self._paused = False
        self._leaving = False
        self._look_at_flow = False
        self._drawn: list[float] = []
        self._just_failed: Tracked | None = None

    @property
    def waits_s(self) -> float:
        """How much longer the agent waits for what it was told."""
        return max(0.0, self._heard_s - self._world.monotonic_s())

    def complain(self, text: str) -> None:
        """Say what does not hold; the first time counts."""
        if self.complaint is None:
            self.complaint = text
            self._world.note("COMPLAINT: %s", text)
            self._on_complaint()

    # --- a life of the agent ---

    def born(self, forwarder: Forwarder, *, paused: bool) -> None:
        self._forwarder = forwarder
        self._throttle = Throttle(self._choices)
        self._spending = Spending(self._world, self._choices)
        self._in_flight.clear()
        self._probe, self._blocked, self._opens_s = None, False, 0.0
        self._told_s = self._heard_s = 0.0
        self._paused, self._leaving = paused, False
        self._just_failed = None
        for tracked in self.books.tracked.values():
            tracked.not_before_s = 0.0  # waits are kept in memory alone
        self._check_doubt(forwarder.flow())

    def died(self) -> None:
        """The agent is gone."""
        self._forwarder = None
        self.lives += 1
        # It may have been killed between noting a request and sending it.
        self._doubtful += self._choices.batch

    def _check_doubt(self, flow: Flow) -> None:
        """See that the agent tells of the repeats, neither fewer nor more, over all its lives."""
        if flow.ambiguous < self._resent:
            self.complain(f"{self._resent} repeats were told of, and now {flow.ambiguous}")
        self._resent = flow.ambiguous
        if not self.stored_twice <= flow.ambiguous <= self._doubtful:
            self.complain(
                f"{flow.ambiguous} repeats are told of; {self.stored_twice} events were stored"
                f" twice, and {self._doubtful} sent again in doubt"
            )

    def turned(self) -> None:
        """The loop begins a turn: look at what it says of itself, and at how busy it is."""
        if hot := self._pace.turned():
            self.complain(hot)
        if self._look_at_flow:
            self._look_at_flow = False
            self._observe()

    def acted(self) -> None:
        """The agent is about to do something."""
        self._pace.acted()
        self._on_action()
        if self.quiet:
            self.complain("there is nothing to do, and the agent does something")

    def asked(
        self, *, paused: bool | None = None, flushed: bool = False, leaving: bool = False
    ) -> None:
        """A person asked for something."""
        if leaving:
            self._leaving = True
        if paused is not None:
            self._paused = paused
        if flushed:
            self._opens_s = self._told_s = 0.0
            for tracked in self.books.tracked.values():
                tracked.not_before_s = 0.0
        self._pace.acted()
        self._look_at_flow = True

    def drew(self, wait_s: float) -> None:
        """The agent drew a wait."""
        self._drawn.append(wait_s)
        if not 0.0 <= wait_s <= self._choices.cap_s:
            self.complain(f"a wait of {wait_s:.3f} s, beyond the cap of {self._choices.cap_s} s")

    def _observe(self) -> None:
        """See whether the breaker is open now, and until when."""
        if self._forwarder is None:
            return
        now_s = self._world.monotonic_s()
        if self._just_failed is not None and self._drawn:
            # Of the waits drawn for an answer, the event's own is the last.
            self._just_failed.not_before_s = now_s + self._drawn[-1]
        self._just_failed = None
        self._drawn.clear()
        flow = self._forwarder.flow()
        if flow.state == "paused":
            return
        if deaf := self._throttle.observed(flow):
            self.complain(deaf)
        blocked = flow.state in {"backing_off", "held"}
        if blocked != self._blocked:
            self._throttle.recovered()
        self._blocked = blocked
        if not blocked:
            self._probe, self._opens_s = None, 0.0
            return
        wait_s = flow.next_attempt_in_s
        if wait_s is None:
            return
        self._opens_s = now_s + wait_s
        limit_s = (
            self._choices.hold_probe_s + max(0.0, self._heard_s - now_s)
            if flow.state == "held"
            else self._choices.cap_s + max(0.0, self._heard_s - now_s)
        )
        if wait_s > limit_s + ROUNDING_S:
            self.complain(f"{flow.state} for {wait_s:.1f} s; {limit_s:.1f} s is the most")

    # --- an attempt ---

    def sent(self, endpoint: str, body: bytes) -> Attempt:
        """The agent begins a request."""
        world = self._world
        self.attempts += 1
        items = carried(endpoint, body)
        events = tuple(
            tracked for message_id, _ in items if (tracked := self.books.tracked.get(message_id))
        )
        batched = endpoint == "batch"
        attempt = Attempt(self.attempts, self.lives, world.now_s, events, batched)
        world.note("send %s: %s", attempt.number, " ".join(each.message_id for each in events))
        if len(events) != len(items):
            self.complain("an event is sent that nobody handed in")
        self._check_company(attempt)
        for tracked, (_, item) in zip(events, items, strict=False):
            self._check_event(tracked, item)
            self._doubtful += any(map(self._is_excused, tracked.attempts_since_queued()))
            tracked.attempts.append(attempt)
            self._in_flight.add(tracked)
        self._check_time(attempt)
        return attempt

    def _check_company(self, attempt: Attempt) -> None:
        if len(attempt.events) > self._choices.batch:
            self.complain(f"{len(attempt.events)} events in one request")
        probe = self._forwarder is not None and self._forwarder.flow().state != "flowing"
        for wrong in (
            torn(attempt),
            self._throttle.sent(attempt, probe=probe),
            self._spending.sent(attempt, self.books.by_user),
        ):
            if wrong:
                self.complain(wrong)

    def _check_event(self, tracked: Tracked, body: bytes) -> None:
        name = tracked.message_id
        now_s = self._world.monotonic_s()
        if body != tracked.body:
            self.complain(f"{name} is sent with other bytes than were accepted")
        if tracked.state == "delivered":
            self.complain(f"{name} is sent again though its delivery is recorded")
        elif tracked.state != "pending" and now_s > tracked.left_s + READING_S:
            self.complain(f"{name} is sent though it was withdrawn")
        if tracked in self._in_flight:
            self.complain(f"{name} is sent while it is on its way")
        if now_s < tracked.not_before_s - ROUNDING_S:
            self.complain(f"{name} is sent {tracked.not_before_s - now_s:.3f} s before its time")
        for earlier in tracked.attempts_since_queued():
            if earlier.life == self.lives and _settles(earlier):
                self.complain(f"{name} is sent again after {earlier.outcome}")
            if tracked in earlier.stored and not self._is_excused(earlier):
                self.complain(f"{name} is sent again after an outcome that was not ambiguous")

    def _is_excused(self, attempt: Attempt) -> bool:
        """Whether the agent could not know that an event of *attempt* was stored."""
        if attempt.life < self.lives:
            return True  # it died before its answer was recorded
        match attempt.outcome:
            case Unavailable(ambiguous=ambiguous):
                return ambiguous
            case Failed():
                return len(attempt.events) > 1
            case _:
                return False

    def _check_time(self, attempt: Attempt) -> None:
        if self._forwarder is None:
            self.complain("a request of an agent that is dead")
            return
        now_s = self._world.monotonic_s()
        if self._paused or self._leaving:
            self.complain("a request while paused" if self._paused else "a request while leaving")
        if now_s < self._told_s - ROUNDING_S:
            self.complain(f"a request {self._told_s - now_s:.3f} s before Retry-After has passed")
        if now_s < self._opens_s - ROUNDING_S:
            self.complain(f"a request {self._opens_s - now_s:.3f} s before the wait has passed")
        flow = self._forwarder.flow()
        self._check_doubt(flow)
        if flow.state in {"backing_off", "held"}:
            if flow.next_attempt_in_s:
                self.complain(f"a request while {flow.state}")
            if self._probe is not None:
                self.complain("a second probe beside the first")
            self._probe = attempt

    def answered(self, attempt: Attempt, outcome: Outcome) -> None:
        """The agent hears *outcome*."""
        attempt.outcome = outcome
        self._world.note("answer %s: %s", attempt.number, outcome)
        if self._forwarder is not None:
            self._throttle.answered(attempt, outcome, self._forwarder.flow().limit)
        self._in_flight.difference_update(attempt.events)
        self._look_at_flow = True
        self._drawn.clear()
        self._note_waits(attempt, outcome)
        if attempt is self._probe:
            self._probe = None
        if isinstance(outcome, Delivered):
            self._last_delivery_s = self._world.now_s
        if isinstance(outcome, Delivered | Rejected):
            self._pace.succeeded()
            return
        for tracked in attempt.events:
            tracked.failures.append((self._world.now_s, type(outcome)))
        if isinstance(outcome, Failed) and len(attempt.events) == 1:
            self._just_failed = attempt.events[0]
        if hammering := self._pace.failed():
            self.complain(hammering)

    def _note_waits(self, attempt: Attempt, outcome: Outcome) -> None:
        """Remember what the answer says of waiting: what is so, and what the agent understood."""
        now_s = self._world.monotonic_s()
        if isinstance(outcome, Unavailable):
            told_s = outcome.retry_after_s
            rests_s = REST_S if told_s is None and outcome.too_much else told_s or 0.0
            self._heard_s = max(self._heard_s, now_s + rests_s)
        if attempt.wait_s is not None:
            self._told_s = max(self._told_s, now_s + min(attempt.wait_s, RETRY_AFTER_MAX_S))

    def stored_upstream(self, attempt: Attempt, tracked: Tracked) -> None:
        """The upstream stores an event."""
        world = self._world
        world.note("stored upstream: %s, of %s", tracked.message_id, attempt.number)
        if attempt.sent_s < tracked.queued_s:
            return  # left over from before it was queued anew
        tracked.storings += 1
        attempt.stored.append(tracked)
        if tracked.storings > 1:
            self.stored_twice += 1
            unexcused = sum(
                tracked in each.stored and not self._is_excused(each) for each in tracked.attempts
            )
            if unexcused > 1:
                self.complain(f"{tracked.message_id} is stored twice without a doubt in between")
        elif self._choices.ordered and not tracked.closed:
            front = self.books.front(tracked.user)
            if front is not tracked:
                self.complain(
                    f"{tracked.message_id} overtakes {front and front.message_id} of its user"
                )
        tracked.closed = True

    def refused_upstream(self, tracked: Tracked) -> None:
        """The upstream refuses an event, and always will."""
        tracked.closed = True

    # --- what the agent records ---

    def decided(self, settlement: Settlement) -> None:
        """The agent settles an event; it is not committed yet."""
        tracked = self.books.by_seq.get(settlement.seq)
        self._world.note("settle %s", settlement)
        if tracked is None:
            self.complain(f"{settlement} is of no event")
            return
        if tracked.seq != settlement.seq:
            return  # queued anew meanwhile: this changes nothing any more
        last = tracked.attempts[-1] if tracked.attempts else None
        outcome = last.outcome if last is not None and last.life == self.lives else None
        match settlement:
            case Ack():
                if not tracked.storings or not isinstance(outcome, Delivered):
                    self.complain(f"{tracked.message_id} counts as delivered, and is not stored")
            case Bury():
                self._check_burial(tracked, settlement, outcome)
                tracked.closed = True
            case _:
                if not isinstance(outcome, Failed):
                    self.complain(f"{settlement} after {outcome}")

    def _check_burial(self, tracked: Tracked, bury: Bury, outcome: Outcome | None) -> None:
        name, give_up = tracked.message_id, self._choices.give_up
        if bury.reason == "rejected":
            if not isinstance(outcome, Rejected) or tracked.post.nature != "refused":
                self.complain(f"{name} is set aside as rejected after {outcome}")
            return
        answered = isinstance(outcome, Failed)
        if not answered and not isinstance(outcome, Unavailable):
            self.complain(f"{name} is given up after {outcome}")
        times = [at_s for at_s, kind in tracked.failures if kind is type(outcome)]
        if len(times) < give_up.attempts:
            self.complain(f"{name} is given up after {len(times)} failures")
        if not times:
            return
        proven = self._last_delivery_s > times[0]
        for_s = self._world.now_s - times[0]
        if not proven and not answered:
            self.complain(f"{name} is given up, and nothing else was delivered")
        if for_s < (give_up.after_s if proven else give_up.unproven_after_s) - 1.0:
            self.complain(f"{name} is given up after {for_s:.1f} s; delivered others: {proven}")

    # --- the end ---

    def expect_only_the_hopeless(self) -> None:
        """Some time into the calm nothing waits but what cannot be delivered, and its users."""
        hopeless = {
            each.user if self._choices.ordered else each.message_id
            for each in self.books.tracked.values()
            if each.post.until_s is None
        }
        for each in self.books.tracked.values():
            key = each.user if self._choices.ordered else each.message_id
            if each.state == "pending" and key not in hopeless:
                self.complain(f"{each.message_id} of {each.user} is not delivered in time")

    def conclude(self, db: sqlite3.Connection) -> None:
        """The end of the run, after a calm: everything deliverable is delivered."""
        self.books.audit(db)
        for tracked in self.books.tracked.values():
            if tracked.state is None and not tracked.discarded:
                self.complain(f"{tracked.message_id} was never accepted")
            if tracked.state == "delivered" and not tracked.storings:
                self.complain(f"{tracked.message_id} counts as delivered, and is not stored")
            if tracked.state == "pending":
                self.complain(f"{tracked.message_id} is still pending")


def _settles(attempt: Attempt) -> bool:
    """Whether its outcome is the last for its events; in a batch the refusal may be another event's."""
    alone = len(attempt.events) == 1
    return isinstance(attempt.outcome, Delivered | Rejected if alone else Delivered)
