"""Who waits for an event to be settled, and how they are told: by the writer, of each commit.

Nobody polls: a wait costs two reads, however long it lasts. Told are those whose event is pending
no longer, and all of them where that is not known; whoever is told looks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from agent.errors import OutboxOverloadedError

WAITERS = 1_000
"""Waits at once; each is a connection and a task, some 20 KiB."""


class Waiters:
    """The waits for pending events, by their seq."""

    def __init__(self) -> None:
        self.over = False
        """Whether the agent stops: nobody is to begin a wait any more."""
        self._told: dict[int, set[asyncio.Event]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def watch(self, seq: int) -> Iterator[asyncio.Event]:
        """Yield what is set once the event *seq* may be settled, or nobody is to wait any more.

        Look at the event again after this began and before waiting: what was settled earlier is not
        told of. Raises `OutboxOverloadedError`.
        """
        if self._count >= WAITERS:
            raise OutboxOverloadedError(
                f"{self._count} others wait for an event already; ask again shortly, or without wait"
            )
        told = asyncio.Event()
        if self.over:
            told.set()
        self._count += 1
        self._told.setdefault(seq, set()).add(told)
        try:
            yield told
        finally:
            self._count -= 1
            self._told[seq].discard(told)
            if not self._told[seq]:
                del self._told[seq]

    def tell(self, seqs: Iterable[int]) -> None:
        """These are settled."""
        for seq in seqs:
            for told in self._told.get(seq, ()):
                told.set()

    def tell_upto(self, seq: int) -> None:
        """Those up to *seq* may be."""
        self.tell([waited for waited in self._told if waited <= seq])

    def tell_all(self) -> None:
        """Each of them may be."""
        self.tell(self._told)

    def end(self) -> None:
        """End every wait: the agent stops."""
        self.over = True
        self.tell_all()
