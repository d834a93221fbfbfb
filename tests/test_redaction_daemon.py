"""Redaction by the real daemon: what is to be hidden is in no file, no log and no request.

Each search is shown to be able to find something: a witness beside the canaries must be there.

Planted bugs that these tests were seen to find: a batch that is not redacted, a debug line before
redaction, an agent that starts without the key, a reload that does, and one that leaves the rules.
"""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import AgentProcess, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.redaction import hash_of

pytestmark = pytest.mark.process

HASH_KEY = "5f0c1d7e9b3a4826"
DROPPED, HASHED, WITNESS = "canary-dropped-91c4", "canary-hashed-5e07", "witness-2b8d"
HASH = hash_of(HASHED, HASH_KEY.encode())

_FILE = Path("/etc/machine-id")
MACHINE_ID = _FILE.read_text().strip() if _FILE.exists() else ""

REDACT = f"""
drop = ["properties.email", "properties.items.email", "*.phone", "context.ip", "files"]
hash = ["userId", "anonymousId", "groupId", "traits.email", "properties.card"]
key = "{HASH_KEY}"
"""
CONTEXT = 'agent = ["site=berlin-3"]'
DEBUG = 'level = "debug"'

WHO = {"userId": HASHED, "anonymousId": HASHED, "context": {"ip": DROPPED, "phone": DROPPED}}
POSTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "track",
        {
            **WHO,
            "messageId": "m-1",
            "event": "Paid",
            "properties": {
                "email": DROPPED,
                "items": [{"email": DROPPED, "name": WITNESS}],
                "card": [HASHED],
            },
            "files": [
                {"type": "Base64Encoded", "name": DROPPED, "mimeType": "text/plain", "data": "YQ=="}
            ],
        },
    ),
    (
        "identify",
        {**WHO, "messageId": "m-2", "traits": {"email": HASHED, "phone": DROPPED, "name": WITNESS}},
    ),
    (
        "group",
        {**WHO, "messageId": "m-3", "groupId": HASHED, "traits": {"phone": {"home": DROPPED}}},
    ),
    (
        "batch",
        {
            "context": {"ip": DROPPED, "locale": WITNESS},
            "batch": [
                {"type": "identify", "messageId": "m-4", "userId": HASHED, "traits": {"phone": DROPPED}},
                {"type": "page", "messageId": "m-5", "userId": HASHED, "properties": {"email": DROPPED}},
            ],
        },
    ),
)  # fmt: skip
EVENTS = 5


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    upstream = Sandbox(DEFAULT_WRITE_KEY)
    async with upstream.serving():
        yield upstream


def inline(sandbox: Sandbox) -> str:
    return f'url = "{sandbox.url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"'


async def post(agent: AgentProcess, endpoint: str, body: dict[str, Any]) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{agent.url}/api/public/apps/{endpoint}", json=body) as response,
    ):
        return response.status


def reconfigure(agent: AgentProcess, **sections: str) -> None:
    """Write the configuration anew, and tell the agent."""
    bodies = {
        "ingest": f"port = {agent.port}",
        "outbox": f'path = "{agent.outbox}"',
        **sections,
    }
    agent.config.write_text("".join(f"[{name}]\n{body}\n" for name, body in bodies.items()))
    agent.process.send_signal(signal.SIGHUP)


