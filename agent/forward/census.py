"""Whose events wait in the part of the outbox that was not read yet: counted, not listed. Pure.

A fresh event may overtake a backlog only if none of the backlog is its user's. To know that for a
million waiting events in two megabytes, users share counters: a shared counter makes a fresh event
wait in line, as it would without all this, and never lets one overtake.
"""

from __future__ import annotations

from array import array

_COUNTERS = 1 << 20
"""With 100,000 users in a backlog one fresh user in ten meets a counter in use."""

_MOST = 0xFFFF
"""A counter that came so far stays: it says "many" until the backlog is read to its end."""


class Census:
    """How many unread events each user has, at least one where there is any."""

    def __init__(self) -> None:
        self._counts: array[int] | None = None

    def add(self, *lanes: int) -> None:
        """Count an event of each of these users."""
        if not lanes:
            return
        self._counts = counts = self._counts or array("H", bytes(2 * _COUNTERS))
        for lane in lanes:
            slot = lane % _COUNTERS
            if counts[slot] < _MOST:
                counts[slot] += 1

    def remove(self, lane: int) -> None:
        """Count one event less that was added before."""
        if self._counts is not None and 0 < self._counts[lane % _COUNTERS] < _MOST:
            self._counts[lane % _COUNTERS] -= 1

    def holds(self, lane: int) -> bool:
        """Return whether events of this user may be unread."""
        return self._counts is not None and self._counts[lane % _COUNTERS] > 0

    def clear(self) -> None:
        """Nothing is unread."""
        self._counts = None
