"""Which pages are in use. A free page still holds the rows of events that are long gone.

Three witnesses, and any of them may be damaged: the trees, walked from their roots; the pointer
map, which an auto-vacuum database has; the list of free pages. One that says free is believed
where it does not stand against a tree alone. A page that nobody knows counts as used.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from struct import unpack_from

from agent.outbox.salvage import pages
from agent.outbox.salvage.views import View

_MAP_ENTRY_BYTES = 5
"""A type and the number of a parent. Source: https://sqlite.org/fileformat2.html, 1.8."""

_FIRST_MAP_PAGE = 2

_LOCK_BYTE = 1 << 30
"""The page at this offset is never used. Source: the format, 1.4, "The Lock-Byte Page"."""

_FIRST_TRUNK = 32
"""Where the database header has the first page of the freelist. Source: the format, 1.3."""

_TRUNK_HEADER_BYTES = 8
"""The next trunk page, and how many pages this one lists. Source: the format, 1.5."""


class Mapped(IntEnum):
    """What the pointer map says of a page; `UNKNOWN` where its entry is damaged. Source: 1.8."""

    UNKNOWN = 0
    ROOT = 1
    FREE = 2
    FIRST_OVERFLOW = 3
    OVERFLOW = 4
    CHILD = 5


_WITHOUT_PARENT = frozenset({Mapped.UNKNOWN, Mapped.ROOT, Mapped.FREE})


def map_page(number: int, page_bytes: int) -> int:
    """Return the number of the pointer-map page that has the entry of page *number* (itself, for one)."""
    stride = page_bytes // _MAP_ENTRY_BYTES + 1
    found = max(0, number - _FIRST_MAP_PAGE) // stride * stride + _FIRST_MAP_PAGE
    return found + (found == _LOCK_BYTE // page_bytes + 1)


def mapped(view: View, number: int) -> Mapped:
    """Return what the pointer map says of page *number*."""
    map_number = map_page(number, view.page_bytes)
    page = view.page(map_number)
    at = (number - map_number - 1) * _MAP_ENTRY_BYTES
    if at < 0 or at + _MAP_ENTRY_BYTES > len(page):
        return Mapped.UNKNOWN
    kind, parent = unpack_from(">BI", page, at)
    # Roots and free pages have no parent, all others do: a damaged entry hardly fits by chance.
    if kind > Mapped.CHILD or (parent == 0) != (kind in _WITHOUT_PARENT) or parent > view.count:
        return Mapped.UNKNOWN
    return Mapped(kind)


def free_pages(view: View) -> set[int]:
    """Return the pages of the freelist, as far as it can be followed. Source: the format, 1.5."""
    listed: set[int] = set()
    (trunk,) = unpack_from(">I", view.page(1) or bytes(100), _FIRST_TRUNK)
    while trunk not in listed and 1 < trunk <= view.count:
        page = view.page(trunk)
        following, count = unpack_from(">II", page)
        leaves = unpack_from(f">{min(count, len(page) // 4 - 2)}I", page, _TRUNK_HEADER_BYTES)
        if count > len(leaves) or not all(1 < leaf <= view.count for leaf in leaves):
            break
        listed |= {trunk, *leaves}
        trunk = following
    return listed


def reached(roots: Iterable[int], branches: dict[int, list[int]]) -> set[int]:
    """Return the pages that can be reached from *roots*; *branches* are the interior pages' children."""
    found: set[int] = set()
    left = list(roots)
    while left:
        number = left.pop()
        if number not in found:
            found.add(number)
            left.extend(branches.get(number, ()))
    return found


def is_in_use(view: View, number: int, *, reachable: set[int], free: set[int]) -> bool:
    """Return whether page *number* belongs to the database, as far as that is known."""
    kind = mapped(view, number)
    if number in reachable:
        # A damaged tree may point to a free page; two witnesses outweigh it, one may be damaged itself.
        return not (kind is Mapped.FREE and number in free)
    return number not in free if kind is Mapped.UNKNOWN else kind is not Mapped.FREE


def is_damaged(view: View, number: int, page: bytes, *, free: set[int]) -> bool:
    """Return whether *page* can be seen to be damaged; the cells of a leaf are not looked at."""
    if number == map_page(number, view.page_bytes):
        behind = range(number + 1, min(number + 1 + len(page) // _MAP_ENTRY_BYTES, view.count + 1))
        return any(mapped(view, other) is Mapped.UNKNOWN for other in behind)
    match mapped(view, number):
        case Mapped.FREE | Mapped.FIRST_OVERFLOW | Mapped.OVERFLOW:
            return False
        case Mapped.ROOT | Mapped.CHILD:
            return not pages.is_sane(page)
        case Mapped.UNKNOWN:
            if number in free or pages.is_sane(page, first=number == 1):
                return False
            # Perhaps a page of an overflow chain, which begins with the number of the next.
            (following,) = unpack_from(">I", page)
            return number == 1 or following > view.count or not any(page)
