"""How the write-ahead log begins anew although there is always somebody who reads.

SQLite begins it anew at a commit, once all of it is in the database and nobody reads in it. A reader
holds what was its end when the reader began, and of readers that overlap there always is one. So where
it is long, the writer waits before its next transaction, as `PRAGMA wal_checkpoint(RESTART)` does:

    1. for those who read an older part; whoever comes meanwhile reads up to the end
    2. (writes the rest into the database)
    3. for those who read up to the end; whoever comes meanwhile reads the database alone

That is twice the longest query at most. A reader that stays, stopped or a backup of minutes, is waited for
once each time the log has doubled: no wait helps then, and the next commit after it begins anew by itself.

Source: SQLite's wal.c, walCheckpoint and walTryBeginRead.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

_LONG_BYTES = 24 * 1024 * 1024
"""Worth a wait: several times what it has without readers. Two may be in vain before it has 64 MiB."""

_WAIT_MS = 500
"""Some 100 ms are enough beside four searches that overlap on two cores; who posts waits as long."""

_READ_UP_TO_THE_END = """
SELECT last_seq
  FROM ledger
"""


class Rewinding:
    """One log, seen before each transaction, in the thread of the write connection."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._in_vain_bytes = self._bytes()
        """How long the log was when the last wait was in vain: who opens it has just tried to empty it."""

    def rewind_if_long(self, db: sqlite3.Connection) -> None:
        """Let a long log begin anew at the next commit, if its readers let it.

        Raises `sqlite3.Error` where the log cannot be read or the database not be written.
        """
        log_bytes = self._bytes()
        if log_bytes < _LONG_BYTES:
            self._in_vain_bytes = 0
        elif log_bytes >= 2 * self._in_vain_bytes:
            self._in_vain_bytes = log_bytes
            if _rewind(db):
                self._in_vain_bytes = 0

    def _bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0


def _rewind(db: sqlite3.Connection) -> bool:
    """Wait for those who read; return whether the log begins anew at the next commit."""
    # A reader that may not write to the -shm joins another's place in the log. Without one at the end
    # they would go on to hold the old place, one after the other.
    db.execute(_READ_UP_TO_THE_END).fetchall()
    ((usual_ms,),) = db.execute("PRAGMA busy_timeout").fetchall()
    db.execute(f"PRAGMA busy_timeout = {_WAIT_MS}")
    try:
        ((busy, _, _),) = db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    finally:
        db.execute(f"PRAGMA busy_timeout = {usual_ms}")
    return not busy
