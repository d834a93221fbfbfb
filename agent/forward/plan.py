"""Where and how to forward, as the operator wants it, and how it stands, as people are told. Values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent.forward.backoff import Backoff
from agent.forward.batch import MAX_BATCH_BYTES
from agent.forward.budget import Budget
from agent.forward.disposition import GiveUp
from agent.forward.lanes import ONE, Fit

FlowState = Literal["flowing", "waiting", "backing_off", "held", "paused", "unconfigured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to send. *authorization* is the header's value; *bare_key* the key alone."""

    url: str
    authorization: str = field(repr=False)
    bare_key: str = field(repr=False)
    connect_timeout_s: float
    timeout_s: float
    ca_file: Path | None
    client_cert: Path | None
    client_key: Path | None
    proxy: str | None = field(repr=False)


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
