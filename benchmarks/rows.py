"""What a figure comes to: its rounds, its ratio, its target, and the table of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The bound that a ratio, or a value without reference, should keep."""

    least: float | None = None
    most: float | None = None

    def is_met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    def __str__(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    *agent* and *reference* hold one value a round, measured side by side. Without a reference the
    agent's value itself is the figure.
    """

    figure: str
    subject: str
    unit: str
    agent: Sequence[float]
    reference: Sequence[float] = ()
    target: Target | None = None
    note: str = ""

    @property
    def values(self) -> list[float]:
        """Return the figure of each round."""
        if not self.reference:
            return list(self.agent)
        return [a / b for a, b in zip(self.agent, self.reference, strict=True)]

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """Return whether the target is met; None if there is none."""
        return None if self.target is None else self.target.is_met(self.value)

    def __str__(self) -> str:
        """Return the row on its own, for whoever waits for the table."""
        return " | ".join(filter(None, _cells(self)))

    def as_json(self) -> dict[str, Any]:
        return {
            "figure": self.figure,
            "subject": self.subject,
            "unit": self.unit,
            "value": self.value,
            "least": min(self.values),
            "most": max(self.values),
            "target": None if self.target is None else str(self.target),
            "met": self.is_met,
            "agent": list(self.agent),
            "reference": list(self.reference),
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A figure that could not be measured, and why."""

    figure: str
    why: str

    def __str__(self) -> str:
        return f"{self.figure} failed: {self.why}"

    def as_json(self) -> dict[str, Any]:
        return {"figure": self.figure, "failed": self.why}


def print_table(rows: Iterable[Row | Failure], *, title: str, notes: Iterable[str]) -> None:
    """Print one table to standard output, and below it what must be known to read it."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("what")
    table.add_column("agent", justify="right", no_wrap=True)
    table.add_column("reference", justify="right", no_wrap=True)
    for name in ("ratio", "spread", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    remarks = list(notes)
    for row in rows:
        if isinstance(row, Failure):
            table.add_row(row.figure, row.why, style="red")
            continue
        table.add_row(*_cells(row))
        if row.note:
            remarks.append(f"{row.figure} {row.subject}: {row.note}")
    console.print(table, markup=False)
    for remark in remarks:
        console.print(f"- {remark}", markup=False, highlight=False)


def _cells(row: Row) -> list[str]:
    verdict = {None: "reported", True: "met", False: "missed"}[row.is_met]
    ratio = f"{row.value:.2f}" if row.reference else ""
    spread = "" if len(row.values) == 1 else f"{_short(min(row.values))}..{_short(max(row.values))}"
    return [
        row.figure,
        row.subject,
        f"{_short(statistics.median(row.agent))} {row.unit}".strip(),
        f"{_short(statistics.median(row.reference))} {row.unit}".strip() if row.reference else "",
        ratio,
        spread,
        "" if row.target is None else str(row.target),
        verdict,
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
