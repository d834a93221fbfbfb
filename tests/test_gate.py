"""Claims about the gate: what keeps everything back, which of several reasons is told, and until when."""

from __future__ import annotations

import pytest

from agent.flow import FlowState
from agent.forward import gate
from agent.forward.breaker import Closed, HalfOpen, Held, Open, State
from agent.forward.budget import KeptBack
from agent.forward.lanes import Lanes
from agent.outbox.records import Head

DOWN = Open(until_s=9.0, failures=1, why="connection refused")
WRONG_KEY = Held(until_s=60.0, why="401: Invalid write key.")
AT_NIGHT = KeptBack(until_s=100.0, why="outside the windows")


def state_of(
    *,
    unconfigured: str | None = None,
    paused: bool = False,
    rescuing: bool = False,
    link: State = Closed(),  # noqa: B008  # frozen
    kept_back: KeptBack | None = None,
    parked_users: int = 0,
) -> tuple[FlowState, str]:
    return gate.state_of(
        unconfigured=unconfigured,
        paused=paused,
        rescuing=rescuing,
        link=link,
        kept_back=kept_back,
        parked_users=parked_users,
    )


def lanes_with(*, urgent: bool) -> Lanes:
    lanes = Lanes(ordered=True)
    head = Head(
        seq=1,
        lane=7,
        message_id="a",
        kind="track",
        attempts=0,
        failing_since_ms=None,
        body_bytes=2,
        body=b"{}",
        urgent=urgent,
    )
    lanes.scanned([head], complete=True, upto=1)
    return lanes


def due_at_s(
    lanes: Lanes,
    *,
    paused: bool = False,
    kept_back: KeptBack | None = None,
    opens_at_s: float | None = None,
) -> float | None:
    return gate.due_at_s(lanes, paused=paused, kept_back=kept_back, opens_at_s=opens_at_s)


def test_while_all_is_well_there_is_no_reason() -> None:
    assert state_of() == ("flowing", "")


def test_of_several_reasons_that_is_told_which_a_person_or_time_must_end_first() -> None:
    assert state_of(kept_back=AT_NIGHT, parked_users=1)[0] == "waiting"
    assert state_of(link=DOWN, kept_back=AT_NIGHT) == ("backing_off", "connection refused")
    assert state_of(rescuing=True, link=WRONG_KEY)[0] == "backing_off"
    assert state_of(paused=True, rescuing=True)[0] == "paused"
    assert state_of(unconfigured="set upstream.url", paused=True)[0] == "unconfigured"


@pytest.mark.parametrize("link", [DOWN, WRONG_KEY])
def test_a_probe_under_way_is_told_as_what_it_may_end(link: Open | Held) -> None:
    assert state_of(link=HalfOpen(link)) == state_of(link=link)


def until_s(
    state: FlowState, *, kept_back: KeptBack | None = None, opens_at_s: float | None = None
) -> float | None:
    return gate.until_s(state, kept_back=kept_back, opens_at_s=opens_at_s, now_s=5.0)


def test_what_a_person_must_end_has_no_end_by_time() -> None:
    assert until_s("paused", kept_back=AT_NIGHT, opens_at_s=9.0) is None
    assert until_s("unconfigured", kept_back=AT_NIGHT, opens_at_s=9.0) is None


def test_what_is_being_tried_may_end_now() -> None:
    assert until_s("held", opens_at_s=60.0) == 60.0
    assert until_s("backing_off", opens_at_s=None) == 5.0


def test_a_rest_between_slow_answers_is_told_until_it_is_over() -> None:
    assert until_s("flowing", opens_at_s=9.0) == 9.0
    assert until_s("flowing", opens_at_s=5.0) is None
    assert until_s("flowing", opens_at_s=None) is None


def test_what_the_budget_keeps_back_ends_with_its_window() -> None:
    assert until_s("waiting", kept_back=AT_NIGHT, opens_at_s=9.0) == AT_NIGHT.until_s


def test_an_event_that_is_there_may_go_at_once() -> None:
    assert due_at_s(lanes_with(urgent=False)) == float("-inf")


def test_nothing_is_due_where_there_is_nothing_or_a_person_paused() -> None:
    assert due_at_s(Lanes(ordered=True), opens_at_s=9.0) is None
    assert due_at_s(lanes_with(urgent=True), paused=True) is None


def test_an_event_waits_for_the_breaker() -> None:
    assert due_at_s(lanes_with(urgent=False), opens_at_s=9.0) == 9.0


def test_what_the_budget_keeps_back_is_due_when_it_ends_and_what_is_urgent_at_once() -> None:
    assert due_at_s(lanes_with(urgent=False), kept_back=AT_NIGHT) == AT_NIGHT.until_s
    assert due_at_s(lanes_with(urgent=True), kept_back=AT_NIGHT) == float("-inf")


def crowded(
    *, in_flight: int = 0, unsettled: int = 0, batch: int = 1, pressed: bool = False
) -> bool:
    return gate.is_crowded(in_flight=in_flight, unsettled=unsettled, batch=batch, pressed=pressed)


def test_two_batches_may_wait_for_their_commit_where_that_is_more_than_usual() -> None:
    assert crowded(unsettled=gate.UNSETTLED)
    assert not crowded(unsettled=gate.UNSETTLED, batch=gate.UNSETTLED)
    assert crowded(unsettled=2 * gate.UNSETTLED, batch=gate.UNSETTLED)


def test_deliveries_stand_back_only_while_apps_wait() -> None:
    assert crowded(in_flight=gate.BESIDE_INTAKE - 1, unsettled=1, pressed=True)
    assert not crowded(in_flight=gate.BESIDE_INTAKE, unsettled=1)


def to_record(
    *, in_flight: int = 8, gathered: int = 1, failed: bool = False, pressed: bool = False
) -> bool:
    return gate.is_to_record(in_flight=in_flight, gathered=gathered, failed=failed, pressed=pressed)


def test_deliveries_are_recorded_together_while_more_are_under_way() -> None:
    assert not to_record(gathered=gate.GATHERED - 1)
    assert to_record(gathered=gate.GATHERED)


def test_a_delivery_waits_for_no_others_where_none_come_or_there_is_a_commit_in_any_case() -> None:
    assert to_record(in_flight=1)
    assert to_record(pressed=True)


def test_an_attempt_that_failed_is_recorded_before_the_next_one() -> None:
    assert to_record(failed=True)


def test_sending_goes_on_while_what_was_gathered_is_recorded() -> None:
    assert not crowded(unsettled=gate.GATHERED)
