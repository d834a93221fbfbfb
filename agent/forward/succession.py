"""The upstream in force, which may give way to another while attempts are under way.

To the forwarder it is one upstream. What began with the one before ends with it, and only then are
its connections closed. Whoever changes it is the daemon.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from agent.clock import Clock
from agent.forward.disposition import Misconfigured, Outcome
from agent.forward.plan import Target
from agent.forward.upstream import Endpoint, Upstream, open_upstream


class Succession:
    """An `Upstream` whose target can change. Made by `succession`; of no use before `take_over`."""

    def __init__(self, clock: Clock, look: Callable[[], Awaitable[None]]) -> None:
        """*look* is awaited before an attempt that follows on a `Misconfigured`: it may be mended."""
        self._clock = clock
        self._look = look
        self._reigns: list[_Reign] = []
        self._doubted = False

    async def take_over(self, target: Target, *, connections: int) -> None:
        """Send to *target* from now on."""
        resources = AsyncExitStack()
        upstream = await resources.enter_async_context(
            open_upstream(target, self._clock, connections=connections)
        )
        self._reigns.append(_Reign(upstream, resources))
        self._doubted = False
        await self._close_ended()

    async def send(self, endpoint: Endpoint, body: bytes) -> Outcome:
        """Try once to deliver *body*."""
        if self._doubted:
            await self._look()
        reign = self._reigns[-1]
        reign.in_flight += 1
        try:
            outcome = await reign.upstream.send(endpoint, body)
        finally:
            reign.in_flight -= 1
            if reign is not self._reigns[-1]:
                await self._close_ended()
        if reign is self._reigns[-1]:
            self._doubted = isinstance(outcome, Misconfigured)
        return outcome

    async def close(self) -> None:
        """Close the connections, whatever is under way."""
        for reign in self._reigns:
            await reign.resources.aclose()

    async def _close_ended(self) -> None:
        ended = [reign for reign in self._reigns[:-1] if not reign.in_flight]
        self._reigns = [reign for reign in self._reigns if reign not in ended]
        for reign in ended:
            await reign.resources.aclose()


class _Reign:
    """One upstream, with what it holds open and how many attempts it has under way."""

    __slots__ = ("in_flight", "resources", "upstream")

    def __init__(self, upstream: Upstream, resources: AsyncExitStack) -> None:
        self.upstream = upstream
        self.resources = resources
        self.in_flight = 0


@asynccontextmanager
async def succession(
    clock: Clock, look: Callable[[], Awaitable[None]]
) -> AsyncIterator[Succession]:
    """Yield a succession of upstreams, and close the last ones behind the block."""
    upstream = Succession(clock, look)
    try:
        yield upstream
    finally:
        await upstream.close()
