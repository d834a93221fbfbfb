"""All rows that can be read, in order of acceptance, and what became of each event.

A first pass over the pages learns which leaves hold rows and where each begins; a second one opens
the leaves in that order and merges them, so that all that is known of one event comes together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from agent.event import Kind
from agent.outbox.records import Ledger, Reason, State
from agent.outbox.salvage import pages, rows, tree
from agent.outbox.salvage.pages import Cell
from agent.outbox.salvage.rows import DeadRow, EventRow, LedgerRow, PendingRow, Row, Table
from agent.outbox.salvage.views import View, opened

_PAGE_BITS = 26
_VIEW_BITS = 2
"""Of the integer that stands for a leaf: room for `log.MAX_PAGE`, and for the views there can be."""

_FURTHEST: tuple[State, ...] = ("pending", "dead", "delivered")
"""An event only moves on, so that of two rows about it the one that is further is the newer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivor:
    """One event that can still be known. *body* is None for a delivered one alone.

    Where the row of the event itself is gone, *message_id* is from the body, *digest* is None, and
    *accepted_ms* is when it was queued, or for a dead letter when the event before it was accepted.
    """

    seq: int
    message_id: str
    digest: bytes | None
    state: State
    accepted_ms: int
    settled_ms: int | None
    kind: Kind | None = None
    lane: int | None = None
    queued_ms: int | None = None
    attempts: int = 0
    failing_since_ms: int | None = None
    reason: Reason | None = None
    status: int | None = None
    answer: str | None = None
    body: bytes | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """What was found. Pages and ledger are known at once, the events when `Survey.rows` is exhausted.

    *pages_damaged* are those in use that do not decode in full. *bodies_lost* are events that are
    known and were not delivered, but whose body is gone. *ledger* and *last_seq* are what the
    database said of itself, None if that is lost.
    """

    page_bytes: int
    pages: int = 0
    pages_damaged: int = 0
    pending: int = 0
    dead: int = 0
    delivered: int = 0
    bodies_lost: int = 0
    last_seq: int | None = None
    ledger: Ledger | None = None


class _Place(NamedTuple):
    """Where a row is. Ordered by seq; then a leaf that is surely in use, then a newer view, comes first."""

    seq: int
    doubtful: int
    view: int
    page: int
    cell: Cell


@dataclass(slots=True)
class _Scan:
    """What the first pass over a view learns."""

    leaves: list[tuple[int, int]] = field(default_factory=list)
    """(the lowest seq, the page) of each leaf with rows of events."""
    branches: dict[int, list[int]] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    ledgers: list[tuple[int, LedgerRow]] = field(default_factory=list)
    """(the page, the row) of whatever looks like a ledger."""
    incomplete: set[int] = field(default_factory=set)
    """Leaves of which not all cells decode."""
    pages: int = 0
    damaged: int = 0


