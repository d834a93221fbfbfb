"""The contract at the edge: what is stored as it came, what is repaired, and what is refused by name."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.contract import MAX_BODY_BYTES, Terms, read_event
from agent.errors import InvalidEventError
from agent.event import Event, lane_of, rfc3339

RECEIVED_MS = 1_700_000_000_123
RECEIVED = "2023-11-14T22:13:20.123Z"

NOON = "2026-11-23T12:00:00.000Z"
FILE = {"type": "Base64Encoded", "name": "a.png", "mimeType": "image/png", "data": "aGk="}

# Printed, it would be a megabyte in the app's log.
MESSAGE_CHARS = 1000


def track(**fields: object) -> bytes:
    body = {"event": "Sold", "userId": "u1", "messageId": "m1", "timestamp": NOON} | fields
    return json.dumps(body).encode()


def track_without(missing: str, /, **fields: object) -> bytes:
    body = json.loads(track(**fields))
    del body[missing]
    return json.dumps(body).encode()


def track_text(member: str) -> bytes:
    """A body with *member*, written in JSON as it stands, at its end."""
    return b'{"event":"Sold","userId":"u1","messageId":"m1",' + member.encode() + b"}"


def parse(raw: bytes) -> Event:
    return read_event("track", raw, received_ms=RECEIVED_MS)


def stored(raw: bytes) -> dict[str, Any]:
    fields = json.loads(parse(raw).body)
    assert isinstance(fields, dict)
    return fields


def refusal(raw: bytes) -> str:
    with pytest.raises(InvalidEventError) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "FST_ERR_VALIDATION")
    return str(caught.value)


# --- what passes -----------------------------------------------------------------------------------


def test_the_documented_example_is_stored_with_only_a_timestamp_added() -> None:
    raw = (
        b'{"event":"Signed Up","userId":"1043","properties":{"plan":"Enterprise"},'
        b'"messageId":"1ff51c9c-4929-45de-8914-3bb878be8c4a"}'
    )
    event = parse(raw)
    assert event.body == raw[:-1] + b',"timestamp":"' + RECEIVED.encode() + b'"}'
    assert event.message_id == "1ff51c9c-4929-45de-8914-3bb878be8c4a"
    assert event.kind == "track"
    assert event.received_ms == RECEIVED_MS
    assert event.lane == lane_of(user_id="1043", anonymous_id=None)


@pytest.mark.parametrize(
    "fields",
    [
        {"properties": {}},
        {"properties": {"a": None, "b": [1, 2.5, "x", {"c": True}], "": "empty key"}},
        {"context": {"userAgent": "till/1", "locale": "de-DE", "traits": {"plan": "x"}}},
        {"files": []},
        {"files": [FILE, FILE]},
        {"files": [{**FILE, "data": "", "name": ""}]},
        {"anonymousId": "a1"},
        {"somethingNew": {"of": ["the", "future"]}, "integrations": {"All": True}, "n": None},
        {"traits": {"plan": "x"}},
        {"event": " ", "userId": " "},
        {"event": "注文 🛒", "userId": "José"},
        {"event": "\x00\x1f\x7f\u2028\ufeff\uffff"},
    ],
    ids=",".join,
)
def test_what_the_contract_allows_is_stored_unchanged(fields: dict[str, object]) -> None:
    raw = track(**fields)
    assert stored(raw) == json.loads(raw)


@pytest.mark.parametrize(
    "member",
    [
        '"properties":{"n":0}',
        '"properties":{"n":-0.0}',
        '"properties":{"n":1.0}',
        '"properties":{"n":9007199254740993}',
        '"properties":{"n":18446744073709551616}',
        '"properties":{"n":123456789012345678901234567890}',
        '"properties":{"n":1e22}',
        '"properties":{"n":5e-324}',
        '"properties":{"n":1.7976931348623157e308}',
    ],
)
def test_a_number_in_properties_keeps_its_value_and_its_kind(member: str) -> None:
    raw = track_text(member)
    before, after = json.loads(raw)["properties"]["n"], stored(raw)["properties"]["n"]
    assert repr(after) == repr(before)


def test_a_duplicate_key_takes_its_last_value_as_upstream() -> None:
    assert parse(track_text('"messageId":"m2"')).message_id == "m2"


def test_whitespace_around_the_body_is_allowed() -> None:
    assert parse(b" \r\n\t" + track() + b"\n").body == parse(track()).body


def test_an_anonymous_user_needs_no_user_id() -> None:
    event = parse(track_without("userId", anonymousId="a1"))
    assert event.lane == lane_of(user_id=None, anonymous_id="a1")


def test_the_user_id_decides_the_lane_where_both_are_given() -> None:
    assert parse(track(anonymousId="a1")).lane == parse(track()).lane


def test_a_user_and_an_anonymous_user_of_one_name_have_two_lanes() -> None:
    assert lane_of(user_id="x", anonymous_id=None) != lane_of(user_id=None, anonymous_id="x")


def test_a_lane_fits_a_signed_64_bit_column() -> None:
    lanes = [lane_of(user_id=str(n), anonymous_id=None) for n in range(1000)]
    assert all(-(2**63) <= lane < 2**63 for lane in lanes)
    assert min(lanes) < 0 < max(lanes)
    assert len(set(lanes)) == 1000


# --- what is repaired ------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [track_without("timestamp"), track(timestamp=None)])
def test_a_missing_timestamp_becomes_the_time_of_receipt(raw: bytes) -> None:
    assert stored(raw)["timestamp"] == RECEIVED


@pytest.mark.parametrize(
    ("instant_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
        (RECEIVED_MS, RECEIVED),
        (4_102_444_800_000, "2100-01-01T00:00:00.000Z"),
    ],
)
def test_an_instant_is_written_in_utc_to_the_millisecond(instant_ms: int, text: str) -> None:
    assert rfc3339(instant_ms) == text


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        # A form that the upstream reads as it stands is not touched.
        ("2026-11-23T10:00:00Z", "2026-11-23T10:00:00Z"),
        ("2026-11-23T10:00:00.1Z", "2026-11-23T10:00:00.1Z"),
        ("2026-11-23T10:00:00.123Z", "2026-11-23T10:00:00.123Z"),
        ("2026-11-23T10:00:00.123456789Z", "2026-11-23T10:00:00.123456789Z"),
        ("2026-11-23T10:00:00+00:00", "2026-11-23T10:00:00+00:00"),
        ("2026-11-23T10:00:00.123456+05:30", "2026-11-23T10:00:00.123456+05:30"),
        ("2026-11-23T10:00:00-08:00", "2026-11-23T10:00:00-08:00"),
        ("2028-02-29T00:00:00Z", "2028-02-29T00:00:00Z"),
        # Naive is UTC, and says so.
        ("2026-11-23T10:00:00", "2026-11-23T10:00:00Z"),
        ("2026-11-23T10:00:00.123456789", "2026-11-23T10:00:00.123456789Z"),
        # Other notations of ISO 8601 are rewritten.
        ("2026-11-23", "2026-11-23T00:00:00.000Z"),
        ("20261123", "2026-11-23T00:00:00.000Z"),
        ("20261123T100000Z", "2026-11-23T10:00:00.000Z"),
        ("20261123T100000", "2026-11-23T10:00:00.000Z"),
        ("20261123T1000", "2026-11-23T10:00:00.000Z"),
        ("2026-11-23t10:00:00z", "2026-11-23T10:00:00.000Z"),
        ("2026-11-23t10:00:00.5+01:00", "2026-11-23T09:00:00.500Z"),
        ("2026-11-23 10:00:00", "2026-11-23T10:00:00.000Z"),
        ("2026-11-23 10:00:00.123456+00:00", "2026-11-23T10:00:00.123Z"),
        ("2026-11-23T10:00", "2026-11-23T10:00:00.000Z"),
        ("2026-11-23T10:00Z", "2026-11-23T10:00:00.000Z"),
        ("2026-11-23T10:00:00,5Z", "2026-11-23T10:00:00.500Z"),
        ("2026-11-23T10:00:00+0200", "2026-11-23T08:00:00.000Z"),
        ("2026-11-23T10:00:00+02", "2026-11-23T08:00:00.000Z"),
        ("2026-01-01T00:30:00+0100", "2025-12-31T23:30:00.000Z"),
        ("2026-11-23T10:00:00.1234567891Z", "2026-11-23T10:00:00.123Z"),
    ],
)
def test_a_timestamp_is_kept_or_rewritten_as_the_same_instant(sent: str, kept: str) -> None:
    assert stored(track(timestamp=sent))["timestamp"] == kept


@pytest.mark.parametrize("name", ["userId", "anonymousId"])
def test_an_unused_id_that_is_null_is_dropped(name: str) -> None:
    other = {"userId": "anonymousId", "anonymousId": "userId"}[name]
    fields = stored(track(**{name: None, other: "x"}))
    assert name not in fields
    assert fields[other] == "x"


@pytest.mark.parametrize("name", ["properties", "context", "files"])
def test_a_null_that_means_nothing_is_dropped(name: str) -> None:
    assert name not in stored(track(**{name: None}))


@pytest.mark.parametrize("bogus", ["identify", "nonsense", "", None, 5, {}, []])
def test_a_top_level_type_is_stripped(bogus: object) -> None:
    assert stored(track(type=bogus)) == json.loads(track())


def test_a_type_below_the_top_is_the_apps_own() -> None:
    assert stored(track(properties={"type": "x"}))["properties"] == {"type": "x"}


@pytest.mark.parametrize("name", ["userId", "anonymousId", "messageId", "event"])
@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("7", "7"),
        ("0", "0"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("-5", "-5"),
        ("1.0", "1"),
        ("1e3", "1000"),
        ("1.5", "1.5"),
        ("0.1", "0.1"),
        ("1e20", "100000000000000000000"),
        ("1e21", "1e+21"),
        ("1.5e300", "1.5e+300"),
        # Past ECMAScript's whole numbers every digit is kept: two ids must not become one.
        ("9007199254740993", "9007199254740993"),
        ("18446744073709551616", "18446744073709551616"),
        # ECMAScript writes an exponent from 1e-7 down, without a zero before it.
        ("0.00001", "0.00001"),
        ("0.000001", "0.000001"),
        ("1e-7", "1e-7"),
        ("1.5e-10", "1.5e-10"),
    ],
)
def test_a_number_as_id_becomes_the_string_that_upstream_makes_of_it(
    name: str, number: str, text: str
) -> None:
    raw = track_text(f'"{name}":{number}')
    assert stored(raw)[name] == text
    if name == "messageId":
        assert parse(raw).message_id == text


def test_a_user_id_as_number_shares_the_lane_of_its_string() -> None:
    assert parse(track(userId=7)).lane == parse(track(userId="7")).lane


# --- what is refused: ids, types, presence ---------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (track(properties=[]), "properties: expected object, got array"),
        (track(properties="x"), "properties: expected object, got string"),
        (track(properties=1), "properties: expected object, got number"),
        (track(properties=1.5), "properties: expected object, got number"),
        (track(properties=True), "properties: expected object, got boolean"),
        (track(context=[]), "context: expected object, got array"),
        (track(context="x"), "context: expected object, got string"),
        (track(files={}), "files: expected array, got object"),
        (track(files="x"), "files: expected array, got string"),
        (track(timestamp=5), "timestamp: expected string, got number"),
        (track(timestamp={}), "timestamp: expected string, got object"),
        (track(timestamp=False), "timestamp: expected string, got boolean"),
        (track(messageId=None), "messageId: expected string, got null"),
        (track(messageId=True), "messageId: expected string, got boolean"),
        (track(messageId=["m"]), "messageId: expected string, got array"),
        (track(event=None), "event: expected string, got null"),
        (track(event={"name": "x"}), "event: expected string, got object"),
        (track(userId=True), "userId: expected string, got boolean"),
        (track(userId=["u"]), "userId: expected string, got array"),
        (track(anonymousId={}), "anonymousId: expected string, got object"),
        (track_without("messageId"), "messageId: required, but missing"),
        (track_without("event"), "event: required, but missing"),
        (track(files=[1]), "files[0]: expected object, got number"),
        (track(files=[FILE, None]), "files[1]: expected object, got null"),
        (track(files=[{**FILE, "data": 1}]), "files[0].data: expected string, got number"),
        (track(files=[FILE, {**FILE, "name": None}]), "files[1].name: expected string, got null"),
        (b"[]", "body: expected object, got array"),
        (b"null", "body: expected object, got null"),
        (b'"x"', "body: expected object, got string"),
        (b"1", "body: expected object, got number"),
        (b"true", "body: expected object, got boolean"),
    ],
)
def test_a_wrong_type_is_refused_with_field_wanted_and_got(raw: bytes, message: str) -> None:
    assert refusal(raw) == message


@pytest.mark.parametrize("name", ["type", "name", "mimeType", "data"])
def test_a_file_needs_all_four_fields(name: str) -> None:
    file = {key: value for key, value in FILE.items() if key != name}
    assert refusal(track(files=[file])) == f"files[0].{name}: required, but missing"


def test_a_file_of_another_encoding_is_refused() -> None:
    assert refusal(track(files=[{**FILE, "type": "Url"}])).startswith("files[0].type: ")


@pytest.mark.parametrize("name", ["messageId", "event", "userId", "anonymousId"])
def test_an_empty_id_is_refused_by_name(name: str) -> None:
    assert refusal(track(**{name: ""})) == f"{name}: must not be empty"


@pytest.mark.parametrize(
    "raw",
    [
        track_without("userId"),
        track(userId=None),
        track(userId=None, anonymousId=None),
        track_without("userId", anonymousId=None),
    ],
)
def test_an_event_of_nobody_is_refused(raw: bytes) -> None:
    message = refusal(raw)
    assert message.startswith("userId: required")
    assert "anonymousId" in message


# --- what is refused: timestamps -------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "yesterday",
        "now",
        "2026-W48-1",
        "2026-W48",
        "2026W481",
        "2026-w48-1",
        "2026-327",
        "2026",
        "2026-11",
        "10:00:00",
        "2026-13-01T00:00:00Z",
        "2026-00-01T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-02-29T00:00:00Z",
        "2026-11-23T25:00:00Z",
        "2026-11-23T10:60:00Z",
        "2026-11-23T10:00:61Z",
        "2026-11-23T10:00:00+25:00",
        "2026-11-23T10:00:00+02:60",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "+002026-11-23T10:00:00Z",
        "-002026-11-23T10:00:00Z",
        # Rewritten in UTC they would leave the years that there are.
        "9999-12-31 23:59:59-14:00",
        "0001-01-01 00:00:00+14:00",
        " 2026-11-23T10:00:00Z",
        "2026-11-23T10:00:00Z ",
        "2026-11-23T10:00:00ZZ",
        "2026-11-23T10:00:00 GMT",
        "2026/11/23",
        "23.11.2026",
        "Mon, 23 Nov 2026 10:00:00 GMT",
        "\uff12\uff10\uff12\uff16-11-23T10:00:00Z",
        "2026-11-23T10:00:00+24:00",
        # Unix seconds, and milliseconds that read like a year of the 18th century.
        "1700000000",
        "1700000000000",
        "1768011512345",
        # A slip of the finger, not a separator.
        "2026-11-23110:00:00",
        "2026-11-23x10:00:00",
    ],
)
def test_a_timestamp_that_upstream_would_store_as_1970_is_refused(text: str) -> None:
    assert refusal(track(timestamp=text)).startswith("timestamp: expected an ISO 8601 date")


def test_a_long_timestamp_is_shown_cut_short() -> None:
    message = refusal(track(timestamp="9" * 100_000))
    assert message.startswith("timestamp: ")
    assert len(message) < MESSAGE_CHARS


# --- what is refused: text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        r"\ud800",
        r"\udfff",
        r"\uD800",
        r"\ud800\ud800",
        r"\udc00\ud800",
        r"\ud83dx",
        r"\ud83d\u0041",
        r"\ud83d\\ude00",
        r"\\\ud800",
        r"\\\\\udc00",
        r"\ud83d\ude00\ude00",
    ],
)
@pytest.mark.parametrize(
    "member", ['"properties":{{"a":["{}"]}}', '"x":"{}"', '"properties":{{"{}":1}}']
)
def test_half_a_surrogate_pair_is_refused_as_such(text: str, member: str) -> None:
    message = refusal(track_text(member.format(text)))
    assert message.startswith("body: ")
    assert "surrogate" in message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r"\\ud800", r"\ud800"),
        (r"\\\\ud800", r"\\ud800"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\uD83D\uDE00", "\U0001f600"),
        (r"\\\ud83d\ude00", "\\\U0001f600"),
        (r"\u0000", "\x00"),
        (r"\uffff", "\uffff"),
    ],
)
def test_what_only_looks_like_half_a_pair_is_kept(text: str, meant: str) -> None:
    assert stored(track_text(f'"properties":{{"a":"{text}"}}'))["properties"] == {"a": meant}


@pytest.mark.parametrize(
    "raw",
    [
        track().replace(b"Sold", b"\xff"),
        track().replace(b"Sold", b"S\xc3"),
        track().replace(b"Sold", b"\xed\xa0\x80"),  # a surrogate, as UTF-8 must not write it
        track().replace(b"Sold", b"\xc0\xaf"),
        track().decode().encode("utf-16"),
    ],
)
def test_a_body_that_is_not_utf_8_is_refused(raw: bytes) -> None:
    assert refusal(raw).startswith("body: ")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"{",
        b"not json",
        b"\xef\xbb\xbf" + track(),  # a byte order mark: RFC 8259, section 8.1 forbids sending it
        track() + b" x",
        track() + track(),
        track()[:-1],
        track()[:-1] + b",}",
        track()[:-1] + b',"a":01}',
        track()[:-1] + b',"a":.5}',
        track()[:-1] + b',"a":+1}',
        track()[:-1] + b",'a':1}",
        track()[:-1] + b',"a":"\n"}',
        track()[:-1] + b',"a":"\\x"}',
        track()[:-1] + b"/* x */}",
        track()[:-1] + b',"a":undefined}',
    ],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    assert refusal(raw).startswith("body: ")


# --- what is refused: numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "nan",
        "1e400",
        "-1e400",
        "1e309",
        "1" + "0" * 309,
        "-1" + "0" * 309,
        "2" + "0" * 308,
        "1" + "0" * 400 + ".5",
        "9" * 5000,
        "9" * 100_000,
    ],
    ids=lambda number: number[:12],
)
@pytest.mark.parametrize(
    "member", ['"properties":{{"a":[{}]}}', '"messageId":{}', '"userId":{}', '"unknown":{}']
)
def test_a_number_that_upstream_cannot_hold_is_refused(number: str, member: str) -> None:
    message = refusal(track_text(member.format(number)))
    field, colon, _ = message.partition(": ")
    assert colon
    assert field in {"body", "properties.a[0]", "messageId", "userId", "unknown"}
    assert len(message) < MESSAGE_CHARS


def test_the_shortest_huge_integer_is_refused_wherever_it_stands() -> None:
    """Bodies are searched for it at steps; none may step over it."""
    shortest = "2" + "0" * 308
    for offset in range(2 * len(shortest)):
        assert "out of range" in refusal(track_text(f'"a":"{"x" * offset}","b":{shortest}'))


def test_a_huge_integer_is_named_by_its_path() -> None:
    raw = track_text('"properties":{"sum":[1,' + "9" * 400 + "]}")
    assert refusal(raw).startswith("properties.sum[1]: number out of range")


# --- what is refused: depth and forbidden keys -----------------------------------------------------


def nested(depth: int, opening: str, closing: str) -> bytes:
    """A body whose innermost value lies in *depth* containers, the body itself among them."""
    inner = depth - 2
    return track_text(f'"properties":{{"a":{opening * inner}1{closing * inner}}}')


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_hundred_levels_are_stored_and_one_more_is_refused(opening: str, closing: str) -> None:
    raw = nested(100, opening, closing)
    assert stored(raw)["properties"] == json.loads(raw)["properties"]
    assert refusal(nested(101, opening, closing)).startswith("body: nested deeper than 100 levels")


@pytest.mark.parametrize("depth", [1000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_very_deep_body_is_refused_without_recursion(
    depth: int, opening: str, closing: str
) -> None:
    assert refusal(nested(depth, opening, closing)).startswith("body: nested deeper than 100")


def test_a_million_opening_brackets_alone_are_refused() -> None:
    assert refusal(b"[" * 1_000_000).startswith("body: ")


def test_many_brackets_side_by_side_or_in_text_are_not_depth() -> None:
    raw = track(properties={"wide": [[], {}] * 500, "text": "[" * 500 + "{" * 500})
    assert stored(raw) == json.loads(raw)


FORBIDDEN = [
    (r'"__proto__":1', "__proto__"),
    (r'"__proto__":null', "__proto__"),
    (r'"\u005f_proto__":{}', "__proto__"),
    (r'"\u005f\u005f\u0070\u0072\u006f\u0074\u006f\u005f\u005f":1', "__proto__"),
    (r'"constructor":{"prototype":1}', "constructor.prototype"),
    (r'"constructor":{"a":1,"prototype":null}', "constructor.prototype"),
    (r'"\u0063onstructor":{"prototype":{}}', "constructor.prototype"),
    (r'"constructor":{"prototyp\u0065":{}}', "constructor.prototype"),
]


@pytest.mark.parametrize(("member", "key"), FORBIDDEN)
@pytest.mark.parametrize(
    ("around", "path"),
    [
        ("{}", ""),
        ('"properties":{{{}}}', "properties."),
        ('"properties":{{"a":[1,{{"b":{{{}}}}}]}}', "properties.a[1].b."),
        ('"context":{{{}}}', "context."),
        ('"unknown":[[{{{}}}]]', "unknown[0][0]."),
    ],
)
def test_a_key_that_poisons_a_prototype_is_refused_by_its_path(
    member: str, key: str, around: str, path: str
) -> None:
    assert refusal(track_text(around.format(member))).startswith(f"{path}{key}: ")


@pytest.mark.parametrize(
    "properties",
    [
        {"constructor": "x"},
        {"constructor": {"a": 1}},
        {"prototype": {"constructor": 1}},
        {"constructor": ["prototype"]},
        {"text": "__proto__", "other": "constructor", "third": "prototype"},
        {"__proto": 1, "_proto__": 2, "__proto___": 3},
        {"constructor": {"a": {"prototype": 1}}},
    ],
)
def test_what_only_resembles_a_forbidden_key_is_kept(properties: dict[str, object]) -> None:
    assert stored(track(properties=properties))["properties"] == properties


# --- bounds ----------------------------------------------------------------------------------------


def test_the_limit_counts_the_body_as_it_would_be_sent() -> None:
    repaired = len(parse(track_without("timestamp", properties={"a": ""})).body)
    room = MAX_BODY_BYTES - repaired
    fits = track_without("timestamp", properties={"a": "x" * room})
    assert len(fits) < MAX_BODY_BYTES + 100
    assert len(parse(fits).body) == MAX_BODY_BYTES
    with pytest.raises(InvalidEventError, match=f"^body: {MAX_BODY_BYTES + 1} bytes") as caught:
        parse(track_without("timestamp", properties={"a": "x" * (room + 1)}))
    assert (caught.value.status, caught.value.code) == (413, "FST_ERR_CTP_BODY_TOO_LARGE")


def test_the_configured_limit_is_the_one_that_counts() -> None:
    body_bytes = len(parse(track()).body)
    assert read_event("track", track(), received_ms=0, terms=Terms(max_body_bytes=body_bytes))
    with pytest.raises(InvalidEventError) as caught:
        read_event("track", track(), received_ms=0, terms=Terms(max_body_bytes=body_bytes - 1))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "raw",
    [
        track(files=[{**FILE, "type": "x" * 100_000}]),
        track(properties={"k" * 100_000: {"__proto__": 1}}),
        track(properties={"k" * 100_000: int("9" * 400)}),
    ],
    ids=["bogus file type", "forbidden key below a long one", "huge number below a long key"],
)
def test_a_refusal_is_short_however_long_the_offence(raw: bytes) -> None:
    assert len(refusal(raw)) < MESSAGE_CHARS


def test_a_refusal_names_its_field_whatever_the_value_says() -> None:
    assert refusal(track(files=[{**FILE, "type": "x` - at `$.y"}])).startswith("files[0].type: ")


def test_checking_a_body_takes_memory_in_proportion_to_it() -> None:
    # A long key over many values: a path of its own for each of them would be their product.
    raw = track(properties={"k" * 50_000: [0] * 5_000, "escape": "\u00e9"})
    assert b"\\u" in raw
    tracemalloc.start()
    try:
        parse(raw)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 50 * len(raw)


def test_checking_many_small_values_takes_less_memory_than_they_do() -> None:
    raw = track(properties={"x": [[]] * 100_000})
    tracemalloc.start()
    try:
        tree = json.loads(raw)
        tree_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        parse(raw)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree
    assert peak_bytes - tree_bytes < 2 * tree_bytes


# --- the digest ------------------------------------------------------------------------------------


def test_the_digest_of_a_retry_is_that_of_the_first_try() -> None:
    raw = track_without("timestamp")
    first = read_event("track", raw, received_ms=1_000)
    again = read_event("track", raw, received_ms=2_000)
    assert first.digest == again.digest
    assert len(first.digest) == 16
    assert first.body != again.body


def test_the_digest_ignores_spacing_and_escapes_but_no_value() -> None:
    assert (
        parse(b'{ "event":"S\\u006fld","userId":"u1" , "messageId":"m1"}').digest
        == parse(track_without("timestamp")).digest
    )
    assert parse(track(properties={"n": 1})).digest != parse(track(properties={"n": 2})).digest
    assert parse(track(timestamp=NOON)).digest != parse(track_without("timestamp")).digest


def test_the_time_of_receipt_reads_back_as_the_same_instant() -> None:
    text = stored(track_without("timestamp"))["timestamp"]
    assert datetime.fromisoformat(text) == datetime.fromtimestamp(RECEIVED_MS / 1000, UTC)
