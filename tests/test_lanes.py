"""In order within a user, no user waiting for another, all within the window: against a plain model."""

from __future__ import annotations

from itertools import chain
from math import inf

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.forward.claims import Claim
from agent.forward.lanes import ITEM_BYTES, ONE, PARKED, Fit, Gap, Lanes
from agent.outbox.records import Head

NEVER_S = 1e9


def head(seq: int, lane: int, *, urgent: bool = False) -> Head:
    return Head(
        seq=seq,
        lane=lane,
        message_id=f"m{seq}",
        kind="track",
        attempts=0,
        failing_since_ms=None,
        body_bytes=2,
        body=b"{}",
        urgent=int(urgent),
    )


class Outbox:
    """What is pending, by seq, as a plain dict; and the two questions that are put to it."""

    def __init__(self, *users: int) -> None:
        self.pending: dict[int, Head] = {}
        self.last_seq = 0
        for user in users:
            self.append(user)

    def append(self, lane: int, *, urgent: bool = False) -> None:
        self.last_seq += 1
        self.pending[self.last_seq] = head(self.last_seq, lane, urgent=urgent)

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
    gap = lanes.starved()
    if gap is None:
        return False
    heads = outbox.lane(gap.user, after=gap.after, upto=gap.upto, limit=limit)
    lanes.read_on(gap, heads, complete=len(heads) < limit)
    return True


def fill(lanes: Lanes, outbox: Outbox, *, limit: int) -> None:
    """Read on wherever there is room, as the forwarder does before it takes."""
    while read_on(lanes, outbox, limit=limit):
        pass
    while room := lanes.room:
        heads = outbox.scan(after=lanes.cursor, limit=room)
        lanes.scanned(heads, complete=len(heads) < room)
        if len(heads) < room:
            return


def taken(lanes: Lanes, now_s: float = 0.0, *, fit: Fit = ONE) -> Claim:
    found = lanes.take(now_s, fit=fit)
    assert found is not None
    return found


def seq(claim: Claim) -> int:
    (event,) = claim.heads
    return event.seq


def seqs_of(claim: Claim) -> list[int]:
    return [event.seq for event in claim.heads]


def sent_in_order(lanes: Lanes, outbox: Outbox, *, limit: int = 2, now_s: float = 0.0) -> list[int]:
    """Deliver all there is, one at a time; return the seqs as they went."""
    seqs: list[int] = []
    while True:
        fill(lanes, outbox, limit=limit)
        found = lanes.take(now_s)
        if found is None:
            return seqs
        lanes.done(found.heads)
        del outbox.pending[seq(found)]
        seqs.append(seq(found))


# --- one at a time of each user ----------------------------------------------------------------------


def test_the_next_event_of_a_user_waits_until_the_first_is_settled() -> None:
    lanes, outbox = Lanes(), Outbox(1, 1)
    fill(lanes, outbox, limit=2)
    first = taken(lanes)
    assert lanes.take(0.0) is None
    assert lanes.next_at_s() is None
    lanes.done(first.heads)
    assert (seq(first), seq(taken(lanes))) == (1, 2)


def test_users_take_turns() -> None:
    assert sent_in_order(Lanes(), Outbox(1, 1, 1, 2, 2, 3)) == [1, 4, 6, 2, 5, 3]


def test_all_users_are_in_flight_at_once() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 3, 1)
    fill(lanes, outbox, limit=2)
    assert [seq(taken(lanes)) for _ in range(3)] == [1, 2, 3]
    assert lanes.take(0.0) is None


def test_without_order_a_users_events_are_in_flight_together() -> None:
    lanes, outbox = Lanes(ordered=False), Outbox(1, 1, 1)
    fill(lanes, outbox, limit=2)
    first, second, third = (taken(lanes) for _ in range(3))
    assert [seq(first), seq(second), seq(third)] == [1, 2, 3]
    for claim in (third, first, second):
        lanes.done(claim.heads)
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
    lanes.done(taken(lanes).heads)
    outbox.append(1)
    lanes.done(taken(lanes).heads)
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
    claim = taken(lanes)
    event = msgspec.structs.replace(claim.heads[0], attempts=1, failing_since_ms=5)
    tried = msgspec.structs.replace(claim, heads=(event,))
    lanes.again(tried, until_s=None)
    assert seq(taken(lanes)) == 3
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
    assert [seq(taken(lanes, 100.0)) for _ in range(3)] == [2, 3, 1]


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
        claim = taken(lanes)
        if claim.heads[0].lane == 99:
            lanes.done(claim.heads)
            sent.append(seq(claim))
        else:
            lanes.again(claim, until_s=NEVER_S)
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
    assert {seq(taken(lanes)), seq(taken(lanes))} == {1, 1001}


