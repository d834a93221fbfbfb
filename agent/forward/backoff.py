"""How long to wait before trying again. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

_LARGEST_EXPONENT = 62
"""2**62 s is past any cap; without a bound the power outgrows a float after 1,024 failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential backoff with full jitter. Source: Brooker, "Exponential Backoff And Jitter", 2015."""

    base_s: float
    cap_s: float

    def wait_s(self, n: int, rng: random.Random) -> float:
        """Return the wait before attempt *n* + 1, in seconds; *n* >= 1 is how many failed in a row."""
        return rng.uniform(0.0, min(self.cap_s, self.base_s * 2 ** min(n - 1, _LARGEST_EXPONENT)))
