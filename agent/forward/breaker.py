"""The breaker: whether anything may be sent now, and how much at once.

Owns the state of the link as a whole. Pure: instants (monotonic seconds) and randomness come in
as arguments. An event's own failures are `agent.forward.lanes`' business.

               success: limit doubles
                 ┌──────┐  failure, or FALTERS 5xx in a row
    start ──▶ Closed(limit) ─────────────────────────────▶ Open(until) ◀──┐ failure: waits longer
                 ▲      │ misconfigured                       │ time, flush, another network
                 │      └──────────────▶ Held(until) ──▶ HalfOpen: one event as probe
                 │                          ▲  time, or flush   │  │
                 │                          └── misconfigured ──┘  │
                 └─────────────── success: limit 1 ────────────────┘

Every permission to send is a `Ticket` of the current epoch; each change of state begins a new one,
so the answers to what was in flight when the link broke do not count twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import assert_never

from agent.forward.backoff import Backoff

FALTERS = 3
"""5xx in a row, nothing delivered between, that mean the upstream and not the event."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to send one event. *probe* marks the single one of a half-open breaker."""

    epoch: int
    probe: bool


@dataclass(frozen=True, slots=True)
class Closed:
    """Events flow, at most *limit* at once."""

    limit: int


@dataclass(frozen=True, slots=True)
class Open:
    """Nothing is sent before *until_s*; *failures* counts those in a row.

    *obeys* says that the upstream asked for the wait, by Retry-After.
    """

    until_s: float
    failures: int
    why: str
    obeys: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """A person must act; probed at *until_s* all the same."""

    until_s: float
    why: str


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """The probe is out. *since* is the state that it may end."""

    since: Open | Held


State = Closed | Open | Held | HalfOpen


class Breaker:
    """See the module. *ceiling* is the most that may be in flight; *hold_probe_s* the wait of a hold."""

    def __init__(
        self, backoff: Backoff, *, ceiling: int, hold_probe_s: float, rng: random.Random
    ) -> None:
        self._backoff = backoff
        self._ceiling = ceiling
        self._hold_probe_s = hold_probe_s
        self._rng = rng
        self._epoch = 0
        self._falters = 0
        self._eager = False
        """Whether the network changed while the probe was out: its failure says nothing of now."""
        self._state: State = Closed(1)

    @property
    def state(self) -> State:
        return self._state

    def admit(self, now_s: float, *, in_flight: int) -> Ticket | None:
        """Return leave to send one more beside *in_flight*, or None. A probe's ticket must be used."""
        match self._state:
            case Closed(limit):
                return Ticket(self._epoch, probe=False) if in_flight < limit else None
            case Open() | Held() as state:
                if now_s < state.until_s:
                    return None
                self._enter(HalfOpen(state))
                return Ticket(self._epoch, probe=True)
            case HalfOpen():
                return None
            case _:
                assert_never(self._state)

    def opens_at_s(self) -> float | None:
        """Return when waiting ends by time alone; None if it does not depend on time."""
        match self._state:
            case Open() | Held() as state:
                return state.until_s
            case Closed() | HalfOpen():
                return None
            case _:
                assert_never(self._state)

    def succeed(self, ticket: Ticket) -> None:
        """The upstream answered as it should (to a bad event, too)."""
        if ticket.epoch != self._epoch:
            return
        self._falters = 0
        match self._state:
            case Closed(limit):
                self._state = Closed(min(limit * 2, self._ceiling))
            case HalfOpen():
                self._enter(Closed(1))
            case Open() | Held():
                raise AssertionError("a ticket of this epoch while nothing is sent")
            case _:
                assert_never(self._state)

    def falter(self, ticket: Ticket, now_s: float, why: str) -> None:
        """A 5xx that may be the event's own fault: `FALTERS` of them in a row are the link's."""
        if ticket.epoch != self._epoch:
            return
        self._falters += 1
        if ticket.probe or self._falters >= FALTERS:
            self.fail(ticket, now_s, why)

    def fail(
        self, ticket: Ticket, now_s: float, why: str, *, retry_after_s: float | None = None
    ) -> None:
        """The link failed: wait, longer each time in a row, and at least *retry_after_s*."""
        if ticket.epoch != self._epoch:
            return
        before = self._state.since if isinstance(self._state, HalfOpen) else None
        failures = before.failures + 1 if isinstance(before, Open) else 1
        wait_s = self._backoff.wait_s(failures, self._rng)
        if retry_after_s is not None:
            # Behind what was asked for, not at it: else all machines come back in one moment.
            wait_s += retry_after_s
        elif self._eager:
            wait_s = 0.0
        self._enter(Open(now_s + wait_s, failures, why, obeys=retry_after_s is not None))

    def hold(self, ticket: Ticket, now_s: float, why: str) -> None:
        """The agent is misconfigured: stop, and look again rarely."""
        if ticket.epoch == self._epoch:
            wait_s = self._hold_probe_s * self._rng.uniform(0.5, 1.0)
            self._enter(Held(now_s + wait_s, why))

    def cancel(self, ticket: Ticket, now_s: float) -> None:
        """The ticket's event was not sent after all; a probe may be taken again at once."""
        if ticket.epoch == self._epoch and isinstance(self._state, HalfOpen):
            self._enter(replace(self._state.since, until_s=now_s))

    def flush(self, now_s: float) -> None:
        """End the wait: the next event is sent as a probe now."""
        if isinstance(self._state, Open | Held):
            self._enter(replace(self._state, until_s=now_s))

    def adopt(self, backoff: Backoff, *, ceiling: int, hold_probe_s: float, now_s: float) -> None:
        """Go on by other terms, for another link: what waited is tried now.

        Answers to what is in flight do not count any more, nor does a probe that is out.
        """
        self._backoff, self._ceiling, self._hold_probe_s = backoff, ceiling, hold_probe_s
        match self._state:
            case Closed(limit):
                self._enter(Closed(min(limit, ceiling)))
            case HalfOpen(waited) | (Open() | Held() as waited):
                self._enter(replace(waited, until_s=now_s))
            case _:
                assert_never(self._state)

    def probe_early(self, now_s: float) -> bool:
        """The network changed: end a backoff by one probe; return whether there was one to end.

        A probe that fails counts as any other. What a person must mend is not mended by a network,
        and what the upstream asked for is obeyed.
        """
        match self._state:
            case Open(obeys=False) as state:
                self._enter(replace(state, until_s=now_s))
                return True
            case HalfOpen(Open()):
                self._eager = True
                return True
            case _:
                return False

    def _enter(self, state: State) -> None:
        self._state = state
        self._epoch += 1
        self._falters = 0
        self._eager = False
