"""What became of the events, on its way into the outbox: gathered, so that one commit holds many.

A commit of one event takes nearly as long as one of fifty, and wakes two threads for it. When to wait
no longer is `agent.forward.gate`'s; what a commit changes for lanes and tally is the forwarder's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from agent.forward.claims import Claim
from agent.outbox.records import Settlement
from agent.outbox.writer import Writer

_GATHER_S = 0.01
"""How long a settlement waits for others: a few commits, and nothing that anybody notices."""

GATHER_BYTES = 5 * 1024 * 1024
"""Bodies of what is recorded together, as of the largest claim: to bury events writes their bodies anew,
and on a disk without room the outbox has little to do so."""


class Recorded(NamedTuple):
    """A claim, and what became of each of its events."""

    claim: Claim
    changes: tuple[Settlement, ...]


class Recording:
    """Hands settlements to the writer, many at a time."""

    def __init__(self, writer: Writer, recorded: Callable[[list[Recorded]], None]) -> None:
        """*recorded* is told of each commit that holds some."""
        self.events = 0
        """How many are not recorded yet."""
        self.gathered = 0
        """How many of these the writer was not told of."""
        self._writer = writer
        self._recorded = recorded
        self._waiting: list[Recorded] = []
        self._waiting_bytes = 0
        self._due: asyncio.TimerHandle | None = None

    def add(self, claim: Claim, changes: tuple[Settlement, ...]) -> None:
        """Record *changes* to the events of *claim*, soon."""
        claim_bytes = sum(head.body_bytes for head in claim.heads)
        if self._waiting_bytes + claim_bytes > GATHER_BYTES:
            self.flush()
        self._waiting.append(Recorded(claim, changes))
        self._waiting_bytes += claim_bytes
        self.gathered += len(changes)
        self.events += len(changes)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_GATHER_S, self.flush)

    def flush(self) -> None:
        """Record now what was gathered."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.gathered = self._waiting_bytes = 0
            done = self._writer.settle(*[change for each in waiting for change in each.changes])
            done.add_done_callback(partial(self._committed, waiting))

    def _committed(self, settled: list[Recorded], done: asyncio.Future[None]) -> None:
        self.events -= sum(len(each.changes) for each in settled)
        self._recorded([] if done.cancelled() else settled)
