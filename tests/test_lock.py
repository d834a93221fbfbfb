"""One writer per outbox, and readers that stay out of its way."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.clock import SystemClock
from agent.errors import OutboxLockedError
from agent.outbox import files, lock
from agent.outbox.access import open_reader
from agent.outbox.records import Policy
from agent.outbox.writer import open_writer

POLICY = Policy(max_bytes=1 << 30, evicts=False, remember=True)

OWNER = """
import asyncio, sys
from pathlib import Path
from agent.clock import SystemClock
from agent.outbox.records import Policy
from agent.outbox.writer import open_writer

async def main():
    policy = Policy(max_bytes=1 << 30, evicts=False, remember=True)
    async with open_writer(Path(sys.argv[1]), policy, SystemClock()):
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@contextmanager
def _owner(outbox: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that has *outbox* open to write, until the block or the process ends."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(outbox)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            yield process
        finally:
            process.kill()


async def test_a_second_writer_is_refused_and_told_who_is_the_first(outbox: Path) -> None:
    with _owner(outbox) as owner:
        with pytest.raises(OutboxLockedError, match=rf"in use by process {owner.pid};") as refusal:
            async with open_writer(outbox, POLICY, SystemClock()):
                pytest.fail("two writers")

        assert str(refusal.value).startswith(f"{outbox}: ")
        assert "set outbox.path" in str(refusal.value)
        assert owner.poll() is None


async def test_a_second_writer_in_the_same_process_is_refused(outbox: Path) -> None:
    async with open_writer(outbox, POLICY, SystemClock()):
        with pytest.raises(OutboxLockedError, match=f"process {os.getpid()};"):
            async with open_writer(outbox, POLICY, SystemClock()):
                pytest.fail("two writers")


async def test_the_lock_is_free_once_its_owner_is_killed(outbox: Path) -> None:
    with _owner(outbox) as owner:
        owner.kill()
        owner.wait(10)

        async with asyncio.timeout(5), open_writer(outbox, POLICY, SystemClock()):
            owner_now = files.lock_of(outbox).read_text().splitlines()[0]
            assert owner_now == str(os.getpid())


async def test_the_lock_is_free_once_its_owner_ended(outbox: Path) -> None:
    async with open_writer(outbox, POLICY, SystemClock()):
        pass

    async with asyncio.timeout(5), open_writer(outbox, POLICY, SystemClock()):
        pass


def test_shared_is_false_while_a_writer_lives(outbox: Path) -> None:
    with _owner(outbox) as owner:
        with lock.shared(outbox) as alone:
            assert not alone
        owner.kill()
        owner.wait(10)
        with lock.shared(outbox) as alone:
            assert alone


def test_shared_leaves_no_lock_file_where_no_writer_ever_was(outbox: Path) -> None:
    with lock.shared(outbox) as alone:
        assert alone

    assert list(outbox.parent.iterdir()) == []


def test_readers_do_not_exclude_each_other(outbox: Path) -> None:
    files.lock_of(outbox).touch()
    with lock.shared(outbox) as first, lock.shared(outbox) as second:
        assert (first, second) == (True, True)


async def test_a_short_reader_only_delays_a_writer(outbox: Path) -> None:
    files.lock_of(outbox).touch()

    async def own() -> None:
        async with lock.exclusive(outbox):
            pass

    async with asyncio.TaskGroup() as tasks:
        with lock.shared(outbox):
            writer = tasks.create_task(own())
            done, _ = await asyncio.wait([writer], timeout=0.3)
            assert not done
        async with asyncio.timeout(1):
            await writer


async def test_readers_ten_times_a_second_do_not_keep_a_writer_from_starting(
    outbox: Path,
) -> None:
    async with open_writer(outbox, POLICY, SystemClock()):
        pass
    over = threading.Event()

    def look() -> None:
        async def once() -> None:
            async with open_reader(outbox) as reader:
                await reader.ledger()

        while not over.wait(0.1):
            asyncio.run(once())

    readers = [threading.Thread(target=look) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for _ in range(5):
            async with asyncio.timeout(2), open_writer(outbox, POLICY, SystemClock()):
                pass
    finally:
        over.set()
        for thread in readers:
            thread.join()


async def test_a_reader_that_stays_is_not_taken_for_the_writer_before_it(outbox: Path) -> None:
    with _owner(outbox) as owner:
        owner.kill()
        owner.wait(10)
    with lock.shared(outbox):
        async with asyncio.timeout(2):
            with pytest.raises(OutboxLockedError) as refusal:
                async with open_writer(outbox, POLICY, SystemClock()):
                    pytest.fail("a writer beside an immutable reader")

    assert f"process {owner.pid}" not in str(refusal.value)
