"""What the kernel says of a process and of the disk, read from /proc by hand."""

from __future__ import annotations

import os
import platform
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

_MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """In MB (2**20). *rss*: resident; *peak*: the most that ever was (VmHWM).

    *pss* divides shared pages among those who share them; *uss* leaves them out.
    """

    rss: float
    peak: float
    pss: float
    uss: float


def memory(pid: int) -> Memory:
    status = _kilobytes(Path(f"/proc/{pid}/status"))
    mapped = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
    return Memory(
        rss=status["VmRSS"] / 1024,
        peak=status["VmHWM"] / 1024,
        pss=mapped["Pss"] / 1024,
        uss=(mapped["Private_Clean"] + mapped["Private_Dirty"]) / 1024,
    )


def written_bytes(pid: int) -> int:
    """Return what the process made the kernel write to disk.

    Counted by the page (4 KiB) when a clean page of the page cache is first changed: two changes
    between two syncs count once, and the filesystem's own journal not at all.
    """
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def cpu_s(pid: int) -> float:
    """Return the processor seconds of all threads, user and system."""
    behind_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # proc(5): fields 14 and 15; the third is the first behind the name.
    return (int(behind_name[11]) + int(behind_name[12])) / os.sysconf("SC_CLK_TCK")


class Others:
    """How much of the machine other programs take, from the making of this on."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()
        self._before_s = self._taken_s()

    def cores(self) -> float:
        """Return how many cores they kept busy. Exact when no child of this process runs."""
        return max(0.0, self._taken_s() - self._before_s) / (time.monotonic() - self._since_s)

    def _taken_s(self) -> float:
        spent = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, spent)
        busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy_s - own.user - own.system - own.children_user - own.children_system


def filesystem(folder: Path) -> str:
    """Return the type of the filesystem that *folder* lies on."""
    best, kind = Path("/"), "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, found, *_ = line.split()
        point = Path(mounted.replace("\\040", " "))
        if folder.resolve().is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, found
    return kind


def is_memory(folder: Path) -> bool:
    """Return whether *folder* lies in memory, where a sync costs nothing and means nothing."""
    return filesystem(folder) in _MEMORY_FILESYSTEMS


def described(folder: Path) -> str:
    """Return the machine in one line: figures of two machines are not compared."""
    load, *_ = os.getloadavg()
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, {filesystem(folder)},"
        f" Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" load {load:.1f} at the start"
    )


def _kilobytes(path: Path) -> dict[str, int]:
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.removesuffix(" kB"))
    return found
