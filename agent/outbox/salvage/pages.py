"""One page of a table b-tree as bytes: its cells, and the record in a cell. Pure.

Sections and field names are those of https://sqlite.org/fileformat2.html ("the format").
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from struct import Struct, error, unpack_from
from typing import NamedTuple

TABLE_INTERIOR = 0x05
TABLE_LEAF = 0x0D
_INDEX_INTERIOR = 0x02
_INDEX_LEAF = 0x0A
"""The first byte of a b-tree page. Source: the format, 1.6."""

DATABASE_HEADER_BYTES = 100
"""What stands in front of the b-tree header on page 1. Source: the format, 1.3."""

_HEADER_BYTES = {TABLE_LEAF: 8, _INDEX_LEAF: 8, TABLE_INTERIOR: 12, _INDEX_INTERIOR: 12}

_HEADER = Struct(">BHHH")
"""Type, first freeblock, number of cells, start of the cell content. Source: the format, 1.6."""

_POINTER_BYTES = 2
_LEAST_CELL_BYTES = 4

_MAX_ROWID = (1 << 63) - 1
"""Rowids are signed 64-bit integers, and a seq is never negative."""

_MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
"""A larger record is damage: a body, its id and the upstream's answer to it together are less."""

_MAX_COLUMNS = 32
"""A record of more columns is none of ours."""

Value = int | float | bytes | None
"""A column; a text as its bytes."""


class Cell(NamedTuple):
    """Where a row lies: *local* bytes of its *size* from *start* in the page, the rest in a chain.

    *overflow* is the number of the first page of the chain; 0: there is none.
    """

    rowid: int
    size: int
    start: int
    local: int
    overflow: int


class Shape(NamedTuple):
    """The header of a record: the serial type of each column, and where their values start.

    Source: the format, 2.1.
    """

    types: tuple[int, ...]
    start: int


def is_sane(page: bytes, *, first: bool = False) -> bool:
    """Return whether *page* is a b-tree page by its header and cell pointers. *first*: it is page 1."""
    try:
        _pointers(page, DATABASE_HEADER_BYTES if first else 0)
    except (ValueError, error):
        return False
    return True


def leaf_cells(page: bytes, *, first: bool = False) -> tuple[list[Cell], bool]:
    """Return the cells of a leaf of a table that decode, and whether that is all of them.

    Rowids ascend in a leaf; cells that break the order are left out as damaged.
    """
    at = DATABASE_HEADER_BYTES if first else 0
    if page[at : at + 1] != bytes([TABLE_LEAF]):
        return [], False
    pointers, whole = _some_pointers(page, at)
    cells = [cell for pointer in pointers if (cell := cell_at(page, pointer)) is not None]
    ascending = _longest_ascent([cell.rowid for cell in cells])
    return [cells[i] for i in ascending], whole and len(ascending) == len(pointers)


def children(page: bytes, *, first: bool = False) -> list[int]:
    """Return the page numbers that an interior page of a table points to; damaged ones too."""
    at = DATABASE_HEADER_BYTES if first else 0
    if page[at : at + 1] != bytes([TABLE_INTERIOR]):
        return []
    pointers, _ = _some_pointers(page, at)
    found = [unpack_from(">I", page, pointer)[0] for pointer in pointers]
    return [*found, *unpack_from(">I", page, at + 8)]


def cell_at(page: bytes, pointer: int) -> Cell | None:
    """Return the cell of a table's leaf at *pointer*; None where there cannot be one.

    Source: the format, 1.6, "B-tree Cell Format" and the rules of overflow.
    """
    try:
        size, at = _varint(page, pointer)
        rowid, at = _varint(page, at)
    except IndexError:
        return None
    local = local_bytes(size, len(page))
    end = at + local
    if local == size:
        overflow = 0
    elif end + 4 <= len(page):
        (overflow,) = unpack_from(">I", page, end)
    else:
        return None
    if not 0 < rowid <= _MAX_ROWID or not 0 < size <= _MAX_PAYLOAD_BYTES or end > len(page):
        return None
    return Cell(rowid, size, at, local, overflow)


