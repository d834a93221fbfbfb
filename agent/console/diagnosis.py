"""What a report means for an operator at 3 a.m.: what is wrong, and the command that helps. Pure.

`agent.console.rendering` shows the findings; `status` ends with the exit code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from agent.console.status import NEARLY_FULL, Report, State, Status, Unreadable
from agent.outbox.records import Salvage

_RELOAD = "reload the agent: systemctl reload tranthor-agent, or SIGHUP"


class Level(Enum):
    """How much a finding matters. The value is its style for rich."""

    GOOD = "bold green"
    PASSING = "bold yellow"
    """It heals by itself."""
    GRAVE = "bold red"
    """A person must act."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. *remedy* is empty where there is nothing to do."""

    level: Level
    title: str
    remedy: str = ""


def exit_code(report: Report) -> int:
    """Return 0 flowing, 1 needs attention, 2 not running, 3 unreadable or unresponsive."""
    if isinstance(report, Unreadable) or report.state == "unresponsive":
        return 3
    if report.state == "stopped":
        return 2
    grave = any(finding.level is Level.GRAVE for finding in findings(report, ""))
    return 1 if grave else 0


def findings(report: Report, program: str) -> list[Finding]:
    """Return what to tell, the verdict first; *program* begins each command that is named."""
    if isinstance(report, Unreadable):
        return [Finding(Level.GRAVE, f"OUTBOX UNREADABLE: {report.reason}")]
    # Where nothing can be stored, that comes before whether anything is sent.
    return [*_storing(report, program), _sending(report, program), *_left_over(report, program)]


def level(state: State) -> Level:
    """Return how much the state of one upstream matters."""
    match state:
        case "flowing":
            return Level.GOOD
        case "backing_off" | "waiting":
            return Level.PASSING
        case _:
            return Level.GRAVE


def duration(seconds: float) -> str:
    """Return a wait or an age in its two largest units: "3m 12s"."""
    if seconds < 1:
        return "under 1s"
    whole = int(seconds)
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    parts = []
    for unit, size in units:
        number, whole = divmod(whole, size)
        parts.append((number, unit))
    first = next(i for i, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number}{unit}" for number, unit in parts[first : first + 2] if number)


def count(number: int, noun: str) -> str:
    """Return "1 dead letter", "1,204 dead letters"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _storing(status: Status, program: str) -> Iterator[Finding]:
    outbox = status.outbox
    if outbox.fault is not None:
        yield Finding(
            Level.GRAVE,
            f"OUTBOX FAILED: {outbox.fault}",
            "no event is taken until it can be written again, which is tried every second: check"
            " the disk, and the agent's log",
        )
    if outbox.full is not None:
        yield Finding(
            Level.GRAVE,
            f"OUTBOX FULL: {outbox.full}",
            "apps are answered 507 meanwhile; let events be delivered, or raise outbox.max_size"
            " and reload the agent",
        )
    if status.config_problem is not None:
        yield Finding(
            Level.GRAVE,
            f"CONFIGURATION REFUSED: {status.config_problem}",
            "the one before stays in force. Mend it, try it with"
            f" {program} config check, then {_RELOAD}",
        )


def _sending(status: Status, program: str) -> Finding:
    reason = status.reason
    match status.state:
        case "flowing":
            return Finding(Level.GOOD, f"flowing: {reason}" if reason else "flowing")
        case "waiting":
            return Finding(Level.PASSING, f"waiting: {reason}", "as configured; nothing to do")
        case "backing_off":
            again = "it tries again by itself"
            if status.next_attempt_in_s is not None:
                again += f" in {duration(status.next_attempt_in_s)}"
            return Finding(
                Level.PASSING, f"backing off: {reason}", f"{again}; to try now: {program} flush"
            )
        case "held":
            return Finding(
                Level.GRAVE,
                f"HELD: {reason}",
                "events are kept and wait. Mend it (a key file is read again by itself; after any"
                f" other change of the configuration {_RELOAD}); to try now: {program} flush",
            )
        case "paused":
            which = ", ".join(name for name, one in status.each.items() if one.state == "paused")
            return Finding(
                Level.GRAVE,
                f"PAUSED by a person: {which}" if which else "PAUSED by a person",
                f"to send again: {program} resume",
            )
        case "unconfigured":
            return Finding(
                Level.GRAVE,
                f"NOT CONFIGURED: {reason}",
                f"events are kept and wait. Set it, try it with {program} config check, then"
                f" {_RELOAD}",
            )
        case "stopped":
            return Finding(
                Level.GRAVE,
                f"NOT RUNNING: {reason}" if reason else "NOT RUNNING",
                f"systemctl start tranthor-agent, or in the foreground: {program} run",
            )
        case "unresponsive":
            return Finding(
                Level.GRAVE,
                f"NO ANSWER: {reason}",
                "it may be starting or stopping: look again in a moment; if it stays so:"
                " systemctl restart tranthor-agent",
            )
        case _:
            assert_never(status.state)


def _left_over(status: Status, program: str) -> Iterator[Finding]:
    if status.dead:
        yield Finding(
            Level.GRAVE,
            f"{count(status.dead, 'dead letter')} set aside",
            f"see why: {program} dead list; then {program} dead requeue --all, or dead discard --all",
        )
    if status.salvage is not None:
        yield _salvaged(status.salvage)
    outbox = status.outbox
    if outbox.full is None and outbox.bytes > NEARLY_FULL * outbox.max_bytes:
        yield Finding(
            Level.GRAVE,
            f"the outbox is nearly full ({outbox.bytes / outbox.max_bytes:.0%})",
            "let events be delivered, or raise outbox.max_size and reload the agent",
        )
    for app in status.apps:
        if app.max_bytes is not None and app.bytes > NEARLY_FULL * app.max_bytes:
            yield Finding(
                Level.GRAVE,
                f"app {app.name} has used {app.bytes / app.max_bytes:.0%} of its quota",
                "over it, it is answered 507 and others are not; let its events be delivered, look at"
                f" them ({program} list --app {app.name}), or raise max_size of [apps.{app.name}]",
            )


def _salvaged(salvage: Salvage) -> Finding:
    found = salvage.pending + salvage.dead
    back = f"{count(found, 'event')} brought back, {salvage.lost:,} lost ({salvage.moved_to})"
    match salvage.state:
        case "running":
            return Finding(
                Level.PASSING,
                f"a damaged outbox was set aside and is being read: {back} so far",
                "what comes back goes first; new events are taken meanwhile",
            )
        case "done":
            return Finding(
                Level.GRAVE if salvage.lost else Level.PASSING,
                f"a damaged outbox was set aside: {back}",
                "check the disk; delete that file and its -wal when you need neither",
            )
        case "failed":
            return Finding(
                Level.GRAVE,
                f"a damaged outbox was set aside and could not be read to its end: {back}",
                "see the agent's log; its next start tries again",
            )
        case _:
            assert_never(salvage.state)
