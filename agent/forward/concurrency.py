"""How much may be under way at once: as much as the upstream bears, found by trying. Pure.

Additive increase, multiplicative decrease, as TCP does it. After a recovery one attempt at a time;
each round of answers that came as quickly as the quickest adds one, up to the ceiling; a round that
took much longer, or an upstream that says it has too much, takes away. Where even one at a time is
too much, the share of the time is cut in which one is under way: ten thousand machines that keep
one request each in a queue are no less of a load for being polite one by one.

    limit 4.0   four at once
    limit 1.0   one after the other
    limit 0.5   one, then a rest as long as it took
"""

from __future__ import annotations

FLOOR = 1 / 8
"""The least share of the time in which one attempt is under way; recovery from it takes moments."""

REST_MAX_S = 60.0
"""The longest rest between two attempts, however slow the upstream was."""

_ROUND = 4
"""Answers in a round at least: the quickest of so few is seldom quick by chance, or all slow by it."""

_TOLERANCE = 2.0
_SLACK_S = 0.05
"""An upstream has too much when the quickest answer of a round took more than twice as long as it
can, and 50 ms: below that are the sleeps of radios and the turns of a small machine's scheduler."""

_FORGET = 1.05
"""How much slower the quickest answer is believed to be after each round, for paths change."""

_SLOWED = 0.7
_REFUSED = 0.5
"""What is left of the limit after a slow round, and after a 429 or 503."""


class Limit:
    """The limit on one upstream. Instants are monotonic seconds."""

    def __init__(self, ceiling: int) -> None:
        self.value = 1.0
        self.round = 0
        """Counts the changes: what was sent before the last one says nothing about it."""
        self.rests_until_s: float | None = None
        """From when the next attempt may go; None: at once."""
        self._ceiling = ceiling
        self._quickest_s: dict[int, float] = {}
        """By the order of magnitude of a request's events: a full batch takes longer than one event."""
        self._answers = 0
        self._round_s: dict[int, float] = {}
        self._reached = False

    def admits(self, in_flight: int) -> bool:
        """Return whether one more may go beside *in_flight*."""
        if in_flight + 1 < self.value:
            return True
        self._reached = True
        return in_flight < max(1.0, self.value)

    def answered(self, now_s: float, *, took_s: float, events: int, round_: int) -> None:
        """Take in an attempt that succeeded, with the *round* in which it was sent."""
        size = events.bit_length()
        self._rest(now_s, took_s)
        if round_ != self.round:
            return
        self._answers += 1
        self._round_s[size] = min(took_s, self._round_s.get(size, took_s))
        if self._answers >= max(_ROUND, self.value):
            self._end_round()

    def refused(self, now_s: float, *, took_s: float, round_: int) -> None:
        """Take in that the upstream said it has too much."""
        if round_ == self.round:
            self._set(self.value * _REFUSED)
        self._rest(now_s, took_s)

    def restart(self) -> None:
        """Begin with one at a time: after a failure nothing is known but that it is over."""
        self._set(min(1.0, self.value))
        self.rests_until_s = None

    def _rest(self, now_s: float, took_s: float) -> None:
        rest_s = min(REST_MAX_S, took_s * (1 / self.value - 1)) if self.value < 1 else 0.0
        self.rests_until_s = now_s + rest_s if rest_s else None

    def _end_round(self) -> None:
        slow = False
        for size, took_s in self._round_s.items():
            quickest_s = self._quickest_s.get(size, took_s)
            slow = slow or took_s > quickest_s * _TOLERANCE + _SLACK_S
            self._quickest_s[size] = min(took_s, quickest_s * _FORGET)
        if slow:
            self._set(self.value * _SLOWED)
        elif self.value < 1:
            self._set(min(1.0, self.value * 2))
        else:
            self._set(self.value + 1 if self._reached else self.value)

    def _set(self, value: float) -> None:
        self.value = min(max(value, FLOOR), float(self._ceiling))
        self.round += 1
        self._answers, self._round_s, self._reached = 0, {}, False
