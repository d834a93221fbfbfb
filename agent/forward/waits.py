"""What keeps one event from being delivered now, for people who ask about it. Pure.

Found in the lanes when somebody asks, not kept: an event that nobody asks about costs nothing.
"""

from __future__ import annotations

from agent.flow import Flow, Wait, WaitsFor
from agent.forward.lanes import Place


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
