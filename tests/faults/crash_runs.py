"""Short lives of the real daemon, recorded call by call: what `faults.crash_states` takes apart."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from faults import planted, syscalls
from faults.disk import Disk
from faults.promises import BEFORE_ALL, Promises, promised
from faults.syscalls import Operation
from faults.witness import Witness
from processes import DEADLINE_S, AgentProcess, free_port

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.contract import read_event
from agent.outbox import schema

FORWARD = """
backoff_base = "20ms"
backoff_max = "100ms"
"""

SYNCS_OF_DEATH = range(20, 45)
"""At one fdatasync of these a process is killed: a dozen are for the schema, then each is a commit."""

BIG_BYTES = 900_000
BIG_EVENTS = 5
"""In the log they take more than the 1000 pages at which SQLite checkpoints by itself. Once delivered
they leave more than the 1024 free pages that upkeep keeps: at the next start it vacuums."""

REFUSED = "Refused Item"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What the processes of one agent did, one after the other."""

    operations: Sequence[Operation] = field(repr=False)
    before: Mapping[str, bytes] = field(repr=False)
    """The files that were there at first, synced."""
    promises: Promises = field(repr=False)


class Recorder:
    """Starts processes of *agent* and traces each. Made by `recording`."""

    def __init__(self, agent: AgentProcess, command: Sequence[str]) -> None:
        self.agent = agent
        self.before = contents(agent.outbox)
        self._command = command
        self._traces: list[Path] = []

    async def start(self, *, kill_at_sync: int | None = None) -> None:
        """Start the next process; for *kill_at_sync* see `syscalls.traced`."""
        trace = self.agent.log.with_name(f"trace-{len(self._traces)}")
        trace.touch()
        self._traces.append(trace)
        self.agent.command = syscalls.traced(self._command, trace, kill_at_sync=kill_at_sync)
        await self.agent.start()

    async def stop(self) -> None:
        """End the process in order."""
        assert await self.agent.stop() == 0
        await self.dead()

    async def dead(self) -> None:
        """Return once the process is dead and its trace whole."""
        async with asyncio.timeout(DEADLINE_S):
            await self.agent.process.wait()
            await syscalls.ended(self._traces[-1], self.agent.process.pid)

    def recorded(self) -> Recording:
        """Return what was done, having checked that nothing was missed."""
        operations = syscalls.operations(self._traces, self.agent.outbox)
        disk = Disk(self.before)
        for index, operation in enumerate(operations):
            disk.apply(index, operation)
        assert disk.cached() == contents(self.agent.outbox), "the trace is not the whole story"
        for trace in self._traces:
            trace.unlink()
        promises = promised(operations, port=self.agent.port)
        return Recording(operations=operations, before=self.before, promises=promises)


def contents(outbox: Path) -> dict[str, bytes]:
    """Return the files that hold *outbox*, by name."""
    paths = [outbox.with_name(outbox.name + suffix) for suffix in syscalls.SUFFIXES]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


