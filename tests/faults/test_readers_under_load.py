"""Whoever looks, and dies looking, is not noticed by the writer.

Planted bugs that these tests are seen to find are run by the tests themselves.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from faults.households import Household, household, household_of_three
from faults.onlookers import DIRECTLY, Look, looking
from faults.watched import running
from faults.witness import flaws
from processes import DEADLINE_S, AgentProcess, environ

from agent.console.sandbox import DEFAULT_WRITE_KEY, Sandbox

CLIENTS = 6
POLL_S = 0.1

ROOM = 'max_size = "8GiB"'
"""For minutes at full speed, should the upstream not keep up."""

FINE = {"status": {0, 3}, "list": {0}, DIRECTLY: {0}}
"""Exit codes while an agent runs. 3: it is not reached by that configuration, or not in time."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Household]:
    with household(tmp_path) as home:
        yield home


async def forget_bodies(sandbox: Sandbox, delivered: set[str]) -> None:
    """Keep only the ids of what arrived: in an hour the bodies would fill the memory."""
    while True:
        delivered |= {arrival.message_id for arrival in sandbox.stored}
        sandbox.clear()
        await asyncio.sleep(1)


def complaints(looks: list[Look]) -> list[str]:
    """Return what the looks that were let live did not see, or saw wrongly."""
    alive = [look for look in looks if look.code != -9]
    wrong = [look for look in alive if look.code not in FINE[look.name]]
    wrong += [look for look in alive if look.name == "status" and not adds_up(look.output)]
    return [f"{look.order} ended with {look.code}: {look.output[-500:]}" for look in wrong]


def adds_up(output: str) -> bool:
    status = json.loads(output)
    parts = ("delivered", "pending", "dead", "discarded")
    return "accepted" in status and status["accepted"] == sum(status[part] for part in parts)


@pytest.mark.process
async def test_looks_ten_times_a_second_are_not_noticed_by_the_writer(
    home: Household, tier: Callable[[int, int], int]
) -> None:
    sandbox, delivered = Sandbox(DEFAULT_WRITE_KEY), set[str]()
    async with sandbox.serving() as url, running(home, url, outbox=ROOM) as run:
        await run.agent.start()
        async with asyncio.TaskGroup() as tasks:
            forgetting = tasks.create_task(forget_bodies(sandbox, delivered))
            async with (
                looking(
                    run.agent.outbox, run.orders(), python=home.python, environ=environ()
                ) as looks,
                run.witness.posting(CLIENTS),
            ):
                await run.last(tier(5, 600))
            status = await run.agent.status()
            assert await run.agent.stop() == 0
            forgetting.cancel()
        delivered |= {arrival.message_id for arrival in sandbox.stored}

    assert run.found() == []
    assert complaints(looks) == []
    assert (run.witness.refused, run.witness.unanswered) == ({}, 0)
    assert run.witness.lost(run.agent.outbox, delivered) == set()
    assert flaws(run.agent.outbox) == []
    # That it was a proof: it drained, there was a log to be kept small, and looks died reading.
    assert status["delivered"] > 0
    assert run.footprint.largest_log_bytes > 0
    assert any(look.killed and look.open for look in looks)
    assert any(look.code != -9 for look in looks)


@pytest.mark.process
@pytest.mark.parametrize(
    ("bug", "sign"),
    [("reader_that_stays", "log of "), ("reader_that_locks", "log: .*database is locked")],
)
async def test_a_reader_that_is_noticed_by_the_writer_is_found(
    home: Household, bug: str, sign: str
) -> None:
    async with running(home, bug=bug, filler_bytes=400_000) as run:
        await run.agent.start()
        async with run.witness.posting(CLIENTS):
            await run.last(60)

    assert re.match(sign, run.found()[0])


@pytest.mark.process
async def test_searches_that_overlap_all_the_time_leave_the_log_bounded(
    home: Household, tier: Callable[[int, int], int]
) -> None:
    seconds = tier(0, 120)
    if not seconds:
        pytest.skip("takes minutes and 2 GB of disk; --deep")
    async with running(home, outbox=ROOM, filler_bytes=200_000) as run:
        await run.agent.start()
        async with run.witness.posting(CLIENTS):
            await run.witness.reach(8_000)
            searches = [order for order in run.orders() if order.argv[0] == "list"]
            async with looking(
                run.agent.outbox, searches, python=home.python, environ=environ(), kills=False
            ):
                await run.last(seconds)

        assert run.found() == []


