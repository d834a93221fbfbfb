"""What became of the events, on its way into the outbox: many in one commit, and none forgotten."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent.clock import SystemClock
from agent.event import Event
from agent.forward.backoff import Backoff
from agent.forward.claims import Claim
from agent.forward.disposition import Delivered, GiveUp, Outcome, Unavailable
from agent.forward.forwarder import Forwarder, forwarding
from agent.forward.plan import Plan
from agent.forward.recording import GATHER_BYTES, Conclusion, Recording
from agent.forward.tally import TALLY_BYTES, Tally
from agent.forward.upstream import Endpoint
from agent.outbox.access import open_own_reader
from agent.outbox.records import Ack, Head, Policy
from agent.outbox.writer import Writer, open_writer

POLICY = Policy(max_bytes=1 << 30, evicts=False, remember=True)

PLAN = Plan(
    concurrency=8,
    ordered=True,
    backoff=Backoff(base_s=60.0, cap_s=60.0),
    give_up=GiveUp(attempts=3, after_s=60.0, unproven_after_s=60.0),
    hold_probe_s=60.0,
)

TIMEOUT_S = 10.0


class Books:
    """What was recorded, commit by commit."""

    def __init__(self) -> None:
        self.commits: list[list[int]] = []
        self.told = asyncio.Event()

    def recorded(self, settled: list[Conclusion]) -> None:
        self.commits.append([head.seq for each in settled for head in each.claim.heads])
        self.told.set()


@asynccontextmanager
async def writer_of(folder: Path, *, pending: int) -> AsyncIterator[Writer]:
    async with open_writer(folder / "outbox.db", POLICY, SystemClock()) as writer:
        await writer.append([event(number) for number in range(pending)])
        yield writer


def event(number: int) -> Event:
    return Event(
        message_id=f"id{number}",
        kind="track",
        lane=number,
        digest=bytes(16),
        received_ms=1,
        body=b"{}",
    )


def delivered(seq: int, *, body_bytes: int = 2) -> tuple[Claim, tuple[Ack, ...]]:
    head = Head(
        seq=seq,
        lane=seq,
        message_id=f"id{seq}",
        kind="track",
        attempts=0,
        failing_since_ms=None,
        body_bytes=body_bytes,
        body=b"{}",
    )
    return Claim.of([head]), (Ack(seq),)


async def test_what_was_gathered_is_recorded_in_one_commit(tmp_path: Path) -> None:
    async with writer_of(tmp_path, pending=3) as writer:
        books = Books()
        recording = Recording(writer, books.recorded)
        before = writer.commits
        for seq in (1, 2, 3):
            recording.add(*delivered(seq))
        assert (recording.gathered, recording.unsettled) == (3, 3)
        recording.hand_over()
        assert (recording.gathered, recording.unsettled) == (0, 3)
        await asyncio.wait_for(books.told.wait(), TIMEOUT_S)
        assert books.commits == [[1, 2, 3]]
        assert writer.commits == before + 1
        assert recording.unsettled == 0


async def test_large_events_are_recorded_a_few_at_a_time(tmp_path: Path) -> None:
    async with writer_of(tmp_path, pending=5) as writer:
        books = Books()
        recording = Recording(writer, books.recorded)
        for seq, body_bytes in enumerate([2, GATHER_BYTES - 2, 1, 3 * GATHER_BYTES, 1], 1):
            recording.add(*delivered(seq, body_bytes=body_bytes))
        recording.hand_over()
        while recording.unsettled:
            await asyncio.wait_for(books.told.wait(), TIMEOUT_S)
            books.told.clear()
        assert books.commits == [[1, 2], [3], [4], [5]]


async def test_what_nobody_asks_for_is_recorded_all_the_same(tmp_path: Path) -> None:
    async with writer_of(tmp_path, pending=2) as writer:
        books = Books()
        recording = Recording(writer, books.recorded)
        for seq in (1, 2):  # the second time, too
            recording.add(*delivered(seq))
            await asyncio.wait_for(books.told.wait(), TIMEOUT_S)
            books.told.clear()
        assert books.commits == [[1], [2]]


class LastOneFails:
    """Takes four events, and one more while another is under way; then all ends, and that one fails."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self._asked = 0

    async def send(self, endpoint: Endpoint, body: bytes) -> Outcome:
        self._asked += 1
        if self._asked == 5:
            await self.over.wait()
            return Unavailable(why="gone")
        if self._asked == 6:
            self.over.set()
        return Delivered()


async def test_what_was_gathered_when_the_agent_stops_is_recorded(tmp_path: Path) -> None:
    upstream = LastOneFails()
    async with (
        writer_of(tmp_path, pending=6) as writer,
        open_own_reader(writer.path) as reader,
    ):
        forwarder = Forwarder(
            writer=writer,
            reader=reader,
            upstream=upstream,
            plan=PLAN,
            tally=Tally(bytearray(TALLY_BYTES)),
            clock=SystemClock(),
            rng=random.Random(1),
        )
        async with forwarding(forwarder):
            await asyncio.wait_for(upstream.over.wait(), TIMEOUT_S)
    async with open_own_reader(writer.path) as reader:
        assert (await reader.ledger()).delivered == 5
