"""A machine that crashes again and again, while apps post and the agent forwards.

Owns one cycle (start, work, crash, look) and the comparison after it. What a crash is, the proofs
say: a kill -9 (`test_kill`), a power cut (`test_power_cut`).
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from faults import planted, witness
from processes import DEADLINE_S, AgentProcess

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox

CLIENTS = 8

EVENTS = 100
"""Acknowledged in one cycle at most: some hundred milliseconds of posting."""

START_CRASHES = 0.2
"""The share of cycles that end while the agent starts."""

START_S = 0.5
"""How long a start takes, until one was measured."""

START_PART = (0.4, 1.2)
"""When a start is crashed, as parts of the last one; before, Python is only importing."""

COMMIT_S = 0.005
"""About one commit: the crash comes anywhere in it, not just after an answer."""

FAULTS = (
    Fault(mode="ok"),
    Fault(mode="slow", delay_s=0.05),
    Fault(mode="cut_after"),
    Fault(mode="status", status=500),
    Fault(mode="down"),
    Fault(mode="down"),
)
"""What the upstream does in a cycle. It must often take nothing: what it has cannot be lost."""

FORWARD = """
backoff_base = "50ms"
backoff_max = "400ms"
"""

AT_ONCE = 2
"""Machines that run side by side: each waits for its agent to start most of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a start went: *ready_s* from the new process to the first 200 of /readyz.

    *queued_s* of it the agent could have run, but other processes had the processors.
    """

    ready_s: float
    queued_s: float

    @property
    def own_s(self) -> float:
        return self.ready_s - self.queued_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """What was found after one life of the agent.

    *start* is None where the crash came into it. *acknowledged* counts from the machine's first
    life on. *altered* are ids that reached the upstream with two different bodies; an empty one
    stands for a body in which the upstream found no event.
    """

    seed: int
    number: int
    start: Start | None
    acknowledged: int
    lost: frozenset[str]
    altered: frozenset[str]
    flaws: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        return not (self.lost or self.altered or self.flaws)


class Machine:
    """One outbox and its agent, the apps that post to it, and the upstream. Made by `machine`."""

    def __init__(
        self,
        agent: AgentProcess,
        sandbox: Sandbox,
        *,
        seed: int,
        crash: Callable[[AgentProcess], Awaitable[None]],
    ) -> None:
        self._agent = agent
        self._sandbox = sandbox
        self._seed = seed
        self._crash = crash
        self._rng = random.Random(seed)
        self._witness = witness.Witness(agent.url, seed)
        self._number = 0
        self._start_s = START_S

    async def cycle(self) -> Cycle:
        """Start the agent among posting apps, crash it at a random moment, look at what is left."""
        self._sandbox.fault = self._rng.choice(FAULTS)
        async with self._witness.posting(CLIENTS):
            if self._rng.random() < START_CRASHES:
                start = None
                await self._agent.launch()
                await asyncio.sleep(self._start_s * self._rng.uniform(*START_PART))
            else:
                start = await self._start()
                await self._work()
            await self._crash(self._agent)
            await self._witness.hear_out()
        return self._look(start, drained=False)

    async def live(self, cycles: int) -> list[Cycle]:
        """Crash so many times, then drain; return what was found each time."""
        return [*[await self.cycle() for _ in range(cycles)], await self.drain()]

    async def loses(self, *, within: int) -> bool:
        """Return whether something acknowledged is lost in one of so many cycles."""
        for _ in range(within):
            if (await self.cycle()).lost:
                return True
        return False

    async def drain(self) -> Cycle:
        """Start the agent once more, let it deliver everything and stop in order."""
        self._sandbox.fault = Fault(mode="ok")
        start = await self._start()
        pending: float = math.inf

        def is_less(status: dict[str, Any]) -> bool:
            return bool(status["pending"] < pending)

        while pending:  # each step has a deadline; how many there are is open
            pending = (await self._agent.until(is_less))["pending"]
        assert await self._agent.stop() == 0
        return self._look(start, drained=True)

    async def _start(self) -> Start:
        spawned_s = time.monotonic()
        await self._agent.start()
        self._start_s = time.monotonic() - spawned_s
        return Start(ready_s=self._start_s, queued_s=_queued_s(self._agent.process.pid))

    async def _work(self) -> None:
        """Return at a random moment, after some events were acknowledged."""
        wanted = len(self._witness.acknowledged) + self._rng.randint(1, EVENTS)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._witness.reach(wanted)
        except TimeoutError:
            log = self._agent.log.read_text()[-2000:]
            raise AssertionError(f"accepts no more: {self._witness.refused}\n{log}") from None
        await asyncio.sleep(self._rng.uniform(0, COMMIT_S))

    def _look(self, start: Start | None, *, drained: bool) -> Cycle:
        """Compare what is left with what was acknowledged; *drained*: upstream alone must have it."""
        self._number += 1
        delivered = {arrival.message_id for arrival in self._sandbox.stored}
        missing = frozenset(self._witness.acknowledged - delivered)
        lost: frozenset[str] = frozenset()
        flaws: tuple[str, ...] = ()
        if self._witness.acknowledged:  # until then the outbox may be half made
            with _copied(self._agent.outbox) as outbox:
                try:
                    lost = frozenset(self._witness.lost(outbox, delivered))
                    flaws = tuple(witness.flaws(outbox))
                except sqlite3.Error as exc:
                    lost, flaws = missing, (str(exc),)
        return Cycle(
            seed=self._seed,
            number=self._number,
            start=start,
            acknowledged=len(self._witness.acknowledged),
            lost=missing if drained else lost,
            altered=self._altered(),
            flaws=flaws,
        )

    def _altered(self) -> frozenset[str]:
        bodies = {"": b""}
        return frozenset(
            arrival.message_id
            for arrival in self._sandbox.arrivals
            if bodies.setdefault(arrival.message_id, arrival.body) != arrival.body
        )


def _queued_s(pid: int) -> float:
    """Return how long the threads of *pid* could have run so far, but other processes did.

    Source: Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.
    """
    queued_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        _ran_ns, waited_ns, _slices = (task / "schedstat").read_text().split()
        queued_ns += int(waited_ns)
    return queued_ns / 1e9


@contextmanager
def _copied(outbox: Path) -> Iterator[Path]:
    """Copy the database and its log: whoever opens them recovers them, and that is for the agent."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (outbox, outbox.with_name(f"{outbox.name}-wal")):
            if path.exists():
                shutil.copy(path, folder)
        yield Path(folder, outbox.name)


