"""An outbox of any version so far opens and keeps all it holds, wherever in that the agent is killed.

A planted bug that these tests are seen to find, a migration in several transactions, is run by them.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faults import planted, relics
from faults.killpoints import Killpoint, killed_at, killpoints, need_strace
from faults.witness import flaws
from processes import DEADLINE_S, AgentProcess, running_agent

from agent.clock import SystemClock
from agent.console.sandbox import DEFAULT_WRITE_KEY, Arrival, Sandbox
from agent.outbox import schema
from agent.outbox.aside import count_sets
from agent.outbox.records import Policy
from agent.outbox.writer import open_writer

VERSIONS = range(1, schema.VERSION + 1)

AT_REST_OR_KILLED = pytest.mark.parametrize("in_log", [False, True], ids=["at rest", "killed"])

INCREMENTAL = 2
"""What PRAGMA auto_vacuum says of a file that gives pages back; it is decided before the first table."""

AT_ONCE = 2
"""Agents; most of a start is that of Python."""


def differences(version: int, said: dict[str, Any]) -> list[str]:
    """Return what *said* has otherwise than the relic of *version*; what is new in it is no matter."""
    expected = relics.testimony(version) if version else {"ledger": {}, "events": []}
    ids, expected_ids = ([e["messageId"] for e in it["events"]] for it in (said, expected))
    if ids != expected_ids:
        return [f"{ids} instead of {expected_ids}"]
    return [
        f"{name} was {value!r} in {before}, is {after.get(name)!r}"
        for before, after in (
            (expected["ledger"], said["ledger"]),
            *zip(expected["events"], said["events"], strict=True),
        )
        for name, value in before.items()
        if after.get(name) != value
    ]


async def wrongs(outbox: Path, version: int, *, bug: str | None = None) -> list[str]:
    """Return what is wrong with the relic of *version* at *outbox* after an agent came and went."""
    header = {"user_version": schema.VERSION + (bug is not None), "auto_vacuum": INCREMENTAL}
    with closing(sqlite3.connect(outbox, isolation_level=None)) as db:
        found = {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in header}
        # For the reader of this version; what the planted one has added is not in its way.
        db.execute(f"PRAGMA user_version = {schema.VERSION}")
    wrong = [] if found == header else [f"{found} instead of {header}"]
    return wrong + differences(version, await relics.testify(outbox)) + flaws(outbox)


# --- what there is ---


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_has_its_relic(version: int) -> None:
    assert relics.path_of(version, "sql").exists(), "make it: python -m faults.relics"
    assert relics.path_of(version, "json").exists()


async def test_the_relic_of_this_version_is_what_this_version_makes(tmp_path: Path) -> None:
    relics.restore(schema.VERSION, tmp_path / "relic.db", in_log=False)
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=True)
    async with open_writer(tmp_path / "new.db", policy, SystemClock()):
        pass

    def made(path: Path) -> list[tuple[str, ...]]:
        with closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()

    assert made(tmp_path / "relic.db") == made(tmp_path / "new.db"), "a migration was changed"


# --- what becomes of it ---


@pytest.mark.process
@pytest.mark.parametrize("version", VERSIONS)
@AT_REST_OR_KILLED
async def test_an_older_outbox_keeps_all_and_is_delivered_in_its_order(
    tmp_path: Path, version: int, in_log: bool
) -> None:
    relics.restore(version, tmp_path / "outbox.db", in_log=in_log)
    async with running_agent(tmp_path, outbox=relics.REMEMBER) as agent:
        assert await agent.stop() == 0
    assert await wrongs(agent.outbox, version) == []

    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    expected = relics.testimony(version)
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"'
        async with running_agent(tmp_path, upstream=upstream, outbox=relics.REMEMBER) as agent:
            await agent.until(lambda status: status["pending"] == 0)
            repeated = [event["body"] for event in expected["events"] if event["body"]]
            assert {await agent.post(body) for body in repeated} == {204}
            status = await agent.status()
            assert await agent.stop() == 0

    pending = [event["body"] for event in expected["events"] if event["state"] == "pending"]
    assert by_user(sent(sandbox.stored)) == by_user(pending)
    assert status["duplicates"] == expected["ledger"]["duplicates"] + len(repeated)
    assert status["conflicts"] == expected["ledger"]["conflicts"]
    assert flaws(agent.outbox) == []


def sent(arrivals: Iterable[Arrival]) -> list[dict[str, Any]]:
    return [json.loads(arrival.body) for arrival in arrivals]


def by_user(bodies: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for body in bodies:
        found[body.get("userId") or body["anonymousId"]].append(body)
    return found


# --- killed on the way ---


class Upgrade:
    """The start of an agent, planted or not, on the relic of *version*: as often as need be."""

    def __init__(self, folder: Path, version: int, *, in_log: bool, bug: str | None = None) -> None:
        self._folder = folder
        self._version = version
        self._in_log = in_log
        self._bug = bug

    async def killed(self, count: int) -> tuple[int, list[str]]:
        """Kill it at *count* points of its life, or at each; return at how many, and what was wrong."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session:
            points = spread(await killpoints(self._agent("traced", session)), count)
            found: list[str] = []
            turn = asyncio.Semaphore(AT_ONCE)

            async def one(number: int, point: Killpoint) -> None:
                async with turn:
                    agent = self._agent(str(number), session)
                    found.extend(f"{point}: {it}" for it in await self._killed_at(agent, point))

            async with asyncio.TaskGroup() as tasks:
                for number, point in enumerate(points):
                    tasks.create_task(one(number, point))
        return len(points), found

    def _agent(self, name: str, session: aiohttp.ClientSession) -> AgentProcess:
        folder = self._folder / name
        folder.mkdir()
        relics.restore(self._version, folder / "outbox.db", in_log=self._in_log)
        agent = AgentProcess(folder, session, outbox=relics.REMEMBER)
        agent.command = planted.command(self._bug)
        return agent

    async def _killed_at(self, agent: AgentProcess, point: Killpoint) -> list[str]:
        if not await killed_at(agent, point):
            return ["was not reached"]
        try:
            await agent.start()
        except AssertionError:
            return [f"did not start again: {agent.log.read_text()[-500:]}"]
        await agent.stop()
        if count_sets(agent.outbox):
            return [f"was taken for damaged: {agent.log.read_text()[-500:]}"]
        return await wrongs(agent.outbox, self._version, bug=self._bug)


