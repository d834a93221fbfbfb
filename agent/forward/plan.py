"""How to forward, as the operator wants it, and how forwarding stands, as people are told. Values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agent.forward.backoff import Backoff
from agent.forward.batch import MAX_BATCH_BYTES
from agent.forward.budget import Budget
from agent.forward.disposition import GiveUp
from agent.forward.lanes import ONE, Fit

FlowState = Literal["flowing", "waiting", "backing_off", "held", "paused", "unconfigured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to forward. *ordered* keeps each user's events in order.

    *batch* is how many events one request may carry; 1: each goes alone, to its own endpoint.
    *urgent* names the events that *budget* does not keep back.
    """

    concurrency: int
    ordered: bool
    backoff: Backoff
    give_up: GiveUp
    hold_probe_s: float
    batch: int = 1
    budget: Budget = field(default_factory=Budget)
    urgent: tuple[str, ...] = ()

    @property
    def fit(self) -> Fit:
        return ONE if self.batch == 1 else Fit(events=self.batch, batch_bytes=MAX_BATCH_BYTES)


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
