"""What keeps everything back, the weightiest first, and from when an event may go. Pure.

    unconfigured   nobody said where to; a person ends it
    paused         a person ends it
    rescuing       events of a damaged outbox come back, and are older than what was accepted since
    the breaker    the upstream is down, or will have none of it
    the budget     it is not the time, or too much went already
    the lanes      all that is left are users that wait behind a failing event

The forwarder asks before each claim, and tells people the same.
"""

from __future__ import annotations

from typing import assert_never

from agent.flow import FlowState
from agent.forward import breaker
from agent.forward.breaker import HalfOpen, Held, Open
from agent.forward.budget import KeptBack
from agent.forward.lanes import Lanes

UNSETTLED = 128
"""Events whose settlement may wait for its commit, or two batches of them: with what is under way
this is what a kill makes the agent send again."""

GATHERED = UNSETTLED // 2
"""Events whose settlements are recorded together, if they come that fast: the other half may go on
meanwhile."""

BESIDE_INTAKE = 12
"""Attempts and settlements that may be under way while apps wait to be stored: on a small machine
the two share one processor, and an app that waits is worse than an event that waits."""

RESTING = "the upstream answers much slower than usual: resting in between"
"""The reason, for people, while all is well and nothing goes for a moment."""


def state_of(
    *,
    unconfigured: str | None,
    paused: bool,
    rescuing: bool,
    link: breaker.State,
    kept_back: KeptBack | None,
    parked_users: int,
) -> tuple[FlowState, str]:
    """Return how forwarding stands, and why, for people; the reason is empty while all is well.

    *unconfigured* says what is missing, None: nothing.
    """
    if unconfigured is not None:
        return "unconfigured", unconfigured
    if paused:
        return "paused", "paused by a person; tranthor-agent resume ends it"
    if rescuing:
        return "backing_off", "events of a damaged outbox are being read back; they go first"
    match link:
        case Open(_, _, why) | HalfOpen(Open(_, _, why)):
            return "backing_off", why
        case Held(_, why) | HalfOpen(Held(_, why)):
            return "held", why
        case _:
            pass
    if kept_back is not None:
        return "waiting", kept_back.why
    return "flowing", f"{parked_users} user(s) wait behind a failing event" if parked_users else ""


def until_s(
    state: FlowState, *, kept_back: KeptBack | None, opens_at_s: float | None, now_s: float
) -> float | None:
    """Return when time alone ends *state* (monotonic s); None: it does not, or nothing is to end.

    *opens_at_s* is the breaker's; None while it is tried, which may end it now.
    """
    match state:
        case "backing_off" | "held":
            return now_s if opens_at_s is None else opens_at_s
        case "waiting":
            return None if kept_back is None else kept_back.until_s
        case "flowing":
            return opens_at_s if opens_at_s is not None and opens_at_s > now_s else None
        case "paused" | "unconfigured":
            return None
        case _:
            assert_never(state)


def due_at_s(
    lanes: Lanes, *, paused: bool, kept_back: KeptBack | None, opens_at_s: float | None
) -> float | None:
    """Return from when an event may go (monotonic s); None: only a change can bring that.

    While the budget keeps events back the urgent ones go all the same. *opens_at_s* is the breaker's.
    """
    if paused:
        return None
    lanes_at_s = lanes.next_at_s(urgent=kept_back is not None)
    if kept_back is not None and lanes_at_s is None and lanes.next_at_s() is not None:
        lanes_at_s = kept_back.until_s
    if lanes_at_s is None:
        return None
    return lanes_at_s if opens_at_s is None else max(lanes_at_s, opens_at_s)


def is_crowded(*, in_flight: int, unsettled: int, batch: int, pressed: bool) -> bool:
    """Return whether the outbox should commit before more is sent.

    *in_flight* counts requests, *unsettled* events; *pressed*: apps wait to be stored.
    """
    if unsettled >= max(UNSETTLED, 2 * batch):
        return True
    return pressed and in_flight + unsettled >= BESIDE_INTAKE


def is_to_record(*, in_flight: int, gathered: int, failed: bool, pressed: bool) -> bool:
    """Return whether *gathered* settlements are to be recorded now: no others will come, or enough did.

    *in_flight* counts the request that brought the last of them, too. An attempt that *failed* is
    recorded before the next one of the same event. While apps wait to be stored there is a commit in
    any case.
    """
    return failed or in_flight <= 1 or gathered >= GATHERED or pressed
