"""A disk without a byte left: events are refused, never lost; what waits is delivered all the same.

The outbox has a small filesystem to itself, but for another program's file. Its quota is larger, so
the disk is the limit.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from faults.scripted_life import PATIENCE_S, Life, living
from faults.small_disk import fill, free_bytes, greed, small_disk
from faults.trials import complaint
from processes import AgentProcess

from agent.clock import SystemClock
from agent.event import Event
from agent.outbox.access import open_own_reader
from agent.outbox.records import Bury, Policy
from agent.outbox.writer import open_writer

pytestmark = pytest.mark.process

SEED = 20261123

SPACIOUS = Policy(max_bytes=1 << 30, evicts=False, remember=True)

HASTE_S = 4.0
"""For agents that will keep us waiting."""

REFUSALS = 8
"""A large event that is refused leaves room for a small one; after so many there is none."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path) as disk:
        yield disk


@asynccontextmanager
async def life_on(
    disk: Path, *, bug: str | None = None, patience_s: float = PATIENCE_S
) -> AsyncIterator[Life]:
    """Start an agent on *disk*, its upstream out of reach."""
    async with living(
        disk / "agent", seed=SEED, filler_bytes=200_000, bug=bug, patience_s=patience_s
    ) as life:
        life.agent.log = disk.parent / "agent.log"  # to be read when the disk is gone
        await life.agent.start()
        life.part()
        async with asyncio.timeout(patience_s):
            yield life


async def fill_with_events(life: Life) -> None:
    for _ in range(REFUSALS):
        assert await life.refused() == 507


async def end(life: Life) -> None:
    """End a life whose disk has room again: it accepts by itself, and nothing was lost."""
    await life.post(3)
    await life.drain()
    code, said = await life.agent.run_command("status")
    assert code == 0, said
    assert await life.agent.stop() == 0, f"no clean stop: {life.log()}"
    life.assert_kept()


# --- full of events ---


async def test_a_disk_full_of_events_refuses_more_and_is_emptied_by_delivery(disk: Path) -> None:
    hog = disk / "hog"
    async with life_on(disk) as life:
        await be_filled_and_emptied(life, hog)
        hog.unlink()
        await end(life)


async def test_the_proof_finds_a_missing_reserve_and_a_false_204(tmp_path: Path) -> None:
    async def live(folder: Path, bug: str) -> None:
        with small_disk(folder) as disk:
            async with life_on(disk, bug=bug, patience_s=HASTE_S) as life:
                await be_filled_and_emptied(life, disk / "hog")

    async with asyncio.TaskGroup() as lives:
        without_reserve, lying = (
            lives.create_task(complaint(live(tmp_path / bug, bug)))
            for bug in ("no_reserve", "ignore_commit_errors")
        )

    # Which of the claims fails first depends on how busy the machine is.
    assert without_reserve.result()
    assert lying.result()


async def be_filled_and_emptied(life: Life, hog: Path) -> None:
    await fill_with_events(life)
    fill(hog)
    assert await life.refused() == 507
    assert free_bytes(hog.parent) == 0
    code, said = await life.agent.run_command("status")
    assert code == 1
    assert "no space left on the disk" in said
    await life.rejoin()
    await life.drain()
    life.assert_delivered()


async def test_large_events_are_buried_one_after_the_other(disk: Path) -> None:
    outbox, hog = disk / "outbox.db", disk / "hog"
    async with open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        for number in range(4):
            await writer.append([large_event(number)])
    async with (
        asyncio.timeout(PATIENCE_S),
        open_writer(outbox, SPACIOUS, SystemClock()) as writer,
        open_own_reader(outbox) as reader,
    ):
        fill(hog)
        # All four take more than the reserve, in the log and behind the end of the database.
        buries = [Bury(seq=seq, reason="rejected", status=413, answer="") for seq in range(1, 5)]
        await asyncio.gather(*map(writer.settle, buries))
        assert (await reader.ledger()).dead == 4


def large_event(number: int) -> Event:
    return Event(
        message_id=f"id{number}",
        kind="track",
        lane=number,
        digest=bytes(16),
        received_ms=1,
        body=bytes(1_000_000),
    )


# --- full of something else ---


async def test_a_disk_that_another_program_filled_refuses_events_until_there_is_room(
    disk: Path,
) -> None:
    hog = disk / "hog"
    async with life_on(disk) as life:
        await life.post(3)
        fill(hog)
        await fill_with_events(life)
        await life.rejoin()
        await life.drain()
        hog.unlink()
        await end(life)


async def test_deliveries_are_recorded_beside_a_program_that_takes_each_free_byte(
    disk: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--deep"):
        pytest.skip("a race for the last bytes, which the agent wins mostly, not always; --deep")
    hog = disk / "hog"
    async with life_on(disk) as life:
        await fill_with_events(life)
        with greed(hog):
            await life.rejoin()
            await life.drain()
        hog.unlink()
        await end(life)


async def test_status_says_full_no_longer_once_there_is_room_though_no_app_posts(
    disk: Path,
) -> None:
    hog = disk / "hog"
    async with life_on(disk) as life:
        fill(hog)
        await fill_with_events(life)
        hog.unlink()
        await life.agent.until(lambda status: status["outbox"]["full"] is None)
        assert await life.agent.becomes_ready()


# --- started on it ---


@pytest.mark.parametrize("end_it", [AgentProcess.kill, AgentProcess.stop])
async def test_an_agent_that_ended_on_a_full_disk_starts_there_again_and_delivers(
    disk: Path, end_it: Callable[[AgentProcess], Awaitable[int | None]]
) -> None:
    hog = disk / "hog"
    async with life_on(disk) as life:
        await fill_with_events(life)
        fill(hog)
        await end_it(life.agent)
        fill(hog)
        await life.agent.start()
        assert await life.refused() == 507
        await life.rejoin()
        await life.drain()
        hog.unlink()
        await end(life)


async def test_an_agent_killed_while_it_empties_a_full_disk_goes_on_there(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    rng = random.Random(SEED)
    for n in range(tier(1, 30)):
        with small_disk(tmp_path / str(n)) as disk:
            hog = disk / "hog"
            async with life_on(disk) as life:
                await fill_with_events(life)
                fill(hog)
                waiting = (await life.agent.status())["pending"]
                await life.rejoin()
                await life.drain_to(rng.randrange(waiting))
                await life.agent.kill()
                await life.agent.start()
                await life.drain()
                hog.unlink()
                await end(life)
