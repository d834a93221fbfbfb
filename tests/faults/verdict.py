"""Whether salvage found what it must: which rows a damage spared, and what was made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from faults.specimen import Row, Specimen, log_of

from agent.outbox.salvage.pages import shape_of
from agent.outbox.salvage.rows import Table, table_of
from agent.outbox.salvage.survey import Survey, Survivor, survey

_LOG_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24

Extent = tuple[bool, int, int]
"""Bytes that a row lies in: whether in the log, from, to. Whole pages, as salvage promises for those."""


@dataclass(slots=True)
class Extents:
    """Where the rows of an undamaged outbox lie: by seq, the pages of what must be read of it.

    *events* are the rows of the events themselves; *bodies* those of the queue and the dead
    letters, with the pages of their overflow chains.
    """

    events: dict[int, list[Extent]] = field(default_factory=dict)
    bodies: dict[int, list[Extent]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What became of the rows that were spared, and of what must not come back."""

    spared: int = 0
    missing: list[Row] = field(default_factory=list)
    """Spared, but not found as they were."""
    undelivered: list[Row] = field(default_factory=list)
    """Delivered, by a row that was spared, but found to be sent again."""
    returned: list[str] = field(default_factory=list)
    """Ids that were gone before the damage."""
    invented: list[Survivor] = field(default_factory=list)
    """Ids that never were."""
    hurt: int = 0
    """Rows that were not spared."""


def extents_of(specimen: Specimen) -> Extents:
    """Return where each row lies. It is found by the decoder under proof, undamaged and in full."""
    found = Extents()
    with survey(specimen.path) as undamaged:
        for places in undamaged._grouped():
            for place in places:
                view = undamaged._views[place.view]
                page = view.page(place.page)
                shape = shape_of(page, place.cell)
                assert shape is not None
                numbers = [place.page]
                following, left = place.cell.overflow, place.cell.size - place.cell.local
                while left > 0:
                    numbers.append(following)
                    following = int.from_bytes(view.page(following)[:4], "big")
                    left -= view.page_bytes - 4
                of = found.events if table_of(shape) is Table.EVENT else found.bodies
                of[place.seq] = [_extent(undamaged, number) for number in numbers]
    assert found.events.keys() == specimen.rows.keys()
    return found


def _extent(undamaged: Survey, number: int) -> Extent:
    (view,) = undamaged._views
    at = view.source(number)
    if at is None:
        return False, (number - 1) * view.page_bytes, number * view.page_bytes
    return True, at - _FRAME_HEADER_BYTES, at + view.page_bytes


class Spared:
    """Tells which rows of a specimen a damage left alone."""

    def __init__(self, specimen: Specimen, extents: Extents, damaged: Path) -> None:
        self._extents = extents
        self._before = [_read(specimen.path), _read(log_of(specimen.path))]
        self._after = [_read(damaged), _read(log_of(damaged))]
        self._known: dict[Extent, bool] = {}
        self._log_ends = len(self._after[True])

    def up_to_the_last_commit(self) -> None:
        """Spare nothing behind the last commit of a log that was cut.

        What stands there cannot be told from a commit that was never finished: it is not read, and
        no damage is seen.
        """
        log = self._after[True]
        stride = _FRAME_HEADER_BYTES + int.from_bytes(log[8:12], "big")
        self._log_ends = 0
        for start in range(_LOG_HEADER_BYTES, len(log) - stride + 1, stride):
            if any(log[start + 4 : start + 8]):  # the size of the database, once a commit ends
                self._log_ends = start + stride

    def event(self, seq: int) -> bool:
        return all(map(self._is_whole, self._extents.events[seq]))

    def body(self, seq: int) -> bool:
        return all(map(self._is_whole, self._extents.bodies[seq]))

    def _is_whole(self, extent: Extent) -> bool:
        if extent not in self._known:
            in_log, start, end = extent
            before, after = self._before[in_log][start:end], self._after[in_log][start:end]
            self._known[extent] = before == after and not (in_log and end > self._log_ends)
        return self._known[extent]


def judge(specimen: Specimen, spared: Spared, survivors: Iterable[Survivor]) -> Verdict:
    """Compare *survivors* with what was in *specimen* and was spared."""
    verdict = Verdict()
    found = list(survivors)
    by_id: dict[str, list[Survivor]] = {}
    for survivor in found:
        by_id.setdefault(survivor.message_id, []).append(survivor)
    waiting = {survivor.message_id for survivor in found if survivor.state != "delivered"}
    for seq, row in specimen.rows.items():
        delivered = row.state == "delivered"
        if not (spared.event(seq) if delivered else spared.body(seq)):
            verdict.hurt += 1
            continue
        verdict.spared += 1
        if not any(_is_same(row, survivor) for survivor in by_id.get(row.message_id, ())):
            verdict.missing.append(row)
        if delivered and row.message_id in waiting:
            verdict.undelivered.append(row)
    known = {row.message_id for row in specimen.rows.values()}
    for survivor in found:
        if survivor.message_id in specimen.gone:
            verdict.returned.append(survivor.message_id)
        elif survivor.message_id not in known:
            verdict.invented.append(survivor)
    return verdict


def _is_same(row: Row, survivor: Survivor) -> bool:
    return (row.state, row.body) == (survivor.state, survivor.body)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
