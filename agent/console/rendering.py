"""Reports and events for people, by rich: aligned, coloured on a terminal, plain everywhere else.

Whatever an app or the upstream wrote goes through `printable` into a `Text`: it is neither markup
nor a command to the terminal. Loaded only by the commands that need it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import assert_never

import msgspec
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agent.console.apps import AppStatus
from agent.console.diagnosis import Level, count, duration, findings, level
from agent.console.invocation import printable, printable_json
from agent.console.receipts import ReceiptView
from agent.console.receipts import view as event_view
from agent.console.status import NEARLY_FULL, Report, Status, Unreadable
from agent.flow import WaitsFor
from agent.outbox.records import Receipt, State
from agent.settings import DEFAULT_UPSTREAM

_PIPE_COLUMNS = 4096
"""Width where no terminal sets one: nothing is cut, so that an id can be copied whole."""

_COLUMNS: dict[State, tuple[str, ...]] = {
    "pending": ("event", "user", "age", "attempts", "state"),
    "dead": ("event", "user", "age", "attempts", "reason", "status", "answer"),
    "delivered": ("age", "delivered"),
}
"""Beside the messageId. Of a delivered event nothing else is kept."""

_CELL_CHARS = 400
"""A cell of a list; `show` has the rest."""


def print_report(report: Report, program: str) -> None:
    _console().print(_report(report, program))


@contextmanager
def live_report(program: str) -> Iterator[Callable[[Report], None]]:
    """Yield what shows a report in place of the one before; one below the other without a terminal."""
    console = _console()
    if not console.is_terminal:
        yield lambda report: console.print(_report(report, program), "")
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda report: live.update(_report(report, program), refresh=True)


def print_events(receipts: Iterable[Receipt], state: State, *, now_ms: int) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("messageId", *_COLUMNS[state]):
        justify: JustifyMethod = "right" if name in {"age", "attempts"} else "left"
        table.add_column(name, justify=justify, no_wrap=name in {"messageId", "age", "attempts"})
    for receipt in receipts:
        table.add_row(*map(_cell, _row(receipt, now_ms)))
    _console().print(table)


def print_receipt(shown: ReceiptView, program: str, *, now_ms: int) -> None:
    """Print all that is known of one event, and what a person can do about it."""
    facts = _facts()
    _fact(facts, "messageId", shown.message_id)
    _fact(facts, "upstream", None if shown.upstream == DEFAULT_UPSTREAM else shown.upstream)
    _fact(facts, "app", shown.app)
    _fact(facts, "state", f"dead: {shown.reason}" if shown.state == "dead" else shown.state)
    _fact(facts, "waits for", _awaited(shown))
    _fact(facts, "event", shown.event)
    _fact(facts, "type", shown.kind)
    _fact(facts, "userId", shown.user_id)
    _fact(facts, "anonymousId", shown.anonymous_id)
    _fact(facts, "accepted", _instant(shown.accepted_at, now_ms))
    settled = "delivered" if shown.state == "delivered" else "set aside"
    _fact(facts, settled, _instant(shown.settled_at, now_ms))
    _fact(facts, "failing since", _instant(shown.failing_since, now_ms))
    if shown.state != "delivered":
        _fact(facts, "attempts", shown.attempts)
    _fact(facts, "last error", shown.last_error)
    _fact(facts, "status", shown.status)
    _fact(facts, "answer", shown.answer)
    parts: list[RenderableType] = [facts]
    if (body := bytes(shown.body)) != b"null":
        pretty = msgspec.json.format(body, indent=2).decode()
        parts += ["", *(Text(printable_json(line)) for line in pretty.split("\n"))]
    if shown.state == "dead":
        remedy = f"{program} dead requeue {shlex.quote(shown.message_id)}"
        parts += ["", _remedy(f"once it can pass: {remedy}; to delete it: dead discard")]
    _console().print(Group(*parts))


def print_apps(apps: Iterable[AppStatus]) -> None:
    _console().print(_apps(apps))


# --- a report ---


def _report(report: Report, program: str) -> RenderableType:
    parts: list[RenderableType] = []
    for finding in findings(report, program):
        parts.append(Text(printable(finding.title), finding.level.value))
        if finding.remedy:
            parts.append(_remedy(finding.remedy))
    if isinstance(report, Unreadable):
        return Group(*parts)
    if report.each:
        parts += ["", _upstreams(report)]
    if report.apps:
        parts += ["", _apps(report.apps)]
    return Group(*parts, "", _counters(report), "", _surroundings(report))


def _remedy(text: str) -> RenderableType:
    return Padding(Text(f"→ {printable(text)}"), (0, 0, 0, 2), expand=False)


def _counters(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    rows = (
        ("accepted", status.accepted, ""),
        ("delivered", status.delivered, _if(status.ambiguous, "possibly twice")),
        ("pending", status.pending, _waiting(status)),
        ("dead", status.dead, ""),
        ("discarded", status.discarded, _if(status.evicted, "by drop_oldest")),
        ("duplicates", status.duplicates, _if(status.conflicts, "with another body")),
    )
    for name, number, note in rows:
        style = Level.GRAVE.value if name == "dead" and number else ""
        table.add_row(name, Text(f"{number:,}", style), note)
    return table


def _upstreams(status: Status) -> Table:
    """Return a line for each upstream: how it stands, what waits for it, and why or where to."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, one in status.each.items():
        table.add_row(
            name,
            Text(one.state.replace("_", " "), level(one.state).value),
            f"{one.pending:,} pending",
            ""
            if one.oldest_pending_age_s is None
            else f"oldest {duration(one.oldest_pending_age_s)}",
            Text(printable(one.reason or one.url), overflow="fold"),
        )
    return table


