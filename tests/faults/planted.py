"""The daemon with a bug planted in it: what the proofs of this folder must be seen to find.

    PYTHONPATH=tests python -m faults.planted BUG run --config agent.toml

Each bug breaks promise 1 in one way that a review could overlook. The agent itself has no switch
for any of them; they are put in from outside, before it starts.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.__main__ import main
from agent.event import Event
from agent.outbox import database
from agent.outbox.database import Database
from agent.outbox.records import Appended
from agent.outbox.writer import Writer


def synchronous_normal() -> None:
    """Commit without a sync: kept by a process that dies, lost by a machine that does."""
    connect = database.connect

    async def connect_carelessly(path: Path) -> Database:
        db = await connect(path)
        await db._connection.execute_fetchall("PRAGMA synchronous = NORMAL")
        return db

    database.connect = connect_carelessly


def answer_before_commit() -> None:
    """Answer 204 once the event is queued."""
    append = Writer.append

    def append_some_day(self: Writer, events: Sequence[Event]) -> asyncio.Future[list[Appended]]:
        append(self, events)
        answered = asyncio.get_running_loop().create_future()
        answered.set_result([Appended.STORED] * len(events))
        return answered

    Writer.append = append_some_day  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug for bug in (synchronous_normal, answer_before_commit)
}


def command(bug: str | None) -> list[str]:
    """Return how to start the agent with *bug*; None: as it is. Needs `tests` on PYTHONPATH."""
    return [sys.executable, "-m", *(("agent",) if bug is None else ("faults.planted", bug))]


if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    main()
