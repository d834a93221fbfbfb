"""States of the disk after a power cut, drawn by a seed from what a program asked of the kernel.

What may be there and what must is the model of `faults.disk`; here is chosen what is there.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.disk import Disk, File, Pick, everything
from faults.syscalls import Operation, Received, Sent

_TRIES = 4
"""How often a choice at one point is drawn again where its state was seen already."""

_ROUNDS = 20
"""How often more points are drawn for the states still missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The files of a folder after a power cut behind the 0-based operation *point*."""

    point: int
    choice: str
    """What was chosen, for people."""
    files: Mapping[str, bytes]

    def write_to(self, folder: Path) -> None:
        """Make *folder* hold these files and no others."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, content in self.files.items():
            # Over what is there: memory that was had once is had quickly.
            with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(content)
                file.truncate()


def crashes(
    operations: Sequence[Operation],
    before: Mapping[str, bytes],
    *,
    seed: str,
    count: int,
    points: range,
) -> Iterator[State]:
    """Yield *count* different states, fewer only where there are not as many.

    *before* are the files that were there, synced, before the first operation. *points* are those
    behind which the power may go. Each kind of operation gets its share of them: else nearly all
    would lie in the log.
    """
    weights = _weights([operations[point] for point in points])
    seen: set[int] = set()
    for round_ in range(_ROUNDS):
        rng = random.Random(f"{seed}/{round_}")
        missing = Counter(rng.choices(points, weights, k=count - len(seen)))
        disk, said = Disk(before), 0
        for point, operation in enumerate(operations):
            disk.apply(point, operation)
            said += isinstance(operation, Sent | Received)
            tries = missing[point] * _TRIES
            while missing[point] and tries:
                tries -= 1
                chosen = _choose(disk, rng)
                key = hash((said, *((name, part.key) for name, part in chosen.items())))
                if key not in seen:
                    missing[point] -= 1
                    seen.add(key)
                    yield _state(point, chosen)
        if len(seen) == count:
            return


def _choose(disk: Disk, rng: random.Random) -> dict[str, _Chosen]:
    """Return what a power cut now may leave, by name."""
    chosen = {}
    for name, file in sorted(disk.names(rng.randint(0, disk.renamings)).items()):
        tactic = rng.choice(_TACTICS) if len(file) else _nothing
        shown = file.choose(tactic(rng, len(file)))
        resizings = rng.choice((0, file.resizings, rng.randint(0, file.resizings)))
        chosen[name] = _Chosen(file, tactic.__name__.strip("_"), shown, resizings)
    return chosen


def _state(point: int, chosen: Mapping[str, _Chosen]) -> State:
    return State(
        point=point,
        choice="\n".join(f"{name}: {file}" for name, file in chosen.items()),
        files={
            name: bytes(part.file.image(part.shown, part.resizings))
            for name, part in chosen.items()
        },
    )


def _weights(operations: Iterable[Operation]) -> list[float]:
    kinds = [(type(operation), getattr(operation, "name", "")) for operation in operations]
    counts = Counter(kinds)
    return [1 / math.sqrt(counts[kind]) for kind in kinds]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What of one file is there."""

    file: File
    tactic: str
    shown: Mapping[int, int]
    resizings: int

    @property
    def key(self) -> object:
        return self.file.serial, self.file.version, tuple(self.shown.items()), self.resizings

    def __str__(self) -> str:
        return (
            f"of {len(self.file)} changes {self.tactic}, which shows {len(self.shown)} sectors"
            f" and {self.resizings} of {self.file.resizings} changes of size"
        )


# --- tactics: what of the unsynced writes is there ---


def _nothing(_rng: random.Random, _writes: int) -> Pick:
    return lambda _n, _sector: False


def _everything(_rng: random.Random, _writes: int) -> Pick:
    return everything


def _beginning(rng: random.Random, writes: int) -> Pick:
    """In the order written, the last one torn."""
    torn = rng.randrange(writes)
    return lambda n, _sector: n < torn or (n == torn and rng.random() < 0.5)


def _end(rng: random.Random, writes: int) -> Pick:
    first = rng.randrange(writes)
    return lambda n, _sector: n >= first


def _all_but_one(rng: random.Random, writes: int) -> Pick:
    missing = rng.randrange(writes)
    return lambda n, _sector: n != missing


def _one(rng: random.Random, writes: int) -> Pick:
    only = rng.randrange(writes)
    return lambda n, _sector: n == only


def _some_writes(rng: random.Random, writes: int) -> Pick:
    share = rng.choice(_SHARES)
    kept = [rng.random() < share for _ in range(writes)]
    return lambda n, _sector: kept[n]


def _some_sectors(rng: random.Random, _writes: int) -> Pick:
    share = rng.choice(_SHARES)
    return lambda _n, _sector: rng.random() < share


_SHARES = (0.1, 0.5, 0.9)

_TACTICS = (
    _nothing,
    _everything,
    _beginning,
    _end,
    _all_but_one,
    _one,
    _some_writes,
    _some_sectors,
)
