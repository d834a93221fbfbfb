"""One outbox has one agent, however a second one is started, and the first does not notice it.

A planted bug that these tests are seen to find, an agent that takes no lock, is run by them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from faults import planted
from faults.households import household_of_three
from faults.watched import running
from faults.witness import Witness, flaws, known_ids
from processes import DEADLINE_S, AgentProcess, environ, free_port, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Sandbox

CLIENTS = 4
RIVALS = 3

POLL_S = 0.05


class Second(NamedTuple):
    """How another agent on the same outbox fared. *code* None: it had to be stopped."""

    code: int | None
    said: str

    @property
    def is_refused(self) -> bool:
        """Whether it ended by itself, in words for a person."""
        return self.code == 1 and self.said.startswith("tranthor-agent: ")

    def is_refused_for(self, pid: int) -> bool:
        """Whether it said whose the outbox is, too, and what to do."""
        wanted = (f"in use by process {pid};", "stop that one", "set outbox.path")
        return self.is_refused and all(words in self.said for words in wanted)


class Rival:
    """An agent of its own configuration and port, on the outbox at *path*."""

    def __init__(self, folder: Path, name: str, path: str, *, bug: str | None = None) -> None:
        self.port = free_port()
        self.process: asyncio.subprocess.Process | None = None
        self._log = folder / f"{name}.log"
        config = folder / f"{name}.toml"
        config.write_text(f'[ingest]\nport = {self.port}\n[outbox]\npath = "{path}"\n')
        self._command = [*planted.command(bug), "run", "--config", str(config)]

    async def start(self) -> None:
        """Start it; return when it has ended, or accepts events."""
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, stderr=log, env=environ()
            )
        async with asyncio.timeout(DEADLINE_S):
            while self.process.returncode is None and not await self._listens():  # noqa: ASYNC110  # another process
                await asyncio.sleep(POLL_S)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def end(self) -> Second:
        """Return how it fared; it is stopped if it runs."""
        assert self.process is not None
        code = self.process.returncode
        if code is None:
            self.process.kill()
            await self.process.wait()
        return Second(code, self._log.read_text())


async def fares(rivals: Sequence[Rival]) -> list[Second]:
    """Start all at once; return how each fared."""
    async with asyncio.TaskGroup() as tasks:
        for rival in rivals:
            tasks.create_task(rival.start())
    return [await rival.end() for rival in rivals]


def spellings(first: AgentProcess, folder: Path) -> dict[str, str]:
    """Return paths that are the same path."""
    (folder / "elsewhere").symlink_to(folder)
    return {
        "the same": str(first.outbox),
        "relative": first.outbox.name,
        "through another folder": f"{folder}/../{folder.name}/./outbox.db",
        "through a link to the folder": f"{folder}/elsewhere/outbox.db",
    }


def links(first: AgentProcess, folder: Path) -> dict[str, str]:
    """Return other names of the file, and give them to it."""
    (folder / "away").mkdir()
    (folder / "beside.db").symlink_to("outbox.db")
    (folder / "away" / "far.db").symlink_to(first.outbox)
    os.link(first.outbox, folder / "hard link.db")
    return {name: f"{folder}/{name}" for name in ("beside.db", "away/far.db", "hard link.db")}


def tidied(first: AgentProcess, folder: Path) -> dict[str, str]:
    """Return the path, after somebody has tidied up beside it."""
    (folder / "outbox.db.lock").unlink()
    return {"without the lock file": str(first.outbox)}


@pytest.mark.process
async def test_a_second_agent_is_told_whose_the_outbox_is_however_it_spells_the_path(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path) as first:
        paths = spellings(first, tmp_path)
        fared = await fares([Rival(tmp_path, name, path) for name, path in paths.items()])

        assert [second for second in fared if not second.is_refused_for(first.process.pid)] == []
        assert await first.post({"messageId": "m", "event": "e", "userId": "u"}) == 204


@pytest.mark.process
@pytest.mark.parametrize("ways", [links, tidied])
async def test_no_other_way_to_the_file_lets_a_second_agent_in(
    tmp_path: Path, ways: Callable[[AgentProcess, Path], dict[str, str]]
) -> None:
    async with running_agent(tmp_path) as first:
        paths = ways(first, tmp_path)
        fared = await fares(
            [Rival(tmp_path, Path(name).stem, path) for name, path in paths.items()]
        )
        let_in = [name for name, it in zip(paths, fared, strict=True) if not it.is_refused]

        assert let_in == []
        assert await first.post({"messageId": "m", "event": "e", "userId": "u"}) == 204


def identities(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return which files there are, whose, and that they are the same files."""
    return {
        file.name: (stat.st_ino, stat.st_mode, stat.st_uid, stat.st_gid)
        for file in folder.glob("outbox.db*")
        for stat in (file.stat(),)
    }


