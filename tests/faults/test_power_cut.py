"""A power cut at any moment costs nothing acknowledged: the daemon on a disk that goes dead under it.

Seen to find an answer before the commit, and a commit without its sync.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from faults import power
from faults.crash import Cycle, Machine, machine, side_by_side
from processes import AgentProcess

CYCLES = 10
"""Power cuts on one disk."""

CYCLES_TO_FIND = 60
"""Far more than it takes on a quiet machine: on a busy one the moment between is seldom met."""


@pytest.fixture(autouse=True)
def _disks(tmp_path: Path) -> None:
    if reason := power.obstacle(tmp_path):
        pytest.skip(reason)


@asynccontextmanager
async def machine_on_a_disk(
    folder: Path, *, seed: int, bug: str | None = None
) -> AsyncIterator[Machine]:
    disk = power.Disk(folder)

    async def lose_power(agent: AgentProcess) -> None:
        power.freeze(agent.process.pid)
        disk.cut()
        await agent.kill()
        disk.boot()

    # In a folder that the agent makes: its name must outlive the first cut as well.
    outbox = disk.folder / "agent" / "outbox.db"
    with disk.plugged_in():
        async with machine(folder, seed=seed, crash=lose_power, outbox=outbox, bug=bug) as one:
            yield one


@pytest.mark.process
async def test_a_power_cut_at_any_moment_loses_nothing(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    async def life(seed: int) -> list[Cycle]:
        async with machine_on_a_disk(tmp_path / str(seed), seed=seed) as one:
            return await one.live(CYCLES)

    cycles = await side_by_side(tier(20, 500) // CYCLES, life)

    assert [cycle for cycle in cycles if not cycle.is_sound] == []


@pytest.mark.process
@pytest.mark.parametrize("bug", ["answer_before_commit", "synchronous_normal"])
async def test_the_power_cut_finds(bug: str, tmp_path: Path) -> None:
    async with machine_on_a_disk(tmp_path / bug, seed=1, bug=bug) as one:
        assert await one.loses(within=CYCLES_TO_FIND)
