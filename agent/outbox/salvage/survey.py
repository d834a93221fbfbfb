"""All rows that can be read, and what became of each event.

A first pass over the pages learns which leaves hold rows and where each begins; a second one opens
the leaves in that order and merges them, so that all that is known of one event comes together.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from agent.event import Kind, proof_of
from agent.outbox.records import App, Ledger, Reason, State
from agent.outbox.salvage import pages, rows, tree
from agent.outbox.salvage.pages import Cell
from agent.outbox.salvage.rows import DeadRow, EventRow, LedgerRow, PendingRow, Row, Table
from agent.outbox.salvage.scan import ledgers_on, scan
from agent.outbox.salvage.views import View, Views, opened

_PAGE_BITS = 26
_VIEW_BITS = 2
"""Of the integer that stands for a leaf: room for `log.MAX_PAGE`, and for the views there can be."""

_FURTHEST: tuple[State, ...] = ("pending", "dead", "delivered")
"""An event only moves on, so that of two rows about it the one that is further is the newer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivor:
    """One event that can still be known. *body* is None for a delivered one alone.

    *message_id* is the body's where there is one. *digest* is None where none proves the body: the
    row of the event is gone, or that or the body is damaged. Where the row of the event is gone,
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
    upstream: str = ""
    app: str = ""


@dataclass(slots=True, kw_only=True)
class Report:
    """What was found. Pages and ledger are known at once, the events when `Survey.rows` is exhausted.

    *pages_damaged* are those in use that do not decode in full. *bodies_lost* are events that are
    known and were not delivered, but whose body is gone. *ledger* and *last_seq* are what the
    database said of itself, None if that is lost; *apps* those that are still known.
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
    apps: list[App] = field(default_factory=list)


class _Place(NamedTuple):
    """Where a row is. Ordered by seq; then a leaf that is surely in use, then a newer view, comes first."""

    seq: int
    doubtful: int
    view: int
    page: int
    cell: Cell


class _Bodied(NamedTuple):
    """A row with the JSON of an event. *digest* is what proves its body, if anything does."""

    row: DeadRow | PendingRow
    message_id: str
    digest: bytes | None