def test_scanning_stops_when_too_many_users_are_parked() -> None:
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(*range(PARKED + 10))
    heads = outbox.scan(after=0, limit=PARKED + 10)
    for event in heads[: PARKED + 1]:
        assert lanes.room
        lanes.scanned([event], complete=False)
        lanes.again(taken(lanes), until_s=1.0 if event.seq == 1 else NEVER_S)
    assert lanes.room == 0
    lanes.done(taken(lanes, 1.0).heads)
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
        claim = taken(lanes)
        lanes.done(claim.heads)
        del outbox.pending[seq(claim)]
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
        claim = taken(lanes)
        lanes.done(claim.heads)
        del outbox.pending[seq(claim)]
    # One event of each that was parked, and what one window holds.
    assert most <= users + 2 * window


# --- several at once ---------------------------------------------------------------------------------

MANY = Fit(events=100, batch_bytes=1 << 20)


def test_a_batch_holds_what_waits_each_users_events_in_order() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 1, 2, 3)
    fill(lanes, outbox, limit=2)
    assert seqs_of(taken(lanes, fit=MANY)) == [1, 3, 2, 4, 5]
    assert lanes.take(0.0, fit=MANY) is None


def test_a_batch_ends_at_its_count_and_the_rest_of_its_last_user_waits() -> None:
    lanes, outbox = Lanes(), Outbox(1, 1, 2, 2, 3)
    fill(lanes, outbox, limit=2)
    first = taken(lanes, fit=Fit(events=3, batch_bytes=1 << 20))
    assert seqs_of(first) == [1, 2, 3]
    assert seqs_of(taken(lanes, fit=MANY)) == [5]
    lanes.done(first.heads)
    assert seqs_of(taken(lanes, fit=MANY)) == [4]


def test_a_batch_ends_at_its_bytes_but_takes_a_first_event_of_any_size() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 3)
    fill(lanes, outbox, limit=2)
    two = Fit(events=100, batch_bytes=2 * (2 + ITEM_BYTES))
    assert seqs_of(taken(lanes, fit=two)) == [1, 2]
    assert seqs_of(taken(lanes, fit=Fit(events=100, batch_bytes=0))) == [3]


def test_a_batch_to_send_again_keeps_its_members() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2)
    fill(lanes, outbox, limit=2)
    claim = taken(lanes, fit=MANY)
    outbox.append(1)
    outbox.append(3)
    fill(lanes, outbox, limit=2)
    lanes.again(claim, until_s=None)
    assert seqs_of(taken(lanes, fit=MANY)) == [4]
    assert taken(lanes, fit=MANY) == claim


def split_in_turn(lanes: Lanes, claim: Claim, bad: int) -> list[list[int]]:
    """Send *claim* to an upstream that refuses *bad*, and any batch with it; return what was sent."""
    sent = [seqs_of(claim)]
    while True:
        if bad not in seqs_of(claim) or len(claim.heads) == 1:
            lanes.done(claim.heads)
        else:
            lanes.split(claim, at=None)
        found = lanes.take(0.0, fit=MANY)
        if found is None:
            return sent
        claim = found
        sent.append(seqs_of(claim))


@pytest.mark.parametrize("bad", [1, 4, 9])
@pytest.mark.parametrize("users", [[1] * 9, [1, 2, 3] * 3, list(range(9))])
def test_one_bad_event_is_found_and_each_other_sent_in_order(users: list[int], bad: int) -> None:
    lanes, outbox = Lanes(), Outbox(*users)
    fill(lanes, outbox, limit=100)
    sent = split_in_turn(lanes, taken(lanes, fit=MANY), bad)
    passed = [each for each in sent if bad not in each]
    assert sorted(chain.from_iterable(passed)) == [n for n in range(1, 10) if n != bad]
    assert [bad] in sent
    for user in set(users):
        own = [n for n in chain.from_iterable(passed) if users[n - 1] == user]
        assert own == sorted(own)


