"""How much may be under way at once: as much as the upstream bears, found by trying. Pure.

Additive increase, multiplicative decrease, as TCP does it. After a recovery one attempt at a time;
each round of answers that came about as quickly as the upstream can adds one, up to the ceiling; a
round that took much longer, or an upstream that says it has too much, takes away.

        quick round: + 1                 slow round: x 0.7; refused: x 0.5
    1 ──────────────────▶ 2 … ceiling ──────────────────────────────────▶ 1 … ceiling
    1 ── a slow answer, the slower the surer ──▶ rest ── it is over ──▶ 1

Where even one at a time is too much, the agent rests, for ten thousand machines that keep one request
each in a queue are no less of a load for being polite one by one. A rest is a leave, not a slower pace:
those at work see every answer and go by chance, so that load follows within moments. Were it the pace
that all adjust, each would see the effect when its next turn comes, seconds later, and ten thousand that
correct what they see late swing between flood and drought (`benchmarks/herd.py` plays it).
"""

from __future__ import annotations

import random
from collections import Counter

REST_MAX_S = 120.0
"""The longest mean rest: of 100,000 machines then 800 a second come back."""

_REST_MOST = 64
"""A rest is so many times the answer at most: who looks away for longer finds its share taken."""

_JITTER = (0.5, 1.5)
"""Times the mean: one rest. Ten thousand that were stopped together must not go on together."""

_TOLERANCE = 2.0
_SLACK_S = 0.05
"""An answer is slow that took longer than twice the quickest, and 50 ms: below that are
the sleeps of radios and the turns of a small machine's scheduler."""

_UNHURRIED_S = 1.0
_UNHURRIED_EACH_S = 0.02
"""How long an upstream is believed to take for a request and each of its events, before it was seen
quicker: twice of it is a thin link or a slow server, and more an overload. A fleet that starts in the
middle of one must not take it for usual; what takes even longer is believed after `_IN_VAIN` rests."""

_REFUSED_REST_S = 0.15
"""The shortest mean rest after "too much": it doubles while it is said again."""

_LEAST_S = 0.001
"""No quickest answer is believed below this: doubling leads nowhere from 0, and little further from it."""

_BELIEVED_S = 1800.0
"""How long the quickest answer counts; then up to twice as long is believed. A fleet that drains for an
hour thus learns little of its own overload, and an upstream that has moved is not crawled at for ever."""

_MUCH = 1.2
_IN_VAIN = 10
"""After so many rests without an answer below this slowness it is the path, and not the load: twice
as long is believed. Load that is shared has better moments."""

_ROUND = 4
"""Answers in a round at least: so few are seldom all quick, or all slow, by chance."""

_OUTLIER = 2.0
"""No answer counts as slower than this in its round's mean: a lost packet is not an overload."""

_SLOWED = 0.7
_REFUSED = 0.5
"""What is left of the limit after a slow round, and after a 429 or 503."""


