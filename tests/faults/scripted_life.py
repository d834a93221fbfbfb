"""The life that faults are put into: events come in, wait, go out; then a clean stop.

Short, and yet it has every kind of write: appends, settlements, deletions, a checkpoint under way
and one at the end. Each life has a folder, an upstream and clients of its own, so that many can be
lived at once.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from faults.planted import command
from faults.witness import Witness, flaws
from processes import AgentProcess

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox

PATIENCE_S = 60.0
"""For a whole life; what takes longer hangs. Nothing is asserted about time below it."""

_CLIENTS = 3
"""So that commits hold several events, whose clients must all be told when one fails."""

_AGAIN_S = 0.05
"""Between two posts of a client that was refused."""

_MANY = 400
"""More events than any small disk holds, and than fit between a fault and its first failure."""

_FORWARD = """
backoff_base = "50ms"
backoff_max = "200ms"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What an agent that was killed left behind: its files, and what it had promised."""

    outbox: Path
    acknowledged: frozenset[str]
    delivered: frozenset[str]


class Life:
    """An agent, the upstream it delivers to, and who remembers what it acknowledged."""

    def __init__(
        self,
        agent: AgentProcess,
        upstream: Sandbox,
        witness: Witness,
        session: aiohttp.ClientSession,
    ) -> None:
        self.agent = agent
        self.upstream = upstream
        self.witness = witness
        self.session = session
        self._delivered_before: frozenset[str] = frozenset()

    async def play(self) -> None:
        """Play the script with an agent that has started. AssertionError says what went wrong."""
        self.part()
        await self.post(24)
        await self.rejoin()
        await self.post(16)
        await self.drain()
        # Whatever happened so far, and whenever: now it accepts.
        await self.post(1)
        await self.drain()
        assert await self.agent.stop() == 0, f"no clean stop: {self.log()}"

    def part(self) -> None:
        """Take the upstream away."""
        self.upstream.fault = Fault(mode="down")

    async def rejoin(self) -> None:
        """Bring the upstream back."""
        self.upstream.fault = Fault(mode="ok")
        await self.agent.ask("POST", "flush")

    async def post(self, count: int) -> None:
        """Post until *count* more events were acknowledged."""
        goal = len(self.witness.acknowledged) + count
        async with asyncio.TaskGroup() as clients:
            for _ in range(_CLIENTS):
                clients.create_task(self._post_until(goal))
        assert self.agent.alive, f"the agent ended by itself: {self.log()}"

    async def _post_until(self, goal: int) -> None:
        while len(self.witness.acknowledged) < goal and self.agent.alive:
            if await self.witness.post(self.session) != 204:
                await asyncio.sleep(_AGAIN_S)  # an app waits, too

    async def refused(self) -> int:
        """Post until an event is refused; return the answer's status."""
        for _ in range(_MANY):
            status = await self.witness.post(self.session)
            assert status is not None, f"no answer: {self.log()}"
            if status != 204:
                return status
        raise AssertionError(f"none of {_MANY} events was refused")

    async def drain(self) -> None:
        """Return once everything was delivered."""
        await self.drain_to(0)

    async def drain_to(self, pending: int) -> None:
        """Return once so few events wait."""
        await self.agent.until(lambda status: status["pending"] <= pending)

    @property
    def delivered(self) -> set[str]:
        return {arrival.message_id for arrival in self.upstream.stored} | self._delivered_before

    def assert_kept(self) -> None:
        """Compare what was acknowledged with what was delivered, after a life that ended well."""
        acknowledged = self.witness.acknowledged
        lost = self.witness.lost(self.agent.outbox, self.delivered)
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged are lost"
        self.assert_delivered()
        assert flaws(self.agent.outbox) == []
        assert set(self.witness.refused) <= {503, 507}, f"answers: {self.witness.refused}"
        assert not self.witness.refused_for_good, "refused without a Retry-After"

    def assert_delivered(self) -> None:
        """Assert that the upstream has each acknowledged event."""
        missing = self.witness.acknowledged - self.delivered
        assert not missing, f"{len(missing)} acknowledged were not delivered"

    def leave(self) -> Past:
        """Return what an agent that was killed leaves to the next one."""
        return Past(
            outbox=self.agent.outbox,
            acknowledged=frozenset(self.witness.acknowledged),
            delivered=frozenset(self.delivered),
        )

    def inherit(self, past: Past) -> None:
        """Go on from where another life ended."""
        for file in past.outbox.parent.glob(f"{past.outbox.name}*"):
            shutil.copy(file, self.agent.outbox.parent)
        self.witness.acknowledged |= past.acknowledged
        self._delivered_before = past.delivered

    def log(self) -> str:
        """Return the end of what the agent has said."""
        return self.agent.log.read_text()[-2000:]


@asynccontextmanager
async def living(
    folder: Path,
    *,
    seed: int,
    filler_bytes: int = 60_000,
    patience_s: float = PATIENCE_S,
    bug: str | None = None,
) -> AsyncIterator[Life]:
    """Prepare a life in *folder*, with *bug* in the agent; end it with the block.

    *patience_s* bounds each request: a client that is never answered hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  # one local call
    upstream = Sandbox(DEFAULT_WRITE_KEY)
    timeout = aiohttp.ClientTimeout(total=patience_s)
    async with upstream.serving() as url, aiohttp.ClientSession(timeout=timeout) as session:
        agent = AgentProcess(
            folder,
            session,
            upstream=f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"',
            forward=_FORWARD,
        )
        agent.command = command(bug)
        witness = Witness(agent.url, seed, filler_bytes=filler_bytes)
        try:
            yield Life(agent, upstream, witness, session)
        finally:
            if agent.alive:
                await agent.kill()
