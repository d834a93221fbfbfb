"""EIO and ENOSPC at the k-th write, sync and truncation of an agent's life.

Nothing acknowledged is lost, nobody hangs, the agent accepts again by itself, and `status` names
the fault while it lasts. A fault that strikes while the agent starts may end it, with a message;
the next start must then find everything.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults.injection import (
    ALLOCATE,
    ALWAYS,
    ASIDE,
    QUEUE,
    SYNC,
    TRUNCATE,
    WRITE,
    DiskFault,
    born_with,
    calls_made,
    striking,
    struck,
    unavailable,
)
from faults.page_cache import PageCache
from faults.scripted_life import PATIENCE_S, Past, living
from faults.trials import ERRORS, complaints, judge, met, sample, try_all
from faults.witness import flaws

pytestmark = pytest.mark.process

SEED = 20261123

SERIES = 4
"""Calls of a short series of failures: the rollback and the close meet it, too."""

MET = 0.5
"""The share of the faults that must meet a call: a life is not the same to the last call twice."""

LOOKS = 15
LOOK_INTERVAL_S = 0.1
"""Together longer than the outbox is left alone before it is opened again."""

HASTE_S = 4.0
"""For agents that will keep us waiting."""

Tier = Callable[[int, int], int]


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    if reason := unavailable():
        pytest.skip(reason)


# --- while it runs ---


async def test_a_fault_at_any_call_of_its_life_costs_nothing_acknowledged(
    tmp_path: Path, tier: Tier
) -> None:
    await live_through(tmp_path, None)
    made, rng, both = calls_made(tmp_path / "trace"), random.Random(SEED), bool(tier(0, 1))
    singles = {WRITE: tier(4, made[WRITE]), SYNC: tier(3, made[SYNC]), TRUNCATE: tier(2, 100)}
    faults = [
        *sample(made, singles, rng, both=both),
        *sample(made, {WRITE: tier(1, 100), SYNC: tier(1, 100)}, rng, both=both, series=SERIES),
        # Space that cannot be given back is only space.
        DiskFault(TRUNCATE, "EIO", ALWAYS),
    ]

    verdicts = await try_all(tmp_path, live_through, faults)

    assert complaints(verdicts) == []
    assert met(verdicts) > MET


async def live_through(
    folder: Path, fault: DiskFault | None, bug: str | None = None, patience_s: float = PATIENCE_S
) -> None:
    """Play the script with *fault* in it from the moment that the agent is ready."""
    async with living(folder, seed=SEED, bug=bug, patience_s=patience_s) as life:
        await life.agent.start()
        async with asyncio.timeout(patience_s), striking(fault, life.agent, folder / "trace"):
            await life.play()
        life.assert_kept()


# --- while it starts ---


@pytest.mark.parametrize("origin", ["new", "crashed"])
async def test_a_fault_at_any_call_of_its_start_is_overcome_by_the_next_start(
    tmp_path: Path, tier: Tier, origin: str
) -> None:
    past = await crash(tmp_path / "past") if origin == "crashed" else None
    await start_twice(tmp_path, None, past)
    made, rng = calls_made(tmp_path / "trace"), random.Random(SEED)
    counts = {calls: tier(1, made[calls]) for calls in (WRITE, SYNC, TRUNCATE)}
    faults = sample(made, counts, rng, both=bool(tier(0, 1)))

    verdicts = await try_all(tmp_path, partial(start_twice, past=past), faults)

    assert complaints(verdicts) == []
    assert met(verdicts) > MET


async def test_a_fault_at_its_lock_or_reserve_is_overcome_by_the_next_start(
    tmp_path: Path, tier: Tier
) -> None:
    faults = [
        DiskFault(calls, error, ALWAYS) for error in ERRORS for calls in (WRITE, TRUNCATE, ALLOCATE)
    ]

    verdicts = await try_all(
        tmp_path, partial(start_twice, past=None, files=ASIDE), faults[:: tier(5, 1)]
    )

    assert complaints(verdicts) == []
    assert met(verdicts) > 0


async def crash(folder: Path) -> Past:
    """Leave a queue, a log, and free pages that the next start gives back to the disk."""
    async with living(folder, seed=SEED + 1, filler_bytes=200_000) as life:
        await life.agent.start()
        life.part()
        await life.post(70)
        await life.rejoin()
        await life.drain()
        life.part()
        await life.post(5)
        await life.agent.kill()
        return life.leave()


async def start_twice(
    folder: Path, fault: DiskFault | None, past: Past | None, files: Sequence[str] = QUEUE
) -> None:
    """Start with *fault* in it, which may end it, else it is killed; then start without."""
    trace = folder / "trace"
    async with living(folder, seed=SEED) as life, asyncio.timeout(PATIENCE_S):
        if past is not None:
            life.inherit(past)
        sound = life.agent.command
        life.agent.command = born_with(fault, life.agent, trace, files=files)
        await life.agent.launch()
        if await life.agent.becomes_ready():
            # What it does first in the background is part of its start.
            await life.agent.until(lambda status: status["pending"] == 0 or struck(trace) > 0)
            await life.agent.kill()
        else:
            said = life.log().splitlines()[-1]
            assert said.startswith("tranthor-agent: "), f"no clear message: {life.log()}"
        life.agent.command = sound
        await life.agent.start()
        await life.post(3)
        await life.drain()
        assert await life.agent.stop() == 0, f"no clean stop: {life.log()}"
        life.assert_kept()


# --- and then the power goes ---


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_is_acknowledged_after_a_failed_sync_outlives_a_power_cut(
    tmp_path: Path, tier: Tier, restarted: bool
) -> None:
    # Each connection meets it once, but not before it has stored something.
    faults = [DiskFault(SYNC, "EIO", str(k)) for k in range(8, 8 + tier(1, 12))]

    verdicts = await try_all(tmp_path, partial(lose_power, restarted=restarted), faults)

    assert complaints(verdicts) == []
    assert met(verdicts) == 1


async def lose_power(
    folder: Path,
    fault: DiskFault,
    *,
    restarted: bool,
    bug: str | None = None,
    patience_s: float = PATIENCE_S,
) -> None:
    """Meet *fault*, acknowledge more (*restarted*: after a crash), and cut the power."""
    trace, image = folder / "trace", folder / "image"
    async with (
        living(folder, seed=SEED, bug=bug, filler_bytes=800) as life,
        asyncio.timeout(patience_s),
    ):
        outbox = life.agent.outbox
        life.part()
        await life.agent.start()
        await life.post(3)
        cache = PageCache([outbox, outbox.with_name(f"{outbox.name}-wal")])
        async with striking(fault, life.agent, trace, lasting=True, data=True):
            await life.refused()
            if restarted:
                await life.agent.kill()
            else:
                await life.post(6)
        cache.replay(trace)
        if restarted:
            trace = folder / "trace-restarted"
            life.agent.command = born_with(None, life.agent, trace, data=True)
            await life.agent.start()
            await life.post(6)
            cache.replay(trace)
        cache.assert_true()
        cache.cut_power(image)
        lost = life.witness.lost(image / outbox.name, ())
        assert not lost, f"{len(lost)} of {len(life.witness.acknowledged)} acknowledged are lost"
        assert flaws(image / outbox.name) == []


# --- while it lasts ---


async def test_status_names_a_fault_as_long_as_it_lasts_and_its_end_needs_no_restart(
    tmp_path: Path, tier: Tier
) -> None:
    faults = [DiskFault(calls, error, ALWAYS) for calls in (WRITE, SYNC) for error in ERRORS]

    verdicts = await try_all(tmp_path, outlast, faults[: tier(3, 4)])

    assert complaints(verdicts) == []
    assert met(verdicts) == 1


async def outlast(
    folder: Path, fault: DiskFault, bug: str | None = None, patience_s: float = PATIENCE_S
) -> None:
    """Put *fault* into every call for a while; one that is seen only now and then is not named."""
    async with living(folder, seed=SEED, bug=bug, patience_s=patience_s) as life:
        await life.agent.start()
        await life.post(3)
        await life.drain()  # a settlement that waits would try the disk, too
        async with (
            striking(fault, life.agent, folder / "trace", lasting=True),
            asyncio.timeout(patience_s),
        ):
            await life.refused()
            acknowledged = len(life.witness.acknowledged)
            for _ in range(LOOKS):  # no app posts meanwhile: the agent has to find out by itself
                assert named(await life.agent.status()), "status names no fault"
                await asyncio.sleep(LOOK_INTERVAL_S)
            code, said = await life.agent.run_command("status")
            await life.refused()
            assert len(life.witness.acknowledged) == acknowledged, "acknowledged without a disk"
        assert code == 1
        assert "OUTBOX F" in said
        await life.post(3)
        assert not named(await life.agent.status())
        await life.drain()
        assert await life.agent.stop() == 0, f"no clean stop: {life.log()}"
        life.assert_kept()


def named(status: dict[str, Any]) -> bool:
    """Return whether `status` says that nothing is stored, and why."""
    return bool(status["outbox"]["fault"] or status["outbox"]["full"])


# --- what the proofs find ---


async def test_the_proofs_find_loss_silence_standstill_and_a_status_that_hides_it(
    tmp_path: Path,
) -> None:
    once, always = DiskFault(SYNC, "EIO", "5"), DiskFault(WRITE, "EIO", ALWAYS)
    powerless = partial(lose_power, restarted=False)
    async with asyncio.TaskGroup() as trials:
        found = {
            bug: trials.create_task(
                judge(tmp_path / bug, partial(scenario, bug=bug, patience_s=patience_s), fault)
            )
            for bug, scenario, fault, patience_s in (
                ("ignore_commit_errors", live_through, once, PATIENCE_S),
                ("synchronous_normal", powerless, DiskFault(WRITE, "EIO", "60"), PATIENCE_S),
                ("answer_nobody", live_through, once, HASTE_S),
                ("never_reopen", live_through, once, HASTE_S),
                ("hide_faults", outlast, always, PATIENCE_S),
            )
        }

    verdicts = {bug: task.result() for bug, task in found.items()}
    assert all(verdict.met for verdict in verdicts.values())
    assert "acknowledged are lost" in verdicts["ignore_commit_errors"].complaint
    assert "acknowledged are lost" in verdicts["synchronous_normal"].complaint
    assert "TimeoutError" in verdicts["answer_nobody"].complaint
    assert "TimeoutError" in verdicts["never_reopen"].complaint
    assert "names no fault" in verdicts["hide_faults"].complaint
