"""What waits to be written: how much may, what is taken together, and who is told what."""

from __future__ import annotations

import pytest

from agent.errors import OutboxFullError, OutboxOverloadedError, OutboxUnavailableError
from agent.event import Event
from agent.outbox.intake import QUEUE_BYTES, QUEUE_EVENTS, Group, Intake
from agent.outbox.records import Ack, Appended

MIB = 1024 * 1024


def events(count: int, *, body_bytes: int = 1) -> list[Event]:
    event = Event(
        message_id="m",
        kind="track",
        lane=1,
        digest=bytes(16),
        received_ms=1,
        body=bytes(body_bytes),
    )
    return [event] * count


def seqs(group: Group) -> list[int]:
    return [change.seq for job in group.settles for change in job.settlements]


async def test_what_is_being_committed_still_counts_as_waiting() -> None:
    intake = Intake()
    stored = intake.append(events(QUEUE_EVENTS))
    group = intake.take_group(settles=None)
    with pytest.raises(OutboxOverloadedError):
        intake.append(events(1))
    intake.committed(group, [[Appended.STORED]])
    assert await stored == [Appended.STORED]
    intake.append(events(QUEUE_EVENTS))


@pytest.mark.parametrize("full_of", ["events", "bytes"])
async def test_what_was_refused_waits_no_more(full_of: str) -> None:
    many = events(QUEUE_EVENTS) if full_of == "events" else events(1, body_bytes=QUEUE_BYTES)
    intake = Intake()
    for _ in range(2):
        refused = intake.append(many)
        with pytest.raises(OutboxOverloadedError):
            intake.append(events(1))
        intake.refuse_all(OutboxUnavailableError("broken"))
        with pytest.raises(OutboxUnavailableError):
            await refused
    assert not intake.appends


@pytest.mark.parametrize("oversized", ["events", "bytes"])
async def test_a_batch_that_never_fits_need_not_be_alone_but_finds_one_place_free(
    oversized: str,
) -> None:
    one, many = events(1), events(QUEUE_EVENTS + 1)
    if oversized == "bytes":
        many = events(1, body_bytes=QUEUE_BYTES + 1)
    intake = Intake()
    intake.append(one)
    intake.append(many)
    for more in (one, many):
        with pytest.raises(OutboxOverloadedError):
            intake.append(more)


async def test_what_was_rolled_back_waits_no_more_but_for_its_settlements() -> None:
    intake = Intake()
    intake.append(events(QUEUE_EVENTS))
    for seq in (1, 2):
        intake.settle([Ack(seq)])
    group = intake.take_group(settles=None)
    intake.settle([Ack(3)])
    intake.rolled_back(group)
    assert not intake.appends
    intake.append(events(QUEUE_EVENTS))
    assert seqs(intake.take_group(settles=None)) == [1, 2, 3]


async def test_a_refusal_of_all_keeps_the_settlements() -> None:
    intake = Intake()
    settled = intake.settle([Ack(1)])
    performed = intake.perform(lambda _: None)
    intake.refuse_all(OutboxUnavailableError("broken"))
    with pytest.raises(OutboxUnavailableError):
        await performed
    assert not settled.done()
    assert seqs(intake.take_group(settles=None)) == [1]


async def test_so_many_settlements_are_taken_as_is_asked_for() -> None:
    intake = Intake()
    for seq in range(5):
        intake.settle([Ack(seq)])
    assert seqs(intake.take_group(settles=0)) == []
    assert seqs(intake.take_group(settles=2)) == [0, 1]
    assert seqs(intake.take_group(settles=9)) == [2, 3, 4]
    assert intake.take_group(settles=None).empty


async def test_a_group_is_closed_once_it_has_some_mebibytes() -> None:
    intake = Intake()
    for _ in range(6):
        intake.append(events(1, body_bytes=MIB))
    assert [len(intake.take_group(settles=None).appends) for _ in range(3)] == [4, 2, 0]


async def test_each_is_told_what_became_of_its_own() -> None:
    intake = Intake()
    stored, refused, left = (intake.append(events(1)) for _ in range(3))
    left.cancel()
    full = OutboxFullError("full")
    intake.committed(
        intake.take_group(settles=None), [[Appended.STORED], full, [Appended.REPLAYED]]
    )
    assert await stored == [Appended.STORED]
    assert refused.exception() is full
    assert left.cancelled()
