"""How claims that failed have fared since, and when each may be tried again. Pure.

By kind of failure: what an outage did to an event is no sign that the event breaks the upstream.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from agent.forward.claims import Claim
from agent.forward.disposition import FRESH, Misconfigured, Outcome, Record, error_of


@dataclass(slots=True)
class _Streak:
    """Failures of one kind, since when, and what had been delivered by then."""

    strikes: int
    since_s: float
    delivered_before: int


@dataclass(slots=True)
class _Trial:
    strikes: int = 0
    last_error: str = ""
    streaks: dict[type[Outcome], _Streak] = field(default_factory=dict)


class Trials:
    """The claims that failed and are still to be delivered."""

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = {}
        self._delivered = 0

    def holds(self, claim: Claim) -> bool:
        """Return whether *claim* was sent, and failed."""
        return claim.key in self._trials

    def record(self, claim: Claim, outcome: Outcome, now_s: float) -> Record:
        """Return how *claim* has met failures like *outcome* until now."""
        trial = self._trials.get(claim.key)
        streak = None if trial is None else trial.streaks.get(type(outcome))
        if streak is None:
            return FRESH
        return Record(
            strikes=streak.strikes,
            for_s=now_s - streak.since_s,
            proven=self._delivered > streak.delivered_before,
        )

    def delivered(self) -> None:
        """Note that something was: what failed before and still fails may be at fault itself."""
        self._delivered += 1

    def struck(self, claim: Claim, outcome: Outcome, now_s: float, *, blamed: bool) -> int:
        """Note a failure; return how many there were for which the claim may be to *blame*."""
        trial = self._trials.setdefault(claim.key, _Trial())
        streak = trial.streaks.setdefault(type(outcome), _Streak(0, now_s, self._delivered))
        if isinstance(outcome, Misconfigured):
            # A key revoked for a moment looks like the event's fault, once: the proof begins anew.
            streak.delivered_before = self._delivered
        streak.strikes += blamed
        trial.strikes += blamed
        trial.last_error = error_of(outcome)
        return trial.strikes

    def last_error(self, claim: Claim) -> str | None:
        """Return what came of the last attempt at *claim*; None where none failed."""
        trial = self._trials.get(claim.key)
        return None if trial is None else trial.last_error

    def part(self, claim: Claim, parts: list[Claim]) -> None:
        """Let the parts of *claim* inherit its failures, so that one bad event is soon found."""
        trial = self._trials.pop(claim.key, None)
        if trial is None:
            return
        for each in parts:
            streaks = {kind: replace(streak) for kind, streak in trial.streaks.items()}
            self._trials[each.key] = _Trial(trial.strikes, trial.last_error, streaks)

    def over(self, claim: Claim) -> None:
        """Forget *claim*: it failed for the last time, or not at all."""
        self._trials.pop(claim.key, None)

    def clear(self) -> None:
        self._trials.clear()