class Limit:
    """The limit on one upstream. Instants are monotonic seconds."""

    def __init__(self, ceiling: int, rng: random.Random) -> None:
        self.value = 1.0
        self.round = 0
        """Counts the changes: what was sent before the last one says nothing about it."""
        self.rests_until_s: float | None = None
        """From when the next attempt may go; None: at once."""
        self._ceiling = float(ceiling)
        self._rng = rng
        self._quickest: dict[int, tuple[float, float]] = {}
        """What the quickest answer took, and from when that counts; by the order of magnitude of a
        request's events, for a full batch takes longer than one event."""
        self._rest_s = 0.0
        """The mean of the last rest."""
        self._was_quick = True
        """Whether any answer since then was quick."""
        self._in_vain: Counter[int] = Counter()
        """Rests in a row that changed nothing, by size as above."""
        self._answers = 0
        self._slowness = 0.0
        """Of the round's answers, the sum."""
        self._reached = False

    def admits(self, in_flight: int) -> bool:
        """Return whether one more may go beside *in_flight*."""
        if in_flight + 1 >= self.value:
            self._reached = True
        return in_flight < self.value

    def answered(self, now_s: float, *, took_s: float, events: int, round_: int) -> None:
        """Take in an attempt that succeeded, with the *round* in which it was sent."""
        slow = self._weigh(now_s, took_s, events)
        if round_ != self.round:
            return
        self.rests_until_s = None
        if slow <= _MUCH:
            self._in_vain[events.bit_length()] = 0
        if slow <= 1:
            self._was_quick = True
        elif self.value <= 1 and self._leaves(slow):
            self._rest(now_s, took_s, events)
            return
        self._answers += 1
        self._slowness += min(slow, _OUTLIER)
        if self._answers < max(_ROUND, self.value):
            return
        if self._slowness > self._answers:
            self._set(self.value * _SLOWED)
        else:
            self._set(self.value + (1 if self._reached else 0))

    def refused(self, *, round_: int) -> float:
        """Take in that the upstream said it has too much; return how long to rest, in seconds."""
        if self.value <= 1:
            self._in_vain.update(self._quickest.keys())
            return self._next_rest_s(_REFUSED_REST_S)
        if round_ == self.round:
            self._set(self.value * _REFUSED)
        return 0.0

    def restart(self, now_s: float, *, took_s: float, events: int) -> None:
        """Begin with one at a time after a failure, and with a rest if the probe was slow, too.

        *events* 0: how long it *took_s* tells nothing.
        """
        self._quickest = {size: (s, now_s) for size, (s, _) in self._quickest.items()}
        self._set(1.0)
        self.rests_until_s = None
        if events and self._leaves(self._weigh(now_s, took_s, events)):
            self._rest(now_s, took_s, events)

    def forget(self) -> None:
        """Take what comes next for what is usual: a person says so, or it is another upstream."""
        self._quickest.clear()
        self._in_vain.clear()
        self._rest_s, self.rests_until_s = 0.0, None

    def cap(self, ceiling: int) -> None:
        """Go up to *ceiling* from now on."""
        self._ceiling = float(ceiling)
        self._set(self.value)

    def _weigh(self, now_s: float, took_s: float, events: int) -> float:
        """Return how slow an answer was, in parts of what is still borne, and learn from it."""
        size = events.bit_length()
        unhurried_s = _UNHURRIED_S + _UNHURRIED_EACH_S * events
        quickest_s, since_s = self._quickest.get(size, (unhurried_s, now_s))
        slow = took_s / (quickest_s * _TOLERANCE + _SLACK_S)
        took_s = max(took_s, _LEAST_S)
        doubted = now_s - since_s > _BELIEVED_S or (
            slow > _MUCH and self._in_vain[size] >= _IN_VAIN
        )
        believed_s = min(took_s, quickest_s * 2 if doubted else quickest_s)
        if doubted or believed_s < quickest_s or size not in self._quickest:
            self._quickest[size] = believed_s, now_s
        return slow

    def _leaves(self, slow: float) -> bool:
        """Return whether this is one of those that go: none while all is well, all at twice as slow."""
        return self._rng.random() < slow - 1

    def _rest(self, now_s: float, took_s: float, events: int) -> None:
        self._in_vain[events.bit_length()] += 1
        self.rests_until_s = now_s + self._next_rest_s(took_s)
        self._set(1.0)

    def _next_rest_s(self, took_s: float) -> float:
        mean_s = self._rest_s * (0.5 if self._was_quick else 2.0)
        self._rest_s = min(max(mean_s, took_s), took_s * _REST_MOST, REST_MAX_S)
        self._was_quick = False
        return self._rest_s * self._rng.uniform(*_JITTER)

    def _set(self, value: float) -> None:
        self.value = min(max(value, 1.0), self._ceiling)
        self.round += 1
        self._answers, self._slowness, self._reached = 0, 0.0, False
