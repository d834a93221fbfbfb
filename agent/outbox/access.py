"""The way in for readers: of the daemon's own process, beside a daemon, or to an outbox at rest.

A reader never writes, not even a -wal or -shm file under the wrong user. What it asks is
`agent.outbox.reader`'s.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiosqlite

from agent.errors import OutboxDamagedError, OutboxError
from agent.outbox import files, lock, schema
from agent.outbox.reader import Reader


@asynccontextmanager
async def open_reader(path: Path) -> AsyncIterator[Reader]:
    """Open *path* for reading, whether or not a daemon writes it.

    While one does, its -wal and -shm are there to read along with. While none does, readers keep
    writers out by the lock; if the log was checkpointed away the file alone is read, as immutable,
    for SQLite would otherwise create a -shm that belongs to whoever looked.
    Raises `OutboxError` if there is none, it is newer than this version, or cannot be read.
    """
    if _bytes(path) is None:
        raise OutboxError(
            f"{path}: no outbox here; start the agent once (tranthor-agent run),"
            " or check outbox.path"
        )
    async with AsyncExitStack() as stack:
        alone = stack.enter_context(lock.shared(path))
        at_rest = alone and not _bytes(files.log_of(path))
        yield await stack.enter_async_context(_reader(path, immutable=at_rest))


@asynccontextmanager
async def open_own_reader(
    path: Path, *, on_damage: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Reader]:
    """Open *path* for the process that has it open to write already.

    *on_damage* is told when a query meets damage.
    """
    async with _opening(path):
        reader = _OwnReader(await _connect(path, immutable=False), path, on_damage)
    try:
        yield reader
    finally:
        await reader.close()


class _OwnReader(Reader):
    """The daemon's own: it follows the writer to a new database, and tells it of damage."""

    def __init__(
        self, db: aiosqlite.Connection, path: Path, on_damage: Callable[[str], None]
    ) -> None:
        super().__init__(db, path)
        self._on_damage = on_damage
        self._inode = _inode(path)
        self._following = asyncio.Lock()

    async def _fetch(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        if _inode(self.path) != self._inode:
            await self._follow()
        return await super()._fetch(sql, **values)

    def _damaged(self, why: str) -> OutboxDamagedError:
        damage = super()._damaged(why)
        if _inode(self.path) == self._inode:
            self._on_damage(str(damage))
        return damage

    async def _follow(self) -> None:
        async with self._following:
            inode = _inode(self.path)
            if inode == self._inode:  # another query was first
                return
            old = self._db
            try:
                self._db = await _connect(self.path, immutable=False)
            except sqlite3.Error as exc:
                raise OutboxError(f"{self.path}: cannot read the outbox ({exc})") from exc
            self._inode = inode
            await old.close()


@asynccontextmanager
async def _reader(path: Path, *, immutable: bool) -> AsyncIterator[Reader]:
    async with _opening(path):
        reader = Reader(await _connect(path, immutable=immutable), path)
    try:
        yield reader
    finally:
        await reader.close()


@asynccontextmanager
async def _opening(path: Path) -> AsyncIterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise OutboxError(
            f"{path}: cannot read the outbox ({exc}); run as the agent's user, as a member of its"
            " group, or as root, and check that the file is a tranthor-agent outbox"
        ) from exc


async def _connect(path: Path, *, immutable: bool) -> aiosqlite.Connection:
    options = "mode=ro&immutable=1" if immutable else "mode=ro"
    db = await aiosqlite.connect(
        f"file:{quote(str(path))}?{options}", uri=True, isolation_level=None
    )
    try:
        await _require_current(db, path)
    except BaseException:
        await db.close()
        raise
    return db


async def _require_current(db: aiosqlite.Connection, path: Path) -> None:
    ((version,),) = await db.execute_fetchall("PRAGMA user_version")
    if version != schema.VERSION:
        raise OutboxError(
            f"{path}: schema {version}, this version reads {schema.VERSION};"
            " start the agent of this version once, which migrates it"
        )


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _bytes(path: Path) -> int | None:
    """Return the size of a file; None if there is none. Raises `OutboxError` if it may not be seen."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise OutboxError(
            f"{path}: cannot be read ({exc.strerror}); run as the agent's user, as a member of its"
            " group, or as root"
        ) from exc