def _apps(apps: Iterable[AppStatus]) -> Table:
    """Return a line for each app: what the outbox holds of it and may, and how it is known."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("app", no_wrap=True)
    for name in ("accepted", "pending", "dead", "holds", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("token", style="dim")
    for app in apps:
        full = app.max_bytes is not None and app.bytes > NEARLY_FULL * app.max_bytes
        since = "" if app.token_since is None else f" since {app.token_since}"
        table.add_row(
            app.name,
            f"{app.accepted:,}",
            f"{app.pending:,}",
            f"{app.dead:,}",
            Text(_size(app.bytes), Level.GRAVE.value if full else ""),
            "" if app.max_bytes is None else _size(app.max_bytes),
            f"{app.token}{since}",
        )
    return table


def _waiting(status: Status) -> str:
    notes = []
    if status.oldest_pending_age_s is not None:
        notes.append(f"oldest {duration(status.oldest_pending_age_s)}")
    notes += filter(None, [_if(status.in_flight, "in flight")])
    if status.parked_users:
        notes.append(f"{count(status.parked_users, 'user')} waiting behind a failing event")
    return ", ".join(notes)


def _if(number: int, what: str) -> str:
    return f"{number:,} {what}" if number else ""


def _surroundings(status: Status) -> Table:
    facts = _facts()
    outbox = status.outbox
    if status.next_attempt_in_s is not None:
        _fact(facts, "next attempt", f"in {duration(status.next_attempt_in_s)}")
    if status.last_error is not None and status.last_error_age_s is not None:
        _fact(facts, "last error", f"{status.last_error} ({duration(status.last_error_age_s)} ago)")
    used = f"{_size(outbox.bytes)} of {_size(outbox.max_bytes)}"
    if outbox.max_bytes:
        used += f" ({outbox.bytes / outbox.max_bytes:.0%})"
    _fact(facts, "outbox", f"{used}, {outbox.path}")
    if not status.each:
        _fact(facts, "upstream", status.upstream or "(none)")
    _fact(facts, "version", status.version)
    return facts


def _size(number_bytes: int) -> str:
    size = float(number_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{number_bytes} B"
        size /= 1024
    return f"{size:,.1f} GiB"


# --- cells ---


def _row(receipt: Receipt, now_ms: int) -> tuple[object, ...]:
    shown = event_view(receipt)
    age = duration((now_ms - receipt.accepted_ms) / 1000)
    about = (shown.message_id, shown.event, shown.user_id or shown.anonymous_id, age)
    match receipt.state:
        case "pending":
            return (*about, receipt.attempts, _standing(receipt, now_ms))
        case "dead":
            return (*about, receipt.attempts, receipt.reason, receipt.status, receipt.answer)
        case "delivered":
            return (shown.message_id, age, shown.settled_at)
        case _:
            assert_never(receipt.state)


def _standing(receipt: Receipt, now_ms: int) -> str:
    match receipt.state:
        case "dead":
            return f"dead: {receipt.reason}"
        case "pending" if receipt.failing_since_ms is not None:
            return f"pending, failing for {duration((now_ms - receipt.failing_since_ms) / 1000)}"
        case state:
            return state


_AWAITED: dict[WaitsFor, str] = {
    "answer": "the upstream's answer",
    "turn": "its turn",
    "predecessor": "an earlier event",
    "backoff": "the next attempt",
    "hold": "a person to mend something",
    "budget": "its budget",
    "resume": "the end of a pause",
    "upstream": "an upstream to be configured",
    "agent": "the agent to be started",
}


def _awaited(shown: ReceiptView) -> str | None:
    if shown.waits_for is None:
        return None
    text = _AWAITED[shown.waits_for]
    if shown.next_attempt_in_s is not None:
        text += f", in {duration(shown.next_attempt_in_s)}"
    return text if shown.wait_reason is None else f"{text}: {shown.wait_reason}"


def _instant(text: str | None, now_ms: int) -> str | None:
    if text is None:
        return None
    age_s = now_ms / 1000 - datetime.fromisoformat(text).timestamp()
    return f"{text} ({duration(age_s)} ago)"


def _cell(value: object) -> Text:
    text = "" if value is None else printable(str(value))
    if len(text) > _CELL_CHARS:
        text = f"{text[:_CELL_CHARS]}…"
    return Text(text, no_wrap=True, overflow="ellipsis")


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _fact(table: Table, name: str, value: object) -> None:
    if value is not None:
        table.add_row(name, Text(printable(str(value))))


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    return console
