"""What the agent is measured against, each in a process of its own: HTTP alone, and SQLite alone.

    app          a bare aiohttp application that reads the body and answers 204     (B1)
    client       a bare aiohttp client loop that posts the same events              (B3)
    batches      the same loop with bodies of many events, built before             (B9)
    executemany  the rows of an outbox, written again by one thread in large groups (B2)
    commits      the same rows, one event a commit, at a steady rate                (B5)

The two of SQLite take schema and rows from an outbox that the agent's own writer made, so that
they need not know them: every table that has one row an event is written, indices and all. They
do not keep the ledger, so they do a little less than the agent must.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web

from benchmarks import events, filling
from benchmarks.load import SPIN_S, Load, load_of
from benchmarks.processes import FigureError, Server, ask, say_result, serving

ROWS_A_TRANSACTION = 1_000

CONCURRENCY = 8
"""Requests under way at once: the default of forward.concurrency."""

BATCH_EVENTS = 200
"""Events of a request: the default of forward.batch_events."""

_Table = tuple[str, list[tuple[object, ...]]]
"""An INSERT and its rows, in order of acceptance."""


@contextmanager
def app() -> Iterator[Server]:
    """Serve the bare application while the block runs."""
    with serving("benchmarks.references", "app") as server:
        yield server


def post_all(port: int, count: int, seed: int) -> float:
    """Post the *count* events of *seed* with the bare client; return its processor seconds."""
    return ask(
        *("benchmarks.references", "client", port, count, seed),
        result=float,
        timeout_s=60 + count / 100,
    )


def post_batches(port: int, count: int, seed: int) -> float:
    """Post the same events in batches of `BATCH_EVENTS`; return the client's processor seconds."""
    return ask(
        *("benchmarks.references", "batches", port, count, seed),
        result=float,
        timeout_s=60 + count / 100,
    )


def executemany(like: Path, outbox: Path, count: int) -> float:
    """Write the *count* events of *like* into *outbox* anew; return events a second."""
    return ask(
        *("benchmarks.references", "executemany", like, outbox, count),
        result=float,
        timeout_s=60 + count / 100,
    )


def commits(like: Path, outbox: Path, count: int, rate: float, seconds: float) -> Load:
    """Commit one event of *like* after the other into *outbox*, *rate* a second."""
    return ask(
        *("benchmarks.references", "commits", like, outbox, count, rate, seconds),
        result=Load,
        timeout_s=60 + seconds,
    )


# --- HTTP alone ---------------------------------------------------------------------------------


async def _serve_app() -> None:
    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=204)

    application = web.Application()
    application.router.add_post("/api/public/apps/track", take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    await web.SockSite(runner, listening).start()
    say_result(listening.getsockname()[1])
    await asyncio.Event().wait()


async def _post_all(port: int, count: int, seed: int) -> float:
    return await _post(port, "track", list(events.bodies(count, seed)))


async def _post_batches(port: int, count: int, seed: int) -> float:
    items = [{"type": "track", **json.loads(body)} for body in events.bodies(count, seed)]
    bodies = [
        json.dumps({"batch": items[first : first + BATCH_EVENTS]}, separators=(",", ":")).encode()
        for first in range(0, count, BATCH_EVENTS)
    ]
    return await _post(port, "batch", bodies)


async def _post(port: int, endpoint: str, bodies: list[bytes]) -> float:
    url = f"http://127.0.0.1:{port}/api/public/apps/{endpoint}"
    headers = {
        "Authorization": "Bearer benchmark-key",
        "PublicWriteKey": "benchmark-key",
        "Content-Type": "application/json",
    }
    waiting = iter(bodies)
    gc.collect()
    gc.freeze()

    async def work(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            async with session.post(url, data=body, headers=headers) as response:
                await response.read()
                if response.status != 204:
                    raise FigureError(f"the upstream answered {response.status}")

    before_s = time.process_time()
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        for _ in range(CONCURRENCY):
            tasks.create_task(work(session))
    return time.process_time() - before_s


# --- SQLite alone -------------------------------------------------------------------------------


def _executemany(like: Path, outbox: Path, count: int) -> float:
    """Return events a second of large transactions."""
    tables = _tables(like, count)
    with closing(_opened(outbox)) as db:
        started_s = time.perf_counter()
        for first in range(0, count, ROWS_A_TRANSACTION):
            db.execute("BEGIN IMMEDIATE")
            for insert, rows in tables:
                db.executemany(insert, rows[first : first + ROWS_A_TRANSACTION])
            db.execute("COMMIT")
        return count / (time.perf_counter() - started_s)


def _commits(like: Path, outbox: Path, count: int, rate: float, seconds: float) -> Load:
    """Commit one event at a time, due at a steady rate; latency counts from the due time."""
    tables = _tables(like, count)
    latencies_s = []
    with closing(_opened(outbox)) as db:
        started_s = time.perf_counter()
        for i in range(min(count, max(1, round(rate * seconds)))):
            due_s = started_s + i / rate
            time.sleep(max(0.0, due_s - time.perf_counter() - SPIN_S))
            while time.perf_counter() < due_s:
                pass
            db.execute("BEGIN IMMEDIATE")
            for insert, rows in tables:
                db.execute(insert, rows[i])
            db.execute("COMMIT")
            latencies_s.append(time.perf_counter() - due_s)
        return load_of(latencies_s, seconds=time.perf_counter() - started_s, failed=0)


def _opened(outbox: Path) -> sqlite3.Connection:
    """Return a plain connection to a new, empty outbox, as durable as the agent's."""
    filling.make_empty(outbox)
    db = sqlite3.connect(outbox, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    gc.collect()
    gc.freeze()
    return db


def _tables(like: Path, count: int) -> list[_Table]:
    """Return what the *count* events of an outbox are made of: the tables with a row for each."""
    with closing(sqlite3.connect(f"file:{like}?mode=ro", uri=True)) as db:
        names = [
            name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        ]
        tables = [_table(db, name) for name in names if _rows(db, name) == count]
    if not tables:
        raise FigureError(f"{like}: no table has one row for each of the {count} events")
    return tables


def _rows(db: sqlite3.Connection, table: str) -> int:
    ((rows,),) = db.execute(f'SELECT COUNT(*) FROM "{table}"')
    return int(rows)


def _table(db: sqlite3.Connection, name: str) -> _Table:
    columns: Sequence[str] = [row[1] for row in db.execute(f'PRAGMA table_info("{name}")')]
    listed = ", ".join(f'"{column}"' for column in columns)
    # In order of acceptance, as the agent writes them: another order would suit an index better.
    order = "ORDER BY seq" if "seq" in columns else ""
    rows = db.execute(f'SELECT {listed} FROM "{name}" {order}').fetchall()
    return f'INSERT INTO "{name}" ({listed}) VALUES ({", ".join("?" for _ in columns)})', rows


def _main(reference: str, *arguments: str) -> None:
    match reference, arguments:
        case "app", ():
            uvloop.run(_serve_app())
        case "client", (port, count, seed):
            say_result(uvloop.run(_post_all(int(port), int(count), int(seed))))
        case "batches", (port, count, seed):
            say_result(uvloop.run(_post_batches(int(port), int(count), int(seed))))
        case "executemany", (like, outbox, count):
            say_result(_executemany(Path(like), Path(outbox), int(count)))
        case "commits", (like, outbox, count, rate, seconds):
            say_result(_commits(Path(like), Path(outbox), int(count), float(rate), float(seconds)))
        case _:
            raise SystemExit(f"{reference} {arguments}: no such reference; see the module")


if __name__ == "__main__":
    _main(*sys.argv[1:])
