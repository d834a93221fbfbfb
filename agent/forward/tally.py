"""What the forwarder must know after it was killed, and may forget after a power cut.

    which events may have arrived: sent, and neither refused nor recorded as delivered
    how many of such were sent again: the only way in which the upstream gets an event twice
    how many bytes went today

A small file mapped into memory: a killed process leaves it as it was, and it costs no system call
and no sync. So after a power cut it may tell of some seconds before: then an event too many or too
few is called a repeat, and nothing depends on it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

_MAGIC = b"TrAgTly1"
_HEADER = struct.Struct("<8sQQQ")
"""Magic, events sent again, day (days since 1970 by local date), bytes of that day."""
_HEADER_BYTES = 64
_SLOT_BYTES = 8
_SLOTS = 16_376
"""Events that may be in doubt at once, in 128 KiB: several times what can be under way."""

TALLY_BYTES = _HEADER_BYTES + _SLOTS * _SLOT_BYTES

log = structlog.get_logger()


class Tally:
    """The books of one agent, in *memory* of `TALLY_BYTES` bytes; other content is taken for none."""

    def __init__(self, memory: bytearray | mmap.mmap) -> None:
        self._memory = memory
        self._slots: dict[int, int] = {}
        magic, *_ = _HEADER.unpack_from(memory)
        if magic != _MAGIC:
            memory[:TALLY_BYTES] = bytes(TALLY_BYTES)
            _HEADER.pack_into(memory, 0, _MAGIC, 0, 0, 0)
        self._resent: int
        self._day: int
        self._day_bytes: int
        _, self._resent, self._day, self._day_bytes = _HEADER.unpack_from(memory)
        self._free: list[int] = []
        for slot in range(_SLOTS - 1, -1, -1):
            (seq,) = struct.unpack_from("<Q", memory, self._at(slot))
            if seq:
                self._slots[seq] = slot
            else:
                self._free.append(slot)

    @property
    def resent(self) -> int:
        """How many events were sent again that may have arrived before."""
        return self._resent

    @property
    def doubtful(self) -> list[int]:
        """The seqs of events that may have arrived."""
        return list(self._slots)

    def sending(self, seqs: Iterable[int]) -> int:
        """Note that these are sent; return how many may have arrived before.

        What does not fit is not noted: better a repeat that is not counted than one event less sent.
        """
        again = 0
        for seq in seqs:
            if seq in self._slots:
                again += 1
            elif self._free:
                slot = self._slots[seq] = self._free.pop()
                struct.pack_into("<Q", self._memory, self._at(slot), seq)
        if again:
            self._resent += again
            self._write_header()
        return again

    def clear(self, seqs: Iterable[int]) -> None:
        """These have not arrived, or are recorded as delivered."""
        for seq in seqs:
            slot = self._slots.pop(seq, None)
            if slot is not None:
                struct.pack_into("<Q", self._memory, self._at(slot), 0)
                self._free.append(slot)

    def bytes_of(self, day: int) -> int:
        """Return how many bytes were sent on *day*."""
        return self._day_bytes if day == self._day else 0

    def spend(self, day: int, sent_bytes: int) -> None:
        """Count bytes sent on *day*."""
        self._day_bytes = self.bytes_of(day) + sent_bytes
        self._day = day
        self._write_header()

    def _write_header(self) -> None:
        _HEADER.pack_into(self._memory, 0, _MAGIC, self._resent, self._day, self._day_bytes)

    @staticmethod
    def _at(slot: int) -> int:
        return _HEADER_BYTES + slot * _SLOT_BYTES


def tally_path(outbox: Path, upstream: str = "") -> Path:
    """Return where the books on what goes from *outbox* to *upstream* are."""
    return outbox.with_name(f"{outbox.name}-tally" + (f"-{upstream}" if upstream else ""))


@contextmanager
def open_tally(path: Path) -> Iterator[Tally]:
    """Yield the books in the file *path*, made as need be; without a file where there is no room."""
    try:
        memory = _map(path)
    except OSError as exc:
        # Mapped pages without blocks behind them would end the process when they are written.
        log.warning("tally.kept_in_memory", path=str(path), error=str(exc))
        yield Tally(bytearray(TALLY_BYTES))
        return
    try:
        yield Tally(memory)
    finally:
        memory.close()


def _map(path: Path) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        os.posix_fallocate(fd, 0, TALLY_BYTES)
        return mmap.mmap(fd, TALLY_BYTES)
    finally:
        os.close(fd)