def test_a_named_event_goes_first_alone_and_the_others_stay_together() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2, 3, 4)
    fill(lanes, outbox, limit=2)
    lanes.split(taken(lanes, fit=MANY), at=2)
    assert [seqs_of(taken(lanes, fit=MANY)) for _ in range(2)] == [[3], [1, 2, 4]]


def test_what_comes_before_a_named_event_of_its_user_is_not_overtaken() -> None:
    lanes, outbox = Lanes(), Outbox(1, 1, 1, 2)
    fill(lanes, outbox, limit=4)
    claim = taken(lanes, fit=MANY)
    assert seqs_of(claim) == [1, 2, 3, 4]
    lanes.split(claim, at=1)
    first, others = taken(lanes, fit=MANY), taken(lanes, fit=MANY)
    assert (seqs_of(first), seqs_of(others)) == ([1], [4])
    assert lanes.take(0.0, fit=MANY) is None
    lanes.done(first.heads)
    assert seqs_of(taken(lanes, fit=MANY)) == [2, 3]


# --- fresh events beside a backlog -------------------------------------------------------------------


def backlogged() -> tuple[Lanes, Outbox]:
    """Return lanes with a full window, and a backlog behind it that was counted."""
    lanes, outbox = Lanes(window=4, per_lane=2), Outbox(*[1, 2, 3] * 10)
    fill(lanes, outbox, limit=2)
    waiting = [(e.seq, e.lane, 0) for e in outbox.scan(after=lanes.cursor, limit=1000)]
    lanes.counted(waiting)
    return lanes, outbox


def notice(lanes: Lanes, outbox: Outbox) -> None:
    lanes.noticed(outbox.scan(after=lanes.tail, limit=1000))


def test_a_fresh_event_of_a_user_without_backlog_takes_its_turn_at_once() -> None:
    lanes, outbox = backlogged()
    outbox.append(9)
    notice(lanes, outbox)
    assert 31 in {seq(taken(lanes)) for _ in range(2)}


def test_a_fresh_event_never_overtakes_its_users_backlog() -> None:
    lanes, outbox = backlogged()
    for user in (9, 2, 9):
        outbox.append(user)
    notice(lanes, outbox)
    users = {e.seq: e.lane for e in outbox.pending.values()}
    sent = sent_in_order(lanes, outbox)
    assert sorted(sent) == sorted(users)
    for user in (1, 2, 3, 9):
        own = [n for n in sent if users[n] == user]
        assert own == sorted(own)


def test_a_fresh_event_whose_ack_is_not_synced_is_not_met_again_by_the_scan() -> None:
    lanes, outbox = backlogged()
    outbox.append(9)
    notice(lanes, outbox)
    sent: list[int] = []
    while (claim := lanes.take(0.0)) is not None:
        sent.append(seq(claim))
        lanes.done(claim.heads)
        if seq(claim) != 31:
            del outbox.pending[seq(claim)]
        fill(lanes, outbox, limit=2)
    assert sent.count(31) == 1


def test_an_urgent_event_goes_with_what_its_user_has_before_it_and_nothing_else() -> None:
    lanes, outbox = backlogged()
    outbox.append(2, urgent=True)
    outbox.append(9, urgent=True)
    outbox.append(8)
    notice(lanes, outbox)
    sent = []
    while True:
        while read_on(lanes, outbox, limit=2):
            pass
        claim = lanes.take(0.0, urgent=True)
        if claim is None:
            break
        sent.append(seq(claim))
        lanes.done(claim.heads)
        del outbox.pending[seq(claim)]
        lanes.settled(seqs_of(claim))
    assert set(sent) == {*range(2, 31, 3), 31, 32}
    assert [n for n in sent if n != 32] == [*range(2, 31, 3), 31]


def test_what_stands_behind_an_urgent_event_waits_for_its_window() -> None:
    lanes, outbox = Lanes(), Outbox(1)
    outbox.append(1, urgent=True)
    outbox.append(1)
    fill(lanes, outbox, limit=64)
    claim = lanes.take(0.0, fit=MANY, urgent=True)
    assert claim is not None
    assert seqs_of(claim) == [1, 2]
    lanes.done(claim.heads)
    assert lanes.take(0.0, fit=MANY, urgent=True) is None


