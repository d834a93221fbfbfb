"""Opening the database file to write: whose it is, which version, and the settings promise 1 needs."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import aiosqlite

from agent.errors import OutboxError
from agent.outbox import schema

_BUSY_TIMEOUT_S = 5.0
"""A reader that recovers the log after a crash holds the database for moments; nobody else does."""

_LOG_BYTES = 8 * 1024 * 1024
"""To what the write-ahead log shrinks again after a burst: two of SQLite's own checkpoints."""


async def connect(path: Path) -> aiosqlite.Connection:
    """Return the write connection to *path*, made or migrated as need be.

    Raises `OutboxError`, and leaves the file as it was, if it is another program's, of a newer
    version, damaged, or may not be written.
    """
    try:
        _make_private(path)
        db = await aiosqlite.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
    except (OSError, sqlite3.Error) as exc:
        raise _cannot_open(path, exc) from exc
    try:
        version = await _recognise(db, path)
        if version == 0:
            # Only takes hold before the first table is made.
            await db.execute_fetchall("PRAGMA auto_vacuum = INCREMENTAL")
        await db.execute_fetchall("PRAGMA journal_mode = WAL")
        await db.execute_fetchall("PRAGMA synchronous = FULL")
        await db.execute_fetchall(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        await schema.migrate(db, version)
    except sqlite3.Error as exc:
        await db.close()
        raise _cannot_open(path, exc) from exc
    except BaseException:
        await db.close()
        raise
    return db


def _make_private(path: Path) -> None:
    """Make a missing file readable for the group alone; SQLite gives its log the same mode."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
    except FileExistsError:
        # Asked, not opened: to close a second descriptor would drop SQLite's locks on the file.
        if not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file") from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        return
    os.fchmod(fd, 0o640)
    if os.geteuid() == 0:
        # Root was first to run it here: the service's own user must be able to write it, too.
        folder = path.parent.stat()
        os.fchown(fd, folder.st_uid, folder.st_gid)
    os.close(fd)


async def _recognise(db: aiosqlite.Connection, path: Path) -> int:
    """Return the schema version of our database, 0 for an empty one. Raises `OutboxError` for others."""
    ((version,),) = await db.execute_fetchall("PRAGMA user_version")
    ((application_id,),) = await db.execute_fetchall("PRAGMA application_id")
    ((tables,),) = await db.execute_fetchall("SELECT COUNT(*) FROM sqlite_schema")
    ours = application_id == schema.APPLICATION_ID if version or tables else True
    if not ours:
        raise OutboxError(
            f"{path}: a database of another program; set outbox.path to a file of its own"
        )
    if version > schema.VERSION:
        raise OutboxError(
            f"{path}: written by a newer version (schema {version}, this one knows"
            f" {schema.VERSION}); install the newer version, or set outbox.path to a new file"
        )
    return int(version)


def _cannot_open(path: Path, exc: Exception) -> OutboxError:
    return OutboxError(
        f"{path}: cannot open the outbox ({exc}); check that the file is a tranthor-agent"
        " outbox, that this user may write to it and to its folder, and that the disk works"
    )