def holding(folder: Path, text: str) -> list[str]:
    """Return the names of the files below *folder* in which *text* stands."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file.name for file in files if text.encode() in file.read_bytes())


def stored_bodies(agent: AgentProcess) -> dict[str, dict[str, Any]]:
    with sqlite3.connect(agent.outbox) as db:
        rows = db.execute("SELECT body FROM pending ORDER BY seq").fetchall()
    db.close()
    bodies = [json.loads(body) for (body,) in rows]
    return {body["messageId"]: body for body in bodies}


@pytest.mark.parametrize(
    ("fault", "until"),
    [
        (Fault(mode="ok"), "delivered"),
        (Fault(mode="down"), "pending"),
        (Fault(mode="status", status=400), "dead"),
    ],
)
@pytest.mark.parametrize("mode", ["track", "batch"])
async def test_what_is_hidden_is_in_no_file_no_log_and_no_request(
    tmp_path: Path, sandbox: Sandbox, fault: Fault, until: str, mode: str
) -> None:
    sandbox.fault = fault
    async with running_agent(
        tmp_path,
        upstream=f'{inline(sandbox)}\nmode = "{mode}"',
        redact=REDACT,
        context=CONTEXT,
        log=DEBUG,
    ) as agent:
        for endpoint, body in POSTS:
            assert await post(agent, endpoint, body) == 204
            assert await post(agent, endpoint, body) == 204  # an app's own retry
        assert await post(agent, "track", {**POSTS[0][1], "messageId": ["m"]}) == 400
        status = await agent.until(lambda status: bool(status[until] == EVENTS))
        if until != "delivered":
            _, shown = await agent.run_command("show", "m-1", "--json")
            assert WITNESS in shown
            assert DROPPED not in shown
            assert HASHED not in shown
        await agent.kill()  # so that the log of the database stays as it is

    assert status["conflicts"] == 0
    assert holding(tmp_path, DROPPED) == []
    assert holding(tmp_path, HASHED) == []
    assert holding(tmp_path, HASH_KEY) == ["config.toml"]
    assert any(name.startswith("outbox.db") for name in holding(tmp_path, WITNESS))
    sent = b"".join(arrival.body for arrival in sandbox.arrivals)
    assert DROPPED.encode() not in sent
    assert HASHED.encode() not in sent
    if until == "delivered":
        assert WITNESS.encode() in sent
        assert {arrival.user for arrival in sandbox.stored} == {HASH}
        assert sent.count(b'"agent":{"site":"berlin-3"}') == EVENTS


async def test_it_does_not_start_where_it_could_not_hash(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        agent = AgentProcess(tmp_path, session, redact='hash = ["userId"]\nkey_file = "redact_key"')
        await agent.launch()
        assert not await agent.becomes_ready()
        assert agent.process.returncode == 78
        assert "redact.key_file" in agent.log.read_text()
        code, said = await agent.run_command("config", "check")
        assert (code, "cannot be read" in said) == (78, True)

        (tmp_path / "redact_key").write_text(HASH_KEY)
        await agent.start()
        assert await agent.stop() == 0


async def test_no_change_while_it_runs_makes_it_store_what_is_to_be_hashed(tmp_path: Path) -> None:
    key_file = tmp_path / "redact_key"
    key_file.write_text(HASH_KEY)
    rules = 'hash = ["userId"]\nkey_file = "redact_key"'
    # Without an upstream: an agent that delivers nothing refuses, too.
    async with running_agent(tmp_path, redact=rules) as agent:
        key_file.write_text("")
        reconfigure(agent, redact=rules)
        status = await agent.until(lambda status: status["config_problem"] is not None)
        assert "the file is empty" in status["config_problem"]
        await post(agent, "track", {"messageId": "m-1", "event": "Paid", "userId": HASHED})
        await agent.kill()
    assert stored_bodies(agent)["m-1"]["userId"] == HASH


async def test_rules_read_anew_are_for_new_events_and_stored_bytes_stay(tmp_path: Path) -> None:
    first = {"messageId": "m-1", "event": "Paid", "userId": "ann", "properties": {"email": "a@b"}}
    async with running_agent(tmp_path) as agent:
        await post(agent, "track", first)
        before = stored_bodies(agent)
        reconfigure(agent, redact='drop = ["properties.email"]', context="machine_id = true")
        await agent.until(lambda _: "config.reloaded" in agent.log.read_text())
        assert await post(agent, "track", first) == 204
        assert await post(agent, "track", {**first, "messageId": "m-2"}) == 204
        status = await agent.status()
        await agent.kill()
    bodies = stored_bodies(agent)
    assert bodies["m-1"] == before["m-1"]
    assert bodies["m-2"]["properties"] == {}
    if MACHINE_ID:
        assert len(bodies["m-2"]["context"]["agent"]["machineId"]) == 32
        assert holding(tmp_path, MACHINE_ID) == []
    # What was redacted otherwise is another body under a known id: the first one wins.
    assert (status["accepted"], status["duplicates"], status["conflicts"]) == (2, 1, 1)
