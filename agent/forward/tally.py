"""What the forwarder must know after it was killed, and may forget after a power cut.

    which events may have arrived: sent, and neither refused nor recorded as delivered
    how many of such were sent again: the only way in which the upstream gets an event twice
    how many bytes went today

A small file that is written and never synced: a killed process leaves it as it was. After a power cut
it may tell of some seconds before: then an event too many or too few is called a repeat, and nothing
depends on it. It is not mapped into memory: on a full disk that would end the process by SIGBUS.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
    """The books of one agent, in *memory* of `TALLY_BYTES` bytes; other content is taken for none.

    *keep* is handed each piece that changed, and where it belongs.
    """

    def __init__(
        self, memory: bytearray, keep: Callable[[int, bytes], None] = lambda _at, _piece: None
    ) -> None:
        self._memory = memory
        self._keep = keep
        magic, *_ = _HEADER.unpack_from(memory)
        if magic != _MAGIC:
            memory[:TALLY_BYTES] = bytes(TALLY_BYTES)
            _HEADER.pack_into(memory, 0, _MAGIC, 0, 0, 0)
            keep(0, bytes(memory))
        self._resent: int
        self._day: int
        self._day_bytes: int
        _, self._resent, self._day, self._day_bytes = _HEADER.unpack_from(memory)
        slots = struct.iter_unpack("<Q", memoryview(memory)[_HEADER_BYTES:TALLY_BYTES])
        self._slots = {seq: slot for slot, (seq,) in enumerate(slots) if seq}
        taken = set(self._slots.values())
        self._used = max(taken, default=-1) + 1
        """Slots from here on were never taken."""
        self._free = [slot for slot in range(self._used) if slot not in taken]

    @property
    def resent(self) -> int:
        """How many events were sent again that may have arrived before."""
        return self._resent

    @property
    def doubtful(self) -> list[int]:
        """The seqs of events that may have arrived; of a life before, also some that are settled."""
        return list(self._slots)

    def sending(self, seqs: Iterable[int]) -> int:
        """Note that these are sent; return how many may have arrived before.

        What does not fit is not noted: better a repeat that is not counted than one event less sent.
        """
        again = 0
        taken: list[int] = []
        for seq in seqs:
            if seq in self._slots:
                again += 1
            elif (slot := self._free_slot()) is not None:
                self._slots[seq] = slot
                struct.pack_into("<Q", self._memory, self._at(slot), seq)
                taken.append(slot)
        self._write_slots(taken)
        if again:
            self._resent += again
            self._write_header()
        return again

    def clear(self, seqs: Iterable[int]) -> None:
        """These have not arrived, or are pending no longer."""
        self._write_slots(self._give_back(seqs))

    def settled(self, seqs: Iterable[int]) -> None:
        """These are recorded, and pending no longer.

        The file need not say so: whoever reads it in the next life clears what is not pending.
        """
        self._give_back(seqs)

    def _give_back(self, seqs: Iterable[int]) -> list[int]:
        given: list[int] = []
        for seq in seqs:
            slot = self._slots.pop(seq, None)
            if slot is not None:
                struct.pack_into("<Q", self._memory, self._at(slot), 0)
                given.append(slot)
        self._free += reversed(given)  # so that those of one batch lie side by side again
        return given

    def bytes_of(self, day: int) -> int:
        """Return how many bytes were sent on *day*."""
        return self._day_bytes if day == self._day else 0

    def spend(self, day: int, sent_bytes: int) -> None:
        """Count bytes sent on *day*."""
        self._day_bytes = self.bytes_of(day) + sent_bytes
        self._day = day
        self._write_header()

    def _free_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self._used == _SLOTS:
            return None
        self._used += 1
        return self._used - 1

    def _write_header(self) -> None:
        _HEADER.pack_into(self._memory, 0, _MAGIC, self._resent, self._day, self._day_bytes)
        self._keep(0, bytes(self._memory[: _HEADER.size]))

    def _write_slots(self, slots: list[int]) -> None:
        if slots:
            first, behind = self._at(min(slots)), self._at(max(slots) + 1)
            self._keep(first, bytes(self._memory[first:behind]))

    @staticmethod
    def _at(slot: int) -> int:
        return _HEADER_BYTES + slot * _SLOT_BYTES


@contextmanager
def open_tally(path: Path) -> Iterator[Tally]:
    """Yield the books in the file *path*, made as need be; without a file where none can be."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as exc:
        log.warning("tally.kept_in_memory", path=str(path), error=str(exc))
        yield Tally(bytearray(TALLY_BYTES))
        return

    def keep(at: int, piece: bytes) -> None:
        with suppress(OSError):  # a full disk must not keep an event from being sent
            os.pwrite(fd, piece, at)

    try:
        yield Tally(bytearray(_content(fd)), keep)
    finally:
        os.close(fd)


def _content(fd: int) -> bytes:
    try:
        return os.pread(fd, TALLY_BYTES, 0).ljust(TALLY_BYTES, b"\0")
    except OSError:
        return bytes(TALLY_BYTES)
