"""The index of messageIds, on its way from memory to the disk."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sized
from pathlib import Path

import msgspec
import pytest

from agent.clock import SystemClock
from agent.event import Event
from agent.outbox import ids, letters, schema
from agent.outbox.access import open_own_reader
from agent.outbox.ids import id_hash
from agent.outbox.procedures import MOST_BYTES, MOST_ROWS, Keyed, part
from agent.outbox.records import Ack, Appended, Bury, Policy, Selection
from agent.outbox.store import Store
from agent.outbox.writer import open_writer

POLICY = Policy(max_bytes=1 << 30, evicts=False, remember=True)
FORGETFUL = Policy(max_bytes=1 << 30, evicts=False, remember=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "RECENT", 8)
    monkeypatch.setattr(ids, "SLICE", 3)


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def _event(name: str) -> Event:
    return Event(message_id=name, kind="track", lane=1, digest=b"d" * 16, received_ms=1, body=b"{}")


def _indexed(path: Path) -> set[tuple[int, int]]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return set(db.execute("SELECT id_hash, seq FROM known"))


async def test_an_id_is_known_on_its_whole_way_to_the_index(outbox: Path) -> None:
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        for number in range(40):
            assert await writer.append([_event(f"id{number}")]) == [Appended.STORED]
            again = [_event(f"id{n}") for n in range(number + 1)]
            assert set(await writer.append(again)) == {Appended.REPLAYED}

    assert 24 <= len(_indexed(outbox)) <= 40


async def test_an_id_is_known_after_a_restart_at_any_moment_of_the_merge(outbox: Path) -> None:
    for number in range(40):
        async with open_writer(outbox, POLICY, SystemClock()) as writer:
            assert await writer.append([_event(f"id{number}")]) == [Appended.STORED]
            again = [_event(f"id{n}") for n in range(number + 1)]
            assert set(await writer.append(again)) == {Appended.REPLAYED}


async def test_what_is_forgotten_leaves_no_entry_behind(outbox: Path) -> None:
    async with open_writer(outbox, FORGETFUL, SystemClock()) as writer:
        for number in range(40):
            await writer.append([_event(f"id{number}")])
            if number >= 5:
                await writer.settle(Ack(number - 4))
        for seq in range(36, 41):
            await writer.settle(Ack(seq))
        for number in range(40, 80):  # whatever was under way to the index arrives there
            await writer.append([_event(f"id{number}")])

    assert {seq for _, seq in _indexed(outbox)} <= set(range(41, 81))


async def test_a_requeued_event_is_found_by_its_new_seq(outbox: Path) -> None:
    async with (
        open_writer(outbox, POLICY, SystemClock()) as writer,
        open_own_reader(outbox) as reader,
    ):
        await writer.append([_event(f"id{number}") for number in range(20)])
        await writer.append([_event("more")])
        await writer.settle(Bury(seq=3, reason="rejected", status=400, answer=""))
        await writer.perform(lambda store: letters.requeue(store, [3], now_ms=5))
        assert await writer.append([_event("id2")]) == [Appended.REPLAYED]

        receipt = await reader.receipt("id2")
        assert receipt is not None
        assert (receipt.seq, receipt.state) == (22, "pending")
        assert (id_hash("id2"), 3) not in _indexed(outbox)


async def test_ids_of_the_same_hash_are_told_apart(
    outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "id_hash", lambda _: 7)
    monkeypatch.setattr("agent.outbox.search.id_hash", lambda _: 7)
    async with (
        open_writer(outbox, POLICY, SystemClock()) as writer,
        open_own_reader(outbox) as reader,
    ):
        for number in range(30):
            assert await writer.append([_event(f"id{number}")]) == [Appended.STORED]
        assert await writer.append([_event("id1")]) == [Appended.REPLAYED]
        found = await reader.select("pending", Selection(message_ids=("id1", "id29")), limit=9)
        assert [receipt.message_id for receipt in found] == ["id1", "id29"]


async def test_ids_of_the_same_hash_are_told_apart_in_one_call_and_after_a_restart(
    outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One in three has a hash of its own, as all others have but for once in centuries.
    monkeypatch.setattr(ids, "id_hash", lambda name: int(name) if int(name) % 3 == 0 else 7)
    names = [_event(str(number)) for number in range(30)]
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        assert await writer.append(names[:12]) == [Appended.STORED] * 12
        assert await writer.append(names[4:20]) == [Appended.REPLAYED] * 8 + [Appended.STORED] * 8
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        assert await writer.append(names) == [Appended.REPLAYED] * 20 + [Appended.STORED] * 10
        for event in names:
            assert await writer.append([event]) == [Appended.REPLAYED]


async def test_an_id_is_known_after_a_restart_though_those_of_its_hash_came_and_went(
    outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "id_hash", lambda _: 7)
    async with open_writer(outbox, FORGETFUL, SystemClock()) as writer:
        await writer.append([_event("first"), _event("second")])
        await writer.settle(Ack(1))
        await writer.append([_event("third")])
    async with open_writer(outbox, FORGETFUL, SystemClock()) as writer:
        assert await writer.append([_event("second")]) == [Appended.REPLAYED]
        assert await writer.append([_event("third")]) == [Appended.REPLAYED]


async def test_a_rolled_back_event_is_not_known(outbox: Path) -> None:
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        await writer.perform(lambda store: store.fetch("PRAGMA max_page_count = 40"))
        with pytest.raises(Exception, match="no space"):
            await writer.append(
                [
                    Event(
                        message_id="big",
                        kind="track",
                        lane=1,
                        digest=b"d" * 16,
                        received_ms=1,
                        body=bytes(500_000),
                    )
                ]
            )
        assert await writer.append([_event("big")]) == [Appended.STORED]


@pytest.mark.parametrize("bound", ["", "MOST_ROWS", "MOST_BYTES"])
async def test_what_is_known_is_found_among_many_that_are_new(
    outbox: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    if bound:  # so that it takes several statements
        monkeypatch.setattr(f"agent.outbox.procedures.{bound}", 4)
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        await writer.append([_event(f"id{number}") for number in range(0, 30, 3)])
        for number in range(100, 110):  # so that those go into the index
            await writer.append([_event(f"id{number}")])
        answers = await writer.append([_event(f"id{number}") for number in range(30)])

    known = [Appended.REPLAYED, Appended.STORED, Appended.STORED]
    assert answers == known * 10
    with contextlib.closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True)) as db:
        assert db.execute("SELECT accepted, pending, duplicates FROM ledger").fetchall() == [
            (40, 40, 10)
        ]
        assert db.execute("SELECT COUNT(*), COUNT(DISTINCT message_id) FROM event").fetchall() == [
            (40, 40)
        ]


def test_an_append_has_few_large_events_or_one_of_any_size() -> None:
    def sized(body_bytes: int) -> Keyed:
        return 1, msgspec.structs.replace(_event("id"), body=bytes(body_bytes))

    small, large, huge = sized(100), sized(MOST_BYTES // 2), sized(2 * MOST_BYTES)

    parts = part([large, large, small, huge, huge, *[small] * (MOST_ROWS + 1)])

    assert [len(events) for events in parts] == [2, 1, 1, 1, MOST_ROWS, 1]


async def test_large_transactions_leave_no_more_in_memory_than_small_ones(outbox: Path) -> None:
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        for group in range(20):
            await writer.append([_event(f"id{group}.{n}") for n in range(20)])

        assert len(_indexed(outbox)) >= 20 * 20 - 3 * 20


def test_nothing_is_kept_of_what_is_forgotten_while_others_are_on_their_way_to_the_index(
    outbox: Path,
) -> None:
    with contextlib.closing(sqlite3.connect(outbox, isolation_level=None)) as db:
        db.create_function("id_hash", 1, id_hash)
        schema.migrate(db, 0)
        store = Store(db)

        def commit() -> None:
            db.commit()
            store.committed()

        def held() -> int:
            return sum(len(kept) for kept in vars(store.ids).values() if isinstance(kept, Sized))

        store.append([_event(f"id{number}") for number in range(500)])
        commit()
        while store.ids.due:
            store.begin()
            store.ids.merge()
            store.ids.committed()
        store.append([_event(f"new{number}") for number in range(20)])
        commit()
        store.append([_event("last")])
        commit()
        before = held()
        store.settle(map(Ack, range(1, 501)), now_ms=5, remember=False)
        commit()

        assert held() == before


def test_nothing_of_a_call_that_fails_is_stored_though_the_index_knows_a_part_of_it(
    outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(sqlite3.connect(outbox, isolation_level=None)) as db:
        db.create_function("id_hash", 1, id_hash)
        schema.migrate(db, 0)
        store = Store(db)
        for number in range(30):  # the first of them are in the index alone, then
            store.append([_event(f"id{number}")])
            db.commit()
            store.committed()
        while store.ids.due:
            store.ids.merge()
            store.ids.committed()
        monkeypatch.setattr(
            "agent.outbox.store._COUNT_DUPLICATES", "SELECT :duplicates, :conflicts, no"
        )
        with pytest.raises(sqlite3.OperationalError, match="no such column"):
            store.append([_event("id0"), _event("new")])
        db.rollback()
        store.rolled_back()

        monkeypatch.undo()
        assert store.fetch("SELECT accepted, pending FROM ledger") == [(30, 30)]
        assert store.append([_event("new")]) == [Appended.STORED]
