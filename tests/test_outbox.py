"""The durable queue: commits, quota, faults of the disk, and those who read beside the writer.

The disk fails for real here: by a limit on the size of files, by a limit on the pages of the
database, and, where this may mount one, on a filesystem of a few megabytes. An fsync that fails, and
what a power cut leaves of writes that were not synced, are out of reach of such means.
"""

import asyncio
import contextlib
import errno
import hashlib
import itertools
import os
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from outboxes import used_bytes

from agent.clock import SystemClock
from agent.console import dead_letters
from agent.errors import (
    OutboxError,
    OutboxFullError,
    OutboxOverloadedError,
    OutboxUnavailableError,
)
from agent.event import Event
from agent.outbox import letters, schema
from agent.outbox.access import open_own_reader, open_reader
from agent.outbox.intake import QUEUE_BYTES, QUEUE_EVENTS
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, Appended, Bury, Ledger, Policy, Selection
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer

ROOT = Path(__file__).parent.parent
LIMIT_S = 10.0
"""Far more than anything here takes: what is not there by then never comes."""

UNSETTLED = 256
"""Settlements that the forwarder lets wait at once."""

SPACIOUS = Policy(max_bytes=1 << 30, evicts=False, remember=True)


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def _event(name: str, *, size: int = 40, body: bytes | None = None) -> Event:
    body = name.ljust(size, ".").encode() if body is None else body
    return Event(
        message_id=name,
        kind="track",
        lane=1,
        digest=hashlib.blake2b(body, digest_size=16).digest(),
        received_ms=1_800_000_000_000,
        body=body,
    )


@asynccontextmanager
async def _opened(path: Path, policy: Policy = SPACIOUS) -> AsyncIterator[tuple[Writer, Reader]]:
    async with (
        asyncio.timeout(2 * LIMIT_S),
        open_writer(path, policy, SystemClock()) as writer,
        open_own_reader(path) as reader,
    ):
        yield writer, reader


async def _ledger(path: Path) -> Ledger:
    async with open_reader(path) as reader:
        return await reader.ledger()


def _requeue_nothing(store: Store) -> Any:
    return letters.requeue(store, [], now_ms=0)


def _content(path: Path) -> bytes:
    return path.read_bytes()


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _bytes(path: Path) -> int:
    return path.stat().st_size


def _trouble(writer: Writer) -> list[str | None]:
    return [writer.fault, writer.full]


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _copy(path: Path, into: Path) -> Path:
    """Copy database and log as they stand now, as a kill -9 leaves them."""
    into.mkdir()
    for file in (path, _log_of(path)):
        shutil.copy(file, into)
    return into / path.name


