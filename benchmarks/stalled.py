"""Clients that stall, in a process of their own: a third each in the head, in the body, idle.

Whoever is cut off comes back at once, so that there are always as many.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import cast

import uvloop

from benchmarks import events
from benchmarks.load import request
from benchmarks.processes import say_result

STALLED = 500


class _Stalled(asyncio.Protocol):
    def __init__(self, said: bytes, gone: asyncio.Event) -> None:
        self._said = said
        self._gone = gone

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._said)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._gone.set()


async def _stall(port: int, said: bytes, connected: asyncio.Event) -> None:
    while True:
        gone = asyncio.Event()
        await asyncio.get_running_loop().create_connection(
            lambda gone=gone: _Stalled(said, gone),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        connected.set()
        await gone.wait()


async def _stall_all(port: int) -> None:
    whole = request(port, events.body(random.Random(1)))
    stages = whole[:50], whole[:-1], whole
    async with asyncio.TaskGroup() as tasks:
        there = [asyncio.Event() for _ in range(STALLED)]
        for number, connected in enumerate(there):
            tasks.create_task(_stall(port, stages[number % len(stages)], connected))
        for connected in there:
            await connected.wait()
        say_result(port)


if __name__ == "__main__":
    uvloop.run(_stall_all(int(sys.argv[1])))
