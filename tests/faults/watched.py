"""One agent of a household under load, and what is found wrong with its log and its files meanwhile."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from faults.footprint import Footprint
from faults.households import Household
from faults.onlookers import DIRECTLY, Order
from faults.witness import Witness
from processes import DEADLINE_S, AgentProcess, free_port

from agent.console.sandbox import DEFAULT_WRITE_KEY

LOG_BYTES = 64 * 1024 * 1024
"""What the write-ahead log stays under."""

TROUBLE = re.compile(r"locked|busy|readonly|outbox\.(failed|reopened|close_failed)", re.IGNORECASE)
"""What the agent says when its writer met a reader."""

_POLL_S = 0.1


class Run:
    """An agent, its clients and onlookers, and its files."""

    def __init__(self, home: Household, agent: AgentProcess, witness: Witness) -> None:
        self.home = home
        self.agent = agent
        self.witness = witness
        self.footprint = Footprint(agent.outbox)

    def orders(self) -> list[Order]:
        """Return each way to look, each by everyone: through the daemon, from the file, directly."""
        away = self.home.folder / "away.toml"
        here, there = f"port = {self.agent.port}", f"port = {free_port()}"
        away.write_text(self.agent.config.read_text().replace(here, there))
        return [
            Order(argv, user)
            for argv in (
                ["status", "--json", "--config", str(self.agent.config)],
                ["status", "--json", "--config", str(away)],
                ["list", "--json", "--text", "in no event", "--config", str(away)],
                [DIRECTLY, str(self.agent.outbox)],
            )
            for user in self.home.onlookers
        ]

    def found(self) -> list[str]:
        """Return what the writer, or its files, suffered so far."""
        found = [
            f"log: {line}"
            for line in self.agent.log.read_text().splitlines()
            if TROUBLE.search(line)
        ]
        if self.footprint.largest_log_bytes >= LOG_BYTES:
            found.append(f"log of {self.footprint.largest_log_bytes} bytes")
        found += [f"left behind: {t}" for t in sorted(self.footprint.strange(self.home.owner))]
        return found

    async def last(self, seconds: int) -> None:
        """Return after *seconds*, or as soon as something is found."""
        end_s = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end_s and not self.found():  # noqa: ASYNC110  # other processes
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def running(
    home: Household,
    url: str = "",
    *,
    outbox: str = "",
    bug: str | None = None,
    filler_bytes: int = 20_000,
) -> AsyncIterator[Run]:
    """Make an agent of *home*, not started yet; it is killed with the block if it still runs."""
    upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"' if url else ""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session:
        agent = AgentProcess(home.folder, session, outbox=outbox, upstream=upstream)
        agent.command = home.command(bug)
        run = Run(home, agent, Witness(agent.url, seed=1, filler_bytes=filler_bytes))
        with run.footprint.watched():
            try:
                yield run
            finally:
                if agent.process.returncode is None:
                    await agent.kill()
