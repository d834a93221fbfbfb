"""A damaged outbox costs what lay on the damaged pages, and no more; the daemon starts whatever it finds.

All three hundred damages are read by salvage alone. The daemon meets twelve of them, and with
--deep all: each time it must start, take an event, go on, and have what was spared.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faults import damage, planted
from faults.damage import Damage, damages
from faults.specimen import Specimen, make
from faults.verdict import Spared, Verdict, extents_of, judge
from faults.witness import flaws
from processes import DEADLINE_S, AgentProcess

from agent.outbox.salvage import surviving, tree
from agent.outbox.salvage.views import View

START_S = 2.0
"""From the start of the process to the first event that is answered 204, in the median."""

SLOWER = 3
"""How often longer than with a sound outbox it may take on a machine that is busy."""

STRIDE = 23
"""Between the damages that the daemon meets: prime to their number, so that the first are of many kinds."""

NEW = {"messageId": "new", "event": "Item Sold", "userId": "user-1"}

SALVAGED = 0.99
"""The part of the rows on intact pages that must be found."""


class Collection:
    """The two outboxes that are damaged, and where their rows lie."""

    def __init__(self, folder: Path, events: int) -> None:
        self._whole = {
            killed: make(folder / f"killed-{killed}", events=events, killed=killed)
            for killed in (False, True)
        }
        self._extents = {killed: extents_of(whole) for killed, whole in self._whole.items()}

    def inflict(self, damaging: Damage, path: Path) -> tuple[Specimen, Spared]:
        """Put a damaged outbox at *path*; return what it was, and what was spared."""
        whole = self._whole[damaging.killed]
        damaging.inflict(path, whole)
        return whole, Spared(whole, self._extents[damaging.killed], path)


@pytest.fixture(scope="module")
def collection(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Collection:
    events = 1_000 if request.config.getoption("--deep") else 200
    return Collection(tmp_path_factory.mktemp("collection"), events)


def complaints(damaging: Damage, verdict: Verdict) -> list[str]:
    """Return what is wrong with a verdict."""
    found = []
    if len(verdict.missing) > (1 - SALVAGED) * verdict.spared:
        found.append(f"{len(verdict.missing)} of {verdict.spared} spared rows are missing")
    if verdict.undelivered:
        found.append(f"{len(verdict.undelivered)} delivered events would be sent again")
    # Without its newest log, a database is what it was before: what left it since is back in it.
    if verdict.returned and not damaging.hurts_log:
        found.append(f"{len(verdict.returned)} events came back that were gone")
    if len(verdict.invented) > verdict.hurt:
        found.append(f"{len(verdict.invented)} events that never were")
    return [f"{damaging}: {complaint}" for complaint in found]


# --- salvage alone ------------------------------------------------------------------------------


def read_all(collection: Collection, folder: Path, chosen: list[Damage]) -> list[str]:
    found: list[str] = []
    for damaging in chosen:
        home = folder / str(damaging)
        home.mkdir()
        whole, spared = collection.inflict(damaging, home / "outbox.db")
        verdict = judge(whole, spared, surviving(home / "outbox.db"))
        found += complaints(damaging, verdict)
        for file in home.iterdir():
            file.unlink()
    return found


def test_every_row_on_an_intact_page_is_found(collection: Collection, tmp_path: Path) -> None:
    assert len(damages()) == damage.COUNT
    found = read_all(collection, tmp_path, damages())
    assert not found, "\n".join(found)


@pytest.fixture(params=["salvage_skips_pages", "salvage_believes_free_pages"])
def bug(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_planted_bug_is_found_in_salvage_alone(
    collection: Collection, tmp_path: Path, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((View, "numbers"), (tree, "is_in_use")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    planted.BUGS[bug]()
    assert read_all(collection, tmp_path, damages()[:12])


# --- the daemon ---------------------------------------------------------------------------------


@asynccontextmanager
async def agent_in(folder: Path, bug: str | None = None) -> AsyncIterator[AgentProcess]:
    """Have an agent whose outbox belongs in *folder*, not started yet; end it with the block."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        agent = AgentProcess(folder, session)
        agent.command = planted.command(bug)
        try:
            yield agent
        finally:
            if agent._process is not None and agent._process.returncode is None:
                await agent.kill()


