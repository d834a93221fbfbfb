"""One writer per outbox, by a file lock that the kernel drops with its process.

SQLite before 3.51.3 can corrupt a WAL database when two connections write or checkpoint at the
same moment; this lock is what keeps it to one.

The file holds a key, too, by which the agent that runs knows an operator: whoever may read it.

And it says whether an outbox was ever opened there: a damaged one that is ours may be moved
aside, a file of somebody else's, named by mistake, may not.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from agent.errors import OutboxError, OutboxLockedError
from agent.outbox import files

_TRIES = 10
_TRY_INTERVAL_S = 0.1
"""A reader may hold the lock shared for the length of a query: wait that out, not another daemon."""

_OURS = "outbox"
"""The word in the lock file that says so."""

_KEY = "operator-"
"""Begins the word that shows who may read this file."""


class Ownership:
    """The lock that is held. *proven* says that an agent had its outbox there before.

    *operator_key* is for this life of the agent, and to be read from the lock file by who may.
    """

    def __init__(self, note: int, stack: ExitStack) -> None:
        self.operator_key = secrets.token_hex(16)
        self.proven = _OURS in os.pread(note, 64, 0).decode("ascii", "replace").split()
        self._note = note
        self._stack = stack
        self._held: set[int] = set()
        self._write()

    def hold(self, outbox: Path) -> None:
        """Lock the file of *outbox* itself, for it may have other names, and the lock file may go.

        Raises `OutboxLockedError`. To be called before SQLite opens the file, or after it was made:
        it stays open until the end, for to close it would drop SQLite's own locks.
        """
        if outbox.exists() and outbox.stat().st_ino not in self._held:
            fd = _open_locked(outbox, fcntl.LOCK_EX)
            if fd is not None:
                self._stack.callback(os.close, fd)
                self._held.add(os.fstat(fd).st_ino)

    def prove(self) -> None:
        """Remember that the file is an outbox of ours."""
        self.proven = True
        self._write()

    def _write(self) -> None:
        lines = f"{os.getpid()}\n" + f"{_OURS}\n" * self.proven + f"{_KEY}{self.operator_key}\n"
        # In this order, so that a full disk leaves what was there: it is only a note.
        with suppress(OSError):
            os.pwrite(self._note, lines.encode(), 0)
            os.ftruncate(self._note, len(lines))


@asynccontextmanager
async def exclusive(outbox: Path) -> AsyncIterator[Ownership]:
    """Own *outbox* while the block runs. Raises `OutboxLockedError` naming the owner."""
    with ExitStack() as stack:
        fd = _open_note(files.lock_of(outbox))
        stack.callback(os.close, fd)
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if not left:
                    raise _refusal(outbox, fd) from exc
                await asyncio.sleep(_TRY_INTERVAL_S)
        owned = Ownership(fd, stack)
        owned.hold(outbox)
        yield owned


def _open_note(path: Path) -> int:
    try:
        try:
            return files.make(path)
        except FileExistsError:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise OutboxError(
            f"{path}: cannot open the lock file ({exc.strerror}); run as the user that owns it"
        ) from exc


def _open_locked(path: Path, operation: int) -> int | None:
    """Return a descriptor of *path* that holds a lock, None if there is no file to lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # whoever opens it says why
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(fd)
        raise OutboxLockedError(
            f"{path}: in use by another process, under this name or another; one agent per outbox:"
            " stop that one, or set outbox.path to another file"
        ) from exc
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def shared(outbox: Path) -> Iterator[bool]:
    """Keep writers away from *outbox* while the block runs; yields False if one is there already."""
    try:
        fd = os.open(files.lock_of(outbox), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = None  # never opened by a writer, or tidied away
    except OSError as exc:
        raise OutboxError(
            f"{files.lock_of(outbox)}: cannot open it ({exc.strerror}); run as the agent's user,"
            " as a member of its group, or as root"
        ) from exc
    with ExitStack() as stack:
        try:
            if fd is not None:
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            held = _open_locked(outbox, fcntl.LOCK_SH)
        except (BlockingIOError, OutboxLockedError):
            alone = False
        else:
            alone = True
            if held is not None:
                stack.callback(os.close, held)
        yield alone


def _refusal(outbox: Path, fd: int) -> OutboxLockedError:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return OutboxLockedError(
            f"{outbox}: in use by process {owner(outbox)}; one agent per outbox:"
            " stop that one, or set outbox.path to another file"
        )
    # Shared is to be had: only readers are there, and the number in the file is of the past.
    return OutboxLockedError(
        f"{outbox}: somebody reads it while no agent runs (a status, list or show that hangs);"
        " end that, then start again"
    )


def owner(outbox: Path) -> str:
    """Return the process number of whoever locked *outbox* last, "(unknown)" if it cannot be read."""
    try:
        lines = _note_of(outbox)
    except OSError:
        lines = []
    return lines[0] if lines else "(unknown)"


def operator_key(outbox: Path) -> str:
    """Return the `Ownership.operator_key` of whoever owns *outbox*. Raises `OutboxError`."""
    path = files.lock_of(outbox)
    try:
        lines = _note_of(outbox)
    except OSError as exc:
        raise OutboxError(
            f"{path}: cannot be read ({exc.strerror}); tokens are given out and revoked by the agent's"
            " user, members of its group, and root"
        ) from exc
    keys = [line.removeprefix(_KEY) for line in lines if line.startswith(_KEY)]
    if not keys:
        raise OutboxError(f"{path}: holds no key of an operator; restart the agent")
    return keys[0]


def _note_of(outbox: Path) -> list[str]:
    return files.lock_of(outbox).read_text(encoding="ascii", errors="replace").split()
