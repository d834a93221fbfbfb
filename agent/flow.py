"""How forwarding to one upstream stands, and what one event waits for: values that people are told."""

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


WaitsFor = Literal[
    "answer", "turn", "predecessor", "backoff", "hold", "budget", "resume", "upstream", "agent"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What a pending event *waits_for*.

    answer: it was sent, and what becomes of it is not recorded yet. turn: others go first.
    predecessor: an event of the same user that fails. backoff: an outage, or its own failure. hold: a
    person who mends something. budget: a window or a limit. resume: the end of a pause.
    upstream: a configuration. agent: no agent runs, as only the command can say.

    *reason* is for people, empty where there is nothing to say. *next_attempt_in_s* is when time alone
    ends the wait. *last_error* is what came of the last attempt at this very event, as far as this
    life of the agent knows.
    """

    waits_for: WaitsFor
    reason: str = ""
    next_attempt_in_s: float | None = None
    last_error: str | None = None
