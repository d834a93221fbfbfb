"""The event that every figure is measured with: about 450 bytes, an id as SDKs make them.

Fillers and generators in Python take it from here; `events.lua` is handed its three pieces.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

USERS = 1_000

PIECES = (
    '{"messageId":"',
    '","userId":"user-',
    (
        '","event":"Order Completed","timestamp":"2026-11-23T10:00:00.000Z","context":{"locale":"en-GB"'
        ',"userAgent":"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"'
        ',"library":{"name":"analytics","version":"4.2.0"}},"properties":{"orderId":"o-1043771"'
        ',"total":128.5,"currency":"EUR","coupon":null,"items":[{"sku":"a-1","quantity":1}'
        ',{"sku":"b-22","quantity":2}],"store":"Hamburg Altona"}}'
    ),
)
"""The body around the messageId (a UUID of version 4, at random) and the number of the user (four digits)."""


def body(rng: random.Random) -> bytes:
    """Return one event, of an id that is nobody else's."""
    before_id, before_user, behind = PIECES
    bits = f"{rng.getrandbits(128):032x}"
    message_id = f"{bits[:8]}-{bits[8:12]}-4{bits[13:16]}-a{bits[17:20]}-{bits[20:]}"
    return f"{before_id}{message_id}{before_user}{rng.randrange(USERS):04d}{behind}".encode()


def bodies(count: int, seed: int) -> Iterator[bytes]:
    """Yield *count* events; of one seed always the same."""
    rng = random.Random(seed)
    return (body(rng) for _ in range(count))


def batches(count: int, seed: int, size: int) -> Iterator[bytes]:
    """Yield the same events as bodies of /batch, *size* in each."""
    items = (b'{"type":"track",' + item[1:] for item in bodies(count, seed))
    while some := list(itertools.islice(items, size)):
        yield b'{"batch":[' + b",".join(some) + b"]}"


BODY_BYTES = len(body(random.Random(0)))
