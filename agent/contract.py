"""The contract: what an app posts in, validated, normalised and stamped events out.

This module is the edge of the documented contract. What the upstream would refuse is refused
here, where the app can still be told; what it would accept and silently spoil is repaired or
refused. Pure: no clock, no socket, no database. Called by `agent.ingest.routes`.

    raw ─▶ document ─▶ translate ─▶ types ─▶ normalise ─▶ refine ─▶ encode, digest, stamp ─▶ Event
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, ParamSpec, TypeVar

import msgspec

from agent.document import lower_first, read_items, read_members, read_object, shorten
from agent.errors import InvalidEventError
from agent.event import KINDS, Event, Kind, digest_of, lane_of, stamped

MAX_BODY_BYTES = 5_242_880
"""The upstream's body limit. Over it, it cuts the connection, which a client sees as a network fault."""

_SPREAD = 4
"""How many times the limit of a body the events of one batch may take, with the context that they share."""

Fields = dict[str, Any]

Translate = Callable[[Kind, Fields], Fields]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How bodies are read here.

    *translate* returns a message in the upstream's words, before anything is asked of it. *refine*
    changes an event's members in place, before they are stored; what an event needs stays. *shared*
    are the members of a batch that are merged into those of its events.
    """

    max_body_bytes: int = MAX_BODY_BYTES
    shared: tuple[str, ...] = ("context",)
    translate: Translate | None = None
    refine: Callable[[Fields], None] | None = None


PLAIN = Terms()

# What the checks further down ask beyond the types is said here for the description of the API alone
# (`msgspec.Meta.extra_json_schema`), which costs nothing when a body is read.

_Text = Annotated[str, msgspec.Meta(extra_json_schema={"minLength": 1})] | int | float
"""What the upstream makes a string of."""

_Timestamp = Annotated[
    str,
    msgspec.Meta(
        description="ISO 8601; without a zone it is UTC, and without it the time of receipt.",
        extra_json_schema={"format": "date-time"},
    ),
]

_IDENTIFIED = msgspec.Meta(
    extra_json_schema={
        "anyOf": [
            {
                "required": [name],
                "properties": {name: {"type": ["string", "number"], "minLength": 1}},
            }
            for name in ("userId", "anonymousId")
        ]
    }
)
"""Of the two ids one is not null."""


class _Message(msgspec.Struct, rename="camel"):
    """What all kinds have. A member may be absent or null where it has a default."""

    message_id: _Text
    user_id: _Text | None = None
    anonymous_id: _Text | None = None
    timestamp: _Timestamp | None = None
    context: dict[str, Any] | None = None


_FILE_TYPE = "Base64Encoded"


class _File(msgspec.Struct, rename="camel"):
    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": _FILE_TYPE})]
    name: str
    mime_type: str
    data: str


class _Track(_Message, kw_only=True):
    event: _Text
    properties: dict[str, Any] | None = None
    files: list[_File] | None = None


class _Identify(_Message):
    traits: dict[str, Any] | None = None


class _View(_Message):
    """Of a page or a screen."""

    name: str | int | float | None = None
    properties: dict[str, Any] | None = None


class _Group(_Message, kw_only=True):
    group_id: _Text
    assigned: bool | None = None
    traits: dict[str, Any] | None = None


class _Shape:
    """What is asked of one kind. *optional* members are dropped where they are null."""

    def __init__(self, struct: type[_Message], *texts: str) -> None:
        self.struct = struct
        self.optional = tuple(
            member.encode_name for member in msgspec.structs.fields(struct) if not member.required
        )
        self.texts = ("messageId", "userId", "anonymousId", *texts)


_SHAPES: dict[Kind, _Shape] = {
    "track": _Shape(_Track, "event"),
    "identify": _Shape(_Identify),
    "page": _Shape(_View),
    "screen": _Shape(_View),
    "group": _Shape(_Group, "groupId"),
}


def type_of(kind: Kind) -> Any:
    """Return the type of a body of that kind, for whoever describes it."""
    return Annotated[_SHAPES[kind].struct, _IDENTIFIED]


def read_event(kind: Kind, raw: bytes, *, received_ms: int, terms: Terms = PLAIN) -> Event:
    """Return the event that *raw*, a JSON body posted to the endpoint of *kind*, stands for.

    A missing timestamp becomes *received_ms*. Raises `InvalidEventError`, whose message names
    the field, what was expected and what was got.
    """
    return _event(kind, read_object(raw), received_ms, terms)


def read_batch(raw: bytes, *, received_ms: int, terms: Terms = PLAIN) -> Iterator[Event]:
    """Yield the events of *raw*, a JSON body posted to /batch, in their order.

    The batch's own context is merged into theirs, where it says what they do not; likewise all that
    *terms* call shared. Raises as `read_event`; the message names the item by its index.
    """
    members = read_members(raw)
    if "batch" not in members:
        raise InvalidEventError("batch: required, but missing")
    shared = {name: members[name] for name in terms.shared if members.get(name, _NULL) != _NULL}
    for name, value in shared.items():
        _within(name, read_object, value, depth=2)  # as in each of the events
    left_bytes = _SPREAD * terms.max_body_bytes
    for index, item in enumerate(_within("batch", read_items, members["batch"])):
        event = _within(f"batch[{index}]", _item, item, shared, received_ms, terms)
        left_bytes -= len(event.body)
        if left_bytes < 0:
            raise _too_large(
                f"batch[{index}]: up to here the events take over {_SPREAD * terms.max_body_bytes}"
                " bytes, each with the context that they share"
            )
        yield event


_NULL = b"null"


def _item(raw: bytes, shared: dict[str, bytes], received_ms: int, terms: Terms) -> Event:
    fields = read_object(raw)
    kind = fields.get("type")
    if kind not in KINDS:
        got = f"got {shorten(repr(kind))}" if "type" in fields else "but it is missing"
        raise InvalidEventError(f"type: expected one of {', '.join(KINDS)}, {got}")
    for name, value in shared.items():
        own = fields.get(name)
        if own is None or isinstance(own, dict):
            # Read anew for each: what one event's refining changes is not another's.
            fields[name] = {**read_object(value), **(own or {})}
    return _event(kind, fields, received_ms, terms)


def _event(kind: Kind, fields: Fields, received_ms: int, terms: Terms) -> Event:
    if terms.translate is not None:
        fields = terms.translate(kind, fields)
    _normalise(fields, _SHAPES[kind])
    if terms.refine is not None:
        terms.refine(fields)

    body = msgspec.json.encode(fields)
    digest = digest_of(body)
    if "timestamp" not in fields:
        body = stamped(body, received_ms)
    if len(body) > terms.max_body_bytes:
        raise _too_large(
            f"body: {len(body)} bytes as it would be sent, over the limit of {terms.max_body_bytes}"
        )
    return Event(
        message_id=fields["messageId"],
        kind=kind,
        lane=lane_of(user_id=fields.get("userId"), anonymous_id=fields.get("anonymousId")),
        digest=digest,
        received_ms=received_ms,
        body=body,
    )


def _normalise(fields: Fields, shape: _Shape) -> None:
    _check_types(fields, shape)
    # The upstream lets a top-level `type` override the stored kind of event.
    fields.pop("type", None)
    for name in shape.optional:
        if name in fields and fields[name] is None:
            del fields[name]
    for name in shape.texts:
        value = fields.get(name)
        if value is None or (value and isinstance(value, str)):
            continue  # as nearly all are
        fields[name] = _identifier(name, value)
    if "userId" not in fields and "anonymousId" not in fields:
        raise InvalidEventError("userId: required, unless anonymousId is given; got neither")
    if "timestamp" in fields:
        fields["timestamp"] = _timestamp(fields["timestamp"])


def _too_large(what: str) -> InvalidEventError:
    return InvalidEventError(
        f"{what}; send less, or split it", status=413, code="FST_ERR_CTP_BODY_TOO_LARGE"
    )


P = ParamSpec("P")
R = TypeVar("R")


def _within(place: str, read: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what *read* returns. Its refusal says that what it names is in *place*."""
    try:
        return read(*args, **kwargs)
    except InvalidEventError as exc:
        field = str(exc)
        whole = field.startswith("body:")
        text = place + (field.removeprefix("body") if whole else f".{field}")
        raise InvalidEventError(text, status=exc.status, code=exc.code) from exc


def _check_types(fields: Fields, shape: _Shape) -> None:
    try:
        msgspec.convert(fields, shape.struct)
    except msgspec.ValidationError as exc:
        raise InvalidEventError(_field_first(str(exc))) from exc
    if shape.struct is not _Track or not fields.get("files"):
        return
    for i, file in enumerate(fields["files"]):
        if file["type"] != _FILE_TYPE:
            raise InvalidEventError(
                f'files[{i}].type: expected "{_FILE_TYPE}", got {shorten(repr(file["type"]))}'
            )


_EXPECTED = re.compile(r"^Expected `(?P<expected>.*)`, got `(?P<got>.*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$")
_JSON_WORDS = {
    "str": "string",
    "int": "number",
    "float": "number",
    "bool": "boolean",
    "bool | null": "boolean",
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
    return f"{path or 'body'}: {lower_first(what)}"


def _identifier(name: str, value: _Text) -> str:
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
        f" got {shorten(repr(text))}; leave it out to use the time of receipt"
    )
