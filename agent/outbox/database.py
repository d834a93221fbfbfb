"""The one connection that writes: whose file it is, which version, and how a transaction runs.

A transaction is one call in the connection's thread, from BEGIN to the sync of its COMMIT: going
back and forth between event loop and thread for each statement took longer than the statements.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from agent.errors import OutboxDamagedError, OutboxError
from agent.outbox import files, schema
from agent.outbox.ids import id_hash
from agent.outbox.records import App
from agent.outbox.rewinding import Rewinding
from agent.outbox.store import Store

T = TypeVar("T")

_BUSY_TIMEOUT_S = 5.0
"""A reader that recovers the log after a crash holds the database for moments; nobody else does."""

_PAGE_BYTES = 2048
"""Of a new database. One small event changes a handful of pages: smaller ones write less, larger
ones hold a backlog better. Half of SQLite's default is where flash and backlog both do well."""

_LOG_PAGES = 2000
"""After so many pages in the log they go into the database: 4 MiB, so that pages that change often
are written once."""

_LOG_BYTES = 8 * 1024 * 1024
"""To what the write-ahead log shrinks again after a burst."""

_CHECKED_PAGES = 8_192
"""A database up to this size is checked whole when it is opened: tens of milliseconds. In a larger
one damage is found where it is met."""

_SOUND_LEDGER = """
SELECT accepted = delivered + pending + dead + discarded
   AND last_seq >= (SELECT COALESCE(MAX(seq), 0) FROM event)
   AND last_seq >= (SELECT COALESCE(MAX(seq), 0) FROM pending)
   AND indexed_upto <= last_seq
  FROM ledger
"""

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class Database:
    """The open write connection. Made by `connect`."""

    def __init__(self, connection: _Connection, store: Store, rewinding: Rewinding) -> None:
        self._connection = connection
        self._store = store
        self._rewinding = rewinding

    @property
    def last_seq(self) -> int:
        """The highest seq ever given."""
        return self._store.last_seq

    @property
    def withdrawn(self) -> int:
        """How many pending events were evicted or expired since the outbox was opened."""
        return self._store.withdrawn

    @property
    def withdrawn_upto(self) -> int:
        """The highest seq among those."""
        return self._store.withdrawn_upto

    @property
    def waiting(self) -> Mapping[str, int]:
        """How many events are pending for each named upstream that has some."""
        return self._store.backlogs.pending

    @property
    def apps(self) -> Mapping[str, App]:
        """The apps that are known, by name."""
        return self._store.apps.known

    async def transact(self, verb: Callable[[Store], T]) -> T:
        """Run *verb* in the connection's thread; return its result once the commit is synced.

        Whatever *verb* raises undoes what it did. Raises `sqlite3.Error` if it cannot be stored.
        """

        def begun(store: Store) -> T:
            store.begin()
            return verb(store)

        return await self._connection.submit(lambda db: self._transact(db, begun))

    def transact_all(
        self,
        next_verb: Callable[[], Callable[[Store], T] | None],
        committed: Callable[[T], None],
    ) -> asyncio.Future[None]:
        """Run one verb after another, each in a transaction, until *next_verb* has no more.

        Each begins it itself (`Store.begin`), unless it is a single statement.
        It starts at once and does not come back to the event loop in between: a loop that is busy
        with requests would keep the disk waiting. *next_verb* is called in the connection's thread,
        *committed* in the event loop, with each result once its commit is synced. The future is done
        when all are; it raises what the last one raised.
        """
        loop = asyncio.get_running_loop()

        def work(db: sqlite3.Connection) -> None:
            while (verb := next_verb()) is not None:
                loop.call_soon_threadsafe(committed, self._transact(db, verb))

        return self._connection.submit(work)

    def _transact(self, db: sqlite3.Connection, verb: Callable[[Store], T]) -> T:
        try:
            self._rewinding.rewind_if_long(db)
            result = verb(self._store)
            db.commit()
        except BaseException:
            if db.in_transaction:  # SQLite may have rolled it back already
                db.rollback()
            self._store.rolled_back()
            raise
        self._store.committed()
        return result

    async def prove(self) -> None:
        """Commit and sync something. Raises `sqlite3.Error` if that fails."""
        await self.transact(lambda store: store.touch())

    async def empty_log(self) -> None:
        """Empty the log into the database. Raises `sqlite3.Error` if that fails."""
        await self._connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")

    async def rewind_log(self, before: Callable[[], object] = lambda: None) -> None:
        """Write the log into the database, but keep its space: it begins anew in what it has.

        *before* is called in the database's thread right before. Raises `sqlite3.Error`.
        """

        def work(db: sqlite3.Connection) -> None:
            before()
            db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

        await self._connection.submit(work)

    async def close(self) -> None:
        await self._connection.close()


class _Connection(aiosqlite.Connection):
    """aiosqlite's, with one more way to use its thread."""

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run *work* in the connection's thread, as every other method does with its own."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((done, lambda: work(self._conn)))
        return done


