"""Runs of the agent under one load, of which the figures are made, and what each must hold to count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load, machine
from benchmarks.bench import Bench
from benchmarks.events import BODY_BYTES
from benchmarks.load import Load
from benchmarks.processes import Agent, FigureError
from benchmarks.upstream import upstream

DRAIN_DEADLINE_S = 300.0
"""For what a load has left pending; a hundred thousand events at a few hundred a second."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Events a second, and the processor seconds that each took."""

    rate: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Ingested:
    load: Load
    pace: Pace


def ingest(bench: Bench, agent: Agent) -> Ingested:
    """Load a warm agent at full speed; every event that was answered must be in its books."""
    bench.warm_up(agent.port)
    before: int = agent.status()["accepted"]
    before_s = machine.cpu_s(agent.pid)
    seen = bench.full_speed(agent.port)
    cpu_s = machine.cpu_s(agent.pid) - before_s
    after = agent.status()
    if (stored := after["accepted"] - before) < seen.answered:
        raise FigureError(f"{seen.answered} events were answered 204, {stored} stored")
    if after["duplicates"]:
        raise FigureError(f"{after['duplicates']} ids came twice: the generator repeats itself")
    return Ingested(seen, Pace(seen.rate, cpu_s / seen.answered))


def batches(bench: Bench, agent: Agent, *, gzipped: bool = False) -> Pace:
    """Load a warm agent with requests of 100; each event must be in its books."""
    bench.warm_up(agent.port)
    count = bench.scale.batched_events
    before: int = agent.status()["accepted"]
    before_s = machine.cpu_s(agent.pid)
    seen = load.in_batches(agent.port, count, bench.seed, gzipped=gzipped).checked()
    cpu_s = machine.cpu_s(agent.pid) - before_s
    if (stored := agent.status()["accepted"] - before) < count:
        raise FigureError(f"{count} events were answered 204, {stored} stored")
    return Pace(count / seen.seconds, cpu_s / count)


def drain(bench: Bench, count: int, mode: str = "track", *, beside_dead: bool = False) -> Pace:
    """Drain a backlog of *count* events; each must arrive once.

    *beside_dead*: each waits for an upstream that never answers, too, in turn with the others.
    """
    with (
        upstream() as server,
        bench.agent(
            upstream_port=server.port, backlog=count, mode=mode, beside_dead=beside_dead
        ) as agent,
    ):
        before_s = machine.cpu_s(agent.pid)
        rate = server.drain_rate(count)
        agent.until_delivered(deadline_s=DRAIN_DEADLINE_S)
        if (arrived := server.arrivals().count) != count:
            raise FigureError(f"{arrived} events arrived of {count}: some came twice")
        return Pace(rate, (machine.cpu_s(agent.pid) - before_s) / count)


def written_per_byte(bench: Bench, post: Callable[[Agent], object]) -> float:
    """Return bytes written for each byte of event, from ready to the end of the process.

    To the end, because the write-ahead log is copied into the database from time to time and when
    the agent stops: what was written without it would be half of the story.
    """
    with upstream() as server, bench.agent(upstream_port=server.port) as agent:
        before = agent.written_bytes()
        post(agent)
        status = agent.until_delivered(deadline_s=DRAIN_DEADLINE_S)
        written = agent.stop() - before
        delivered: int = status["delivered"]
        return written / (delivered * BODY_BYTES)


# --- B4 -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Above:
    """One round of B4, on one outbox. Rates in events/s, memory in MB."""

    ready_s: float
    ingest: float
    drain: float
    peak_ingest_mb: float
    rest_ingest_mb: float
    peak_drain_mb: float
    rest_drain_mb: float


def above(bench: Bench, backlog: int) -> Above:
    """Start, ingest and drain on top of a backlog; without one the drain has an outbox of its own."""
    with bench.outbox(backlog) as outbox:
        with bench.agent_on(outbox) as agent:
            ready_s = agent.ready_s
            rate = ingest(bench, agent).pace.rate
            ingesting = _at_rest(agent)
        if backlog:
            drain_rate, draining = _drain_first(bench, outbox)
    if not backlog:
        with bench.outbox(bench.scale.drained_events) as outbox:
            drain_rate, draining = _drain_first(bench, outbox)
    return Above(
        ready_s=ready_s,
        ingest=rate,
        drain=drain_rate,
        peak_ingest_mb=ingesting.peak,
        rest_ingest_mb=ingesting.rss,
        peak_drain_mb=draining.peak,
        rest_drain_mb=draining.rss,
    )


def _drain_first(bench: Bench, outbox: Path) -> tuple[float, machine.Memory]:
    with upstream() as server, bench.agent_on(outbox, server.port) as agent:
        rate = server.drain_rate(bench.scale.drained_events)
        memory = _at_rest(agent)
        agent.kill()
        return rate, memory


def _at_rest(agent: Agent) -> machine.Memory:
    """Return the memory a moment after a load; its peak is that of the load."""
    time.sleep(1)
    return agent.memory()
