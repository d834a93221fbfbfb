"""What Segment's and RudderStack's SDKs send, in the upstream's words: nothing lost, nothing shared.

Planted bugs that these tests were seen to find: sentAt or a count of retries that stays, a write key
that stays, an originalTimestamp that wins or goes, traits shared with the context, a category that
overwrites or leaves its place, `integrations` of a batch that are dropped, empty ids that are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract import Terms, read_batch, read_event
from agent.errors import InvalidEventError
from agent.event import KINDS, Kind
from agent.ingest.dialect import SEGMENT
from agent.segment import translate

RECEIVED_MS = 1_700_000_000_123
EARLY, LATE = "2026-11-23T10:00:00.000Z", "2026-11-23T10:00:07.000Z"

REQUIRED: dict[Kind, dict[str, Any]] = {"track": {"event": "Sold"}, "group": {"groupId": "g"}}


def translated(kind: Kind = "track", **message: Any) -> dict[str, Any]:
    return translate(kind, message, new_id=lambda: "made")


def message(kind: Kind = "track", **changes: Any) -> dict[str, Any]:
    return {"messageId": "m", "userId": "u", **REQUIRED.get(kind, {}), **changes}


def terms() -> Terms:
    numbers = count()

    def translate_numbered(kind: Kind, fields: dict[str, Any]) -> dict[str, Any]:
        return translate(kind, fields, new_id=lambda: f"made-{next(numbers)}")

    return Terms(translate=translate_numbered, shared=SEGMENT.shared)


def stored(kind: Kind, fields: dict[str, Any]) -> Any:
    event = read_event(kind, json.dumps(fields).encode(), received_ms=RECEIVED_MS, terms=terms())
    return json.loads(event.body)


def digest(kind: Kind = "track", **changes: Any) -> bytes:
    raw = json.dumps(message(kind, **changes)).encode()
    return read_event(kind, raw, received_ms=RECEIVED_MS, terms=terms()).digest


def stored_of(batch: dict[str, Any]) -> list[Any]:
    events = read_batch(json.dumps(batch).encode(), received_ms=RECEIVED_MS, terms=terms())
    return [json.loads(event.body) for event in events]


# --- one message ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"originalTimestamp": EARLY}, EARLY),
        ({"originalTimestamp": EARLY, "timestamp": None}, EARLY),
        ({"originalTimestamp": EARLY, "timestamp": LATE}, LATE),
        ({"originalTimestamp": LATE, "timestamp": EARLY}, EARLY),
        ({"timestamp": EARLY, "sentAt": LATE}, EARLY),
    ],
)
def test_the_time_is_what_the_app_said_and_else_what_its_sdk_noted(
    said: dict[str, Any], meant: str
) -> None:
    fields = stored("track", message(**said))
    assert fields["timestamp"] == meant
    assert fields.get("originalTimestamp") == said.get("originalTimestamp")


@pytest.mark.parametrize("said", [{}, {"originalTimestamp": ""}, {"originalTimestamp": None}])
def test_without_any_time_it_is_that_of_receipt(said: dict[str, Any]) -> None:
    assert stored("track", message(sentAt=EARLY, **said))["timestamp"] == "2023-11-14T22:13:20.123Z"


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ({"sentAt": EARLY}, {"sentAt": LATE}),
        ({}, {"sentAt": LATE}),
        ({}, {"_metadata": {"retryCount": 2}}),
        ({"_metadata": {"bundled": []}}, {"_metadata": {"bundled": [], "retryCount": 3}}),
        ({"userId": None, "anonymousId": "a"}, {"userId": "", "anonymousId": "a"}),
        ({"writeKey": "one"}, {}),
    ],
)
def test_a_retry_is_the_same_event(first: dict[str, Any], again: dict[str, Any]) -> None:
    assert digest(**first) == digest(**again)


@pytest.mark.parametrize(
    "change",
    [
        {"originalTimestamp": LATE},
        {"properties": {"n": 1}},
        {"integrations": {"All": False}},
        {"_metadata": {"nodeVersion": "20"}},
        {"channel": "server"},
    ],
)
def test_what_an_app_said_otherwise_is_another_event(change: dict[str, Any]) -> None:
    assert digest(**change) != digest()


@pytest.mark.parametrize("missing", [{}, {"messageId": None}, {"messageId": ""}])
def test_a_message_without_an_id_gets_a_new_one(missing: dict[str, Any]) -> None:
    assert translated(userId="u", **missing)["messageId"] == "made"


def test_a_message_keeps_its_own_id() -> None:
    assert translated(messageId="m")["messageId"] == "m"
    assert stored("track", message(messageId=17))["messageId"] == "17"


@pytest.mark.parametrize("unused", [None, ""])
def test_an_id_that_is_not_used_leaves_the_other_one(unused: object) -> None:
    fields = stored("track", message(userId=unused, anonymousId="a"))
    assert fields["anonymousId"] == "a"
    assert "userId" not in fields


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_of_nobody_is_refused(kind: Kind) -> None:
    with pytest.raises(InvalidEventError, match="userId: required, unless anonymousId is given"):
        stored(kind, message(kind, userId=None, anonymousId=""))


def test_an_id_that_is_a_number_is_the_text_of_it() -> None:
    fields = stored("group", message("group", userId=7, groupId=42))
    assert (fields["userId"], fields["groupId"]) == ("7", "42")


def test_a_write_key_is_not_stored() -> None:
    assert "canary" not in json.dumps(stored("track", message(writeKey="canary")))
    (event,) = stored_of(
        {"writeKey": "canary", "batch": [message(type="track", writeKey="canary")]}
    )
    assert "canary" not in json.dumps(event)


# --- what is in its own place upstream ---


@pytest.mark.parametrize(
    ("said", "traits"),
    [
        ({"context": {"traits": {"plan": "x"}}}, {"plan": "x"}),
        ({"context": {"traits": {"plan": "x"}}, "traits": None}, {"plan": "x"}),
        ({"context": {"traits": {"plan": "x"}}, "traits": {"plan": "y"}}, {"plan": "y"}),
        ({"context": {"traits": {"plan": "x"}}, "traits": {}}, {}),
        ({"context": {"traits": "no object"}}, None),
        ({"context": None}, None),
        ({}, None),
    ],
)
def test_traits_of_a_user_are_found_in_the_context_too(
    said: dict[str, Any], traits: dict[str, Any] | None
) -> None:
    fields = stored("identify", message("identify", **said))
    assert fields.get("traits") == traits
    assert fields.get("context") == said.get("context")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identify"])
def test_traits_in_the_context_of_other_events_stay_there(kind: Kind) -> None:
    fields = stored(kind, message(kind, context={"traits": {"plan": "x"}}))
    assert "traits" not in fields
    assert fields["context"] == {"traits": {"plan": "x"}}


def test_what_is_changed_in_one_of_two_places_stays_in_the_other() -> None:
    fields = translated("identify", context={"traits": {"a": {"b": 1}}})
    fields["traits"]["a"]["b"] = fields["traits"]["c"] = "redacted"
    assert fields["context"] == {"traits": {"a": {"b": 1}}}


@pytest.mark.parametrize("kind", ["page", "screen"])
@pytest.mark.parametrize(
    ("said", "properties"),
    [
        ({"category": "docs"}, {"category": "docs"}),
        ({"category": "docs", "properties": None}, {"category": "docs"}),
        ({"category": "docs", "properties": {"n": 1}}, {"category": "docs", "n": 1}),
        ({"category": "docs", "properties": {"category": "own"}}, {"category": "own"}),
        ({"category": None}, None),
        ({"category": None, "properties": {"n": 1}}, {"n": 1}),
    ],
)
def test_a_category_is_among_the_properties_too(
    kind: Kind, said: dict[str, Any], properties: dict[str, Any] | None
) -> None:
    fields = stored(kind, message(kind, **said))
    assert fields.get("properties") == properties
    assert fields.get("category") == said["category"]


def test_a_category_of_another_event_stays_where_it_is() -> None:
    assert stored("track", message(category="docs")).items() >= {"category": "docs"}.items()
    assert "properties" not in stored("track", message(category="docs"))


@pytest.mark.parametrize("kind", ["page", "screen"])
def test_properties_of_the_wrong_type_are_refused_as_what_they_are(kind: Kind) -> None:
    with pytest.raises(InvalidEventError, match="properties: expected object, got array"):
        stored(kind, message(kind, category="docs", properties=[]))


# --- as SDKs send it ---

LIBRARY = {"library": {"name": "x", "version": "1"}}


@pytest.mark.parametrize(
    ("kind", "sent", "kept"),
    [
        pytest.param(
            "page",
            {
                "integrations": {},
                "anonymousId": None,
                "properties": {},
                "timestamp": "2026-11-23T10:00:00.000+00:00",
                "category": None,
                "context": LIBRARY,
                "userId": "u1",
                "type": "page",
                "name": None,
                "messageId": "m",
            },
            {
                "integrations": {},
                "properties": {},
                "timestamp": "2026-11-23T10:00:00.000+00:00",
                "context": LIBRARY,
                "userId": "u1",
                "messageId": "m",
            },
            id="segment-analytics-python",
        ),
        pytest.param(
            "screen",
            {
                "timestamp": EARLY,
                "integrations": {},
                "type": "screen",
                "properties": {},
                "category": "c",
                "context": LIBRARY,
                "userId": "u1",
                "messageId": "m",
                "_metadata": {"nodeVersion": "v20", "jsRuntime": "node"},
            },
            {
                "timestamp": EARLY,
                "integrations": {},
                "properties": {"category": "c"},
                "category": "c",
                "context": LIBRARY,
                "userId": "u1",
                "messageId": "m",
                "_metadata": {"nodeVersion": "v20", "jsRuntime": "node"},
            },
            id="analytics-node",
        ),
        pytest.param(
            "identify",
            {
                "userId": "u1",
                "traits": {"plan": "x"},
                "context": {"traits": {"plan": "x"}, **LIBRARY},
                "type": "identify",
                "channel": "server",
                "_metadata": {"nodeVersion": "20"},
                "originalTimestamp": EARLY,
                "messageId": "m",
                "sentAt": LATE,
            },
            {
                "userId": "u1",
                "traits": {"plan": "x"},
                "context": {"traits": {"plan": "x"}, **LIBRARY},
                "channel": "server",
                "_metadata": {"nodeVersion": "20"},
                "originalTimestamp": EARLY,
                "timestamp": EARLY,
                "messageId": "m",
            },
            id="rudder-sdk-node",
        ),
        pytest.param(
            "identify",
            {
                "type": "identify",
                "channel": "web",
                "context": {"traits": {"plan": "x"}},
                "originalTimestamp": EARLY,
                "sentAt": LATE,
                "messageId": "m",
                "userId": "",
                "anonymousId": "a",
                "event": None,
                "integrations": {"All": True},
            },
            {
                "channel": "web",
                "context": {"traits": {"plan": "x"}},
                "traits": {"plan": "x"},
                "originalTimestamp": EARLY,
                "timestamp": EARLY,
                "messageId": "m",
                "anonymousId": "a",
                "integrations": {"All": True},
            },
            id="rudderstack-in-a-browser",
        ),
        pytest.param(
            "track",
            {
                "timestamp": EARLY,
                "integrations": {},
                "userId": None,
                "anonymousId": "a",
                "event": "Sold",
                "type": "track",
                "properties": {"n": 1},
                "context": {"page": {"path": "/"}},
                "messageId": "ajs-next-1",
                "writeKey": "key",
                "sentAt": LATE,
                "_metadata": {"bundled": ["Segment.io"], "retryCount": 1},
            },
            {
                "timestamp": EARLY,
                "integrations": {},
                "anonymousId": "a",
                "event": "Sold",
                "properties": {"n": 1},
                "context": {"page": {"path": "/"}},
                "messageId": "ajs-next-1",
                "_metadata": {"bundled": ["Segment.io"]},
            },
            id="analytics.js",
        ),
        pytest.param(
            "track",
            {"userId": "u", "event": "Paid", "messageId": "m", "timestamp": EARLY,
             "files": [{"type": "Base64Encoded", "name": "n", "mimeType": "t", "data": "ZA=="}]},
            {"userId": "u", "event": "Paid", "messageId": "m", "timestamp": EARLY,
             "files": [{"type": "Base64Encoded", "name": "n", "mimeType": "t", "data": "ZA=="}]},
            id="files",
        ),
    ],
)  # fmt: skip
def test_what_an_sdk_sends_is_stored_so(
    kind: Kind, sent: dict[str, Any], kept: dict[str, Any]
) -> None:
    assert stored(kind, sent) == kept


# --- a batch -------------------------------------------------------------------------------------


def test_what_a_batch_says_for_all_holds_where_an_event_says_nothing_else() -> None:
    batch = {
        "context": {"ip": "10.0.0.1", "app": "till"},
        "integrations": {"All": True, "CRM": False},
        "sentAt": LATE,
        "timestamp": LATE,
        "messageId": "of the batch",
        "writeKey": "key",
        "batch": [
            message(type="track", timestamp=EARLY),
            message(type="track", context={"ip": "10.0.0.2"}, integrations={"CRM": True}),
            message(type="track", context=None, integrations=None),
        ],
    }
    first, second, third = stored_of(batch)
    assert first == {
        "messageId": "m",
        "userId": "u",
        "event": "Sold",
        "timestamp": EARLY,
        "context": {"ip": "10.0.0.1", "app": "till"},
        "integrations": {"All": True, "CRM": False},
    }
    assert second["context"] == {"ip": "10.0.0.2", "app": "till"}
    assert second["integrations"] == {"All": True, "CRM": True}
    assert (third["context"], third["integrations"]) == (batch["context"], batch["integrations"])


def test_traits_in_the_context_of_a_batch_are_those_of_its_users() -> None:
    batch = [message(type="identify"), message(type="identify", traits={"plan": "own"})]
    first, second = stored_of({"context": {"traits": {"plan": "x"}}, "batch": batch})
    assert (first["traits"], second["traits"]) == ({"plan": "x"}, {"plan": "own"})


def test_each_message_of_a_batch_gets_an_id_of_its_own() -> None:
    nameless = {"type": "track", "userId": "u", "event": "Sold"}
    events = stored_of({"batch": [nameless, nameless, message(type="track")]})
    assert [event["messageId"] for event in events] == ["made-0", "made-1", "m"]


def test_an_alias_in_a_batch_is_named_by_its_index() -> None:
    batch = [message(type="track"), {"type": "alias", "userId": "u", "previousId": "a"}]
    with pytest.raises(InvalidEventError, match=r"^batch\[1\]\.type: expected one of .*'alias'$"):
        stored_of({"batch": batch})


# --- whatever they say ---------------------------------------------------------------------------

NAMES = st.sampled_from([
    "messageId", "userId", "anonymousId", "timestamp", "originalTimestamp", "sentAt", "writeKey",
    "context", "traits", "properties", "category", "name", "event", "groupId", "previousId",
    "integrations", "_metadata", "channel", "type", "retryCount", "elsewhere",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=2) | st.just(EARLY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
SAYING_NOTHING = {"messageId", "userId", "anonymousId"}


def leaves(value: Any, *trail: object) -> Iterator[tuple[tuple[object, ...], Any]]:
    """Yield the way to each value and the value; of empty containers, too."""
    pairs: list[tuple[object, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for step, inner in pairs:
        yield from leaves(inner, *trail, step)
    if not pairs:
        yield trail, value


def is_of_the_event(trail: tuple[object, ...], value: Any) -> bool:
    name = trail[0]
    return (
        name not in {"sentAt", "writeKey"}
        and trail[:2] != ("_metadata", "retryCount")
        and not (len(trail) == 1 and (value is None or (value == "" and name in SAYING_NOTHING)))
    )


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.dictionaries(NAMES, VALUES, max_size=8))
def test_nothing_is_lost_and_nothing_is_made_up(kind: Kind, said: dict[str, Any]) -> None:
    before = json.loads(json.dumps(said))
    fields = translate(kind, said, new_id=lambda: "made")

    kept = dict(leaves(fields))
    for trail, value in leaves(before):
        if trail and is_of_the_event(trail, value) and value not in ({}, []):
            assert kept[trail] == value

    known = [*(value for _, value in leaves(before)), "made"]
    added = {trail for trail in kept if trail not in dict(leaves(before))}
    assert all(kept[trail] in known for trail in added)
    assert {trail[0] for trail in added if trail} <= {
        "messageId", "timestamp", "traits", "properties", "_metadata",
    }  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.dictionaries(NAMES, VALUES, max_size=8))
def test_what_was_translated_is_in_the_upstreams_words(kind: Kind, said: dict[str, Any]) -> None:
    once = translate(kind, said, new_id=lambda: "made")
    copy = json.loads(json.dumps(once))
    assert translate(kind, once, new_id=lambda: "another") == copy
