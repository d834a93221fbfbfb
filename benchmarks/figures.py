"""The figures, B1 to B12: what is run against what. Each returns the rows of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks import filling, load, machine, references
from benchmarks.bench import Bench, say
from benchmarks.load import Load
from benchmarks.processes import Agent, FigureError, serving
from benchmarks.rows import Row, Target
from benchmarks.runs import (
    Above,
    Ingested,
    Pace,
    above,
    batches,
    drain,
    ingest,
    written_per_byte,
)
from benchmarks.stalled import STALLED
from benchmarks.upstream import upstream

FIRST_B7 = 109.0
"""Bytes written for each byte of event at 1 event/s, as first measured; the target is half of it."""

RATE = 100.0
"""Requests a second of B5."""


def b1(bench: Bench) -> list[Row]:
    """Durable single events over HTTP, the upstream down, against HTTP alone."""

    def agent() -> Pace:
        with bench.agent() as running:
            return ingest(bench, running).pace

    with references.app() as app:

        def reference() -> Pace:
            bench.warm_up(app.port)
            before_s = machine.cpu_s(app.pid)
            seen = bench.full_speed(app.port)
            return Pace(seen.rate, (machine.cpu_s(app.pid) - before_s) / seen.answered)

        ours, theirs = bench.side_by_side("B1", agent, reference)
    subject = "single events, 64 connections / bare aiohttp application"
    return [_rate("B1", subject, _rates(ours), _rates(theirs), 0.85), _cpu("B1", ours, theirs)]


def b2(bench: Bench) -> list[Row]:
    """Durable events in requests of 100 over HTTP, against SQLite alone."""
    count = bench.scale.batched_events

    def agent() -> float:
        with bench.agent() as running:
            return batches(bench, running).rate

    with bench.outbox() as like:
        filling.fill(like, count, bench.seed)

        def reference() -> float:
            with bench.outbox() as outbox:
                return references.executemany(like, outbox, count)

        ours, theirs = bench.side_by_side("B2", agent, reference)
    subject = "requests of 100 / executemany of the same rows"
    return [_rate("B2", subject, ours, theirs, 0.5)]


def b3(bench: Bench) -> list[Row]:
    """A backlog, drained to an upstream that costs nothing, against a bare client."""
    count = bench.scale.drained_events

    def reference() -> Pace:
        with upstream() as server:
            cpu_s = references.post_all(server.port, count, bench.seed)
            return Pace(server.drain_rate(count), cpu_s / count)

    ours, theirs = bench.side_by_side("B3", lambda: drain(bench, count), reference)
    subject = f"drain of {count:,} pending / bare aiohttp client"
    return [_rate("B3", subject, _rates(ours), _rates(theirs), 0.85), _cpu("B3", ours, theirs)]


def b4(bench: Bench) -> list[Row]:
    """B1 and B3 on top of a large backlog, against themselves on an empty outbox."""
    backlog = bench.scale.backlog_events
    ours, theirs = bench.side_by_side("B4", lambda: above(bench, backlog), lambda: above(bench, 0))
    over = [
        max(full.peak_ingest_mb - bare.rest_ingest_mb, full.peak_drain_mb - bare.rest_drain_mb)
        for full, bare in zip(ours, theirs, strict=True)
    ]
    under = f"{backlog:,} pending"
    return [
        _rate("B4", f"ingest, {under} / empty", _of(ours, "ingest"), _of(theirs, "ingest"), 0.9),
        _rate(
            "B4",
            f"drain of the first {bench.scale.drained_events:,} of {under} / of no more",
            _of(ours, "drain"),
            _of(theirs, "drain"),
            0.9,
        ),
        Row(
            figure="B4",
            subject=f"start to ready, {under}",
            unit="s",
            agent=_of(ours, "ready_s"),
            target=Target(most=1.0),
            note=f"on an empty outbox {_list(_of(theirs, 'ready_s'))} s",
        ),
        Row(
            figure="B4",
            subject=f"memory over idle, {under}",
            unit="MB",
            agent=over,
            target=Target(most=10.0),
            note=(
                "peak resident size (VmHWM) from the start through the load with the backlog,"
                " less the resident size at rest after the same load without; the larger of ingest"
                f" ({_list(_of(ours, 'peak_ingest_mb'))} less"
                f" {_list(_of(theirs, 'rest_ingest_mb'))}) and drain"
                f" ({_list(_of(ours, 'peak_drain_mb'))} less"
                f" {_list(_of(theirs, 'rest_drain_mb'))})"
            ),
        ),
    ]


def b5(bench: Bench) -> list[Row]:
    """The slowest hundredth of the answers at 100 requests/s, against that of one commit each."""
    seconds = bench.scale.latency_s
    count = round(RATE * seconds)

    def agent() -> Load:
        with bench.agent() as running:
            return load.at_rate(running.port, RATE, seconds).checked()

    with bench.outbox() as like:
        filling.fill(like, count, bench.seed)

        def reference() -> Load:
            with bench.outbox() as outbox:
                return references.commits(like, outbox, count, RATE, seconds)

        ours, theirs = bench.side_by_side("B5", agent, reference)
    p50 = [run.p50_ms for run in ours], [run.p50_ms for run in theirs]
    return [
        Row(
            figure="B5",
            subject="p99 of the answer at 100/s / p99 of one commit of the row",
            unit="ms",
            agent=[run.p99_ms for run in ours],
            reference=[run.p99_ms for run in theirs],
            target=Target(most=2.0),
            note=f"p50 {_list(p50[0])} ms and {_list(p50[1])} ms; from the time each was due",
        )
    ]


def b6(bench: Bench) -> list[Row]:
    """What the agent takes while there is nothing to do."""
    seconds = bench.scale.idle_s
    with upstream() as server, bench.agent(upstream_port=server.port) as agent:
        say(f"B6: {bench.scale.settle_s:.0f} s to settle, then {seconds:.0f} s idle")
        time.sleep(bench.scale.settle_s)
        written, cpu_s, started_s = (
            agent.written_bytes(),
            machine.cpu_s(agent.pid),
            time.monotonic(),
        )
        time.sleep(seconds)
        share = (machine.cpu_s(agent.pid) - cpu_s) / (time.monotonic() - started_s) * 100
        written = agent.written_bytes() - written
        memory = agent.memory()
    idle = f"idle for {seconds:.0f} s"
    return [
        Row(
            figure="B6",
            subject=f"resident, {idle}",
            unit="MB",
            agent=[memory.rss],
            target=Target(most=45.0),
            note=f"PSS {memory.pss:.1f}, USS {memory.uss:.1f} MB",
        ),
        Row(
            figure="B6",
            subject=f"written to disk, {idle}",
            unit="bytes",
            agent=[written],
            target=Target(most=0),
        ),
        Row(
            figure="B6",
            subject=f"of one core, {idle}",
            unit="%",
            agent=[share],
            target=Target(most=0.2),
            note="by the tick of 10 ms",
        ),
    ]


def b7(bench: Bench) -> list[Row]:
    """Bytes written to disk for each byte of event that was accepted and delivered."""
    if machine.is_memory(bench.folder):
        raise FigureError(f"{bench.folder} lies in memory; choose another --folder")
    seconds = bench.scale.slow_s

    def slowly(agent: Agent) -> None:
        load.at_rate(agent.port, 1.0, seconds).checked()

    say(f"B7: {seconds:.0f} s at 1 event/s, then at full speed")
    slow = written_per_byte(bench, slowly)
    fast = written_per_byte(bench, lambda agent: ingest(bench, agent))
    return [
        Row(
            figure="B7",
            subject="bytes written for a byte of event at 1 event/s",
            unit="x",
            agent=[slow],
            target=Target(most=FIRST_B7 / 2),
            note=f"half of what was first measured, {FIRST_B7:g}",
        ),
        Row(
            figure="B7",
            subject="bytes written for a byte of event at full speed",
            unit="x",
            agent=[fast],
        ),
    ]


def b8(bench: Bench) -> list[Row]:
    """Ingest while the backlog drains, against ingest on the same backlog without an upstream."""
    backlog = bench.scale.drained_events
    drained: list[float] = []

    def draining() -> Ingested:
        with upstream() as server, bench.agent(upstream_port=server.port, backlog=backlog) as agent:
            before, started_s = server.arrivals().count, time.monotonic()
            seen = ingest(bench, agent)
            drained.append((server.arrivals().count - before) / (time.monotonic() - started_s))
            if not agent.status()["pending"]:
                raise FigureError("all was drained before the end; it takes a larger backlog")
            agent.kill()  # what is left need not be drained
            return seen

    def alone() -> Ingested:
        with bench.agent(backlog=backlog) as agent:
            return ingest(bench, agent)

    ours, theirs = bench.side_by_side("B8", draining, alone)
    return [
        _rate(
            "B8",
            "ingest while draining / ingest alone",
            [run.pace.rate for run in ours],
            [run.pace.rate for run in theirs],
            0.5,
            note=f"{_list(drained)} events/s were drained meanwhile",
        ),
        Row(
            figure="B8",
            subject="p99 of the answer while draining, 64 connections",
            unit="ms",
            agent=[run.load.p99_ms for run in ours],
            target=Target(most=250.0),
            note=f"{_list([run.load.p99_ms for run in theirs])} ms alone",
        ),
    ]


def b9(bench: Bench) -> list[Row]:
    """A backlog, drained in batches, against the same one event a request, and a bare client."""
    count = bench.scale.drained_events

    def bare() -> Pace:
        with upstream() as server:
            cpu_s = references.post_batches(server.port, count, bench.seed)
            return Pace(server.drain_rate(count), cpu_s / count)

    def both() -> tuple[Pace, Pace]:
        return drain(bench, count), bare()

    ours, theirs = bench.side_by_side("B9", lambda: drain(bench, count, "batch"), both)
    single, prebuilt = [pair[0] for pair in theirs], [pair[1] for pair in theirs]
    return [
        _rate("B9", "drain in batches / one event a request", _rates(ours), _rates(single), 8),
        Row(
            figure="B9",
            subject="drain in batches / bare client posting prebuilt ones",
            unit="/s",
            agent=_rates(ours),
            reference=_rates(prebuilt),
        ),
        _cpu("B9", ours, single),
    ]


def b10(bench: Bench) -> list[Row]:
    """A backlog, drained beside one of the same size for an upstream that is dead, against alone."""
    count = bench.scale.drained_events
    ours, theirs = bench.side_by_side(
        "B10", lambda: drain(bench, count, beside_dead=True), lambda: drain(bench, count)
    )
    subject = f"drain of {count:,} pending beside as many for a dead upstream / alone"
    return [_rate("B10", subject, _rates(ours), _rates(theirs), 0.9), _cpu("B10", ours, theirs)]


def b11(bench: Bench) -> list[Row]:
    """Durable events in requests of 100, against one a request; and the same compressed."""

    def in_batches(*, gzipped: bool) -> Pace:
        with bench.agent() as running:
            return batches(bench, running, gzipped=gzipped)

    def others() -> tuple[Pace, Pace]:
        with bench.agent() as running:
            return ingest(bench, running).pace, in_batches(gzipped=True)

    plain, theirs = bench.side_by_side("B11", lambda: in_batches(gzipped=False), others)
    single, gzipped = [pair[0] for pair in theirs], [pair[1] for pair in theirs]
    return [
        _rate("B11", "requests of 100 / one event a request", _rates(plain), _rates(single), 10),
        _cpu("B11", plain, single),
        Row(
            figure="B11",
            subject="requests of 100, gzip / the same plain",
            unit="/s",
            agent=_rates(gzipped),
            reference=_rates(plain),
        ),
        _cpu("B11", gzipped, plain),
    ]


def b12(bench: Bench) -> list[Row]:
    """The slowest hundredth of the answers at 100 requests/s while clients stall, against without."""
    # Twice as long, for all that stall together are cut off together, some ten seconds later.
    seconds = 2 * bench.scale.latency_s

    def beside() -> Load:
        with bench.agent() as running, serving("benchmarks.stalled", running.port):
            return load.at_rate(running.port, RATE, seconds).checked()

    def alone() -> Load:
        with bench.agent() as running:
            return load.at_rate(running.port, RATE, seconds).checked()

    ours, theirs = bench.side_by_side("B12", beside, alone)
    subject = f"p99 of the answer at 100/s beside {STALLED} stalled connections"
    p99_ms = [run.p99_ms for run in ours]
    return [
        Row(
            figure="B12",
            subject=subject,
            unit="ms",
            agent=p99_ms,
            target=Target(most=200.0),
            note=f"p50 {_list([run.p50_ms for run in ours])} ms",
        ),
        Row(
            figure="B12",
            subject=f"{subject} / without any",
            unit="ms",
            agent=p99_ms,
            reference=[run.p99_ms for run in theirs],
        ),
    ]


FIGURES: Mapping[str, Callable[[Bench], list[Row]]] = {
    "B1": b1,
    "B2": b2,
    "B3": b3,
    "B4": b4,
    "B5": b5,
    "B6": b6,
    "B7": b7,
    "B8": b8,
    "B9": b9,
    "B10": b10,
    "B11": b11,
    "B12": b12,
}


# --- how they are written down -------------------------------------------------------------------


def _rate(
    figure: str,
    subject: str,
    agent: list[float],
    reference: list[float],
    least: float,
    note: str = "",
) -> Row:
    return Row(
        figure=figure,
        subject=subject,
        unit="/s",
        agent=agent,
        reference=reference,
        target=Target(least=least),
        note=note,
    )


def _rates(paces: list[Pace]) -> list[float]:
    return [pace.rate for pace in paces]


def _cpu(figure: str, agent: list[Pace], reference: list[Pace]) -> Row:
    """Return what the rate of one process comes down to; a busy machine hardly changes this."""
    return Row(
        figure=figure,
        subject="processor time for each event of these",
        unit="us",
        agent=[pace.cpu_s * 1e6 for pace in agent],
        reference=[pace.cpu_s * 1e6 for pace in reference],
    )


def _of(rounds: list[Above], name: str) -> list[float]:
    return [getattr(measured, name) for measured in rounds]


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
