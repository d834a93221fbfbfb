"""The contract: JSON bytes in, one validated, normalised and stamped `Event` out.

This module is the edge of the documented contract. What the upstream would refuse is refused
here, where the app can still be told; what it would accept and silently spoil is repaired or
refused. Pure: no clock, no socket, no database. Called by `agent.ingest.routes`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

import msgspec

from agent.errors import InvalidEventError

MAX_BODY_BYTES = 5_242_880
"""The upstream's body limit. Over it, it cuts the connection, which a client sees as a network fault."""

DIGEST_BYTES = 16
"""So many that no two bodies of one messageId have the same by chance."""

MAX_DEPTH = 100
"""Levels of objects and arrays. Over about 1,000 the upstream stores an unreadable event."""

_MAX_NUMBER = sys.float_info.max
"""A larger integer overflows the upstream's double-precision numbers to Infinity."""

Kind = Literal["track"]
"""The endpoint that the event came by and goes out by."""

_Identifier = str | int | float


class Event(msgspec.Struct, frozen=True, kw_only=True):
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


class _File(msgspec.Struct, rename="camel"):
    type: str
    name: str
    mime_type: str
    data: str


class _Track(msgspec.Struct, rename="camel"):
    """The types of a track body. A field may be absent or null where the contract lets it."""

    message_id: _Identifier
    event: _Identifier
    user_id: _Identifier | None = None
    anonymous_id: _Identifier | None = None
    timestamp: str | None = None
    context: dict[str, Any] | None = None
    properties: dict[str, Any] | None = None
    files: list[_File] | None = None


def parse_track(raw: bytes, *, received_ms: int, max_body_bytes: int = MAX_BODY_BYTES) -> Event:
    """Return the event that *raw*, a JSON body of /track, stands for.

    A missing timestamp becomes *received_ms*. Raises `InvalidEventError`, whose message names
    the field, what was expected and what was got.
    """
    fields = _decode_object(raw)
    _check_tree(raw, fields)
    _check_types(fields)

    # The upstream lets a top-level `type` override the stored kind of event.
    fields.pop("type", None)
    for name in ("userId", "anonymousId", "timestamp", "context", "properties", "files"):
        if name in fields and fields[name] is None:
            del fields[name]
    for name in ("messageId", "event", "userId", "anonymousId"):
        if name in fields:
            fields[name] = _identifier(name, fields[name])
    user = fields.get("userId") or fields.get("anonymousId")
    if user is None:
        raise InvalidEventError("userId: required, unless anonymousId is given; got neither")
    if "timestamp" in fields:
        fields["timestamp"] = _timestamp(fields["timestamp"])

    body = msgspec.json.encode(fields)
    digest = digest_of(body)
    if "timestamp" not in fields:
        body = _stamped(body, received_ms)
    if len(body) > max_body_bytes:
        raise InvalidEventError(
            f"body: {len(body)} bytes as it would be sent, over the limit of {max_body_bytes};"
            " send less, or split it",
            status=413,
            code="FST_ERR_CTP_BODY_TOO_LARGE",
        )
    return Event(
        message_id=fields["messageId"],
        kind="track",
        lane=lane_of(user_id=fields.get("userId"), anonymous_id=fields.get("anonymousId")),
        digest=digest,
        received_ms=received_ms,
        body=body,
    )


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
"""What `_stamped` puts at the end."""


def _stamped(body: bytes, received_ms: int) -> bytes:
    return b'%b,"timestamp":"%b"}' % (body[:-1], rfc3339(received_ms).encode())


