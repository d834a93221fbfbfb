"""Whatever an app posts, what is stored keeps the contract and loses nothing that was said.

The judge here is written from the contract and shares no code with the agent.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract import MAX_BODY_BYTES, read_event
from agent.errors import InvalidEventError
from agent.event import Event

IDS = ("messageId", "event", "userId", "anonymousId")
NULLABLE = ("userId", "anonymousId", "timestamp", "context", "properties", "files")

# A busy machine draws slowly; that is no fault of what is tested.
BUSY = [HealthCheck.too_slow]

# --- the judge ---------------------------------------------------------------------------------------


class ContractBrokenError(Exception):
    """The body is not what the contract allows."""


class UndecidedError(ContractBrokenError):
    """A notation of ISO 8601 that the contract names in no row: it may be refused or rewritten."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ContractBrokenError(what)


def read_strictly(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: no NaN, nothing past a double, no half of a surrogate pair."""

    def number(text: str) -> float:
        require(math.isfinite(float(text)), f"{text} overflows")
        return float(text)

    def constant(text: str) -> None:
        raise ContractBrokenError(text)

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            key.encode()
            json.dumps(value, ensure_ascii=False).encode()
        return dict(pairs)

    try:
        tree = json.loads(
            raw.decode(), parse_float=number, parse_constant=constant, object_pairs_hook=members
        )
    except (ValueError, RecursionError) as exc:
        raise ContractBrokenError(str(exc)) from exc
    return tree


def require_sound(value: Any, depth: int = 1) -> None:
    if isinstance(value, int):
        require(abs(value) <= sys.float_info.max, "an integer overflows")
    if isinstance(value, dict | list):
        require(depth <= 100, "too deep")
    if isinstance(value, dict):
        require("__proto__" not in value, "__proto__")
        inner = value.get("constructor")
        require(not (isinstance(inner, dict) and "prototype" in inner), "constructor.prototype")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            require_sound(item, depth + 1)


_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,12}))?)?(Z|z|[+-]\d\d:?\d\d)?)?",
    re.ASCII,
)


def instant(text: str) -> datetime:
    """The instant that an ISO 8601 text means, to the millisecond; without a zone it is UTC."""
    found = _ISO.fullmatch(text)
    if found is None:
        unknown = UndecidedError if re.match(r"\d{4}", text) else ContractBrokenError
        raise unknown(f"timestamp {text!r}")
    year, month, day, hour, minute, second, fraction, zone = found.groups(default="")
    offset = timedelta()
    if zone not in {"", "Z", "z"}:
        digits = zone[1:].replace(":", "")
        require(int(digits[:2]) < 24, "offset")
        require(int(digits[2:]) < 60, "offset")
        offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        offset = -offset if zone[0] == "-" else offset
    try:
        wall = datetime(
            int(year),
            int(month),
            int(day),
            int(hour or 0),
            int(minute or 0),
            int(second or 0),
            int(f"{fraction:0<3}"[:3]) * 1000,
            tzinfo=UTC,
        )
    except ValueError as exc:
        raise ContractBrokenError(str(exc)) from exc
    try:
        return wall - offset
    except OverflowError as exc:
        raise UndecidedError(str(exc)) from exc


def require_contract(fields: Any) -> None:
    """The documented table of /track, and the rows of what upstream would spoil."""
    require(isinstance(fields, dict), "not an object")
    require_sound(fields)
    for name in IDS:
        if name in fields:
            require(isinstance(fields[name], str) and fields[name] != "", name)
    require("messageId" in fields and "event" in fields, "required")
    require("userId" in fields or "anonymousId" in fields, "either id")
    require("type" not in fields, "type")
    require(isinstance(fields.get("timestamp"), str), "timestamp")
    require(re.search(r"T.*(Z|[+-]\d\d:\d\d)$", fields["timestamp"]) is not None, "no zone")
    instant(fields["timestamp"])
    for name in ("context", "properties"):
        require(isinstance(fields.get(name, {}), dict), name)
    require(isinstance(fields.get("files", []), list), "files")
    for file in fields.get("files", []):
        require(isinstance(file, dict), "file")
        for name in ("type", "name", "mimeType", "data"):
            require(isinstance(file.get(name), str), name)
        require(file["type"] == "Base64Encoded", "encoding")


def in_utc(at: datetime) -> str:
    return at.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def id_text(value: float) -> str:
    """As ECMAScript writes a number (ECMA-262, Number::toString); of a whole one every digit."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e21):
        return str(int(value))
    sign, figures, exponent = Decimal(repr(value)).normalize().as_tuple()
    digits = "".join(map(str, figures))
    point = len(digits) + int(exponent)
    if 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1:+d}"
    return f"{'-' if sign else ''}{text}"


