"""One pass over all pages of a view: which leaves hold rows of events, and what leads to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.outbox.records import App
from agent.outbox.salvage import pages, rows, tree
from agent.outbox.salvage.rows import LedgerRow, Table
from agent.outbox.salvage.views import View


@dataclass(slots=True)
class Scan:
    leaves: list[tuple[int, int]] = field(default_factory=list)
    """(the lowest seq, the page) of each leaf with rows of events."""
    ledgers: list[tuple[int, LedgerRow]] = field(default_factory=list)
    """(the page, the row) of whatever looks like a ledger."""
    apps: list[tuple[int, App]] = field(default_factory=list)
    """The same of apps."""
    roots: list[int] = field(default_factory=lambda: [1])
    branches: dict[int, list[int]] = field(default_factory=dict)
    """The children of each interior page."""
    pages: int = 0
    damaged: int = 0
    """Pages in use that do not decode in full."""


def scan(view: View, free: set[int]) -> Scan:
    """Look at every page once. *free* are the pages of the freelist."""
    found = Scan()
    for number in view.numbers():
        first = number == 1
        page = view.page(number)
        kind = page[pages.DATABASE_HEADER_BYTES if first else 0]
        mapped = tree.mapped(view, number)
        whole = True
        if kind == pages.TABLE_INTERIOR:
            found.branches[number] = pages.children(page, first=first)
        elif kind == pages.TABLE_LEAF:
            whole = _scan_leaf(found, view, number, page)
        if mapped is tree.Mapped.ROOT:
            found.roots.append(number)
        found.pages += 1
        found.damaged += tree.is_damaged(view, number, page, free=free) or not (
            whole or mapped is tree.Mapped.FREE or number in free
        )
    return found


def _scan_leaf(found: Scan, view: View, number: int, page: bytes) -> bool:
    """Take in a leaf of a table; return whether all of its cells decode."""
    cells, whole = pages.leaf_cells(page, first=number == 1)
    lowest = None
    for cell in cells:
        shape = pages.shape_of(page, cell)
        table = None if shape is None else rows.table_of(shape)
        whole = whole and shape is not None
        if table in rows.ABOUT_EVENTS:
            lowest = cell.rowid if lowest is None else lowest
        elif shape is not None and table is Table.SCHEMA:
            payload = view.payload(page, cell)
            if payload:
                found.roots.append(rows.root_page(pages.values_of(payload, shape)))
        elif table is Table.LEDGER:
            found.ledgers += [(number, ledger) for ledger in ledgers_on(view, number)]
        elif shape is not None and table is Table.APP:
            payload = view.payload(page, cell)
            app = payload and rows.row_of(Table.APP, pages.values_of(payload, shape))
            if isinstance(app, App):
                found.apps.append((number, app))
    if lowest is not None:
        found.leaves.append((lowest, number))
    return whole


def ledgers_on(view: View, number: int) -> Iterator[LedgerRow]:
    """Yield what looks like a ledger on page *number*."""
    page = view.page(number)
    for cell in pages.leaf_cells(page)[0]:
        shape = pages.shape_of(page, cell)
        if shape is not None and rows.table_of(shape) is Table.LEDGER:
            payload = view.payload(page, cell)
            row = payload and rows.row_of(Table.LEDGER, pages.values_of(payload, shape))
            if isinstance(row, LedgerRow):
                yield row
