"""The write-ahead log stays short beside readers that overlap, that stay, and on a disk that fails."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from agent.clock import SystemClock
from agent.errors import OutboxUnavailableError
from agent.event import Event
from agent.outbox.access import open_own_reader, open_reader
from agent.outbox.records import Ack, Policy, Selection
from agent.outbox.rewinding import Rewinding
from agent.outbox.search import PART_EVENTS
from agent.outbox.store import Store
from agent.outbox.writer import open_writer

DEADLINE_S = 60.0
SPACIOUS = Policy(max_bytes=1 << 30, evicts=False, remember=True)

MIB = 1024 * 1024
LOG_BYTES = 64 * MIB
"""What the log stays under."""

LONG_BYTES = 25 * MIB
"""A log that is worth a wait."""

AS_THE_AGENT = ""
AS_AN_OPERATOR = "&readonly_shm=1"
"""One of the agent's group may not write to the -shm: such a reader joins those who read already."""

OVERLAPPING = """
import sqlite3, sys

def begun():
    db = sqlite3.connect(sys.argv[1], uri=True, isolation_level=None)
    db.execute("BEGIN")
    db.execute("SELECT last_seq FROM ledger").fetchall()
    return db

reading = begun()
print("reading", flush=True)
while True:
    reading, before = begun(), reading
    before.close()
"""
"""Reads all the time: each reader begins before the one before it ends."""


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def event(name: str, *, size: int = 40) -> Event:
    body = b'{"event":"%s"}' % name.ljust(size - 12, ".").encode()
    digest = hashlib.blake2b(body, digest_size=16).digest()
    return Event(
        message_id=name,
        kind="track",
        lane=1,
        digest=digest,
        received_ms=1_800_000_000_000,
        body=body,
    )


def log_bytes(outbox: Path) -> int:
    return outbox.with_name(f"{outbox.name}-wal").stat().st_size


@contextmanager
def overlapping(outbox: Path, *, how: str) -> Iterator[None]:
    command = [sys.executable, "-c", OVERLAPPING, f"file:{outbox}?mode=ro{how}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as readers:
        assert readers.stdout is not None
        try:
            assert readers.stdout.readline() == b"reading\n"
            yield
            assert readers.poll() is None
        finally:
            readers.kill()


@contextmanager
def staying(outbox: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchall()
        yield db


@contextmanager
def failing_writes(upto_bytes: int) -> Iterator[None]:
    """Let every write behind byte *upto_bytes* of a file fail, as a broken disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (upto_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("how", [AS_THE_AGENT, AS_AN_OPERATOR])
async def test_readers_that_overlap_all_the_time_leave_the_log_bounded(
    outbox: Path, how: str
) -> None:
    largest = 0
    async with asyncio.timeout(DEADLINE_S), open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        with overlapping(outbox, how=how):
            for n in range(40):
                await writer.append([event(f"id{n}", size=2 * MIB)])
                largest = max(largest, log_bytes(outbox))

    assert largest < LOG_BYTES


def test_a_reader_that_stays_is_waited_for_once_each_time_the_log_doubles(tmp_path: Path) -> None:
    path = tmp_path / "database"
    waits: list[int] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE ledger (last_seq INTEGER)")
        db.execute("CREATE TABLE filler (bytes BLOB)")
        rewinding = Rewinding(path.with_name("database-wal"))
        db.set_trace_callback(
            lambda sql: waits.append(log_bytes(path)) if "wal_checkpoint" in sql else None
        )
        with staying(path):
            while log_bytes(path) < 110 * MIB:
                rewinding.rewind_if_long(db)
                db.execute("INSERT INTO filler VALUES (zeroblob(1048576))")

        assert len(waits) == 3  # at 24, 48 and 96 MiB or so
        assert db.execute("PRAGMA busy_timeout").fetchall() == [(5000,)]


async def test_readers_that_begin_where_another_did_let_a_long_log_begin_anew(outbox: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        await writer.append([event("first")])
        with ExitStack() as readers:

            def lengthen(store: Store) -> None:
                # They begin before its end is known: at the end of the one before.
                readers.enter_context(overlapping(outbox, how=AS_AN_OPERATOR))
                store.append([event("long", size=LONG_BYTES)])

            await writer.perform(lengthen)
            assert log_bytes(outbox) > LONG_BYTES
            await writer.append([event("after")])

            assert log_bytes(outbox) < LONG_BYTES


async def test_a_log_that_cannot_be_written_into_the_database_is_a_fault(outbox: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        await writer.append([event("ahead", size=LONG_BYTES // 2)])
        with staying(outbox):
            await writer.append([event("long", size=LONG_BYTES)])
        # There would be room in the log, but not in the database.
        with failing_writes(log_bytes(outbox) + MIB):
            with pytest.raises(OutboxUnavailableError, match="IOERR"):
                await writer.append([event("refused")])
            settled = writer.settle(Ack(1))
        await settled
        await writer.append([event("after")])

    async with open_reader(outbox) as reader:
        found = [await reader.receipt(name) for name in ("ahead", "long", "refused", "after")]
    states = [receipt and receipt.state for receipt in found]
    assert states == ["delivered", "pending", None, "pending"]


async def test_a_search_of_large_events_is_many_short_reads(outbox: Path) -> None:
    async with asyncio.timeout(DEADLINE_S), open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        for n in range(8):
            await writer.append([event(f"id{n}", size=4 * MIB)])
        async with open_own_reader(outbox) as reader:
            reads: list[str] = []
            await reader._db.set_trace_callback(reads.append)
            found = await reader.select("pending", Selection(text="id7"), limit=2)

    assert [receipt.message_id for receipt in found] == ["id7"]
    assert len([sql for sql in reads if "instr" in sql]) == 8


async def test_a_search_finds_what_is_to_be_found_in_each_of_its_parts(outbox: Path) -> None:
    names = [f"id{n}" for n in range(2 * PART_EVENTS)]
    async with asyncio.timeout(DEADLINE_S), open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        await writer.append([event(name) for name in names])
        async with open_own_reader(outbox) as reader:
            everything = await reader.select("pending", Selection(text="id"), limit=9999)
            page = await reader.select("pending", Selection(), after=PART_EVENTS - 3, limit=6)
            await writer.settle(*map(Ack, range(1, 2 * PART_EVENTS + 1)))
            delivered = await reader.select("delivered", Selection(), limit=2 * PART_EVENTS)

    assert [receipt.message_id for receipt in everything] == names
    assert [receipt.message_id for receipt in page] == names[PART_EVENTS - 3 : PART_EVENTS + 3]
    assert [receipt.message_id for receipt in delivered] == names
