"""What the outbox needs from time to time: expiring, forgetting, giving space back.

In small transactions, so that events are stored and acked in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.clock import Clock
from agent.errors import OutboxError
from agent.outbox.records import Retention
from agent.outbox.writer import Writer

INTERVAL_S = 30.0
"""Ages are configured in minutes to days; half a minute late is on time."""

_ROWS = 500
"""Rows of one transaction."""

_KEPT_BYTES = 4 * 1024 * 1024
"""Free pages that stay for the next events: the file need not shrink and grow all day."""

_VACUUM_BYTES = 1024 * 1024
"""Bytes given back in one transaction."""

log = structlog.get_logger()


async def keep_up(writer: Writer, clock: Clock, retention: Callable[[], Retention]) -> None:
    """Look after the outbox until cancelled, each time by the *retention* of that moment."""
    while True:
        try:
            await tend(writer, clock, retention())
        except OutboxError as exc:
            log.warning("outbox.upkeep_postponed", error=str(exc))
        await asyncio.sleep(INTERVAL_S)


async def tend(writer: Writer, clock: Clock, retention: Retention) -> None:
    """Expire, forget and give back what is due now."""
    now_ms = clock.wall_ms()
    if retention.max_age_s is not None:
        expired = await _expire(writer, now_ms, cutoff_ms=now_ms - int(retention.max_age_s * 1000))
        if expired:
            log.error("outbox.events_expired", events=expired, max_age_s=retention.max_age_s)
    cutoff_ms = now_ms - int(retention.delivered_s * 1000)
    while await writer.perform(lambda store: store.prune(cutoff_ms, limit=_ROWS)) == _ROWS:
        pass
    space = await writer.perform(lambda store: store.space())
    for _ in range(0, space.free - _KEPT_BYTES, _VACUUM_BYTES):
        await writer.perform(lambda store: store.vacuum(_VACUUM_BYTES))


async def _expire(writer: Writer, now_ms: int, *, cutoff_ms: int) -> int:
    expired = 0
    while True:
        n = await writer.perform(lambda store: store.expire(cutoff_ms, now_ms=now_ms, limit=_ROWS))
        expired += n
        if n < _ROWS:
            return expired