async def start(agent: AgentProcess) -> float:
    """Start the agent; return after how many seconds it had taken an event."""
    began = time.monotonic()
    await agent.start()
    assert await agent.post(NEW) == 204
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Home:
    """A folder that an agent lived in: it takes care of no database but its own."""

    folder: Path
    start_s: float
    """How long its start took, with a sound outbox, now, here."""

    def furnish(self, folder: Path) -> None:
        """Make *folder* such a one, but for the database."""
        for file in self.folder.glob("outbox.db*"):
            if file.name.removeprefix("outbox.db") not in {"", "-wal", "-shm"}:
                shutil.copy(file, folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Skips for a daemon that does not salvage."""
    folder = tmp_path_factory.mktemp("home")

    async def live() -> tuple[float, dict[str, Any]]:
        async with agent_in(folder) as agent:
            start_s, status = await start(agent), await agent.status()
            await agent.stop()
            return start_s, status

    start_s, status = asyncio.run(live())
    if "salvage" not in status:
        pytest.skip("this daemon does not salvage yet")
    return Home(folder, start_s)


def set_aside(folder: Path) -> list[Path]:
    return list(folder.glob("*.damaged-*[0-9]"))


def is_over(status: dict[str, Any]) -> bool:
    return status["salvage"] is None or status["salvage"]["state"] != "running"


async def meet(
    collection: Collection, damaging: Damage, home: Home, folder: Path, bug: str | None = None
) -> tuple[float, list[str]]:
    """Let a daemon meet a damage; return how long its start took, and what was wrong."""
    home.furnish(folder)
    async with agent_in(folder, bug) as agent:
        whole, spared = collection.inflict(damaging, agent.outbox)
        if damaging.cuts_log:
            spared.up_to_the_last_commit()
        taken_s = await start(agent)
        salvage = (await agent.until(is_over))["salvage"]
        assert await agent.stop() == 0, agent.log.read_text()
        if salvage is None and set_aside(folder):
            # It was noticed at the very end: another process takes that over.
            await agent.start()
            salvage = (await agent.until(lambda s: is_over(s) and s["salvage"] is not None))[
                "salvage"
            ]
            assert await agent.stop() == 0, agent.log.read_text()
    survivors = list(surviving(agent.outbox))
    verdict = judge(whole, spared, [s for s in survivors if s.message_id != NEW["messageId"]])
    found = complaints(damaging, verdict)
    if NEW["messageId"] not in {survivor.message_id for survivor in survivors}:
        found.append(f"{damaging}: the new event is lost")
    if salvage is not None:
        aside = folder / Path(salvage["moved_to"]).name
        if salvage["state"] != "done":
            found.append(f"{damaging}: salvage {salvage['state']}")
        if judge(whole, spared, surviving(aside)).missing:
            found.append(f"{damaging}: {aside.name} does not hold what was spared any more")
        found += [f"{damaging}: {flaw}" for flaw in flaws(agent.outbox)]
    return taken_s, found


@pytest.mark.process
async def test_the_daemon_starts_on_whatever_is_left_and_has_what_was_spared(
    collection: Collection,
    tmp_path: Path,
    tier: Callable[[int, int], int],
    home: Home,
) -> None:
    taken: dict[str, float] = {}
    found: list[str] = []
    for i in range(tier(12, damage.COUNT)):
        damaging = damages()[i * STRIDE % damage.COUNT]
        folder = tmp_path / str(damaging)
        folder.mkdir()
        try:
            taken[folder.name], wrong = await meet(collection, damaging, home, folder)
        except (AssertionError, aiohttp.ClientError, TimeoutError) as exc:
            wrong = [f"{damaging}: {type(exc).__name__} …{str(exc)[-300:]}"]
        found += wrong
    assert not found, "\n".join(found)
    slowest = max(taken, key=lambda name: taken[name])
    assert statistics.median(taken.values()) < max(START_S, SLOWER * home.start_s), (
        f"at most {taken[slowest]:.2f} s ({slowest}), {home.start_s:.2f} s when sound"
    )


@pytest.mark.process
async def test_a_planted_bug_is_found_in_the_daemon(
    collection: Collection, tmp_path: Path, bug: str, home: Home
) -> None:
    unreadable = next(way for way in damages() if way.way is damage.no_magic)
    _, found = await meet(collection, unreadable, home, tmp_path, bug)
    assert found