@asynccontextmanager
async def recording(
    folder: Path, *, upstream: str = "http://127.0.0.1:1", bug: str | None = None
) -> AsyncIterator[Recorder]:
    """Yield a recorder of an agent, not started yet, with its outbox in *folder*."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        agent = configured(folder, session, upstream)
        try:
            yield Recorder(agent, planted.command(bug))
        finally:
            if agent.process.returncode is None:
                await agent.kill()


def configured(folder: Path, session: aiohttp.ClientSession, upstream: str) -> AgentProcess:
    """Return an agent of this script."""
    folder.mkdir(exist_ok=True)
    return AgentProcess(
        folder,
        session,
        upstream=f'url = "{upstream}"\nwrite_key = "{DEFAULT_WRITE_KEY}"',
        forward=FORWARD,
    )


# --- the lives ---


async def whole_life(folder: Path, seed: int) -> Recording:
    """From a new path on: killed in a commit, offline, delivering, dead letters, vacuumed."""
    sandbox, port = Sandbox(DEFAULT_WRITE_KEY), free_port()
    async with recording(folder, upstream=f"http://127.0.0.1:{port}") as recorder:
        agent, apps = recorder.agent, Witness(recorder.agent.url, seed)
        await die_in_a_commit(recorder, seed)
        async with apps.posting(3):
            await apps.reach(60)
        async with sandbox.serving(port=port):
            await bury_three(agent, sandbox)
            await agent.ask("POST", "dead/requeue", {"messageIds": ["refused-0"]})
            await agent.ask("POST", "dead/discard", {"messageIds": ["refused-1"]})
            await agent.ask("POST", "pause")  # or the second would take the place of the first
            for number in range(BIG_EVENTS):
                assert await agent.post(event(f"big-{number}", filler="x" * BIG_BYTES)) == 204
            await agent.ask("POST", "resume")
            async with apps.posting(3):
                await apps.reach(100)
            await agent.until(lambda status: status["pending"] == 0)
        await recorder.stop()

        await recorder.start()
        async with apps.posting(3):
            await apps.reach(120)
        await recorder.stop()
        recorded = recorder.recorded()
    assert apps.acknowledged < set(recorded.promises.acknowledged)
    return recorded


async def die_in_a_commit(recorder: Recorder, seed: int) -> None:
    """Start on a new path, have the process killed between write and sync, and start the next one.

    To that one the app repeats the event that was not answered: it is in the page cache, stored to
    all appearances, and nowhere else.
    """
    await recorder.start(kill_at_sync=random.Random(seed).choice(SYNCS_OF_DEATH))
    unanswered = await post_until_dead(recorder.agent)
    await recorder.dead()
    await recorder.start()
    assert await recorder.agent.post(unanswered) == 204


async def post_until_dead(agent: AgentProcess) -> dict[str, Any]:
    """Post one event after the other; return the one that was not answered."""
    for number in range(SYNCS_OF_DEATH.stop):
        posted = event(f"early-{number}")
        try:
            assert await agent.post(posted) == 204
        except aiohttp.ClientError:
            return posted
    raise AssertionError("each event was answered, but not each was synced")


async def bury_three(agent: AgentProcess, sandbox: Sandbox) -> None:
    sandbox.fault = Fault(mode="status", status=400, match=REFUSED)
    for number in range(3):
        assert await agent.post(event(f"refused-{number}", name=REFUSED)) == 204
    await agent.until(lambda status: status["pending"] == 0 and status["dead"] == 3)
    sandbox.fault = Fault(mode="ok")


def event(message_id: str, *, name: str = "Item Sold", filler: str = "") -> dict[str, Any]:
    properties = {"filler": filler}
    return {"messageId": message_id, "event": name, "userId": message_id, "properties": properties}


async def first_minute(folder: Path, seed: int, bug: str | None = None) -> Recording:
    """A new path, some events, a stop in order."""
    async with recording(folder, bug=bug) as recorder:
        apps = Witness(recorder.agent.url, seed)
        await recorder.start()
        async with apps.posting(2):
            await apps.reach(25)
        await recorder.stop()
        return recorder.recorded()


async def upgrade(folder: Path, seed: int) -> Recording:
    """An outbox that the first version of the schema has left, and some events more."""
    kept = make_first_version(folder / "outbox.db")
    async with recording(folder) as recorder:
        apps = Witness(recorder.agent.url, seed)
        await recorder.start()
        async with apps.posting(2):
            await apps.reach(20)
        await recorder.stop()
        recorded = recorder.recorded()
    for posted in kept:
        recorded.promises.posted[posted["messageId"]] = posted
        recorded.promises.acknowledged[posted["messageId"]] = BEFORE_ALL
    return recorded


def make_first_version(outbox: Path) -> list[dict[str, Any]]:
    """Make an outbox of schema version 1; return the events that are pending in it."""
    outbox.parent.mkdir()
    kept = [event(f"kept-{number}", filler="x" * 300) for number in range(40)]
    with closing(sqlite3.connect(outbox, isolation_level=None)) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN")
        for statement in schema.MIGRATIONS[0]:
            db.execute(statement)
        for seq, posted in enumerate(kept, 1):
            parsed = read_event("track", json.dumps(posted).encode(), received_ms=seq)
            db.execute(
                "INSERT INTO event VALUES (?, ?, ?, 'pending', ?, NULL)",
                (seq, parsed.message_id, parsed.digest, seq),
            )
            db.execute(
                "INSERT INTO pending VALUES (?, ?, ?, ?, 0, NULL, ?)",
                (seq, parsed.kind, parsed.lane, seq, parsed.body),
            )
        db.execute("UPDATE ledger SET last_seq = :n, accepted = :n, pending = :n", {"n": len(kept)})
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        db.execute("COMMIT")
    return kept
