"""Opening the outbox: at the start, again after a fault, and anew where the database is damaged.

`agent.outbox.writer` says when. Here is what is known of the file: whether it is ours, what is wrong
with it, and which damaged databases beside it are still to be read back (`agent.outbox.rescue`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import structlog

from agent.clock import Clock
from agent.errors import OutboxDamagedError, OutboxError
from agent.outbox import aside, database, lock, restore, schema
from agent.outbox.database import Database

_TOO_ODD = 2
"""Contradictions between rows after which the database counts as damaged."""

_SEQS_A_MS = 12
_SEQS_A_SET = 44
"""A database that replaces a damaged one gives seqs above all that the damaged one can have given:
as if 2^12 events came each millisecond since 1970 or, where the clock is wrong, 2^44 in each."""

_HEADER_BYTES = 100
_APPLICATION_ID = slice(68, 72)
"""Source: the SQLite file format, section 1.3."""

log = structlog.get_logger()


class Opening:
    """The connection of a writer, which can be closed and opened again."""

    def __init__(self, path: Path, clock: Clock, owned: lock.Ownership) -> None:
        self.damage: str | None = None
        """What turned out to be wrong with the file: the next `open` begins a new one."""
        self.rescuing = False
        """Whether events of a damaged database are still to come back: nothing may overtake them."""
        self.unsalvaged: list[str] = []
        """The names of these databases."""
        self.tokens_unread: set[str] = set()
        """Those of them that may hold tokens of apps which are not known here yet."""
        self.damaged = asyncio.Event()
        """Set when there is something to salvage."""
        self._path = path
        self._clock = clock
        self._owned = owned
        self._db: Database | None = None
        self._first = True
        self._last_seq = 0
        self._withdrawn = 0
        """Of the connections before this one."""
        self._contradictions = 0

    @property
    def is_open(self) -> bool:
        return self._db is not None

    @property
    def database(self) -> Database:
        if self._db is None:
            raise AssertionError("the writer is used outside its life")
        return self._db

    @property
    def withdrawn(self) -> int:
        """How many pending events were evicted or expired in this life; it never falls."""
        return self._withdrawn + (0 if self._db is None else self._db.withdrawn)

    async def open(self) -> None:
        """Open, recover and migrate the database. Raises `OutboxError` if it cannot be used.

        A damaged one of ours is set aside, and a new one begun.
        """
        damage, self.damage = self.damage, None
        first, self._first = self._first, False
        try:
            if first:
                aside.finish_moves(self._path)
            if damage is None:
                damage = await self._connect(first=first)
            if damage is not None:
                await self._begin_anew(damage)
            self._owned.hold(self._path)
            self._owned.prove()
            await self._note_sets()
        except OSError as exc:
            raise OutboxError(f"{self._path.parent}: {exc.strerror} ({exc.filename})") from exc

    async def _connect(self, *, first: bool) -> str | None:
        """Open the database; return what is wrong with it if it is damaged."""
        try:
            self._db = await database.connect(self._path, first=first)
        except OutboxDamagedError as exc:
            return str(exc)
        return None

    async def _begin_anew(self, damage: str) -> None:
        if not self._owned.proven and not await asyncio.to_thread(_is_ours, self._path):
            raise OutboxError(
                f"{damage}; it was never a tranthor-agent outbox, so it is left alone:"
                " set outbox.path to a file of its own"
            )
        self.rescuing = True
        try:
            name = aside.set_aside(self._path, self._clock.wall_ms())
        except OSError as exc:
            raise OutboxError(
                f"{damage}; it cannot be moved aside ({exc.strerror}): move it, its -wal and its"
                " -shm file by hand"
            ) from exc
        log.error("outbox.set_aside", path=str(self._path), moved_to=name, damage=damage)
        self._db = await database.connect(self._path, first=False)

    async def _note_sets(self) -> None:
        """Find out which damaged databases beside this one are still to be salvaged."""
        now_ms = self._clock.wall_ms()
        names = aside.unsalvaged_sets(self._path)
        floor = max(
            self._last_seq,
            now_ms << _SEQS_A_MS,
            aside.count_sets(self._path) << _SEQS_A_SET,
        )
        self.unsalvaged = await self.database.transact(
            lambda store: restore.note_sets(store, names, now_ms=now_ms, floor=floor)
        )
        self.tokens_unread = set(self.unsalvaged)
        self.rescuing = bool(self.unsalvaged)
        if self.rescuing:
            self.damaged.set()

    def salvaged(self, name: str) -> None:
        """Nothing more comes out of the damaged database *name*."""
        self.tokens_unread.discard(name)
        self.unsalvaged = [other for other in self.unsalvaged if other != name]
        self.rescuing = bool(self.unsalvaged)

    def blame(self, exc: Exception) -> None:
        """Note whether it is the file's fault that a transaction failed."""
        if database.is_odd(exc):
            log.error("outbox.contradicted", path=str(self._path), exc_info=exc)
            self._contradictions += 1
        # Once may be a bug of ours. Twice it is no better than damage; but that helps once at most.
        if database.is_damage(exc) or self._contradictions == _TOO_ODD:
            self.damage = f"{self._path}: damaged ({exc})"

    async def abandon(self) -> None:
        """Close a connection whose word means nothing any more."""
        db, self._db = self._db, None
        try:
            if db is not None:
                self._last_seq = db.last_seq
                self._withdrawn += db.withdrawn
                await db.close()
        except sqlite3.Error as exc:
            log.warning("outbox.close_failed", path=str(self._path), error=str(exc))

    async def close(self) -> bool:
        """Empty the log and close; return False if there was nothing open.

        What is committed stays whatever happens here.
        """
        db, self._db = self._db, None
        if db is None:
            return False
        try:
            await db.empty_log()
        except sqlite3.Error as exc:
            log.warning("outbox.checkpoint_failed", path=str(self._path), error=str(exc))
        finally:
            await db.close()
        return True


def _is_ours(path: Path) -> bool:
    """Return whether the header of a damaged database says so, or a row that it still holds."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if header[_APPLICATION_ID] == schema.APPLICATION_ID.to_bytes(4, "big"):
        return True
    from agent.outbox.salvage import surviving  # noqa: PLC0415  # seldom needed

    return any(True for _ in surviving(path))
