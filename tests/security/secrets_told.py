"""Whether a text gives a secret away: whole, in pieces, or in one of the disguises that programs use."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import quote, quote_plus

PIECE_CHARS = 10
"""So much of a key is no coincidence; a text that was cut may end with it."""


def traces(secret: str, found: bytes) -> list[str]:
    """Return the forms in which *secret* stands in *found*, in part at least; none: it is kept."""
    lowered = found.lower()
    return [form for form, spelt in _forms_of(secret) if spelt in lowered]


@lru_cache
def _forms_of(secret: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((form, form.encode().lower()) for form in sorted(set(_forms(secret))))


def _forms(secret: str) -> Iterator[str]:
    ends_at = len(secret) - PIECE_CHARS
    for at in {*range(0, ends_at, PIECE_CHARS // 2), ends_at}:
        piece = secret[at : at + PIECE_CHARS]
        yield piece
        yield piece.replace("/", "\\/")
        yield "".join(f"\\u{ord(char):04x}" for char in piece)
        yield "".join(f"%{ord(char):02x}" for char in piece)
        yield quote(piece, safe="")
        yield quote_plus(piece)
        yield piece.encode().hex()
    # Base64 looks different by where the secret begins; what stands before and behind it is cut off.
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(b"\0" * before + secret.encode()).decode()
            yield encoded[4 if before else 0 : -4]
