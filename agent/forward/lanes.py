"""Which event goes next: in order within a user, no user waiting for another.

A lane is the events of one user. Its first event is sent, and only when that is settled the
next; a lane whose event must wait is parked, and the others go on. Pure: no clock, no database.

Memory does not grow with the backlog. The window holds the events next in order of acceptance;
`cursor` is how far the outbox was scanned. A lane that has enough in the window is marked as
having more *behind* in the outbox, and is read on by itself when it has sent those:

    outbox   1a 2b 3a 4a 5a 6c │ 7b …        a: behind, reads on after 3, up to the cursor
    window   a: 1 3   b: 2   c: 6            (two events a lane here)
                               └ cursor
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.outbox.records import Head

WINDOW = 2048
"""Events held in memory; with bodies of at most 4 KiB inline that is 8 MiB at the worst."""

PER_LANE = 64
"""Events held of one lane: enough that reading on costs little beside sending them."""

PARKED = 10_000
"""Lanes that may be parked at once before scanning stops; each holds one event."""


@dataclass(slots=True)
class _Lane:
    key: int
    queue: deque[Head] = field(default_factory=deque)
    busy: bool = False
    parked: bool = False
    behind: bool = False
    last_seq: int = 0


class Lanes:
    """The window and its lanes. *ordered* False makes a lane of every event."""

    def __init__(
        self, *, ordered: bool = True, window: int = WINDOW, per_lane: int = PER_LANE
    ) -> None:
        self.cursor = 0
        """The seq up to which the outbox was scanned."""
        self.size = 0
        """Events in memory."""
        self._ordered = ordered
        self._window = window
        self._per_lane = per_lane
        self._lanes: dict[int, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._parked: list[tuple[float, int]] = []
        self._starved: deque[_Lane] = deque()

    # --- reading on ---

    @property
    def room(self) -> int:
        """How many events a scan may bring now."""
        parked = len(self._parked)
        return 0 if parked > PARKED else max(0, self._window - (self.size - parked))

    def scanned(self, heads: Iterable[Head], *, upto: int = 0) -> None:
        """Take in the events next behind the cursor, in order; up to the seq *upto* there are no more."""
        self.cursor = max(self.cursor, upto)
        for head in heads:
            self.cursor = max(self.cursor, head.seq)
            lane = self._lane(head)
            if lane.behind or lane.parked or len(lane.queue) >= self._per_lane:
                lane.behind = True
            else:
                if not lane.queue:
                    self._ready.append(lane)
                self._keep(lane, head)

    def starved(self) -> tuple[int, int] | None:
        """Return (lane, last seq) of a lane that must be read on and may, or None."""
        if not self._starved or not self.room:
            return None
        return self._starved[0].key, self._starved[0].last_seq

    def read_on(self, heads: list[Head], *, complete: bool, upto: int = 0) -> None:
        """Take in the next events of the lane that `starved` named; *complete* if up to the cursor.

        Up to the seq *upto* there are no more of them.
        """
        lane = self._starved.popleft()
        lane.behind = not complete
        for head in heads:
            self._keep(lane, head)
        lane.last_seq = max(lane.last_seq, upto)
        self._after(lane)

    # --- sending ---

    def take(self, now_s: float) -> Head | None:
        """Return the event to send next, and keep its lane busy until `done` or `again`."""
        while self._parked and self._parked[0][0] <= now_s:
            _, key = heapq.heappop(self._parked)
            lane = self._lanes[key]
            lane.parked = False
            self._ready.append(lane)
        if not self._ready:
            return None
        lane = self._ready.popleft()
        lane.busy = True
        return lane.queue[0]

    def done(self, head: Head) -> None:
        """The event is settled for good: its lane moves on."""
        lane = self._lanes[self._key(head)]
        lane.queue.popleft()
        lane.busy = False
        self.size -= 1
        self._after(lane)

    def again(self, head: Head, *, until_s: float | None) -> None:
        """Send *head* (its counts brought up to date) again: behind the other lanes, or not before *until_s*."""
        lane = self._lanes[self._key(head)]
        lane.busy = False
        lane.queue[0] = head
        if until_s is None:
            self._ready.append(lane)
            return
        lane.parked = True
        heapq.heappush(self._parked, (until_s, lane.key))
        if len(lane.queue) > 1:  # what waits behind it is read again when it is settled
            self.size -= len(lane.queue) - 1
            lane.queue = deque([head])
            lane.last_seq = head.seq
            lane.behind = True

    def unpark(self) -> None:
        """End every wait of a single lane."""
        self._parked = [(float("-inf"), key) for _, key in self._parked]

    def next_at_s(self) -> float | None:
        """Return from when `take` has an event: -inf for now, None while all are busy or there is none."""
        if self._ready:
            return float("-inf")
        return self._parked[0][0] if self._parked else None

    @property
    def parked(self) -> int:
        """How many lanes wait on an event of their own."""
        return len(self._parked)

    # --- one lane ---

    def _key(self, head: Head) -> int:
        return head.lane if self._ordered else head.seq

    def _lane(self, head: Head) -> _Lane:
        key = self._key(head)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key)
        return lane

    def _keep(self, lane: _Lane, head: Head) -> None:
        lane.queue.append(head)
        lane.last_seq = head.seq
        self.size += 1

    def _after(self, lane: _Lane) -> None:
        """Put an idle lane where it belongs: ready, starved, or gone."""
        if lane.queue:
            self._ready.append(lane)
        elif lane.behind:
            self._starved.append(lane)
        else:
            del self._lanes[lane.key]
