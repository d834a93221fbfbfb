"""A disk as a power cut may find it: what is surely on it, and what may be.

The model allows everything that a journaling filesystem may do, and more:

- What was done to a file before a sync of it began is kept. Everything later may be there or not.
- Data land sector by sector (512 bytes), in any order. A sector holds what the page cache held
  after some write to it: an older write never undoes a newer one within it.
- The sizes of a file change in their order, up to any point, whether or not the data came along:
  a file that grew without its data reads as zeros there.
- The names of the folder change in their order, too, and only a sync of the folder keeps them: a
  new file that was synced itself may still be missing, an unlinked one may be back.

A disk that lies about a sync, or spoils sectors that nobody wrote, is not in it. What is chosen of
all that may be is the matter of `faults.crash_states`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

from faults.syscalls import Opened, Operation, Received, Resized, Sent, Synced, Unlinked, Written

SECTOR_BYTES = 512

Pick = Callable[[int, int], bool]
"""Whether the 0-based n-th change since the last sync reached the disk, in this sector."""


def everything(_n: int, _sector: int) -> bool:
    return True


class Disk:
    """A folder on a disk, with what surely is on it and what may be."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """All of *files* are there and synced."""
        self._names = {name: File(i, content) for i, (name, content) in enumerate(files.items())}
        self._durable_names = dict(self._names)
        self._renamings: deque[tuple[int, str, File | None]] = deque()
        self._made = len(self._names)

    def apply(self, index: int, operation: Operation) -> None:
        match operation:
            case Opened(name):
                if name not in self._names:
                    self._made += 1
                    self._name(index, name, File(self._made))
            case Unlinked(name):
                self._name(index, name, None)
            case Written(name) | Resized(name):
                self._names[name].change(index, operation)
            case Synced("", begun):
                while self._renamings and self._renamings[0][0] < begun:
                    _put(self._durable_names, *self._renamings.popleft()[1:])
            case Synced(name, begun):
                self._names[name].sync(begun)
            case Sent() | Received():
                pass

    def _name(self, index: int, name: str, file: File | None) -> None:
        self._renamings.append((index, name, file))
        _put(self._names, name, file)

    def cached(self) -> dict[str, bytes]:
        """Return what programs see, and a disk holds when all was written out."""
        return {
            name: bytes(file.image(file.choose(everything), file.resizings))
            for name, file in self._names.items()
        }

    @property
    def renamings(self) -> int:
        """How many changes of names may or may not be there."""
        return len(self._renamings)

    def names(self, renamings: int) -> dict[str, File]:
        """Return the files by name, with the first *renamings* of those changes."""
        names = dict(self._durable_names)
        for _, name, file in islice(self._renamings, renamings):
            _put(names, name, file)
        return names


def _put(names: dict[str, File], name: str, file: File | None) -> None:
    if file is None:
        del names[name]
    else:
        names[name] = file


@dataclass(frozen=True, slots=True)
class _Change:
    """One operation on a file: of which index, which sectors it writes, how large the file is then."""

    index: int
    operation: Written | Resized
    sectors: range
    size: int
    resizes: bool


class File:
    """An inode: what is surely on the disk, and what was done to it since."""

    def __init__(self, serial: int, durable: bytes = b"") -> None:
        self.serial = serial
        self.version = 0
        self.resizings = 0
        """How many pending changes changed the size."""
        self._durable = bytearray(durable)
        self._pending: deque[_Change] = deque()
        self._size = len(durable)

    def __len__(self) -> int:
        """Return how many changes may or may not be on the disk."""
        return len(self._pending)

    def change(self, index: int, operation: Written | Resized) -> None:
        match operation:
            case Written(_, offset, data):
                end = offset + len(data)
                sectors = range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES))
                size = max(self._size, end)
            case Resized(_, size):
                sectors = range(0)
        self._pending.append(_Change(index, operation, sectors, size, size != self._size))
        self.resizings += size != self._size
        self._size = size

    def sync(self, begun: int) -> None:
        """Keep what was done before the operation of index *begun*."""
        while self._pending and self._pending[0].index < begun:
            change = self._pending.popleft()
            _resize(self._durable, change.size)
            if isinstance(change.operation, Written):
                _copy(change.operation, self._durable)
            self.resizings -= change.resizes
            self.version += 1

    def choose(self, pick: Pick) -> dict[int, int]:
        """Return by sector the last pending write that it shows; what came before it shows, too."""
        return {
            sector: n
            for n, change in enumerate(self._pending)
            for sector in change.sectors
            if pick(n, sector)
        }

    def image(self, shown: Mapping[int, int], resizings: int) -> bytearray:
        """Return the content with the sectors *shown* and the first *resizings* changes of size."""
        image = bytearray(self._durable)
        size = len(image)
        reach: float = math.inf
        """From this sector on, data went to blocks that no surviving change of size leads to."""
        for n, change in enumerate(self._pending):
            if change.resizes and resizings:
                resizings -= 1
                size = change.size
                del image[size:]
            elif change.resizes and isinstance(change.operation, Resized):
                reach = min(reach, -(-change.size // SECTOR_BYTES))
            if shown and isinstance(change.operation, Written):
                there = [s for s in change.sectors if n <= shown.get(s, -1) and s < reach]
                if len(there) == len(change.sectors):
                    _copy(change.operation, image)
                else:
                    for sector in there:
                        _copy(change.operation, image, sector)
        _resize(image, size)
        return image


def _copy(write: Written, image: bytearray, sector: int | None = None) -> None:
    """Put into *image* what was written, or what of it lies in *sector*."""
    begin, end = write.offset, write.offset + len(write.data)
    if sector is not None:
        begin = max(begin, sector * SECTOR_BYTES)
        end = min(end, (sector + 1) * SECTOR_BYTES)
    image.extend(bytes(max(0, begin - len(image))))
    image[begin:end] = write.data[begin - write.offset : end - write.offset]


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))
