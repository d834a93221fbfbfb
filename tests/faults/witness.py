"""Who remembers what was acknowledged, and compares it with what is left.

The clients of a fault proof post without retrying: an event is either acknowledged (204), and then
must be found afterwards in the outbox or upstream, or it is not, and then may be.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import aiohttp

_RETRY_S = 0.005
"""Between two posts of a client whose agent does not answer."""

_USERS = 20


class Witness:
    """Posts events and keeps the ids of those that were answered 204."""

    def __init__(self, url: str, seed: int, *, filler_bytes: int = 800) -> None:
        """*url* is the agent's, without a path; bodies hold up to *filler_bytes* of filler."""
        self.acknowledged: set[str] = set()
        self.refused: dict[int, int] = {}
        """How many answers of each other status there were."""
        self.refused_for_good = 0
        """How many of those did not say when to send again (Retry-After)."""
        self.unanswered = 0
        self._track = f"{url}/api/public/apps/track"
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._under_way: set[int] = set()
        self._seed = seed
        self._filler_bytes = filler_bytes

    async def post(self, session: aiohttp.ClientSession) -> int | None:
        """Post one new event; return the answer's status, None if there was none."""
        number = next(self._numbers)
        message_id = f"{self._seed}-{number}-{self._rng.getrandbits(64):016x}"
        event = {
            "messageId": message_id,
            "event": "Item Sold",
            "userId": f"user-{number % _USERS}",
            "properties": {
                "number": number,
                "filler": "x" * self._rng.randrange(self._filler_bytes),
            },
        }
        self._under_way.add(number)
        try:
            async with session.post(self._track, json=event) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            self.unanswered += 1
            return None
        finally:
            self._under_way.discard(number)
        if response.status == 204:
            self.acknowledged.add(message_id)
        else:
            self.refused[response.status] = self.refused.get(response.status, 0) + 1
            self.refused_for_good += "Retry-After" not in response.headers
        return response.status

    @asynccontextmanager
    async def posting(self, clients: int) -> AsyncIterator[None]:
        """Let *clients* post one after another, as fast as they are answered, while the block runs."""
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as apps:
            running = [apps.create_task(self._use(session)) for _ in range(clients)]
            try:
                yield
            finally:
                for app in running:
                    app.cancel()

    async def _use(self, session: aiohttp.ClientSession) -> None:
        while True:
            if await self.post(session) is None:
                await asyncio.sleep(_RETRY_S)

    async def reach(self, count: int) -> None:
        """Return once *count* events were acknowledged."""
        while len(self.acknowledged) < count:  # noqa: ASYNC110  # a poll of what other tasks count
            await asyncio.sleep(0.001)

    async def hear_out(self) -> None:
        """Return once no post of before is under way: all that a dead agent answered is then known."""
        asked = frozenset(self._under_way)
        while asked & self._under_way:  # noqa: ASYNC110  # a poll of what other tasks count
            await asyncio.sleep(0.001)

    def lost(self, outbox: Path, delivered: Iterable[str]) -> set[str]:
        """Return the acknowledged ids that are neither in *outbox* nor among the *delivered*."""
        return self.acknowledged - known_ids(outbox) - set(delivered)


def known_ids(outbox: Path) -> set[str]:
    """Return the ids of all events that *outbox* knows, in whatever state. No agent may run."""
    with closing(sqlite3.connect(outbox)) as db:
        return {message_id for (message_id,) in db.execute("SELECT message_id FROM event")}


def flaws(outbox: Path) -> list[str]:
    """Return what is wrong with the database itself and with its books; empty when all is well."""
    with closing(sqlite3.connect(outbox)) as db:
        found = [line for (line,) in db.execute("PRAGMA integrity_check") if line != "ok"]
        counted = dict(db.execute("SELECT state, COUNT(*) FROM event GROUP BY state"))
        (accepted, delivered, pending, dead, discarded) = db.execute(
            "SELECT accepted, delivered, pending, dead, discarded FROM ledger"
        ).fetchone()
        (queued,) = db.execute("SELECT COUNT(*) FROM pending").fetchone()
        (twice,) = db.execute("SELECT COUNT(*) - COUNT(DISTINCT message_id) FROM event").fetchone()
    if twice:
        found.append(f"{twice} ids are there twice")
    if accepted != delivered + pending + dead + discarded:
        found.append(f"{accepted=} is not {delivered=} + {pending=} + {dead=} + {discarded=}")
    if not pending == queued == counted.get("pending", 0):
        found.append(f"{pending=} in the ledger, {queued=} in the queue, {counted=} by id")
    if dead != counted.get("dead", 0):
        found.append(f"{dead=} in the ledger, {counted=} by id")
    return found
