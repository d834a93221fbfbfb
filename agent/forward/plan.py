"""Where and how to forward, as the operator wants it. Values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.forward.backoff import Backoff
from agent.forward.batch import MAX_BATCH_BYTES
from agent.forward.budget import Budget
from agent.forward.disposition import GiveUp
from agent.forward.lanes import ONE, Fit


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