class Survey:
    """What is left in a damaged database. Made by `survey`."""

    def __init__(self, views: list[View], without_log: View | None) -> None:
        """*without_log* counts, too, if it turns out newer than what the log puts over it."""
        self._views: list[View] = []
        self._leaves: list[int] = []
        self._taken: set[int] = set()
        self.report = Report(page_bytes=views[0].page_bytes)
        ledgers = [ledger for view in views for ledger in self._add(view)]
        newest = max((ledger.age for _, ledger in ledgers), default=0)
        if without_log is not None and any(
            ledger.age > newest for page, _ in ledgers for ledger in _ledgers_on(without_log, page)
        ):
            ledgers += self._add(without_log)
        if ledgers:
            ledger = max((ledger for _, ledger in ledgers), key=lambda ledger: ledger.age)
            self.report.last_seq, self.report.ledger = ledger.last_seq, ledger.counters
        self._leaves.sort()

    def rows(self) -> Iterator[Survivor]:
        """Yield what is known of each event, in ascending order of seq."""
        report = self.report
        report.pending = report.dead = report.delivered = report.bodies_lost = 0
        accepted_ms = 0
        for places in self._grouped():
            survivor = self._judge(places, accepted_ms)
            if survivor is None:
                continue
            accepted_ms = survivor.accepted_ms
            match survivor.state:
                case "pending":
                    report.pending += 1
                case "dead":
                    report.dead += 1
                case "delivered":
                    report.delivered += 1
            yield survivor

    def _add(self, view: View) -> list[tuple[int, LedgerRow]]:
        """Take in the leaves of one more view; return the ledgers in it that are in use."""
        scan = _scan(view)
        free = tree.free_pages(view)
        reachable = tree.reached(scan.roots, scan.branches)
        if not self._views:
            self.report.pages = scan.pages
            self.report.pages_damaged = _damaged(view, scan, free)
        i = len(self._views)
        self._views.append(view)
        for seq, number in scan.leaves:
            image = (view.source(number) or 0) << _PAGE_BITS | number
            if image in self._taken or not tree.is_in_use(
                view, number, reachable=reachable, free=free
            ):
                continue
            self._taken.add(image)
            doubtful = number not in reachable and tree.mapped(view, number) is tree.Mapped.UNKNOWN
            key = ((seq << 1 | doubtful) << _VIEW_BITS | i) << _PAGE_BITS | number
            self._leaves.append(key)
        return [
            (number, ledger)
            for number, ledger in scan.ledgers
            if tree.is_in_use(view, number, reachable=reachable, free=free)
        ]

    def _grouped(self) -> Iterator[list[_Place]]:
        """Yield all places of one seq after those of another, in ascending order.

        Only leaves that overlap are open at once; in an undamaged table no two do.
        """
        heap: list[_Place] = []
        for key in self._leaves:
            number = key & ((1 << _PAGE_BITS) - 1)
            view = key >> _PAGE_BITS & ((1 << _VIEW_BITS) - 1)
            doubtful = key >> _PAGE_BITS + _VIEW_BITS & 1
            seq = key >> _PAGE_BITS + _VIEW_BITS + 1
            while heap and heap[0].seq < seq:
                yield _pop_group(heap)
            cells, _ = pages.leaf_cells(self._views[view].page(number), first=number == 1)
            for cell in cells:
                heappush(heap, _Place(cell.rowid, doubtful, view, number, cell))
        while heap:
            yield _pop_group(heap)

    def _judge(self, places: list[_Place], before_ms: int) -> Survivor | None:
        """Return what is known of one event by all rows about it; None if nothing worth keeping is."""
        found = [row for place in places for row in self._read(place)]
        events = [row for row in found if isinstance(row, EventRow)]
        event = max(events, key=lambda row: _FURTHEST.index(row.state), default=None)
        if event is not None and event.state == "delivered":
            return Survivor(
                seq=places[0].seq,
                message_id=event.message_id,
                digest=event.digest,
                state="delivered",
                accepted_ms=event.accepted_ms,
                settled_ms=event.settled_ms,
            )
        # A dead letter first: it was pending before. Where only its pending row is left, it is tried again.
        for row in sorted(found, key=lambda row: not isinstance(row, DeadRow)):
            if not isinstance(row, DeadRow | PendingRow):
                continue
            message_id = rows.message_id_in(row.body)
            genuine = not events or any(rows.is_body_of(e.digest, row.body) for e in events)
            if message_id is not None and genuine:
                return _survivor(places[0].seq, message_id, event, row, before_ms)
        if event is not None or not all(place.doubtful for place in places):
            self.report.bodies_lost += 1
        return None

    def _read(self, place: _Place) -> Iterator[Row]:
        """Yield the row at a place, or, where its chain differs between views, what each makes of it."""
        own = self._views[place.view]
        page = own.page(place.page)
        shape = pages.shape_of(page, place.cell)
        table = None if shape is None else rows.table_of(shape)
        if shape is None or table is None:
            return
        others = [view for view in self._views if view is not own and place.cell.overflow]
        for view in (own, *others):
            payload = view.payload(page, place.cell)
            row = payload and rows.row_of(table, pages.values_of(payload, shape))
            if row:
                yield row


