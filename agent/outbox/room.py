"""Who is let in: the quota, the disk, and what makes room.

    outbox.max_size   the database's pages in use, with what waits to be stored
    an app's quota    what is pending or dead of what came from it; over it nothing makes room
    the disk          once it was met full, only what fits into free pages, until there is room for
                      the reserve again (outbox.reserve)

Decides inside the writer's transaction, so that what settlements free counts at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import structlog

from agent.clock import Clock
from agent.errors import AppQuotaError, OutboxFullError
from agent.event import Event
from agent.outbox.records import EVENT_OVERHEAD_BYTES, Appended, Policy
from agent.outbox.reserve import Reserve
from agent.outbox.store import Space, Store

_BARE_BYTES = 40 * 1024
"""What an outbox without events takes; an event that does not fit beside it never will."""

_EVICT_LIMIT = 10_000
_PRUNE_LIMIT = 1_000
"""Rows evicted and ids forgotten at once at most, to keep the transaction short."""

_LOOK_AGAIN = 4
"""A quarter of the room is let in before the next look: what an event takes is an estimate."""

Results = list[list[Appended] | OutboxFullError]
"""What became of the events of each call, or why it was refused."""

log = structlog.get_logger()


class Room:
    """The bounds of one outbox. `full` says why the last event was refused; None: one was stored since."""

    def __init__(self, outbox: Path, policy: Policy, clock: Clock) -> None:
        self.full: str | None = None
        self.lacks_disk = False
        """Whether it was the disk that was full, and not the quota."""
        self.reserve = Reserve(outbox, max_bytes=policy.max_bytes)
        self._folder = outbox.parent
        self._policy = policy
        self._clock = clock
        self._evicted = 0
        self._forgotten = 0
        self._plenty_bytes = 0
        """What may be let in before the database is asked again how much room there is."""
        self._plenty_by = policy
        """What says so: another may be adopted at any moment, in the thread of the event loop."""

    def let_in(self, store: Store, calls: Sequence[Sequence[Event]]) -> Results:
        """Store the events of those *calls* that there is room for, each whole or not at all.

        May discard older events, if that is the policy.
        """
        everything = list(chain.from_iterable(calls))
        if self._has_plenty(everything):
            outcomes = iter(store.append(everything))
            return [[next(outcomes) for _ in events] for events in calls]
        store.begin()
        refusals = self._judge(store, calls)
        judged = list(zip(calls, refusals, strict=True))
        admitted = [event for events, refusal in judged if refusal is None for event in events]
        outcomes = iter(store.append(admitted) if admitted else ())
        return [
            [next(outcomes) for _ in events] if refusal is None else refusal
            for events, refusal in judged
        ]

    def look_anew(self) -> None:
        """Ask the database again how much room there is: somebody may have taken some."""
        self._plenty_bytes = 0

    def committed(self) -> None:
        """Say what the committed transaction discarded."""
        if self._evicted:
            log.warning(
                "outbox.events_evicted", events=self._evicted, max_bytes=self._policy.max_bytes
            )
        if self._forgotten:
            log.warning("outbox.delivered_ids_forgotten", ids=self._forgotten, why="outbox full")
        self.rolled_back()

    def rolled_back(self) -> None:
        self._evicted = self._forgotten = 0

    def look_for_room(self, store: Store) -> bool:
        """Return whether there is room again: no app may come to find that out."""
        if not self.reserve.keep():
            return False
        store.touch()  # whoever says so must have written something
        return store.space().used + _BARE_BYTES <= self._policy.max_bytes

    def disk_full(self) -> OutboxFullError:
        """Return the refusal that a full disk means, and remember it."""
        self.lacks_disk = True
        self.full = f"{self._folder}: no space left on the disk; free some"
        return OutboxFullError(self.full)

    def _has_plenty(self, events: Sequence[Event]) -> bool:
        """Return whether there is room for *events* without a look, and take it.

        To look is a call into the database, each time. An event of an app has its quota besides.
        """
        self._plenty_bytes -= _footprint(events)
        return (
            self._plenty_bytes >= 0
            and self._plenty_by is self._policy
            and self.reserve.held
            and not any(event.app for event in events)
        )

    def _judge(
        self, store: Store, calls: Sequence[Sequence[Event]]
    ) -> list[OutboxFullError | None]:
        """Return for each call why its events are refused; None: they may be stored."""
        taken: Counter[str] = Counter()
        tight = self._tight(store, calls)
        # First: nothing is discarded to make room for what is refused all the same.
        over = [self._over_quota(store, events, taken, tight) for events in calls]
        others = [events for events, refusal in zip(calls, over, strict=True) if refusal is None]
        verdicts = iter(self._judge_room(store, others) if others else ())
        return [next(verdicts) if refusal is None else refusal for refusal in over]

    def _tight(self, store: Store, calls: Sequence[Sequence[Event]]) -> set[str]:
        """Return the apps whose quotas have no room for all of *calls*, were they all new."""
        return {
            name
            for name, wanted_bytes in _wanted(chain.from_iterable(calls)).items()
            if (max_bytes := self._policy.quotas.of(name)) is not None
            and store.apps.held_bytes(name) + wanted_bytes > max_bytes
        }

    def _over_quota(
        self, store: Store, events: Sequence[Event], taken: Counter[str], tight: set[str]
    ) -> AppQuotaError | None:
        """Return the refusal that the quota of an app means; else count its events as *taken*."""
        if not tight:
            return None
        if any(event.app in tight for event in events):  # what is known takes no room
            events = store.unknown(events)
        wanted = _wanted(events)
        for name, wanted_bytes in wanted.items():
            max_bytes = self._policy.quotas.of(name)
            held_bytes = store.apps.held_bytes(name) + taken[name]
            if max_bytes is None or held_bytes + wanted_bytes <= max_bytes:
                continue
            remedy = (
                "send again when some of its events were delivered or discarded"
                if wanted_bytes <= max_bytes
                else "they never will: send less at once"
            )
            return AppQuotaError(
                f"app {name}: the outbox holds {held_bytes} of the {max_bytes} bytes that it may,"
                f" and {wanted_bytes} more do not fit; {remedy}, or raise max_size of [apps.{name}]"
                " or outbox.max_size_per_app"
            )
        taken.update(wanted)
        return None

    def _judge_room(
        self, store: Store, calls: Sequence[Sequence[Event]]
    ) -> list[OutboxFullError | None]:
        if self.reserve.keep():
            room_bytes = self._quota_left(store, calls)
        else:
            room_bytes = store.space().free // 2
        verdicts: list[OutboxFullError | None] = []
        for events in calls:
            wanted_bytes = _footprint(events)
            if wanted_bytes <= room_bytes:
                room_bytes -= wanted_bytes
                verdicts.append(None)
            elif store.knows_all(events):  # a replay takes no room, and is answered as ever
                verdicts.append(None)
            else:
                verdicts.append(
                    self._quota_full(store.space()) if self.reserve.held else self.disk_full()
                )
        return verdicts

    def adopt(self, policy: Policy) -> None:
        """Go by *policy* from the next admission on; the reserve stays as large as it is."""
        self._policy = policy

    def _quota_full(self, space: Space) -> OutboxFullError:
        self.lacks_disk = False
        self.full = (
            f"the outbox holds {space.used} of {self._policy.max_bytes} bytes"
            " (outbox.max_size); it takes events again when some were delivered or discarded"
        )
        return OutboxFullError(self.full)

    def _quota_left(self, store: Store, calls: Sequence[Sequence[Event]]) -> int:
        """Return the bytes that may still be stored, having made room as far as the policy lets."""
        policy = self._policy
        max_bytes = policy.max_bytes
        wanted_bytes = sum(
            footprint
            for footprint in map(_footprint, calls)
            if footprint + _BARE_BYTES <= max_bytes
        )
        left_bytes = max_bytes - store.space().used
        self._plenty_bytes = (left_bytes - wanted_bytes) // _LOOK_AGAIN
        self._plenty_by = policy
        while left_bytes < wanted_bytes and self._make_room(store, wanted_bytes - left_bytes):
            left_bytes = max_bytes - store.space().used
        return left_bytes

    def _make_room(self, store: Store, room_bytes: int) -> int:
        """Discard the oldest pending events, if that is the policy; return how many rows went.

        The oldest delivered ids are forgotten, too; without that policy only when nothing is
        pending, for then nothing else would ever make room.
        """
        forgotten = evicted = 0
        if self._policy.evicts or not store.pending():
            forgotten = store.prune(self._clock.wall_ms(), limit=_PRUNE_LIMIT)
        if self._policy.evicts:
            evicted = store.evict(room_bytes, limit=_EVICT_LIMIT)
        self._forgotten += forgotten
        self._evicted += evicted
        return forgotten + evicted


def _wanted(events: Iterable[Event]) -> Counter[str]:
    """Return the bytes that *events* would take, by their apps."""
    wanted: Counter[str] = Counter()
    for event in events:
        if event.app:
            wanted[event.app] += _footprint([event])
    return wanted


def _footprint(events: Sequence[Event]) -> int:
    return sum(len(event.body) + EVENT_OVERHEAD_BYTES for event in events)
