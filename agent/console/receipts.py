"""One event as people and scripts see it: in `show`, `list --json` and under /api/agent/events."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from agent.event import rfc3339
from agent.exchange import Refusal
from agent.flow import Wait, WaitsFor
from agent.outbox.records import Reason, Receipt, State, label
from agent.units import Seconds

WAIT_MAX_S = 60.0
"""How long one request may wait for an event: less than clients and what stands in between allow."""

UNKNOWN_EVENT = "AGENT_UNKNOWN_EVENT"

Instant = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""RFC 3339, in UTC, to the millisecond."""


class EventView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Where one event stands. *app* is null where it came from none that is known.

    Instants are RFC 3339 UTC; *body* is what is sent, null once delivered.
    """

    message_id: str
    upstream: str
    app: str | None
    state: State
    kind: str | None
    event: str | None
    user_id: str | None
    anonymous_id: str | None
    accepted_at: Instant
    settled_at: Instant | None
    attempts: int
    failing_since: Instant | None
    reason: Reason | None
    status: int | None
    answer: str | None
    body: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": ["object", "null"]})]


class ReceiptView(EventView, frozen=True, kw_only=True, rename="camel"):
    """The same with what a pending event waits for (`Wait`), None once it is settled.

    *upstreams* are all that the id is known for.
    """

    waits_for: WaitsFor | None = None
    wait_reason: str | None = None
    next_attempt_in_s: float | None = None
    last_error: str | None = None
    upstreams: tuple[str, ...]


class UnknownView(Refusal, frozen=True, kw_only=True, rename="camel"):
    """A refusal that can be read as a receipt, too."""

    message_id: str
    state: Literal["unknown"] = "unknown"


def view(receipt: Receipt) -> EventView:
    """Return *receipt* with the fields of its body that people look for."""
    return EventView(**_fields(receipt))


def receipt_view(receipt: Receipt, wait: Wait | None, known: Iterable[Receipt]) -> ReceiptView:
    """Return *receipt*, one of those *known* of its id; *wait* is that of a pending one."""
    upstreams = tuple(label(each.upstream) for each in known)
    if wait is None:
        return ReceiptView(**_fields(receipt), upstreams=upstreams)
    return ReceiptView(
        **_fields(receipt),
        upstreams=upstreams,
        waits_for=wait.waits_for,
        wait_reason=wait.reason or None,
        next_attempt_in_s=wait.next_attempt_in_s,
        last_error=wait.last_error or None,
    )


def unknown(message_id: str) -> UnknownView:
    """Return what is said of an id that the outbox does not know."""
    return UnknownView(
        status_code=404,
        code=UNKNOWN_EVENT,
        error="Not Found",
        message=f"messageId {message_id[:200]!r} is unknown: never accepted, discarded, or delivered"
        " longer ago than outbox.delivered_retention",
        message_id=message_id,
    )


def wait_s(text: str) -> float:
    """Return a wait in seconds, given as a plain number or as a duration. Raises ValueError."""
    return float(text) if _PLAIN.fullmatch(text) else Seconds.parse(text)


_PLAIN = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


def _fields(receipt: Receipt) -> dict[str, Any]:
    fields: dict[str, Any] = {} if receipt.body is None else msgspec.json.decode(receipt.body)
    return {
        "message_id": receipt.message_id,
        "upstream": label(receipt.upstream),
        "app": receipt.app or None,
        "state": receipt.state,
        "kind": receipt.kind,
        "event": _text(fields.get("event")),
        "user_id": fields.get("userId"),
        "anonymous_id": fields.get("anonymousId"),
        "accepted_at": rfc3339(receipt.accepted_ms),
        "settled_at": _instant(receipt.settled_ms),
        "attempts": receipt.attempts,
        "failing_since": _instant(receipt.failing_since_ms),
        "reason": receipt.reason,
        "status": receipt.status,
        "answer": receipt.answer,
        "body": msgspec.Raw(b"null" if receipt.body is None else receipt.body),
    }


def _text(value: object) -> str | None:
    # Of a track event it is its name; other kinds may carry anything there.
    return value if isinstance(value, str) else None


def _instant(ms: int | None) -> str | None:
    return None if ms is None else rfc3339(ms)
