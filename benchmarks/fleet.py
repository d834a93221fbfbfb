"""A fleet and its upstream in virtual time: what many agents do to one server, request by request.

Discrete events in a heap, one seed, no clock and no socket: the same run gives the same figures on any
machine. The policy is the agent's own code (`agent.forward.breaker`), one for each machine of the
fleet; what stands in for the rest of the agent is `Machine`, and for the server `Upstream`.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Protocol

from agent.forward.backoff import Backoff
from agent.forward.breaker import Breaker, Ticket
from agent.settings import Forward
from agent.settings import Upstream as UpstreamSettings

TIMEOUT_S: float = UpstreamSettings().timeout

_UNREACHABLE_S = 1.0
"""How long a machine without a link takes to find that an attempt fails."""


class Policy(Protocol):
    """What a machine asks before it sends, and tells after: `Breaker`, or what it is compared with."""

    def opens_at_s(self) -> float | None: ...
    def admit(self, now_s: float, *, in_flight: int) -> Ticket | None: ...
    def succeed(self, ticket: Ticket, now_s: float, *, delivered: int) -> None: ...
    def push_back(self, ticket: Ticket, now_s: float, why: str) -> None: ...
    def fail(
        self, ticket: Ticket, now_s: float, why: str, *, retry_after_s: float | None = None
    ) -> None: ...
    def probe_early(self, now_s: float) -> object: ...


def ours(rng: random.Random) -> Policy:
    """Return the agent's own policy, as it is configured by default."""
    plan = Forward()
    return Breaker(
        Backoff(base_s=plan.backoff_base, cap_s=plan.backoff_max),
        ceiling=plan.concurrency,
        hold_probe_s=plan.hold_probe,
        rng=rng,
    )


