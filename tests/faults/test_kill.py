"""kill -9 at any moment costs nothing acknowledged, and the agent is back at once.

Seen to find an answer before the commit. A commit without its sync it cannot find: the kernel keeps
what the process wrote. That is for `test_power_cut`.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.crash import Cycle, machine, side_by_side
from processes import AgentProcess

CYCLES = 25
"""Kills on one outbox."""

BACK_S = 2.0
"""How soon after its start the agent accepts events again.

Asked of nine starts in ten, as disks stall, and of their own time, without what they waited for a
processor: a machine that is busy with something else says nothing about the agent.
"""

CYCLES_TO_FIND = 60
"""Far more than it takes on a quiet machine: on a busy one the moment between is seldom met."""

log = logging.getLogger(__name__)


async def kill(agent: AgentProcess) -> None:
    await agent.kill()


@pytest.mark.process
async def test_an_agent_killed_at_any_moment_loses_nothing_and_is_soon_back(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    async def life(seed: int) -> list[Cycle]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        async with machine(folder, seed=seed, crash=kill) as one:
            return await one.live(CYCLES)

    cycles = await side_by_side(tier(50, 1_000) // CYCLES, life)

    assert [cycle for cycle in cycles if not cycle.is_sound] == []
    starts = [cycle.start for cycle in cycles if cycle.start is not None]
    said = (
        f"ready again in {statistics.median(start.ready_s for start in starts):.2f} s,"
        f" {max(start.ready_s for start in starts):.2f} s at most;"
        f" own time {max(start.own_s for start in starts):.2f} s at most"
    )
    log.info(said)
    assert statistics.quantiles((start.own_s for start in starts), n=10)[-1] < BACK_S, said


@pytest.mark.process
async def test_the_kill_finds_an_answer_before_the_commit(tmp_path: Path) -> None:
    async with machine(tmp_path, seed=1, crash=kill, bug="answer_before_commit") as one:
        assert await one.loses(within=CYCLES_TO_FIND)
