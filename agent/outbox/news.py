"""Tells each forwarder that there is something new for it, and no other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class News:
    """One event for each upstream that somebody asked for."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def of(self, upstream: str) -> asyncio.Event:
        """Return what is set when events become pending for *upstream*; whoever waits clears it."""
        return self._events.setdefault(upstream, asyncio.Event())

    def tell(self, upstreams: Iterable[str]) -> None:
        """There are new events for these."""
        for upstream in upstreams:
            if upstream in self._events:
                self._events[upstream].set()

    def set(self) -> None:
        """There may be new events for any."""
        self.tell(self._events)
