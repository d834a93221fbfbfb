"""`python -m benchmarks`: how fast the agent is against what it is built of, as one table.

Each figure is measured side by side with its reference, in turn, and the median of the rounds is
shown with its spread: a ratio means something on a busy machine where an absolute value does not.
README.md beside this file says what each figure is.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks import load, machine
from benchmarks.bench import DEEP, FULL, QUICK, Bench, Scale, say
from benchmarks.figures import FIGURES
from benchmarks.processes import FigureError
from benchmarks.rows import Failure, Row, print_table

QUIET_CORES = 0.2
"""What other programs may take; more changes a ratio where one side waits and the other computes."""


@click.command()
@click.argument("figures", nargs=-1, type=click.Choice(list(FIGURES), case_sensitive=False))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--deep", is_flag=True, help="10,000,000 pending in B4, longer B5 and B7: an hour.")
@click.option("--quick", is_flag=True, help="Tiny: shows that it runs; the figures mean nothing.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all rounds here.")
@click.option(
    "--folder",
    default=Path("/var/tmp"),  # noqa: S108  # a folder of its own is made in it
    show_default=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where outboxes are made: on the disk in question, not in memory.",
)
@click.option("--python-load", is_flag=True, help="Do without wrk even if it is here.")
def main(
    figures: tuple[str, ...],
    *,
    rounds: int,
    deep: bool,
    quick: bool,
    json_file: Path | None,
    folder: Path,
    python_load: bool,
) -> None:
    """Measure FIGURES (all of them if none is named) and print one table.

    All of them take about 20 minutes. Exits with 1 if a figure could not be measured; a target
    that is missed is a result like any other.
    """
    if deep and quick:
        raise click.UsageError("--deep and --quick exclude each other")
    scale = DEEP if deep else QUICK if quick else FULL
    with_wrk = load.wrk_is_here() and not python_load
    title = machine.described(folder)
    busy: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="tranthor-benchmarks-", dir=folder) as own:
        bench = Bench(Path(own), scale, rounds=rounds, with_wrk=with_wrk)
        chosen = [name for name in FIGURES if name in (figures or FIGURES)]
        rows = [row for name in chosen for row in _run(bench, name, busy)]
    notes = _notes(folder, scale, busy, with_wrk=with_wrk)
    print_table(rows, title=title, notes=notes)
    if json_file is not None:
        found = {"machine": title, "notes": notes, "rows": [row.as_json() for row in rows]}
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if any(isinstance(row, Failure) for row in rows):
        raise SystemExit(1)


def _run(bench: Bench, name: str, busy: dict[str, float]) -> Sequence[Row | Failure]:
    started_s, others = time.monotonic(), machine.Others()
    rows: Sequence[Row | Failure]
    try:
        rows = FIGURES[name](bench)
    except FigureError as exc:
        rows = [Failure(figure=name, why=str(exc))]
    busy[name] = others.cores()
    for row in rows:
        say(f"  {row}")
    say(f"{name}: took {time.monotonic() - started_s:.0f} s")
    return rows


def _notes(folder: Path, scale: Scale, busy: dict[str, float], *, with_wrk: bool) -> list[str]:
    cores = ", ".join(f"{name} {cores:.1f}" for name, cores in busy.items())
    notes = [f"cores that other programs kept busy meanwhile: {cores}"]
    if max(busy.values()) > QUIET_CORES:
        notes.append(
            f"over {QUIET_CORES} the figures are about those, too: repeat when it is quiet"
        )
    if not with_wrk:
        why = "as asked" if load.wrk_is_here() else "wrk is not here (apt-get install wrk)"
        notes.append(f"load by a Python generator on both sides: {why}")
    if machine.is_memory(folder):
        notes.append(
            f"{folder} lies in memory, where a sync costs nothing: choose another --folder"
        )
    if scale is QUICK:
        notes.append("--quick: these figures mean nothing")
    return notes


if __name__ == "__main__":
    # Ended from outside it stops its processes, too, and deletes what it made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main(prog_name="python -m benchmarks")