class Survey:
    """What is left in a damaged database. Made by `survey`."""

    def __init__(self, views: Views) -> None:
        self._views: list[View] = []
        self._leaves: list[int] = []
        self._taken: set[int] = set()
        self._apps: dict[str, App] = {}
        self.report = Report(page_bytes=views.with_log[0].page_bytes)
        ledgers = [ledger for view in views.with_log for ledger in self._add(view, None)]
        bare = views.without_log
        if bare is not None:
            # A log that was cut shows less than a checkpoint may have put into the database before.
            age = max((ledger.age for _, ledger in ledgers), default=0)
            stored = [ledger for number, _ in ledgers for ledger in ledgers_on(bare, number)]
            behind = any(ledger.age > age for ledger in stored)
            if behind or views.doubted is None or views.doubted:
                ledgers += self._add(bare, None if behind else views.doubted)
        if ledgers:
            ledger = max((ledger for _, ledger in ledgers), key=lambda ledger: ledger.age)
            self.report.last_seq, self.report.ledger = ledger.last_seq, ledger.counters
        self.report.apps = list(self._apps.values())
        self._leaves.sort()

    def rows(self) -> Iterator[Survivor]:
        """Yield what is known of each event in ascending order of seq, dead letters after the others.

        So whoever keeps the first of two with one messageId keeps the right one: where a dead
        letter was put back into the queue, an older image of its page still shows it.
        """
        report = self.report
        report.pending = report.dead = report.delivered = report.bodies_lost = 0
        dead = array("q")
        accepted_ms = 0
        for places in self._grouped():
            survivor = self._judge(places, accepted_ms)
            if survivor is None:
                continue
            if survivor.state == "dead":
                dead.extend((survivor.seq, accepted_ms))
            else:
                report.pending += survivor.state == "pending"
                report.delivered += survivor.state == "delivered"
                yield survivor
            accepted_ms = survivor.accepted_ms
        i = 0
        for places in self._grouped() if dead else ():
            if i < len(dead) and places[0].seq == dead[i]:
                survivor = self._judge(places, dead[i + 1])
                i += 2
                if survivor is not None:
                    report.dead += 1
                    yield survivor

    def _add(self, view: View, only: set[int] | None) -> list[tuple[int, LedgerRow]]:
        """Take in the leaves of one more view, all or *only* some; return the ledgers in use there."""
        free = tree.free_pages(view)
        found = scan(view, free)
        reachable = tree.reached(found.roots, found.branches)
        if not self._views:
            self.report.pages, self.report.pages_damaged = found.pages, found.damaged
        i = len(self._views)
        self._views.append(view)
        for seq, number in found.leaves:
            image = (view.source(number) or 0) << _PAGE_BITS | number
            if image in self._taken or (only is not None and number not in only):
                continue
            if not tree.is_in_use(view, number, reachable=reachable, free=free):
                continue
            self._taken.add(image)
            doubtful = number not in reachable and tree.mapped(view, number) is tree.Mapped.UNKNOWN
            key = ((seq << 1 | doubtful) << _VIEW_BITS | i) << _PAGE_BITS | number
            self._leaves.append(key)

        def in_use(number: int) -> bool:
            return tree.is_in_use(view, number, reachable=reachable, free=free)

        for number, app in found.apps:
            if in_use(number):
                # An older image may have the token before this one, or that one not yet revoked.
                newest = max(app, self._apps.get(app.name, app), key=_token_age)
                self._apps[app.name] = newest
        return [(number, ledger) for number, ledger in found.ledgers if in_use(number)]

    def _grouped(self) -> Iterator[list[_Place]]:
        """Yield all places of one seq after those of another, in ascending order.

        Only leaves that overlap are open at once; of one undamaged table no two do.
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
        """Return what is known of one event by all rows about it; None if its body is gone."""
        seq = places[0].seq
        found = [row for place in places for row in self._read(place)]
        events = [row for row in found if isinstance(row, EventRow)]
        event = max(events, key=lambda row: _FURTHEST.index(row.state), default=None)
        if event is not None and event.state == "delivered":
            return _delivered(seq, event)
        digests = {row.digest for row in events}
        bodied: list[_Bodied] = []
        for row in found:
            if isinstance(row, DeadRow | PendingRow):
                message_id = rows.message_id_in(row.body)
                digest = proof_of(row.body, digests)
                # Unproven and with another id, the body is what is damaged.
                same = event is None or digest is not None or message_id == event.message_id
                if message_id is not None and same:
                    bodied.append(_Bodied(row, message_id, digest))
        if not bodied:
            self.report.bodies_lost += event is not None or any(map(self._had_body, places))
            return None
        # Dead before pending: a dead letter was pending before. Where only the pending row is left
        # of one, it is tried again.
        best = min(bodied, key=lambda b: (b.digest is None, isinstance(b.row, PendingRow)))
        return _waiting(seq, best, event, before_ms)

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

    def _had_body(self, place: _Place) -> bool:
        """Return whether there surely was a body at a place."""
        shape = pages.shape_of(self._views[place.view].page(place.page), place.cell)
        table = None if shape is None else rows.table_of(shape)
        return not place.doubtful and table in {Table.PENDING, Table.DEAD}


@contextmanager
def survey(path: Path) -> Iterator[Survey]:
    """Yield what is left of the outbox at *path* and of the log beside it, open while the block runs."""
    with opened(path) as views:
        yield Survey(views)


def surviving(path: Path) -> Iterator[Survivor]:
    """Yield what is known of each event in the outbox at *path*, in the order of `Survey.rows`."""
    with survey(path) as found:
        yield from found.rows()


def _token_age(app: App) -> tuple[bool, int, bool]:
    return app.token_digest is not None, app.created_ms, app.revoked_ms is not None


def _pop_group(heap: list[_Place]) -> list[_Place]:
    group = [heappop(heap)]
    while heap and heap[0].seq == group[0].seq:
        group.append(heappop(heap))
    return group


def _delivered(seq: int, event: EventRow) -> Survivor:
    return Survivor(
        seq=seq,
        message_id=event.message_id,
        digest=event.digest,
        state="delivered",
        accepted_ms=event.accepted_ms,
        settled_ms=event.settled_ms,
        upstream=event.upstream,
        app=event.app,
    )


def _waiting(seq: int, found: _Bodied, event: EventRow | None, before_ms: int) -> Survivor:
    row = found.row
    pending = row if isinstance(row, PendingRow) else None
    dead = row if isinstance(row, DeadRow) else None
    accepted_ms = event.accepted_ms if event else pending.queued_ms if pending else before_ms
    settled_ms = event.settled_ms if event else None
    return Survivor(
        seq=seq,
        message_id=found.message_id,
        digest=found.digest,
        state="dead" if dead else "pending",
        accepted_ms=accepted_ms,
        settled_ms=(accepted_ms if settled_ms is None else settled_ms) if dead else None,
        kind=row.kind,
        lane=row.lane,
        queued_ms=pending.queued_ms if pending else None,
        attempts=row.attempts,
        failing_since_ms=pending.failing_since_ms if pending else None,
        reason=dead.reason if dead else None,
        status=dead.status if dead else None,
        answer=dead.answer if dead else None,
        body=row.body,
        upstream=event.upstream if event else row.upstream,
        app=event.app if event else "",
    )
