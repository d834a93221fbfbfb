"""The promise as a whole, with the real daemon as a process that is killed again and again.

Planted bugs that these tests were seen to find: an answer before the commit, an ack before the
upstream's answer, a body encoded anew for each attempt, lanes that let two events of a user go.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
from collections import defaultdict
from pathlib import Path

import aiohttp
import pytest
from processes import AgentProcess, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.event import KINDS

EVENTS = 5_000
USERS = 50
CLIENTS = 8
AT_ONCE = 7
"""Events in a batch, as every other client posts them."""
KILLS = 6

PACE_S = 0.012
RETRY_S = 0.05
"""Between two posts of a client: the run lasts long enough for every fault to be met."""

FAULTS = (
    Fault(mode="down"),
    Fault(mode="status", status=500),
    Fault(mode="status", status=429, retry_after="1"),
    Fault(mode="stall", delay_s=20),
    Fault(mode="cut_after"),
    Fault(mode="ok"),
    Fault(mode="cut_before"),
    Fault(mode="ok"),
)
FAULT_S = 0.6
"""How long each fault lasts."""

FORWARD = """
backoff_base = "50ms"
backoff_max = "400ms"
"""


def upstream(url: str, mode: str) -> str:
    return f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\ntimeout = "1s"\nmode = "{mode}"'


class Progress:
    """How many events were acknowledged, and a way to wait for that."""

    def __init__(self) -> None:
        self._acknowledged = 0
        self._changed = asyncio.Condition()

    async def add(self, count: int) -> None:
        async with self._changed:
            self._acknowledged += count
            self._changed.notify_all()

    async def reach(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._acknowledged >= count)


async def use_app(
    agent: AgentProcess, numbers: list[int], progress: Progress, *, at_once: int
) -> None:
    """Post each event until it is acknowledged, as an app with a retry would; some *at_once*."""
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        while not await post(agent, some):  # noqa: ASYNC110  # an app waits, too
            await asyncio.sleep(RETRY_S)
        await progress.add(len(some))
        await asyncio.sleep(PACE_S * len(some))


async def post(agent: AgentProcess, numbers: list[int]) -> bool:
    match numbers:
        case [number]:
            body, endpoint = event(number), kind_of(number)
        case _:
            items = [event(number) | {"type": kind_of(number)} for number in numbers]
            body, endpoint = {"batch": items}, "batch"
    try:
        return await agent.post(body, endpoint) == 204
    except (aiohttp.ClientError, TimeoutError):
        return False


def kind_of(number: int) -> str:
    return KINDS[number // USERS % len(KINDS)]


def event(number: int) -> dict[str, object]:
    return {
        "messageId": f"m-{number}",
        "userId": f"user-{number % USERS}",
        # Not of each kind, and kept by all.
        "event": "Item Sold",
        "groupId": "chain",
        # No timestamp: the agent stamps it once, so a second stamp would change the bytes.
        "properties": {"number": number, "price": 1.10, "name": "Käse ☕"},
    }


async def break_things(sandbox: Sandbox, stop: asyncio.Event) -> None:
    for fault in itertools.cycle(FAULTS):
        sandbox.fault = fault
        try:
            async with asyncio.timeout(FAULT_S):
                await stop.wait()
        except TimeoutError:
            continue
        sandbox.fault = Fault(mode="ok")
        return


async def kill_now_and_then(agent: AgentProcess, progress: Progress) -> None:
    """Kill the daemon at random moments while the apps post."""
    rng = random.Random(20261123)
    for acknowledged in sorted(rng.sample(range(EVENTS // 20, EVENTS), KILLS)):
        await progress.reach(acknowledged)
        await agent.kill()
        await agent.start()


@pytest.mark.process
@pytest.mark.parametrize("mode", ["track", "batch"])
async def test_every_acknowledged_event_arrives_unchanged_and_in_order(
    tmp_path: Path, mode: str
) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    # All events of a user come from one client, so that the order of acceptance is known.
    numbers_by_app = [
        [n for n in range(EVENTS) if n % USERS % CLIENTS == client] for client in range(CLIENTS)
    ]
    async with (
        sandbox.serving() as url,
        running_agent(tmp_path, upstream=upstream(url, mode), forward=FORWARD) as agent,
    ):
        progress, stop = Progress(), asyncio.Event()
        async with asyncio.TaskGroup() as world:
            world.create_task(break_things(sandbox, stop))
            world.create_task(kill_now_and_then(agent, progress))
            for client, numbers in enumerate(numbers_by_app):
                at_once = AT_ONCE if client % 2 else 1
                world.create_task(use_app(agent, numbers, progress, at_once=at_once))
            await progress.reach(EVENTS)
            stop.set()
        await agent.ask("POST", "flush")
        status = await agent.until(lambda status: status["pending"] == 0)
        assert await agent.stop() == 0

    assert_all_arrived_in_order(sandbox)
    assert_bytes_never_changed(sandbox)
    assert_counters_add_up(agent, status)


def assert_all_arrived_in_order(sandbox: Sandbox) -> None:
    first_arrivals = list(dict.fromkeys(arrival.message_id for arrival in sandbox.stored))
    assert len(first_arrivals) == EVENTS
    by_user: dict[int, list[int]] = defaultdict(list)
    for message_id in first_arrivals:
        number = int(message_id.removeprefix("m-"))
        by_user[number % USERS].append(number)
    assert all(
        arrival.kind == kind_of(int(arrival.message_id.removeprefix("m-")))
        for arrival in sandbox.stored
    )
    for numbers in by_user.values():
        assert numbers == sorted(numbers)


def assert_bytes_never_changed(sandbox: Sandbox) -> None:
    bodies: dict[str, set[bytes]] = defaultdict(set)
    for arrival in sandbox.arrivals:
        bodies[arrival.message_id].add(arrival.body)
    assert {len(seen) for seen in bodies.values()} == {1}
    assert len(sandbox.arrivals) > EVENTS, "no fault made the agent try anything twice"


def assert_counters_add_up(agent: AgentProcess, status: dict[str, object]) -> None:
    assert status["accepted"] == status["delivered"] == EVENTS
    assert status["dead"] == status["discarded"] == 0
    db = sqlite3.connect(agent.outbox)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = db.execute("SELECT state, COUNT(*) FROM event GROUP BY state").fetchall()
        assert rows == [("delivered", EVENTS)]
        assert db.execute("SELECT COUNT(*) FROM pending").fetchall() == [(0,)]
    finally:
        db.close()
