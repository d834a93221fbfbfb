"""What keeps one event from being delivered now, for people who ask about it. Pure.

Found in the lanes when somebody asks, not kept: an event that nobody asks about costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agent.flow import Flow
from agent.forward.lanes import Place

WaitsFor = Literal[
    "answer", "turn", "predecessor", "backoff", "hold", "budget", "resume", "upstream"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What a pending event *waits_for*.

    answer: it was sent, and what becomes of it is not recorded yet. turn: others go first.
    predecessor: an event of the same user that fails. backoff: an outage, or its own failure. hold: a
    person who mends something. budget: a window or a limit. resume: the end of a pause.
    upstream: a configuration.

    *reason* is for people, empty where there is nothing to say. *next_attempt_in_s* is when time alone
    ends the wait. *last_error* is what came of the last attempt at this very event, as far as this
    life of the agent knows.
    """

    waits_for: WaitsFor
    reason: str
    next_attempt_in_s: float | None
    last_error: str | None


def wait_of(flow: Flow, place: Place, *, sent: bool, last_error: str | None, now_s: float) -> Wait:
    """Return what an event waits for that stands at *place*; *sent*: in a request under way."""
    waits_for, reason, due_in_s = _wait_of(flow, place, sent=sent, now_s=now_s)
    return Wait(
        waits_for=waits_for, reason=reason, next_attempt_in_s=due_in_s, last_error=last_error
    )


def _wait_of(
    flow: Flow, place: Place, *, sent: bool, now_s: float
) -> tuple[WaitsFor, str, float | None]:
    if sent:
        return "answer", "", None
    due_in_s = flow.next_attempt_in_s
    match flow.state:
        case "unconfigured":
            return "upstream", flow.reason, None
        case "paused":
            return "resume", flow.reason, None
        case "held":
            return "hold", flow.reason, due_in_s
        case "backing_off":
            return "backoff", flow.reason, due_in_s
        case "waiting" if not place.urgent:
            return "budget", flow.reason, due_in_s
        case _:
            pass
    parked_s = None if place.until_s is None else max(0.0, place.until_s - now_s)
    if place.behind is not None:
        return "predecessor", f"{place.behind}, of the same user, goes first and fails", parked_s
    if parked_s is not None:
        return "backoff", "", parked_s
    return "turn", "", None
