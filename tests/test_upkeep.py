"""What is done from time to time: expiring, forgetting, giving space back."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from outboxes import used_bytes

from agent.event import Event
from agent.outbox import letters
from agent.outbox.access import open_own_reader
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Appended, Policy, Receipt, Retention, Selection
from agent.outbox.upkeep import tend
from agent.outbox.writer import Writer, open_writer

DAY_S = 86_400.0
WEEK = Retention(max_age_s=None, delivered_s=7 * DAY_S)
AN_HOUR_AT_MOST = Retention(max_age_s=3600.0, delivered_s=7 * DAY_S)


class FakeClock:
    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        raise AssertionError("the outbox measures no waits")

    def advance(self, wait_s: float) -> None:
        self.now_ms += int(wait_s * 1000)


@dataclass
class Outbox:
    path: Path
    writer: Writer
    reader: Reader
    clock: FakeClock

    async def append(self, *message_ids: str, size: int = 40) -> list[Appended]:
        return await self.writer.append(
            [_event(message_id, size, self.clock.now_ms) for message_id in message_ids]
        )

    async def ack(self, *message_ids: str) -> None:
        for message_id in message_ids:
            self.writer.settle(Ack((await self.receipt(message_id)).seq))
        await self.writer.perform(lambda store: store.space())  # behind what was queued

    async def ack_all(self) -> None:
        heads = (await self.reader.scan(after=0, limit=100_000)).heads
        for acked in [self.writer.settle(Ack(head.seq)) for head in heads]:
            await acked

    async def receipt(self, message_id: str) -> Receipt:
        receipt = await self.reader.receipt(message_id)
        assert receipt is not None
        return receipt

    async def states(self, *message_ids: str) -> list[str]:
        return [(await self.receipt(message_id)).state for message_id in message_ids]


def _event(message_id: str, size: int, now_ms: int) -> Event:
    body = message_id.ljust(size, ".").encode()
    return Event(
        message_id=message_id,
        kind="track",
        lane=1,
        digest=hashlib.blake2b(body, digest_size=16).digest(),
        received_ms=now_ms,
        body=body,
    )


@asynccontextmanager
async def _opened(path: Path, *, remember: bool = True) -> AsyncIterator[Outbox]:
    clock = FakeClock()
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=remember)
    async with open_writer(path, policy, clock) as writer, open_own_reader(path) as reader:
        yield Outbox(path, writer, reader, clock)


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    async with _opened(tmp_path / "outbox.db") as opened:
        yield opened


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


# --- max_age ------------------------------------------------------------------------------------


async def test_an_event_older_than_max_age_becomes_a_dead_letter_that_says_expired(
    outbox: Outbox,
) -> None:
    await outbox.append("old")
    outbox.clock.advance(3600.001)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)

    old = await outbox.receipt("old")
    assert (old.state, old.reason, old.status) == ("dead", "expired", None)
    assert old.settled_ms == outbox.clock.now_ms
    assert old.body == _event("old", 40, 0).body
    ledger = await outbox.reader.ledger()
    assert (ledger.accepted, ledger.pending, ledger.dead, ledger.discarded) == (1, 0, 1, 0)


async def test_an_event_as_old_as_max_age_stays_in_the_queue(outbox: Outbox) -> None:
    await outbox.append("old enough")
    outbox.clock.advance(3600)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)

    assert await outbox.states("old enough") == ["pending"]


async def test_without_max_age_nothing_expires(outbox: Outbox) -> None:
    await outbox.append("old")
    outbox.clock.advance(3650 * DAY_S)
    await tend(outbox.writer, outbox.clock, WEEK)

    assert await outbox.states("old") == ["pending"]


async def test_a_requeued_event_has_its_whole_max_age_again(outbox: Outbox) -> None:
    await outbox.append("old")
    outbox.clock.advance(3601)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    seq, now_ms = (await outbox.receipt("old")).seq, outbox.clock.now_ms
    assert (
        await outbox.writer.perform(lambda store: letters.requeue(store, [seq], now_ms=now_ms)) == 1
    )

    outbox.clock.advance(3599)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    assert await outbox.states("old") == ["pending"]

    outbox.clock.advance(2)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    assert await outbox.states("old") == ["dead"]


async def test_an_event_delivered_although_it_expired_under_way_counts_as_delivered(
    outbox: Outbox,
) -> None:
    await outbox.append("under way")
    outbox.clock.advance(3601)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    await outbox.ack("under way")

    assert await outbox.states("under way") == ["delivered"]
    ledger = await outbox.reader.ledger()
    assert (ledger.delivered, ledger.dead, ledger.pending) == (1, 0, 0)
    assert await outbox.append("under way") == [Appended.REPLAYED]


async def test_a_long_backlog_expires_in_one_round(outbox: Outbox) -> None:
    await outbox.append(*_numbered("old", 1201))
    outbox.clock.advance(3601)
    await outbox.append("young")
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)

    ledger = await outbox.reader.ledger()
    assert (ledger.pending, ledger.dead) == (1, 1201)
    assert await outbox.states("young") == ["pending"]


async def test_an_event_from_a_clock_set_ahead_does_not_hide_the_old_ones_behind_it(
    outbox: Outbox,
) -> None:
    outbox.clock.advance(DAY_S)
    await outbox.append("from tomorrow")
    outbox.clock.advance(-DAY_S)
    await outbox.append("old")
    outbox.clock.advance(3601)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)

    assert await outbox.states("from tomorrow", "old") == ["pending", "dead"]


async def test_only_the_front_of_the_queue_is_looked_at_for_expired_events(
    outbox: Outbox,
) -> None:
    front = _numbered("from tomorrow", 500)
    outbox.clock.advance(DAY_S)
    await outbox.append(*front)
    outbox.clock.advance(-DAY_S)
    await outbox.append("old")
    outbox.clock.advance(3601)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    assert await outbox.states("old") == ["pending"]

    await outbox.ack(front[0])
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    assert await outbox.states("old") == ["dead"]


# --- delivered_retention ------------------------------------------------------------------------


async def test_a_delivered_id_is_remembered_as_long_as_configured(outbox: Outbox) -> None:
    await outbox.append("id")
    await outbox.ack("id")
    outbox.clock.advance(7 * DAY_S)
    await tend(outbox.writer, outbox.clock, WEEK)
    assert await outbox.append("id") == [Appended.REPLAYED]

    outbox.clock.advance(0.001)
    await tend(outbox.writer, outbox.clock, WEEK)
    assert await outbox.reader.receipt("id") is None
    assert await outbox.append("id") == [Appended.STORED]


async def test_forgetting_touches_neither_pending_events_nor_dead_letters(outbox: Outbox) -> None:
    await outbox.append("dead")
    outbox.clock.advance(3601)
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)
    await outbox.append("pending")
    outbox.clock.advance(365 * DAY_S)
    await tend(outbox.writer, outbox.clock, WEEK)

    assert await outbox.states("pending", "dead") == ["pending", "dead"]


async def test_forgetting_leaves_the_count_of_delivered_events(outbox: Outbox) -> None:
    await outbox.append(*_numbered("id", 1201))
    await outbox.ack_all()
    outbox.clock.advance(8 * DAY_S)
    await tend(outbox.writer, outbox.clock, WEEK)

    assert await outbox.reader.select("delivered", Selection(), limit=2000) == []
    ledger = await outbox.reader.ledger()
    assert (ledger.accepted, ledger.delivered) == (1201, 1201)


async def test_with_a_retention_of_zero_an_id_is_forgotten_with_its_ack(tmp_path: Path) -> None:
    async with _opened(tmp_path / "outbox.db", remember=False) as outbox:
        await outbox.append("id")
        await outbox.ack("id")

        assert await outbox.reader.receipt("id") is None
        assert await outbox.append("id") == [Appended.STORED]
        ledger = await outbox.reader.ledger()
        assert (ledger.accepted, ledger.delivered, ledger.pending) == (2, 1, 1)


async def test_ids_from_before_the_retention_was_set_to_zero_are_forgotten(outbox: Outbox) -> None:
    await outbox.append("id")
    await outbox.ack("id")
    outbox.clock.advance(0.001)
    await tend(outbox.writer, outbox.clock, Retention(max_age_s=None, delivered_s=0))

    assert await outbox.reader.receipt("id") is None


# --- space --------------------------------------------------------------------------------------


async def test_the_file_shrinks_after_a_large_backlog_was_drained(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with _opened(path) as outbox:
        for first in range(0, 1000, 100):
            await outbox.append(*(f"id{first + i}" for i in range(100)), size=16_000)
        full_bytes = await used_bytes(outbox.writer)
        await outbox.ack_all()
        await tend(outbox.writer, outbox.clock, WEEK)
        drained_bytes = await used_bytes(outbox.writer)
        ledger = await outbox.reader.ledger()

    assert full_bytes > 16_000_000
    assert drained_bytes < 512 * 1024
    # 4 MiB stay for the next events.
    assert path.stat().st_size <= drained_bytes + 4 * 1024 * 1024 + 256 * 4096
    assert (ledger.pending, ledger.delivered) == (0, 1000)


async def test_a_small_outbox_keeps_its_free_pages_for_the_next_events(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with _opened(path) as outbox:
        await outbox.append(*_numbered("id", 100), size=16_000)
        await outbox.ack_all()
        await tend(outbox.writer, outbox.clock, WEEK)

    assert path.stat().st_size > 1_600_000


async def test_a_quiet_outbox_is_left_as_it_is(outbox: Outbox) -> None:
    await outbox.append("pending", "delivered")
    await outbox.ack("delivered")
    before = await outbox.reader.ledger()
    await tend(outbox.writer, outbox.clock, AN_HOUR_AT_MOST)

    assert await outbox.reader.ledger() == before
    assert await outbox.states("pending", "delivered") == ["pending", "delivered"]
