"""The breaker: whether anything may be sent now.

Owns the state of the link as a whole; while it is closed, `agent.forward.concurrency` says how much
may be under way at once. Pure: instants (monotonic seconds) and randomness come in as arguments.
A claim's own failures are `agent.forward.trials`' business.

                      failure, or FALTERS 5xx in a row, or "too much" said to a single one
    start ──▶ Closed ─────────────────────────────────────▶ Open(until) ◀──┐ failure: waits longer
                ▲   │ misconfigured                           │ time, flush, another network
                │   └──────────────▶ Held(until) ──▶ HalfOpen: one claim as probe
                │                       ▲  time, or flush   │  │
                │                       └── misconfigured ──┘  │
                └──────── success: one at a time ──────────────┘

Every permission to send is a `Ticket` of the current epoch; each change of state begins a new one,
so the answers to what was in flight when the link broke do not count twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import assert_never

import msgspec

from agent.forward.backoff import Backoff
from agent.forward.concurrency import Limit

FALTERS = 3
"""5xx in a row, nothing delivered between, that mean the upstream and not the event."""


class Ticket(msgspec.Struct, frozen=True):
    """Permission to send one claim, from *sent_s* on. *probe* marks the one of a half-open breaker."""

    epoch: int
    round: int
    sent_s: float
    probe: bool


@dataclass(frozen=True, slots=True)
class Closed:
    """Events flow, as many at once as the limit says."""


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
        self._hold_probe_s = hold_probe_s
        self._rng = rng
        self._epoch = 0
        self._falters = 0
        self._told_s = float("-inf")
        """Until when the upstream has asked to be left alone."""
        self._eager = False
        """Whether the network changed while the probe was out: its failure says nothing of now."""
        self._limit = Limit(ceiling, rng)
        self._state: State = Closed()

    @property
    def state(self) -> State:
        return self._state

    @property
    def limit(self) -> float:
        """How much may be under way at once while closed."""
        return self._limit.value

    def admit(self, now_s: float, *, in_flight: int) -> Ticket | None:
        """Return leave to send one more beside *in_flight*, or None. A probe's ticket must be used."""
        match self._state:
            case Closed():
                if now_s < (self._limit.rests_until_s or now_s):
                    return None
                return self._ticket(now_s) if self._limit.admits(in_flight) else None
            case Open() | Held() as state:
                if now_s < state.until_s:
                    return None
                self._enter(HalfOpen(state))
                return self._ticket(now_s, probe=True)
            case HalfOpen():
                return None
            case _:
                assert_never(self._state)

    def _ticket(self, now_s: float, *, probe: bool = False) -> Ticket:
        return Ticket(self._epoch, self._limit.round, now_s, probe)

    def opens_at_s(self) -> float | None:
        """Return when waiting ends by time alone; None if it does not depend on time."""
        match self._state:
            case Open() | Held() as state:
                return state.until_s
            case Closed():
                return self._limit.rests_until_s
            case HalfOpen():
                return None
            case _:
                assert_never(self._state)

    def succeed(self, ticket: Ticket, now_s: float, *, delivered: int) -> None:
        """The upstream answered as it should; *delivered* is 0 where it refused a bad event."""
        if ticket.epoch != self._epoch:
            return
        self._falters = 0
        match self._state:
            case Closed() if delivered:
                self._limit.answered(
                    now_s, took_s=now_s - ticket.sent_s, events=delivered, round_=ticket.round
                )
            case Closed():  # to refuse takes less time than to store
                pass
            case HalfOpen(Open(why=why) | Held(why=why)) if self._told_s > now_s:
                self._enter(self._asked(why))
            case HalfOpen():
                self._enter(Closed())
                self._limit.restart(now_s, took_s=now_s - ticket.sent_s, events=delivered)
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

    def push_back(self, ticket: Ticket, now_s: float, why: str) -> None:
        """The upstream has too much, and did not say how long: less at once, or none for a while."""
        if ticket.epoch != self._epoch:
            return
        alone = ticket.probe or self._limit.value <= 1
        rest_s = self._limit.refused(round_=ticket.round)
        if alone:
            self.fail(ticket, now_s, why, retry_after_s=rest_s)

    def fail(
        self, ticket: Ticket, now_s: float, why: str, *, retry_after_s: float | None = None
    ) -> None:
        """The link failed: wait, longer each time in a row, and at least *retry_after_s*.

        What was asked for in answer to a request of before holds, too.
        """
        if retry_after_s is not None:
            self._told_s = max(self._told_s, now_s + retry_after_s)
        if ticket.epoch != self._epoch:
            self._obey(now_s, why)
            return
        before = self._state.since if isinstance(self._state, HalfOpen) else None
        failures = before.failures + 1 if isinstance(before, Open) else 1
        obeys = self._told_s > now_s
        # Behind what was asked for, not at it: else all machines come back in one moment.
        wait_s = 0.0 if self._eager and not obeys else self._backoff.wait_s(failures, self._rng)
        self._enter(Open(max(now_s, self._told_s) + wait_s, failures, why, obeys=obeys))

    def _obey(self, now_s: float, why: str) -> None:
        """Keep to what was asked for in answer to a request of before; a probe that is out ends first."""
        match self._state:
            case Closed() if self._told_s > now_s:
                self._enter(self._asked(why))
            case Open(until_s) as state if until_s < self._told_s:
                until_s = self._told_s + self._backoff.wait_s(1, self._rng)
                self._state = replace(state, until_s=until_s, obeys=True)
            case Held(until_s) as state if until_s < self._told_s:
                self._state = replace(state, until_s=self._told_s)
            case _:
                pass

    def _asked(self, why: str) -> Open:
        until_s = self._told_s + self._backoff.wait_s(1, self._rng)
        return Open(until_s, 1, why, obeys=True)

    def hold(self, ticket: Ticket, now_s: float, why: str) -> None:
        """The agent is misconfigured: stop, and look again rarely."""
        if ticket.epoch == self._epoch:
            wait_s = self._hold_probe_s * self._rng.uniform(0.5, 1.0)
            self._enter(Held(max(now_s, self._told_s) + wait_s, why))

    def stands(self, ticket: Ticket) -> bool:
        """Return whether *ticket* still permits to send."""
        return ticket.epoch == self._epoch

    def cancel(self, ticket: Ticket, now_s: float) -> None:
        """The ticket's event was not sent after all; a probe may be taken again at once."""
        if ticket.epoch == self._epoch and isinstance(self._state, HalfOpen):
            self._enter(replace(self._state.since, until_s=now_s))

    def flush(self, now_s: float) -> None:
        """End the wait: the next event is sent as a probe now."""
        self._told_s = float("-inf")
        self._limit.forget()
        if isinstance(self._state, Open | Held):
            self._enter(replace(self._state, until_s=now_s))

    def adopt(self, backoff: Backoff, *, ceiling: int, hold_probe_s: float, now_s: float) -> None:
        """Go on by other terms, for another link: what waited is tried now.

        Answers to what is in flight do not count any more, nor does a probe that is out.
        """
        self._backoff, self._hold_probe_s = backoff, hold_probe_s
        self._told_s = float("-inf")
        self._limit.cap(ceiling)
        self._limit.forget()
        match self._state:
            case Closed():
                self._enter(Closed())
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
