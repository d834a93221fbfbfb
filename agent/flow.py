"""How forwarding to one upstream stands, as the forwarder says it and people are told. A value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FlowState = Literal["flowing", "waiting", "backing_off", "held", "paused", "unconfigured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How forwarding stands, for people. *reason* is empty while all is well.

    *in_flight* counts requests, *limit* how many there may be now. *ambiguous* counts the events
    that were sent again although they may have arrived.
    """

    state: FlowState
    reason: str
    next_attempt_in_s: float | None
    last_error: str | None
    last_error_ms: int | None
    in_flight: int
    limit: float
    parked_users: int
    ambiguous: int