@pytest.mark.process
async def test_the_first_agent_goes_on_undisturbed_while_others_try_again_and_again(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    upstream = 'url = "{}"\nwrite_key = "' + DEFAULT_WRITE_KEY + '"'
    async with (
        sandbox.serving() as url,
        running_agent(tmp_path, upstream=upstream.format(url)) as first,
    ):
        witness = Witness(first.url, seed=1)
        before, log = identities(tmp_path), first.log.read_text()
        lock = (tmp_path / "outbox.db.lock").read_text()
        fared: list[Second] = []
        async with witness.posting(CLIENTS):
            await witness.reach(CLIENTS)
            for _ in range(tier(1, 200)):
                path = str(first.outbox)
                fared += await fares([Rival(tmp_path, f"{n}", path) for n in range(RIVALS)])
                seen = len(witness.acknowledged)
                await witness.reach(seen + CLIENTS)
        assert [second for second in fared if not second.is_refused_for(first.process.pid)] == []
        assert identities(tmp_path) == before
        assert (tmp_path / "outbox.db.lock").read_text() == lock
        assert "outbox" not in first.log.read_text().removeprefix(log)
        ambiguous = (await first.status())["ambiguous"]
        assert await first.stop() == 0

    assert (witness.refused, witness.unanswered) == ({}, 0)
    assert witness.lost(first.outbox, (arrival.message_id for arrival in sandbox.stored)) == set()
    assert sandbox.stats().duplicates <= ambiguous  # the second one sent nothing
    assert flaws(first.outbox) == []


@pytest.mark.process
async def test_a_refused_root_leaves_the_first_agent_its_lock_file(tmp_path: Path) -> None:
    with household_of_three(tmp_path, mode=0o770) as home:
        os.chown(home.folder, 0, -1)  # root's folder, which the agent's group may write
        async with running(home) as run:
            await run.agent.start()
            (second,) = await fares([Rival(tmp_path, "root", str(run.agent.outbox))])
            assert second.is_refused_for(run.agent.process.pid)
            await run.agent.stop()

        assert run.found() == []


@asynccontextmanager
async def started_at_once(
    folder: Path, *, bug: str | None = None
) -> AsyncIterator[tuple[list[Rival], list[Rival]]]:
    """Start agents at once; give those that run, and those that have ended. All are killed."""
    rivals = [Rival(folder, f"{n}", "outbox.db", bug=bug) for n in range(RIVALS)]
    async with asyncio.TaskGroup() as tasks:
        for rival in rivals:
            tasks.create_task(rival.start())
    try:
        alive = [r for r in rivals if r.process is not None and r.process.returncode is None]
        yield alive, [rival for rival in rivals if rival not in alive]
    finally:
        for rival in rivals:
            await rival.end()


@pytest.mark.process
async def test_of_agents_started_at_once_one_runs(
    tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    acknowledged: set[str] = set()
    # The first round finds no outbox; each other one the outbox of one that was killed.
    for n in range(tier(1, 100)):
        async with started_at_once(tmp_path) as (alive, ended):
            assert len(alive) == 1
            (winner,) = alive
            assert winner.process is not None
            fared = [await rival.end() for rival in ended]
            assert [it for it in fared if not it.is_refused_for(winner.process.pid)] == []
            witness = Witness(f"http://127.0.0.1:{winner.port}", seed=n)
            async with aiohttp.ClientSession() as session:
                assert await witness.post(session) == 204
            acknowledged |= witness.acknowledged

    assert acknowledged - known_ids(tmp_path / "outbox.db") == set()
    assert flaws(tmp_path / "outbox.db") == []


@pytest.mark.process
async def test_an_agent_that_takes_no_lock_is_found(tmp_path: Path) -> None:
    async with started_at_once(tmp_path, bug="without_lock") as (alive, ended):
        fared = [await rival.end() for rival in ended]
        assert len(alive) > 1 or not all(it.is_refused for it in fared)