@contextmanager
def survey(path: Path) -> Iterator[Survey]:
    """Yield what is left of the outbox at *path* and of the log beside it, open while the block runs."""
    with opened(path) as views:
        newest, bare = views.with_log, views.without_log
        if not views.sound and bare is not None:
            newest, bare = [*newest, bare], None
        yield Survey(newest, bare)


def surviving(path: Path) -> Iterator[Survivor]:
    """Yield what is known of each event in the outbox at *path*, in ascending order of seq."""
    with survey(path) as found:
        yield from found.rows()


def _scan(view: View) -> _Scan:
    """Look at every page once."""
    scan = _Scan()
    for number in view.numbers():
        first = number == 1
        page = view.page(number)
        scan.pages += 1
        kind = page[pages.DATABASE_HEADER_BYTES if first else 0]
        if kind == pages.TABLE_INTERIOR:
            scan.branches[number] = pages.children(page, first=first)
        elif kind == pages.TABLE_LEAF:
            _scan_leaf(scan, view, number, page)
        if tree.mapped(view, number) is tree.Mapped.ROOT:
            scan.roots.append(number)
    scan.roots.append(1)
    return scan


def _scan_leaf(scan: _Scan, view: View, number: int, page: bytes) -> None:
    cells, whole = pages.leaf_cells(page, first=number == 1)
    lowest = None
    for cell in cells:
        shape = pages.shape_of(page, cell)
        table = None if shape is None else rows.table_of(shape)
        whole = whole and shape is not None
        if table in {Table.EVENT, Table.PENDING, Table.DEAD}:
            lowest = cell.rowid if lowest is None else lowest
        elif shape is not None and table is Table.SCHEMA:
            payload = view.payload(page, cell)
            if payload:
                scan.roots.append(rows.root_page(pages.values_of(payload, shape)))
        elif table is Table.LEDGER:
            scan.ledgers += [(number, ledger) for ledger in _ledgers_on(view, number)]
    if lowest is not None:
        scan.leaves.append((lowest, number))
    if not whole:
        scan.incomplete.add(number)


def _ledgers_on(view: View, number: int) -> Iterator[LedgerRow]:
    """Yield what looks like a ledger on page *number*."""
    page = view.page(number)
    for cell in pages.leaf_cells(page)[0]:
        shape = pages.shape_of(page, cell)
        if shape is not None and rows.table_of(shape) is Table.LEDGER:
            payload = view.payload(page, cell)
            row = payload and rows.row_of(Table.LEDGER, pages.values_of(payload, shape))
            if isinstance(row, LedgerRow):
                yield row


def _damaged(view: View, scan: _Scan, free: set[int]) -> int:
    return sum(
        tree.is_damaged(view, number, view.page(number), free=free)
        or (number in scan.incomplete and tree.mapped(view, number) is not tree.Mapped.FREE)
        for number in view.numbers()
    )


def _pop_group(heap: list[_Place]) -> list[_Place]:
    group = [heappop(heap)]
    while heap and heap[0].seq == group[0].seq:
        group.append(heappop(heap))
    return group


def _survivor(
    seq: int,
    message_id: str,
    event: EventRow | None,
    row: DeadRow | PendingRow,
    before_ms: int,
) -> Survivor:
    queued_ms = row.queued_ms if isinstance(row, PendingRow) else None
    accepted_ms = event.accepted_ms if event else before_ms if queued_ms is None else queued_ms
    dead = row if isinstance(row, DeadRow) else None
    settled_ms = event.settled_ms if event else None
    return Survivor(
        seq=seq,
        message_id=message_id,
        digest=event.digest if event else None,
        state="dead" if dead else "pending",
        accepted_ms=accepted_ms,
        settled_ms=(accepted_ms if settled_ms is None else settled_ms) if dead else None,
        kind=row.kind,
        lane=row.lane,
        queued_ms=queued_ms,
        attempts=row.attempts,
        failing_since_ms=row.failing_since_ms if isinstance(row, PendingRow) else None,
        reason=dead.reason if dead else None,
        status=dead.status if dead else None,
        answer=dead.answer if dead else None,
        body=row.body,
    )
