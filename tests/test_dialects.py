"""Segment's API over real sockets: its paths, content types and keys, and answers that its SDKs take."""

from __future__ import annotations

import base64
import gzip
import json
import sqlite3
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from test_ingest import LIMIT_BYTES, Ingest, assert_refused, running

from agent.contract import Terms
from agent.event import KINDS, Kind
from agent.exchange import Request
from agent.ingest.destinations import Destinations
from agent.ingest.dialect import SEGMENT, UPSTREAM, Dialect
from agent.units import key_digest

CALLS: dict[Kind, dict[str, Any]] = {
    "track": {"event": "Sold", "properties": {"n": 1}},
    "identify": {"traits": {"plan": "x"}},
    "page": {"name": "Home", "properties": {"path": "/"}},
    "screen": {"name": "Till"},
    "group": {"groupId": "g", "traits": {"size": 3}},
}
SUCCESS = {"success": True}


def call(kind: Kind = "track", message_id: str | None = "m1", **changes: Any) -> dict[str, Any]:
    return {"messageId": message_id, "userId": "u", **CALLS[kind], **changes}


def encoded(*calls: dict[str, Any], **envelope: Any) -> bytes:
    return json.dumps({"batch": calls, **envelope}).encode()


@pytest.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[Ingest]:
    async with running(tmp_path) as ingest:
        yield ingest


def rows(path: Path, query: str) -> list[Any]:
    """Return what *query* selects of the outbox, as another process would see it."""
    db = sqlite3.connect(f"file:{path / 'outbox.db'}?mode=ro", uri=True)
    try:
        return [row[0] if len(row) == 1 else row for row in db.execute(query)]
    finally:
        db.close()


KINDS_STORED = "SELECT kind FROM pending ORDER BY seq"
UPSTREAMS = "SELECT message_id, upstream FROM event"


# --- paths and answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_each_call_is_stored_as_its_kind_and_answered_as_segment_does(
    ingest: Ingest, tmp_path: Path, kind: Kind, short: bool
) -> None:
    path = f"/v1/{kind[0] if short else kind}"
    status, body, headers = await ingest.post(json.dumps(call(kind)).encode(), path)
    assert (status, body) == (200, SUCCESS)
    assert headers["Content-Type"].startswith("application/json")
    assert "Idempotent-Replayed" not in headers
    (fields,) = ingest.stored()
    assert fields.items() >= call(kind).items()
    assert rows(tmp_path, KINDS_STORED) == [kind]


@pytest.mark.parametrize("path", ["/v1/batch", "/v1/b", "/v1/import", "/w/default/v1/batch"])
async def test_a_batch_is_stored_as_single_events_of_their_kinds(
    ingest: Ingest, tmp_path: Path, path: str
) -> None:
    calls = [call(kind, f"m-{kind}", type=kind) for kind in KINDS]
    status, body, _ = await ingest.post(encoded(*calls, sentAt="now", writeKey="k"), path)
    assert (status, body) == (200, SUCCESS)
    assert [fields["messageId"] for fields in ingest.stored()] == [f"m-{kind}" for kind in KINDS]
    assert rows(tmp_path, KINDS_STORED) == list(KINDS)


async def test_an_empty_batch_is_a_success(ingest: Ingest) -> None:
    assert (await ingest.post(encoded(), "/v1/batch"))[:2] == (200, SUCCESS)


async def test_a_retry_with_another_sent_at_is_answered_as_a_replay_and_is_no_conflict(
    ingest: Ingest, tmp_path: Path
) -> None:
    for sent_at, replayed in (("first", None), ("second", "true")):
        for raw, path in (
            (json.dumps(call("track", "m1", sentAt=sent_at)).encode(), "/v1/track"),
            (encoded(call("page", "m2", type="page", sentAt=sent_at), sentAt=sent_at), "/v1/batch"),
        ):
            status, body, headers = await ingest.post(raw, path)
            assert (status, body, headers.get("Idempotent-Replayed")) == (200, SUCCESS, replayed)
    assert rows(tmp_path, "SELECT accepted, duplicates, conflicts FROM ledger") == [(2, 2, 0)]


async def test_a_message_without_an_id_is_stored_under_a_new_one_each_time(ingest: Ingest) -> None:
    raw = json.dumps(call("track", None)).encode()
    assert [(await ingest.post(raw, "/v1/track"))[0] for _ in range(2)] == [200, 200]
    first, second = (UUID(fields["messageId"]) for fields in ingest.stored())
    assert first != second


