"""Which events go next: in order within a user, no user waiting for another.

A lane is the events of one user. The first of them are claimed and sent, and only when they are
settled the next; a claim that must wait is parked with its lanes, and the others go on. Pure: no
clock, no database.

Memory does not grow with the backlog. The window holds the events next in order of acceptance;
`cursor` is how far the outbox was scanned. A lane that has enough in the window is marked as
having more *behind* in the outbox, and is read on by itself when it has sent those:

    outbox   1a 2b 3a 4a 5a 6c │ 7b 8b … 9a 10d │ …       a: behind, reads on after 3, up to the cursor
    window   a: 1 3   b: 2   c: 6            (two events a lane here)
    fresh    d: 10             │                │
                             cursor            tail

A backlog larger than the window must not keep a fresh event waiting for days. What lies between
the cursor and the *tail* was only counted by user (`agent.forward.census`); an event at the tail
whose user has nothing there is taken in, and fresh lanes and those of the backlog take turns.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

from agent.forward.census import Census
from agent.forward.claims import Claim, part
from agent.outbox.records import Head

WINDOW = 2048
"""Events held in memory; with bodies of at most 4 KiB inline that is 8 MiB at the worst."""

AHEAD = 512
"""Events held besides: half of it for fresh ones, the other for urgent ones and what is before them."""

PER_LANE = 64
"""Events held of one lane: enough that reading on costs little beside sending them."""

PARKED = 10_000
"""Events that may be parked at once before scanning stops."""

ITEM_BYTES = 32
"""What an event takes in a batch beside its body: its type, a comma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What one request may hold at most. A first event is taken whatever its size."""

    events: int
    batch_bytes: int

    def narrowed(self, events: int) -> Fit:
        """Return the fit after a claim of several *events* was split: bad ones seldom come alone."""
        return replace(self, events=min(self.events, events // 2))

    def below(self, refused_bytes: int) -> Fit:
        """Return the fit after so much was too large: whoever stands in between takes less than the upstream."""
        return replace(self, batch_bytes=min(self.batch_bytes, refused_bytes // 2))

    def widened(self, most: int) -> Fit:
        """Return the fit after a delivery: up to *most* events again."""
        return self if self.events >= most else replace(self, events=min(2 * self.events, most))


ONE = Fit(events=1, batch_bytes=0)


class Gap(NamedTuple):
    """What is to be read of one lane: the events of *user* with after < seq <= upto."""

    key: int
    user: int
    after: int
    upto: int


class Place(NamedTuple):
    """Where an event stands that somebody asks about.

    *claim* is the one that it failed in and will be sent with again. Not before *until_s*, if any, be it
    that claim or the one that the lane waits for: then *behind* is the messageId in front.
    """

    claim: Claim | None = None
    until_s: float | None = None
    behind: str | None = None
    urgent: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    key: int
    user: int
    queue: deque[Head] = field(default_factory=deque)
    claimed: int = 0
    parked: bool = False
    behind: bool = False
    fresh: bool = False
    last_seq: int = 0
    """The highest seq that is or was held."""
    urgent_upto: int = 0
    """What may go in spite of a budget: up to this seq, the last urgent one."""


class Lanes:
    """The window and its lanes. *ordered* False makes a lane of every event."""

    def __init__(
        self, *, ordered: bool = True, window: int = WINDOW, per_lane: int = PER_LANE
    ) -> None:
        self.cursor = 0
        """The seq up to which the outbox was scanned."""
        self.tail = 0
        """The seq up to which it was looked at for fresh events; never below the cursor."""
        self.size = 0
        """Events in memory."""
        self._ordered = ordered
        self._window = window
        self._per_lane = per_lane
        self._lanes: dict[int, _Lane] = {}
        self._ready: deque[_Lane | Claim] = deque()
        self._fresh: deque[_Lane] = deque()
        self._fresh_turn = True
        self._urgent: dict[int, None] = {}
        """The lanes with an urgent event before them, in order."""
        self._parked: list[tuple[float, int, Claim]] = []
        self._parked_events = 0
        self._parked_lanes = 0
        self._tickets = count()
        self._starved: deque[_Lane] = deque()
        self._census = Census()
        self._ahead: set[int] = set()
        """What was taken in from beyond the cursor and is not settled yet."""

    # --- reading on ---

    @property
    def room(self) -> int:
        """How many events a scan may bring now."""
        full = self._parked_events > PARKED
        return 0 if full else max(0, self._window - (self.size - self._parked_events))

    @property
    def room_ahead(self) -> int:
        """How many fresh events may be taken in now."""
        return max(0, self._room_for_urgent - AHEAD // 2)

    @property
    def _room_for_urgent(self) -> int:
        return max(0, self._window + AHEAD - (self.size - self._parked_events))

    def scanned(self, heads: list[Head], *, complete: bool, upto: int = 0) -> None:
        """Take in the events next behind the cursor, in order; *complete*: there are no more.

        None else is up to the seq *upto*; so with the others that read on.
        """
        for head in heads:
            self.cursor = head.seq
            if head.seq in self._ahead:
                continue
            lane = self._lane(head)
            if head.seq <= self.tail:
                self._census.remove(lane.key)
            if lane.behind or lane.parked or len(lane.queue) >= self._per_lane:
                lane.behind = True
            else:
                self._welcome(lane, head)
        self.cursor = max(self.cursor, upto)
        if complete or self.cursor >= self.tail:
            self.cursor = self.tail = max(self.cursor, self.tail)
            self._census.clear()
            self._ahead.clear()

    def counted(self, waiting: Sequence[tuple[int, int, int]], *, upto: int = 0) -> None:
        """Count what comes next behind the tail, as (seq, lane, urgent), without taking it in."""
        self._census.add(*(lane if self._ordered else seq for seq, lane, _ in waiting))
        for seq, lane, urgent in waiting:
            if urgent:
                self._urge(lane, seq)
        last = waiting[-1][0] if waiting else 0
        self.tail = max(self.tail, upto, last)

    def _count(self, seq: int, user: int, *, urgent: bool) -> None:
        self.tail = seq
        self._census.add(user if self._ordered else seq)
        if urgent:
            self._urge(user, seq)

    def noticed(self, heads: Iterable[Head], *, upto: int = 0) -> None:
        """Take in the events next behind the tail whose users have nothing else unread."""
        for head in heads:
            key = self._key(head)
            lane = self._lanes.get(key)
            waits = lane is not None and (
                not lane.fresh or lane.behind or lane.parked or len(lane.queue) >= self._per_lane
            )
            if waits or self._census.holds(key):
                self._count(head.seq, head.lane, urgent=bool(head.urgent))
                continue
            self.tail = head.seq
            self._ahead.add(head.seq)
            self._welcome(self._lane(head, fresh=True), head)
        self.tail = max(self.tail, upto)

    def starved(self) -> Gap | None:
        """Return what must be read on of a lane, and may, or None."""
        if not self._starved:
            return None
        lane = self._starved[0]
        if not (self._room_for_urgent if lane.fresh else self.room):
            return None
        upto = max(self.cursor, lane.urgent_upto) if self._ordered else lane.key
        return Gap(lane.key, lane.user, lane.last_seq, upto)

    def read_on(self, gap: Gap, heads: list[Head], *, complete: bool, upto: int = 0) -> None:
        """Take in what was read for *gap*; *complete*: up to its end."""
        lane = self._lanes[gap.key]
        self._starved.remove(lane)
        lane.behind = not complete
        for head in heads:
            if head.seq in self._ahead:  # sent, and not settled yet
                continue
            if head.seq > self.cursor:
                self._ahead.add(head.seq)
                self._census.remove(lane.key)
            self._keep(lane, head)
        lane.last_seq = max(lane.last_seq, upto)
        self._after(lane)

    # --- sending ---

    def take(self, now_s: float, *, fit: Fit = ONE, urgent: bool = False) -> Claim | None:
        """Claim what to send next, and keep its lanes busy until `done`, `again` or `split`.

        *urgent* leaves alone what has no urgent event, nor one waiting behind it.
        """
        self._unpark(now_s)
        first = self._next(urgent=urgent)
        if first is None or isinstance(first, Claim):
            return first
        heads: list[Head] = []
        left_bytes = fit.batch_bytes
        lane: _Lane | Claim | None = first
        while isinstance(lane, _Lane):
            while lane.queue and len(heads) < fit.events:
                if urgent and lane.queue[0].seq > lane.urgent_upto:
                    break
                item_bytes = lane.queue[0].body_bytes + ITEM_BYTES
                if heads and item_bytes > left_bytes:
                    break
                left_bytes -= item_bytes
                heads.append(lane.queue.popleft())
                lane.claimed += 1
            if not lane.claimed:  # it fits into the next one
                self._make_ready(lane, front=True)
                break
            if lane.queue or len(heads) >= fit.events:
                break
            lane = self._next(urgent=urgent, lanes_only=True)
        return Claim.of(heads)

    def is_urgent(self, claim: Claim) -> bool:
        """Return whether an urgent event is in *claim*, or waits behind one that is."""
        return any(map(self._may_always_go, claim.heads))

    def only_urgent(self, claim: Claim) -> Claim:
        """Return the part of *claim* that is urgent; the rest goes back to the front of its lanes."""
        for head in reversed(claim.heads):
            if not self._may_always_go(head):
                self._give_back(head)
        return Claim.of([head for head in claim.heads if self._may_always_go(head)])

    def done(self, heads: Iterable[Head]) -> None:
        """Let the lanes of these events move on: nothing more is to be sent of them."""
        for head in heads:
            lane = self._lanes[self._key(head)]
            lane.claimed -= 1
            self.size -= 1
            if not lane.claimed:
                self._after(lane)

    def again(self, claim: Claim, *, until_s: float | None) -> None:
        """Send *claim* again: behind the other lanes, or not before *until_s*."""
        if until_s is None:
            self._ready.append(claim)
            return
        heapq.heappush(self._parked, (until_s, next(self._tickets), claim))
        self._parked_events += len(claim.heads)
        for key, last_seq in self._last_seqs(claim).items():
            lane = self._lanes[key]
            lane.parked = True
            self._parked_lanes += 1
            if lane.queue:  # what waits behind it is read again when it is settled
                self._drop_queue(lane, last_seq)

    def split(self, claim: Claim, *, at: int | None) -> list[Claim]:
        """Send a refused *claim* of several in parts, at once, and return these.

        *at* is the index of the event that was named, if one was.
        """
        parts, behind = part(claim, self._key, at=at)
        for head in reversed(behind):
            self._give_back(head)
        self._ready.extendleft(reversed(parts))
        return parts

    def settled(self, seqs: Iterable[int]) -> None:
        """These are gone from the outbox: no scan can meet them any more."""
        self._ahead.difference_update(seqs)

    def unpark(self) -> None:
        """End every wait of a single claim."""
        self._unpark(float("inf"))

    def next_at_s(self, *, urgent: bool = False) -> float | None:
        """Return from when `take` has an event: -inf for now, None while all are busy or there is none."""
        if urgent:
            return self._next_urgent_at_s()
        if self._ready or self._fresh:
            return float("-inf")
        return self._parked[0][0] if self._parked else None

    def _next_urgent_at_s(self) -> float | None:
        ready = any(
            self._lanes[key].queue and not self._lanes[key].claimed for key in self._urgent
        ) or any(isinstance(each, Claim) and self.is_urgent(each) for each in self._ready)
        if ready:
            return float("-inf")
        return min(
            (until_s for until_s, _, claim in self._parked if self.is_urgent(claim)),
            default=None,
        )

    @property
    def parked(self) -> int:
        """How many users wait on an event that fails."""
        return self._parked_lanes

    def place(self, seq: int, user: int) -> Place:
        """Return where the event *seq* stands. Looks through all claims that failed."""
        key = user if self._ordered else seq
        lane = self._lanes.get(key)
        urgent = lane is not None and seq <= lane.urgent_upto
        for until_s, _, claim in self._parked:
            if claim.holds(seq):
                return Place(claim, until_s, urgent=urgent)
            in_front = next((head for head in claim.heads if self._key(head) == key), None)
            if in_front is not None:
                return Place(None, until_s, behind=in_front.message_id, urgent=urgent)
        claims = (each for each in self._ready if isinstance(each, Claim))
        return Place(next((each for each in claims if each.holds(seq)), None), urgent=urgent)

    # --- which lane ---

    def _next(self, *, urgent: bool, lanes_only: bool = False) -> _Lane | Claim | None:
        """Remove and return what is ready, fresh lanes and those of the backlog in turn."""
        if urgent:
            return self._next_urgent(lanes_only=lanes_only)
        self._fresh_turn = not self._fresh_turn
        if self._fresh and (self._fresh_turn or not self._ready):
            return self._fresh.popleft()
        if not self._ready or (lanes_only and isinstance(self._ready[0], Claim)):
            return None
        return self._ready.popleft()

    def _next_urgent(self, *, lanes_only: bool) -> _Lane | Claim | None:
        for key in self._urgent:
            lane = self._lanes[key]
            if lane.queue and not lane.claimed:
                queue = self._fresh if lane in self._fresh else self._ready
                queue.remove(lane)
                return lane
        claims = [each for each in self._ready if isinstance(each, Claim) and not lanes_only]
        for claim in claims:
            if self.is_urgent(claim):
                self._ready.remove(claim)
                return claim
        return None

    def _urge(self, user: int, seq: int) -> None:
        """Read this user's events up to the urgent one, before it is their turn."""
        key = user if self._ordered else seq
        lane = self._lanes.get(key)
        if lane is None:
            read_upto = self.cursor if self._ordered else seq - 1
            lane = self._lanes[key] = _Lane(key, user, last_seq=read_upto)
            self._starved.append(lane)
        lane.fresh = lane.behind = True
        self._mark_urgent(lane, seq)
        if lane in self._starved:
            self._starved.remove(lane)
            self._starved.appendleft(lane)

    # --- one lane ---

    def _key(self, head: Head) -> int:
        return head.lane if self._ordered else head.seq

    def _lane(self, head: Head, *, fresh: bool = False) -> _Lane:
        key = self._key(head)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key, head.lane, fresh=fresh)
        return lane

    def _welcome(self, lane: _Lane, head: Head) -> None:
        """Queue a new event; a lane that had none, and none under way, becomes ready."""
        idle = not lane.queue and not lane.claimed
        self._keep(lane, head)
        if idle:
            self._make_ready(lane)

    def _keep(self, lane: _Lane, head: Head) -> None:
        lane.queue.append(head)
        lane.last_seq = head.seq
        self.size += 1
        if head.urgent:
            self._mark_urgent(lane, head.seq)

    def _mark_urgent(self, lane: _Lane, seq: int) -> None:
        lane.urgent_upto = max(lane.urgent_upto, seq)
        self._urgent[lane.key] = None

    def _may_always_go(self, head: Head) -> bool:
        return head.seq <= self._lanes[self._key(head)].urgent_upto

    def _give_back(self, head: Head) -> None:
        """Put a claimed event, the last of its user's there, in front of what waits in its lane."""
        lane = self._lanes[self._key(head)]
        lane.claimed -= 1
        lane.queue.appendleft(head)
        if not lane.claimed:
            self._after(lane)

    def _drop_queue(self, lane: _Lane, last_seq: int) -> None:
        for head in lane.queue:
            self.size -= 1
            self._ahead.discard(head.seq)
            if head.seq > self.cursor:
                self._census.add(lane.key)
        lane.queue.clear()
        lane.last_seq = last_seq
        lane.behind = True

    def _make_ready(self, lane: _Lane, *, front: bool = False) -> None:
        queue: deque[_Lane] | deque[_Lane | Claim] = self._fresh if lane.fresh else self._ready
        if front:
            queue.appendleft(lane)
        else:
            queue.append(lane)

    def _after(self, lane: _Lane) -> None:
        """Put an idle lane where it belongs: ready, starved, or gone."""
        first_seq = lane.queue[0].seq if lane.queue else lane.last_seq + 1
        if first_seq > lane.urgent_upto or not (lane.queue or lane.behind):
            self._urgent.pop(lane.key, None)
        if lane.queue:
            self._make_ready(lane)
        elif lane.behind and lane.fresh:
            self._starved.appendleft(lane)
        elif lane.behind:
            self._starved.append(lane)
        else:
            del self._lanes[lane.key]

    def _last_seqs(self, claim: Claim) -> dict[int, int]:
        return {self._key(head): head.seq for head in claim.heads}

    def _unpark(self, now_s: float) -> None:
        while self._parked and self._parked[0][0] <= now_s:
            _, _, claim = heapq.heappop(self._parked)
            self._parked_events -= len(claim.heads)
            for key in self._last_seqs(claim):
                self._lanes[key].parked = False
                self._parked_lanes -= 1
            self._ready.append(claim)
