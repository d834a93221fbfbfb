"""Which frames of the write-ahead log count: those of committed transactions, past damage too.

SQLite stops at the first frame whose checksum is wrong, and everything behind it is lost. But each
frame's checksum continues the one that the frame before it carries, so that the frames behind a
damaged one can be proven again. Source: https://sqlite.org/fileformat2.html, 4, "The Write-Ahead
Log"; a frame is committed when a commit frame stands behind it, or is one itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from struct import Struct, unpack
from typing import NamedTuple

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24

_HEADER = Struct(">IIIIIIII")
"""Magic, version, page size, checkpoint, two salts, two checksums. Source: the format, 4.1."""

_FRAME = Struct(">IIIIII")
"""Page, database size after a commit or 0, two salts, two checksums. Source: the format, 4.1."""

_MAGICS = {0x377F0682: "<", 0x377F0683: ">"}
"""Which byte order the checksums are in. Source: the format, 4.1."""

_WORD = 0xFFFFFFFF

_OLDER_GENERATIONS = 1 << 20
"""A first salt that is smaller by less than this is of an older log in the same file: the salt is
incremented at each checkpoint. Source: the format, 4.1."""

MAX_PAGE = 1 << 25
"""A greater page number is damage: 32 GiB of the smallest pages."""

Read = Callable[[int, int], bytes]
"""Reads so many bytes from an offset of a file, fewer at its end."""

_Sum = tuple[int, int]


@dataclass(slots=True)
class Log:
    """What the log puts over the database: for a page number the offset of its newest image."""

    proven: dict[int, int] = field(default_factory=dict)
    """By checksum, and committed: what SQLite would take, and what it would not reach any more."""
    claimed: dict[int, int] = field(default_factory=dict)
    """By the log's salts alone, and perhaps not committed."""
    pages: int = 0
    """The size of the database after the last commit; 0 where there is none."""
    doubted: set[int] = field(default_factory=set)
    """Pages of which some image is not proven: an older one may hold what that has lost."""
    lost: bool = False
    """Whether there was a frame of which not even the page is known."""
    broken: bool = False
    """Whether SQLite, which stops at the first bad frame, would drop what was committed.

    A transaction is synced before the next begins: what a power cut leaves of one has nothing behind
    it. Where its last frame is whole and one before it is not, it counts as damaged, to be sure.
    """

    @property
    def sound(self) -> bool:
        """Whether nothing is amiss with it."""
        return self.proven == self.claimed and not self.doubted and not self.lost


class _Frame(NamedTuple):
    page: int
    commit: int
    salts: _Sum
    sums: _Sum
    image: int


def page_bytes_of(read: Read) -> int | None:
    """Return the page size that an intact header of a log tells."""
    header = read(0, HEADER_BYTES)
    return None if _start(header) is None else int(_HEADER.unpack(header)[2])


def read_log(read: Read, size: int, page_bytes: int) -> Log:
    """Return the frames of a log of *size* bytes that count."""
    log = Log()
    start = _start(read(0, HEADER_BYTES))
    if start is None:
        order = "<" if sys.byteorder == "little" else ">"
        salts, seeds = _newest_salts(read, size, page_bytes), set[_Sum]()
    else:
        order, salts, seeds = start[0], start[1], {start[2]}
    uncommitted: dict[int, int] = {}
    bad = start is None
    synced = False  # a transaction with a bad frame
    for frame in _frames(read, size, page_bytes):
        if frame.salts != salts or not 0 < frame.page <= MAX_PAGE:
            log.lost = log.lost or not _is_older(frame.salts, salts)
            seeds = {frame.sums}
            continue
        sums = _continued(read, frame, page_bytes, order, seeds)
        # What was not committed was not promised; but perhaps its commit frame was damaged or cut off.
        log.claimed[frame.page] = frame.image
        proven = frame.sums in sums
        log.broken = log.broken or (proven and synced)
        bad = bad or log.lost or not proven
        synced = synced or (bad and frame.commit > 0)
        if not proven:
            log.doubted.add(frame.page)
            seeds = {frame.sums, *sums}
            continue
        seeds = {frame.sums}
        uncommitted[frame.page] = frame.image
        if frame.commit:
            log.proven |= uncommitted
            log.pages = min(frame.commit, MAX_PAGE)
            uncommitted.clear()
            log.broken = log.broken or bad
    return log


def _start(header: bytes) -> tuple[str, _Sum, _Sum] | None:
    """Return byte order, salts and checksum of a log's intact header."""
    if len(header) < HEADER_BYTES:
        return None
    magic, _, _, _, *rest = _HEADER.unpack(header)
    order = _MAGICS.get(magic)
    if order is None or _checksum(header[:24], (0, 0), order) != (rest[2], rest[3]):
        return None
    return order, (rest[0], rest[1]), (rest[2], rest[3])


def _stride(page_bytes: int) -> int:
    return FRAME_HEADER_BYTES + page_bytes


def _frames(read: Read, size: int, page_bytes: int) -> Iterator[_Frame]:
    stride = _stride(page_bytes)
    for at in range(HEADER_BYTES, size - stride + 1, stride):
        raw = read(at, FRAME_HEADER_BYTES)
        if len(raw) == FRAME_HEADER_BYTES:
            page, commit, salt1, salt2, sum1, sum2 = _FRAME.unpack(raw)
            yield _Frame(page, commit, (salt1, salt2), (sum1, sum2), at + FRAME_HEADER_BYTES)


def _newest_salts(read: Read, size: int, page_bytes: int) -> _Sum | None:
    """Return the salts of the first two frames in a row that agree: the newest ones are in front."""
    before = None
    for frame in _frames(read, size, page_bytes):
        if frame.salts == before and any(before):
            return before
        before = frame.salts
    return before if before is not None and any(before) else None


def _is_older(salts: _Sum, current: _Sum | None) -> bool:
    return current is not None and 0 < (current[0] - salts[0]) & _WORD < _OLDER_GENERATIONS


def _continued(
    read: Read, frame: _Frame, page_bytes: int, order: str, seeds: set[_Sum]
) -> set[_Sum]:
    """Return the checksums that the frame would carry after each of *seeds*."""
    if not seeds:
        return set()
    head = read(frame.image - FRAME_HEADER_BYTES, 8)
    image = read(frame.image, page_bytes)
    if len(image) < page_bytes or len(head) < 8:
        return set()
    return {_checksum(head + image, seed, order) for seed in seeds}


def _checksum(content: bytes, seed: _Sum, order: str) -> _Sum:
    """Return the checksum of *content* (a multiple of 8 bytes). Source: the format, 4.2."""
    s0, s1 = seed
    words = unpack(f"{order}{len(content) // 4}I", content)
    for x, y in zip(words[::2], words[1::2], strict=True):
        s0 = (s0 + x + s1) & _WORD
        s1 = (s1 + y + s0) & _WORD
    return s0, s1
