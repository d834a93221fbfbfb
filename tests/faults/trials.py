"""One scenario tried on many faults, several at a time, and what was wrong with any of them."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from faults.injection import DiskFault, struck

ERRORS = ("EIO", "ENOSPC")

AT_ONCE = 6
"""Most trials wait most of the time: for an outbox to be opened again, for a process to end."""

Trial = Callable[[Path, DiskFault], Coroutine[Any, Any, None]]
"""Plays a scenario in a folder, tracing into `trace`; raises AssertionError or TimeoutError."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether *fault* met a call, and what was wrong then; empty: nothing."""

    fault: DiskFault
    met: bool
    complaint: str


async def try_all(folder: Path, trial: Trial, faults: Sequence[DiskFault]) -> list[Verdict]:
    """Return the verdict of *trial* on each fault, each in a folder of its own."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def take_turn(n: int, fault: DiskFault) -> Verdict:
        async with turn:
            return await judge(folder / f"trial-{n}", trial, fault)

    async with asyncio.TaskGroup() as trials:
        tasks = [trials.create_task(take_turn(n, fault)) for n, fault in enumerate(faults)]
    return [task.result() for task in tasks]


async def judge(folder: Path, trial: Trial, fault: DiskFault) -> Verdict:
    """Return the verdict of *trial* on *fault*; the folder of one that was passed is removed."""
    found = await complaint(trial(folder, fault))
    verdict = Verdict(fault, struck(folder / "trace") > 0, found)
    if not found:
        shutil.rmtree(folder)
    return verdict


async def complaint(scenario: Coroutine[Any, Any, None]) -> str:
    """Return what was wrong; empty when nothing was."""
    try:
        await scenario
    except (AssertionError, TimeoutError, aiohttp.ClientError) as exc:
        return repr(exc)
    return ""


def complaints(verdicts: Iterable[Verdict]) -> list[str]:
    return [f"{verdict.fault}: {verdict.complaint}" for verdict in verdicts if verdict.complaint]


def met(verdicts: Sequence[Verdict]) -> float:
    """Return the share of the faults that met a call."""
    return sum(verdict.met for verdict in verdicts) / len(verdicts)


def sample(
    made: Mapping[str, int],
    counts: Mapping[str, int],
    rng: random.Random,
    *,
    both: bool,
    series: int = 1,
) -> list[DiskFault]:
    """Return faults at so many calls of each kind, evenly spread over those *made*.

    *both* puts either error into each, otherwise they take turns. Each fault fails *series* calls.
    """
    return [
        DiskFault(calls, error, f"{k}..{k + series - 1}" if series > 1 else str(k))
        for calls, count in counts.items()
        for n, k in enumerate(_spread(made.get(calls, 0), count, rng))
        for error in (ERRORS if both else (ERRORS[n % 2],))
    ]


def _spread(made: int, count: int, rng: random.Random) -> list[int]:
    """Return *count* of the 1-based numbers up to *made*, one from each part of equal size."""
    count = min(count, made)
    return [rng.randint(1 + n * made // count, (n + 1) * made // count) for n in range(count)]
