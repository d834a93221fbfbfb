"""What the SDKs of Segment and RudderStack send, in the upstream's words. Nothing of an event is lost.

Little differs: the time of the event under another name, the traits in another place, a messageId that
may be missing, ids that are empty instead of left out. All else passes as it is, for the upstream keeps
members that it does not know. Pure; handed to `agent.contract` by `agent.ingest.dialect`.
Source: what the SDKs send (`tests/test_sdks.py` runs them); Segment's HTTP API; rudder-server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from agent.event import Kind

_OF_THE_REQUEST = ("sentAt", "writeKey")
"""When it was tried, and by whom. The first is another one in each retry, which is the same event to us
only without it; the second is a secret, which is not stored."""

_IDS = ("messageId", "userId", "anonymousId")


def translate(kind: Kind, message: dict[str, Any], *, new_id: Callable[[], str]) -> dict[str, Any]:
    """Return *message* in the upstream's words; *message* itself is not to be used any more.

    One without a messageId gets a *new_id*.
    """
    # Null is how they say that there is none; the upstream would make the text "" of some.
    fields = {
        name: value
        for name, value in message.items()
        if value is not None and name not in _OF_THE_REQUEST
    }
    for name in _IDS:
        if fields.get(name) == "":
            del fields[name]
    if "messageId" not in fields:
        fields["messageId"] = new_id()
    # A timestamp is what the app itself said, as rudder-server has it, and goes first. Their servers
    # mend the device's clock by sentAt; here app and agent have the same one.
    if fields.get("originalTimestamp"):
        fields.setdefault("timestamp", fields["originalTimestamp"])
    _forget_retries(fields)
    if kind == "identify":
        _take_traits(fields)
    elif kind in {"page", "screen"}:
        _copy_category(fields)
    return fields


def _forget_retries(fields: dict[str, Any]) -> None:
    """Drop the count of retries that analytics.js keeps in the message, for the same reason as sentAt."""
    match fields.get("_metadata"):
        case {"retryCount": _, **others} if others:
            fields["_metadata"] = others
        case {"retryCount": _}:
            del fields["_metadata"]


def _take_traits(fields: dict[str, Any]) -> None:
    """Take the user's traits from where RudderStack's browser and mobile SDKs put them."""
    match fields:
        case {"traits": _}:
            pass
        case {"context": {"traits": dict(traits)}}:
            # A copy: what is redacted in one place is not thereby changed in the other. By way of
            # JSON, which of 5 MiB of small values takes a tenth of a second; deepcopy takes seconds.
            fields["traits"] = msgspec.json.decode(msgspec.json.encode(traits))


def _copy_category(fields: dict[str, Any]) -> None:
    """Put the category where the upstream lets it be used: among the properties, as analytics.js does.

    Of a text; what is nested would come to be too deep there, and changed in both places at once.
    """
    properties = fields.get("properties", {})
    if isinstance(fields.get("category"), str) and isinstance(properties, dict):
        fields["properties"] = {"category": fields["category"], **properties}