async def start_as_a_service(agent: AgentProcess) -> None:
    """Start it as the service manager does, again if it ends: who looks may keep it out for a second."""
    for _ in range(10):
        with suppress(AssertionError):
            return await agent.start()
    raise AssertionError(agent.log.read_text())


async def look_while_it_comes_and_goes(
    home: Household, rounds: int, *, bug: str | None = None
) -> tuple[list[str], set[str]]:
    """Start, load and end an agent again and again while everyone looks, some with a planted *bug*.

    Returns what was found, and the files that are left after the last stop.
    """
    async with running(home) as run:
        await run.agent.start()
        async with looking(
            run.agent.outbox, run.orders()[3:], python=home.python, environ=environ(), bug=bug
        ) as looks:
            for n in range(rounds):
                async with run.witness.posting(CLIENTS):
                    await run.witness.reach(50 * (n + 1))
                await (run.agent.kill() if n % 2 else run.agent.stop())
                seen = len(looks)
                async with asyncio.timeout(DEADLINE_S):
                    while len(looks) < seen + len(home.onlookers):  # noqa: ASYNC110  # other processes
                        await asyncio.sleep(POLL_S)
                if run.found():
                    break  # it might never start again
                await start_as_a_service(run.agent)
        await run.agent.stop()
    found = run.found()
    found += [f"{look}" for look in looks if look.code not in {-9, 0, 1, 2, 3}]
    found += [f"lost: {lost}" for lost in run.witness.lost(run.agent.outbox, ())]
    return found + flaws(run.agent.outbox), {file.name for file in home.folder.glob("outbox.db*")}


@pytest.mark.process
async def test_looks_while_the_agent_comes_and_goes_leave_nothing_behind(
    home: Household, tier: Callable[[int, int], int]
) -> None:
    found, left = await look_while_it_comes_and_goes(home, tier(2, 150))

    assert found == []
    assert left == {"outbox.db", "outbox.db.lock", "outbox.db-tally"}


@pytest.mark.process
async def test_a_look_that_leaves_files_of_its_own_is_found(tmp_path: Path) -> None:
    # In a folder that the group may write, for in any other it could not.
    with household_of_three(tmp_path, mode=0o770) as three:
        home = replace(three, onlookers=three.onlookers[:1])  # SQLite gives away what root makes
        found, _ = await look_while_it_comes_and_goes(home, 1, bug="reader_that_makes_files")

    assert any(line.startswith("left behind") for line in found)


SLOW_LOOK = """
import asyncio, sys
from pathlib import Path
from agent.errors import OutboxError
from agent.outbox import access

open_connection = access._reader

def slowly(path, *, immutable):
    print("looked for an agent", flush=True)
    sys.stdin.read()
    return open_connection(path, immutable=immutable)

async def main():
    access._reader = slowly
    async with access.open_reader(Path(sys.argv[1])) as looking:
        await looking.ledger()

try:
    asyncio.run(main())
except OutboxError as exc:
    print(exc)
"""
"""A look during which much may happen between two of its lines."""


@pytest.mark.process
async def test_a_look_that_outlives_the_agent_does_not_keep_the_next_one_from_writing(
    tmp_path: Path,
) -> None:
    with household_of_three(tmp_path, mode=0o770) as home:
        operator = home.onlookers[0]
        assert operator is not None
        async with running(home) as run:
            await run.agent.start()
            look = await asyncio.create_subprocess_exec(
                *(home.python, "-c", SLOW_LOOK, str(run.agent.outbox)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environ(),
                user=operator[0],
                group=operator[1],
                extra_groups=[],
            )
            assert look.stdout is not None
            assert await look.stdout.readline() == b"looked for an agent\n"
            await run.agent.stop()
            async with asyncio.timeout(DEADLINE_S):
                await look.communicate(b"")  # it may go on
            await run.agent.start()
            answer = await run.agent.post({"messageId": "m", "event": "e", "userId": "u"})

    assert answer == 204
