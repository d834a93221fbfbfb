"""The breaker's states, and that it never lets out more, or sooner, than they allow."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.forward.backoff import Backoff
from agent.forward.breaker import FALTERS, Breaker, Closed, HalfOpen, Held, Open, State, Ticket
from agent.forward.concurrency import REST_MAX_S

CAP_S = 300.0
HOLD_PROBE_S = 60.0


def breaker(ceiling: int = 8, seed: int = 1) -> Breaker:
    return Breaker(
        Backoff(base_s=1.0, cap_s=CAP_S),
        ceiling=ceiling,
        hold_probe_s=HOLD_PROBE_S,
        rng=random.Random(seed),
    )


def admitted(link: Breaker, now_s: float = 0.0, in_flight: int = 0) -> Ticket:
    ticket = link.admit(now_s, in_flight=in_flight)
    assert ticket is not None
    return ticket


def succeed(link: Breaker, ticket: Ticket, took_s: float = 0.1, *, delivered: int = 1) -> None:
    link.succeed(ticket, ticket.sent_s + took_s, delivered=delivered)


def limit(link: Breaker, now_s: float = 0.0) -> int:
    """How many may be in flight."""
    return next(n for n in range(100) if link.admit(now_s, in_flight=n) is None)


def busy(link: Breaker, now_s: float = 0.0) -> list[Ticket]:
    """Return tickets for as many as may be in flight."""
    return [admitted(link, now_s, in_flight=n) for n in range(limit(link, now_s))]


def grown(ceiling: int = 8) -> Breaker:
    """Return a breaker that has come to its ceiling."""
    link = breaker(ceiling=ceiling)
    while link.limit < ceiling:
        for ticket in busy(link):
            succeed(link, ticket)
    return link


def failures(link: Breaker) -> int:
    """How many failures in a row an open breaker counts."""
    state = link.state
    assert isinstance(state, Open)
    return state.failures


def kind(link: Breaker) -> type[State]:
    return type(link.state)


def opened(link: Breaker) -> float:
    opens_at_s = link.opens_at_s()
    assert opens_at_s is not None
    return opens_at_s


# --- closed ------------------------------------------------------------------------------------------


def test_a_new_breaker_sends_one_event_and_no_more_beside_it() -> None:
    link = breaker()
    assert link.opens_at_s() is None
    assert not admitted(link).probe
    assert link.admit(0.0, in_flight=1) is None


def test_the_limit_rises_with_quick_answers_up_to_the_ceiling() -> None:
    link = breaker(ceiling=5)
    found = []
    for _ in range(20):
        found.append(limit(link))
        for ticket in busy(link):
            succeed(link, ticket)
    assert found == sorted(found)
    assert set(found) == {1, 2, 3, 4, 5}


def test_a_refused_bad_event_says_nothing_about_how_much_is_borne() -> None:
    link = breaker()
    for _ in range(50):
        succeed(link, admitted(link), delivered=0)
    assert link.limit == 1


def test_the_slow_answer_of_a_single_one_brings_a_rest() -> None:
    link = breaker()
    succeed(link, admitted(link))
    slow = admitted(link)
    succeed(link, slow, 5.0)
    assert kind(link) is Closed
    assert opened(link) > 5.0
    assert link.admit(opened(link) - 1e-6, in_flight=0) is None
    assert not admitted(link, opened(link)).probe


def test_a_ceiling_of_one_stays_one() -> None:
    link = breaker(ceiling=1)
    for _ in range(20):
        succeed(link, admitted(link))
        assert limit(link) == 1


# --- opening -----------------------------------------------------------------------------------------


def test_one_failure_stops_all_sending_until_the_wait_is_over() -> None:
    link = breaker()
    link.fail(admitted(link), 10.0, "refused")
    until_s = opened(link)
    assert link.state == Open(until_s, 1, "refused")
    assert 10.0 <= until_s <= 11.0
    assert link.admit(until_s - 1e-6, in_flight=0) is None
    assert admitted(link, until_s).probe


def test_the_wait_grows_with_failures_in_a_row_only() -> None:
    link = breaker()
    counts = []
    for _ in range(5):
        link.fail(admitted(link, 1e9), 1e9, "refused")
        counts.append(failures(link))
        link.flush(1e9)
    assert counts == [1, 2, 3, 4, 5]
    succeed(link, admitted(link, 1e9))
    link.fail(admitted(link, 1e9), 1e9, "refused")
    assert failures(link) == 1


def test_retry_after_is_the_least_that_is_waited_and_jitter_comes_behind() -> None:
    waits_s = set()
    for seed in range(50):
        link = breaker(seed=seed)
        link.fail(admitted(link), 0.0, "429", retry_after_s=120.0)
        waits_s.add(opened(link))
    assert all(120.0 <= wait_s <= 121.0 for wait_s in waits_s)
    assert len(waits_s) > 40


def test_5xx_in_a_row_are_the_links_and_one_alone_is_not() -> None:
    link = breaker()
    for _ in range(FALTERS - 1):
        link.falter(admitted(link), 0.0, "500")
        assert kind(link) is Closed
    link.falter(admitted(link), 0.0, "500")
    assert kind(link) is Open


def test_a_success_between_them_starts_the_count_of_5xx_anew() -> None:
    link = breaker()
    for _ in range(5 * FALTERS):
        link.falter(admitted(link), 0.0, "500")
        succeed(link, admitted(link))
    assert kind(link) is Closed


def test_the_count_of_5xx_starts_anew_after_an_outage() -> None:
    link = breaker()
    link.falter(admitted(link), 0.0, "500")
    link.fail(admitted(link), 0.0, "refused")
    succeed(link, admitted(link, 1e9))
    for _ in range(FALTERS - 1):
        link.falter(admitted(link, 1e9), 1e9, "500")
    assert kind(link) is Closed


# --- too much ----------------------------------------------------------------------------------------


def test_too_much_said_to_many_halves_the_limit_once_and_stops_nothing() -> None:
    link = grown(8)
    for ticket in busy(link):
        link.push_back(ticket, 0.1, "429")
    assert kind(link) is Closed
    assert link.limit == 4
    assert limit(link, 0.1) == 4


def test_too_much_said_to_a_single_one_opens() -> None:
    link = breaker()
    link.push_back(admitted(link), 0.1, "503")
    assert failures(link) == 1
    assert opened(link) > 0.1


def test_too_much_said_to_a_probe_opens_again() -> None:
    link = breaker()
    link.push_back(half_open(link), 1e9, "503")
    assert failures(link) == 2


def test_too_much_said_again_and_again_is_waited_for_longer_though_probes_pass() -> None:
    link = breaker()
    now_s, waits_s = 0.0, []
    for _ in range(10):
        link.push_back(admitted(link, now_s), now_s, "503")
        waits_s.append(opened(link) - now_s)
        succeed(link, admitted(link, opened(link)))
        now_s += waits_s[-1] + 0.1
    assert max(waits_s[:2]) < 2
    assert min(waits_s[-2:]) > 5


def test_what_was_in_flight_when_it_was_too_much_does_not_count_twice() -> None:
    link = breaker()
    first, *others = [admitted(link) for _ in range(10)]
    link.push_back(first, 0.0, "503")
    before = link.state
    for late in others:
        link.push_back(late, 0.1, "503")
    assert link.state == before
    succeed(link, admitted(link, 10.0))
    link.push_back(admitted(link, 11.0), 11.0, "503")
    assert opened(link) < 11.0 + 2.0, "the late ones made the wait longer"


# --- half open ---------------------------------------------------------------------------------------


def half_open(link: Breaker) -> Ticket:
    link.fail(admitted(link), 0.0, "refused")
    return admitted(link, 1e9)


def test_a_half_open_breaker_has_one_probe_out() -> None:
    link = breaker()
    assert half_open(link).probe
    assert kind(link) is HalfOpen
    assert link.opens_at_s() is None
    assert link.admit(1e12, in_flight=0) is None


def test_a_probe_that_succeeds_begins_again_at_one() -> None:
    link = breaker()
    succeed(link, half_open(link))
    assert link.state == Closed()
    assert link.limit == 1


def test_a_probe_answered_5xx_opens_again() -> None:
    link = breaker()
    link.falter(half_open(link), 1e9, "500")
    assert failures(link) == 2


def test_a_probe_that_was_not_sent_may_be_taken_again_at_once() -> None:
    link = breaker()
    link.cancel(half_open(link), 1e9)
    assert failures(link) == 1
    assert admitted(link, 1e9).probe


def test_a_probe_of_a_hold_that_was_not_sent_leaves_the_hold() -> None:
    link = breaker()
    link.hold(admitted(link), 0.0, "401")
    link.cancel(admitted(link, 1e9), 1e9)
    assert link.state == Held(1e9, "401")


def test_cancelling_an_ordinary_ticket_changes_nothing() -> None:
    link = breaker()
    link.cancel(admitted(link), 0.0)
    assert link.state == Closed()


# --- held --------------------------------------------------------------------------------------------


def test_a_misconfiguration_holds_and_is_probed_rarely() -> None:
    waits_s = set()
    for seed in range(50):
        link = breaker(seed=seed)
        link.hold(admitted(link), 100.0, "401")
        assert kind(link) is Held
        assert link.admit(opened(link) - 1e-6, in_flight=0) is None
        waits_s.add(opened(link) - 100.0)
        assert admitted(link, opened(link)).probe
    assert all(HOLD_PROBE_S / 2 <= wait_s <= HOLD_PROBE_S for wait_s in waits_s)
    assert len(waits_s) > 40


def test_a_probe_of_a_hold_ends_it_prolongs_it_or_finds_the_link_down() -> None:
    link = breaker()
    link.hold(admitted(link), 0.0, "401")
    link.hold(admitted(link, 1e6), 1e6, "still 401")
    assert kind(link) is Held
    assert opened(link) > 1e6
    link.fail(admitted(link, 2e6), 2e6, "refused")
    assert failures(link) == 1
    link.hold(admitted(link, 3e6), 3e6, "401")
    succeed(link, admitted(link, 4e6))
    assert link.state == Closed()
    assert link.limit == 1


# --- flush -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [Breaker.fail, Breaker.hold])
def test_flush_lets_one_probe_go_now(stop: object) -> None:
    link = breaker()
    if stop is Breaker.fail:
        link.fail(admitted(link), 0.0, "429", retry_after_s=3600.0)
    else:
        link.hold(admitted(link), 0.0, "401")
    assert link.admit(0.0, in_flight=0) is None
    link.flush(0.0)
    assert admitted(link).probe
    assert link.admit(0.0, in_flight=0) is None


def test_flush_forgets_no_failure() -> None:
    link = breaker()
    link.fail(admitted(link), 0.0, "refused")
    link.flush(0.0)
    link.fail(admitted(link), 0.0, "refused")
    assert failures(link) == 2


def test_another_network_ends_a_backoff_by_one_probe() -> None:
    link = breaker()
    link.fail(admitted(link), 100.0, "down")
    link.probe_early(100.1)
    assert admitted(link, 100.1).probe
    assert link.admit(100.1, in_flight=1) is None


def test_an_early_probe_that_fails_counts_as_any_other() -> None:
    link = breaker()
    link.fail(admitted(link), 100.0, "down")
    link.probe_early(100.1)
    link.fail(admitted(link, 100.1), 100.2, "down")
    assert failures(link) == 2
    assert link.admit(100.2, in_flight=0) is None


def test_another_network_does_not_shorten_the_wait_that_the_upstream_asked_for() -> None:
    link = breaker()
    link.fail(admitted(link), 100.0, "429", retry_after_s=60.0)
    link.probe_early(100.1)
    assert opened(link) >= 160.0


def test_a_backoff_after_one_that_the_upstream_asked_for_ends_early_again() -> None:
    link = breaker()
    link.fail(admitted(link), 100.0, "429", retry_after_s=60.0)
    link.fail(admitted(link, 1_000.0), 1_000.0, "down")
    link.probe_early(1_000.1)
    assert opened(link) == 1_000.1


def test_another_network_leaves_a_hold_to_the_person_who_must_mend_it() -> None:
    link = breaker()
    link.hold(admitted(link), 100.0, "401")
    until_s = opened(link)
    link.probe_early(100.1)
    assert opened(link) == until_s


def test_a_probe_that_was_out_when_the_network_changed_is_followed_by_another_at_once() -> None:
    link = breaker()
    link.fail(admitted(link), 100.0, "down")
    probe = admitted(link, 1_000.0)
    link.probe_early(1_000.5)
    link.fail(probe, 1_001.0, "down")
    again = admitted(link, 1_001.0)
    link.fail(again, 1_002.0, "down")
    assert opened(link) > 1_002.0


def adopt(link: Breaker, now_s: float, *, ceiling: int = 8) -> None:
    terms = Backoff(base_s=1.0, cap_s=CAP_S)
    link.adopt(terms, ceiling=ceiling, hold_probe_s=HOLD_PROBE_S, now_s=now_s)


@pytest.mark.parametrize("stop", [Breaker.fail, Breaker.hold])
def test_other_terms_let_one_probe_go_now(stop: Callable[..., None]) -> None:
    link = breaker()
    stop(link, admitted(link), 100.0, "why")
    adopt(link, 100.1)
    assert admitted(link, 100.1).probe


def test_a_probe_sent_before_other_terms_prolongs_no_hold() -> None:
    link = breaker()
    link.hold(admitted(link), 100.0, "401")
    late = admitted(link, 1_000.0)
    adopt(link, 1_000.5)
    link.hold(late, 1_001.0, "401")
    assert admitted(link, 1_001.0).probe


def test_what_was_in_flight_before_other_terms_stops_nothing() -> None:
    link = breaker()
    late = admitted(link)
    adopt(link, 100.0)
    link.hold(late, 100.1, "401")
    link.fail(late, 100.1, "down")
    assert kind(link) is Closed


def test_a_lower_ceiling_counts_at_once() -> None:
    link = breaker(ceiling=8)
    while limit(link) < 8:
        link.succeed(admitted(link, in_flight=int(limit(link)) - 1), 0.01, delivered=1)
    adopt(link, 100.0, ceiling=2)
    assert limit(link) == 2


def test_flush_changes_nothing_while_events_flow_or_a_probe_is_out() -> None:
    link = breaker()
    link.flush(0.0)
    assert kind(link) is Closed
    half_open(link)
    link.flush(1e9)
    assert kind(link) is HalfOpen
    assert link.admit(1e9, in_flight=0) is None


# --- what the upstream asks for ----------------------------------------------------------------------


def test_a_retry_after_to_a_request_of_before_the_break_is_obeyed_too() -> None:
    link = breaker(ceiling=8)
    early, late = admitted(link), Ticket(epoch=0, round=0, sent_s=0.0, probe=False)
    link.fail(early, 1.0, "cut")
    link.fail(late, 2.0, "429", retry_after_s=600.0)
    assert opened(link) >= 602.0
    assert link.admit(601.0, in_flight=0) is None
    assert not link.probe_early(3.0), "another network ends no wait that was asked for"


def test_what_was_asked_for_while_a_probe_was_out_holds_when_that_fails() -> None:
    link = breaker()
    before = admitted(link)
    link.fail(before, 0.0, "cut")
    probe = admitted(link, opened(link))
    assert probe.probe
    link.fail(before, probe.sent_s, "429", retry_after_s=600.0)
    link.fail(probe, probe.sent_s + 1, "cut")
    assert opened(link) >= probe.sent_s + 600.0


def test_flush_ends_what_was_asked_for() -> None:
    link = breaker()
    link.fail(admitted(link), 0.0, "429", retry_after_s=600.0)
    link.flush(1.0)
    probe = admitted(link, 1.0)
    link.fail(probe, 2.0, "cut")
    assert opened(link) < 600.0


def test_flush_ends_a_rest_too() -> None:
    link = breaker(ceiling=8)
    succeed(link, admitted(link), 0.05)
    now_s = 1.0
    while link.opens_at_s() is None:
        succeed(link, admitted(link, now_s), 60.0)
        now_s += 60.0
    assert link.admit(now_s, in_flight=0) is None
    link.flush(now_s)
    assert link.admit(now_s, in_flight=0) is not None


# --- stale tickets -----------------------------------------------------------------------------------


def test_answers_to_what_was_in_flight_when_the_link_broke_count_once() -> None:
    link = grown(8)
    first, *others = busy(link)
    link.fail(first, 0.0, "refused")
    before, until_s = link.state, opened(link)
    for n, ticket in enumerate(others):
        (link.fail, link.falter, link.hold)[n % 3](ticket, 500.0, "refused, too")
        link.push_back(ticket, 500.0, "429")
        succeed(link, ticket)
        link.cancel(ticket, 500.0)
    assert link.state == before
    assert opened(link) == until_s


def test_a_late_success_does_not_stand_in_for_the_probe() -> None:
    link = grown(2)
    first, late = busy(link)
    link.fail(first, 0.0, "refused")
    probe = admitted(link, 1e9)
    succeed(link, late)
    assert kind(link) is HalfOpen
    succeed(link, probe)
    assert link.state == Closed()
    assert link.limit == 1


def test_a_ticket_counts_once_for_its_state() -> None:
    link = breaker()
    probe = half_open(link)
    succeed(link, probe)
    link.fail(probe, 1e9, "refused")
    assert link.state == Closed()
    assert link.limit == 1


# --- any history -------------------------------------------------------------------------------------


class AnyHistory(RuleBasedStateMachine):
    """Sends, answers in any order, flushes and time, and what must hold whatever comes."""

    @initialize(ceiling=st.integers(1, 9), seed=st.integers())
    def begin(self, ceiling: int, seed: int) -> None:
        self.ceiling = ceiling
        self.now_s = 1000.0
        self.link = breaker(ceiling=ceiling, seed=seed)
        # What is in flight, and in which period between two changes of state it was sent.
        self.in_flight: list[tuple[Ticket, int]] = []
        self.period = 0
        self.probes = 0
        self.falters = 0
        self.closed_to_s = 0.0

    def answer(
        self, data: st.DataObject, tell: Callable[[Ticket], None], wait_s: tuple[float, float]
    ) -> bool:
        """Answer one that is in flight; return whether that counts. A wait it begins is in *wait_s*."""
        ticket, period = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.probes -= ticket.probe and period == self.period
        before, before_s = self.link.state, self.link.opens_at_s()
        tell(ticket)
        if period != self.period:
            assert self.link.state == before, "a late answer counted"
            assert self.link.opens_at_s() == before_s, "a late answer brought a rest"
            return False
        if type(self.link.state) is not type(before):
            self.changed()
        until_s = self.link.opens_at_s()
        if until_s is not None and until_s != before_s:
            least_s, most_s = wait_s
            assert least_s - 1e-6 <= until_s - self.now_s <= most_s + 1e-6
            self.closed_to_s = until_s
        return True

    def changed(self) -> None:
        self.period += 1
        self.falters = 0

    @rule(wait_s=st.one_of(st.floats(0.0, 2.0), st.floats(0.0, 5000.0)))
    def pass_time(self, wait_s: float) -> None:
        self.now_s += wait_s

    @rule()
    def pass_time_to_the_instant(self) -> None:
        self.now_s = max(self.now_s, self.link.opens_at_s() or 0.0)

    @rule(most=st.integers(1, 9))
    def send(self, most: int) -> None:
        for _ in range(most):
            ticket = self.link.admit(self.now_s, in_flight=len(self.in_flight))
            if ticket is None:
                return
            assert self.now_s >= self.closed_to_s, "admitted before the wait was over"
            assert not self.probes, "admitted beside a probe"
            if ticket.probe:
                self.probes += 1
                self.changed()
            else:
                assert len(self.in_flight) < self.ceiling
            self.in_flight.append((ticket, self.period))

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), delivered=st.sampled_from([0, 1, 100]))
    def succeed(self, data: st.DataObject, delivered: int) -> None:
        def tell(ticket: Ticket) -> None:
            self.link.succeed(ticket, self.now_s, delivered=delivered)

        if self.answer(data, tell, (0.0, REST_MAX_S * 1.5)):
            assert type(self.link.state) is Closed
            self.falters = 0

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def push_back(self, data: st.DataObject) -> None:
        alone = self.probes or self.link.limit <= 1

        def tell(ticket: Ticket) -> None:
            self.link.push_back(ticket, self.now_s, "429")

        if self.answer(data, tell, (0.0, REST_MAX_S * 1.5 + CAP_S)):
            assert type(self.link.state) is (Open if alone else Closed)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def falter(self, data: st.DataObject) -> None:
        enough = self.probes or self.falters + 1 >= FALTERS
        if self.answer(
            data, lambda ticket: self.link.falter(ticket, self.now_s, "500"), (0, CAP_S)
        ):
            assert type(self.link.state) is (Open if enough else Closed)
            self.falters = 0 if enough else self.falters + 1

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), retry_after_s=st.one_of(st.none(), st.floats(0.0, 3600.0)))
    def fail(self, data: st.DataObject, retry_after_s: float | None) -> None:
        def tell(ticket: Ticket) -> None:
            self.link.fail(ticket, self.now_s, "refused", retry_after_s=retry_after_s)

        asked_s = retry_after_s or 0.0
        if self.answer(data, tell, (asked_s, asked_s + CAP_S)):
            assert type(self.link.state) is Open

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        wait_s = (HOLD_PROBE_S / 2, HOLD_PROBE_S)
        if self.answer(data, lambda ticket: self.link.hold(ticket, self.now_s, "401"), wait_s):
            assert type(self.link.state) is Held

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.answer(data, lambda ticket: self.link.cancel(ticket, self.now_s), (0.0, 0.0))

    @rule()
    def flush(self) -> None:
        before = self.link.state
        self.link.flush(self.now_s)
        assert type(self.link.state) is type(before)
        self.closed_to_s = min(self.closed_to_s, self.now_s)

    @invariant()
    def one_probe_at_most(self) -> None:
        if hasattr(self, "link"):
            assert self.probes == isinstance(self.link.state, HalfOpen)

    @invariant()
    def the_limit_is_within_the_ceiling(self) -> None:
        if hasattr(self, "link") and isinstance(self.link.state, Closed):
            assert 1 <= self.link.limit <= self.ceiling

    @invariant()
    def waiting_ends_at_a_known_instant(self) -> None:
        if hasattr(self, "link"):
            match self.link.state:
                case Open() | Held():
                    assert self.link.opens_at_s() is not None
                case HalfOpen():
                    assert self.link.opens_at_s() is None
                case Closed():  # it may rest
                    pass

    def teardown(self) -> None:
        """Whatever happened: time, and one good answer, let events flow again."""
        if hasattr(self, "link"):
            for ticket, _ in self.in_flight:
                self.link.cancel(ticket, self.now_s)
            succeed(self.link, admitted(self.link, self.now_s + CAP_S + 3600.0))
            assert isinstance(self.link.state, Closed)


# A busy machine draws slowly; that is no fault of what is tested.
AnyHistory.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyHistory = AnyHistory.TestCase
