"""Bodies without number: sound ones of every kind, spoilt in their members and then in their bytes.

Seeded, so that body *n* of a seed is the same everywhere. `ENDPOINTS` says what is posted where, and
how the agent reads it; a new endpoint is a new line there, with a maker of sound bodies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from agent.contract import PLAIN, Terms, read_batch, read_event
from agent.event import KINDS, Event, Kind
from agent.ingest.dialect import SEGMENT
from agent.segment import translate

Fields = dict[str, Any]

# --- sound bodies ---

_WORDS = (
    "",
    "a",
    "Plan",
    "caf\xe9",
    "\u2028",
    "\U0001f600",
    "null",
    "1043",
    "x" * 300,
    " ",
    '"',
    "\\",
)
_NUMBERS = (0, -1, 1, 1043, 2**31, 2**53, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e-7, 1e21, 1.5e300)
_TIMES = (
    "2026-11-23T10:00:00.000Z",
    "2026-11-23T10:00:00+05:30",
    "2026-11-23T10:00:00",
    "2026-11-23 10:00",
    "20261123T100000Z",
    "2026-11-23",
)


def _tree(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(7 if depth < 3 else 5):
        case 0:
            return rng.choice(_WORDS)
        case 1:
            return rng.choice(_NUMBERS)
        case 2:
            return rng.choice((None, True, False))
        case 3 | 4:
            return rng.random()
        case 5:
            return [_tree(rng, depth + 1) for _ in range(rng.randrange(3))]
        case _:
            return _object(rng, depth)


def _nested(levels: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(levels - 1):
        tree = [tree]
    return tree


def _object(rng: random.Random, depth: int = 0) -> Fields:
    return {rng.choice(_WORDS): _tree(rng, depth + 1) for _ in range(rng.randrange(4))}


def _identifier(rng: random.Random) -> Any:
    return rng.choice((f"u-{rng.randrange(10)}", rng.randrange(10**12), rng.random() * 1e9))


def _message(rng: random.Random, number: int) -> Fields:
    fields: Fields = {"messageId": f"m-{number}-{rng.getrandbits(32):08x}"}
    for name in rng.choice((("userId",), ("anonymousId",), ("anonymousId", "userId"))):
        fields[name] = _identifier(rng)
    if rng.random() < 0.5:
        fields["timestamp"] = rng.choice(_TIMES)
    if rng.random() < 0.5:
        fields["context"] = _object(rng)
    return fields


def _track(rng: random.Random, number: int) -> Fields:
    fields = {**_message(rng, number), "event": "Item Sold", "properties": _object(rng)}
    if rng.random() < 0.2:
        file = {"type": "Base64Encoded", "name": "a.txt", "mimeType": "text/plain", "data": "YQ=="}
        fields["files"] = [file] * rng.randrange(3)
    return fields


def _identify(rng: random.Random, number: int) -> Fields:
    return {**_message(rng, number), "traits": _object(rng)}


def _view(rng: random.Random, number: int) -> Fields:
    return {**_message(rng, number), "name": rng.choice(_WORDS), "properties": _object(rng)}


def _group(rng: random.Random, number: int) -> Fields:
    assigned = rng.choice((True, False, None))
    return {**_message(rng, number), "groupId": "g-1", "assigned": assigned, "traits": _object(rng)}


_SOUND: Mapping[Kind, Callable[[random.Random, int], Fields]] = {
    "track": _track,
    "identify": _identify,
    "page": _view,
    "screen": _view,
    "group": _group,
}


def _batch(rng: random.Random, number: int) -> Fields:
    items = []
    for _ in range(rng.randrange(5)):
        kind = rng.choice(KINDS)
        items.append({**_SOUND[kind](rng, number), "type": kind})
    body: Fields = {"batch": items}
    if rng.random() < 0.5:
        body["context"] = _object(rng)
    return body


def _segment(kind: Kind, rng: random.Random, number: int) -> Fields:
    """Return what an SDK makes of it, or might."""
    fields = {**_SOUND[kind](rng, number), "type": kind}
    more: Fields = {
        "sentAt": rng.choice(_TIMES),
        "originalTimestamp": rng.choice(_TIMES),
        "writeKey": "wk",
        "category": rng.choice((_tree(rng), _nested(99))),
        "integrations": _object(rng),
        "_metadata": {"retryCount": 1, "bundled": []},
        "messageId": rng.choice(("", None)),
        "userId": rng.choice(("", None)),
        "context": {"traits": _object(rng), "library": {"name": "analytics.js"}},
        "previousId": None,
    }
    for name in rng.sample(sorted(more), rng.randrange(5)):
        fields[name] = more[name]
    return fields


def _segment_batch(rng: random.Random, number: int) -> Fields:
    body = _batch(rng, number)
    body["batch"] = [_segment(rng.choice(KINDS), rng, number) for _ in body["batch"]]
    if rng.random() < 0.5:
        body["integrations"] = _object(rng)
    return body


# --- where they go, and who reads them ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """*sound* makes a body that is accepted; *read* returns the events of any, or refuses it.

    *translated* says that they are not in the upstream's words, *stored* what they are answered.
    """

    path: str
    sound: Callable[[random.Random, int], Fields]
    read: Callable[[bytes, int], list[Event]]
    translated: bool = False
    stored: int = 204
    content_type: str = "application/json"

    @property
    def is_batch(self) -> bool:
        return self.path.endswith("batch")


MADE = "made for a message that had no id"

_TRANSLATED = msgspec.structs.replace(
    SEGMENT.terms(PLAIN), translate=partial(translate, new_id=lambda: MADE)
)


def _reader(kind: Kind, terms: Terms) -> Callable[[bytes, int], list[Event]]:
    return lambda raw, received_ms: [read_event(kind, raw, received_ms=received_ms, terms=terms)]


def _batch_reader(terms: Terms) -> Callable[[bytes, int], list[Event]]:
    return lambda raw, received_ms: list(read_batch(raw, received_ms=received_ms, terms=terms))


def _endpoints() -> Iterator[Endpoint]:
    apps = "/api/public/apps"
    for kind in KINDS:
        yield Endpoint(path=f"{apps}/{kind}", sound=_SOUND[kind], read=_reader(kind, PLAIN))
    yield Endpoint(path=f"{apps}/batch", sound=_batch, read=_batch_reader(PLAIN))
    segment = partial(Endpoint, translated=True, stored=200, content_type="text/plain")
    for kind in KINDS:
        yield segment(
            path=f"/v1/{kind}", sound=partial(_segment, kind), read=_reader(kind, _TRANSLATED)
        )
    yield segment(path="/v1/batch", sound=_segment_batch, read=_batch_reader(_TRANSLATED))


ENDPOINTS: Mapping[str, Endpoint] = {endpoint.path: endpoint for endpoint in _endpoints()}

# --- what is wrong with them: in their members ---

_NAMES = (
    *("messageId", "userId", "anonymousId", "groupId", "event", "name", "type", "timestamp"),
    *("context", "properties", "traits", "files", "assigned", "batch", "data", "mimeType"),
    *("sentAt", "originalTimestamp", "category", "integrations", "writeKey", "_metadata"),
    *("__proto__", "constructor", "prototype", "toString", "", "\0", "\ufffe", "user\u0130d"),
)

_RAW = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1e999",
        "1" + "0" * 400,
        "-0",
        "01",
        "+1",
        ".5",
        "1.",
    ),
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\\\ud800"',
        '"\\u0000"',
        '"\t"',
        '"\\x"',
    ),
    *('{"\\u005f_proto__":1}', '{"constructor":{"prototype":1}}', '{"__proto__":null}'),
    *("[" * 99 + "]" * 99, "[" * 101 + "]" * 101, "[" * 5000 + "]" * 5000, '{"a":' * 2000),
    *('{"a":1,"a":2}', "[1,]", "{,}", "'x'", "nul", "true false", "/**/1", "", "\ufeff1"),
)
"""Values as they stand in JSON, or should not."""

_PLACE = "\x00RAW\x00"
_PLACE_JSON = json.dumps(_PLACE)


def _odd_value(rng: random.Random) -> Any:
    match rng.randrange(8):
        case 0:
            return rng.choice((None, True, False, "", [], {}, 0, -0.0))
        case 1:
            return rng.choice(
                ("yesterday", "2026-02-30", "2026-W48-1", "0000-00-00T00:00:00Z", "9" * 40)
            )
        case 2:
            return rng.choice(_NUMBERS)
        case 3:
            return "".join(chr(rng.choice((0, 31, 34, 92, 127, 0x2028, 0xFFFF))) for _ in range(9))
        case 4:
            return rng.choice(KINDS)
        case 5:
            return "y" * rng.choice((99, 100, 101, 5000))
        case 6:
            return _PLACE
        case _:
            return _tree(rng)


def _spoil_members(rng: random.Random, fields: Fields) -> None:
    """Change one thing somewhere in the tree."""
    place: Any = fields
    while True:
        inner = list(place.values()) if isinstance(place, dict) else list(place)
        containers = [value for value in inner if isinstance(value, dict | list) and value]
        if not containers or rng.random() < 0.5:
            break
        place = rng.choice(containers)
    if isinstance(place, list):
        if place and rng.random() < 0.7:
            place[rng.randrange(len(place))] = _odd_value(rng)
        else:
            place.append(_odd_value(rng))
        return
    name = rng.choice(list(place)) if place and rng.random() < 0.7 else rng.choice(_NAMES)
    match rng.randrange(4):
        case 0:
            place.pop(name, None)
        case 1 if name in place:
            place[rng.choice(_NAMES)] = place.pop(name)
        case _:
            place[name] = _odd_value(rng)


# --- and in their bytes ---

_TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\0",
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
    ),
    *(b"\xef\xbb\xbf", b"\r\n", b"null", b"1e309", b"\\ud800", b'"type":', b'"messageId":', b"{}"),
)


def _spoil_bytes(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw) + 1)
    end = min(len(raw), at + rng.randrange(1, 20))
    match rng.randrange(6):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + raw[end:]
        case 2:
            return raw[:at] + raw[at:end] + raw[at:]
        case 3:
            return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        case _:
            return raw[:at] + rng.choice(_TOKENS) + raw[at:]


def body(rng: random.Random, endpoint: Endpoint, number: int) -> bytes:
    """Return one body for *endpoint*: one in five is sound, one in five is spoilt in its bytes."""
    fields = endpoint.sound(rng, number)
    spoilt = rng.random()
    if spoilt > 0.2:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _spoil_members(rng, fields)
    compact = rng.random() < 0.5
    text = json.dumps(
        fields, ensure_ascii=rng.random() < 0.5, separators=(",", ":") if compact else None
    )
    if _PLACE_JSON in text:
        text = text.replace(_PLACE_JSON, rng.choice(_RAW))
    raw = text.encode("utf-8", "surrogatepass")
    if spoilt > 0.8:
        for _ in range(rng.choice((1, 1, 2, 5))):
            raw = _spoil_bytes(rng, raw)
    return raw


def bodies(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield *count* (path, body)."""
    rng = random.Random(seed)
    paths = tuple(ENDPOINTS)
    for number in range(count):
        path = rng.choice(paths)
        yield path, body(rng, ENDPOINTS[path], number)


def shrunk(raw: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Return a shorter body that still *fails*, for a person to read."""
    size = len(raw) // 2
    while size:
        at = 0
        while at < len(raw):
            less = raw[:at] + raw[at + size :]
            if fails(less):
                raw = less
            else:
                at += size
        size //= 2
    return raw