def test_what_is_read_of_one_lane_stays_in_it_though_another_starves_meanwhile() -> None:
    lanes, outbox = backlogged()
    outbox.append(2, urgent=True)
    notice(lanes, outbox)
    while (claim := lanes.take(0.0, urgent=True)) is not None:
        lanes.done(claim.heads)
    gap = lanes.starved()
    assert gap is not None
    assert gap.user == 2
    outbox.append(3, urgent=True)
    notice(lanes, outbox)
    while (claim := lanes.take(0.0, urgent=True)) is not None:
        lanes.done(claim.heads)
    own = outbox.lane(2, after=gap.after, upto=gap.upto, limit=2)
    lanes.read_on(gap, own, complete=False)
    claim = lanes.take(0.0, fit=MANY, urgent=True)
    assert claim is not None
    assert {event.lane for event in claim.heads} == {2}


def test_what_was_dropped_behind_a_parked_event_is_taken_in_when_it_is_read_again() -> None:
    lanes = Lanes(window=8, per_lane=2)
    lanes.scanned([head(1, 7)], complete=False)
    lanes.counted([(2, 7, 0)])
    lanes.noticed([head(5, 9), head(6, 9)])
    lanes.counted([(7, 8, 0)])
    parked = next(claim for claim in (taken(lanes), taken(lanes)) if claim.heads[0].lane == 9)
    lanes.scanned([head(2, 7), head(5, 9), head(6, 9)], complete=False)
    lanes.again(parked, until_s=1.0)
    while seq(claim := taken(lanes, 2.0)) != 5:
        lanes.done(claim.heads)
    lanes.done(claim.heads)
    gap = lanes.starved()
    assert gap is not None
    lanes.read_on(gap, [head(6, 9)], complete=True)
    assert seq(taken(lanes, 3.0)) == 6


def test_an_urgent_event_that_failed_is_tried_again_outside_the_windows() -> None:
    lanes, outbox = Lanes(), Outbox()
    outbox.append(1, urgent=True)
    outbox.append(2)
    fill(lanes, outbox, limit=64)
    failed = lanes.take(0.0, urgent=True)
    assert failed is not None
    lanes.again(failed, until_s=5.0)
    assert lanes.next_at_s(urgent=True) == 5.0
    assert lanes.take(4.9, urgent=True) is None
    assert lanes.take(5.0, urgent=True) == failed


def test_of_a_claim_that_was_not_sent_only_what_is_urgent_goes_outside_the_windows() -> None:
    lanes, outbox = Lanes(ordered=False), Outbox(1)
    outbox.append(1, urgent=True)
    outbox.append(2)
    fill(lanes, outbox, limit=64)
    lanes.again(taken(lanes, fit=MANY), until_s=1.0)
    claim = lanes.take(1.0, fit=MANY, urgent=True)
    assert claim is not None
    claim = lanes.only_urgent(claim)
    assert seqs_of(claim) == [2]
    lanes.done(claim.heads)
    assert lanes.take(1.0, urgent=True) is None
    assert sorted(sent_in_order(lanes, outbox, now_s=1.0)) == [1, 3]


def test_what_a_user_has_before_an_urgent_event_goes_with_it_and_what_is_behind_does_not() -> None:
    lanes, outbox = Lanes(), Outbox(1, 2)
    outbox.append(1, urgent=True)
    outbox.append(1)
    fill(lanes, outbox, limit=64)
    claim = lanes.only_urgent(taken(lanes, fit=MANY))
    assert seqs_of(claim) == [1, 3]
    lanes.done(claim.heads)
    assert lanes.take(0.0, fit=MANY, urgent=True) is None
    assert seqs_of(taken(lanes, fit=MANY)) == [2, 4]


