"""Promise 1 against the power: every state of the disk that a cut may leave is opened again.

The real daemon is traced while it lives through what changes the files: `faults.crash_runs`. From
what it wrote and synced, states are rebuilt in which the unsynced is missing, torn or in another
order: `faults.crash_states`. In each, what had been answered 204 by then must be there, as posted,
in a sound database: `faults.promises`.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import crash_runs, syscalls
from faults.crash_runs import Recording
from faults.crash_states import State, crashes
from faults.disk import SECTOR_BYTES
from faults.promises import Promises
from faults.syscalls import Opened, Operation, Resized, Sent, Synced, Unlinked, Written
from processes import DEADLINE_S

from agent.clock import SystemClock
from agent.contract import read_event
from agent.errors import OutboxError
from agent.outbox.records import Policy
from agent.outbox.rescue import salvage_damaged
from agent.outbox.writer import Writer, open_writer

SEED = 20261123

ROUND = 5_000
"""States of one recording at most: then another is made, with other times and another order."""

LIGHT = 1_300
HEAVY = 200
"""Of 2,000 states, those before and after the events that make the database a thousand pages large;
the others are of an outbox that an older version has left."""

AGENT_OPENS_EVERY = 400
"""The agent itself opens some states; SQLite alone, which is quicker, opens all others."""

PLANTED = 500
"""States of which at least one must show a planted bug; dozens do."""

SHM_BYTES = 32_768

REPLAYED = b"Idempotent-Replayed: true"


@pytest.fixture
def strace() -> None:
    if why := syscalls.why_untraceable():
        pytest.skip(why)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of states are written."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else tmp_path) as folder:
        yield Path(folder)


# --- the daemon ---


@pytest.mark.process
async def test_no_power_cut_loses_or_corrupts_an_event(
    strace: None, memory: Path, tmp_path: Path, tier: Callable[[int, int], int]
) -> None:
    total = tier(2_000, 50_000)
    for start in range(0, total, ROUND):
        count, seed = min(ROUND, total - start), SEED + start
        light, heavy = count * LIGHT // 2_000, count * HEAVY // 2_000
        life = await crash_runs.whole_life(tmp_path / f"life-{start}", seed)
        assert_meets_everything(life)
        upgrade = await crash_runs.upgrade(tmp_path / f"upgrade-{start}", seed)
        small = range(life.promises.acknowledged["big-0"])
        large = range(small.stop, len(life.operations))
        kept = tmp_path / "kept"
        await assert_keeps_all(life, small, light, seed, memory, kept)
        await assert_keeps_all(life, large, heavy, seed, memory, kept)
        rest = count - light - heavy
        await assert_keeps_all(upgrade, all_of(upgrade), rest, seed, memory, kept)


async def assert_keeps_all(
    recording: Recording, points: range, count: int, seed: int, memory: Path, kept: Path
) -> None:
    """Open *count* states after a power cut at one of *points*; one that fails goes to *kept*."""
    opened = 0
    for state, problems in opening(recording, points, count, f"{seed}", memory / "sqlite"):
        if opened % AGENT_OPENS_EVERY == 0:
            problems.extend(await reopening(state, recording.promises, memory / "agent"))
        assert not problems, report(problems, state, recording, seed, kept)
        opened += 1
    assert opened == count, "the recording has fewer states"


def assert_meets_everything(life: Recording) -> None:
    """Fail if the script does not reach any more what it is there for."""
    resized = [op for op in life.operations if isinstance(op, Resized) and op.name == "outbox.db"]
    sizes = [op.size for op in resized]
    headers = [op for op in life.operations if isinstance(op, Written) and op.offset == 0]
    promises = life.promises
    assert not life.before, "no new path, and so no migration from nothing"
    assert sizes != sorted(sizes), "no vacuum that made the file smaller"
    assert sum(op.name == "outbox.db-wal" for op in headers) > 3, "no log that was begun anew"
    assert promises.delivered.keys() > {"big-0", "refused-0"}, "no deletion, no requeue"
    assert promises.discarded, "no dead letter discarded"
    assert any(isinstance(op, Sent) and REPLAYED in op.data for op in life.operations), (
        "no event that was stored but not synced when the process was killed"
    )


@pytest.mark.process
@pytest.mark.parametrize("bug", ["synchronous_normal", "answer_before_commit"])
async def test_an_answer_before_the_sync_is_found(
    strace: None, memory: Path, tmp_path: Path, bug: str
) -> None:
    recording = await crash_runs.first_minute(tmp_path / bug, SEED, bug)
    assert finds("lost", recording, all_of(recording), memory)


@pytest.mark.process
async def test_a_checkpoint_without_a_sync_is_found(
    strace: None, memory: Path, tmp_path: Path
) -> None:
    recording = await crash_runs.first_minute(tmp_path / "off", SEED, "synchronous_off")
    # The stop ends with a checkpoint; once the log is gone, the database must stand alone.
    log_gone = recording.operations.index(Resized("outbox.db-wal", 0))
    assert finds("corrupt", recording, range(log_gone, len(recording.operations)), memory)


def finds(word: str, recording: Recording, points: range, memory: Path) -> bool:
    """Return whether some state has a problem with *word* in it."""
    found = opening(recording, points, PLANTED, word, memory)
    return any(word in problem for _, problems in found for problem in problems)


def all_of(recording: Recording) -> range:
    return range(len(recording.operations))


def opening(
    recording: Recording, points: range, count: int, seed: str, folder: Path
) -> Iterator[tuple[State, list[str]]]:
    """Open *count* states in *folder*, and yield each with what is lost or corrupt in it.

    What the -shm file holds after a power cut is anything. So it is missing, or noise, or, which
    would mislead most, that of another state.
    """
    states = crashes(recording.operations, recording.before, seed=seed, count=count, points=points)
    noise = random.Random(0).randbytes(SHM_BYTES)
    shm = folder / "outbox.db-shm"
    for number, state in enumerate(states):
        stale = shm.read_bytes() if shm.exists() else b""
        state.write_to(folder)
        if content := (b"", noise, stale)[number % 3]:
            shm.write_bytes(content)
        yield state, recording.promises.problems(folder / "outbox.db", state.point)


async def reopening(state: State, promises: Promises, folder: Path) -> list[str]:
    """Open *state* with the agent's own writer, store one event more, and return what is wrong then.

    A log of which a later part arrived and an earlier one did not looks damaged: then it is set aside
    and read back.
    """
    state.write_to(folder)
    posted = crash_runs.event("after-the-cut")
    event = read_event("track", json.dumps(posted).encode(), received_ms=0)
    policy = Policy(max_bytes=64 * 1024 * 1024, evicts=False, remember=True)
    try:
        async with open_writer(folder / "outbox.db", policy, SystemClock()) as writer:
            await writer.append([event])
            if writer.rescuing:
                await read_back(writer)
    except OutboxError as exc:
        return [f"corrupt: the agent refuses it: {exc}"]
    then = Promises(
        posted={**promises.posted, event.message_id: posted},
        acknowledged={**promises.acknowledged, event.message_id: state.point},
        delivered=promises.delivered,
        discarded=promises.discarded,
    )
    return then.problems(folder / "outbox.db", state.point)


async def read_back(writer: Writer) -> None:
    """Return once nothing more comes out of what was set aside."""
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        salvaging = tasks.create_task(salvage_damaged(writer))
        while writer.rescuing:
            writer.appended.of("").clear()
            await writer.appended.of("").wait()  # which salvage tells, too
        salvaging.cancel()


def report(problems: list[str], state: State, recording: Recording, seed: int, folder: Path) -> str:
    """Keep a state that failed; return what is wrong and where it is."""
    state.write_to(folder / "state")
    with (folder / "recording.pickle").open("wb") as file:
        pickle.dump(recording, file)
    history = "\n".join(
        f"{index} {operation!r:.100}"
        for index, operation in enumerate(recording.operations[: state.point + 1])
    )
    (folder / "operations.txt").write_text(history)
    return (
        f"{problems} after a power cut behind operation {state.point} (seed {seed}):\n"
        f"{state.choice}\n"
        f"The files as they were, all operations up to then, and the recording: {folder}"
    )


# --- the model of the disk ---

A, B, C = (letter * SECTOR_BYTES for letter in (b"a", b"b", b"c"))


def states_of(*operations: Operation, before: bytes | None = None) -> set[bytes | None]:
    """Return what the file "f" may hold after all of *operations*; None: it is missing."""
    files = {} if before is None else {"f": before}
    last = len(operations) - 1
    drawn = crashes(operations, files, seed="", count=200, points=range(last, last + 1))
    return {state.files.get("f") for state in drawn}


def test_what_was_synced_is_in_every_state() -> None:
    assert states_of(Written("f", 0, A + B), Synced("f", 1), before=b"") == {A + B}


def test_what_was_not_synced_may_be_missing_torn_or_whole() -> None:
    nothing = bytes(SECTOR_BYTES)
    assert states_of(Written("f", 0, A + B), before=b"") >= {
        *(b"", A + B, A + nothing, nothing + B),
        nothing + nothing,  # the file grew, and its data did not come
    }


def test_a_later_write_may_be_there_without_an_earlier_one() -> None:
    writes = Written("f", 0, A), Written("f", SECTOR_BYTES, B)
    assert C + B in states_of(*writes, before=C + C)


def test_an_older_write_never_undoes_a_newer_one_in_its_sector() -> None:
    assert states_of(Written("f", 0, A), Written("f", 0, B[:9]), before=C) == {
        *(C, A, B[:9] + A[9:]),
    }


def test_a_sync_keeps_nothing_that_was_written_while_it_ran() -> None:
    assert states_of(Written("f", 0, A), Synced("f", 0), before=C) == {A, C}


def test_a_name_is_kept_by_a_sync_of_the_folder_alone() -> None:
    made = Opened("f"), Written("f", 0, A), Synced("f", 2)
    assert states_of(*made) == {None, A}
    assert states_of(*made, Synced("", 3)) == {A}
    assert states_of(Unlinked("f"), before=A) == {None, A}


def test_what_was_cut_off_never_comes_back_under_a_file_that_grew_again() -> None:
    regrown = Resized("f", 0), Written("f", SECTOR_BYTES, C)
    nothing = bytes(SECTOR_BYTES)
    assert states_of(*regrown, before=A + B) == {
        *(A + B, b"", nothing + C, nothing + nothing),
    }