def lane_of(*, user_id: str | None, anonymous_id: str | None) -> int:
    """Return the lane of a user: a signed 64-bit hash. Two users may share one, which only orders them."""
    key = f"u:{user_id}" if user_id is not None else f"a:{anonymous_id}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def rfc3339(instant_ms: int) -> str:
    """Return *instant_ms* (Unix ms) as RFC 3339 in UTC, to the millisecond."""
    seconds, ms = divmod(instant_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"


# --- JSON ---------------------------------------------------------------------------------------

_SURROGATE_ESCAPE = re.compile(
    rb"""(?ix) (?<!\\)(?:\\\\)*            # an even number of backslashes before the escape
    (?: \\u d[89ab][0-9a-f]{2} (?! \\u d[c-f][0-9a-f]{2} )   # a high half without its low half
      | (?<! \\u d[89ab][0-9a-f]{2} ) \\u d[c-f][0-9a-f]{2} )  # a low half without its high half
    """
)


def _decode_object(raw: bytes) -> dict[str, Any]:
    try:
        tree = msgspec.json.decode(raw)
    except RecursionError as exc:
        raise _too_deep() from exc
    except UnicodeDecodeError as exc:
        raise InvalidEventError("body: not valid UTF-8; encode the JSON as UTF-8") from exc
    except msgspec.ValidationError as exc:
        # The decoder calls this one a validation error: a number past what a double can hold.
        raise InvalidEventError("body: a number is out of range (over about 1.8e308)") from exc
    except msgspec.DecodeError as exc:
        if _SURROGATE_ESCAPE.search(raw):
            raise InvalidEventError(
                "body: a string holds half of a surrogate pair (\\ud800 to \\udfff alone);"
                " the upstream cannot read such an event back"
            ) from exc
        raise InvalidEventError(f"body: {_lower_first(str(exc))}") from exc
    if not isinstance(tree, dict):
        raise InvalidEventError(f"body: expected object, got {_type_name(tree)}")
    return tree


_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]")
"""An escape that could spell a letter of a forbidden key; encoders write none for text as it is."""

_HUGE_DIGITS = 309
_HUGE_INTEGER = re.compile(rb"[0-9]{%d}" % _HUGE_DIGITS)
_DIGIT = re.compile(rb"[0-9]")


def _check_tree(raw: bytes, fields: dict[str, Any]) -> None:
    """Refuse what would spoil an event at any depth.

    The walk visits every value; it is skipped where the bytes alone prove it needless: too few
    brackets to nest too deep, no text that could spell a forbidden key, no run of digits that long.
    """
    if (
        raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH
        and not _ASCII_ESCAPE.search(raw)
        and b"__proto__" not in raw
        and not (b'"constructor"' in raw and b'"prototype"' in raw)
        # A run of so many digits has one at every such step.
        and not (_DIGIT.search(raw[_HUGE_DIGITS - 1 :: _HUGE_DIGITS]) and _HUGE_INTEGER.search(raw))
    ):
        return
    for trail, value, depth in _walk(fields):
        match value:
            case dict() | list() if depth > MAX_DEPTH:
                raise _too_deep()
            case dict() if "__proto__" in value:
                raise _forbidden_key((trail, "__proto__"))
            case {"constructor": {"prototype": _}}:
                raise _forbidden_key((trail, "constructor.prototype"))
            case int() if abs(value) > _MAX_NUMBER:
                raise InvalidEventError(f"{_path(trail)}: number out of range (over about 1.8e308)")
            case _:
                pass


_Trail = tuple[Any, str | int] | None
"""The way to a value: the trail of its container and its key or index; None for the root.

Linked and not joined: a text for each value would take their product where a long key has many.
"""


def _walk(fields: dict[str, Any]) -> Iterator[tuple[_Trail, Any, int]]:
    """Yield (trail, value, depth) of every value, containers above their contents, the root at 1."""
    stack: list[tuple[_Trail, Any, int]] = [(None, fields, 1)]
    while stack:
        trail, value, depth = stack.pop()
        yield trail, value, depth
        if isinstance(value, dict):
            stack.extend(((trail, key), item, depth + 1) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend(((trail, i), item, depth + 1) for i, item in enumerate(value))


def _path(trail: _Trail) -> str:
    steps: list[str | int] = []
    while trail is not None:
        trail, step = trail
        steps.append(step)
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in reversed(steps))
    return _shorten(text.removeprefix("."))


def _forbidden_key(trail: _Trail) -> InvalidEventError:
    return InvalidEventError(f"{_path(trail)}: a key of this name is refused")


def _too_deep() -> InvalidEventError:
    return InvalidEventError(f"body: nested deeper than {MAX_DEPTH} levels; flatten it")


