"""The sandbox keeps the upstream's contract, and fails exactly as it is told to."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from agent.console.sandbox import Fault, Sandbox, run_sandbox

HEADERS = {"Authorization": "Bearer sandbox-key", "Content-Type": "application/json"}
LIMIT_BYTES = 5 * 1024 * 1024


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    sandbox = Sandbox()
    async with sandbox.serving():
        yield sandbox


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    # The bound on every request here: a hung server fails a test instead of hanging it.
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client:
        yield client


def track(**fields: object) -> bytes:
    return json.dumps({"event": "Sold", "userId": "u1", "messageId": "m1"} | fields).encode()


async def post(
    client: aiohttp.ClientSession,
    sandbox: Sandbox,
    body: bytes,
    *,
    path: str = "/api/public/apps/track",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    async with client.post(
        sandbox.url + path,
        data=io.BytesIO(body),  # aiohttp warns about large bodies given as bytes
        headers=HEADERS if headers is None else headers,
        allow_redirects=False,
    ) as response:
        text = await response.text()
        is_json = response.content_type == "application/json"
        return response.status, json.loads(text) if is_json else text


async def exchange_raw(sandbox: Sandbox, sent: bytes) -> bytes:
    """Send bytes as they are and return what comes back before the connection closes."""
    port = int(sandbox.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(5):
        received = await reader.read()
    writer.close()
    await writer.wait_closed()
    return received


# The contract


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("track", {"event": "Sold"}),
        ("identify", {"traits": {"a": 1}}),
        ("page", {"name": "Home"}),
        ("screen", {"properties": {}}),
        ("group", {"groupId": "g", "assigned": False}),
    ],
)
async def test_every_endpoint_stores_a_valid_event_and_answers_204_empty(
    sandbox: Sandbox, client: aiohttp.ClientSession, endpoint: str, fields: dict[str, object]
) -> None:
    body = json.dumps({"anonymousId": "a1", "messageId": "m1"} | fields).encode()

    assert await post(client, sandbox, body, path=f"/api/public/apps/{endpoint}") == (204, "")

    [stored] = sandbox.stored
    assert (stored.message_id, stored.user, stored.kind) == ("m1", "a1", endpoint)
    assert stored.body == body
    assert (stored.status, stored.scheme, stored.authorized) == (204, "Bearer", True)


async def test_a_batch_stores_the_exact_bytes_of_each_item(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    first = b'{"type":"track", "event":"A","userId":"u","messageId":"1" , "n":1.50}'
    second = b'{"type":"identify","userId":"u","messageId":"2","traits":{"\\u00e9":"\xc3\xa9"}}'
    body = b'{"sentAt":"now","batch":[' + first + b" , " + second + b"]}"

    assert await post(client, sandbox, body, path="/api/public/apps/batch") == (204, "")

    assert [arrival.body for arrival in sandbox.stored] == [first, second]
    assert [arrival.kind for arrival in sandbox.stored] == ["track", "identify"]
    assert {arrival.request for arrival in sandbox.stored} == {1}


async def test_the_context_of_a_batch_is_merged_under_that_of_its_items(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    item = {"type": "page", "userId": "u", "messageId": "1", "context": {"a": "item"}}
    body = json.dumps({"context": {"a": "batch", "b": "batch"}, "batch": [item]}).encode()

    await post(client, sandbox, body, path="/api/public/apps/batch")

    assert json.loads(sandbox.stored[0].body)["context"] == {"a": "item", "b": "batch"}


async def test_an_empty_batch_is_204(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    answer = await post(client, sandbox, b'{"batch":[]}', path="/api/public/apps/batch")
    assert answer == (204, "")
    assert sandbox.stored == []


async def test_one_bad_item_refuses_the_batch_and_is_named(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    good = {"type": "track", "event": "A", "userId": "u", "messageId": "1"}
    bad = {"type": "track", "event": "A", "userId": "u"}
    body = json.dumps({"batch": [good, bad]}).encode()

    status, answer = await post(client, sandbox, body, path="/api/public/apps/batch")

    assert status == 400
    assert answer["message"].startswith("body/batch/1 must have required property 'messageId'")
    assert sandbox.stored == []
    assert [arrival.message_id for arrival in sandbox.arrivals] == ["1", ""]


async def test_it_does_not_deduplicate(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    await post(client, sandbox, track())
    await post(client, sandbox, track())

    assert len(sandbox.stored) == 2
    assert (sandbox.stats().unique, sandbox.stats().duplicates) == (1, 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            b'{"event":"A","messageId":"1"}',
            "body must have required property 'userId', body must have required property 'anon",
        ),
        (b'{"userId":"u","event":"A"}', "body must have required property 'messageId'"),
        (b'{"userId":"u","messageId":"1"}', "body must have required property 'event'"),
        (track(properties=None), "body/properties must be object"),
        (track(context=[]), "body/context must be object"),
        (track(userId={}), "body/userId must be string"),
        (track(files=None), "body/files must be array"),
        (track(files=[{"type": "x"}]), "body/files/0 must have required property 'name'"),
        (b"[]", "body must be object"),
    ],
)
async def test_an_invalid_event_is_400_in_the_upstreams_shape(
    sandbox: Sandbox, client: aiohttp.ClientSession, body: bytes, message: str
) -> None:
    status, answer = await post(client, sandbox, body)

    assert status == 400
    assert answer["message"].startswith(message)
    assert answer | {"message": ""} == {
        "statusCode": 400,
        "code": "FST_ERR_VALIDATION",
        "error": "Bad Request",
        "message": "",
    }
    assert sandbox.stored == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"event":',
        track(n=float("nan")),
        track(properties={"deep": [{"__proto__": {}}]}),
        b'{"event":"A","userId":"u","messageId":"1","\\u005f_proto__":1}',
        track(properties={"constructor": {"prototype": 1}}),
    ],
)
async def test_a_body_that_the_parser_refuses_is_400(
    sandbox: Sandbox, client: aiohttp.ClientSession, body: bytes
) -> None:
    status, answer = await post(client, sandbox, body)
    assert (status, answer["statusCode"], answer["error"]) == (400, 400, "Bad Request")
    assert [arrival.body for arrival in sandbox.arrivals] == [body]
    assert sandbox.stored == []


@pytest.mark.parametrize(
    ("fields", "user"),
    [
        ({"userId": 7}, "7"),
        ({"userId": None, "anonymousId": "a"}, ""),
        ({"timestamp": "yesterday"}, "u1"),
        ({"timestamp": None}, "u1"),
        ({"event": ""}, "u1"),
        ({"event": "\ud800"}, "u1"),
        ({"constructor": 1}, "u1"),
    ],
)
async def test_what_the_upstream_spoils_in_silence_is_204_here_too(
    sandbox: Sandbox, client: aiohttp.ClientSession, fields: dict[str, object], user: str
) -> None:
    assert await post(client, sandbox, track(**fields)) == (204, "")
    assert sandbox.stored[0].user == user


async def test_a_top_level_type_overrides_the_stored_kind(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    await post(client, sandbox, track(type="bogus"))
    assert sandbox.stored[0].kind == "bogus"


async def test_nesting_that_overflows_the_stack_is_500(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    status, _answer = await post(client, sandbox, b"[" * 100_000 + b"]" * 100_000)
    assert status == 500


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer sandbox-key", 204),
        ("Basic sandbox-key", 204),
        ("sandbox-key", 401),
        ("Bearer wrong", 401),
        ("Bearer sandbox-key ", 204),  # HTTP trims it
        ("Bearer  sandbox-key", 401),
    ],
)
async def test_the_key_is_what_follows_the_first_space(
    sandbox: Sandbox, client: aiohttp.ClientSession, authorization: str, status: int
) -> None:
    headers = HEADERS | {"Authorization": authorization}
    assert (await post(client, sandbox, track(), headers=headers))[0] == status
    assert sandbox.arrivals[0].authorized is (status == 204)


async def test_a_wrong_key_is_401_in_the_upstreams_shape_and_kept_nowhere(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    headers = HEADERS | {"Authorization": "s3cret", "PublicWriteKey": "s3cret"}

    answer = await post(client, sandbox, track(), headers=headers)

    assert answer == (401, {"message": "Invalid write key."})
    assert sandbox.stored == []
    assert "s3cret" not in repr(sandbox.arrivals)


async def test_the_public_write_key_alone_is_400(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    headers = {"Content-Type": "application/json", "PublicWriteKey": "sandbox-key"}

    status, answer = await post(client, sandbox, track(), headers=headers)

    assert status == 400
    assert answer["message"] == "headers must have required property 'authorization'"
    assert sandbox.arrivals[0].public_write_key


@pytest.mark.parametrize(
    "headers", [HEADERS | {"Authorization": "Bearer wrong"}, {"Content-Type": "application/json"}]
)
async def test_the_schema_is_checked_before_headers_and_key(
    sandbox: Sandbox, client: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    status, answer = await post(client, sandbox, b"{}", headers=headers)
    assert status == 400
    assert answer["message"].startswith("body must have required property 'userId'")


async def test_a_content_type_other_than_json_is_415(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    headers = HEADERS | {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await post(client, sandbox, track(), headers=headers))[0] == 415


async def test_a_compressed_body_is_400(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    headers = HEADERS | {"Content-Encoding": "gzip"}
    assert (await post(client, sandbox, gzip.compress(track()), headers=headers))[0] == 400


async def test_a_body_of_exactly_5_mib_passes(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    body = track(properties={"pad": ""})
    body = track(properties={"pad": "x" * (LIMIT_BYTES - len(body))})
    assert len(body) == LIMIT_BYTES
    assert await post(client, sandbox, body) == (204, "")


async def test_an_announced_oversize_is_413_before_the_body_and_closes(sandbox: Sandbox) -> None:
    received = await exchange_raw(
        sandbox,
        b"POST /api/public/apps/track HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (LIMIT_BYTES + 1),
    )
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"FST_ERR_CTP_BODY_TOO_LARGE" in received


async def test_a_chunked_oversize_is_413(sandbox: Sandbox) -> None:
    size = LIMIT_BYTES + 1
    received = await exchange_raw(
        sandbox,
        b"POST /api/public/apps/track HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n",
    )
    assert received.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["/v1/track", "/api/public/apps/track/", "/api/public/apps/"])
async def test_a_route_that_does_not_exist_is_404(
    sandbox: Sandbox, client: aiohttp.ClientSession, path: str
) -> None:
    status, answer = await post(client, sandbox, track(), path=path)
    assert (status, answer["message"]) == (404, f"Route POST:{path} not found")


async def test_a_get_on_a_post_route_is_404(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    async with client.get(sandbox.url + "/api/public/apps/track") as response:
        assert response.status == 404


async def test_alias_is_always_400(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    answer = await post(client, sandbox, track(), path="/api/public/apps/alias")
    assert answer == (400, {"message": "Not yet implemented."})


async def test_the_version_is_told(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    async with client.get(sandbox.url + "/api") as response:
        assert (response.status, list(await response.json())) == (200, ["version"])


async def test_any_web_page_may_post_but_not_command_the_sandbox(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    async with client.options(sandbox.url + "/api/public/apps/track") as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    async with client.get(sandbox.url + "/sandbox/stats") as response:
        assert "Access-Control-Allow-Origin" not in response.headers


# Faults


async def test_a_status_fault_answers_it_and_stores_nothing(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    retry_at = "Wed, 21 Oct 2026 07:28:00 GMT"
    sandbox.fault = Fault(mode="status", status=429, retry_after=retry_at)

    async with client.post(
        sandbox.url + "/api/public/apps/track", data=track(), headers=HEADERS
    ) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, retry_at)
        assert (await response.json())["error"] == "Too Many Requests"

    assert sandbox.stored == []
    assert (sandbox.arrivals[0].message_id, sandbox.arrivals[0].status) == ("m1", 429)


async def test_a_status_fault_can_bring_its_body(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="status", status=400, body={"message": "no"})
    assert await post(client, sandbox, track()) == (400, {"message": "no"})


async def test_a_fault_ends_after_its_times(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="status", times=2)
    statuses = [(await post(client, sandbox, track()))[0] for _ in range(3)]
    assert statuses == [503, 503, 204]


async def test_a_match_hits_only_requests_with_that_text(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="status", status=500, match="poison", times=1)
    assert (await post(client, sandbox, track()))[0] == 204
    assert (await post(client, sandbox, track(event="poison")))[0] == 500
    assert (await post(client, sandbox, track(event="poison")))[0] == 204


@pytest.mark.parametrize("mode", ["cut_before", "down"])
async def test_a_cut_before_storing_loses_the_event_and_the_connection(
    sandbox: Sandbox, client: aiohttp.ClientSession, mode: Any
) -> None:
    sandbox.fault = Fault(mode=mode, times=1)
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, sandbox, track())
    assert (sandbox.stored, sandbox.requests) == ([], 1)
    assert sandbox.stats().answers == {"cut": 1}
    assert (await post(client, sandbox, track()))[0] == 204


async def test_a_cut_after_storing_keeps_the_event_and_answers_nothing(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="cut_after")
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, sandbox, track())
    assert [(arrival.message_id, arrival.status) for arrival in sandbox.stored] == [("m1", None)]


async def test_a_cut_after_does_not_store_what_the_upstream_would_refuse(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="cut_after")
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, sandbox, b"{}")
    assert sandbox.stored == []


async def test_down_with_a_match_cuts_only_what_matches(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="down", match="poison")
    assert (await post(client, sandbox, track()))[0] == 204
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, sandbox, track(event="poison"))


async def test_a_stalled_request_ends_at_once_when_the_sandbox_stops() -> None:
    sandbox = Sandbox()
    async with (
        asyncio.timeout(5),
        aiohttp.ClientSession() as client,
        asyncio.TaskGroup() as tasks,
        sandbox.serving(),
    ):
        sandbox.fault = Fault(mode="stall")
        request = tasks.create_task(_expect_cut(client, sandbox))
        await sandbox.wait_for(lambda s: len(s.arrivals) == 1)
        assert not request.done()
    assert sandbox.stored == []
    # A handler that had to be killed at the end of the grace time would not have counted.
    assert sandbox.stats().answers == {"cut": 1}


async def _expect_cut(client: aiohttp.ClientSession, sandbox: Sandbox) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, sandbox, track())


async def test_a_stall_is_answered_504_at_last_and_stores_nothing(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="stall", delay_s=0.01)
    assert (await post(client, sandbox, track()))[0] == 504
    assert sandbox.stored == []


async def test_slow_waits_and_then_stores(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    sandbox.fault = Fault(mode="slow", delay_s=0.05)
    started_s = asyncio.get_running_loop().time()
    assert (await post(client, sandbox, track()))[0] == 204
    assert asyncio.get_running_loop().time() - started_s >= 0.05
    assert len(sandbox.stored) == 1


async def test_html_is_a_captive_portal_with_200(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    sandbox.fault = Fault(mode="html")
    status, answer = await post(client, sandbox, track())
    assert status == 200
    assert answer.startswith("<!doctype html>")
    assert sandbox.stored == []


@pytest.mark.parametrize("status", [302, 307])
async def test_redirect_names_another_place(
    sandbox: Sandbox, client: aiohttp.ClientSession, status: int
) -> None:
    sandbox.fault = Fault(mode="redirect", status=status, location="http://else.invalid/")
    async with client.post(
        sandbox.url + "/api/public/apps/track", data=track(), allow_redirects=False
    ) as response:
        assert (response.status, response.headers["Location"]) == (status, "http://else.invalid/")
    assert sandbox.stored == []


async def test_it_can_leave_its_port_and_come_back_with_what_it_stored(
    client: aiohttp.ClientSession,
) -> None:
    sandbox = Sandbox()
    async with sandbox.serving() as url:
        await post(client, sandbox, track())
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(client, sandbox, track())
    async with sandbox.serving(port=int(url.rpartition(":")[2])):
        await post(client, sandbox, track())
    assert len(sandbox.stored) == 2


async def test_a_client_that_leaves_in_mid_body_counts_as_cut(sandbox: Sandbox) -> None:
    port = int(sandbox.url.rpartition(":")[2])
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /api/public/apps/track HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    await sandbox.wait_for(lambda s: s.requests == 1)

    writer.close()

    await sandbox.wait_for(lambda s: s.stats().answers == {"cut": 1})
    assert sandbox.arrivals == []


# Control


async def test_a_fault_is_set_and_ended_over_http(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    wanted = b'{"mode":"status","status":429,"retry_after":"7","times":3,"match":null}'
    status, answer = await post(client, sandbox, wanted, path="/sandbox/fault", headers={})
    assert (status, answer["status"]) == (200, 429)
    assert sandbox.fault == Fault(mode="status", status=429, retry_after="7", times=3)

    async with client.delete(sandbox.url + "/sandbox/fault") as response:
        assert response.status == 204
    assert sandbox.fault.mode == "ok"


@pytest.mark.parametrize("body", [b'{"mode":"explode"}', b'{"mode":"ok","tims":1}', b"{}", b"["])
async def test_an_unknown_fault_is_400_and_names_the_modes(
    sandbox: Sandbox, client: aiohttp.ClientSession, body: bytes
) -> None:
    status, answer = await post(client, sandbox, body, path="/sandbox/fault")
    assert status == 400
    assert "cut_after" in answer["message"]


async def test_stored_events_are_listed_from_where_one_asks(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    for number in range(4):
        await post(client, sandbox, track(messageId=f"m{number}"))

    async with client.get(sandbox.url + "/sandbox/events?since=1&limit=2") as response:
        listed = await response.json()

    assert [event["messageId"] for event in listed] == ["m1", "m2"]


async def test_a_bad_position_is_400(sandbox: Sandbox, client: aiohttp.ClientSession) -> None:
    async with client.get(sandbox.url + "/sandbox/events?since=-1") as response:
        assert response.status == 400


async def test_the_stats_count_and_can_be_reset(
    sandbox: Sandbox, client: aiohttp.ClientSession
) -> None:
    await post(client, sandbox, track())
    await post(client, sandbox, track())
    await post(client, sandbox, b"{}")

    async with client.get(sandbox.url + "/sandbox/stats") as response:
        stats = await response.json()
    assert {name: stats[name] for name in ("requests", "stored", "unique", "duplicates")} == {
        "requests": 3,
        "stored": 2,
        "unique": 1,
        "duplicates": 1,
    }
    assert stats["answers"] == {"204": 2, "400": 1}

    async with client.delete(sandbox.url + "/sandbox/events") as response:
        assert response.status == 204
    assert (sandbox.stats().requests, sandbox.stored) == (0, [])


async def test_waiting_in_vain_says_what_arrived(sandbox: Sandbox) -> None:
    with pytest.raises(TimeoutError, match="stored=0"):
        await sandbox.wait_for(lambda s: bool(s.stored), timeout_s=0.01)


async def test_run_sandbox_announces_its_url_but_no_key_and_stops_when_cancelled() -> None:
    lines: list[str] = []
    announced = asyncio.Event()

    def announce(line: str) -> None:
        lines.append(line)
        announced.set()

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run_sandbox("127.0.0.1", 0, "s3cret", announce))
        await announced.wait()
        running.cancel()

    assert "http://127.0.0.1:" in lines[0]
    assert "s3cret" not in "".join(lines)
