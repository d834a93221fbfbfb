"""The daemon with a bug planted in it: what the proofs of this folder must be seen to find.

    PYTHONPATH=tests python -m faults.planted BUG run --config agent.toml

Each bug breaks a promise in one way that a review could overlook. The agent itself has no switch
for any of them; they are put in from outside, before it starts.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from agent import daemon
from agent.__main__ import main
from agent.console import control
from agent.console.status import Status, collect
from agent.errors import OutboxError
from agent.event import Event
from agent.outbox import access, database, lock, schema
from agent.outbox.database import Database
from agent.outbox.reader import Reader
from agent.outbox.records import Appended
from agent.outbox.reserve import Reserve
from agent.outbox.salvage import tree
from agent.outbox.salvage.views import View
from agent.outbox.writer import Writer

Answer = list[Appended]

_append = Writer.append


# --- promise 1: what is answered is stored ---


def synchronous_normal() -> None:
    """Commit without a sync: kept by a process that dies, lost by a machine that does."""
    _connect_with("PRAGMA synchronous = NORMAL")


def synchronous_off() -> None:
    """Checkpoint without a sync, too: a power cut spoils the database itself."""
    _connect_with("PRAGMA synchronous = OFF")


def _connect_with(pragma: str) -> None:
    connect = database.connect

    async def connect_carelessly(path: Path, *, first: bool = True) -> Database:
        db = await connect(path, first=first)
        await db._connection.execute_fetchall(pragma)
        return db

    database.connect = connect_carelessly


def answer_before_commit() -> None:
    """Answer 204 once the event is queued."""

    async def append_some_day(writer: Writer, events: Sequence[Event]) -> Answer:
        _append(writer, events)
        return [Appended.STORED] * len(events)

    _append_by(append_some_day)


def ignore_commit_errors() -> None:
    """Answer 204 whatever came of the commit."""

    async def append_regardless(writer: Writer, events: Sequence[Event]) -> Answer:
        try:
            return await _append(writer, events)
        except OutboxError:
            return [Appended.STORED] * len(events)

    _append_by(append_regardless)


def answer_nobody() -> None:
    """Forget who waits for a commit that failed."""

    async def append_or_hang(writer: Writer, events: Sequence[Event]) -> Answer:
        try:
            return await _append(writer, events)
        except OutboxError:
            await asyncio.Event().wait()
            raise

    _append_by(append_or_hang)


def _append_by(append: Callable[[Writer, Sequence[Event]], Coroutine[Any, Any, Answer]]) -> None:
    def planted(self: Writer, events: Sequence[Event]) -> asyncio.Future[Answer]:
        return asyncio.get_running_loop().create_task(append(self, events))

    Writer.append = planted  # type: ignore[method-assign]


# --- faults of the disk ---


def never_reopen() -> None:
    """Open the outbox once, and not again after a fault."""
    connect = database.connect
    opened: list[Path] = []

    async def connect_once(path: Path, *, first: bool = True) -> Database:
        if opened:
            raise OutboxError(f"{path}: failed before")
        opened.append(path)
        return await connect(path, first=first)

    database.connect = connect_once


def hide_faults() -> None:
    """Say in `status` that all is well, whatever the disk does."""

    async def collect_good_news(reader: Reader, **known: Any) -> Status:
        return await collect(reader, **{**known, "full": None, "fault": None})

    vars(control).update(collect=collect_good_news)


def no_reserve() -> None:
    """Keep no disk space back."""

    def keep_nothing(self: Reserve) -> bool:
        self.held = True
        return True

    Reserve.keep = keep_nothing  # type: ignore[method-assign]


# --- others who open the outbox ---


def without_lock() -> None:
    """Let a second daemon in."""

    class Anybody:
        proven = True

        def prove(self) -> None:
            """Not needed."""

        def hold(self, outbox: Path) -> None:
            """Nor this."""

    @asynccontextmanager
    async def open_to_all(outbox: Path) -> AsyncIterator[Anybody]:
        del outbox
        yield Anybody()

    vars(lock).update(exclusive=open_to_all)


def reader_that_stays() -> None:
    """Leave a statement of the daemon's readers open: the log cannot start anew."""
    _beside_each_reader("BEGIN")


def reader_that_locks() -> None:
    """Let the daemon's readers begin as a writer does. That it waits for them only delays the end."""
    database._BUSY_TIMEOUT_S = 0.5
    _beside_each_reader("BEGIN IMMEDIATE")


def _beside_each_reader(begin: str) -> None:
    open_own_reader = access.open_own_reader
    begins = iter((begin,))  # the second reader does no more

    @asynccontextmanager
    async def and_more(path: Path, **options: Any) -> AsyncIterator[Reader]:
        async with open_own_reader(path, **options) as own:
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                for statement in begins:
                    db.execute(statement)
                    db.execute("SELECT accepted FROM ledger").fetchone()
                yield own

    vars(daemon).update(open_own_reader=and_more)


def reader_that_makes_files() -> None:
    """Read an outbox at rest like one in use: SQLite makes a log for it, whoever it is that looks."""
    open_connection = access._reader

    @asynccontextmanager
    async def as_in_use(path: Path, *, immutable: bool) -> AsyncIterator[Reader]:
        del immutable
        async with open_connection(path, immutable=False) as looking:
            yield looking

    access._reader = as_in_use


# --- upgrades ---


def another_migration() -> None:
    """Know one version more than this one does. No bug: shows that the next one cannot be."""
    schema.MIGRATIONS += (
        (
            "CREATE TABLE planted (seq INTEGER PRIMARY KEY, message_id TEXT NOT NULL) STRICT",
            "INSERT INTO planted SELECT seq, message_id FROM event",
            "CREATE INDEX planted_message_id ON planted (message_id)",
        ),
    )
    schema.VERSION += 1


def migration_in_steps() -> None:
    """Commit each statement of a migration by itself."""
    another_migration()

    def migrate_in_steps(db: sqlite3.Connection, found: int) -> None:
        for version in range(found, schema.VERSION):
            for statement in schema.MIGRATIONS[version]:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {version + 1}")

    schema.migrate = migrate_in_steps


# --- salvage ---


def salvage_skips_pages() -> None:
    """Look for rows on nine pages of ten."""
    numbers = View.numbers

    def most_numbers(self: View) -> Iterator[int]:
        return (number for number in numbers(self) if number % 10)

    View.numbers = most_numbers  # type: ignore[method-assign]


def salvage_believes_free_pages() -> None:
    """Take what once was on a page for what is there."""
    tree.is_in_use = lambda *_, **__: True


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (
        synchronous_normal,
        synchronous_off,
        answer_before_commit,
        ignore_commit_errors,
        answer_nobody,
        never_reopen,
        hide_faults,
        no_reserve,
        without_lock,
        reader_that_stays,
        reader_that_locks,
        reader_that_makes_files,
        another_migration,
        migration_in_steps,
        salvage_skips_pages,
        salvage_believes_free_pages,
    )
}


def command(bug: str | None) -> list[str]:
    """Return how to start the agent with *bug*; None: as it is. Needs `tests` on PYTHONPATH."""
    return [sys.executable, "-m", *(("agent",) if bug is None else ("faults.planted", bug))]


if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    main()
