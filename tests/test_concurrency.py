"""How much is sent at once: what the limit does with answers, and what that comes to at a server.

The servers are simulated in virtual time; the policy is the agent's own, breaker and all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import pytest

from agent.forward.backoff import Backoff
from agent.forward.breaker import Breaker, Ticket
from agent.forward.concurrency import REST_MAX_S, Limit
from benchmarks.fleet import FixedInterval, Scenario, ours
from benchmarks.herd import Run, measure, of_size


class Always(random.Random):
    """Chance that is none: *drawn* every time, of 0 to 1."""

    def __init__(self, drawn: float) -> None:
        super().__init__(0)
        self.drawn = drawn

    def random(self) -> float:
        return self.drawn


def limit(ceiling: int = 8, drawn: float = 0.5) -> Limit:
    return Limit(ceiling, Always(drawn))


class Caller:
    """Sends through *of* as much as it admits, and tells it what each answer took."""

    def __init__(self, of: Limit) -> None:
        self.of = of
        self.now_s = 0.0

    def answer(self, took_s: float, *, events: int = 1, count: int = 1) -> Caller:
        for _ in range(count):
            self.now_s = max(self.now_s, self.of.rests_until_s or 0.0)
            in_flight = 0
            while self.of.admits(in_flight):
                in_flight += 1
            self.now_s += took_s
            self.of.answered(self.now_s, took_s=took_s, events=events, round_=self.of.round)
        return self

    def round(self, took_s: float, *, events: int = 1) -> float:
        """Answer until the limit begins a new round; return what it is then."""
        before = self.of.round
        while self.of.round == before:
            self.answer(took_s, events=events)
        return self.of.value

    def rest(self, took_s: float) -> float:
        """Answer once, and return the rest that follows."""
        self.answer(took_s)
        return max(0.0, (self.of.rests_until_s or 0.0) - self.now_s)


def grown(ceiling: int = 8, took_s: float = 0.1) -> Caller:
    caller = Caller(limit(ceiling))
    while caller.of.value < ceiling:
        caller.round(took_s)
    return caller


# --- increase and decrease ---------------------------------------------------------------------------


def test_each_quick_round_adds_one_up_to_the_ceiling() -> None:
    caller = Caller(limit(ceiling=5))
    assert [caller.round(0.1) for _ in range(6)] == [2, 3, 4, 5, 5, 5]


def test_a_limit_that_nobody_reached_is_not_raised() -> None:
    caller = grown(ceiling=8)
    caller.of.answered(0.0, took_s=1.0, events=1, round_=caller.of.round)
    while caller.of.value == 8:
        caller.round(1.0)
    before = caller.of.value
    for _ in range(50):
        caller.of.answered(0.0, took_s=0.1, events=1, round_=caller.of.round)
    assert caller.of.value == before


def test_a_slow_round_takes_away_a_part_and_once() -> None:
    caller = grown()
    round_ = caller.of.round
    for _ in range(8 + 7):  # all that were under way, and those sent before the first was answered
        caller.of.answered(caller.now_s, took_s=1.0, events=1, round_=round_)
    assert caller.of.value == pytest.approx(8 * 0.7)


def test_one_slow_answer_among_quick_ones_takes_nothing_away() -> None:
    caller = grown()
    caller.answer(10.0).answer(0.1, count=7)
    assert caller.of.value == 8


def test_refusals_of_one_round_take_away_half_once() -> None:
    caller = grown()
    round_ = caller.of.round
    assert [caller.of.refused(round_=round_) for _ in range(8)] == [0.0] * 8
    assert caller.of.value == 4


def test_a_batch_is_compared_with_batches_of_its_size() -> None:
    caller = Caller(limit())
    for _ in range(40):
        caller.answer(0.01, events=1).answer(0.2, events=100)
    assert caller.of.value == 8


# --- rests -------------------------------------------------------------------------------------------


def test_after_an_answer_twice_too_slow_one_at_a_time_rests() -> None:
    caller = Caller(limit(drawn=0.999))
    caller.answer(0.1)
    assert caller.rest(0.49) == 0.0  # 0.25 is borne
    assert caller.rest(0.51) == pytest.approx(0.51 * 1.499)


def test_the_slower_the_answer_the_more_machines_rest() -> None:
    def resting(took_s: float) -> int:
        count = 0
        for seed in range(1000):
            caller = Caller(Limit(8, random.Random(seed)))
            caller.answer(0.1)
            count += caller.rest(took_s) > 0
        return count

    assert resting(0.25) == 0
    assert 150 < resting(0.3) < 250
    assert 550 < resting(0.4) < 650
    assert resting(0.6) == 1000


def test_rests_in_vain_grow_longer_and_a_quick_answer_between_shortens_them() -> None:
    caller = Caller(limit())
    caller.answer(0.1)
    rests_s = [caller.rest(2.0) for _ in range(4)]
    assert rests_s == pytest.approx([2.0, 4.0, 8.0, 16.0])
    caller.answer(0.1)
    assert caller.rest(2.0) == pytest.approx(8.0)


def test_a_rest_is_bounded_by_the_answer_and_in_all() -> None:
    caller = Caller(limit())
    caller.answer(0.01)
    assert max(caller.rest(0.3) for _ in range(10)) == pytest.approx(0.3 * 64)
    caller = Caller(limit())
    caller.answer(0.1)
    assert max(caller.rest(25.0) for _ in range(10)) == pytest.approx(REST_MAX_S)


def test_rests_spread_so_that_machines_do_not_come_back_together() -> None:
    rests_s = []
    for seed in range(500):
        caller = Caller(Limit(8, random.Random(seed)))
        caller.answer(0.1)
        rests_s.append(caller.rest(10.0))
    assert 5.0 <= min(rests_s) < 5.5
    assert 14.5 < max(rests_s) <= 15.0


def test_nothing_is_said_to_rest_for_once_an_answer_comes_quickly() -> None:
    caller = Caller(limit())
    caller.answer(0.1).answer(5.0)
    assert caller.of.rests_until_s is not None
    caller.answer(0.1)
    assert caller.of.rests_until_s is None


# --- after a failure ---------------------------------------------------------------------------------


def test_after_a_failure_it_begins_with_one_at_a_time() -> None:
    caller = grown()
    caller.of.restart(caller.now_s, took_s=0.1, events=1)
    assert caller.of.value == 1
    assert caller.of.rests_until_s is None


def test_a_slow_probe_is_followed_by_a_rest() -> None:
    caller = grown()
    caller.of.restart(caller.now_s, took_s=10.0, events=1)
    assert caller.of.rests_until_s == pytest.approx(caller.now_s + 10.0)


def test_a_refused_bad_event_as_probe_tells_nothing_about_slowness() -> None:
    caller = grown()
    caller.of.restart(caller.now_s, took_s=10.0, events=0)
    assert caller.of.rests_until_s is None


def test_a_slow_server_or_thin_link_is_taken_for_usual_from_the_first_answer() -> None:
    limit = Limit(8, random.Random(1))
    for took_s, events in ((2.0, 1), (9.0, 200)):
        for _ in range(3):
            limit.answered(0.0, took_s=took_s, events=events, round_=limit.round)
            assert limit.rests_until_s is None


def test_who_begins_in_an_overload_does_not_take_it_for_normal() -> None:
    caller = Caller(limit())
    assert caller.rest(10.0) > 0


def test_an_outage_does_not_age_what_was_known() -> None:
    caller = grown(took_s=0.1)
    for _ in range(5):
        caller.now_s += 3600.0
        caller.of.restart(caller.now_s, took_s=0.6, events=1)
        assert caller.of.rests_until_s is not None


# --- one agent and its server ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """What one agent got from a server: answers a second, and what they took on average."""

    rate: float
    took_s: float


def alone(
    ceiling: int,
    service_s: Callable[[random.Random, float], float],
    *,
    workers: int,
    upto_s: float,
    since_s: float,
) -> Seen:
    """Run one agent with an endless backlog against *workers* that serve in turn."""
    rng = random.Random(1)
    backoff = Backoff(base_s=1.0, cap_s=300.0)
    link = Breaker(backoff, ceiling=ceiling, hold_probe_s=60.0, rng=rng)
    free_s = [0.0] * workers
    under_way: list[tuple[float, int, Ticket]] = []
    now_s, number, count, sum_s = 0.0, 0, 0, 0.0
    while now_s < upto_s:
        while (ticket := link.admit(now_s, in_flight=len(under_way))) is not None:
            number += 1
            done_s = max(now_s, heappop(free_s)) + service_s(rng, now_s)
            heappush(free_s, done_s)
            heappush(under_way, (done_s, number, ticket))
        if not under_way:
            opens_at_s = link.opens_at_s()
            assert opens_at_s is not None
            now_s = opens_at_s
            continue
        now_s, _, ticket = heappop(under_way)
        if now_s >= since_s:
            count += 1
            sum_s += now_s - ticket.sent_s
        link.succeed(ticket, now_s, delivered=1)
    return Seen(count / (upto_s - since_s), sum_s / count)


@pytest.mark.parametrize("ceiling", [8, 16, 64])
@pytest.mark.parametrize("workers", [1, 4, 8])
@pytest.mark.parametrize("service_s", [0.01, 0.05, 0.2])
def test_one_agent_uses_a_small_server_well_and_does_not_flatten_it(
    ceiling: int, workers: int, service_s: float
) -> None:
    def around(rng: random.Random, _: float) -> float:
        return service_s * rng.uniform(0.8, 1.2)

    seen = alone(ceiling, around, workers=workers, upto_s=60.0, since_s=20.0)
    assert seen.rate >= 0.9 * workers / service_s
    assert seen.took_s <= 2.5 * service_s + 0.05


def test_loopback_reaches_the_ceiling() -> None:
    seen = alone(64, lambda rng, _: rng.uniform(0.0002, 0.001), workers=64, upto_s=1.5, since_s=0.5)
    assert seen.rate >= 0.9 * 64 / 0.0006


def test_a_mobile_link_keeps_most_of_its_throughput_in_spite_of_its_jitter() -> None:
    seen = alone(8, lambda rng, _: rng.uniform(0.08, 0.3), workers=8, upto_s=900.0, since_s=30.0)
    assert seen.rate >= 0.8 * 8 / 0.19


def test_a_satellite_is_far_away_and_not_overloaded() -> None:
    seen = alone(8, lambda rng, _: rng.uniform(0.6, 0.7), workers=8, upto_s=300.0, since_s=60.0)
    assert seen.rate >= 0.9 * 8 / 0.65


@pytest.mark.parametrize(("service_s", "times"), [(0.05, 3), (0.05, 10), (0.2, 2), (0.2, 3)])
def test_an_upstream_that_is_slower_for_good_is_not_crawled_at_for_ever(
    service_s: float, times: float
) -> None:
    def later_slower(rng: random.Random, now_s: float) -> float:
        return service_s * rng.uniform(0.9, 1.1) * (times if now_s > 60 else 1)

    seen = alone(8, later_slower, workers=8, upto_s=6000.0, since_s=5940.0)
    assert seen.rate >= 0.9 * 8 / (times * service_s)


# --- the herd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noticed", [True, False])
def test_a_herd_that_comes_back_at_once_is_served_at_the_upstreams_capacity(
    *, noticed: bool
) -> None:
    found = measure(Run(name="agent", scenario=herd(noticed=noticed), policy=ours))
    assert found.drained_s is not None
    assert found.steady >= 0.9
    assert sum(found.seconds.timed_out) == 0


def test_the_same_herd_with_a_fixed_interval_keeps_the_upstream_down() -> None:
    found = measure(Run(name="naive", scenario=herd(), policy=FixedInterval))
    assert found.drained_s is None
    assert found.steady < 0.3
    assert sum(found.seconds.timed_out) > sum(found.seconds.stored) / 2


def herd(*, noticed: bool = True) -> Scenario:
    return replace(of_size(300, seed=1), noticed=noticed, event_every_s=60.0, horizon_s=700.0)
