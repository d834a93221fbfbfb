"""A damaged database, from being met to being read back, while the agent runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.clock import SystemClock
from agent.event import Event
from agent.outbox import aside
from agent.outbox.access import open_own_reader
from agent.outbox.files import lock_of
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Appended, Policy
from agent.outbox.rescue import salvage_damaged
from agent.outbox.writer import Writer, open_writer

POLICY = Policy(max_bytes=1 << 30, evicts=False, remember=True)

LIMIT_S = 30.0
PAGE_BYTES = 2048


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[tuple[Writer, Reader]]:
    async with (
        asyncio.timeout(LIMIT_S),
        open_writer(path, POLICY, SystemClock()) as writer,
        open_own_reader(path, on_damage=writer.suspect) as reader,
        asyncio.TaskGroup() as tasks,
    ):
        salvaging = tasks.create_task(salvage_damaged(writer))
        yield writer, reader
        salvaging.cancel()


def event(name: str) -> Event:
    body = b'{"messageId":"%s","event":"e","userId":"u"}' % name.encode()
    return Event(
        message_id=name,
        kind="track",
        lane=1,
        digest=name.encode().ljust(16),
        received_ms=1,
        body=body,
    )


async def until_salvaged(writer: Writer) -> None:
    while writer.fault is not None or writer.rescuing:  # noqa: ASYNC110  # what another task does
        await asyncio.sleep(0.01)


async def damaged(writer: Writer) -> None:
    writer.suspect("as a test has it")
    await asyncio.sleep(0)
    while writer.fault is None:  # noqa: ASYNC110  # what another task does
        await asyncio.sleep(0)
    await until_salvaged(writer)


async def states(path: Path, reader: Reader) -> dict[str, str]:
    await reader.ledger()
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return dict(db.execute("SELECT message_id, state FROM event ORDER BY seq"))


def pages_of(path: Path) -> tuple[int, int]:
    """Return how many pages there are, and at which all reading of what is pending begins."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        ((count,),) = db.execute("PRAGMA page_count")
        ((root,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'pending'")
    return count, root


def spoil(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE_BYTES)
        file.write(bytes([0xFF]) * PAGE_BYTES)


async def test_all_comes_back_from_a_database_that_only_seemed_damaged(outbox: Path) -> None:
    async with opened(outbox) as (writer, reader):
        await writer.append([event(name) for name in "abc"])
        await writer.settle(Ack(1))
        await damaged(writer)
        await writer.append([event("d")])

        assert await states(outbox, reader) == {
            "a": "delivered",
            "b": "pending",
            "c": "pending",
            "d": "pending",
        }
        ledger = await reader.ledger()
        assert (ledger.accepted, ledger.delivered, ledger.pending) == (4, 1, 3)
        assert [head.message_id for head in (await reader.scan(after=0, limit=9)).heads] == [
            "b",
            "c",
            "d",
        ]


async def test_what_was_salvaged_is_said_with_how_much_was_damaged(outbox: Path) -> None:
    async with opened(outbox) as (writer, _):
        await writer.append([event(f"m{i}") for i in range(100)])
    pages, root = pages_of(outbox)
    spoil(outbox, root)
    with capture_logs() as logs:
        async with opened(outbox) as (writer, _):
            await until_salvaged(writer)

    (line,) = [line for line in logs if line["event"] == "outbox.salvaged"]
    assert (line["pages"], line["pages_damaged"]) == (pages, 1)
    assert line["pending"] + line["lost"] == 100


async def test_the_log_of_a_killed_agent_is_looked_through_beside_the_event_loop(
    outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = outbox.with_name("killed.db")
    async with opened(outbox) as (writer, _):
        await writer.append([event("a")])
        for suffix in ("", "-wal"):
            shutil.copy(outbox.with_name(f"outbox.db{suffix}"), f"{killed}{suffix}")
    readers: list[threading.Thread] = []
    plain_open = os.open

    def open_and_note(path: Any, *how: Any, **where: Any) -> int:
        if str(path) == f"{killed}-wal":
            readers.append(threading.current_thread())
        return plain_open(path, *how, **where)

    monkeypatch.setattr(os, "open", open_and_note)
    async with opened(killed) as (_, reader):
        assert (await reader.ledger()).pending == 1
    assert readers
    assert threading.main_thread() not in readers


async def test_damage_that_is_met_when_reopening_holds_delivery_before_anything_is_moved(
    outbox: Path,
) -> None:
    async with opened(outbox) as (writer, _):
        await writer.append([event(f"m{i}") for i in range(100)])
    _, root = pages_of(outbox)
    async with opened(outbox) as (writer, _):
        spoil(outbox, root)
        writer._break("as a test has it")
        while not aside.count_sets(outbox):  # noqa: ASYNC110  # the writer tells nobody
            await asyncio.sleep(0)
        assert writer.rescuing
        await until_salvaged(writer)


async def test_what_was_delivered_since_is_not_brought_back_by_a_second_damage(
    outbox: Path,
) -> None:
    async with opened(outbox) as (writer, reader):
        await writer.append([event(name) for name in "abc"])
        await damaged(writer)
        for head in (await reader.scan(after=0, limit=9)).heads:
            await writer.settle(Ack(head.seq))
        await asyncio.sleep(0.002)  # the sets are named by the millisecond
        await damaged(writer)

        assert set((await states(outbox, reader)).values()) == {"delivered"}
        assert (await reader.ledger()).pending == 0


async def test_an_ack_of_the_moment_of_the_damage_counts(outbox: Path) -> None:
    async with opened(outbox) as (writer, reader):
        await writer.append([event(name) for name in "abc"])
        writer.suspect("as a test has it")
        while writer.fault is None:  # noqa: ASYNC110  # what another task does
            await asyncio.sleep(0)
        acks = [writer.settle(Ack(seq)) for seq in (1, 2, 3)]
        await until_salvaged(writer)
        await asyncio.gather(*acks)

        ledger = await reader.ledger()
        assert (ledger.delivered, ledger.pending) == (3, 0)


async def test_an_event_sent_again_before_it_is_known_as_delivered_is_not_pending(
    outbox: Path,
) -> None:
    async with opened(outbox) as (writer, _):
        await writer.append([event("a")])
        await writer.settle(Ack(1))
    name = aside.set_aside(outbox, 5)
    assert name.endswith(".damaged-5")
    async with open_writer(outbox, POLICY, SystemClock()) as writer:
        assert writer.rescuing
        assert await writer.append([event("a")]) == [Appended.STORED]
    async with opened(outbox) as (writer, reader):
        await until_salvaged(writer)

        assert await states(outbox, reader) == {"a": "delivered"}
        assert (await reader.ledger()).delivered == 1


@pytest.mark.parametrize("moved", [(), ("-wal",), ("-wal", "")])
async def test_a_move_that_was_cut_off_is_finished_and_read_back(
    outbox: Path, moved: tuple[str, ...]
) -> None:
    async with opened(outbox) as (writer, _):
        await writer.append([event(name) for name in "abc"])
    outbox.with_name("outbox.db-wal").touch()
    outbox.with_name("outbox.db.damaged-7.moving").touch()
    for suffix in moved:
        outbox.with_name(f"outbox.db{suffix}").rename(
            outbox.with_name(f"outbox.db.damaged-7{suffix}")
        )
    for _ in range(2):
        async with opened(outbox) as (writer, reader):
            await until_salvaged(writer)
            assert (await reader.ledger()).pending == 3
    async with opened(outbox) as (writer, reader):
        assert await writer.append([event("d")]) == [Appended.STORED]
        order = [head.message_id for head in (await reader.scan(after=0, limit=9)).heads]
        assert order == ["a", "b", "c", "d"]


async def test_a_log_whose_database_a_person_deleted_is_no_damaged_database(outbox: Path) -> None:
    async with opened(outbox) as (writer, _):
        await writer.append([event("a")])
    outbox.with_name("outbox.db.damaged-7-wal").touch()
    outbox.with_name("outbox.db.damaged-7.gz").touch()
    async with opened(outbox) as (writer, reader):
        assert not writer.rescuing
        assert (await reader.ledger()).pending == 1


async def test_rows_that_contradict_each_other_are_damage(outbox: Path) -> None:
    async with opened(outbox) as (writer, reader):
        await writer.append([event("a")])
        await writer.perform(lambda store: store.fetch("UPDATE event SET seq = 3 WHERE seq = 1"))
        for name in ("b", "c", "d", "e"):  # the third seq is taken
            with contextlib.suppress(Exception):
                await writer.append([event(name)])
            await until_salvaged(writer)
        for name in ("b", "c", "d", "e"):
            await writer.append([event(name)])

        assert {"b", "c", "d", "e"} <= set(await states(outbox, reader))


async def test_a_verb_that_trips_over_a_value_does_not_end_the_writer(outbox: Path) -> None:
    async with opened(outbox) as (writer, reader):
        await writer.append([event("a")])
        with pytest.raises(Exception, match="AttributeError"):
            await writer.perform(lambda _: b"bytes".encode())  # type: ignore[attr-defined]
        await until_salvaged(writer)

        assert await writer.append([event("b")]) == [Appended.STORED]
        assert (await reader.ledger()).pending == 2


async def test_a_fault_keeps_the_locks_that_others_respect(outbox: Path) -> None:
    async with opened(outbox) as (writer, reader):
        await writer.append([event("a")])
        await reader.ledger()
        writer._break("as a test has it")
        await until_salvaged(writer)
        with contextlib.closing(sqlite3.connect(outbox)) as visitor:
            visitor.execute("SELECT COUNT(*) FROM event").fetchall()
        log = outbox.with_name("outbox.db-wal")

        assert log.exists(), "a visitor took itself for the last connection"
        await writer.append([event("b")])
        assert log.stat().st_size


async def test_a_damaged_outbox_without_events_is_known_by_its_header(outbox: Path) -> None:
    async with opened(outbox):
        pass
    lock_of(outbox).unlink()  # as a power cut may, soon after the first start
    with outbox.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(PAGE_BYTES)
        file.write(b"\xff" * (size - PAGE_BYTES))

    async with opened(outbox) as (writer, _):
        assert await writer.append([event("first")]) == [Appended.STORED]
    assert len(list(outbox.parent.glob("outbox.db.damaged-*.salvaged"))) <= 1
