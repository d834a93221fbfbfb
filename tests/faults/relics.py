"""Outboxes of every version so far, frozen as SQL beside what that version said of them.

    schemas/v1.sql     the tables as version 1 made them, with events in every state
    schemas/v1.json    its ledger, and its events in their order

A new migration needs a new relic, made once by the version that brings it and never again:

    PYTHONPATH=tests python -m faults.relics
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import msgspec

from agent.console.receipts import view
from agent.contract import read_event
from agent.event import Event
from agent.outbox import letters, schema
from agent.outbox.access import open_reader
from agent.outbox.records import Ack, Bury, Policy, Reason, Retry, Selection, State
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer

FOLDER = Path(__file__).parent / "schemas"

REMEMBER = 'delivered_retention = "36500d"'
"""What relics need in [outbox]: their events were delivered long ago."""

TOKEN_DIGESTS = {name: sha256(name.encode()).digest() for name in ("pos", "kiosk")}
"""Of the apps in relics since version 4."""

_MADE_MS = 1_780_000_000_000
"""The time of day in which relics are made, so that two of them are alike."""


def path_of(version: int, kind: str) -> Path:
    return FOLDER / f"v{version}.{kind}"


def testimony(version: int) -> dict[str, Any]:
    """Return what *version* said of its relic, as `testify` does."""
    said: dict[str, Any] = json.loads(path_of(version, "json").read_text())
    return said


async def testify(outbox: Path) -> dict[str, Any]:
    """Return the counters of *outbox*, and its events in their order as `list --json` shows them."""
    async with open_reader(outbox) as reader:
        ledger = asdict(await reader.ledger())
        receipts = [
            receipt
            for state in get_args(State)
            for receipt in await reader.select(state, Selection(), limit=1000)
        ]
    said = {"ledger": ledger, "events": [view(receipt) for receipt in receipts]}
    testimony: dict[str, Any] = json.loads(msgspec.json.encode(said))
    return testimony


def restore(version: int, outbox: Path, *, in_log: bool) -> None:
    """Put the relic of *version* at *outbox*; 0 is a file that an agent was about to fill.

    *in_log*: as a killed agent leaves it, with all of it still in the write-ahead log.
    """
    if version == 0:
        outbox.touch(0o640)
        return
    made = outbox.with_name("restored.db")
    with closing(sqlite3.connect(made, isolation_level=None)) as db:
        db.executescript(path_of(version, "sql").read_text())
        if not in_log:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in ("", "-wal"):
            shutil.copy(f"{made}{suffix}", f"{outbox}{suffix}")
    made.unlink()


# --- making them ---


_BURIED: tuple[tuple[int, Reason, int | None], ...] = (
    (3, "rejected", 400),
    (4, "gave_up", 500),
    (5, "expired", None),
    (6, "rejected", 400),
    (9, "rejected", 400),
)
"""Dead letters of the relic by seq; 6 is discarded, and 9 put back."""


class _Clock:
    """A minute an event."""

    def __init__(self) -> None:
        self._now_ms = _MADE_MS

    def wall_ms(self) -> int:
        self._now_ms += 60_000
        return self._now_ms

    def monotonic_s(self) -> float:
        return self._now_ms / 1000


def _event(message_id: str, user: str, clock: _Clock) -> Event:
    body = {
        "messageId": message_id,
        "event": "Item Sold",
        **({"anonymousId": user} if user.startswith("guest") else {"userId": user}),
        "timestamp": "2026-05-28T20:26:40.000Z",
        "properties": {"name": "Käse ☕", "price": 1.10, "it's": [True, None]},
    }
    return read_event("track", json.dumps(body).encode(), received_ms=clock.wall_ms())


async def _fill(outbox: Path) -> None:
    """Make an outbox in which each state, reason and counter has something to show."""
    clock = _Clock()
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=True)
    users = ("ann", "bob", "guest-7")
    events = [_event(f"event-{n}", users[n % len(users)], clock) for n in range(1, 17)]
    async with open_writer(outbox, policy, clock) as writer:
        for event in events[:12]:
            await writer.append([event])
        await writer.append([events[2]])  # repeated
        await writer.append([_event("event-3", "bob", clock)])  # repeated otherwise
        for seq, reason, status in _BURIED:
            for _ in range(seq):
                await writer.settle(Retry(seq))
            answer = '{"error":"it\'s"}'
            await writer.settle(Bury(seq=seq, reason=reason, status=status, answer=answer))
        for seq in (1, 2, 8):
            await writer.settle(Ack(seq))
        for seq in (7, 7, 7, 10):
            await writer.settle(Retry(seq))
        await writer.perform(lambda store: letters.discard(store, [6]))
        await writer.perform(lambda store: letters.requeue(store, [9], now_ms=clock.wall_ms()))
        await writer.append(events[12:])
        other = _event("event-17", "ann", clock)
        await writer.append([msgspec.structs.replace(other, upstream="crm")])
        await writer.settle(Ack(18))
        await _fill_apps(writer, clock)


async def _fill_apps(writer: Writer, clock: _Clock) -> None:
    """Add what came from apps: of one that is known by its token, and of one whose was revoked."""
    for name, digest in TOKEN_DIGESTS.items():
        await writer.perform(partial(_issue, name=name, digest=digest))
    for n, name in enumerate(("pos", "pos", "pos", "kiosk"), 18):
        event = _event(f"event-{n}", "cid", clock)
        await writer.append([msgspec.structs.replace(event, app=name)])
    await writer.settle(Ack(19))
    await writer.settle(Bury(seq=20, reason="rejected", status=400, answer="no"))
    await writer.perform(lambda store: store.apps.revoke("kiosk", now_ms=clock.wall_ms()))


def _issue(store: Store, *, name: str, digest: bytes) -> bool:
    return store.apps.issue(name, digest, now_ms=_MADE_MS)


def _dump(db: sqlite3.Connection) -> Iterator[str]:
    """Yield the lines of SQL that make the database anew, header and all."""
    pragmas = ("page_size", "auto_vacuum", "journal_mode", "application_id", "user_version")
    value = {pragma: db.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas}
    for pragma in pragmas[:3]:
        yield f"PRAGMA {pragma} = {value[pragma]};"
    yield "BEGIN;"
    made = db.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql NOT NULL").fetchall()
    for kind, name, sql in made:
        yield f"{sql};"
        if kind == "table":
            for row in db.execute(f"SELECT * FROM {name}"):
                yield f"INSERT INTO {name} VALUES ({', '.join(map(_literal, row))});"
    for pragma in pragmas[3:]:
        yield f"PRAGMA {pragma} = {value[pragma]};"
    yield "COMMIT;"


def _literal(value: object) -> str:
    match value:
        case None:
            return "NULL"
        case bytes() if value.startswith(b'{"'):
            return f"CAST({_literal(value.decode())} AS BLOB)"
        case bytes():
            return f"X'{value.hex()}'"
        case str():
            return "'" + value.replace("'", "''") + "'"
        case _:
            return str(value)


async def _freeze() -> None:
    if path_of(schema.VERSION, "sql").exists():
        sys.exit(f"{path_of(schema.VERSION, 'sql')}: exists already; a relic is not made twice")
    with tempfile.TemporaryDirectory() as folder:
        outbox = Path(folder) / "outbox.db"
        await _fill(outbox)
        said = await testify(outbox)
        with closing(sqlite3.connect(outbox)) as db:
            sql = "\n".join(_dump(db))
    FOLDER.mkdir(exist_ok=True)
    path_of(schema.VERSION, "sql").write_text(f"{sql}\n")
    ledger, events = said.values()
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in events)
    path_of(schema.VERSION, "json").write_text(
        f'{{"ledger": {json.dumps(ledger)}, "events": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    asyncio.run(_freeze())