def repaired(fields: dict[str, Any], received: str) -> dict[str, Any]:
    """What the documented repairs make of a body; every other field is the app's."""
    result = {name: value for name, value in fields.items() if name != "type"}
    for name in NULLABLE:
        if name in result and result[name] is None:
            del result[name]
    for name in IDS:
        value = result.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            result[name] = id_text(value)
    given_as = result.setdefault("timestamp", received)
    if isinstance(given_as, str):
        # Judged as an instant; how it is written is compared apart.
        result["timestamp"] = in_utc(instant(given_as))
    return result


def expected(raw: bytes, received: str) -> dict[str, Any] | None:
    """What must be stored of *raw*, or None if it must be refused. Raises `UndecidedError`."""
    try:
        fields = read_strictly(raw)
        require(isinstance(fields, dict), "not an object")
        require_sound(fields)
        # A timestamp of unknown notation settles nothing if something else is wrong.
        require_contract(repaired(fields | {"timestamp": None}, received))
        result = repaired(fields, received)
        require_contract(result)
    except UndecidedError:
        raise
    except ContractBrokenError:
        return None
    return result


# --- what apps post ----------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(),
    st.integers(-(10**320), 10**320),
    st.floats(allow_nan=False, allow_infinity=False),
)
odd_text = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from('\\"/\x00\x1f\x7f\u2028\ufeff\uffff{}[]ud8\ud83d\ude00\ud800'),
    ),
    max_size=12,
)
text = st.text(max_size=12)
keys = st.one_of(text, st.sampled_from(["a", "type", "constructor", "prototype", "__proto__"]))
tame_keys = st.text(max_size=12).filter(lambda key: key not in {"__proto__", "constructor"})


def trees(names: st.SearchStrategy[str], words: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, words),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)
        ),
        max_leaves=8,
    )


def deep(depth: int) -> Any:
    tree: Any = 1
    for level in range(depth):
        tree = [tree] if level % 2 else {"a": tree}
    return tree


def files(words: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries(
        {"type": st.just("Base64Encoded"), "name": words, "mimeType": words, "data": words}
    )


# Past its ends a zone could carry an instant out of the years that a clock knows.
instants = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29))  # noqa: DTZ001  # a wall time
zones = st.sampled_from(["", "Z", "z", "+00:00", "-08:00", "+0530", "+14:00", "-23:59"])
written: st.SearchStrategy[Callable[[datetime], str]] = st.sampled_from(
    [
        datetime.isoformat,
        lambda at: at.isoformat(timespec="seconds"),
        lambda at: at.isoformat(timespec="milliseconds"),
        lambda at: at.isoformat(timespec="microseconds") + "789",
        lambda at: at.isoformat(sep=" ", timespec="minutes"),
        lambda at: at.isoformat(sep="t"),
        lambda at: at.isoformat().replace(".", ","),
    ]
)
timestamps = st.one_of(
    st.builds(lambda at, write, zone: write(at) + zone, instants, written, zones),
    st.dates().map(str),
)
id_numbers = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)
)
ids = st.one_of(st.text(min_size=1, max_size=12), id_numbers)
tame_trees = trees(tame_keys, text).filter(
    lambda tree: "Infinity" not in json.dumps(tree) and not re.search(r"\d{308}", json.dumps(tree))
)
objects = st.dictionaries(tame_keys, tame_trees, max_size=4)


@st.composite
def sound_members(draw: st.DrawFn) -> dict[str, Any]:
    """The members of a body that the contract allows, some of them only once repaired."""
    members: dict[str, Any] = {"messageId": draw(ids), "event": draw(ids)}
    used, unused = draw(st.permutations(["userId", "anonymousId"]))
    members[used] = draw(ids)
    if draw(st.booleans()):
        members[unused] = draw(st.one_of(st.none(), ids))
    optional = {
        "timestamp": timestamps,
        "properties": objects,
        "context": objects,
        "files": st.lists(files(text), max_size=2),
        "type": st.just("identify"),
        "traits": objects,
        "unknown": st.one_of(tame_trees, st.sampled_from([97, 98, 99]).map(deep)),
    }
    for name in draw(st.sets(st.sampled_from(sorted(optional)))):
        nullable = name not in {"traits", "unknown"}
        values = st.one_of(optional[name], st.none()) if nullable else optional[name]
        members[name] = draw(values)
    return members


wild_values = st.one_of(
    trees(keys, odd_text),
    st.sampled_from(["", 0, -0.0, 1e21, 10**309, [], {}, True, "yesterday", "2026-W48-1"]),
    st.sampled_from([96, 98, 99, 100, 300, 1500]).map(deep),
    timestamps,
    st.lists(files(odd_text).map(lambda file: {**file, "type": "Url"}), min_size=1, max_size=1),
    odd_text,
)
wild_text = st.sampled_from(
    [
        *("NaN", "Infinity", "-Infinity", "1e400", "-1e999", "1" + "0" * 400),
        *('"\\ud800"', '"\\ud83d\\ude00"', '"\\\\ud800"', '"\t"'),
        *('{"\\u005f_proto__":1}', "[" * 2000 + "]" * 2000, "01", "'x'", ""),
    ]
)


