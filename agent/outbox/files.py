"""The files of an outbox: what each is called, and whose it is. No other module spells a suffix.

outbox.db                                  the database
outbox.db-wal, outbox.db-shm               SQLite's log, and the index of that log
outbox.db.lock                             held by the one agent that writes (`lock`)
outbox.db-tally, outbox.db-tally-NAME      what may have arrived, by upstream (`agent.forward.tally`)
outbox.db.reserve                          disk space kept back (`reserve`)
outbox.db.damaged-<Unix ms>, …-wal         a damaged database that was set aside (`aside`)
outbox.db.damaged-<Unix ms>.moving         while it is on its way there
outbox.db.damaged-<Unix ms>.salvaged       once all that could be read of it was put back
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MODE = 0o640
FOLDER_MODE = 0o750
"""The agent's group reads, for `status`; it never writes: SQLite would make files that are not ours."""

MOVING = ".moving"
SALVAGED = ".salvaged"
"""Marks beside a database that was set aside."""


def log_of(database: Path) -> Path:
    """Return the write-ahead log that SQLite keeps beside *database*."""
    return database.with_name(f"{database.name}-wal")


def log_index_of(database: Path) -> Path:
    """Return the index of that log, which SQLite can make again from it."""
    return database.with_name(f"{database.name}-shm")


def lock_of(outbox: Path) -> Path:
    return outbox.with_name(f"{outbox.name}.lock")


def tally_of(outbox: Path, upstream: str) -> Path:
    """Return where the books on what goes from *outbox* to *upstream* are."""
    return outbox.with_name(f"{outbox.name}-tally" + (f"-{upstream}" if upstream else ""))


def reserve_of(outbox: Path) -> Path:
    return outbox.with_name(f"{outbox.name}.reserve")


def damaged(outbox: Path, now_ms: int) -> Path:
    """Return where *outbox* goes if it is set aside now."""
    return outbox.with_name(f"{outbox.name}.damaged-{now_ms}")


def mark_of(set_aside: Path, mark: str) -> Path:
    return set_aside.with_name(f"{set_aside.name}{mark}")


def all_damaged(outbox: Path, mark: str = "") -> list[Path]:
    """Return the databases set aside beside *outbox*, the oldest first; with *mark*, those marked so."""
    pattern = re.compile(rf"({re.escape(outbox.name)}\.damaged-\d+){re.escape(mark)}")
    found = (pattern.fullmatch(entry.name) for entry in outbox.parent.iterdir())
    return [outbox.with_name(name) for name in sorted(match[1] for match in found if match)]


def make(path: Path) -> int:
    """Make a new file that the agent's user and group can use, whoever runs this; return it open.

    Raises `FileExistsError`, and leaves what is there.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    try:
        os.fchmod(fd, MODE)  # whatever the umask
        if os.geteuid() == 0:
            # Root was first to run it here: the service's own user must be able to write it, too.
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_folder(folder: Path) -> None:
    """Make *folder* if need be, for good: a power cut must not take it with all that is in it."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    for each in made:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which names are in *folder*. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
