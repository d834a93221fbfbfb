"""One writer per outbox, by a file lock that the kernel drops with its process.

SQLite before 3.51.3 can corrupt a WAL database when two connections write or checkpoint at the
same moment; this lock is what keeps it to one.

The file also says whether an outbox was ever opened there: a damaged one that is ours may be moved
aside, a file of somebody else's, named by mistake, may not.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from agent.errors import OutboxError, OutboxLockedError

_TRIES = 10
_TRY_INTERVAL_S = 0.1
"""A reader may hold the lock shared for the length of a query: wait that out, not another daemon."""


def lock_path(outbox: Path) -> Path:
    return outbox.with_name(f"{outbox.name}.lock")


_OURS = "outbox"


class Ownership:
    """The lock that is held. *proven* says that an agent had its outbox there before."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.proven = _OURS in os.pread(fd, 64, 0).decode("ascii", "replace").split()
        self._write()

    def prove(self) -> None:
        """Remember that the file is an outbox of ours."""
        self.proven = True
        self._write()

    def _write(self) -> None:
        lines = f"{os.getpid()}\n" + f"{_OURS}\n" * self.proven
        # In this order, so that a full disk leaves what was there: it is only a note.
        with suppress(OSError):
            os.pwrite(self._fd, lines.encode(), 0)
            os.ftruncate(self._fd, len(lines))


@asynccontextmanager
async def exclusive(outbox: Path) -> AsyncIterator[Ownership]:
    """Own *outbox* while the block runs. Raises `OutboxLockedError` naming the owner."""
    path = lock_path(outbox)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as exc:
        raise OutboxError(
            f"{path}: cannot open the lock file ({exc.strerror}); run as the user that owns it"
        ) from exc
    try:
        _give_to_owner_of(path.parent, fd)
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if not left:
                    raise _refusal(outbox, fd) from exc
                await asyncio.sleep(_TRY_INTERVAL_S)
        yield Ownership(fd)
    finally:
        os.close(fd)


@contextmanager
def shared(outbox: Path) -> Iterator[bool]:
    """Keep writers away from *outbox* while the block runs; yields False if one is there already."""
    try:
        fd = os.open(lock_path(outbox), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # never opened by a writer, so none is there
        return
    except OSError as exc:
        raise OutboxError(
            f"{lock_path(outbox)}: cannot open it ({exc.strerror}); run as the agent's user,"
            " as a member of its group, or as root"
        ) from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


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
        lines = lock_path(outbox).read_text(encoding="ascii", errors="replace").split()
    except OSError:
        lines = []
    return lines[0] if lines else "(unknown)"


def _give_to_owner_of(folder: Path, fd: int) -> None:
    """Let the service's own user open a lock file that root was first to create."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
