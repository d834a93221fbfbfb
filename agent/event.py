"""One accepted message as a value, and what follows from its bytes: digest, lane, time of receipt.

Pure: no clock, no socket, no database. `agent.contract` makes events of what apps post.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, get_args

import msgspec

DIGEST_BYTES = 16
"""So many that no two bodies of one messageId have the same by chance."""

Kind = Literal["track", "identify", "page", "screen", "group"]
"""The endpoint that the event came by and goes out by."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One accepted message, as it is stored and as every attempt sends it.

    *lane* is a signed 64-bit hash of the user: events of one lane leave in order.
    *digest* is that of the body as accepted (`digest_of`). *body* is the exact JSON of every attempt.
    *upstream* is the name of the one that it is for, empty for the default one; *app* that of the
    app that it came from, empty where nobody said.
    """

    message_id: str
    kind: Kind
    lane: int
    digest: bytes
    received_ms: int
    body: bytes
    upstream: str = ""
    app: str = ""


def digest_of(body: bytes) -> bytes:
    """Return what tells whether two bodies under one messageId are the same; the first one wins.

    Taken before the time of receipt is stamped into *body*, so that an app's own retry compares equal
    to its first try.
    """
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def proof_of(body: bytes, digests: Collection[bytes]) -> bytes | None:
    """Return the one of *digests* that *body*, stamped or not, was accepted with; None: no longer."""
    for accepted in (body, _STAMP.sub(b"}", body)):
        digest = digest_of(accepted)
        if digest in digests:
            return digest
    return None


_STAMP = re.compile(rb',"timestamp":"[0-9TZ:.-]{24}"\}\Z')
"""What `stamped` puts at the end."""


def stamped(body: bytes, received_ms: int) -> bytes:
    """Return the JSON object *body* with *received_ms* as its timestamp, at its end."""
    return b'%b,"timestamp":"%b"}' % (body[:-1], rfc3339(received_ms).encode())


def lane_of(*, user_id: str | None, anonymous_id: str | None) -> int:
    """Return the lane of a user: a signed 64-bit hash. Two users may share one, which only orders them."""
    key = f"u:{user_id}" if user_id is not None else f"a:{anonymous_id}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def rfc3339(instant_ms: int) -> str:
    """Return *instant_ms* (Unix ms) as RFC 3339 in UTC, to the millisecond."""
    seconds, ms = divmod(instant_ms, 1000)
    return f"{_to_the_second(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=1)
def _to_the_second(instant_s: int) -> str:
    """Return RFC 3339 without zone; kept, for what is received comes many times a second."""
    return f"{datetime.fromtimestamp(instant_s, UTC):%Y-%m-%dT%H:%M:%S}"
