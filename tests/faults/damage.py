"""Three hundred ways to damage an outbox, each the same at every run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.specimen import Specimen, log_of

COUNT = 300

_FRAME_HEADER_BYTES = 24
_LOG_HEADER_BYTES = 32


@dataclass(slots=True)
class Wreck:
    """Database and log as bytes, to be damaged. *log* is empty where there is none."""

    db: bytearray
    log: bytearray
    rng: random.Random

    @property
    def page_bytes(self) -> int:
        return int.from_bytes(self.db[16:18], "big")

    def pages(self, kind: int) -> list[int]:
        """Return the offsets of the pages in the database whose first byte is *kind*."""
        return [at for at in range(0, len(self.db), self.page_bytes) if self.db[at] == kind]


def flip(content: bytearray, rng: random.Random, count: int, *, upto: int | None = None) -> None:
    """Change *count* bytes among the first *upto*."""
    for _ in range(count if content else 0):
        content[rng.randrange(min(len(content), upto or len(content)))] ^= rng.randrange(1, 256)


def overwrite(content: bytearray, rng: random.Random, count: int, *, zeros: bool) -> None:
    """Put zeros or garbage over *count* bytes somewhere."""
    count = min(count, len(content))
    at = rng.randrange(len(content) - count + 1)
    content[at : at + count] = bytes(count) if zeros else rng.randbytes(count)


def one_byte(wreck: Wreck) -> None:
    flip(wreck.db, wreck.rng, 1)


def a_few_bytes(wreck: Wreck) -> None:
    flip(wreck.db, wreck.rng, wreck.rng.randrange(2, 20))


def many_bytes(wreck: Wreck) -> None:
    flip(wreck.db, wreck.rng, wreck.rng.randrange(20, 400))


def heads_of_pages(wreck: Wreck) -> None:
    """What the header of a page says: its type, its cells, where they lie."""
    for _ in range(wreck.rng.randrange(1, 30)):
        at = wreck.rng.randrange(len(wreck.db) // wreck.page_bytes) * wreck.page_bytes
        wreck.db[at + wreck.rng.randrange(12)] ^= wreck.rng.randrange(1, 256)


def cut_at_a_page(wreck: Wreck) -> None:
    pages = len(wreck.db) // wreck.page_bytes
    del wreck.db[wreck.rng.randrange(1, pages) * wreck.page_bytes :]


def cut_anywhere(wreck: Wreck) -> None:
    del wreck.db[wreck.rng.randrange(1, len(wreck.db)) :]


def emptied(wreck: Wreck) -> None:
    wreck.db.clear()


def zeros_somewhere(wreck: Wreck) -> None:
    overwrite(wreck.db, wreck.rng, wreck.rng.randrange(512, 1 << 18), zeros=True)


def garbage_somewhere(wreck: Wreck) -> None:
    overwrite(wreck.db, wreck.rng, wreck.rng.randrange(512, 1 << 18), zeros=False)


def garbage_everywhere(wreck: Wreck) -> None:
    overwrite(wreck.db, wreck.rng, len(wreck.db), zeros=False)


def no_magic(wreck: Wreck) -> None:
    flip(wreck.db, wreck.rng, 3, upto=16)


def another_page_size(wreck: Wreck) -> None:
    size = wreck.rng.choice([1, 0, 512, 1000, 2048, 8192, 65535])
    wreck.db[16:18] = size.to_bytes(2, "big")


def another_version(wreck: Wreck) -> None:
    """File format, application_id, user_version, schema format or text encoding."""
    at = wreck.rng.choice([18, 19, 44, 56, 60, 68])
    wreck.db[at : at + 1] = bytes([wreck.db[at] ^ wreck.rng.randrange(1, 256)])


def header_of_garbage(wreck: Wreck) -> None:
    wreck.db[:100] = wreck.rng.randbytes(100)


def no_schema(wreck: Wreck) -> None:
    wreck.db[100 : wreck.page_bytes] = wreck.rng.randbytes(wreck.page_bytes - 100)


def no_first_page(wreck: Wreck) -> None:
    wreck.db[: wreck.page_bytes] = bytes(wreck.page_bytes)


def an_interior_page_zeroed(wreck: Wreck) -> None:
    at = wreck.rng.choice(wreck.pages(0x05) or [0])
    wreck.db[at : at + wreck.page_bytes] = bytes(wreck.page_bytes)


def no_interior_pages(wreck: Wreck) -> None:
    for at in wreck.pages(0x05):
        if at != wreck.page_bytes:  # the pointer map starts with any small number
            wreck.db[at : at + wreck.page_bytes] = wreck.rng.randbytes(wreck.page_bytes)


def pointer_map_lost(wreck: Wreck) -> None:
    wreck.db[wreck.page_bytes : 2 * wreck.page_bytes] = bytes(wreck.page_bytes)


def freelist_of_garbage(wreck: Wreck) -> None:
    trunk = int.from_bytes(wreck.db[32:36], "big") - 1
    at = max(trunk, 0) * wreck.page_bytes
    wreck.db[at + 4 : at + wreck.page_bytes] = wreck.rng.randbytes(wreck.page_bytes - 4)


def log_of_garbage(wreck: Wreck) -> None:
    overwrite(wreck.log, wreck.rng, len(wreck.log), zeros=False)


def log_cut_at_a_frame(wreck: Wreck) -> None:
    stride = _FRAME_HEADER_BYTES + wreck.page_bytes
    frames = (len(wreck.log) - _LOG_HEADER_BYTES) // stride
    del wreck.log[_LOG_HEADER_BYTES + wreck.rng.randrange(frames) * stride :]


def log_cut_anywhere(wreck: Wreck) -> None:
    del wreck.log[wreck.rng.randrange(len(wreck.log)) :]


def header_of_log(wreck: Wreck) -> None:
    flip(wreck.log, wreck.rng, wreck.rng.randrange(1, 5), upto=_LOG_HEADER_BYTES)


def bytes_in_log(wreck: Wreck) -> None:
    flip(wreck.log, wreck.rng, wreck.rng.randrange(1, 20))


def zeros_in_log(wreck: Wreck) -> None:
    overwrite(wreck.log, wreck.rng, wreck.rng.randrange(512, 1 << 18), zeros=True)


def garbage_in_log(wreck: Wreck) -> None:
    overwrite(wreck.log, wreck.rng, wreck.rng.randrange(512, 1 << 18), zeros=False)


def log_lost(wreck: Wreck) -> None:
    wreck.log.clear()


def everywhere_a_little(wreck: Wreck) -> None:
    for damage in wreck.rng.sample(_TO_DATABASE, 3):
        damage(wreck)
    flip(wreck.log, wreck.rng, 3)


_TO_DATABASE: list[Callable[[Wreck], None]] = [
    one_byte,
    a_few_bytes,
    many_bytes,
    heads_of_pages,
    zeros_somewhere,
    garbage_somewhere,
    no_magic,
    another_page_size,
    another_version,
    no_schema,
    an_interior_page_zeroed,
    freelist_of_garbage,
    pointer_map_lost,
    no_interior_pages,
    header_of_garbage,
    no_first_page,
    cut_at_a_page,
    cut_anywhere,
    emptied,
    garbage_everywhere,
]

_TO_LOG: list[Callable[[Wreck], None]] = [
    log_of_garbage,
    log_cut_at_a_frame,
    log_cut_anywhere,
    header_of_log,
    bytes_in_log,
    zeros_in_log,
    garbage_in_log,
    log_lost,
]


@dataclass(frozen=True, slots=True)
class Damage:
    """One of the ways. *killed*: it is done to an outbox with a log."""

    number: int
    way: Callable[[Wreck], None]
    killed: bool

    @property
    def hurts_log(self) -> bool:
        return self.way in {*_TO_LOG, everywhere_a_little}

    @property
    def cuts_log(self) -> bool:
        """Whether the log ends early, and is sound up to there."""
        return self.way in {log_cut_at_a_frame, log_cut_anywhere}

    def __str__(self) -> str:
        return f"{self.number}-{self.way.__name__}{'-killed' if self.killed else ''}"

    def inflict(self, path: Path, specimen: Specimen) -> None:
        """Put a copy of *specimen* at *path*, and damage it."""
        log = log_of(specimen.path)
        wreck = Wreck(
            db=bytearray(specimen.path.read_bytes()),
            log=bytearray(log.read_bytes() if log.exists() else b""),
            rng=random.Random(self.number),
        )
        self.way(wreck)
        path.write_bytes(wreck.db)
        if wreck.log:
            log_of(path).write_bytes(wreck.log)


def damages() -> list[Damage]:
    """Return all ways: each kind in turn, with another seed; what is done to a database, also with a log."""
    kinds = [
        *((way, killed) for way in _TO_DATABASE for killed in (False, True)),
        *((way, True) for way in (*_TO_LOG, everywhere_a_little)),
    ]
    return [Damage(number, *kinds[number % len(kinds)]) for number in range(COUNT)]
