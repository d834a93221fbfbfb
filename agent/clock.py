"""The one place that reads time.

Two clocks that are never mixed: wall instants (int Unix milliseconds) go into rows and are
shown to people; monotonic instants (float seconds) measure waits. Decisions take either as an
argument and never come here.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the daemon asks of time; tests and simulations bring their own."""

    def wall_ms(self) -> int:
        """Return the time of day, in ms since the Unix epoch. It may jump."""

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start. It never goes back."""


class SystemClock:
    """The machine's own clocks."""

    def wall_ms(self) -> int:
        """Return the time of day, in ms since the Unix epoch. It may jump."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start. It never goes back."""
        return time.monotonic()
