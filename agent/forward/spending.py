"""The budget with its clock and its books: what a metered link has carried, and whether it may more.

The limits are `agent.forward.budget`'s; the bytes of a day are kept in the tally, over restarts. The
forwarder asks before each claim, and pays for each request.
"""

from __future__ import annotations

from datetime import UTC, datetime

from agent.clock import Clock
from agent.forward.budget import REQUEST_BYTES, Budget, KeptBack, Meter, day_of
from agent.forward.tally import Tally


class Spending:
    """What was spent of one budget. *now_s* is monotonic."""

    def __init__(self, budget: Budget, clock: Clock, tally: Tally) -> None:
        self._meter = Meter(budget)
        self._clock = clock
        self._tally = tally

    def kept_back(self, now_s: float) -> KeptBack | None:
        """Return why nothing may go now; None: go."""
        if self._meter.unlimited:
            return None
        local = self._local()
        return self._meter.kept_back(now_s, local, today_bytes=self._tally.bytes_of(day_of(local)))

    def pay(self, now_s: float, *, events: int, body_bytes: int) -> None:
        """Pay for a request of so many events, whose body has so many bytes."""
        if not self._meter.unlimited:
            sent_bytes = body_bytes + REQUEST_BYTES
            self._meter.spend(now_s, events=events, sent_bytes=sent_bytes)
            self._tally.spend(day_of(self._local()), sent_bytes)

    def _local(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall_ms() / 1000, UTC).astimezone()
