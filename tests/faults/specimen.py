"""An outbox worth damaging: events in all states, what is stale on free pages, and the truth of it.

Made by the writer itself. A `killed` one is a copy of database and log while the writer still has
them open, as a kill -9 leaves them. SQLite as some distributions build it wipes what it deletes;
here it does not, because elsewhere it does not either, and salvage must not take it for live.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from agent.clock import SystemClock
from agent.contract import read_event
from agent.event import Event
from agent.outbox import letters
from agent.outbox.records import Ack, Bury, Policy, Retry
from agent.outbox.writer import open_writer

_NOW_MS = 1_800_000_000_000

_EVERY_ROW = """
SELECT event.seq, message_id, event.state, accepted_ms, settled_ms,
       COALESCE(pending.attempts, dead.attempts, 0), failing_since_ms, reason, status, answer,
       COALESCE(pending.body, dead.body), app
  FROM event
  LEFT JOIN pending USING (seq)
  LEFT JOIN dead USING (seq)
 ORDER BY event.seq
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What the outbox held of one event before it was damaged."""

    seq: int
    message_id: str
    state: str
    accepted_ms: int
    settled_ms: int | None
    attempts: int
    failing_since_ms: int | None
    reason: str | None
    status: int | None
    answer: str | None
    body: bytes | None
    app: str


@dataclass(frozen=True, slots=True)
class Specimen:
    """An undamaged outbox at *path*. *rows* by seq; *gone* are ids that it held once."""

    path: Path
    rows: dict[int, Row]
    gone: frozenset[str]

    @property
    def files(self) -> list[Path]:
        """The database and, if there is one, its log."""
        return [file for file in (self.path, log_of(self.path)) if file.exists()]

    def copy(self, folder: Path) -> Path:
        """Copy database and log into *folder*; return the path of the database there."""
        for file in self.files:
            shutil.copy(file, folder)
        return folder / self.path.name


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def make(folder: Path, *, events: int, killed: bool, page_bytes: int = 4096) -> Specimen:
    """Make an outbox in *folder* that held *events*, some of which are gone by now."""
    path = folder / "whole" / "outbox.db"
    path.parent.mkdir(parents=True)
    with _sqlite_that_wipes_nothing(page_bytes):
        offered = asyncio.run(_live(path, events, folder if killed else None))
    if not killed:
        shutil.copy(path, folder)
    rows = _rows(folder / path.name, folder / "read")
    known = {row.message_id for row in rows.values()}
    return Specimen(folder / path.name, rows, frozenset(offered - known))


def event(number: int, rng: random.Random) -> Event:
    """Return an event as an app would post it; one in forty is of some ten KiB."""
    size = rng.randrange(2_000, 30_000) if rng.random() < 1 / 40 else rng.randrange(500)
    fields: dict[str, Any] = {
        "messageId": f"m-{number}-{rng.getrandbits(64):016x}",
        "event": "Item Sold",
        "userId": f"user-{number % 20}",
        "properties": {"number": number, "filler": rng.randbytes(size // 2).hex()},
    }
    if rng.random() < 1 / 2:
        fields["timestamp"] = "2026-11-23T10:00:00.000Z"
    parsed = read_event("track", json.dumps(fields).encode(), received_ms=_NOW_MS + number)
    return msgspec.structs.replace(parsed, app=("", "pos", "kiosk")[number % 3])


async def _live(path: Path, events: int, killed_into: Path | None) -> set[str]:
    """Let an outbox live: a third each evicted or forgotten, settled, and pending. Return all ids."""
    rng = random.Random(events)
    policy = Policy(max_bytes=1 << 30, evicts=True, remember=True)
    offered = [event(number, rng) for number in range(1, events + 1)]
    async with open_writer(path, policy, SystemClock()) as writer:
        for at in range(0, events, 50):
            await writer.append(offered[at : at + 50])
            if at <= events * 3 // 4 < at + 50:
                # What comes later is in the log alone.
                with closing(sqlite3.connect(path)) as other:
                    other.execute("PRAGMA wal_checkpoint")
            if at >= events // 2:
                await _settle(writer, range(at - events // 2 + 1, at - events // 2 + 51))
        await writer.perform(lambda store: store.evict(events * 30, limit=events // 12))
        # Ids that were delivered long ago, and dead letters that were seen to.
        await writer.perform(lambda store: store.prune(1 << 60, limit=events // 8))
        buried = list(range(4, events // 2, 8))
        await writer.perform(lambda store: letters.discard(store, buried[: len(buried) // 3]))
        await writer.perform(lambda store: letters.requeue(store, buried[-3:], now_ms=_NOW_MS))
        if killed_into is not None:
            for file in (path, log_of(path)):
                shutil.copy(file, killed_into)
    return {known.message_id for known in offered}


async def _settle(writer: Any, seqs: range) -> None:
    """Deliver most, set some aside, leave some to be tried again."""
    done = None
    for seq in seqs:
        match seq % 8:
            case 4:
                bury = Bury(seq=seq, reason="rejected", status=400, answer=f"no, {seq}")
                done = writer.settle(bury)
            case 5:
                done = writer.settle(Retry(seq))
            case 6:
                pass
            case _:
                done = writer.settle(Ack(seq))
    if done is not None:
        await done


def _rows(path: Path, scratch: Path) -> dict[int, Row]:
    """Return what SQLite reads of the outbox at *path*; from a copy, for it would empty the log."""
    scratch.mkdir()
    for file in (path, log_of(path)):
        if file.exists():
            shutil.copy(file, scratch)
    with closing(sqlite3.connect(scratch / path.name)) as db:
        return {row[0]: Row(*row) for row in db.execute(_EVERY_ROW)}


@contextmanager
def _sqlite_that_wipes_nothing(page_bytes: int) -> Iterator[None]:
    """Make what opens a database meanwhile leave deleted rows where they are."""
    connect = sqlite3.connect

    def connect_carelessly(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **options)
        db.execute(f"PRAGMA page_size = {page_bytes}")
        db.execute("PRAGMA secure_delete = OFF")
        return db

    sqlite3.connect = connect_carelessly  # type: ignore[assignment]
    try:
        yield
    finally:
        sqlite3.connect = connect
