"""Reading batches beside single events: one after the other, and each in turns with all else.

A batch may have tens of thousands of events, and takes its memory several times over while it is
read; many at once would take longer and all of the memory.
"""

from __future__ import annotations

import asyncio

from agent.contract import Terms, read_batch
from agent.errors import OutboxOverloadedError
from agent.event import Event

WAITING_BYTES = 64 * 1024 * 1024
"""Batches that may wait to be read: a dozen of the largest, a thousand of the SDKs'."""

_TURN_EVENTS = 128
"""After so many events others have a turn: a millisecond or two of reading."""


class Turns:
    """The batches that are being read, or wait for it."""

    def __init__(self) -> None:
        self._reading = asyncio.Lock()
        self._bytes = 0

    async def read(self, raw: bytes, *, received_ms: int, terms: Terms) -> list[Event]:
        """Return the events of a batch. Raises `InvalidEventError` and `OutboxOverloadedError`."""
        if self._bytes + len(raw) > WAITING_BYTES:
            raise OutboxOverloadedError(
                f"batches of {self._bytes} bytes wait to be read already"
                f" (at most {WAITING_BYTES}); send again shortly"
            )
        self._bytes += len(raw)
        try:
            async with self._reading:
                events: list[Event] = []
                for event in read_batch(raw, received_ms=received_ms, terms=terms):
                    events.append(event)
                    if len(events) % _TURN_EVENTS == 0:
                        await asyncio.sleep(0)
                return events
        finally:
            self._bytes -= len(raw)
