"""One event as people and scripts see it: in `show`, `list --json` and under /api/agent/events."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.event import rfc3339
from agent.outbox.records import Reason, Receipt, State, label


class EventView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Where one event stands. *app* is None where it came from none that is known.

    Instants are RFC 3339 UTC; *body* is what is sent, None once delivered.
    """

    message_id: str
    upstream: str
    app: str | None
    state: State
    kind: str | None
    event: str | None
    user_id: str | None
    anonymous_id: str | None
    accepted_at: str
    settled_at: str | None
    attempts: int
    failing_since: str | None
    reason: Reason | None
    status: int | None
    answer: str | None
    body: msgspec.Raw | None


def view(receipt: Receipt) -> EventView:
    """Return *receipt* with the fields of its body that people look for."""
    fields: dict[str, Any] = {} if receipt.body is None else msgspec.json.decode(receipt.body)
    return EventView(
        message_id=receipt.message_id,
        upstream=label(receipt.upstream),
        app=receipt.app or None,
        state=receipt.state,
        kind=receipt.kind,
        event=fields.get("event"),
        user_id=fields.get("userId"),
        anonymous_id=fields.get("anonymousId"),
        accepted_at=rfc3339(receipt.accepted_ms),
        settled_at=_instant(receipt.settled_ms),
        attempts=receipt.attempts,
        failing_since=_instant(receipt.failing_since_ms),
        reason=receipt.reason,
        status=receipt.status,
        answer=receipt.answer,
        body=None if receipt.body is None else msgspec.Raw(receipt.body),
    )


def _instant(ms: int | None) -> str | None:
    return None if ms is None else rfc3339(ms)
