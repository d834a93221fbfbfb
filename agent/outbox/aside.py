"""Moving a damaged database out of the way, so that a crash at any moment loses no part of it.

outbox.db.damaged-<Unix ms>             the database, with its -wal as SQLite would look for it
outbox.db.damaged-<Unix ms>.moving      while it is on its way: the next start goes on
outbox.db.damaged-<Unix ms>.salvaged    once all that could be read of it was put back
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOVING = ".moving"
_SALVAGED = ".salvaged"


def set_aside(outbox: Path, now_ms: int) -> str:
    """Move *outbox* and its log; return the new name of the database. Raises `OSError`."""
    name = f"{outbox.name}.damaged-{now_ms}"
    outbox.with_name(f"{name}{_MOVING}").touch(mode=0o640)
    sync_folder(outbox.parent)
    _move(outbox, name)
    return name


def finish_moves(outbox: Path) -> None:
    """Go on where a `set_aside` was cut off. To be called before *outbox* is opened."""
    for name in _names(outbox, _MOVING):
        _move(outbox, name)


def unsalvaged_sets(outbox: Path) -> list[str]:
    """Return the names of the databases set aside that were not read back yet, the oldest first."""
    done = set(_names(outbox, _SALVAGED))
    return [name for name in _names(outbox, "") if name not in done]


def count_sets(outbox: Path) -> int:
    """Return how many databases were set aside so far, as far as they lie there."""
    return len(_names(outbox, ""))


def mark_salvaged(outbox: Path, name: str) -> None:
    """Remember that *name* needs no reading any more, whatever database comes next."""
    outbox.with_name(f"{name}{_SALVAGED}").touch(mode=0o640)
    sync_folder(outbox.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which names are in *folder*. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _names(outbox: Path, suffix: str) -> list[str]:
    pattern = re.compile(rf"({re.escape(outbox.name)}\.damaged-\d+){re.escape(suffix)}")
    found = (pattern.fullmatch(entry.name) for entry in outbox.parent.iterdir())
    return sorted(match[1] for match in found if match)


def _move(outbox: Path, name: str) -> None:
    # The log first: left beside a new database, SQLite would write its pages into that.
    for suffix in ("-wal", ""):
        source = outbox.with_name(f"{outbox.name}{suffix}")
        target = outbox.with_name(f"{name}{suffix}")
        if source.exists() and not target.exists():
            source.rename(target)
    outbox.with_name(f"{outbox.name}-shm").unlink(missing_ok=True)
    sync_folder(outbox.parent)
    outbox.with_name(f"{name}{_MOVING}").unlink(missing_ok=True)