async def connect(path: Path, *, first: bool = True) -> Database:
    """Return the write connection to *path*, made or migrated as need be.

    *first* says that this process has no other connection to it.

    Raises `OutboxDamagedError` for a damaged outbox of ours. Raises `OutboxError`, and leaves the
    file as it was, if it is another program's, of a newer version, or may not be written.
    """
    try:
        _make_private(path)
        _clear_remains(path)
        if first:
            # Never beside another connection: to close the file would drop the locks SQLite has on it.
            await _check_log(path)
        connection = _Connection(
            lambda: sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S),
            iter_chunk_size=64,  # aiosqlite wants one; nothing here iterates
        )
        await connection
    except (OSError, sqlite3.Error) as exc:
        raise _cannot_open(path, exc) from exc
    try:
        store = await connection.submit(lambda db: _prepare(db, path))
        return Database(connection, store, Rewinding(files.log_of(path)))
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        await _give_up(connection)
        # Ours, but a table or column is not what the version says: damage, too.
        if is_damage(exc) or getattr(exc, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:
            raise OutboxDamagedError(f"{path}: damaged ({exc})") from exc
        raise _cannot_open(path, exc) from exc
    except BaseException:
        await _give_up(connection)
        raise


def is_damage(exc: Exception) -> bool:
    """Return whether the file turned out not to be what was written."""
    # Text that is no UTF-8 has no code: sqlite3 says so in words, or lets the codec speak.
    return (
        getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DAMAGE
        or isinstance(exc, UnicodeDecodeError)
        or "Could not decode to UTF-8" in str(exc)
    )


def is_odd(exc: Exception) -> bool:
    """Return whether the rows contradict each other, or are not what their columns say."""
    constraint = getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CONSTRAINT
    return constraint or not isinstance(exc, sqlite3.Error)


def is_full(exc: Exception) -> bool:
    """Return whether there was no room on the disk."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


async def _give_up(connection: aiosqlite.Connection) -> None:
    with suppress(sqlite3.Error):
        await connection.close()


def _prepare(db: sqlite3.Connection, path: Path) -> Store:
    version = _recognise(db, path)
    if version == 0:
        # Only take hold before the first table is made.
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
    db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    db.create_function("id_hash", 1, id_hash, deterministic=True)
    _empty_inherited_log(db)
    schema.migrate(db, version)
    _check(db, path)
    return Store(db)


def _empty_inherited_log(db: sqlite3.Connection) -> None:
    """Write what a log of before holds into the database, and empty it.

    One of its frames may be in the kernel's memory alone, after a sync that failed: what is committed
    behind that frame would be lost with it. Source: Rebello et al., "Can Applications Recover from
    fsync Failures?", 2020.
    """
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as exc:
        if not is_full(exc):  # without room nothing is committed that could be lost
            raise


async def _check_log(path: Path) -> None:
    """Look for damage in what a process that was killed has left. Raises `OutboxDamagedError`.

    SQLite would take the first bad frame for the end of the log, and overwrite what is behind it.
    """
    log = files.log_of(path)
    if log.exists() and log.stat().st_size:
        from agent.outbox.salvage import log_is_broken  # noqa: PLC0415  # seldom needed

        # In a thread: a long log takes a while to read, and the service manager wants its signs of life.
        if await asyncio.to_thread(log_is_broken, path):
            raise OutboxDamagedError(f"{path}: damaged (a part of its log in the middle)")


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Look for damage, as far as that takes no time. Raises `OutboxDamagedError`."""
    if db.execute(_SOUND_LEDGER).fetchall() != [(1,)]:
        raise OutboxDamagedError(f"{path}: damaged (its ledger does not add up)")
    if _value(db, "PRAGMA page_count") <= _CHECKED_PAGES:
        verdict = _value(db, "PRAGMA quick_check(1)")
        if verdict != "ok":
            raise OutboxDamagedError(f"{path}: damaged ({verdict})")


def _make_private(path: Path) -> None:
    """Make a missing file readable for the group alone; SQLite gives its log the same mode."""
    try:
        os.close(files.make(path))
    except FileExistsError:
        # Asked, not opened: to close a second descriptor would drop SQLite's locks on the file.
        if not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file") from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _clear_remains(path: Path) -> None:
    """Delete what a reader of another user has left that this one may not write to.

    A -shm is made anew from the log, and an empty log is none. Only for the owner of the lock.
    """
    log = files.log_of(path)
    for remains in (files.log_index_of(path), log):
        if remains.exists() and not os.access(remains, os.R_OK | os.W_OK):
            if remains == log and remains.stat().st_size:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(remains))
            remains.unlink()


def _recognise(db: sqlite3.Connection, path: Path) -> int:
    """Return the schema version of our database, 0 for an empty one. Raises `OutboxError` for others."""
    version = _value(db, "PRAGMA user_version")
    tables = _tables(db)
    foreign = _value(db, "PRAGMA application_id") != schema.APPLICATION_ID
    if (version or tables) and (foreign or not 0 <= version <= schema.VERSION):
        never_was = version < 0 and not foreign
        if never_was or (tables and tables == _our_tables()):
            raise OutboxDamagedError(f"{path}: damaged (the header is not that of its tables)")
        if foreign:
            raise OutboxError(
                f"{path}: a database of another program; set outbox.path to a file of its own"
            )
        raise OutboxError(
            f"{path}: written by a newer version (schema {version}, this one knows"
            f" {schema.VERSION}); install the newer version, or set outbox.path to a new file"
        )
    return int(version)


def _tables(db: sqlite3.Connection) -> set[str]:
    return {sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}


def _our_tables() -> set[str]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.create_function("id_hash", 1, id_hash)
        schema.migrate(db, 0)
        return _tables(db)


def _value(db: sqlite3.Connection, sql: str) -> Any:
    ((value,),) = db.execute(sql).fetchall()
    return value


def _cannot_open(path: Path, exc: Exception) -> OutboxError:
    return OutboxError(
        f"{path}: cannot open the outbox ({exc}); check that the file is a tranthor-agent"
        " outbox, that this user may write to it and to its folder, and that the disk works"
    )
