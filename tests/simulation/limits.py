"""How much may go, and when: what answers and the operator's limits allow; by counts of its own.

What is wrong is returned, else None. Instants are monotonic.
"""

from __future__ import annotations

from datetime import UTC, datetime

from simulation.scenario import OPEN_MIN, PERIOD_MIN, URGENT, Choices
from simulation.tracked import Attempt, Tracked
from simulation.virtual_time import World

from agent.flow import Flow
from agent.forward.disposition import Delivered, Outcome, Unavailable

ROUND = 4
"""Deliveries after which one more request may be under way, at the least."""

READING_S = 0.005
"""How long reading a body takes at most (`outbox.SimulatedReader`)."""


class Throttle:
    """How many requests may be under way: one after a recovery, then more with each round of answers."""

    def __init__(self, choices: Choices) -> None:
        self._ceiling = choices.concurrency
        self._requests = 0
        self._answers = 0
        self._delivered = 0
        self._sent_at: dict[Attempt, int] = {}
        self._limit = 1.0
        self._must_halve = False

    def recovered(self) -> None:
        """The link begins anew, with one request."""
        self._delivered = 0
        self._sent_at.clear()

    def sent(self, attempt: Attempt, *, probe: bool) -> str | None:
        """Look at a request; a *probe* goes beside what is still under way from before."""
        self._requests += 1
        self._sent_at[attempt] = self._answers
        if self._requests > self._ceiling:
            return f"{self._requests} requests at once"
        most = 1 + self._delivered // ROUND
        if self._requests > most and not probe:
            return f"{self._requests} requests at once, {self._delivered} deliveries after a start"
        return None

    def answered(self, attempt: Attempt, outcome: Outcome, limit: float) -> None:
        """Take in an answer; *limit* is that of before."""
        self._requests -= 1
        self._delivered += isinstance(outcome, Delivered)
        # Other answers since it was sent may have begun a new round, for which it does not count.
        at_once = self._sent_at.pop(attempt, None) == self._answers
        too_much = isinstance(outcome, Unavailable) and outcome.too_much
        self._must_halve, self._limit = too_much and at_once, limit
        self._answers += 1

    def observed(self, flow: Flow) -> str | None:
        """See what the agent made of the last answer."""
        must_halve, self._must_halve = self._must_halve, False
        if must_halve and flow.state == "flowing" and flow.limit > max(1.0, self._limit / 2):
            return f"told of too much, the limit goes from {self._limit} to {flow.limit}"
        return None


class Spending:
    """What the operator's budget lets go."""

    def __init__(self, world: World, choices: Choices) -> None:
        self._world = world
        self._choices = choices
        self._since_s = world.monotonic_s()
        self._events = 0

    def sent(self, attempt: Attempt, queue: dict[str, list[Tracked]]) -> str | None:
        """Look at a request; *queue* has what was ever queued of each user."""
        budget = self._choices.budget
        self._events += len(attempt.events)
        if budget.events_per_s:
            # What is under way is paid for when it is answered.
            ahead = 2 * self._choices.concurrency * self._choices.batch
            passed_s = self._world.monotonic_s() - self._since_s
            if self._events > ahead + budget.events_per_s * passed_s:
                return (
                    f"{self._events} events in {passed_s:.1f} s, of {budget.events_per_s} a second"
                )
        if not budget.windows or self._is_open():
            return None
        may_go = [self._is_urgent(each, queue) for each in attempt.events]
        resent = any(
            each.attempts and each.attempts[-1].life == attempt.life for each in attempt.events
        )
        if not (any(may_go) if resent else all(may_go)):
            names = " ".join(each.message_id for each in attempt.events)
            return f"{names} outside of the windows, and not for an urgent one"
        return None

    def _is_open(self) -> bool:
        now_ms = self._world.wall_ms()
        if self._world.now_s - self._world.clock_set_s <= 2 * READING_S:
            return True
        moments = (_time_of(now_ms), _time_of(now_ms - int(2000 * READING_S)))
        return any(moment.minute % PERIOD_MIN < OPEN_MIN for moment in moments)

    def _is_urgent(self, tracked: Tracked, queue: dict[str, list[Tracked]]) -> bool:
        """Whether *tracked* may go at any time: urgent, or before such a one of its user."""
        if tracked.post.name == URGENT:
            return True
        return self._choices.ordered and any(
            each.post.name == URGENT and each.seq > tracked.seq and each.state != "delivered"
            for each in queue[tracked.user]
        )


def _time_of(wall_ms: int) -> datetime:
    return datetime.fromtimestamp(wall_ms / 1000, UTC).astimezone()
