"""What keeps the lanes filled: where to read on in the outbox, how much, and when to look ahead.

Owns the lanes of one upstream and the way back from them to the rows. What is sent when is the
forwarder's, which calls in.
"""

from __future__ import annotations

from agent.clock import Clock
from agent.errors import OutboxError
from agent.forward.claims import Claim
from agent.forward.lanes import PER_LANE, Lanes
from agent.outbox.reader import Reader
from agent.outbox.writer import Writer

SCAN = 512
"""Events read from the outbox at once: a few ms of reading, and a 2 MiB answer at most."""

COUNTED = 8192
"""Events that are only counted, read at once: some ms, and numbers alone."""

_LOOK_AHEAD_S = 0.2
"""How often the tail of a backlog is looked at for fresh events."""


class Supply:
    """The lanes of the upstream *name*, and what is read into them."""

    def __init__(
        self, reader: Reader, writer: Writer, clock: Clock, *, name: str, ordered: bool
    ) -> None:
        self.lanes = Lanes(ordered=ordered)
        self.stale = False
        """Whether the lanes are of a database, or by a plan, that was replaced since."""
        self._reader = reader
        self._writer = writer
        self._clock = clock
        self._name = name
        self._scan_due = True
        self._ahead_due = False
        self._ahead_counted = False
        self._ahead_at_s = float("-inf")
        self._reading = False
        self._settled: list[int] = []
        """What was settled since a read began: it may bring rows of before."""
        self._withdrawn = 0
        self._stale_upto = 0

    @property
    def hungry(self) -> bool:
        """Whether there is more to read, and room for it."""
        return self.lanes.starved() is not None or self._may_scan

    def arrived(self) -> None:
        """There is more in the outbox than before, or it could not be read."""
        self._scan_due = self._ahead_due = True

    def renew(self, *, ordered: bool) -> None:
        """Begin anew with what the outbox holds now: nothing of before is under way."""
        self.lanes = Lanes(ordered=ordered)
        self.stale, self._scan_due, self._ahead_counted = False, True, False

    async def read_on(self, *, urgent: tuple[str, ...], flows: bool) -> bool:
        """Read on where the lanes have room; return whether there may be more to read at once.

        The tail is looked at while events flow: only then could they be sent.
        """
        self._reading = True
        try:
            return await self._read_on(urgent, flows=flows)
        finally:
            self._reading = False
            self.lanes.settled(self._settled)
            self._settled.clear()

    def settled(self, seqs: list[int]) -> None:
        """These are gone from the outbox: no read that begins now can meet them."""
        if self._reading:
            self._settled += seqs
        else:
            self.lanes.settled(seqs)

    async def _read_on(self, urgent: tuple[str, ...], *, flows: bool) -> bool:
        lanes = self.lanes
        while (gap := lanes.starved()) is not None:
            scan = await self._reader.lane(
                gap.user, self._name, after=gap.after, upto=gap.upto, limit=PER_LANE, urgent=urgent
            )
            lanes.read_on(gap, scan.heads, complete=not scan.more, upto=scan.upto)
        if self._may_scan:
            self._scan_due = False
            scan = await self._reader.scan(
                self._name, after=lanes.cursor, limit=SCAN, urgent=urgent
            )
            lanes.scanned(scan.heads, complete=not scan.more, upto=scan.upto)
            self._scan_due = self._scan_due or scan.more  # more may have come meanwhile
            return scan.more
        if flows and self._ahead_due and self._clock.monotonic_s() >= self._ahead_at_s:
            return await self._look_ahead(urgent)
        return False

    def looks_ahead_at_s(self, *, flows: bool) -> float | None:
        """Return when the tail is to be looked at; None while there is no reason to."""
        due = flows and self._ahead_due and not self._may_scan
        return self._ahead_at_s if due else None

    async def bodies(self, claim: Claim) -> dict[int, bytes]:
        """Return what to send, by seq; without those that are not pending any more."""
        if self._withdrawn != self._writer.withdrawn:
            # Some went, and they were the oldest: what was read until now is read again.
            self._withdrawn = self._writer.withdrawn
            self._stale_upto = max(self.lanes.cursor, self.lanes.tail)
        bodies: dict[int, bytes] = {}
        for head in claim.heads:
            body = head.body
            if body is None or head.seq <= self._stale_upto:
                body = await self._reader.body(head.seq)
            if body is not None:
                bodies[head.seq] = body
            elif self._writer.rescuing:
                raise OutboxError("its database is being replaced")  # as if unreadable
        return bodies

    @property
    def _may_scan(self) -> bool:
        return self._scan_due and self.lanes.room >= SCAN

    async def _look_ahead(self, urgent: tuple[str, ...]) -> bool:
        """Take in what is fresh at the tail; what came before that was never looked at is counted.

        Return whether there is more to count: that is done in one go, for meanwhile nothing is fresh.
        """
        lanes = self.lanes
        after = max(lanes.tail, lanes.cursor)
        limit = min(SCAN, lanes.room_ahead)
        if self._ahead_counted and limit:
            scan = await self._reader.scan(self._name, after=after, limit=limit, urgent=urgent)
            lanes.noticed(scan.heads, upto=scan.upto)
            self._ahead_due = scan.more
        else:
            glance = await self._reader.waiting(
                self._name, after=after, limit=COUNTED, urgent=urgent
            )
            lanes.counted(glance.waiting, upto=glance.upto)
            self._ahead_counted = not glance.more
            self._ahead_due = not self._ahead_counted
            if glance.more:
                return True
        self._ahead_at_s = self._clock.monotonic_s() + _LOOK_AHEAD_S
        return False
