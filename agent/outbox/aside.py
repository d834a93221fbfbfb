"""Moving a damaged database out of the way, so that a crash at any moment loses no part of it.

The names are `agent.outbox.files`'s. A database and its log move under one mark, ".moving": while
that is there, the next start goes on.
"""

from __future__ import annotations

from pathlib import Path

from agent.outbox import files


def set_aside(outbox: Path, now_ms: int) -> str:
    """Move *outbox* and its log; return the new name of the database. Raises `OSError`."""
    target = files.damaged(outbox, now_ms)
    files.mark_of(target, files.MOVING).touch(mode=files.MODE)
    files.sync_folder(outbox.parent)
    _move(outbox, target)
    return target.name


def finish_moves(outbox: Path) -> None:
    """Go on where a `set_aside` was cut off. To be called before *outbox* is opened."""
    for target in files.all_damaged(outbox, files.MOVING):
        _move(outbox, target)


def unsalvaged_sets(outbox: Path) -> list[str]:
    """Return the names of the databases set aside that were not read back yet, the oldest first."""
    done = files.all_damaged(outbox, files.SALVAGED)
    return [each.name for each in files.all_damaged(outbox) if each not in done]


def count_sets(outbox: Path) -> int:
    """Return how many databases were set aside so far, as far as they lie there."""
    return len(files.all_damaged(outbox))


def mark_salvaged(outbox: Path, name: str) -> None:
    """Remember that *name* needs no reading any more, whatever database comes next."""
    files.mark_of(outbox.with_name(name), files.SALVAGED).touch(mode=files.MODE)
    files.sync_folder(outbox.parent)


def _move(outbox: Path, target: Path) -> None:
    # The log first: left beside a new database, SQLite would write its pages into that.
    for old, new in ((files.log_of(outbox), files.log_of(target)), (outbox, target)):
        if old.exists() and not new.exists():
            old.rename(new)
    files.log_index_of(outbox).unlink(missing_ok=True)
    files.sync_folder(outbox.parent)
    files.mark_of(target, files.MOVING).unlink(missing_ok=True)