class FixedInterval:
    """What is often written first: after a failure wait 10 s and try again, after a success all at once."""

    INTERVAL_S = 10.0

    def __init__(self, rng: random.Random) -> None:
        del rng  # it has no use for chance, and that is part of what is wrong with it
        self._most = Forward().concurrency
        self._up = True
        self._until_s = -inf
        self._ticket = Ticket(0, 0, 0.0, probe=False)

    def opens_at_s(self) -> float | None:
        return self._until_s

    def admit(self, now_s: float, *, in_flight: int) -> Ticket | None:
        most = self._most if self._up else 1
        return self._ticket if now_s >= self._until_s and in_flight < most else None

    def succeed(self, ticket: Ticket, now_s: float, *, delivered: int) -> None:
        del ticket, now_s, delivered
        self._up = True

    def push_back(self, ticket: Ticket, now_s: float, why: str) -> None:
        self.fail(ticket, now_s, why)

    def fail(
        self, ticket: Ticket, now_s: float, why: str, *, retry_after_s: float | None = None
    ) -> None:
        del ticket, why
        self._up = False
        self._until_s = now_s + max(self.INTERVAL_S, retry_after_s or 0.0)

    def probe_early(self, now_s: float) -> None:
        """It knows no such thing; the next attempt comes within its interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the upstream can do. *capacity* is the most that it completes in a second.

    Requests under way share it. How much of it they get follows the universal scalability law (Gunther,
    "Guerrilla Capacity Planning", 2007), which fits measured servers: n at once complete

        n / service_s / (1 + contention * (n - 1) + coherency * n * (n - 1))

    requests a second. *contention* is what has to take turns (a log, a lock); *coherency* is what each has
    to do for each other one (caches, context switches, a database's list of transactions), which is
    why the curve falls behind its peak.
    """

    capacity: float = 2000.0
    service_s: float = 0.05
    best_at_once: int = 400
    """With how many at once the capacity is reached."""
    at_once: int = 8192
    """How many connections it takes; more wait."""
    waiting: int = 4096
    """How many wait to be accepted (Linux' net.core.somaxconn); more are refused."""
    sheds_over: int | None = None
    """Over so many at once it answers 503, if it does such a thing."""
    retry_after_s: float | None = None
    refusal_cost: float = 0.05
    """What a 503 costs it, in requests: the connection and the headers have been read."""

    def rate(self, n: int) -> float:
        """Return how many requests a second *n* at once complete."""
        m = self.best_at_once
        coherency = 1 / m**2
        contention = (m / self.service_s / self.capacity - 2) / m
        return n / self.service_s / (1 + contention * (n - 1) + coherency * n * (n - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What happens to the fleet. Times in seconds; the link is back at 0."""

    machines: int = 10_000
    event_every_s: float = 20.0
    outage_s: float = 3600.0
    normal_s: float = 120.0
    """How long all is well before the outage; 0: the agents start without a link."""
    horizon_s: float = 2400.0
    noticed: bool = True
    """Whether the machines notice the link (netlink) and probe at once, all in the same second."""
    server: Server = field(default_factory=Server)
    seed: int = 1


class Seconds:
    """What was counted in each of *count* seconds from the return on."""

    def __init__(self, count: int) -> None:
        def none() -> array[int]:
            return array("q", [0]) * count

        self.offered = none()
        self.stored = none()
        """Distinct events: the goodput."""
        self.duplicates = none()
        """Stored again, for nobody had waited for the first answer."""
        self.timed_out = none()
        self.refused = none()
        self.answers = none()
        self.at_once = none()
        """Requests at the upstream, under way or in line, when the second begins."""
        self.pending = none()
        """Events of all machines that are not stored, when the second begins."""


class Machine:
    """One agent: its policy, its events by number, and what is under way."""

    __slots__ = ("_again", "_every_s", "_taken", "first_s", "ghosts", "in_flight", "policy", "rtt_s", "wakes_s")  # fmt: skip

    def __init__(self, policy: Policy, *, first_s: float, every_s: float, rtt_s: float) -> None:
        self.policy = policy
        self.first_s = first_s
        self.rtt_s = rtt_s
        self.in_flight = 0
        self.wakes_s = inf
        self.ghosts: set[int] = set()
        """Events that are stored, and whose sender does not know."""
        self._every_s = every_s
        self._taken = 0
        self._again: deque[int] = deque()

    def next_s(self) -> float:
        """Return from when there is an event to send."""
        return -inf if self._again else self.first_s + self._taken * self._every_s

    def take(self) -> int:
        if self._again:
            return self._again.popleft()
        self._taken += 1
        return self._taken - 1

    def give_back(self, event: int) -> None:
        self._again.append(event)


class Request:
    __slots__ = ("event", "gone", "machine", "sent_s", "ticket")

    def __init__(self, machine: Machine, event: int, ticket: Ticket, sent_s: float) -> None:
        self.machine = machine
        self.event = event
        self.ticket = ticket
        self.sent_s = sent_s
        self.gone = False
        """Nobody waits for the answer any more: it was taken in, or it took too long."""


class Upstream:
    """The server at work: requests under way share its rate evenly, others wait in line.

    Work is counted in what each one under way has got since the start; so one heap says who is next.
    """

    def __init__(self, server: Server, rng: random.Random) -> None:
        self._server = server
        self._rng = rng
        self._share = [0.0] + [server.rate(n) / n for n in range(1, server.at_once + 1)]
        self._got = 0.0
        self._at_s = 0.0
        self._debt_s = 0.0
        self._number = 0
        self._under_way: list[tuple[float, int, Request]] = []
        self._line: deque[Request] = deque()
        self.next_s = inf
        """When the next one is complete, if nothing else comes."""

    @property
    def at_once(self) -> int:
        return len(self._under_way) + len(self._line)

    def arrive(self, now_s: float, request: Request) -> int:
        """Return 0 if the request is taken in, 503, or 1 if the connection is refused."""
        server, at_once = self._server, len(self._under_way)
        if server.sheds_over is not None and at_once >= server.sheds_over:
            self._pass_to(now_s)
            self._debt_s += server.refusal_cost / server.capacity
            self._foresee()
            return 503
        if at_once < server.at_once:
            self._pass_to(now_s)
            self._begin(request)
            self._foresee()
            return 0
        if len(self._line) < server.waiting:
            self._line.append(request)
            return 0
        return 1

    def complete(self) -> Request:
        """Return the request that is complete at `next_s`."""
        now_s = self.next_s
        got, _, request = heappop(self._under_way)
        self._got, self._at_s, self._debt_s = got, now_s, 0.0
        if self._line:
            self._begin(self._line.popleft())
        self._foresee()
        return request

    def _begin(self, request: Request) -> None:
        self._number += 1
        work = 0.5 + self._rng.random()
        heappush(self._under_way, (self._got + work, self._number, request))

    def _pass_to(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if self._debt_s:
            paid_s = min(self._debt_s, passed_s)
            self._debt_s -= paid_s
            passed_s -= paid_s
        self._got += passed_s * self._share[len(self._under_way)]
        self._at_s = now_s

    def _foresee(self) -> None:
        under_way = self._under_way
        if under_way:
            left = under_way[0][0] - self._got
            self.next_s = self._at_s + self._debt_s + max(left, 0.0) / self._share[len(under_way)]
        else:
            self.next_s = inf


_WAKE, _ANSWER, _REFUSED, _SHED, _LOST, _LINK = range(6)


class Fleet:
    """All of it, run by `run`."""

    def __init__(self, scenario: Scenario, policy: Callable[[random.Random], Policy]) -> None:
        self._scenario = scenario
        self._rng = rng = random.Random(scenario.seed)
        self._upstream = Upstream(scenario.server, rng)
        self._start_s = -scenario.outage_s - scenario.normal_s
        self._link = scenario.normal_s > 0
        self._now_s = self._start_s
        self._number = 0
        self._queue: list[tuple[float, int, int, object]] = []
        self._waiting: deque[Request] = deque()
        every_s = scenario.event_every_s
        self.machines = [
            Machine(
                policy(rng),
                first_s=self._start_s + rng.uniform(0.0, every_s),
                every_s=every_s,
                rtt_s=rng.uniform(0.01, 0.08),
            )
            for _ in range(scenario.machines)
        ]
        self.seconds = Seconds(int(scenario.horizon_s) + 1)
        self._stored = 0
        self.took_s = array("d")
        """Of each answer since the return."""

    def run(self) -> None:
        """Run until the backlog of the outage is stored and the machines are as before, or the horizon."""
        for machine in self.machines:
            self._at(machine.first_s, _WAKE, machine)
            machine.wakes_s = machine.first_s
        if self._link:
            self._at(-self._scenario.outage_s, _LINK, False)
        self._at(0.0, _LINK, True)
        queue, upstream, waiting = self._queue, self._upstream, self._waiting
        second, horizon_s = 0, self._scenario.horizon_s
        while True:
            due_s = min(queue[0][0], upstream.next_s)
            if waiting and waiting[0].sent_s + TIMEOUT_S <= due_s:
                self._give_up(waiting.popleft())
                continue
            if due_s >= second:
                if due_s >= horizon_s or (second > 1 and self._is_drained(second)):
                    return
                self._note(second)
                second += 1
                continue
            self._now_s = due_s
            if upstream.next_s <= queue[0][0]:
                self._completed(upstream.complete())
                continue
            _, _, kind, what = heappop(queue)
            self._happens(kind, what)

    def _is_drained(self, second: int) -> bool:
        """Whether no more is pending than in normal times: what comes in three seconds."""
        self._note(second)
        return self.seconds.pending[second] <= 3 * len(self.machines) / self._scenario.event_every_s

    def _note(self, second: int) -> None:
        passed = (second - self._start_s) / self._scenario.event_every_s
        self.seconds.pending[second] = round(passed * len(self.machines)) - self._stored
        self.seconds.at_once[second] = self._upstream.at_once

    def _at(self, at_s: float, kind: int, what: object) -> None:
        self._number += 1
        heappush(self._queue, (at_s, self._number, kind, what))

    def _happens(self, kind: int, what: object) -> None:
        if isinstance(what, Machine):
            if what.wakes_s == self._now_s:
                what.wakes_s = inf
            if kind == _LINK:
                what.policy.probe_early(self._now_s)
            self._send(what)
        elif isinstance(what, Request):
            self._answered(kind, what)
        else:
            self._link = bool(what)
            if what and self._scenario.noticed:
                for machine in self.machines:
                    self._at(self._rng.random(), _LINK, machine)

    # --- a machine ---

    def _send(self, machine: Machine) -> None:
        now_s, policy = self._now_s, machine.policy
        while True:
            due_s = machine.next_s()
            opens_at_s = policy.opens_at_s()
            if opens_at_s is not None and opens_at_s > due_s:
                due_s = opens_at_s
            if due_s > now_s:
                if due_s < machine.wakes_s:
                    machine.wakes_s = due_s
                    self._at(due_s, _WAKE, machine)
                return
            ticket = policy.admit(now_s, in_flight=machine.in_flight)
            if ticket is None:
                return
            machine.in_flight += 1
            self._offer(Request(machine, machine.take(), ticket, now_s))

    def _offer(self, request: Request) -> None:
        now_s = self._now_s
        if not self._link:
            self._at(now_s + _UNREACHABLE_S, _LOST, request)
            return
        if now_s >= 0:
            self.seconds.offered[int(now_s)] += 1
        match self._upstream.arrive(now_s, request):
            case 0:
                self._waiting.append(request)
            case 1:
                self._at(now_s + request.machine.rtt_s, _REFUSED, request)
            case _:
                self._at(now_s + request.machine.rtt_s, _SHED, request)

    def _completed(self, request: Request) -> None:
        machine = request.machine
        counts = self.seconds
        if request.event in machine.ghosts:
            if self._now_s >= 0:
                counts.duplicates[int(self._now_s)] += 1
        else:
            self._stored += 1
            if self._now_s >= 0:
                counts.stored[int(self._now_s)] += 1
            machine.ghosts.add(request.event)
        if not request.gone:
            self._at(self._now_s + machine.rtt_s, _ANSWER, request)

    def _answered(self, kind: int, request: Request) -> None:
        if request.gone:
            return
        request.gone = True
        machine, now_s, ticket = request.machine, self._now_s, request.ticket
        machine.in_flight -= 1
        if kind == _ANSWER and self._link:
            machine.ghosts.discard(request.event)
            took_s = now_s - request.sent_s
            if now_s >= 0:
                self.took_s.append(took_s)
                self.seconds.answers[int(now_s)] += 1
            machine.policy.succeed(ticket, now_s, delivered=1)
            self._send(machine)
            return
        machine.give_back(request.event)
        if kind in {_REFUSED, _SHED} and now_s >= 0:
            self.seconds.refused[int(now_s)] += 1
        retry_after_s = self._scenario.server.retry_after_s
        if kind == _SHED and retry_after_s is None:
            machine.policy.push_back(ticket, now_s, "503")
        else:
            asked_s = retry_after_s if kind == _SHED else None
            machine.policy.fail(ticket, now_s, "no answer", retry_after_s=asked_s)
        self._send(machine)

    def _give_up(self, request: Request) -> None:
        if request.gone:
            return
        self._now_s = now_s = request.sent_s + TIMEOUT_S
        if now_s >= 0:
            self.seconds.timed_out[int(now_s)] += 1
        self._answered(_LOST, request)