def spread(points: Sequence[Killpoint], count: int) -> list[Killpoint]:
    """Return *count* of the points, as far apart as they go; all if there are no more."""
    if len(points) <= count:
        return list(points)
    return [points[(2 * n + 1) * len(points) // (2 * count)] for n in range(count)]


EACH = 10_000
"""More points than there are."""


@pytest.mark.process
@pytest.mark.parametrize("version", [0, *VERSIONS])
@AT_REST_OR_KILLED
async def test_an_agent_killed_while_it_opens_an_outbox_opens_it_the_next_time(
    tmp_path: Path, tier: Callable[[int, int], int], version: int, in_log: bool
) -> None:
    need_strace()
    if not version and in_log:
        pytest.skip("a file without a byte has no log")
    tried, wrong = await Upgrade(tmp_path, version, in_log=in_log).killed(tier(2, EACH))

    assert tried >= 2
    assert wrong == []


@pytest.mark.process
async def test_an_agent_killed_while_it_migrates_an_outbox_migrates_it_the_next_time(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    need_strace()
    upgrade = Upgrade(tmp_path, schema.VERSION, in_log=False, bug="another_migration")
    tried, wrong = await upgrade.killed(tier(2, EACH))

    assert tried >= 2
    assert wrong == []


@pytest.mark.process
async def test_a_migration_that_is_not_one_transaction_is_found(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    need_strace()
    upgrade = Upgrade(tmp_path, schema.VERSION, in_log=False, bug="migration_in_steps")
    _, wrong = await upgrade.killed(tier(1, EACH))  # the one is in the middle of it

    assert any("was taken for damaged" in it for it in wrong)
