"""The siblings of track: identify, page, screen, group, and batch, which is all of them or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from agent.contract import Terms, read_batch, read_event
from agent.errors import InvalidEventError
from agent.event import KINDS, Event, Kind, lane_of

RECEIVED_MS = 1_700_000_000_123
RECEIVED = "2023-11-14T22:13:20.123Z"

COMMON = {"userId": "u1", "messageId": "m1", "context": {"ip": "10.0.0.1"}, "shop": "kept as it is"}
OWN: Mapping[Kind, dict[str, Any]] = {
    "track": {"event": "Sold", "properties": {"n": 1}, "files": []},
    "identify": {"traits": {"plan": "x", "tags": [1, None]}},
    "page": {"name": "Home", "properties": {"path": "/"}},
    "screen": {"name": "Till", "properties": {}},
    "group": {"groupId": "g1", "assigned": False, "traits": {"size": 3}},
}


def members(kind: Kind, **changes: object) -> dict[str, Any]:
    return {**COMMON, **OWN[kind], **changes}


def read(kind: Kind, fields: object) -> Event:
    return read_event(kind, json.dumps(fields).encode(), received_ms=RECEIVED_MS)


def stored(kind: Kind, fields: object) -> Any:
    return json.loads(read(kind, fields).body)


def refusal(kind: Kind, fields: object) -> str:
    with pytest.raises(InvalidEventError) as caught:
        read(kind, fields)
    return str(caught.value)


# --- one event -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_stored_as_it_came_with_the_time_of_receipt(kind: Kind) -> None:
    event = read(kind, members(kind))
    assert event.kind == kind
    assert event.lane == lane_of(user_id="u1", anonymous_id=None)
    assert json.loads(event.body) == members(kind, timestamp=RECEIVED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_needs_no_more_than_its_ids(kind: Kind) -> None:
    least: dict[str, object] = {"anonymousId": "a", "messageId": "m"}
    least |= {"track": {"event": "Sold"}, "group": {"groupId": "g"}}.get(kind, {})
    assert stored(kind, least) == {**least, "timestamp": RECEIVED}


@pytest.mark.parametrize(
    ("kind", "field", "message"),
    [
        ("track", "event", "event: required, but missing"),
        ("group", "groupId", "groupId: required, but missing"),
        ("identify", "messageId", "messageId: required, but missing"),
        ("page", "userId", "userId: required, unless anonymousId is given; got neither"),
    ],
)
def test_what_a_kind_requires_is_named(kind: Kind, field: str, message: str) -> None:
    fields = members(kind)
    del fields[field]
    assert refusal(kind, fields) == message


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("identify", "traits", [], "traits: expected object, got array"),
        ("identify", "context", "x", "context: expected object, got string"),
        ("page", "properties", 1, "properties: expected object, got number"),
        ("page", "name", {}, "name: expected string, got object"),
        ("screen", "name", True, "name: expected string, got boolean"),
        ("group", "groupId", None, "groupId: expected string, got null"),
        ("group", "groupId", "", "groupId: must not be empty"),
        ("group", "assigned", "true", "assigned: expected boolean, got string"),
        ("group", "traits", "x", "traits: expected object, got string"),
        ("group", "timestamp", "noon", "timestamp: expected an ISO 8601 date and time"),
    ],
)
def test_a_wrong_type_is_refused_with_field_wanted_and_got(
    kind: Kind, field: str, value: object, message: str
) -> None:
    assert refusal(kind, members(kind, **{field: value})).startswith(message)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("identify", "traits"),
        ("page", "name"),
        ("page", "properties"),
        ("screen", "name"),
        ("group", "assigned"),
        ("group", "traits"),
    ],
)
def test_a_null_that_means_nothing_is_dropped(kind: Kind, field: str) -> None:
    assert field not in stored(kind, members(kind, **{field: None}))


def test_a_number_as_group_id_becomes_the_string_that_upstream_makes_of_it() -> None:
    assert stored("group", members("group", groupId=7.0))["groupId"] == "7"


def test_what_another_kind_has_is_free_form() -> None:
    fields = members("identify", properties="any", files={"not": "files"}, event=None)
    assert stored("identify", fields) == {**fields, "timestamp": RECEIVED}


# --- batch ---------------------------------------------------------------------------------------


def item(kind: Kind, number: int, **changes: object) -> dict[str, Any]:
    return members(kind, type=kind, messageId=f"m{number}", **changes)


def batch(*items: object, **envelope: object) -> bytes:
    return json.dumps({"batch": items, **envelope}).encode()


def events_of(raw: bytes, terms: Terms | None = None) -> list[Event]:
    return list(read_batch(raw, received_ms=RECEIVED_MS, terms=terms or Terms()))


def batch_refusal(raw: bytes, status: int = 400) -> str:
    with pytest.raises(InvalidEventError) as caught:
        events_of(raw)
    assert caught.value.status == status
    return str(caught.value)


def test_a_batch_is_the_single_events_in_their_order() -> None:
    items = [item(kind, number) for number, kind in enumerate(KINDS)]
    singles = [read(kind, one) for kind, one in zip(KINDS, items, strict=True)]
    assert events_of(batch(*items, sentAt="2026-11-23T12:00:00Z", writeKey="of the app")) == singles


def test_an_empty_batch_is_no_event() -> None:
    assert events_of(batch()) == []


def test_the_context_of_an_item_goes_before_that_of_its_batch() -> None:
    shared = {"ip": "10.9.9.9", "os": {"name": "x"}}
    own = item("track", 1, context={"ip": "10.0.0.1", "os": {"version": 2}})
    without = item("track", 2)
    del without["context"]
    empty = item("track", 3, context=None)
    contexts = [
        json.loads(event.body)["context"]
        for event in events_of(batch(own, without, empty, context=shared))
    ]
    assert contexts == [{"ip": "10.0.0.1", "os": {"version": 2}}, shared, shared]


def test_what_refining_changes_in_a_shared_context_is_of_one_event() -> None:
    def count(fields: dict[str, Any]) -> None:
        fields["context"]["os"]["seen"] += 1

    items = [item("page", n) | {"context": None} for n in range(3)]
    raw = batch(*items, context={"os": {"seen": 0}})
    events = events_of(raw, Terms(refine=count))
    assert [json.loads(event.body)["context"]["os"]["seen"] for event in events] == [1, 1, 1]


def test_a_null_context_of_a_batch_is_none() -> None:
    (event,) = events_of(batch(item("page", 1), context=None))
    assert json.loads(event.body)["context"] == COMMON["context"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[]", "body: expected object, got array"),
        (b"", "body: input data was truncated"),
        (b"{}", "batch: required, but missing"),
        (b'{"batch": null}', "batch: expected array, got null"),
        (b'{"batch": {"a": 1}}', "batch: expected array, got object"),
        (b'{"batch": [], "context": 1}', "context: expected object, got number"),
        (b'{"batch": [], "context": {"__proto__": 1}}', "context.__proto__: a key of this name"),
        (batch(item("track", 1), 1), "batch[1]: expected object, got number"),
        (batch({"messageId": "m"}), "batch[0].type: expected one of track, identify, page,"),
        (batch(item("track", 1) | {"type": "alias"}), "batch[0].type: expected one of"),
        (batch(item("track", 1) | {"type": ["track"]}), "batch[0].type: expected one of"),
        (batch(item("track", 1), item("track", 2, event="")), "batch[1].event: must not be empty"),
        (
            batch(item("track", 1), item("track", 2, properties={"a": {"__proto__": 1}})),
            "batch[1].properties.a.__proto__: a key of this name is refused",
        ),
        (b'{"batch": [{"type": "page", "x": "\\ud800"}]}', "body: a string holds half of"),
    ],
)
def test_one_bad_item_refuses_a_batch_and_is_named(raw: bytes, message: str) -> None:
    assert batch_refusal(raw).startswith(message)


def test_items_may_nest_as_deep_as_single_events() -> None:
    def nested(levels: int) -> str:
        return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)

    text = '{"batch": [{"type":"page","userId":"u","messageId":"m","properties":%s}]}'
    assert len(events_of((text % nested(99)).encode())) == 1
    assert batch_refusal((text % nested(100)).encode()).startswith("batch[0]: nested deeper than")
    text = '{"batch": [{"type":"page","userId":"u","messageId":"m"}], "context": %s}'
    assert len(events_of((text % nested(99)).encode())) == 1
    assert batch_refusal((text % nested(100)).encode()).startswith("context: nested deeper than")


def test_a_shared_context_cannot_swell_a_batch_without_end() -> None:
    items = [{"type": "page", "userId": "u", "messageId": f"m{n}"} for n in range(100)]
    raw = batch(*items, context={"blob": "x" * 1_000_000})
    assert batch_refusal(raw, status=413).startswith("batch[20]: up to here the events take over")


def test_an_item_over_the_limit_of_a_body_is_named() -> None:
    terms = Terms(max_body_bytes=200)
    with pytest.raises(InvalidEventError) as caught:
        events_of(batch(item("track", 1, properties={"x": "y" * 200})), terms)
    assert str(caught.value).startswith("batch[0]: ")
    assert caught.value.status == 413
