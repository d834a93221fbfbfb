"""A disk whose power can be cut: an ext4 filesystem in a file, mounted through a loop device.

The cut is ext4's own (`EXT4_IOC_SHUTDOWN`, made for such tests): from then on nothing reaches the
disk, neither data nor journal. To mount it again replays the journal, as a boot does.

It differs from a real cut in two ways. A program outlives it, and a sync that was under way may
then return success though its data never reached the disk (seen in 20 of 300 cuts with a program
of nothing but writes and syncs, Linux 6.18): whoever cuts must `freeze` the program first, as a
machine without power would. And the disk itself loses nothing: the file keeps whatever the kernel
sent, flushed or not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IMAGE_BYTES = 1024**3
"""Sparse, so it costs what is written. Below 512 MiB mkfs would choose blocks of 1 KiB, as few have."""

_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32) (Linux, fs/ext4/ext4.h)."""

_WITHOUT_LOG_FLUSH = struct.pack("I", 2)
"""EXT4_GOING_FLAGS_NOLOGFLUSH: what the journal holds in memory is lost, too."""

_FREEZE_S = 30.0
"""Deadline for what takes well under a millisecond, or one sync."""


class Disk:
    """One disk, through any number of power cuts. *folder* is its root while it is mounted."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "disk"
        self._image = place / "disk.ext4"

    @contextmanager
    def plugged_in(self) -> Iterator[None]:
        """Make the filesystem and have it mounted while the block runs."""
        self._image.parent.mkdir(exist_ok=True)
        with self._image.open("wb") as image:
            image.truncate(_IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", self._image)
        self.folder.mkdir()
        try:
            self._mount()
            yield
        finally:
            if self.folder.is_mount():
                _run("umount", "--lazy", self.folder)  # whatever a failed test has left open
            self.folder.rmdir()
            self._image.unlink()

    def cut(self) -> None:
        """Let nothing reach the disk any more, in the middle of whatever is being written."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if os.fstat(fd).st_dev == self._image.stat().st_dev:
                raise AssertionError(f"{self.folder}: not mounted; this would cut the real disk")
            fcntl.ioctl(fd, _SHUTDOWN, _WITHOUT_LOG_FLUSH)
        finally:
            os.close(fd)

    def boot(self) -> None:
        """Forget what was only in memory, and mount what is on the disk. No file may be open."""
        _run("umount", self.folder)
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-t", "ext4", "-o", "loop", self._image, self.folder)


def freeze(pid: int) -> None:
    """Let no thread of the process *pid* run on; a system call that is under way may stay so."""
    os.kill(pid, signal.SIGSTOP)
    deadline_s = time.monotonic() + _FREEZE_S
    while not _is_frozen(pid):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"process {pid} does not stop")


def _is_frozen(pid: int) -> bool:
    """proc_pid_stat(5), state: T is stopped, D waits for a disk inside the kernel."""
    try:
        states = {
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for task in Path(f"/proc/{pid}/task").iterdir()
        }
    except (FileNotFoundError, ProcessLookupError):  # a thread that ended just now
        return False
    # Once one has stopped, those inside the kernel cannot leave it without stopping, too.
    return "T" in states <= {"T", "D"}


def obstacle(place: Path) -> str | None:
    """Return why there can be no such disk on this machine, None if there can. Tries one in *place*."""
    if os.geteuid() != 0:
        return "only root may mount a filesystem"
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        with Disk(place).plugged_in():
            return None
    except OSError as exc:
        return f"no ext4 on a loop device here: {exc}"


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
