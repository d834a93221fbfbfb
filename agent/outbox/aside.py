"""Moving a damaged database out of the way, so that a crash at any moment loses no part of it.

A set is `outbox.db.damaged-<Unix ms>` with its `-wal`, as SQLite would look for it.
"""

from __future__ import annotations

import os
from pathlib import Path

_MARK = ".damaged-"


def set_aside(outbox: Path, now_ms: int) -> str:
    """Move *outbox* and its log; return the new name of the database. Raises `OSError`."""
    name = f"{outbox.name}{_MARK}{now_ms}"
    # The log first: left beside a new database, SQLite would write its pages into that.
    _move(_log_of(outbox), _log_of(outbox.with_name(name)))
    _finish(outbox, name)
    return name


def sets_beside(outbox: Path) -> list[str]:
    """Return the names of what was set aside, the oldest first; ends a move that was cut off."""
    prefix = f"{outbox.name}{_MARK}"
    names = {
        entry.name.removesuffix("-wal")
        for entry in outbox.parent.iterdir()
        if entry.name.startswith(prefix)
    }
    for name in names:
        if not outbox.with_name(name).exists():
            _finish(outbox, name)
    return sorted(names)


def _finish(outbox: Path, name: str) -> None:
    _move(outbox, outbox.with_name(name))
    outbox.with_name(f"{outbox.name}-shm").unlink(missing_ok=True)
    sync_folder(outbox.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which names are in *folder*. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _move(source: Path, target: Path) -> None:
    if source.exists():
        source.rename(target)


def _log_of(database: Path) -> Path:
    return database.with_name(f"{database.name}-wal")
