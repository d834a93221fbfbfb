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


class Conclusion(NamedTuple):
    """A claim, and what became of each of its events."""

    claim: Claim
    changes: tuple[Settlement, ...]


class Recording:
    """Hands settlements to the writer, many at a time."""

    def __init__(self, writer: Writer, recorded: Callable[[list[Conclusion]], None]) -> None:
        """*recorded* is called after each commit with what it holds, and with nothing if it never comes."""
        self.unsettled = 0
        """Events whose settlement is not committed yet."""
        self.gathered = 0
        """Those among them that the writer was not told of."""
        self._writer = writer
        self._recorded = recorded
        self._waiting: list[Conclusion] = []
        self._waiting_bytes = 0
        self._due: asyncio.TimerHandle | None = None

    def add(self, claim: Claim, changes: tuple[Settlement, ...]) -> None:
        """Record *changes* to the events of *claim*, soon."""
        claim_bytes = sum(head.body_bytes for head in claim.heads)
        if self._waiting_bytes + claim_bytes > GATHER_BYTES:
            self.hand_over()
        self._waiting.append(Conclusion(claim, changes))
        self._waiting_bytes += claim_bytes
        self.gathered += len(changes)
        self.unsettled += len(changes)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_GATHER_S, self.hand_over)

    def hand_over(self) -> None:
        """Record now what was gathered, instead of soon."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.gathered = self._waiting_bytes = 0
            done = self._writer.settle(*[change for each in waiting for change in each.changes])
            done.add_done_callback(partial(self._committed, waiting))

    def _committed(self, settled: list[Conclusion], done: asyncio.Future[None]) -> None:
        self.unsettled -= sum(len(each.changes) for each in settled)
        self._recorded([] if done.cancelled() else settled)
