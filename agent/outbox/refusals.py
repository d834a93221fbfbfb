"""What a request is answered when the outbox cannot do what it asks: one table for both ends."""

from __future__ import annotations

from agent.errors import AppQuotaError, OutboxError, OutboxFullError, OutboxOverloadedError
from agent.exchange import Answer, refuse

RETRY_OVERLOADED_S = 1
"""The queue to the writer empties in moments."""

RETRY_UNAVAILABLE_S = 5
"""A failed database is reopened every second."""

RETRY_FULL_S = 30
"""Room comes back at the pace of the link, or of a person."""


def refuse_for(exc: OutboxError) -> Answer:
    """Return 507 for an outbox or a quota that is full, else 503; both say when to send again."""
    match exc:
        case AppQuotaError():
            return refuse(507, "AGENT_APP_QUOTA", str(exc), retry_after_s=RETRY_FULL_S)
        case OutboxFullError():
            return refuse(507, "AGENT_OUTBOX_FULL", str(exc), retry_after_s=RETRY_FULL_S)
        case OutboxOverloadedError():
            return refuse(503, "AGENT_OVERLOADED", str(exc), retry_after_s=RETRY_OVERLOADED_S)
        case _:
            return refuse(
                503,
                "AGENT_OUTBOX_UNAVAILABLE",
                f"{exc}; send an event again with the same messageId",
                retry_after_s=RETRY_UNAVAILABLE_S,
            )
