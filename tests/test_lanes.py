"""In order within a user, no user waiting for another, all within the window: against a plain model."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.forward.lanes import PARKED, Lanes
from agent.outbox.records import Head

NEVER_S = 1e9


def head(seq: int, lane: int) -> Head:
    return Head(
        seq=seq,
        lane=lane,
        message_id=f"m{seq}",
        kind="track",
        attempts=0,
        failing_since_ms=None,
        body=b"{}",
    )


class Outbox:
    """What is pending, by seq, as a plain dict; and the two questions that are put to it."""

    def __init__(self, *users: int) -> None:
        self.pending: dict[int, Head] = {}
        self.last_seq = 0
        for user in users:
            self.append(user)

    def append(self, lane: int) -> None:
        self.last_seq += 1
        self.pending[self.last_seq] = head(self.last_seq, lane)

    def scan(self, *, after: int, limit: int) -> list[Head]:
        return [event for seq, event in sorted(self.pending.items()) if seq > after][:limit]

    def lane(self, lane: int, *, after: int, upto: int, limit: int) -> list[Head]:
        return [
            event
            for seq, event in sorted(self.pending.items())
            if event.lane == lane and after < seq <= upto
        ][:limit]


def read_on(lanes: Lanes, outbox: Outbox, *, limit: int) -> bool:
    """Read one starved lane on, as the forwarder does; return whether there was one."""
    starved = lanes.starved()
    if starved is None:
        return False
    lane, last_seq = starved
    heads = outbox.lane(lane, after=last_seq, upto=lanes.cursor, limit=limit)
    lanes.read_on(heads, complete=len(heads) < limit)
    return True


def fill(lanes: Lanes, outbox: Outbox, *, limit: int) -> None:
    """Read on wherever there is room, as the forwarder does before it takes."""
    while read_on(lanes, outbox, limit=limit):
        pass
    while lanes.room and (heads := outbox.scan(after=lanes.cursor, limit=lanes.room)):
        lanes.scanned(heads)


def taken(lanes: Lanes, now_s: float = 0.0) -> Head:
    found = lanes.take(now_s)
    assert found is not None
    return found


def sent_in_order(lanes: Lanes, outbox: Outbox, *, limit: int = 2, now_s: float = 0.0) -> list[int]:
    """Deliver all there is, one at a time; return the seqs as they went."""
    seqs: list[int] = []
    while True:
        fill(lanes, outbox, limit=limit)
        found = lanes.take(now_s)
        if found is None:
            return seqs
        lanes.done(found)
        del outbox.pending[found.seq]
        seqs.append(found.seq)


# --- one at a time of each user ----------------------------------------------------------------------


def test_the_next_event_of_a_user_waits_until_the_first_is_settled() -> None:
    lanes, outbox = Lanes(), Outbox(1, 1)
    fill(lanes, outbox, limit=2)
    first = taken(lanes)
    assert lanes.take(0.0) is None
    assert lanes.next_at_s() is None
    lanes.done(first)
    assert (first.seq, taken(lanes).seq) == (1, 2)


def test_users_take_turns() -> None:
    assert sent_in_order(Lanes(), Outbox(1, 1, 1, 2, 2, 3)) == [1, 4, 6, 2, 5, 3]


def test_all_users_are_in_flight_at_once() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 3, 1)
    fill(lanes, outbox, limit=2)
    assert [taken(lanes).seq for _ in range(3)] == [1, 2, 3]
    assert lanes.take(0.0) is None


def test_without_order_a_users_events_are_in_flight_together() -> None:
    lanes, outbox = Lanes(ordered=False), Outbox(1, 1, 1)
    fill(lanes, outbox, limit=2)
    first, second, third = (taken(lanes) for _ in range(3))
    assert [first.seq, second.seq, third.seq] == [1, 2, 3]
    for event in (third, first, second):
        lanes.done(event)
    assert lanes.size == 0


def test_what_was_behind_the_window_is_read_in_order() -> None:
    lanes = Lanes(window=4, per_lane=2)
    users = [1] * 9 + [2, 1, 2]
    seqs = sent_in_order(lanes, Outbox(*users))
    assert sorted(seqs) == list(range(1, 13))
    for user in (1, 2):
        own = [seq for seq in seqs if users[seq - 1] == user]
        assert own == sorted(own)
    assert (lanes.size, lanes.cursor) == (0, 12)


def test_an_event_appended_while_its_user_is_read_on_comes_last() -> None:
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(1, 1, 1, 1)
    fill(lanes, outbox, limit=2)
    lanes.done(taken(lanes))
    outbox.append(1)
    lanes.done(taken(lanes))
    del outbox.pending[1], outbox.pending[2]
    assert sent_in_order(lanes, outbox) == [3, 4, 5]


def test_what_left_the_outbox_unsent_is_passed_over() -> None:
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(1, 1, 1, 1, 1)
    fill(lanes, outbox, limit=2)
    del outbox.pending[3], outbox.pending[4]
    assert sent_in_order(lanes, outbox) == [1, 2, 5]


# --- again -------------------------------------------------------------------------------------------


def test_an_event_to_send_again_goes_behind_the_other_users_as_brought_up_to_date() -> None:
    lanes, outbox = Lanes(), Outbox(1, 1, 2)
    fill(lanes, outbox, limit=2)
    tried = replace(taken(lanes), attempts=1, failing_since_ms=5)
    lanes.again(tried, until_s=None)
    assert taken(lanes).seq == 3
    assert taken(lanes) == tried


def test_a_parked_user_waits_alone_and_keeps_its_order() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 1, 2, 1)
    fill(lanes, outbox, limit=2)
    lanes.again(taken(lanes), until_s=10.0)
    assert lanes.parked == 1
    outbox.append(1)
    assert sent_in_order(lanes, outbox, now_s=9.9) == [2, 4]
    assert lanes.next_at_s() == 10.0
    assert sent_in_order(lanes, outbox, now_s=10.0) == [1, 3, 5, 6]
    assert lanes.parked == 0


def test_the_user_parked_least_long_is_next() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 3)
    fill(lanes, outbox, limit=2)
    for until_s in (30.0, 10.0, 20.0):
        lanes.again(taken(lanes), until_s=until_s)
    assert lanes.next_at_s() == 10.0
    assert [taken(lanes, 100.0).seq for _ in range(3)] == [2, 3, 1]


def test_unpark_ends_every_wait() -> None:
    lanes, outbox = Lanes(), Outbox(*range(50))
    fill(lanes, outbox, limit=2)
    for n in range(50):
        lanes.again(taken(lanes), until_s=NEVER_S - n)
    lanes.unpark()
    assert lanes.next_at_s() == -inf
    lanes.again(taken(lanes), until_s=5.0)
    assert len(sent_in_order(lanes, outbox)) == 49
    assert lanes.next_at_s() == 5.0


@pytest.mark.parametrize("parked", [1, 4, 40])
def test_no_user_waits_for_parked_ones_however_many(parked: int) -> None:
    lanes = Lanes(window=4, per_lane=2)
    outbox = Outbox(*range(parked), *range(parked), 99, 99, 99)
    sent = []
    for _ in range(parked + 3):
        fill(lanes, outbox, limit=2)
        event = taken(lanes)
        if event.lane == 99:
            lanes.done(event)
            sent.append(event.seq)
        else:
            lanes.again(event, until_s=NEVER_S)
    assert sent == [2 * parked + 1, 2 * parked + 2, 2 * parked + 3]
    assert lanes.parked == parked


# --- bounds ------------------------------------------------------------------------------------------


def test_scanning_stops_at_the_window() -> None:
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(*range(100))
    fill(lanes, outbox, limit=2)
    assert (lanes.size, lanes.cursor, lanes.room) == (4, 4, 0)


def test_one_busy_user_does_not_fill_the_window() -> None:
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(*[1] * 1000, 2)
    fill(lanes, outbox, limit=2)
    assert lanes.size == 3
    assert {taken(lanes).seq, taken(lanes).seq} == {1, 1001}


def test_scanning_stops_when_too_many_users_are_parked() -> None:
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(*range(PARKED + 10))
    heads = outbox.scan(after=0, limit=PARKED + 10)
    for event in heads[: PARKED + 1]:
        assert lanes.room
        lanes.scanned([event])
        lanes.again(taken(lanes), until_s=1.0 if event.seq == 1 else NEVER_S)
    assert lanes.room == 0
    lanes.done(taken(lanes, 1.0))
    assert lanes.room


@pytest.mark.parametrize("users", [1, 7, 50])
def test_a_backlog_of_any_shape_stays_near_the_window(users: int) -> None:
    window, per_lane, each = 16, 4, 40
    lanes, outbox = Lanes(window=window, per_lane=per_lane), Outbox()
    for user in range(users):
        for _ in range(each):
            outbox.append(user)
    most = 0
    while outbox.pending:
        fill(lanes, outbox, limit=per_lane)
        most = max(most, lanes.size)
        event = taken(lanes)
        lanes.done(event)
        del outbox.pending[event.seq]
    assert most <= 2 * window


def test_users_that_were_parked_do_not_all_read_on_beyond_the_window() -> None:
    window, per_lane, users = 16, 4, 50
    lanes, outbox = Lanes(window=window, per_lane=per_lane), Outbox(*list(range(users)) * 10)
    for _ in range(users):
        fill(lanes, outbox, limit=per_lane)
        lanes.again(taken(lanes), until_s=NEVER_S)
    lanes.unpark()
    most = 0
    for _ in range(users):
        fill(lanes, outbox, limit=per_lane)
        most = max(most, lanes.size)
        event = taken(lanes)
        lanes.done(event)
        del outbox.pending[event.seq]
    # One event of each that was parked, and what one window holds.
    assert most <= users + 2 * window


# --- any history -------------------------------------------------------------------------------------

USERS = 5


class AnyHistory(RuleBasedStateMachine):
    """Appends, scans, sends and answers in any order; a dict knows what may be sent."""

    @initialize(
        window=st.integers(2, 4),
        per_lane=st.integers(2, 4),
        ordered=st.sampled_from([True, True, False]),
    )
    def begin(self, window: int, per_lane: int, ordered: bool) -> None:
        self.lanes = Lanes(ordered=ordered, window=window, per_lane=per_lane)
        self.outbox = Outbox()
        self.ordered = ordered
        self.per_lane = per_lane
        self.now_s = 0.0
        self.sending: dict[int, Head] = {}
        self.not_before_s: dict[int, float] = {}
        self.settled: set[int] = set()
        self.evicted: set[int] = set()

    def picked(self, data: st.DataObject) -> Head:
        return self.sending.pop(data.draw(st.sampled_from(sorted(self.sending))))

    def take(self) -> Head | None:
        event = self.lanes.take(self.now_s)
        if event is None:
            next_at_s = self.lanes.next_at_s()
            assert next_at_s is None or next_at_s > self.now_s
            return None
        assert event.seq not in self.settled, "sent again after it was settled"
        assert event.seq not in self.sending, "sent twice at once"
        assert self.not_before_s.get(event.seq, -inf) <= self.now_s, "sent before its wait was over"
        if self.ordered:
            assert event.lane not in {other.lane for other in self.sending.values()}
            before = [e for e in self.outbox.pending.values() if e.lane == event.lane]
            assert all(e.seq >= event.seq for e in before), "sent out of order"
        self.sending[event.seq] = event
        return event

    def settle(self, event: Head) -> None:
        self.lanes.done(event)
        self.settled.add(event.seq)
        self.outbox.pending.pop(event.seq, None)

    @rule(users=st.lists(st.integers(1, USERS), min_size=1, max_size=6))
    def append(self, users: list[int]) -> None:
        for user in users:
            self.outbox.append(user)

    @rule(limit=st.integers(1, 4))
    def scan(self, limit: int) -> None:
        limit = min(limit, self.lanes.room)
        self.lanes.scanned(self.outbox.scan(after=self.lanes.cursor, limit=limit))

    @rule(limit=st.integers(1, 4))
    def read_a_starved_lane_on(self, limit: int) -> None:
        read_on(self.lanes, self.outbox, limit=min(limit, self.per_lane))

    @rule()
    def send(self) -> None:
        self.take()

    @precondition(lambda self: self.sending)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.settle(self.picked(data))

    @precondition(lambda self: self.sending)
    @rule(data=st.data())
    def send_again_behind_the_others(self, data: st.DataObject) -> None:
        event = self.picked(data)
        self.lanes.again(replace(event, attempts=event.attempts + 1), until_s=None)

    @precondition(lambda self: self.sending)
    @rule(data=st.data(), wait_s=st.floats(0.0, 10.0))
    def park(self, data: st.DataObject, wait_s: float) -> None:
        event = self.picked(data)
        self.not_before_s[event.seq] = self.now_s + wait_s
        self.lanes.again(event, until_s=self.now_s + wait_s)

    @rule()
    def unpark(self) -> None:
        self.lanes.unpark()
        self.not_before_s.clear()

    @rule(wait_s=st.floats(0.0, 5.0))
    def pass_time(self, wait_s: float) -> None:
        self.now_s += wait_s

    @precondition(lambda self: self.outbox.pending)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.outbox.pending)))
        del self.outbox.pending[seq]
        self.evicted.add(seq)

    @invariant()
    def memory_is_counted_and_bounded(self) -> None:
        if not hasattr(self, "lanes"):
            return
        assert len(self.sending) <= self.lanes.size
        if self.ordered:
            assert self.lanes.size <= USERS * self.per_lane
            assert self.lanes.parked <= USERS
        if not self.outbox.pending and not self.sending and not self.evicted:
            assert self.lanes.size == 0

    def teardown(self) -> None:
        """Whatever happened, all there is goes out, and nothing stays in memory."""
        if not hasattr(self, "lanes"):
            return
        for event in list(self.sending.values()):
            del self.sending[event.seq]
            self.settle(event)
        self.now_s += 100.0
        for _ in range(2 * self.outbox.last_seq + 1):
            fill(self.lanes, self.outbox, limit=self.per_lane)
            event_or_none = self.take()
            if event_or_none is None:
                break
            del self.sending[event_or_none.seq]
            self.settle(event_or_none)
        assert not self.outbox.pending, "never sent"
        assert self.settled | self.evicted == set(range(1, self.outbox.last_seq + 1))
        assert (self.lanes.size, self.lanes.parked) == (0, 0)
        assert self.lanes.next_at_s() is None
        assert not self.lanes._lanes


# A busy machine draws slowly; that is no fault of what is tested.
AnyHistory.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyHistory = AnyHistory.TestCase


def test_what_was_passed_over_is_not_scanned_again() -> None:
    lanes = Lanes()
    lanes.scanned([], upto=500)
    lanes.scanned([head(600, 1)], upto=700)

    assert lanes.cursor == 700


def test_a_lane_is_read_on_behind_what_was_passed_over_until_it_is_complete() -> None:
    lanes = Lanes(per_lane=1)
    lanes.scanned([head(1, 1), head(9, 1)])
    lanes.done(taken(lanes))

    assert lanes.starved() == (1, 1)
    lanes.read_on([], complete=False, upto=5)
    assert lanes.starved() == (1, 5)
    lanes.read_on([head(9, 1)], complete=True, upto=9)
    assert lanes.starved() is None
    assert taken(lanes).seq == 9
