"""`status`: the one answer to "do events flow, and if not, why and what to do".

The daemon's control API and the command line fill the same `Status`; the command does so alone
when no daemon runs. Rendering for people is `agent.console.rendering`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import msgspec

from agent import __version__
from agent.outbox.files import log_of
from agent.outbox.reader import Reader
from agent.outbox.records import Ledger, Salvage

State = Literal[
    "flowing",
    "waiting",
    "backing_off",
    "held",
    "paused",
    "unconfigured",
    "stopped",
    "unresponsive",
]
"""The last two are said by the command alone: no daemon runs; one owns the outbox and is silent."""

NEARLY_FULL = 0.9
"""The share of outbox.max_size from which `status` asks for attention."""


class OutboxStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The files. *fault* and *full* say why nothing is stored right now, if so."""

    path: str
    bytes: int
    wal_bytes: int
    max_bytes: int
    full: str | None
    fault: str | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `status --json`; ages and waits in seconds.

    *in_flight* counts requests, *limit* how many there may be now.
    *ambiguous* counts events that were sent again although they may have arrived.
    """

    state: State
    reason: str
    accepted: int
    delivered: int
    pending: int
    dead: int
    discarded: int
    evicted: int
    duplicates: int
    conflicts: int
    oldest_pending_age_s: float | None
    next_attempt_in_s: float | None
    last_error: str | None
    last_error_age_s: float | None
    in_flight: int
    limit: float
    parked_users: int
    ambiguous: int
    salvage: Salvage | None
    outbox: OutboxStatus
    upstream: str
    version: str
    config_problem: str | None = None
    """Why a configuration read anew was refused, and the one before stays in force."""


class Unreadable(msgspec.Struct, frozen=True, kw_only=True):
    """What `status --json` says when it cannot count: *reason* names the cause and the remedy."""

    state: Literal["unreadable"]
    reason: str
    outbox: dict[str, str]
    version: str


Report = Status | Unreadable


class Flow(Protocol):
    """What the daemon's forwarder says of itself."""

    @property
    def state(self) -> State: ...
    @property
    def reason(self) -> str: ...
    @property
    def next_attempt_in_s(self) -> float | None: ...
    @property
    def last_error(self) -> str | None: ...
    @property
    def last_error_ms(self) -> int | None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def limit(self) -> float: ...
    @property
    def parked_users(self) -> int: ...
    @property
    def ambiguous(self) -> int: ...


async def collect(
    reader: Reader,
    *,
    now_ms: int,
    upstream: str,
    max_bytes: int,
    flow: Flow | None,
    full: str | None = None,
    fault: str | None = None,
    config_problem: str | None = None,
) -> Status:
    """Return the status of the outbox behind *reader*; *flow* None means that no daemon runs."""
    ledger = await reader.ledger()
    oldest_ms = await reader.oldest_pending_ms()
    return Status(
        state="stopped" if flow is None else flow.state,
        reason=_stopped(ledger) if flow is None else flow.reason,
        accepted=ledger.accepted,
        delivered=ledger.delivered,
        pending=ledger.pending,
        dead=ledger.dead,
        discarded=ledger.discarded,
        evicted=ledger.evicted,
        duplicates=ledger.duplicates,
        conflicts=ledger.conflicts,
        oldest_pending_age_s=_age_s(oldest_ms, now_ms),
        next_attempt_in_s=None if flow is None else flow.next_attempt_in_s,
        last_error=None if flow is None else flow.last_error,
        last_error_age_s=None if flow is None else _age_s(flow.last_error_ms, now_ms),
        in_flight=0 if flow is None else flow.in_flight,
        limit=0 if flow is None else flow.limit,
        parked_users=0 if flow is None else flow.parked_users,
        ambiguous=0 if flow is None else flow.ambiguous,
        salvage=await reader.salvage(),
        outbox=OutboxStatus(
            path=str(reader.path),
            bytes=_size(reader.path),
            wal_bytes=_size(log_of(reader.path)),
            max_bytes=int(max_bytes),
            full=full,
            fault=fault,
        ),
        upstream=upstream,
        version=__version__,
        config_problem=config_problem,
    )


def _stopped(ledger: Ledger) -> str:
    return "paused by a person, and stays so when it starts" if ledger.paused else ""


def _age_s(instant_ms: int | None, now_ms: int) -> float | None:
    return None if instant_ms is None else max(0, now_ms - instant_ms) / 1000


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
