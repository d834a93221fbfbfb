"""How claims that failed have fared since, and when each may be tried again. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.forward.claims import Claim
from agent.forward.disposition import FRESH, Record


@dataclass(slots=True)
class _Trial:
    """Failures in a row, since when, and what had been delivered by then."""

    strikes: int
    since_s: float
    delivered_before: int


class Trials:
    """The claims that failed and are still to be delivered."""

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = {}
        self._delivered = 0

    def record(self, claim: Claim, now_s: float) -> Record:
        """Return how *claim* has fared until now."""
        trial = self._trials.get(claim.key)
        if trial is None:
            return FRESH
        return Record(
            strikes=trial.strikes,
            for_s=now_s - trial.since_s,
            proven=self._delivered > trial.delivered_before,
        )

    def delivered(self) -> None:
        """Something was: what failed before and still fails may be at fault itself."""
        self._delivered += 1

    def struck(self, claim: Claim, now_s: float, *, counts: bool, clean: bool) -> int:
        """Note a failure; return how many in a row *counted*.

        *clean* begins the proof anew: a key revoked for a moment looks like an event at fault, once.
        """
        trial = self._trials.setdefault(claim.key, _Trial(0, now_s, self._delivered))
        if clean:
            trial.delivered_before = self._delivered
        trial.strikes += counts
        return trial.strikes

    def part(self, claim: Claim, parts: list[Claim]) -> None:
        """Begin for the parts of *claim* where that was, so that one bad event is soon found."""
        trial = self._trials.pop(claim.key, None)
        if trial is not None:
            for each in parts:
                self._trials[each.key] = replace(trial)

    def over(self, claim: Claim) -> None:
        """It failed for the last time, or not at all."""
        self._trials.pop(claim.key, None)

    def clear(self) -> None:
        self._trials.clear()
