"""`python -m benchmarks.herd`: ten thousand agents get their link back in the same second.

Prints what the agent's policy makes of it beside a naive one, as a table, and draws both. The fleet and
its upstream are simulated (`benchmarks.fleet`); the policy is the agent's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import accumulate
from pathlib import Path

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.fleet import FixedInterval, Fleet, Policy, Scenario, Seconds, Server, ours
from benchmarks.load import percentile

RETURNING_S = 30
"""The first answers to ten thousand probes sent in one second: what happens in it no policy can change."""

NEARLY = 0.02
"""The part of the backlog below which it is nearly drained: from there on there is too little to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy in one scenario."""

    name: str
    scenario: Scenario
    policy: Callable[..., Policy] = ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of it. Times are seconds since the return; *drained_s* None: not within the horizon."""

    name: str
    capacity: float
    seconds: Seconds
    drained_s: int | None
    steady: float
    """Distinct events stored from `RETURNING_S` until nearly drained, as a share of capacity."""
    overall: float
    p50_s: float
    p99_s: float


def measure(run: Run) -> Found:
    """Return what *run* comes to."""
    fleet = Fleet(run.scenario, run.policy)
    fleet.run()
    seconds, capacity = fleet.seconds, run.scenario.server.capacity
    horizon = len(seconds.pending) - 1
    backlog = seconds.pending[0]
    nearly = next((s for s in range(1, horizon) if seconds.pending[s] <= backlog * NEARLY), None)
    until = horizon if nearly is None else nearly
    took_s = sorted(fleet.took_s)
    return Found(
        name=run.name,
        capacity=capacity,
        seconds=seconds,
        drained_s=nearly,
        steady=sum(seconds.stored[RETURNING_S:until]) / (until - RETURNING_S) / capacity,
        overall=sum(seconds.stored[:until]) / until / capacity,
        p50_s=percentile(took_s, 50),
        p99_s=percentile(took_s, 99),
    )


def runs(scenario: Scenario, *, every: bool) -> list[Run]:
    """Return what is compared: ours and the naive one, and *every* other circumstance."""
    pair = [
        Run(name="agent", scenario=scenario),
        Run(name="every 10 s, then 8 at once", scenario=scenario, policy=FixedInterval),
    ]
    if not every:
        return pair
    server = scenario.server
    sheds = replace(server, sheds_over=2 * server.best_at_once)
    asks = replace(sheds, retry_after_s=10.0)
    return [
        *pair,
        Run(name="agent, no early probe", scenario=replace(scenario, noticed=False)),
        Run(name="agent, started in the outage", scenario=replace(scenario, normal_s=0.0)),
        Run(name="agent, upstream sheds (503)", scenario=replace(scenario, server=sheds)),
        Run(name="agent, 503, Retry-After: 10", scenario=replace(scenario, server=asks)),
    ]


def of_size(machines: int, *, seed: int) -> Scenario:
    """Return the scenario for so many machines, and a server that is as large for them as for 10,000."""
    part = machines / 10_000
    whole = Server()
    server = replace(
        whole,
        capacity=whole.capacity * part,
        best_at_once=round(whole.best_at_once * part),
        at_once=round(whole.at_once * part),
        waiting=round(whole.waiting * part),
    )
    return Scenario(machines=machines, server=server, seed=seed)


@click.command()
@click.option("--machines", default=10_000, show_default=True, type=click.IntRange(min=100))
@click.option("--seed", default=1, show_default=True)
@click.option("--every", is_flag=True, help="The other circumstances, too: three times as long.")
@click.option(
    "--png",
    default=Path(__file__).with_name("herd.png"),
    show_default="benchmarks/herd.png",
    type=click.Path(path_type=Path),
    help="Where the plot goes, if matplotlib is here.",
)
def main(*, machines: int, seed: int, every: bool, png: Path) -> None:
    """Let MACHINES get their link back in the same second, and count what their upstream gets done."""
    with ProcessPoolExecutor() as processes:
        found = list(processes.map(measure, runs(of_size(machines, seed=seed), every=every)))
    _print_table(found, machines)
    try:
        _plot(found[:2], machines, png)
    except ImportError:
        click.echo(f"matplotlib is not here: {png} was not drawn")


def _print_table(found: Sequence[Found], machines: int) -> None:
    table = Table(box=SIMPLE, title=f"{machines:,} agents get their link back in the same second")
    table.add_column("policy")
    for column in ("offered/s", "peak", "goodput", "of capacity", "from 30 s on", "drained", "p50"):
        table.add_column(column, justify="right")
    for column in ("p99", "timed out", "repeated", "refused"):
        table.add_column(column, justify="right")
    for each in found:
        seconds = each.seconds
        until = each.drained_s or len(seconds.pending) - 1
        table.add_row(
            each.name,
            f"{sum(seconds.offered[:until]) / until:,.0f}",
            f"{max(seconds.offered):,}",
            f"{sum(seconds.stored[:until]) / until:,.0f}",
            f"{each.overall:.2f}",
            f"{each.steady:.2f}",
            "never" if each.drained_s is None else f"{each.drained_s:,} s",
            f"{each.p50_s:.2f} s",
            f"{each.p99_s:.1f} s",
            f"{sum(seconds.timed_out):,}",
            f"{sum(seconds.duplicates):,}",
            f"{sum(seconds.refused):,}",
        )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    first = found[0]
    console.print(
        f"capacity {first.capacity:,.0f} requests/s, {first.seconds.pending[0]:,} events pending at"
        f" the return; drained: {NEARLY:.0%} of them left; never: not in"
        f" {len(first.seconds.pending) - 1:,} s"
    )


def _plot(found: Sequence[Found], machines: int, png: Path) -> None:
    # Not an import: nothing else wants it, and the table does without.
    import_module("matplotlib").use("Agg")
    plt = import_module("matplotlib.pyplot")
    until = max(each.drained_s or 0 for each in found) + 120
    figure, rows = plt.subplots(3, len(found), figsize=(13, 10), sharex=True, sharey="row")
    figure.suptitle(
        f"{machines:,} agents lost their link for an hour and get it back in the same second (0 s)"
    )
    for each, (load, wait, pending) in zip(found, zip(*rows, strict=True), strict=True):
        seconds = each.seconds
        end = min(until, each.drained_s + 20) if each.drained_s else until
        times = range(end)
        load.set_title(each.name)
        load.axhline(each.capacity, color="black", linestyle=":", label="capacity")
        load.plot(times, seconds.offered[:end], color="tab:orange", lw=0.8, label="offered")
        load.plot(times, seconds.stored[:end], color="tab:green", lw=1.2, label="goodput")
        load.set_yscale("symlog", linthresh=each.capacity)
        load.set_ylabel("requests/s")
        wait.plot(times, seconds.at_once[:end], color="tab:blue", lw=0.8, label="at the upstream")
        lost = [
            sum(second)
            for second in zip(seconds.timed_out, seconds.refused, seconds.duplicates, strict=True)
        ]
        wait.plot(times, lost[:end], color="tab:red", lw=0.8, label="lost work/s")
        wait.set_yscale("symlog", linthresh=100)
        wait.set_ylabel("requests")
        pending.plot(times, seconds.pending[:end], color="tab:purple", label="pending events")
        stored = list(accumulate(seconds.stored[:end]))
        pending.plot(times, stored, color="tab:green", label="stored since")
        pending.set_xlabel("seconds since the link is back")
        for axes in (load, wait, pending):
            axes.grid(alpha=0.3)
            axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=90)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.herd")
