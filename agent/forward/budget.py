"""What a metered link may carry, and when. Pure.

A budget is spent, not reserved: what was sent is paid for afterwards, so that a batch or a large
event goes whole, and the wait behind it is as much longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time, timedelta

REQUEST_BYTES = 400
"""Counted for each request beside its body: its head, the answer, their packets."""

_LOOK_AGAIN_S = 60.0
"""The longest wait between two looks at the clock on the wall, which a person may set."""


@dataclass(frozen=True, slots=True)
class Window:
    """A time of day from *opens* until before *closes*; across midnight if that is earlier."""

    opens: time
    closes: time

    def holds(self, now: time) -> bool:
        if self.opens < self.closes:
            return self.opens <= now < self.closes
        return now >= self.opens or now < self.closes


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The operator's limits; 0, and no windows: none."""

    events_per_s: float = 0
    bytes_per_s: float = 0
    bytes_per_day: int = 0
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptBack:
    """Nothing may go before *until_s*, when it is to be asked again; *why* is for people."""

    until_s: float
    why: str


class Meter:
    """Spends a budget. *now_s* is monotonic, *local* the local time of day and date."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._events_paid_s = float("-inf")
        self._bytes_paid_s = float("-inf")
        self.unlimited = budget == Budget()

    def kept_back(self, now_s: float, local: datetime, *, today_bytes: int) -> KeptBack | None:
        """Return why nothing may go now; *today_bytes* were sent since midnight. None: go."""
        budget = self._budget
        if budget.windows and not any(window.holds(local.time()) for window in budget.windows):
            opens = min(_next(local, window.opens) for window in budget.windows)
            return _kept_back_until(
                now_s, local, opens, f"outside forward.windows; opens at {opens:%H:%M}"
            )
        if budget.bytes_per_day and today_bytes >= budget.bytes_per_day:
            midnight = _next(local, time())
            return _kept_back_until(
                now_s,
                local,
                midnight,
                f"{today_bytes} bytes were sent today, all of forward.max_bytes_per_day;"
                " goes on at midnight",
            )
        paid_s, key = max(
            (self._events_paid_s, "max_events_per_s"), (self._bytes_paid_s, "max_bytes_per_s")
        )
        if paid_s > now_s:
            return KeptBack(paid_s, f"as fast as forward.{key} lets it")
        return None

    def spend(self, now_s: float, *, events: int, sent_bytes: int) -> None:
        """Pay for a request."""
        if self._budget.events_per_s:
            paid_s = max(now_s, self._events_paid_s)
            self._events_paid_s = paid_s + events / self._budget.events_per_s
        if self._budget.bytes_per_s:
            paid_s = max(now_s, self._bytes_paid_s)
            self._bytes_paid_s = paid_s + sent_bytes / self._budget.bytes_per_s


def day_of(local: datetime) -> int:
    """Return the local date as a number, to count the bytes of one day."""
    return (local.date() - date(1970, 1, 1)).days


def _next(local: datetime, at: time) -> datetime:
    today = local.replace(
        hour=at.hour, minute=at.minute, second=at.second, microsecond=at.microsecond
    )
    return today if today > local else today + timedelta(days=1)


def _kept_back_until(now_s: float, local: datetime, opens: datetime, why: str) -> KeptBack:
    wait_s = (opens - local).total_seconds()
    return KeptBack(now_s + min(wait_s, _LOOK_AGAIN_S), why)
