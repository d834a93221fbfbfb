"""What was accepted and what became of it, by a model of the outbox; and whether the disk agrees."""

from __future__ import annotations

import sqlite3
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from simulation.scenario import Choices
from simulation.tracked import Tracked
from simulation.virtual_time import World

from agent.event import Event
from agent.outbox.records import Ack, Appended, Bury, Settlement

_COUNTS = """
SELECT (SELECT COUNT(*) FROM pending), (SELECT COUNT(*) FROM dead),
       accepted, delivered, pending, dead, discarded
  FROM ledger
"""

_STATES = """
SELECT message_id, event.seq, state, dead.reason
  FROM event
  LEFT JOIN dead USING (seq)
"""


class Books:
    """The model of what is committed. *complain* hears where the outbox differs."""

    def __init__(self, world: World, choices: Choices, complain: Callable[[str], None]) -> None:
        self.tracked: dict[str, Tracked] = {}
        """Every event that is ever handed in, by its messageId."""
        self.by_seq: dict[int, Tracked] = {}
        self.by_user: defaultdict[str, list[Tracked]] = defaultdict(list)
        """What was ever queued of each user."""
        self.pending = 0
        self._world = world
        self._choices = choices
        self._complain = complain
        self._lanes: dict[str, deque[Tracked]] = {}

    def front(self, user: str) -> Tracked | None:
        """Return the first event of *user* that others must wait for."""
        lane = self._lanes[user]
        while lane and lane[0].closed:
            lane.popleft()
        return lane[0] if lane else None

    def stored(self, events: Sequence[Event], results: Sequence[Appended], first_seq: int) -> None:
        """These events were appended, in this order, from *first_seq* on."""
        seq = first_seq
        for event, result in zip(events, results, strict=True):
            tracked = self.tracked[event.message_id]
            forgotten = tracked.state == "delivered" and not self._choices.remembers
            new = tracked.state is None
            if new != (result is Appended.STORED) and not forgotten:
                self._complain(f"{event.message_id}, {tracked.state} before, is {result}")
            if result is Appended.STORED:
                tracked.body = event.body
                self._queue(tracked, seq)
                seq += 1

    def _queue(self, tracked: Tracked, seq: int) -> None:
        self._world.note("queued %s as %s", tracked.message_id, seq)
        tracked.seq, tracked.state, tracked.discarded = seq, "pending", False
        tracked.queued_s = self._world.now_s
        tracked.closed = False
        tracked.failures.clear()
        tracked.storings, tracked.attempts = 0, []
        if tracked not in self.by_user[tracked.user]:
            self.by_user[tracked.user].append(tracked)
        self.by_seq[seq] = tracked
        lane = self._lanes.setdefault(tracked.user, deque())
        if tracked in lane:
            lane.remove(tracked)
        lane.append(tracked)
        self.pending += 1

    def settled(self, settlements: Sequence[Settlement]) -> None:
        """These were committed."""
        self._world.note("committed %s", [each.seq for each in settlements])
        for settlement in settlements:
            tracked = self.by_seq[settlement.seq]
            if tracked.discarded or tracked.seq != settlement.seq or tracked.state == "delivered":
                continue
            match settlement:
                case Ack():
                    self.pending -= tracked.state == "pending"
                    tracked.state = "delivered"
                case Bury():
                    self.pending -= tracked.state == "pending"
                    tracked.state = "dead"
                case _:
                    pass

    def look_again(self, db: sqlite3.Connection) -> None:
        """A verb of the store was committed: see what it changed."""
        requeued: list[tuple[int, Tracked]] = []
        rows = {name: (seq, state) for name, seq, state, _ in db.execute(_STATES)}
        for tracked in self.tracked.values():
            if tracked.state is None or tracked.discarded:
                continue
            seq, state = rows.get(tracked.message_id, (tracked.seq, None))
            if state == tracked.state and seq == tracked.seq:
                continue
            if state == "pending" and tracked.state == "dead":  # requeued
                requeued.append((seq, tracked))
            elif tracked.state == "pending" and state in ("dead", None):  # expired, evicted
                self.pending -= 1
                tracked.state, tracked.discarded = state, state is None
                tracked.closed, tracked.left_s = True, self._world.monotonic_s()
            elif not (tracked.state == "delivered" and state is None):  # forgotten
                self._complain(f"{tracked.message_id} was {tracked.state} and is {state}")
        for seq, tracked in sorted(requeued, key=lambda each: each[0]):
            self._queue(tracked, seq)

    # --- the sums ---

    def audit(self, db: sqlite3.Connection) -> None:
        """Compare the outbox on the disk with what it must be."""
        ((pending_rows, dead_rows, accepted, *parts),) = db.execute(_COUNTS).fetchall()
        if accepted != sum(parts) or (pending_rows, dead_rows) != (parts[1], parts[2]):
            self._complain(f"the ledger does not add up: {accepted}, {parts}, {pending_rows}")
        rows = {name: (seq, state) for name, seq, state, _ in db.execute(_STATES)}
        for tracked in self.tracked.values():
            seq, state = rows.get(tracked.message_id, (tracked.seq, None))
            if state == tracked.state and (state is None or seq == tracked.seq):
                continue
            if state is None and tracked.state == "delivered" and not self._choices.remembers:
                continue
            self._complain(f"{tracked.message_id} is {state} on the disk, not {tracked.state}")
        if self.pending != pending_rows:
            self._complain(f"{pending_rows} are pending, not {self.pending}")
