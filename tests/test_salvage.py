"""What can be read of a damaged outbox: by what is damaged, and by any damage at all.

Three hundred damages of whole files are in `tests/faults/test_corruption.py`.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from struct import pack_into, unpack_from

import pytest
from faults import damage
from faults.specimen import Row, Specimen, log_of, make
from faults.verdict import Extents, Spared, extents_of, judge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract import read_event
from agent.event import proof_of
from agent.outbox.salvage import (
    Report,
    Survivor,
    log,
    log_is_broken,
    pages,
    rows,
    survey,
    surviving,
    tree,
    views,
)

EVENTS = 640


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    return make(tmp_path_factory.mktemp("closed"), events=EVENTS, killed=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    return make(tmp_path_factory.mktemp("killed"), events=EVENTS, killed=True)


@pytest.fixture(scope="module")
def extents(closed: Specimen) -> Extents:
    return extents_of(closed)


def found_in(path: Path) -> tuple[dict[int, Survivor], Report]:
    with survey(path) as left:
        found = list(left.rows())
        order = [(row.state == "dead", row.seq) for row in found]
        assert order == sorted(set(order))
        return {row.seq: row for row in found}, left.report


def is_same(row: Row, survivor: Survivor | None) -> bool:
    return survivor is not None and all(
        getattr(row, name) == getattr(survivor, name) for name in Row.__slots__
    )


def pages_with(path: Path, table: rows.Table) -> list[int]:
    """Return the offsets of the leaves in the file at *path* that hold rows of *table*."""
    with views.opened(path) as files:
        view = files.with_log[0]
        offsets = []
        for number in view.numbers():
            page = view.page(number)
            for cell in pages.leaf_cells(page)[0][:1]:
                shape = pages.shape_of(page, cell)
                if shape is not None and rows.table_of(shape) is table:
                    offsets.append((number - 1) * view.page_bytes)
        return offsets


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def zero(path: Path, offsets: list[int], count: int) -> None:
    def edit(content: bytearray) -> None:
        for at in offsets:
            content[at : at + count] = bytes(count)

    change(path, edit)


# --- undamaged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_bytes", [512, 1024, 2048, 4096, 65536])
@pytest.mark.parametrize("was_killed", [False, True])
def test_an_undamaged_outbox_is_found_row_for_row(
    tmp_path: Path, page_bytes: int, was_killed: bool
) -> None:
    whole = make(tmp_path, events=400, killed=was_killed, page_bytes=page_bytes)
    found, report = found_in(whole.path)
    assert found.keys() == whole.rows.keys()
    assert all(is_same(row, found[seq]) for seq, row in whole.rows.items())
    assert {survivor.digest is None for survivor in found.values()} == {False}
    states = [row.state for row in whole.rows.values()]
    assert report.pages_damaged == report.bodies_lost == 0
    assert report.ledger is not None
    assert (report.ledger.pending, report.ledger.dead) == (report.pending, report.dead)
    assert report.pending == states.count("pending") > 0
    assert report.dead == states.count("dead") > 0
    assert report.delivered == states.count("delivered") > 0
    assert report.last_seq is not None
    assert report.last_seq >= max(whole.rows)


def test_a_ledger_that_gained_a_column_is_read(tmp_path: Path, closed: Specimen) -> None:
    path = closed.copy(tmp_path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE ledger ADD COLUMN later INTEGER NOT NULL DEFAULT 0")
        db.execute("UPDATE ledger SET later = 7")
        db.commit()
    assert found_in(path)[1].ledger == found_in(closed.path)[1].ledger is not None


def test_a_seq_may_be_as_large_as_sqlite_has_them(tmp_path: Path, closed: Specimen) -> None:
    path = closed.copy(tmp_path)
    with closing(sqlite3.connect(path)) as db:
        high = (1 << 63) - 1 - max(closed.rows)
        for table in ("event", "pending", "dead"):
            db.execute(f"UPDATE {table} SET seq = seq + {high}")
        db.commit()
    found, report = found_in(path)
    assert found.keys() == {seq + high for seq in closed.rows}
    assert report.pages_damaged == 0


def test_bodies_are_not_held_in_memory(tmp_path: Path) -> None:
    whole = make(tmp_path, events=4_000, killed=False)
    size = whole.path.stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in surviving(whole.path)) == len(whole.rows)
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()


# --- damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        damage.no_schema,
        damage.no_interior_pages,
        damage.pointer_map_lost,
        damage.freelist_of_garbage,
        damage.header_of_garbage,
        damage.another_page_size,
    ],
)
def test_what_only_leads_to_the_rows_is_not_needed(
    tmp_path: Path, closed: Specimen, extents: Extents, way: Callable[[damage.Wreck], None]
) -> None:
    path = closed.copy(tmp_path)
    damage.Damage(1, way, killed=False).inflict(path, closed)
    verdict = judge(closed, Spared(closed, extents, path), surviving(path))
    assert verdict.spared >= len(closed.rows) - 1  # the first page may be a leaf of ours in part
    assert not verdict.missing
    assert not verdict.returned
    assert not verdict.undelivered
    assert not verdict.invented


@pytest.mark.parametrize("page_bytes", [1024, 2048, 4096, 8192])
def test_the_page_size_is_found_without_any_header(tmp_path: Path, page_bytes: int) -> None:
    whole = make(tmp_path, events=400, killed=True, page_bytes=page_bytes)
    told = int.from_bytes(whole.path.read_bytes()[16:18], "big")
    zero(whole.path, [0], 100)
    zero(log_of(whole.path), [0], 32)
    found, report = found_in(whole.path)
    assert report.page_bytes == told
    assert whole.rows.keys() <= found.keys()


def test_a_pending_event_whose_own_row_is_gone_is_told_by_its_body(
    tmp_path: Path, closed: Specimen
) -> None:
    path = closed.copy(tmp_path)
    zero(path, pages_with(path, rows.Table.EVENT), 8)
    found, report = found_in(path)
    waiting = {seq for seq, row in closed.rows.items() if row.state != "delivered"}
    assert found.keys() == waiting
    assert report.pages_damaged > 0
    for seq, survivor in found.items():
        row = closed.rows[seq]
        assert (survivor.message_id, survivor.state) == (row.message_id, row.state)
        assert (survivor.body, survivor.digest) == (row.body, None)
        if row.state == "pending":
            assert survivor.accepted_ms == survivor.queued_ms


def test_an_event_whose_body_is_gone_is_counted(tmp_path: Path, closed: Specimen) -> None:
    path = closed.copy(tmp_path)
    zero(path, pages_with(path, rows.Table.PENDING), 8)
    found, report = found_in(path)
    states = [row.state for row in closed.rows.values()]
    assert {row.state for row in found.values()} == {"dead", "delivered"}
    assert report.pending == 0
    assert report.bodies_lost == states.count("pending")


@pytest.mark.parametrize(
    ("was", "became", "survives"), [(b'"Item Sold"', b'"Item Sole"', True), (b"{", b"[", False)]
)
def test_an_altered_body_is_unproven_and_a_broken_one_is_lost(
    tmp_path: Path, closed: Specimen, was: bytes, became: bytes, survives: bool
) -> None:
    path = closed.copy(tmp_path)
    row = next(row for row in closed.rows.values() if row.body and len(row.body) < 400)
    assert row.body is not None
    altered = row.body.replace(was, became, 1)
    whole = row.body
    change(path, lambda content: content.__setitem__(slice(None), content.replace(whole, altered)))
    found, report = found_in(path)
    if survives:
        assert (found[row.seq].body, found[row.seq].digest) == (altered, None)
    else:
        assert row.seq not in found
        assert report.bodies_lost == 1


def test_an_overflow_chain_that_runs_in_a_circle_ends(tmp_path: Path, closed: Specimen) -> None:
    path = closed.copy(tmp_path)
    size = found_in(path)[1].page_bytes

    def edit(content: bytearray) -> None:
        for at in range(size, len(content), size):
            (following,) = unpack_from(">I", content, at)
            if content[at] == 0 and 0 < following <= len(content) // size:
                pack_into(">I", content, at, at // size + 1)

    change(path, edit)
    assert len(found_in(path)[0]) < len(closed.rows)


def test_a_seq_out_of_order_is_damage() -> None:
    page = bytearray(512)
    pack_into(">BHHHB4H", page, 0, pages.TABLE_LEAF, 0, 4, 400, 0, 500, 490, 480, 470)
    for at, rowid in ((500, 1), (490, 99), (480, 2), (470, 3)):
        page[at : at + 4] = bytes([2, rowid, 1, 0])
    cells, whole = pages.leaf_cells(bytes(page))
    assert [cell.rowid for cell in cells] == [1, 2, 3]
    assert not whole


@pytest.mark.parametrize("stamp", [{}, {"timestamp": "2026-11-23T10:00:00.000Z"}])
def test_a_body_is_proven_by_the_digest_that_it_was_accepted_with(stamp: dict[str, str]) -> None:
    fields = {"messageId": "m", "event": "e", "userId": "u", **stamp}
    event = read_event("track", json.dumps(fields).encode(), received_ms=1_800_000_000_000)
    assert proof_of(event.body, {event.digest, b"another"}) == event.digest
    assert proof_of(event.body.replace(b"u", b"v"), {event.digest}) is None
    assert rows.message_id_in(event.body) == "m"


@pytest.mark.parametrize("page_bytes", [512, 1024, 4096, 65536])
def test_a_pointer_map_page_is_where_sqlite_puts_it(page_bytes: int) -> None:
    entries = page_bytes // 5
    assert tree.map_page(2, page_bytes) == tree.map_page(entries + 2, page_bytes) == 2
    assert tree.map_page(entries + 3, page_bytes) == entries + 3


# --- the log ------------------------------------------------------------------------------------


def _frames(path: Path) -> tuple[int, int]:
    """Return the size of a frame, and how many there are."""
    content = log_of(path).read_bytes()
    stride = unpack_from(">I", content, 8)[0] + log.FRAME_HEADER_BYTES
    return stride, (len(content) - log.HEADER_BYTES) // stride


def test_frames_behind_a_damaged_one_are_taken(tmp_path: Path, killed: Specimen) -> None:
    path = killed.copy(tmp_path)
    zero(log_of(path), [log.HEADER_BYTES + log.FRAME_HEADER_BYTES + 100], 8)
    found, _ = found_in(path)
    spared = Spared(killed, extents_of(killed), path)
    assert not judge(killed, spared, found.values()).missing
    assert sum(is_same(row, found.get(seq)) for seq, row in killed.rows.items()) > 600 * 0.7


def test_an_older_log_behind_the_newest_is_no_damage(tmp_path: Path, killed: Specimen) -> None:
    path = killed.copy(tmp_path)
    stride, _ = _frames(path)

    def age(content: bytearray) -> None:
        left = content[-stride:]
        (salt,) = unpack_from(">I", left, 8)
        pack_into(">I", left, 8, salt - 1 & 0xFFFFFFFF)
        content += left

    change(log_of(path), age)
    with views.opened(path) as files:
        assert len(files.with_log) == 1
        assert files.doubted == set()


def test_a_log_that_lost_its_end_does_not_hide_what_a_checkpoint_had_taken(
    tmp_path: Path, closed: Specimen, killed: Specimen
) -> None:
    path = killed.copy(tmp_path)
    before = log_of(path).read_bytes()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint")
        checkpointed = path.read_bytes()
    stride, frames = _frames(killed.path)
    path.write_bytes(checkpointed)
    log_of(path).write_bytes(before[: log.HEADER_BYTES + frames // 2 * stride])
    found, _ = found_in(path)
    assert all(is_same(row, found.get(seq)) for seq, row in killed.rows.items())


def test_a_log_that_sqlite_would_drop_the_middle_of_is_told(
    tmp_path: Path, killed: Specimen
) -> None:
    path = killed.copy(tmp_path)
    stride, frames = _frames(path)
    assert not log_is_broken(path)
    change(log_of(path), lambda content: content.__delitem__(slice(-stride // 2, None)))
    assert not log_is_broken(path)  # as a power cut leaves the last transaction
    zero(log_of(path), [log.HEADER_BYTES + frames // 2 * stride], stride + 100)
    assert log_is_broken(path)


def test_what_a_transaction_that_was_rolled_back_left_in_the_log_is_no_damage(
    tmp_path: Path, killed: Specimen
) -> None:
    path = killed.copy(tmp_path)
    stride, _ = _frames(path)

    def leave(content: bytearray) -> None:
        left = content[-2 * stride :]
        for at in (0, stride):
            pack_into(">I", left, at + 4, 0)  # no commit frame
        content += left

    change(log_of(path), leave)
    assert not log_is_broken(path)
    found, _ = found_in(path)
    assert killed.rows.keys() <= found.keys()


def test_a_log_beside_an_empty_database_is_told(tmp_path: Path, killed: Specimen) -> None:
    path = killed.copy(tmp_path)
    path.write_bytes(b"")
    assert log_is_broken(path)


# --- anything -----------------------------------------------------------------------------------


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytearray], None]:
    """A few flips, cuts, zeros and shuffled ranges anywhere in a file."""
    ways = draw(
        st.lists(
            st.tuples(st.sampled_from(["flip", "cut", "zero", "garbage", "copy"]), st.floats(0, 1)),
            max_size=6,
        )
    )
    seed = draw(st.integers(0, 1 << 32))

    def edit(content: bytearray) -> None:
        rng = random.Random(seed)
        for way, where in ways:
            at = int(where * len(content))
            length = rng.choice([1, 7, 100, 5_000, 50_000])
            size = len(content[at : at + length])
            match way:
                case "flip" if size:
                    content[at] ^= rng.randrange(1, 256)
                case "cut":
                    del content[at:]
                case "zero":
                    content[at : at + size] = bytes(size)
                case "garbage":
                    content[at : at + size] = rng.randbytes(size)
                case "copy":
                    other = rng.randrange(len(content) + 1)
                    content[at : at + size] = content[other : other + size].ljust(size, b"\r")
                case _:
                    pass

    return edit


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(to_db=edits(), to_log=edits(), db=st.sampled_from(["closed", "killed"]))
def test_no_damage_raises_or_invents(
    tmp_path: Path,
    closed: Specimen,
    killed: Specimen,
    to_db: Callable[[bytearray], None],
    to_log: Callable[[bytearray], None],
    db: str,
) -> None:
    whole = killed if db == "killed" else closed
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = whole.copy(folder)
    change(path, to_db)
    if log_of(path).exists():
        change(log_of(path), to_log)
    found, _ = found_in(path)
    assert len(found) <= len(whole.rows) + len(whole.gone) + 50
    for survivor in found.values():
        assert (survivor.body is None) == (survivor.state == "delivered")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.binary(max_size=4096), kind=st.sampled_from([0x05, 0x0D]))
def test_no_page_raises(content: bytes, kind: int) -> None:
    page = (bytes([kind]) + content).ljust(4096, b"\0")[:4096]
    for cell in pages.leaf_cells(page)[0]:
        if shape := pages.shape_of(page, cell):
            rows.table_of(shape)
    pages.children(page)
    pages.is_sane(page, first=True)


@pytest.fixture(params=["missing", "empty", "one byte", "a folder", "text"])
def no_database(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "outbox.db"
    match request.param:
        case "empty":
            path.touch()
        case "one byte":
            path.write_bytes(b"S")
        case "a folder":
            path.mkdir()
        case "text":
            path.write_text("nothing of ours " * 1_000)
        case _:
            pass
    return path


def test_what_is_no_database_has_no_rows(no_database: Path) -> None:
    log_of(no_database).write_bytes(b"neither is this " * 500)
    found, report = found_in(no_database)
    assert not found
    assert report.ledger is None