def local_bytes(size: int, page_bytes: int) -> int:
    """Return how much of a record of *size* bytes stands in the leaf itself.

    Source: the format, 1.6: P is *size*, U is *page_bytes* (no space is reserved), X = U - 35.
    """
    most = page_bytes - 35
    if size <= most:
        return size
    least = (page_bytes - 12) * 32 // 255 - 23
    local = least + (size - least) % (page_bytes - 4)
    return local if local <= most else least


def shape_of(page: bytes, cell: Cell) -> Shape | None:
    """Return the header of the cell's record; None unless it accounts for every byte of it."""
    try:
        header, at = _varint(page, cell.start)
        end = cell.start + header
        if end > cell.start + cell.local or header > _MAX_COLUMNS * 5:
            return None
        types: list[int] = []
        size = header
        while at < end:
            kind, at = _varint(page, at)
            types.append(kind)
            size += (kind - 12) // 2 if kind >= 12 else _SHORT_VALUE_BYTES[kind]
    except IndexError:
        return None
    return Shape(tuple(types), header) if at == end and size == cell.size else None


def values_of(payload: bytes, shape: Shape) -> list[Value]:
    """Return the columns of a whole record. Source: the format, 2.1, "Serial Type Codes"."""
    found: list[Value] = []
    at = shape.start
    for kind in shape.types:
        end = at + ((kind - 12) // 2 if kind >= 12 else _SHORT_VALUE_BYTES[kind])
        found.append(_value(kind, payload[at:end]))
        at = end
    return found


def _value(kind: int, raw: bytes) -> Value:
    if kind >= 12:
        return raw
    if kind == 0:
        return None
    if kind in {8, 9}:
        return kind - 8
    if kind == 7:
        return float(unpack_from(">d", raw)[0])
    return int.from_bytes(raw, "big", signed=True)


_SHORT_VALUE_BYTES = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)
"""By serial type; from 12 on, blobs and texts, it is half of what is above that."""


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length integer and where it ends. Raises IndexError past the page's end.

    Source: the format, 1.6, "varint". Negative ones come out huge: we have none.
    """
    byte = page[at]
    if byte < 0x80:
        return byte, at + 1
    value = byte & 0x7F
    for i in range(at + 1, at + 8):
        byte = page[i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, i + 1
    return value << 8 | page[at + 8], at + 9


def _pointers(page: bytes, at: int) -> tuple[int, ...]:
    """Return all cell pointers. Raises ValueError or struct.error where header or pointers cannot be."""
    kind, _, count, content = _HEADER.unpack_from(page, at)
    array = at + _HEADER_BYTES.get(kind, len(page))
    end = array + count * _POINTER_BYTES
    if not end <= (content or 65536) <= len(page):
        raise ValueError("no b-tree page")
    pointers: tuple[int, ...] = unpack_from(f">{count}H", page, array)
    if pointers and not end <= min(pointers) <= max(pointers) <= len(page) - _LEAST_CELL_BYTES:
        raise ValueError("a cell outside the page")
    return pointers


def _some_pointers(page: bytes, at: int) -> tuple[Sequence[int], bool]:
    """Return the cell pointers that can be, and whether the page is sane.

    Of a page whose header is damaged, too: its count of cells is not believed past the page's end.
    """
    try:
        return _pointers(page, at), True
    except (ValueError, error):
        pass
    (count,) = unpack_from(">H", page, at + 3)
    array = at + _HEADER_BYTES[page[at]]
    count = min(count, (len(page) - array) // _POINTER_BYTES)
    most = len(page) - _LEAST_CELL_BYTES
    pointers = unpack_from(f">{count}H", page, array)
    return [pointer for pointer in pointers if array < pointer <= most], False


def _longest_ascent(numbers: Sequence[int]) -> list[int]:
    """Return the indexes of the longest strictly ascending subsequence of *numbers*."""
    tails: list[int] = []
    ends: list[int] = []
    before = [-1] * len(numbers)
    for i, number in enumerate(numbers):
        length = bisect_left(tails, number)
        tails[length : length + 1] = [number]
        ends[length : length + 1] = [i]
        before[i] = ends[length - 1] if length else -1
    found: list[int] = []
    i = ends[-1] if ends else -1
    while i >= 0:
        found.append(i)
        i = before[i]
    return found[::-1]