@pytest.mark.parametrize("path", ["/v1/alias", "/v1/a", "/w/default/v1/alias"])
async def test_an_alias_is_answered_as_upstream_does(ingest: Ingest, path: str) -> None:
    answer = await ingest.post(b'{"userId": "u", "previousId": "a"}', path)
    assert assert_refused(answer, 400, "AGENT_NOT_IMPLEMENTED") == "Not yet implemented."


async def test_one_bad_call_refuses_its_batch_whole_and_is_named(ingest: Ingest) -> None:
    calls = [call(type="track"), {"type": "alias", "userId": "u", "previousId": "a"}]
    answer = await ingest.post(encoded(*calls), "/v1/batch")
    assert assert_refused(answer, 400, "FST_ERR_VALIDATION").startswith("batch[1].type: ")
    assert ingest.stored() == []


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/"), ("POST", "/v1/tracks"), ("POST", "/v1/track/"), ("GET", "/v1/track")],
)
async def test_any_other_path_is_not_found(ingest: Ingest, method: str, path: str) -> None:
    assert_refused(await ingest.post(b"", path, method), 404, "AGENT_NOT_FOUND")


@pytest.mark.parametrize("path", ["/v1/identify", "/v1/batch", "/api/public/apps/identify"])
async def test_what_is_redacted_is_redacted_in_each_dialect(ingest: Ingest, path: str) -> None:
    def forget(fields: dict[str, Any]) -> None:
        fields["traits"].pop("email")

    ingest.routes.terms = Terms(max_body_bytes=LIMIT_BYTES, refine=forget)
    said = call("identify", type="identify", traits={"email": "canary", "plan": "x"})
    raw = encoded(said) if path.endswith("batch") else json.dumps(said).encode()
    assert (await ingest.post(raw, path))[0] in {200, 204}
    assert [fields["traits"] for fields in ingest.stored()] == [{"plan": "x"}]


@pytest.mark.parametrize("path", ["/v1/track", "/v1/batch"])
async def test_a_call_is_bounded_by_what_upstream_takes(ingest: Ingest, path: str) -> None:
    ingest.routes.terms = Terms(max_body_bytes=1_000)
    said = call(type="track", properties={"filler": "x" * 1_000})
    raw = encoded(said) if path.endswith("batch") else json.dumps(said).encode()
    assert_refused(await ingest.post(raw, path), 413, "FST_ERR_CTP_BODY_TOO_LARGE")


# --- what they are encoded as --------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "Application/X-WWW-Form-Urlencoded; charset=utf-8",
    ],
)
async def test_json_is_read_under_the_content_types_that_sdks_give_it(
    ingest: Ingest, content_type: str
) -> None:
    for raw, path in ((json.dumps(call()).encode(), "/v1/track"), (encoded(), "/v1/batch")):
        assert (await ingest.post(raw, path, Content_Type=content_type))[0] == 200


async def test_json_is_read_under_no_content_type(ingest: Ingest) -> None:
    raw = json.dumps(call()).encode()
    head = f"POST /v1/track HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    answered = await ingest.raw(f"{head}Connection: close\r\n\r\n".encode() + raw)
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "text/html", "json"])
async def test_any_other_content_type_is_a_415(ingest: Ingest, content_type: str) -> None:
    answer = await ingest.post(json.dumps(call()).encode(), "/v1/track", Content_Type=content_type)
    assert content_type in assert_refused(answer, 415, "FST_ERR_CTP_INVALID_MEDIA_TYPE")
    assert ingest.stored() == []


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
async def test_they_are_not_read_so_where_upstream_does_not(
    ingest: Ingest, content_type: str
) -> None:
    raw = json.dumps(call()).encode()
    answer = await ingest.post(raw, "/api/public/apps/track", Content_Type=content_type)
    assert_refused(answer, 415, "FST_ERR_CTP_INVALID_MEDIA_TYPE")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
async def test_a_foreign_page_stores_nothing_by_a_simple_content_type(
    ingest: Ingest, content_type: str, origin: str
) -> None:
    raw = json.dumps(call()).encode()
    answer = await ingest.post(raw, "/v1/track", Content_Type=content_type, Origin=origin)
    assert_refused(answer, 403, "AGENT_FORBIDDEN")
    assert ingest.stored() == []


async def test_an_allowed_page_may_post_there(ingest: Ingest) -> None:
    raw = json.dumps(call()).encode()
    for path in ("/v1/t", "/w/default/v1/track"):
        status, _, headers = await ingest.post(
            raw, path, Content_Type="text/plain", Origin="https://shop.example"
        )
        assert status == 200
        assert headers["Access-Control-Allow-Origin"] == "https://shop.example"


def raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data, wbits=-15)


@pytest.mark.parametrize(
    ("compress", "encoding"),
    [
        (gzip.compress, "gzip"),
        (gzip.compress, "x-gzip"),
        (zlib.compress, "deflate"),
        (raw_deflate, "deflate"),
    ],
)
async def test_a_compressed_form_that_is_json_is_stored(
    ingest: Ingest, compress: Callable[[bytes], bytes], encoding: str
) -> None:
    status, body, _ = await ingest.post(
        compress(encoded(call(type="track"))),
        "/v1/batch",
        Content_Encoding=encoding,
        Content_Type="application/x-www-form-urlencoded",
    )
    assert (status, body) == (200, SUCCESS)
    assert [fields["messageId"] for fields in ingest.stored()] == ["m1"]


@pytest.mark.parametrize(
    "bomb", [bytes(2 * LIMIT_BYTES), gzip.compress(b"[" + bytes(100 * LIMIT_BYTES))]
)
async def test_a_body_is_bounded_before_and_after_it_is_inflated(
    ingest: Ingest, bomb: bytes
) -> None:
    head = f"POST /v1/batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(bomb)}\r\n"
    answered = await ingest.raw(f"{head}Content-Encoding: gzip\r\n\r\n".encode() + bomb)
    assert answered.startswith(b"HTTP/1.1 413 ")


# --- keys ----------------------------------------------------------------------------------------


def basic(key: str) -> str:
    return f"Basic {base64.b64encode(f'{key}:'.encode()).decode()}"


@pytest.mark.parametrize(
    ("header", "in_body", "path", "upstream"),
    [
        (basic("crm-key"), None, "/v1/batch", "crm"),
        (None, "crm-key", "/v1/batch", "crm"),
        (None, "crm-key", "/v1/import", "crm"),
        (basic("other"), "crm-key", "/v1/batch", ""),
        (None, "other", "/v1/batch", ""),
        (None, None, "/v1/batch", ""),
        (None, 7, "/v1/batch", ""),
        (None, None, "/w/crm/v1/batch", "crm"),
        (basic("crm-key"), "crm-key", "/w/default/v1/batch", ""),
        (None, "crm-key", "/api/public/apps/batch", ""),
    ],
)
async def test_the_key_says_which_upstream_in_the_head_or_in_the_body(
    ingest: Ingest,
    tmp_path: Path,
    header: str | None,
    in_body: object,
    path: str,
    upstream: str,
) -> None:
    ingest.routes.destinations = Destinations(("crm",), {key_digest("crm-key"): "crm"})
    headers = {"Authorization": header} if header else {}
    envelope = {} if in_body is None else {"writeKey": in_body}
    status, _, _ = await ingest.post(encoded(call(type="track"), **envelope), path, **headers)
    assert status in {200, 204}
    assert rows(tmp_path, UPSTREAMS) == [("m1", upstream)]


@pytest.mark.parametrize(
    ("dialect", "header", "key"),
    [
        (SEGMENT, None, "in the body"),
        (SEGMENT, "", "in the body"),
        (SEGMENT, "Bearer in the head", "Bearer in the head"),
        (UPSTREAM, None, ""),
        (UPSTREAM, "Bearer in the head", "Bearer in the head"),
    ],
)
def test_a_key_stands_in_the_head_or_where_the_dialect_has_it(
    dialect: Dialect, header: str | None, key: str
) -> None:
    headers = {} if header is None else {"authorization": header}
    body = b'{"writeKey": "in the body"}'
    asked = Request(method="POST", path="/v1/track", query={}, headers=headers, body=body)
    assert dialect.key_of(asked) == key


async def test_the_key_of_a_single_call_may_stand_in_it_and_is_not_stored(
    ingest: Ingest, tmp_path: Path
) -> None:
    ingest.routes.destinations = Destinations(("crm",), {key_digest("crm-key"): "crm"})
    await ingest.post(json.dumps(call(writeKey="crm-key")).encode(), "/v1/track")
    assert rows(tmp_path, UPSTREAMS) == [("m1", "crm")]
    assert "crm-key" not in json.dumps(ingest.stored())


@pytest.mark.parametrize("path", ["/v1/track", "/v1/batch"])
async def test_a_body_too_deep_for_a_key_to_be_found_in_it_is_refused(
    ingest: Ingest, path: str
) -> None:
    raw = b'{"properties":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    message = assert_refused(await ingest.post(raw, path), 400, "FST_ERR_VALIDATION")
    assert "nested deeper" in message