# One thing wrong behind a sound body: each is drawn a few times in every run.
stings = st.sampled_from(
    [
        *((f'"{name}"', '""') for name in IDS),
        ('"x"', json.dumps(deep(100))),
        ('"x"', '[{"__proto__":1}]'),
        ('"x"', r'{"\u005f_proto__":1}'),
        ('"x"', '{"constructor":{"prototype":1}}'),
        ('"x"', "1" + "0" * 309),
        ('"x"', "-1" + "0" * 309),
        ('"x"', "NaN"),
        ('"x"', r'"\udead"'),
        ('"timestamp"', '"2026-W48-1"'),
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A body, sound or with members replaced, taken away or written twice."""
    as_ascii = draw(st.booleans())

    def write(value: Any) -> str:
        written = json.dumps(value, ensure_ascii=as_ascii)
        try:
            written.encode()
        except UnicodeEncodeError:
            return json.dumps(value)
        return written

    members = [(write(name), write(value)) for name, value in draw(sound_members()).items()]
    if draw(st.sampled_from([True, False, False])):
        members.append(draw(stings))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        name = write(draw(st.one_of(st.sampled_from([*IDS, *NULLABLE, "type", "new"]), keys)))
        if draw(st.booleans()):
            members = [member for member in members if member[0] != name]
        if draw(st.sampled_from([True, True, False])):
            value = draw(st.one_of(wild_values.map(write), wild_text))
            members.insert(draw(st.integers(0, len(members))), (name, value))
    return ("{" + ",".join(f"{name}:{value}" for name, value in members) + "}").encode()


@st.composite
def noise(draw: st.DrawFn) -> bytes:
    """Bytes that once were a body, or never."""
    raw = bytearray(draw(bodies()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw[: draw(st.one_of(st.none(), st.integers(0, len(raw))))])


receipts = st.integers(0, 4_102_444_800_000)


def received_as_text(instant_ms: int) -> str:
    return in_utc(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=instant_ms))


def parse(raw: bytes, received_ms: int) -> Event | InvalidEventError:
    """Anything else that it raises is a failure of the test."""
    try:
        return read_event("track", raw, received_ms=received_ms)
    except InvalidEventError as exc:
        return exc


def check(raw: bytes, received_ms: int) -> None:
    event = parse(raw, received_ms)
    if isinstance(event, Event):
        fields = read_strictly(event.body)
        require_contract(fields)
        assert len(event.body) <= MAX_BODY_BYTES
        assert event.message_id == fields["messageId"]
    else:
        assert event.status == 400
        assert ": " in str(event)
    try:
        wanted = expected(raw, received_as_text(received_ms))
    except UndecidedError:
        return
    if isinstance(event, InvalidEventError):
        assert wanted is None, f"refused ({event}), but it keeps the contract"
        return
    assert wanted is not None, f"stored as {event.body!r}, but it breaks the contract"
    fields["timestamp"] = repaired(fields, "")["timestamp"]
    # As text, so that 1 is not 1.0 and True is not 1.
    assert {name: repr(value) for name, value in fields.items()} == {
        name: repr(value) for name, value in wanted.items()
    }


@settings(max_examples=200, deadline=None, suppress_health_check=BUSY)
@given(raw=bodies(), received_ms=receipts)
def test_what_is_stored_is_what_was_said_and_keeps_the_contract(
    raw: bytes, received_ms: int
) -> None:
    check(raw, received_ms)


@settings(max_examples=150, deadline=None, suppress_health_check=BUSY)
@given(raw=noise(), received_ms=receipts)
def test_damaged_bytes_are_judged_alike_and_raise_nothing_else(
    raw: bytes, received_ms: int
) -> None:
    check(raw, received_ms)


@settings(max_examples=150, deadline=None, suppress_health_check=BUSY)
@given(members=sound_members(), first_ms=receipts, again_ms=receipts)
def test_a_stored_body_read_again_is_the_same_event(
    members: dict[str, Any], first_ms: int, again_ms: int
) -> None:
    raw = json.dumps(members).encode()
    first = read_event("track", raw, received_ms=first_ms)
    assert read_event("track", raw, received_ms=first_ms) == first

    later = read_event("track", raw, received_ms=again_ms)
    assert (later.message_id, later.lane, later.digest) == (
        first.message_id,
        first.lane,
        first.digest,
    )
    again = read_event("track", first.body, received_ms=again_ms)
    assert again.body == first.body
    assert (again.message_id, again.lane) == (first.message_id, first.lane)
    if members.get("timestamp") is not None:
        assert later.body == first.body
        assert again.digest == first.digest
