"""How busy the agent may be: bounds for each virtual minute, so that nothing spins and nothing hammers."""

from __future__ import annotations

from simulation.virtual_time import World

MINUTE_S = 60.0

TURNS_A_MINUTE = 200
TURNS_AN_ACTION = 12
"""Turns of the event loop: so many are always allowed, and so many more for each thing it did."""

FAILURES_A_MINUTE = 120
FAILURES_A_SUCCESS = 20
"""The same for attempts that fail. With full jitter a wait may be next to nothing, but not each."""


class Pace:
    """Counts of the current minute. What is wrong is returned, else None."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._minute = -1
        self._turns = 0
        self._actions = 0
        self._failures = 0
        self._successes = 0

    def turned(self) -> str | None:
        """The event loop begins a turn."""
        minute = int(self._world.now_s // MINUTE_S)
        if minute != self._minute:
            self._minute = minute
            self._turns = self._actions = self._failures = self._successes = 0
        self._turns += 1
        if self._turns <= TURNS_A_MINUTE + TURNS_AN_ACTION * self._actions:
            return None
        return f"a hot loop: {self._turns} turns for {self._actions} actions in a minute"

    def acted(self) -> None:
        """The agent does something, or is asked to."""
        self._actions += 1

    def succeeded(self) -> None:
        """An attempt went well, as far as the link is concerned."""
        self._successes += 1

    def failed(self) -> str | None:
        """An attempt did not."""
        self._failures += 1
        if self._failures <= FAILURES_A_MINUTE + FAILURES_A_SUCCESS * self._successes:
            return None
        return f"{self._failures} failed attempts in a minute, beside {self._successes} others"
