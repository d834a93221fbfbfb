"""The damaged files as pages by number: the database, overlaid with what its log holds.

Where the log is damaged there is more than one view of the same pages, and a row counts that any
of them shows.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from agent.outbox.files import log_of
from agent.outbox.salvage import log, pages
from agent.outbox.salvage.pages import Cell

_PAGE_SIZES = tuple(1 << power for power in range(9, 17))
"""Powers of two from 512 to 65536. Source: https://sqlite.org/fileformat2.html, 1.3.2."""

_USUAL_PAGE_BYTES = 4096

_MAGIC = b"SQLite format 3\0"

_SAMPLES = 64
_SAMPLE_BYTES = 65536
"""How much is looked at to learn the page size: some megabytes, spread over the file."""

_KEPT_PAGES = 16
"""Pages in memory: rows of the same few leaves are asked for in turn."""

_CHAIN_POINTER_BYTES = 4
"""In front of each page of an overflow chain: the number of the next. Source: the format, 1.7."""


class File:
    """One file, read by offset. What is not there, or the disk does not give, reads as nothing."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.size = os.fstat(self._fd).st_size
        except OSError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def read(self, at: int, count: int) -> bytes:
        """Return up to *count* bytes from offset *at*."""
        if self._fd is None:
            return b""
        try:
            # Not mapped into memory: a page that the disk does not give would be a SIGBUS.
            return os.pread(self._fd, count, at)
        except OSError:
            return b""


class View:
    """The pages of a database, 1 to *count*: from the log where *frames* says so, else from the file."""

    def __init__(
        self, db: File, wal: File, *, page_bytes: int, frames: dict[int, int], count: int
    ) -> None:
        self.page_bytes = page_bytes
        self.count = count
        self.frames = frames
        self._db = db
        self._wal = wal
        self._stored = _pages_in(db, page_bytes)
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the pages that are somewhere."""
        stored = min(self._stored, self.count)
        yield from range(1, stored + 1)
        yield from sorted(number for number in self.frames if stored < number <= self.count)

    def source(self, number: int) -> int | None:
        """Return what tells two images of page *number* apart: its offset in the log; None: the file."""
        return self.frames.get(number)

    def page(self, number: int) -> bytes:
        """Return page *number* in full length, with zeros for what is missing; empty for no such page."""
        kept = self._kept.get(number)
        if kept is not None:
            self._kept.move_to_end(number)
            return kept
        if not 0 < number <= self.count:
            return b""
        at = self.frames.get(number)
        if at is None:
            page = self._db.read((number - 1) * self.page_bytes, self.page_bytes)
        else:
            page = self._wal.read(at, self.page_bytes)
        page = page.ljust(self.page_bytes, b"\0")
        self._kept[number] = page
        if len(self._kept) > _KEPT_PAGES:
            self._kept.popitem(last=False)
        return page

    def payload(self, page: bytes, cell: Cell) -> bytes | None:
        """Return the whole record of a cell of *page*; None where its chain breaks off."""
        parts = [page[cell.start : cell.start + cell.local]]
        left, number = cell.size - cell.local, cell.overflow
        seen: set[int] = set()
        while left > 0:
            link = b"" if number in seen else self.page(number)
            if not link:
                return None
            seen.add(number)
            number = int.from_bytes(link[:_CHAIN_POINTER_BYTES], "big")
            parts.append(link[_CHAIN_POINTER_BYTES:][:left])
            left -= len(parts[-1])
        return b"".join(parts)


class Views(NamedTuple):
    """What the files show: with the log, and without it (None: there is nothing in the log).

    *doubted* are pages that the log shows damaged; None: some, and nobody knows which.
    """

    with_log: list[View]
    without_log: View | None
    doubted: set[int] | None


@contextmanager
def opened(path: Path) -> Iterator[Views]:
    """Yield the views of the database at *path* and its log, the newest first; at least one."""
    with ExitStack() as files:
        db = files.enter_context(File(path))
        wal = files.enter_context(File(log_of(path)))
        page_bytes = guess_page_bytes(db, wal)
        found = log.read_log(wal.read, wal.size, page_bytes)
        stored = _pages_in(db, page_bytes)

        def view(frames: dict[int, int], count: int) -> View:
            return View(db, wal, page_bytes=page_bytes, frames=frames, count=count)

        if not found.claimed:
            yield Views([view({}, stored)], None, set())
        elif found.sound:
            # What the last commit cut off the file is no part of the database any more.
            yield Views([view(found.proven, found.pages)], view({}, stored), set())
        else:
            count = max(stored, found.pages, *found.claimed)
            newest = [view(found.claimed, count), view(found.proven, count)]
            yield Views(newest, view({}, stored), None if found.lost else found.doubted)


def log_is_broken(path: Path) -> bool:
    """Return whether SQLite, opening the database at *path*, would drop transactions from its log.

    It would not say so: a frame with a wrong checksum is the end of the log to it, and what was
    committed behind that is overwritten. To be asked while this process has no connection to the
    database: closing a file drops the locks that SQLite holds on it.
    """
    with File(path) as db, File(log_of(path)) as wal:
        page_bytes = log.page_bytes_of(wal.read) or guess_page_bytes(db, wal)
        found = log.read_log(wal.read, wal.size, page_bytes)
        # Beside an empty database SQLite deletes the log, whatever is in it.
        return found.broken or (db.size == 0 and found.pages > 0)


def guess_page_bytes(db: File, wal: File) -> int:
    """Return the page size at which most pages make sense; what the headers tell decides a tie."""
    told = {_told_page_bytes(db), log.page_bytes_of(wal.read)}
    score = {size: _sane_pages(db, size) + _sane_frames(wal, size) for size in _PAGE_SIZES}
    best = max(score.values())
    if best == 0:
        return next((size for size in _PAGE_SIZES if size in told), _USUAL_PAGE_BYTES)
    return max((n, size in told, -size) for size, n in score.items())[2] * -1


def _told_page_bytes(db: File) -> int | None:
    """Return the page size in the database header; 1 stands for 65536. Source: the format, 1.3.2."""
    header = db.read(0, 18)
    told = int.from_bytes(header[16:18], "big")
    return (65536 if told == 1 else told) if header.startswith(_MAGIC) else None


def _sane_pages(db: File, page_bytes: int) -> int:
    found = 0
    blocks = -(-db.size // _SAMPLE_BYTES)
    for block in range(0, blocks, -(-blocks // _SAMPLES) or 1):
        sample = db.read(block * _SAMPLE_BYTES, _SAMPLE_BYTES)
        found += sum(
            pages.is_sane(sample[at : at + page_bytes], first=not block and not at)
            for at in range(0, len(sample), page_bytes)
        )
    return found


def _sane_frames(wal: File, page_bytes: int) -> int:
    stride = log.FRAME_HEADER_BYTES + page_bytes
    frames = (wal.size - log.HEADER_BYTES) // stride
    first = log.HEADER_BYTES + log.FRAME_HEADER_BYTES
    return sum(
        pages.is_sane(wal.read(first + i * stride, page_bytes))
        for i in range(0, frames, -(-frames // (4 * _SAMPLES)) or 1)
    )


def _pages_in(db: File, page_bytes: int) -> int:
    """Return how many pages the file has; the last may be cut short."""
    return min(-(-db.size // page_bytes), log.MAX_PAGE)
