"""Whether what failed together is sent together again, until it may be parted."""

from __future__ import annotations

from simulation.tracked import Attempt, Tracked

from agent.forward.disposition import Delivered, Rejected

PARTED_AFTER = 3
"""Failures of one kind from which a batch may be parted."""


def torn(attempt: Attempt) -> str | None:
    """Return what is wrong with the company of the events of *attempt*, or None."""
    for tracked in attempt.events:
        before = _before(attempt, tracked)
        if before is None or _may_be_parted(before, tracked):
            continue
        staying = tuple(
            each for each in before.events if each in attempt.events or _waits(each, before)
        )
        if staying != attempt.events:
            return (
                f"{_names(attempt.events)} go together; {tracked.message_id} failed with"
                f" {_names(before.events)} before"
            )
    return None


def _before(attempt: Attempt, tracked: Tracked) -> Attempt | None:
    """Return the attempt of this life in which *tracked* failed last."""
    before = tracked.attempts[-1] if tracked.attempts else None
    if before is None or before.life != attempt.life or before.sent_s < tracked.queued_s:
        return None
    return None if isinstance(before.outcome, Delivered) else before


def _may_be_parted(before: Attempt, tracked: Tracked) -> bool:
    if isinstance(before.outcome, Rejected):
        return True
    alike = [
        each
        for each in tracked.attempts
        if each.life == before.life and type(each.outcome) is type(before.outcome)
    ]
    return len(before.events) > 1 and len(alike) >= PARTED_AFTER


def _waits(tracked: Tracked, before: Attempt) -> bool:
    return tracked.state == "pending" and tracked.queued_s <= before.sent_s


def _names(events: tuple[Tracked, ...]) -> str:
    return " ".join(each.message_id for each in events)