def test_what_is_left_of_a_claim_without_its_urgent_event_waits_for_the_windows() -> None:
    lanes, outbox = Lanes(), Outbox()
    outbox.append(1, urgent=True)
    outbox.append(1)
    fill(lanes, outbox, limit=64)
    claim = taken(lanes, fit=MANY)
    assert lanes.is_urgent(claim)
    withdrawn, left = claim.heads
    lanes.done([withdrawn])
    claim = Claim((left,), claim.key)
    assert not lanes.is_urgent(claim)
    lanes.again(claim, until_s=None)
    assert lanes.next_at_s(urgent=True) is None
    assert lanes.take(0.0, urgent=True) is None
    assert taken(lanes) == claim


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
        self.sending: dict[int, Claim] = {}
        self.not_before_s: dict[int, float] = {}
        self.settled: set[int] = set()
        self.unsynced: set[int] = set()
        self.synced: set[int] = set()
        self.reading: tuple[Gap, list[Head], bool] | None = None
        self.evicted: set[int] = set()

    def picked(self, data: st.DataObject) -> Claim:
        return self.sending.pop(data.draw(st.sampled_from(sorted(self.sending))))

    def take(self, fit: Fit = ONE, *, urgent: bool = False) -> Claim | None:
        claim = self.lanes.take(self.now_s, fit=fit, urgent=urgent)
        if claim is None:
            next_at_s = self.lanes.next_at_s(urgent=urgent)
            assert next_at_s is None or next_at_s > self.now_s
            return None
        under_way = {e.seq: e.lane for other in self.sending.values() for e in other.heads}
        sent: set[int] = set()
        for event in claim.heads:
            assert event.seq not in self.settled, "sent again after it was settled"
            assert event.seq not in under_way, "sent twice at once"
            not_before_s = self.not_before_s.get(event.seq, -inf)
            assert not_before_s <= self.now_s, "sent before its wait was over"
            if self.ordered:
                assert event.lane not in under_way.values()
                before = [
                    e.seq
                    for e in self.outbox.pending.values()
                    if e.lane == event.lane and e.seq < event.seq and e.seq not in self.settled
                ]
                assert sent.issuperset(before), "sent out of order"
            sent.add(event.seq)
        self.sending[claim.heads[0].seq] = claim
        return claim

    def settle(self, claim: Claim) -> None:
        self.lanes.done(claim.heads)
        self.settled.update(seqs_of(claim))
        self.unsynced.update(seqs_of(claim))

    @rule(
        users=st.lists(st.integers(1, USERS), min_size=1, max_size=6),
        urgent=st.sampled_from([False, False, True]),
    )
    def append(self, users: list[int], urgent: bool) -> None:
        for user in users:
            self.outbox.append(user, urgent=urgent)

    @precondition(lambda self: getattr(self, "reading", None) is None)
    @rule(limit=st.integers(1, 4))
    def scan(self, limit: int) -> None:
        limit = min(limit, self.lanes.room)
        heads = self.outbox.scan(after=self.lanes.cursor, limit=limit)
        self.lanes.scanned(heads, complete=len(heads) < limit)

    @precondition(lambda self: getattr(self, "reading", None) is None)
    @rule(limit=st.integers(1, 4))
    def count_ahead(self, limit: int) -> None:
        heads = self.outbox.scan(after=self.lanes.tail, limit=limit)
        self.lanes.counted([(event.seq, event.lane, event.urgent) for event in heads])

    @precondition(lambda self: getattr(self, "reading", None) is None)
    @rule(limit=st.integers(1, 4))
    def look_ahead(self, limit: int) -> None:
        limit = min(limit, self.lanes.room_ahead)
        self.lanes.noticed(self.outbox.scan(after=self.lanes.tail, limit=limit))

    @rule()
    def sync(self) -> None:
        for each in self.unsynced:
            self.outbox.pending.pop(each, None)
        if self.reading is None:
            self.lanes.settled(self.unsynced)
        else:  # what is being read may be of before
            self.synced |= self.unsynced
        self.unsynced.clear()

    @rule(limit=st.integers(1, 4))
    def read_a_starved_lane_on(self, limit: int) -> None:
        if self.reading is None:
            read_on(self.lanes, self.outbox, limit=min(limit, self.per_lane))

    @precondition(lambda self: getattr(self, "reading", None) is None)
    @rule(limit=st.integers(1, 4))
    def begin_to_read_a_starved_lane(self, limit: int) -> None:
        gap = self.lanes.starved()
        if gap is not None:
            limit = min(limit, self.per_lane)
            heads = self.outbox.lane(gap.user, after=gap.after, upto=gap.upto, limit=limit)
            self.reading = gap, heads, len(heads) < limit

    @precondition(lambda self: getattr(self, "reading", None) is not None)
    @rule()
    def end_to_read_it(self) -> None:
        assert self.reading is not None
        gap, heads, complete = self.reading
        self.reading = None
        self.lanes.read_on(gap, heads, complete=complete)
        self.lanes.settled(self.synced)
        self.synced.clear()

    @rule(events=st.integers(1, 5))
    def send(self, events: int) -> None:
        self.take(Fit(events=events, batch_bytes=1 << 20))

    @rule(events=st.integers(1, 3), whole=st.booleans())
    def send_urgent_ones(self, events: int, whole: bool) -> None:
        """Whatever goes has an urgent event, or one of its user waits behind it."""
        claim = self.take(Fit(events=events, batch_bytes=1 << 20), urgent=True)
        if claim is None:
            return
        if not whole:
            del self.sending[claim.heads[0].seq]
            claim = self.lanes.only_urgent(claim)
            self.sending[claim.heads[0].seq] = claim
        if not self.ordered or self.evicted:
            return
        known = [*self.outbox.pending.values(), *claim.heads]
        may_go = [
            any(
                other.urgent and other.lane == event.lane and other.seq >= event.seq
                for other in known
            )
            for event in claim.heads
        ]
        # A claim that failed keeps its members: one of them is enough.
        assert any(may_go) if whole else all(may_go), "sent although it is not urgent"

    @precondition(lambda self: self.sending)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.settle(self.picked(data))

    @precondition(lambda self: self.sending)
    @rule(data=st.data())
    def send_again_behind_the_others(self, data: st.DataObject) -> None:
        self.lanes.again(self.picked(data), until_s=None)

    @precondition(lambda self: self.sending)
    @rule(data=st.data(), wait_s=st.floats(0.0, 10.0))
    def park(self, data: st.DataObject, wait_s: float) -> None:
        claim = self.picked(data)
        for each in seqs_of(claim):
            self.not_before_s[each] = self.now_s + wait_s
        self.lanes.again(claim, until_s=self.now_s + wait_s)

    @precondition(lambda self: any(len(c.heads) > 1 for c in self.sending.values()))
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        several = [key for key, claim in self.sending.items() if len(claim.heads) > 1]
        claim = self.sending.pop(data.draw(st.sampled_from(sorted(several))))
        at = data.draw(st.none() | st.integers(0, len(claim.heads)))
        self.lanes.split(claim, at=at)

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
        assert sum(len(claim.heads) for claim in self.sending.values()) <= self.lanes.size
        if self.ordered:
            # What is claimed, and a queue of each.
            assert self.lanes.size <= 2 * USERS * self.per_lane + USERS
            assert self.lanes.parked <= USERS
        if not self.outbox.pending and not self.sending and not self.evicted:
            assert self.lanes.size == 0

    def teardown(self) -> None:
        """Whatever happened, all there is goes out, and nothing stays in memory."""
        if not hasattr(self, "lanes"):
            return
        if self.reading is not None:
            self.end_to_read_it()
        for key in list(self.sending):
            self.settle(self.sending.pop(key))
        self.now_s += 100.0
        for _ in range(2 * self.outbox.last_seq + 1):
            self.sync()
            fill(self.lanes, self.outbox, limit=self.per_lane)
            claim = self.take()
            if claim is None:
                break
            self.settle(self.sending.pop(claim.heads[0].seq))
        self.sync()
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
    lanes.scanned([], complete=False, upto=500)
    lanes.scanned([head(600, 1)], complete=False, upto=700)

    assert lanes.cursor == 700
    lanes.counted([(800, 2, 0)], upto=900)
    assert lanes.tail == 900
    lanes.noticed([head(1000, 3)], upto=1100)
    assert lanes.tail == 1100


def test_a_lane_is_read_on_behind_what_was_passed_over_until_it_is_complete() -> None:
    lanes = Lanes(per_lane=1)
    lanes.scanned([head(1, 1), head(9, 1)], complete=True)
    first = lanes.take(0.0)
    assert first is not None
    lanes.done(first.heads)

    gap = lanes.starved()
    assert gap == Gap(key=1, user=1, after=1, upto=9)
    lanes.read_on(gap, [], complete=False, upto=5)
    gap = lanes.starved()
    assert gap == Gap(key=1, user=1, after=5, upto=9)
    lanes.read_on(gap, [head(9, 1)], complete=True, upto=9)
    assert lanes.starved() is None
    second = lanes.take(0.0)
    assert second is not None
    assert [event.seq for event in second.heads] == [9]
