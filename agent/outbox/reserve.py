"""Disk space kept back, so that deleting works when no byte is left.

To delete a row SQLite writes: the page into its log, and on a checkpoint what the log holds beyond
the end of the file. On a disk that events have filled, neither fits, and what was delivered could
never be recorded. So a file of its own holds some space; when settlements meet a full disk it is
let go, and it is taken again when there is room. Until then events are accepted only into the
pages that settling has freed.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from agent.outbox import files

LARGEST_BYTES = 16 * 1024 * 1024
"""What the log holds at most when a checkpoint first fails for want of room, and what it may still
grow by: 4 MiB between checkpoints and a group of 4 MiB, twice. More would help nobody."""

_SHARE_OF_QUOTA = 16
_SHARE_OF_DISK = 2
"""The reserve is at most these parts of outbox.max_size and of what is free at the start."""


class Reserve:
    """The file beside the outbox. *held* says whether the space is kept now."""

    def __init__(self, outbox: Path, *, max_bytes: int) -> None:
        self.held = False
        self._path = files.reserve_of(outbox)
        self._max_bytes = max_bytes
        self._bytes = 0
        """How much it was. To take less later would be to share the disk's last bytes."""

    def keep(self) -> bool:
        """Take the space if there is room for it; return whether it is held."""
        if not self.held:
            try:
                self._allocate()
            except OSError as exc:
                self._remove()
                # A filesystem that cannot allocate is not a full one: then there is no reserve.
                self.held = exc.errno not in {errno.ENOSPC, errno.EDQUOT}
            else:
                self.held = True
        return self.held

    def release(self) -> bool:
        """Let the space go; return False if there was none left."""
        released, self.held = self.held, False
        self._remove()
        return released

    def _remove(self) -> None:
        with suppress(OSError):  # a filesystem that is read-only now keeps what it keeps
            self._path.unlink(missing_ok=True)

    def _allocate(self) -> None:
        disk = os.statvfs(self._path.parent)
        wanted = self._bytes or min(
            LARGEST_BYTES,
            self._max_bytes // _SHARE_OF_QUOTA,
            disk.f_bavail * disk.f_frsize // _SHARE_OF_DISK,
        )
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, files.MODE)
        try:
            # What a process that was killed has kept stays kept.
            wanted = max(wanted, os.fstat(fd).st_size, 1)
            os.posix_fallocate(fd, 0, wanted)
            self._bytes = wanted
        finally:
            os.close(fd)
