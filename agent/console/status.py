"""`status`: the one answer to "do events flow, and if not, why and what to do".

The daemon's control API and the command line fill the same `Status`; the command does so alone
when no daemon runs. Rendering for people is `agent.console.rendering`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from agent import __version__
from agent.console.apps import AppStatus, overview
from agent.flow import Flow, FlowState
from agent.outbox.files import log_of
from agent.outbox.reader import Reader
from agent.outbox.records import Ledger, Quotas, Salvage, label

State = Literal[FlowState, "stopped", "unresponsive"]
"""The last two are said by the command alone: no daemon runs; one owns the outbox and is silent."""

_WORST_FIRST: tuple[State, ...] = (
    "unresponsive",
    "stopped",
    "held",
    "unconfigured",
    "paused",
    "backing_off",
    "waiting",
    "flowing",
)
"""Of several upstreams, the state of the whole is the first of these that one is in."""

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


class UpstreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How one upstream stands, of several. *pending* is of events that wait for it alone."""

    state: State
    reason: str
    url: str
    pending: int
    oldest_pending_age_s: float | None
    next_attempt_in_s: float | None
    last_error: str | None
    last_error_age_s: float | None
    in_flight: int
    limit: float
    parked_users: int
    ambiguous: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `status --json`; ages and waits in seconds.

    Where there are several *upstreams*, *state*, *reason* and *next_attempt_in_s* are those of the one
    that stands worst, the error is the latest, and what is counted is counted for all together.

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
    upstreams: dict[str, UpstreamStatus] | msgspec.UnsetType = msgspec.UNSET
    apps: list[AppStatus] = msgspec.field(default_factory=list)

    @property
    def each(self) -> dict[str, UpstreamStatus]:
        """Each upstream by its label; none where there is but the default one."""
        return self.upstreams or {}

    def of(self, upstream: str) -> UpstreamStatus | Status:
        """Return how the one of that label stands; it is the whole where there is but one."""
        return self.each.get(upstream, self)


class Unreadable(msgspec.Struct, frozen=True, kw_only=True):
    """What `status --json` says when it cannot count: *reason* names the cause and the remedy."""

    state: Literal["unreadable"]
    reason: str
    outbox: dict[str, str]
    version: str


Report = Status | Unreadable


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one upstream beside its queue. *flow* None means that no daemon runs."""

    url: str
    flow: Flow | None = None


async def collect(
    reader: Reader,
    *,
    now_ms: int,
    upstreams: Mapping[str, Standing],
    waiting: Mapping[str, int] | None = None,
    max_bytes: int,
    full: str | None = None,
    fault: str | None = None,
    config_problem: str | None = None,
    quotas: Quotas | None = None,
) -> Status:
    """Return the status of the outbox behind *reader* and of its *upstreams*, by name.

    *waiting* is how many events are pending for each named one that has some; they are counted
    where that is not known.
    """
    ledger = await reader.ledger()
    waiting = await reader.counts() if waiting is None else waiting
    each = {
        name: await _one(reader, name, upstreams, ledger, waiting, now_ms=now_ms)
        for name in sorted({*upstreams, *waiting})
    }
    worst_name = worst(
        {
            name: one.state
            for name, one in each.items()
            # Where every app has an upstream of its own, the default one need not be configured.
            if name or len(each) == 1 or one.pending or one.state != "unconfigured"
        }
    )
    whole = each[worst_name]
    latest = min(each.values(), key=_error_age_s)
    several = len(each) > 1
    return Status(
        state=whole.state,
        reason=f"{label(worst_name)}: {whole.reason}" if several and whole.reason else whole.reason,
        accepted=ledger.accepted,
        delivered=ledger.delivered,
        pending=ledger.pending,
        dead=ledger.dead,
        discarded=ledger.discarded,
        evicted=ledger.evicted,
        duplicates=ledger.duplicates,
        conflicts=ledger.conflicts,
        oldest_pending_age_s=_age_s(await reader.oldest_pending_ms(), now_ms),
        next_attempt_in_s=whole.next_attempt_in_s,
        last_error=latest.last_error,
        last_error_age_s=latest.last_error_age_s,
        in_flight=sum(one.in_flight for one in each.values()),
        limit=sum(one.limit for one in each.values()),
        parked_users=sum(one.parked_users for one in each.values()),
        ambiguous=sum(one.ambiguous for one in each.values()),
        salvage=await reader.salvage(),
        outbox=OutboxStatus(
            path=str(reader.path),
            bytes=_size(reader.path),
            wal_bytes=_size(log_of(reader.path)),
            max_bytes=int(max_bytes),
            full=full,
            fault=fault,
        ),
        upstream=upstreams[""].url,
        version=__version__,
        config_problem=config_problem,
        upstreams={label(name): one for name, one in each.items()} if several else msgspec.UNSET,
        apps=overview(await reader.apps(), quotas or Quotas()),
    )


def worst(states: Mapping[str, State]) -> str:
    """Return the name of the upstream that needs a person most."""
    return min(states, key=lambda name: _WORST_FIRST.index(states[name]))


async def _one(
    reader: Reader,
    name: str,
    upstreams: Mapping[str, Standing],
    ledger: Ledger,
    waiting: Mapping[str, int],
    *,
    now_ms: int,
) -> UpstreamStatus:
    standing = upstreams.get(name)
    flow = None if standing is None else standing.flow
    alone = upstreams.keys() | waiting.keys() == {name}
    state: State = "stopped" if flow is None else flow.state
    reason = _stopped(ledger, name) if flow is None else flow.reason
    if standing is None:
        reason = f"events wait for it, but the configuration has no [upstreams.{name}] any more"
        if any(other.flow for other in upstreams.values()):
            state = "unconfigured"
    return UpstreamStatus(
        state=state,
        reason=reason,
        url="" if standing is None else standing.url,
        pending=waiting.get(name, 0) if name else max(0, ledger.pending - sum(waiting.values())),
        oldest_pending_age_s=None
        if alone
        else _age_s(await reader.oldest_pending_ms(name), now_ms),
        next_attempt_in_s=None if flow is None else flow.next_attempt_in_s,
        last_error=None if flow is None else flow.last_error,
        last_error_age_s=None if flow is None else _age_s(flow.last_error_ms, now_ms),
        in_flight=0 if flow is None else flow.in_flight,
        limit=0 if flow is None else flow.limit,
        parked_users=0 if flow is None else flow.parked_users,
        ambiguous=0 if flow is None else flow.ambiguous,
    )


def _error_age_s(one: UpstreamStatus) -> float:
    return float("inf") if one.last_error_age_s is None else one.last_error_age_s


def _stopped(ledger: Ledger, upstream: str) -> str:
    paused = ledger.pauses(upstream)
    return "paused by a person, and stays so when it starts" if paused else ""


def _age_s(instant_ms: int | None, now_ms: int) -> float | None:
    return None if instant_ms is None else max(0, now_ms - instant_ms) / 1000


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
