"""The body of a batch: the stored bytes of each event, untouched but for their type in front.

Source: the upstream's /batch: `{"batch": [Item, …]}`, an item being the single event's body with its
`type`. Stored bodies have no `type` of their own and are never empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from agent.contract import MAX_BODY_BYTES
from agent.event import Kind

_OPENING, _CLOSING = b'{"batch":[', b"]}"

MAX_BATCH_BYTES = MAX_BODY_BYTES - len(_OPENING) - len(_CLOSING)
"""What the items of one request may take: the upstream cuts off a larger body half-way."""


def envelope(items: Iterable[tuple[Kind, bytes]]) -> bytes:
    """Return the body of a batch of *items*, in their order."""
    return _OPENING + b",".join(_opening(kind) + body[1:] for kind, body in items) + _CLOSING


@cache
def _opening(kind: Kind) -> bytes:
    return b'{"type":"%b",' % kind.encode()
