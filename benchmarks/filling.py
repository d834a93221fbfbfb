"""Events into an outbox without HTTP, through the agent's own writer.

The one module here that looks behind the agent's public face: backlogs of a million are made with it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import uvloop

from agent.clock import SystemClock
from agent.contract import read_event
from agent.event import Event
from agent.outbox.records import Appended, Policy
from agent.outbox.writer import Writer, open_writer
from benchmarks import events
from benchmarks.machine import MIB
from benchmarks.processes import DEAD, FigureError, ask, say_result

_FILL_EVENTS = 2_000
"""Events of one call when an outbox is filled, or half of them: the writer lets no more wait."""

_QUOTA_BYTES = 64 * 1024 * MIB


def fill(outbox: Path, count: int, seed: int, *, beside_dead: bool = False) -> None:
    """Make *outbox* with the *count* events of *seed* pending; *beside_dead*: each for `DEAD`, too."""
    ask(
        *("benchmarks.filling", "fill-twice" if beside_dead else "fill", outbox, count, seed),
        result=type(None),
        timeout_s=60 + count / 500,
    )


def make_empty(outbox: Path) -> None:
    """Make an outbox without events."""

    async def make() -> None:
        async with _writer(outbox):
            pass

    uvloop.run(make())


def _writer(outbox: Path) -> AbstractAsyncContextManager[Writer]:
    policy = Policy(max_bytes=_QUOTA_BYTES, evicts=False, remember=True)
    return open_writer(outbox, policy, SystemClock())


def _groups(count: int, seed: int, *, size: int) -> Iterator[list[Event]]:
    now_ms = SystemClock().wall_ms()
    made = (read_event("track", body, received_ms=now_ms) for body in events.bodies(count, seed))
    while group := list(itertools.islice(made, size)):
        yield group


async def _fill(outbox: Path, count: int, seed: int, *, beside_dead: bool = False) -> None:
    async with _writer(outbox) as writer:
        for group in _groups(count, seed, size=_FILL_EVENTS):
            others = [msgspec.structs.replace(event, upstream=DEAD) for event in group]
            pairs = (
                zip(group, others, strict=True) if beside_dead else ((event,) for event in group)
            )
            await _append(writer, list(itertools.chain.from_iterable(pairs)))


async def _append(writer: Writer, group: list[Event]) -> None:
    outcomes = await writer.append(group)
    if any(outcome is not Appended.STORED for outcome in outcomes):
        raise FigureError("an event was taken for one that is known: its id is not unique")


def _main(way: str, outbox: str, count: str, seed: str) -> None:
    match way:
        case "fill":
            uvloop.run(_fill(Path(outbox), int(count), int(seed)))
            say_result(None)
        case "fill-twice":
            uvloop.run(_fill(Path(outbox), int(count), int(seed), beside_dead=True))
            say_result(None)
        case _:
            raise SystemExit(f"{way}: expected fill or fill-twice")


if __name__ == "__main__":
    _main(*sys.argv[1:])
