"""What waits to be written: the queues, how much they hold, and who waits for which commit.

    append  ─▶ appends   in groups of some MiB            ┐
    settle  ─▶ settles   with them, or few on their own   ├─ future ─▶ resolved or rejected
    perform ─▶ performs  one verb at a time               ┘

Decides what is in the next group and refuses what is too much. Knows no database: `agent.outbox.writer`
takes from here, in the database's thread; all else happens in the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from agent.errors import OutboxError, OutboxFullError, OutboxOverloadedError
from agent.event import Event
from agent.outbox.records import Appended, Settlement
from agent.outbox.room import Results
from agent.outbox.store import Store

T = TypeVar("T")

QUEUE_EVENTS = 4096
"""Events that may wait for a commit. At a commit of 5 ms that is far more than a machine sends."""

QUEUE_BYTES = 64 * 1024 * 1024
"""Bytes that may wait for a commit: a dozen bodies of the largest size."""

_PRESSED_EVENTS = 16
"""From so many events that wait for a commit on, deliveries stand back: apps that post one event
after the other never bring so many, unless there are more of them."""

_GROUP_BYTES = 4 * 1024 * 1024
"""Bytes of one transaction: bounds the write-ahead log and the wait of the last one in it."""


@dataclass(slots=True)
class Append:
    events: Sequence[Event]
    body_bytes: int
    done: asyncio.Future[list[Appended]]


@dataclass(slots=True)
class Settle:
    settlements: Sequence[Settlement]
    done: asyncio.Future[None]


@dataclass(slots=True)
class Perform(Generic[T]):
    verb: Callable[[Store], T]
    done: asyncio.Future[T]


@dataclass(frozen=True, slots=True)
class Group:
    """What is committed together."""

    appends: Sequence[Append] = ()
    settles: Sequence[Settle] = ()

    @property
    def empty(self) -> bool:
        return not self.appends and not self.settles


class Intake:
    """The queues in front of the database."""

    def __init__(self) -> None:
        self._appends: deque[Append] = deque()
        self._settles: deque[Settle] = deque()
        self._performs: deque[Perform[Any]] = deque()
        self._events = 0
        self._bytes = 0
        """What is in `_appends`, and in the group that is being committed."""

    # --- what comes in ---

    def append(self, events: Sequence[Event]) -> asyncio.Future[list[Appended]]:
        """Queue *events*. Raises `OutboxOverloadedError`."""
        body_bytes = sum(len(event.body) for event in events)
        # A batch that never fits gets in beside what does: to be alone it would have to wait for ever.
        oversized = len(events) > QUEUE_EVENTS or body_bytes > QUEUE_BYTES
        events_more, bytes_more = (1, 1) if oversized else (len(events), body_bytes)
        if self._events + events_more > QUEUE_EVENTS or self._bytes + bytes_more > QUEUE_BYTES:
            raise OutboxOverloadedError(
                f"{self._events} events wait to be stored already"
                f" (at most {QUEUE_EVENTS}, {QUEUE_BYTES} bytes); send again shortly"
            )
        job = Append(events, body_bytes, asyncio.get_running_loop().create_future())
        self._events += len(events)
        self._bytes += body_bytes
        self._appends.append(job)
        return job.done

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        job = Settle(settlements, asyncio.get_running_loop().create_future())
        self._settles.append(job)
        return job.done

    def perform(self, verb: Callable[[Store], T]) -> asyncio.Future[T]:
        job = Perform(verb, asyncio.get_running_loop().create_future())
        self._performs.append(job)
        return job.done

    # --- what waits ---

    @property
    def pressed(self) -> bool:
        """Whether so many events wait that deliveries should stand back."""
        return self._events > _PRESSED_EVENTS

    @property
    def appends(self) -> bool:
        return bool(self._appends)

    @property
    def settles(self) -> bool:
        return bool(self._settles)

    @property
    def performs(self) -> bool:
        return bool(self._performs)

    # --- what is taken ---

    def take_group(self, *, settles: int | None) -> Group:
        """Take what is committed next, with so many *settles* at most; None: with all."""
        return Group(self._take_appends(), self._take_settles(settles))

    def _take_appends(self) -> list[Append]:
        taken: list[Append] = []
        group_bytes = 0
        while self._appends and group_bytes < _GROUP_BYTES:
            job = self._appends.popleft()
            group_bytes += job.body_bytes
            taken.append(job)
        return taken

    def _take_settles(self, limit: int | None) -> list[Settle]:
        waiting = len(self._settles)
        count = waiting if limit is None else min(limit, waiting)
        return [self._settles.popleft() for _ in range(count)]

    def take_perform(self) -> Perform[Any]:
        return self._performs.popleft()

    # --- what becomes of it ---

    def committed(self, group: Group, results: Results) -> None:
        """Answer those who waited for a commit that is synced."""
        self._forget(group.appends)
        for job, result in zip(group.appends, results, strict=True):
            if isinstance(result, OutboxFullError):
                reject(job.done, result)
            else:
                resolve(job.done, result)
        for settle in group.settles:
            resolve(settle.done, None)

    def rolled_back(self, group: Group) -> None:
        """Queue the settlements of a group again that was not committed; its appends are over."""
        self._settles.extendleft(reversed(group.settles))
        self._forget(group.appends)

    def refuse_all(self, exc: OutboxError) -> None:
        """Refuse what waits, but for the settlements: they are what has happened already."""
        self._forget(self._appends)
        refuse(self._appends, exc)
        self._appends.clear()
        while self._performs:
            reject(self._performs.popleft().done, exc)

    def abandon_settles(self) -> None:
        """Those events stay pending and are sent again after the next start."""
        while self._settles:
            self._settles.popleft().done.cancel()

    def _forget(self, appends: Iterable[Append]) -> None:
        for job in appends:
            self._events -= len(job.events)
            self._bytes -= job.body_bytes


def refuse(jobs: Iterable[Append], exc: OutboxError) -> None:
    for job in jobs:
        reject(job.done, exc)


def resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # its caller was cancelled
        future.set_result(result)


def reject(future: asyncio.Future[T], exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)