_SHOWN_CHARS = 100
"""How much of a name or value from the body an answer quotes."""


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


# --- types --------------------------------------------------------------------------------------


def _check_types(fields: dict[str, Any]) -> None:
    try:
        msgspec.convert(fields, _Track)
    except msgspec.ValidationError as exc:
        raise InvalidEventError(_field_first(str(exc))) from exc
    for i, file in enumerate(fields.get("files") or ()):
        if file["type"] != _FILE_TYPE:
            raise InvalidEventError(
                f'files[{i}].type: expected "{_FILE_TYPE}", got {_shorten(repr(file["type"]))}'
            )


_FILE_TYPE = "Base64Encoded"

_EXPECTED = re.compile(r"^Expected `(?P<expected>.*)`, got `(?P<got>.*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$")
_JSON_WORDS = {
    "str": "string",
    "int": "number",
    "float": "number",
    "bool": "boolean",
    "int | float | str": "string",
    "str | null": "string",
    "int | float | str | null": "string",
    "object | null": "object",
    "array | null": "array",
}


def _field_first(message: str) -> str:
    """Return msgspec's message with the field in front: `properties: expected object, got array`."""
    what, _, where = message.partition(" - at `$")
    path = where.removesuffix("`").removeprefix(".")
    if missing := _MISSING.match(what):
        return f"{path}{'.' if path else ''}{missing['name']}: required, but missing"
    if expected := _EXPECTED.match(what):
        wanted = _JSON_WORDS.get(expected["expected"], expected["expected"])
        got = _JSON_WORDS.get(expected["got"], expected["got"])
        return f"{path}: expected {wanted}, got {got}"
    return f"{path or 'body'}: {_lower_first(what)}"


def _type_name(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _lower_first(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _identifier(name: str, value: _Identifier) -> str:
    """Return an id as the string that the upstream would make of it.

    But for integers past 2**53: those keep all digits, where the upstream would round two into one.
    """
    match value:
        case "":
            raise InvalidEventError(f"{name}: must not be empty")
        case float():
            return _ecmascript(value)
        case _:
            return str(value)


def _ecmascript(value: float) -> str:
    """Return a number as the upstream writes it. Source: ECMA-262, Number::toString."""
    if value.is_integer() and abs(value) < 1e21:
        return str(int(value))
    if 1e-6 <= abs(value) < 1e21:
        return f"{Decimal(repr(value)):f}"
    digits, _, exponent = repr(value).partition("e")
    return f"{digits}e{int(exponent):+d}"


_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?"
    r"(?P<zone>Z|[+-][0-2][0-9]:[0-5][0-9])?"
)
_ISO8601 = re.compile(
    r"[0-9]{4}(?P<dash>-?)[0-9]{2}(?P=dash)[0-9]{2}"
    r"([T ][0-9]{2}(:?[0-9]{2}(:?[0-9]{2}([.,][0-9]+)?)?)?(Z|[+-][0-2][0-9](:?[0-5][0-9])?)?)?",
    re.IGNORECASE,
)
"""Calendar dates and times, basic and extended; Python reads more, the upstream does not."""


def _timestamp(text: str) -> str:
    """Return *text* in a form that the upstream reads as the same instant; a naive one is UTC.

    Other ISO 8601 notations are rewritten, because the upstream stores what it cannot read as 1970.
    """
    try:
        if match := _RFC3339.fullmatch(text):
            datetime.fromisoformat(text)  # of its form, but the day must exist, too
            return text if match["zone"] else f"{text}Z"
        if _ISO8601.fullmatch(text):
            instant = datetime.fromisoformat(text.upper())
            aware = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
            utc = aware.astimezone(UTC).replace(tzinfo=None)
            return f"{utc.isoformat(timespec='milliseconds')}Z"
    except (ValueError, OverflowError):
        pass
    raise InvalidEventError(
        f"timestamp: expected an ISO 8601 date and time such as 2026-11-23T10:00:00.000Z,"
        f" got {_shorten(repr(text))}; leave it out to use the time of receipt"
    )