@asynccontextmanager
async def machine(
    folder: Path,
    *,
    seed: int,
    crash: Callable[[AgentProcess], Awaitable[None]],
    outbox: Path | None = None,
    bug: str | None = None,
) -> AsyncIterator[Machine]:
    """Have a new machine with its files in *folder*, its agent not started yet.

    *crash* ends the agent's process, and whatever else. *outbox* may lie elsewhere, *bug* be one of
    `planted.BUGS`.
    """
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with sandbox.serving() as url, aiohttp.ClientSession(timeout=timeout) as session:
        agent = AgentProcess(folder, session, upstream=_upstream(url), forward=FORWARD)
        agent.command = planted.command(bug)
        agent.outbox = outbox or agent.outbox
        agent.environ["TRANTHOR_AGENT_OUTBOX__PATH"] = str(agent.outbox)
        try:
            yield Machine(agent, sandbox, seed=seed, crash=crash)
        finally:
            with suppress(ProcessLookupError):  # it has ended
                await agent.kill()


def _upstream(url: str) -> str:
    return f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\ntimeout = "1s"'


async def side_by_side(
    machines: int, life: Callable[[int], Coroutine[Any, Any, list[Cycle]]]
) -> list[Cycle]:
    """Run *life* for each machine, given its number as seed; return all their cycles."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def live(seed: int) -> list[Cycle]:
        async with slots:
            return await life(seed)

    async with asyncio.TaskGroup() as running:
        lives = [running.create_task(live(seed)) for seed in range(machines)]
    return [cycle for one in lives for cycle in one.result()]