def _ids_in(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {message_id for (message_id,) in db.execute("SELECT message_id FROM event")}


# --- durable, in shared transactions ------------------------------------------------------------


async def test_appends_that_wait_together_share_one_transaction(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        async with _busy(writer):
            before = writer.commits
            calls = [writer.append([_event(f"id{i}")]) for i in range(200)]

        assert [await call for call in calls] == [[Appended.STORED]] * 200
        assert writer.commits - before == 2  # what kept it busy, and they
        heads = (await reader.scan(after=0, limit=1000)).heads
        assert [head.message_id for head in heads] == [f"id{i}" for i in range(200)]


async def test_settlements_ride_along_with_appends(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        await writer.append([_event("a"), _event("b")])
        async with _busy(writer):
            before = writer.commits
            acks = [writer.settle(Ack(seq)) for seq in (1, 2)]
            stored = writer.append([_event("c")])
        await stored

        assert [ack.done() for ack in acks] == [True, True]
        assert writer.commits - before == 2  # what kept it busy, and they
        assert (await reader.ledger()).delivered == 2


async def test_an_append_is_in_the_files_when_it_is_answered(outbox: Path, tmp_path: Path) -> None:
    async with _opened(outbox) as (writer, _):
        for i in range(50):
            await writer.append([_event(f"id{i}")])
            copy = _copy(outbox, tmp_path / str(i))  # in the same turn of the loop
            assert _ids_in(copy) == {f"id{j}" for j in range(i + 1)}


async def test_a_settlement_is_in_the_files_when_it_is_answered(
    outbox: Path, tmp_path: Path
) -> None:
    async with _opened(outbox) as (writer, _):
        await writer.append([_event(f"id{i}") for i in range(50)])
        for i in range(50):
            await writer.settle(Ack(i + 1))
            copy = _copy(outbox, tmp_path / str(i))
            with contextlib.closing(sqlite3.connect(copy)) as db:
                assert db.execute("SELECT delivered FROM ledger").fetchone() == (i + 1,)


async def test_another_connection_sees_an_append_when_it_is_answered(outbox: Path) -> None:
    async with _opened(outbox) as (writer, _):
        with contextlib.closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True)) as db:
            for i in range(50):
                await writer.append([_event(f"id{i}")])
                assert db.execute("SELECT COUNT(*) FROM pending").fetchone() == (i + 1,)


APPENDING = """
import asyncio, itertools, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_outbox import SPACIOUS, _event
from agent.clock import SystemClock
from agent.outbox.writer import open_writer

async def main():
    async with open_writer(Path(sys.argv[1]), SPACIOUS, SystemClock()) as writer:
        async def app(name):
            for i in itertools.count() if len(sys.argv) == 3 else range(int(sys.argv[3])):
                await writer.append([_event(f"{name}{i}", size=2000)])
                os.write(1, f"{name}{i}\\n".encode())
        async with asyncio.TaskGroup() as tasks:
            for name in "abc":
                tasks.create_task(app(name))

asyncio.run(main())
"""


def _appending(outbox: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", APPENDING, str(outbox), str(Path(__file__).parent), *more]


def _killed_after(answers: int, outbox: Path) -> set[str]:
    """Append in a process, kill it after so many *answers*; return the ids it answered."""
    with subprocess.Popen(_appending(outbox), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            heard = [process.stdout.readline() for _ in range(answers)]
        finally:
            process.kill()
        heard += process.stdout.readlines()
    return {line.decode().strip() for line in heard if line.endswith(b"\n")}


@pytest.mark.parametrize("answers", [1, 50, 400])
async def test_what_was_answered_before_a_kill_9_is_there_after_it(
    outbox: Path, answers: int
) -> None:
    answered = _killed_after(answers, outbox)
    assert len(answered) >= answers

    async with _opened(outbox) as (_, reader):
        pending = {head.message_id for head in (await reader.scan(after=0, limit=100_000)).heads}
        assert answered <= pending
        assert len(pending - answered) <= 3
        assert (await reader.ledger()).accepted == len(pending)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_log_is_synced_before_an_append_is_answered(outbox: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write", "-o", str(trace)]
    traced = subprocess.run(
        [*calls, *_appending(outbox, "5")], cwd=ROOT, capture_output=True, check=False, timeout=60
    )
    if b"ptrace" in traced.stderr.lower():
        pytest.skip("may not trace a process here")
    assert traced.returncode == 0, traced.stderr

    log_sync = re.compile(r"^(\d+) +f(?:data)?sync\(\d+<[^>]*-wal>(.*)$")
    resumed = re.compile(r"^(\d+) +<\.\.\. f(?:data)?sync resumed>.*= 0$")
    syncs: list[int] = []
    under_way: set[str] = set()
    answers: list[int] = []
    for number, line in enumerate(trace.read_text().splitlines()):
        if begun := log_sync.match(line):
            if begun[2].endswith("= 0"):
                syncs.append(number)
            else:
                under_way.add(begun[1])
        elif (ended := resumed.match(line)) and ended[1] in under_way:
            under_way.discard(ended[1])
            syncs.append(number)
        elif re.search(r"write\(1<.*\"[abc]\d+\\n\"", line):
            answers.append(number)
    # Up to three answers share one sync: between any four there must be another.
    assert len(answers) == 15
    for first, fourth in zip([0, *answers], answers[2:], strict=False):
        assert any(first < sync < fourth for sync in syncs)


async def test_the_write_connection_syncs_every_commit_and_can_give_pages_back(
    outbox: Path,
) -> None:
    async def pragma(name: str) -> Any:
        ((value,),) = await writer.perform(lambda store: store.fetch(f"PRAGMA {name}"))
        return value

    for _ in ("made", "found"):
        async with _opened(outbox) as (writer, _):
            assert await pragma("journal_mode") == "wal"
            assert await pragma("synchronous") == 2  # FULL
            assert await pragma("auto_vacuum") == 2  # INCREMENTAL


# --- what an id means ---------------------------------------------------------------------------


async def test_the_first_body_wins(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        first, other = _event("id", body=b"first"), _event("id", body=b"other")
        assert await writer.append([first]) == [Appended.STORED]
        assert await writer.append([first, other, first]) == [
            Appended.REPLAYED,
            Appended.CONFLICTING,
            Appended.REPLAYED,
        ]

        assert await reader.body(1) == b"first"
        ledger = await reader.ledger()
        assert (ledger.accepted, ledger.duplicates, ledger.conflicts) == (1, 3, 1)


async def test_an_id_twice_in_one_call_is_stored_once(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        answers = await writer.append([_event("id"), _event("other"), _event("id")])

        assert answers == [Appended.STORED, Appended.STORED, Appended.REPLAYED]
        assert (await reader.ledger()).pending == 2


async def test_a_seq_is_not_given_again_when_its_event_is_gone(outbox: Path) -> None:
    forgets = Policy(max_bytes=1 << 30, evicts=False, remember=False)
    seqs = []
    for name in ("a", "b", "c"):
        async with _opened(outbox, forgets) as (writer, reader):
            await writer.append([_event(name)])
            (head,) = (await reader.scan(after=0, limit=10)).heads
            seqs.append(head.seq)
            await writer.settle(Ack(head.seq))

    assert seqs == sorted(set(seqs))


async def test_an_event_settled_after_it_was_evicted_is_passed_over(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        await writer.append([_event("a"), _event("b")])
        await writer.perform(lambda store: store.evict(1, limit=1))
        await writer.settle(Ack(1))
        await writer.settle(Bury(seq=1, reason="rejected", status=400, answer=""))

        ledger = await reader.ledger()
        assert (ledger.delivered, ledger.pending, ledger.dead) == (0, 1, 0)
        assert (ledger.discarded, ledger.evicted) == (1, 1)


async def test_a_person_requeues_and_discards_more_dead_letters_than_fit_one_transaction(
    outbox: Path,
) -> None:
    async with _opened(outbox) as (writer, reader):
        await writer.append([_event(f"id{i}") for i in range(1100)])
        for buried in [
            writer.settle(Bury(seq=seq, reason="rejected", status=400, answer="no"))
            for seq in range(1, 1101)
        ]:
            await buried
        some = Selection(message_ids=tuple(f"id{i}" for i in range(501)))
        assert await dead_letters.requeue(reader, writer, some, now_ms=1) == 501
        assert await dead_letters.discard(reader, writer, Selection(reason="rejected")) == 599

        heads = (await reader.scan(after=0, limit=2000)).heads
        assert [head.message_id for head in heads] == [f"id{i}" for i in range(501)]
        ledger = await reader.ledger()
        assert (ledger.pending, ledger.dead, ledger.discarded) == (501, 0, 599)
        assert ledger.evicted == 0


async def _fill(writer: Writer, *, size: int = 3000) -> int:
    """Append until the outbox or the disk is full; return how many events were stored."""
    for stored in range(100_000):
        try:
            await writer.append([_event(f"id{stored}", size=size)])
        except OutboxFullError:
            return stored
    raise AssertionError("it never filled")


# --- bounded ------------------------------------------------------------------------------------


async def test_a_full_quota_refuses_with_its_numbers_until_there_is_room(outbox: Path) -> None:
    quota = 256 * 1024
    async with _opened(outbox, Policy(max_bytes=quota, evicts=False, remember=True)) as (
        writer,
        reader,
    ):
        stored = await _fill(writer, size=4000)
        assert 30 < stored < 60
        assert await used_bytes(writer) <= quota
        with pytest.raises(OutboxFullError) as refusal:
            await writer.append([_event("refused", size=4000)])
        assert f"holds {await used_bytes(writer)} of {quota} bytes" in str(refusal.value)
        assert writer.full == str(refusal.value)
        assert (await reader.ledger()).pending == stored

        for seq in range(1, 11):
            await writer.settle(Ack(seq))
        assert await writer.append([_event("again", size=4000)]) == [Appended.STORED]
        assert _trouble(writer) == [None, None]
        assert (await reader.ledger()).discarded == 0


async def test_a_smaller_quota_holds_for_the_next_event(outbox: Path) -> None:
    roomy = Policy(max_bytes=1 << 30, evicts=False, remember=True)
    async with _opened(outbox, roomy) as (writer, _):
        await writer.append([_event("first", size=200_000)])
        writer.adopt(replace(roomy, max_bytes=256 * 1024))
        with pytest.raises(OutboxFullError):
            await writer.append([_event("second", size=200_000)])


async def test_a_smaller_quota_holds_although_it_comes_while_the_room_is_measured(
    outbox: Path,
) -> None:
    roomy = Policy(max_bytes=1 << 30, evicts=False, remember=True)

    def adopt_meanwhile(sql: str) -> None:
        if "pragma_page_count" in sql:
            writer.adopt(replace(roomy, max_bytes=256 * 1024))

    async with _opened(outbox, roomy) as (writer, _):
        await writer.perform(lambda store: store._db.set_trace_callback(adopt_meanwhile))
        await writer.append([_event("first", size=200_000)])
        with pytest.raises(OutboxFullError):
            await writer.append([_event("second", size=200_000)])


async def test_what_a_verb_takes_counts_at_once(outbox: Path) -> None:
    quota = 1024 * 1024
    async with _opened(outbox, Policy(max_bytes=quota, evicts=False, remember=True)) as (
        writer,
        _,
    ):
        await writer.append([_event("first")])
        await writer.perform(
            lambda store: store.fetch("CREATE TABLE other AS SELECT zeroblob(900000)")
        )
        with pytest.raises(OutboxFullError):
            await writer.append([_event("second", size=200_000)])


async def test_a_full_quota_refuses_only_what_does_not_fit(outbox: Path) -> None:
    async with _opened(outbox, Policy(max_bytes=256 * 1024, evicts=False, remember=True)) as (
        writer,
        reader,
    ):
        large, small = _event("large", size=300_000), _event("small")
        results = await asyncio.wait_for(_gathered(writer, [[small], [large]]), LIMIT_S)

        assert results[0] == [Appended.STORED]
        assert isinstance(results[1], OutboxFullError)
        assert (await reader.ledger()).accepted == 1


async def test_a_replay_is_answered_while_the_quota_is_full(outbox: Path) -> None:
    async with _opened(outbox, Policy(max_bytes=256 * 1024, evicts=False, remember=True)) as (
        writer,
        reader,
    ):
        stored = await _fill(writer, size=4000)
        assert await writer.append([_event("id0", size=4000)]) == [Appended.REPLAYED]
        with pytest.raises(OutboxFullError):
            await writer.append([_event("id0", size=4000), _event("new", size=4000)])

        ledger = await reader.ledger()
        assert (ledger.accepted, ledger.duplicates) == (stored, 1)


async def _gathered(writer: Writer, calls: list[list[Event]]) -> list[list[Appended] | OutboxError]:
    async def one(events: list[Event]) -> list[Appended] | OutboxError:
        try:
            return await writer.append(events)
        except OutboxError as exc:
            return exc

    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(one(events)) for events in calls]
    return [task.result() for task in started]


async def test_drop_oldest_keeps_the_newest_and_counts_what_it_dropped(outbox: Path) -> None:
    quota = 256 * 1024
    async with _opened(outbox, Policy(max_bytes=quota, evicts=True, remember=True)) as (
        writer,
        reader,
    ):
        for i in range(300):
            assert await writer.append([_event(f"id{i}", size=4000)]) == [Appended.STORED]
            assert await used_bytes(writer) <= quota

        heads = (await reader.scan(after=0, limit=1000)).heads
        kept = len(heads)
        assert 30 < kept < 60
        assert [head.message_id for head in heads] == [f"id{i}" for i in range(300 - kept, 300)]
        ledger = await reader.ledger()
        assert (ledger.accepted, ledger.pending, ledger.evicted) == (300, kept, 300 - kept)
        assert ledger.discarded == ledger.evicted
        assert _bytes(outbox) <= quota + 8 * 4096


async def test_drop_oldest_does_not_drop_what_was_delivered(outbox: Path) -> None:
    async with _opened(outbox, Policy(max_bytes=256 * 1024, evicts=True, remember=True)) as (
        writer,
        reader,
    ):
        stored = 0
        while await used_bytes(writer) < 240 * 1024:
            await writer.append([_event(f"id{stored}", size=4000)])
            stored += 1
        for seq in range(1, stored + 1):
            writer.settle(Ack(seq))
        await writer.append([_event("next", size=20_000)])

        ledger = await reader.ledger()
        assert (ledger.delivered, ledger.pending, ledger.evicted) == (stored, 1, 0)


async def test_an_event_that_can_never_fit_is_refused_and_drops_nothing(outbox: Path) -> None:
    quota = 256 * 1024
    async with _opened(outbox, Policy(max_bytes=quota, evicts=True, remember=True)) as (
        writer,
        reader,
    ):
        await writer.append([_event("kept")])
        with pytest.raises(OutboxFullError):
            await writer.append([_event("too large", size=2 * quota)])

        assert (await reader.ledger()).evicted == 0
        assert await used_bytes(writer) <= quota


@asynccontextmanager
async def _busy(writer: Writer) -> AsyncIterator[None]:
    """Keep the writer in a transaction while the block runs."""
    loop = asyncio.get_running_loop()
    entered, leave = asyncio.Event(), threading.Event()

    def wait(_: Store) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(LIMIT_S)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(writer.perform(wait))
        await entered.wait()
        try:
            yield
        finally:
            leave.set()


async def test_more_events_than_may_wait_are_refused_and_a_moment_later_fit(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        async with _busy(writer):
            waiting = writer.append([_event(f"id{i}") for i in range(QUEUE_EVENTS)])
            with pytest.raises(OutboxOverloadedError, match=f"{QUEUE_EVENTS} events wait"):
                await writer.append([_event("one more")])
        await waiting

        assert await writer.append([_event("one more")]) == [Appended.STORED]
        assert (await reader.ledger()).accepted == QUEUE_EVENTS + 1


async def test_more_bytes_than_may_wait_are_refused(outbox: Path) -> None:
    large = bytes(QUEUE_BYTES // 2)
    async with _opened(outbox) as (writer, reader):
        async with _busy(writer):
            waiting = [writer.append([_event(name, body=large)]) for name in "ab"]
            with pytest.raises(OutboxOverloadedError, match="send again shortly"):
                await writer.append([_event("c")])
        for call in waiting:
            await call

        assert (await reader.ledger()).accepted == 2


# --- a full disk --------------------------------------------------------------------------------


async def _ack(writer: Writer, first: int, last: int) -> None:
    """Settle as the forwarder does, so many at a time."""
    for start in range(first, last + 1, UNSETTLED):
        upto = min(start + UNSETTLED, last + 1)
        acks = [writer.settle(Ack(seq)) for seq in range(start, upto)]
        _, late = await asyncio.wait(acks, timeout=LIMIT_S / 2)
        assert not late, f"{len(late)} of {len(acks)} acks wait for room that they would make"


async def _allow_pages(writer: Writer, pages: int) -> None:
    """Let the database be full at *pages* pages, as a disk with no more than that makes it."""
    await writer.perform(lambda store: store.fetch(f"PRAGMA max_page_count = {pages}"))


async def test_a_full_disk_refuses_appends_and_takes_acks_which_make_room(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        await _allow_pages(writer, 100)
        stored = await _fill(writer)
        assert stored > 50
        with pytest.raises(OutboxFullError, match="no space left on the disk; free some"):
            await writer.append([_event("refused", size=50_000)])
        assert writer.full is not None

        await _ack(writer, 1, stored // 2)
        assert await writer.append([_event("again")]) == [Appended.STORED]
        assert _trouble(writer) == [None, None]
        ledger = await reader.ledger()
        assert (ledger.accepted, ledger.delivered) == (stored + 1, stored // 2)


async def test_an_event_refused_by_a_full_disk_is_not_there(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        await _allow_pages(writer, 100)
        stored = await _fill(writer)

        assert await reader.receipt(f"id{stored}") is None
        assert (await reader.ledger()).accepted == stored
        await _ack(writer, 1, stored)
        assert await writer.append([_event(f"id{stored}")]) == [Appended.STORED]


async def test_acks_get_through_however_many_apps_knock_at_a_full_disk(outbox: Path) -> None:
    async with _opened(outbox) as (writer, _):
        await _allow_pages(writer, 100)
        await _fill(writer)
        over = asyncio.Event()

        async def knock(number: int) -> None:
            with contextlib.suppress(OutboxFullError):
                await writer.append([_event(f"knock{number}", size=100_000)])

        async with asyncio.TaskGroup() as tasks:

            async def apps() -> None:
                for number in itertools.count():
                    if over.is_set():
                        return
                    tasks.create_task(knock(number))
                    await asyncio.sleep(0.001)  # apart: some come while others are refused

            tasks.create_task(apps())
            try:
                _, late = await asyncio.wait([writer.settle(Ack(1))], timeout=3)
                assert not late
            finally:
                over.set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with _disk(tmp_path / "disk", "8m") as folder:
        yield folder


@contextmanager
def _disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a filesystem of its own at *folder*."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a filesystem here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _occupy(disk: Path, *, leaving_bytes: int = 0) -> Path:
    """Take the room that is left, as another program's logs do."""
    filler = disk / f"filler{leaving_bytes}"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while shutil.disk_usage(disk).free > leaving_bytes:
            file.write(bytes(4096))
    return filler


async def test_acks_work_on_a_disk_without_a_byte_left(small_disk: Path) -> None:
    async with _opened(small_disk / "outbox.db") as (writer, reader):
        stored = await _fill(writer)
        _occupy(small_disk)
        await _ack(writer, 1, stored)

        assert (await reader.ledger()).delivered == stored
        assert await writer.append([_event("again")]) == [Appended.STORED]


@pytest.mark.parametrize("body_bytes", [60_000, 200_000, 1_500_000])
async def test_acks_of_large_events_work_on_a_disk_without_a_byte_left(
    tmp_path: Path, body_bytes: int
) -> None:
    with _disk(tmp_path / "disk", "64m") as disk:
        async with _opened(disk / "outbox.db") as (writer, reader):
            stored = await _fill(writer, size=body_bytes)
            _occupy(disk)
            await _ack(writer, 1, stored)

            assert (await reader.ledger()).delivered == stored


async def test_acks_work_after_a_kill_9_on_a_disk_without_a_byte_left(small_disk: Path) -> None:
    outbox = small_disk / "outbox.db"
    _filled_and_killed(outbox)
    _occupy(small_disk)
    async with _opened(outbox) as (writer, reader):
        _occupy(small_disk)
        heads = (await reader.scan(after=0, limit=UNSETTLED)).heads
        assert heads
        acks = [writer.settle(Ack(head.seq)) for head in heads]
        _, late = await asyncio.wait(acks, timeout=LIMIT_S / 2)
        assert not late


FILLING = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_outbox import SPACIOUS, _fill
from agent.clock import SystemClock
from agent.outbox.writer import open_writer

async def main():
    async with open_writer(Path(sys.argv[1]), SPACIOUS, SystemClock()) as writer:
        await _fill(writer)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def _filled_and_killed(outbox: Path) -> None:
    filling = [sys.executable, "-c", FILLING, str(outbox), str(Path(__file__).parent)]
    ended = subprocess.run(filling, cwd=ROOT, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL


async def test_acks_that_did_not_fit_are_written_when_there_is_room(small_disk: Path) -> None:
    async with _opened(small_disk / "outbox.db") as (writer, reader):
        stored = await _fill(writer)
        filler = _occupy(small_disk)
        acks = [writer.settle(Ack(seq)) for seq in range(1, stored + 1)]
        filler.unlink()
        await asyncio.wait(acks, timeout=LIMIT_S)

        assert (await reader.ledger()).delivered == stored
        assert await writer.append([_event("again")]) == [Appended.STORED]


async def test_appends_resume_by_themselves_once_another_program_frees_the_disk(
    small_disk: Path,
) -> None:
    async with _opened(small_disk / "outbox.db") as (writer, reader):
        await writer.append([_event(f"first{i}") for i in range(10)])
        filler = _occupy(small_disk)
        stored = await _fill(writer)
        with pytest.raises(OutboxFullError, match=re.escape(f"{small_disk}: no space left")):
            await writer.append([_event("refused", size=50_000)])
        filler.unlink()

        assert await writer.append([_event("again")]) == [Appended.STORED]
        assert _trouble(writer) == [None, None]
        await _ack(writer, 1, 10)
        ledger = await reader.ledger()
        assert (ledger.accepted, ledger.delivered) == (10 + stored + 1, 10)


async def test_the_writer_stops_when_told_to_on_a_disk_without_a_byte_left(
    small_disk: Path,
) -> None:
    path = small_disk / "outbox.db"
    async with _opened(path) as (writer, _):
        await writer.append([_event(f"id{i}", size=3000) for i in range(UNSETTLED)])
    _occupy(small_disk, leaving_bytes=48 * 1024)  # enough to open, not enough to write
    async with asyncio.timeout(LIMIT_S), open_writer(path, SPACIOUS, SystemClock()) as writer:
        acked = writer.settle(*map(Ack, range(1, UNSETTLED + 1)))
        done, _ = await asyncio.wait([acked], timeout=0.5)
        assert not done
    assert acked.cancelled()


async def test_what_was_stored_before_the_disk_was_full_is_there_at_the_next_start(
    small_disk: Path,
) -> None:
    path = small_disk / "outbox.db"
    async with _opened(path) as (writer, _):
        stored = await _fill(writer)
        filler = _occupy(small_disk)
    filler.unlink()

    async with _opened(path) as (_, reader):
        assert len((await reader.scan(after=0, limit=100_000)).heads) == stored


# --- a failing disk -----------------------------------------------------------------------------


@contextmanager
def _failing_writes(upto_bytes: int) -> Iterator[None]:
    """Let every write behind byte *upto_bytes* of a file fail, as a broken disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (upto_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_failed_write_is_not_acknowledged_and_the_writer_recovers_by_itself(
    outbox: Path,
) -> None:
    async with _opened(outbox) as (writer, reader):
        for i in range(10):
            await writer.append([_event(f"id{i}")])
        with _failing_writes(_bytes(_log_of(outbox))):
            with pytest.raises(OutboxUnavailableError, match=rf"{outbox}: .*IOERR"):
                await writer.append([_event("unknown")])
            assert writer.fault is not None
            with pytest.raises(OutboxUnavailableError):
                await writer.append([_event("refused")])
            with pytest.raises(OutboxUnavailableError):
                await writer.perform(_requeue_nothing)
            ack = writer.settle(Ack(1))
            assert not ack.done()
            assert not writer.backlogged
        await asyncio.wait_for(ack, LIMIT_S)

        assert _trouble(writer) == [None, None]
        assert await writer.append([_event("id9"), _event("after")]) == [
            Appended.REPLAYED,
            Appended.STORED,
        ]
        assert await reader.receipt("refused") is None
        ledger = await reader.ledger()
        assert ledger.delivered == 1
        assert ledger.accepted - ledger.pending == 1


async def test_who_sends_is_told_to_look_when_the_writer_has_recovered(outbox: Path) -> None:
    async with _opened(outbox) as (writer, _):
        await writer.append([_event("a")])
        appended = writer.appended.of("")
        with _failing_writes(_bytes(_log_of(outbox))), pytest.raises(OutboxUnavailableError):
            await writer.append([_event("there, perhaps")])
        await asyncio.wait_for(appended.wait(), LIMIT_S)


async def test_settlements_of_a_failed_transaction_are_applied_once_after_it(
    outbox: Path,
) -> None:
    async with _opened(outbox) as (writer, reader):
        await writer.append([_event(name) for name in "abc"])
        with _failing_writes(_bytes(_log_of(outbox))):
            acks = [
                writer.settle(Ack(1)),
                writer.settle(Bury(seq=2, reason="rejected", status=400, answer="no")),
            ]
            with pytest.raises(OutboxUnavailableError):
                await writer.append([_event("d")])
            assert not any(ack.done() for ack in acks)
        _, late = await asyncio.wait(acks, timeout=LIMIT_S)

        assert not late
        ledger = await reader.ledger()
        assert (ledger.delivered, ledger.dead) == (1, 1)
        assert [receipt.message_id for receipt in await reader.select("dead", Selection(), limit=9)]


async def test_the_writer_stops_when_told_to_while_the_disk_fails(outbox: Path) -> None:
    async with asyncio.timeout(LIMIT_S), open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        await writer.append([_event("a")])
        with _failing_writes(_bytes(_log_of(outbox))):
            with pytest.raises(OutboxUnavailableError):
                await writer.append([_event("unknown")])
            ack = writer.settle(Ack(1))
            writer.stop()
            await asyncio.wait([ack], timeout=LIMIT_S)

    assert (await _ledger(outbox)).delivered == (0 if ack.cancelled() else 1)


# --- files that are no outbox of this version ---------------------------------------------------


async def _make(path: Path) -> None:
    async with open_writer(path, SPACIOUS, SystemClock()) as writer:
        await writer.append([_event("a")])


async def test_an_outbox_of_a_newer_version_is_refused_and_left_untouched(outbox: Path) -> None:
    await _make(outbox)
    with contextlib.closing(sqlite3.connect(outbox)) as db:
        db.execute("CREATE TABLE invention (name TEXT)")
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    before = _content(outbox)

    newer = f"schema {schema.VERSION + 1}, this one knows {schema.VERSION}"
    with pytest.raises(OutboxError, match=f"{outbox}: written by a newer version .{newer}"):
        async with open_writer(outbox, SPACIOUS, SystemClock()):
            pytest.fail("opened")
    with pytest.raises(OutboxError, match=f"{outbox}: schema {schema.VERSION + 1}"):
        async with open_reader(outbox):
            pytest.fail("opened")
    assert _content(outbox) == before


def _scribble(path: Path) -> bytes:
    path.write_bytes(b"Dear diary, " * 1000)
    return path.read_bytes()


async def test_a_file_that_is_no_database_is_refused_and_left_untouched(outbox: Path) -> None:
    before = _scribble(outbox)

    with pytest.raises(OutboxError, match=f"{outbox}: .*tranthor-agent outbox"):
        async with open_writer(outbox, SPACIOUS, SystemClock()):
            pytest.fail("opened")
    with pytest.raises(OutboxError, match=f"{outbox}: .*tranthor-agent outbox"):
        async with open_reader(outbox):
            pytest.fail("opened")
    assert _content(outbox) == before


OPENING = """
import asyncio, sys
from pathlib import Path
from agent.clock import SystemClock
from agent.errors import OutboxError
from agent.outbox.records import Policy
from agent.outbox.writer import open_writer

async def main():
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=True)
    try:
        async with open_writer(Path(sys.argv[1]), policy, SystemClock()):
            print("opened")
    except OutboxError as exc:
        print("refused:", exc)

asyncio.run(main())
"""


def _open_in_a_process(path: Path) -> str:
    """Return what opening *path* says. A process of its own, for it must also be able to end."""
    opening = [sys.executable, "-c", OPENING, str(path)]
    ended = subprocess.run(opening, cwd=ROOT, capture_output=True, text=True, timeout=20)  # noqa: PLW1510
    assert ended.stderr == ""
    return ended.stdout


@pytest.mark.parametrize("version", [0, schema.VERSION])
def test_the_database_of_another_program_is_refused_and_left_untouched(
    outbox: Path, version: int
) -> None:
    with contextlib.closing(sqlite3.connect(outbox)) as db:
        db.execute("CREATE TABLE diary (entry TEXT)")
        db.execute(f"PRAGMA user_version = {version}")
    before = _content(outbox)

    assert _open_in_a_process(outbox).startswith(f"refused: {outbox}: ")
    assert _content(outbox) == before


@pytest.mark.parametrize("older", [False, True])
def test_an_outbox_whose_version_never_was_is_set_aside(outbox: Path, older: bool) -> None:
    asyncio.run(_make(outbox))
    with contextlib.closing(sqlite3.connect(outbox)) as db:
        if older:
            db.execute("DROP TABLE app")
        db.execute("PRAGMA user_version = -5")
    before = outbox.read_bytes()

    assert _open_in_a_process(outbox).endswith("opened\n")
    assert [path.read_bytes() for path in outbox.parent.glob("*.damaged-*[0-9]")] == [before]


def test_a_damaged_outbox_is_set_aside_and_a_new_one_begun(outbox: Path) -> None:
    asyncio.run(_make(outbox))
    pages = bytearray(outbox.read_bytes())
    with contextlib.closing(sqlite3.connect(outbox)) as db:
        ((root,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'ledger'")
        ((size,),) = db.execute("PRAGMA page_size")
    pages[(root - 1) * size : root * size] = b"\xff" * size
    outbox.write_bytes(pages)

    assert _open_in_a_process(outbox).endswith("opened\n")
    assert [path.read_bytes() for path in outbox.parent.glob("*.damaged-*[0-9]")] == [bytes(pages)]


def test_a_folder_in_place_of_the_outbox_is_refused(outbox: Path) -> None:
    outbox.mkdir()

    assert _open_in_a_process(outbox).startswith(f"refused: {outbox}: cannot open")


# --- illegal states -----------------------------------------------------------------------------


@pytest.fixture
async def raw(outbox: Path) -> AsyncIterator[sqlite3.Connection]:
    """A bare connection to an outbox with a pending event (seq 1), a dead (2), a delivered (3)."""
    async with open_writer(outbox, SPACIOUS, SystemClock()) as writer:
        await writer.append([_event(name) for name in "abc"])
        await writer.settle(Bury(seq=2, reason="rejected", status=400, answer="no"))
        await writer.settle(Ack(3))
    with contextlib.closing(sqlite3.connect(outbox, isolation_level=None)) as db:
        yield db


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET state = 'lost' WHERE seq = 1",
        "UPDATE event SET settled_ms = 1 WHERE seq = 1",
        "UPDATE event SET state = 'delivered' WHERE seq = 1",
        "UPDATE event SET settled_ms = NULL WHERE seq = 3",
        "UPDATE event SET digest = x'00' WHERE seq = 1",
        "UPDATE event SET digest = NULL WHERE seq = 1",
        "UPDATE event SET accepted_ms = 'now' WHERE seq = 1",
        "UPDATE event SET message_id = NULL WHERE seq = 1",
        "INSERT INTO known VALUES (NULL, 1)",
        "UPDATE event SET seq = 2 WHERE seq = 1",
        "UPDATE pending SET kind = 'alias'",
        "UPDATE pending SET body = 'text'",
        "UPDATE pending SET body = NULL",
        "UPDATE pending SET lane = 'a'",
        "UPDATE pending SET attempts = -1, failing_since_ms = 1",
        "UPDATE pending SET attempts = 1",
        "UPDATE pending SET failing_since_ms = 1",
        "UPDATE dead SET reason = 'bored'",
        "UPDATE dead SET kind = 'alias'",
        "UPDATE dead SET attempts = -1",
        "UPDATE dead SET answer = NULL",
        "UPDATE dead SET status = 'teapot'",
        "INSERT INTO ledger (id) VALUES (2)",
        "INSERT INTO ledger (id) VALUES (1)",
        "UPDATE ledger SET accepted = accepted + 1",
        "UPDATE ledger SET pending = pending - 1",
        "UPDATE ledger SET dead = dead + 1",
        "UPDATE ledger SET delivered = delivered + 1",
        "UPDATE ledger SET discarded = discarded + 1",
        "UPDATE ledger SET pending = -1, accepted = accepted - 2",
        "UPDATE ledger SET dead = -1, accepted = accepted - 2",
        "UPDATE ledger SET delivered = -1, accepted = accepted - 2",
        "UPDATE ledger SET evicted = 1",
        "UPDATE ledger SET conflicts = 1",
        "UPDATE ledger SET duplicates = -1",
        "UPDATE ledger SET last_seq = -1",
        "UPDATE ledger SET indexed_upto = last_seq + 1",
        "UPDATE ledger SET paused = 2",
        "INSERT INTO salvage (name, state, found_ms, floor) VALUES ('damaged', 'hopeful', 0, 0)",
    ],
)
async def test_the_database_refuses(raw: sqlite3.Connection, statement: str) -> None:
    before = list(raw.iterdump())
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(statement)
    assert list(raw.iterdump()) == before


async def test_the_ledger_takes_a_sum_that_adds_up(raw: sqlite3.Connection) -> None:
    raw.execute("UPDATE ledger SET pending = pending - 1, discarded = discarded + 1, evicted = 1")


async def test_every_table_is_strict(raw: sqlite3.Connection) -> None:
    tables = raw.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'")
    assert {name: strict for name, strict in tables if not name.startswith("sqlite_")} == {
        "event": 1,
        "pending": 1,
        "dead": 1,
        "known": 1,
        "ledger": 1,
        "salvage": 1,
        "app": 1,
    }


# --- readers ------------------------------------------------------------------------------------


async def test_reading_after_a_clean_stop_leaves_the_folder_as_it_was(outbox: Path) -> None:
    await _make(outbox)
    assert _names(outbox.parent) == ["outbox.db", "outbox.db.lock"]
    before = {file: file.stat().st_mtime_ns for file in outbox.parent.iterdir()}

    async with open_reader(outbox) as reader:
        assert (await reader.ledger()).pending == 1
        assert {file: file.stat().st_mtime_ns for file in outbox.parent.iterdir()} == before
    assert {file: file.stat().st_mtime_ns for file in outbox.parent.iterdir()} == before


async def test_reading_after_a_kill_sees_what_the_log_holds(outbox: Path, tmp_path: Path) -> None:
    async with _opened(outbox) as (writer, _):
        await writer.append([_event("in the log")])
        copy = _copy(outbox, tmp_path / "killed")

    assert (await _ledger(copy)).pending == 1
    # Nothing was checkpointed away by who only looked.
    assert _bytes(_log_of(copy)) > 0


async def test_a_reader_sees_each_commit_of_the_daemon_beside_it(outbox: Path) -> None:
    async with _opened(outbox) as (writer, _), open_reader(outbox) as reader:
        for i in range(20):
            await writer.append([_event(f"id{i}")])
            assert (await reader.ledger()).accepted == i + 1


async def test_reading_where_no_outbox_is_says_so_and_makes_none(outbox: Path) -> None:
    with pytest.raises(OutboxError, match=f"{outbox}: no outbox here"):
        async with open_reader(outbox):
            pytest.fail("opened")
    assert list(outbox.parent.iterdir()) == []


async def test_a_reader_cannot_write(outbox: Path) -> None:
    await _make(outbox)
    async with open_reader(outbox) as reader:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await reader._db.execute("DELETE FROM event")


async def test_readers_ten_times_a_second_leave_the_log_bounded(outbox: Path) -> None:
    largest = 0
    async with _opened(outbox) as (writer, _):
        over = asyncio.Event()

        async def look() -> int:
            looks = 0
            while not over.is_set():
                async with open_reader(outbox) as reader:
                    await reader.ledger()
                    await reader.select("pending", Selection(text="id1"), limit=100)
                looks += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), 0.1)
            return looks

        async with asyncio.TaskGroup() as tasks:
            readers = [tasks.create_task(look()) for _ in range(3)]
            try:
                for i in range(800):
                    await writer.append([_event(f"id{i}", size=60_000)])
                    await writer.settle(Ack(i + 1))
                    largest = max(largest, _bytes(_log_of(outbox)))
            finally:
                over.set()

    assert min(reader.result() for reader in readers) >= 3
    # SQLite checkpoints at 1,000 pages (4 MiB), or later where a busy machine lets a look last; 49 MB
    # went through it.
    assert largest < 24 * 1024 * 1024


@pytest.mark.parametrize("umask", [0o027, 0o022, 0o002])
async def test_no_file_of_the_outbox_is_for_others_or_for_the_group_to_write(
    tmp_path: Path, umask: int
) -> None:
    outbox = tmp_path / "state" / "outbox.db"
    before = os.umask(umask)
    try:
        async with _opened(outbox) as (writer, _):
            await writer.append([_event("a")])
            modes = {
                file.name: oct(stat.S_IMODE(file.stat().st_mode))
                for file in outbox.parent.iterdir()
            }
    finally:
        os.umask(before)

    assert modes == dict.fromkeys(
        ["outbox.db", "outbox.db-wal", "outbox.db-shm", "outbox.db.lock", "outbox.db.reserve"],
        "0o640",
    )
    assert oct(stat.S_IMODE(outbox.parent.stat().st_mode)) == "0o750"


@pytest.mark.parametrize(
    "name", ["with space.db", "what?.db", "a#b.db", "100%25.db", "%.db", "a&mode=rw", "ünïcode☃.db"]
)
async def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    outbox = tmp_path / f"folder of {name}" / name
    async with _opened(outbox) as (writer, own):
        await writer.append([_event("a")])
        assert (await own.ledger()).pending == 1
        assert (await _ledger(outbox)).pending == 1

    assert (await _ledger(outbox)).pending == 1
    assert _names(outbox.parent) == [name, f"{name}.lock"]


async def test_an_event_that_is_buried_twice_is_one_dead_letter(outbox: Path) -> None:
    async with _opened(outbox) as (writer, reader):
        await writer.append([_event("a")])
        bury = Bury(seq=1, reason="rejected", status=400, answer="no")
        await asyncio.wait([writer.settle(bury), writer.settle(bury)], timeout=LIMIT_S)
        assert (await reader.ledger()).dead == 1
        assert await writer.perform(lambda store: letters.requeue(store, [1, 1], now_ms=0)) == 1
        ledger = await reader.ledger()
        assert (ledger.pending, ledger.dead) == (1, 0)
        assert len((await reader.scan(after=0, limit=10)).heads) == 1


async def test_a_filesystem_that_cannot_allocate_is_not_taken_for_a_full_one(
    outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    async with _opened(outbox) as (writer, _):
        assert await writer.append([_event("a")]) == [Appended.STORED]
