"""The commands beside a daemon: the real one as a process, a sandbox as its upstream."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from processes import AgentProcess, running_agent
from prometheus_client.parser import text_string_to_metric_families

import agent.__main__  # noqa: F401  # adds `run` to the commands
from agent.console.commands import cli
from agent.console.sandbox import Fault, Sandbox

pytestmark = pytest.mark.process

KEY = "a-key-that-nobody-may-see"
DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("TRANTHOR_AGENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    upstream = Sandbox(KEY)
    async with upstream.serving():
        yield upstream


@pytest.fixture
async def agent_process(tmp_path: Path, sandbox: Sandbox) -> AsyncIterator[AgentProcess]:
    upstream = f'url = "{sandbox.url}"\nwrite_key = "{KEY}"'
    async with running_agent(tmp_path, upstream=upstream) as process:
        yield process


async def ask(*args: str | Path, config: Path) -> Result:
    words = [*map(str, args), "--config", str(config)]
    # In a thread: the upstream runs in this one's loop.
    return await asyncio.to_thread(CliRunner().invoke, cli, words, prog_name="tranthor-agent")


async def status(process: AgentProcess) -> tuple[int, dict[str, Any]]:
    result = await ask("status", "--json", config=process.config)
    return result.exit_code, json.loads(result.stdout)


def event(message_id: str) -> dict[str, Any]:
    return {"messageId": message_id, "event": "Paid", "userId": "ann"}


async def make_dead(process: AgentProcess, sandbox: Sandbox, *message_ids: str) -> None:
    sandbox.fault = Fault(mode="status", status=400)
    for message_id in message_ids:
        assert await process.post(event(message_id)) == 204
    await process.until(lambda now: bool(now["dead"] == len(message_ids)))
    sandbox.fault = Fault(mode="ok")


async def test_a_flowing_agent_is_0_and_tells_of_itself(agent_process: AgentProcess) -> None:
    assert await agent_process.post(event("m-1")) == 204
    await agent_process.until(lambda now: bool(now["delivered"] == 1))

    code, told = await status(agent_process)

    assert (code, told["state"], told["delivered"]) == (0, "flowing", 1)
    plain = await ask("status", config=agent_process.config)
    assert plain.stdout.startswith("flowing\n")


async def test_an_outage_is_0_and_says_when_it_is_tried_again(
    agent_process: AgentProcess, sandbox: Sandbox
) -> None:
    sandbox.fault = Fault(mode="status", status=503, retry_after="3600")
    assert await agent_process.post(event("m-1")) == 204
    await agent_process.until(lambda now: bool(now["state"] == "backing_off"))

    code, told = await status(agent_process)

    assert (code, told["state"]) == (0, "backing_off")
    assert told["next_attempt_in_s"] > 60
    sandbox.fault = Fault(mode="ok")
    flushed = await ask("flush", config=agent_process.config)
    assert (flushed.exit_code, flushed.stdout) == (0, "trying now: 1 event waiting\n")
    await agent_process.until(lambda now: bool(now["delivered"] == 1))


async def test_a_refused_key_is_held_and_shown_nowhere(tmp_path: Path, sandbox: Sandbox) -> None:
    wrong = "wrong-key-that-nobody-may-see"
    upstream = f'url = "{sandbox.url}"\nwrite_key = "{wrong}"'
    async with running_agent(tmp_path, upstream=upstream) as process:
        assert await process.post(event("m-1")) == 204
        await process.until(lambda now: bool(now["state"] == "held"))

        shown = [
            await ask(*words, config=process.config)
            for words in (["status"], ["status", "--json"], ["show", "m-1"], ["list"],
                          ["config", "show"], ["config", "check"])
        ]  # fmt: skip

    assert shown[0].exit_code == 1
    assert shown[0].stdout.startswith("HELD: 401")
    assert f"tranthor-agent --config {process.config} flush" in shown[0].stdout
    assert wrong not in "".join(result.output for result in shown)
    assert wrong not in process.log.read_text()


async def test_an_agent_without_an_upstream_needs_attention(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as process:
        code, told = await status(process)
        flushed = await ask("flush", config=process.config)

    assert (code, told["state"]) == (1, "unconfigured")
    assert flushed.exit_code == 1
    assert "no upstream is configured" in flushed.stderr


async def test_pause_and_resume_reach_the_daemon(
    agent_process: AgentProcess, sandbox: Sandbox
) -> None:
    assert (await ask("pause", config=agent_process.config)).exit_code == 0
    assert await agent_process.post(event("m-1")) == 204
    assert (await status(agent_process))[1]["state"] == "paused"
    assert sandbox.requests == 0

    resumed = await ask("resume", config=agent_process.config)

    assert (resumed.exit_code, resumed.stdout) == (0, "resumed: 1 event waiting\n")
    await agent_process.until(lambda now: bool(now["delivered"] == 1))


async def test_dead_letters_are_requeued_through_the_daemon(
    agent_process: AgentProcess, sandbox: Sandbox
) -> None:
    await make_dead(agent_process, sandbox, "m-1", "m-2", "m-3")
    assert (await status(agent_process))[0] == 1
    listed = await ask("dead", "list", config=agent_process.config)
    assert all(word in listed.stdout for word in ("m-1", "rejected", "400"))

    one = await ask("dead", "requeue", "m-1", config=agent_process.config)
    rest = await ask("dead", "requeue", "--all", config=agent_process.config)

    assert (one.stdout, rest.stdout) == ("requeued 1 dead letter\n", "requeued 2 dead letters\n")
    await agent_process.until(lambda now: bool(now["delivered"] == 3))


async def test_dead_letters_are_discarded_through_the_daemon(
    agent_process: AgentProcess, sandbox: Sandbox
) -> None:
    await make_dead(agent_process, sandbox, "m-1", "m-2")

    result = await ask("dead", "discard", "--user", "ann", "--yes", config=agent_process.config)

    assert (result.exit_code, result.stdout) == (0, "discarded 2 dead letters\n")
    told = await agent_process.status()
    assert (told["dead"], told["discarded"]) == (0, 2)


async def test_a_daemon_of_another_outbox_is_left_alone(
    agent_process: AgentProcess, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(
        f'[ingest]\nport = {agent_process.port}\n[outbox]\npath = "{tmp_path}/other/outbox.db"\n'
    )

    looked = await ask("status", config=other)
    paused = await ask("pause", config=other)

    assert looked.exit_code == 2
    assert paused.exit_code == 1
    assert (await agent_process.status())["state"] == "flowing"


async def test_where_no_outbox_was_chosen_the_daemon_knows_which(
    agent_process: AgentProcess, tmp_path: Path
) -> None:
    assert await agent_process.post(event("m-1")) == 204
    unaware = tmp_path / "unaware.toml"
    unaware.write_text(f"[ingest]\nport = {agent_process.port}\n")

    looked = await ask("status", "--json", config=unaware)
    found = await ask("show", "m-1", config=unaware)

    assert json.loads(looked.stdout)["outbox"]["path"] == str(agent_process.outbox)
    assert found.exit_code == 0


async def test_another_program_on_the_port_is_no_agent(sandbox: Sandbox, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    port = sandbox.url.rpartition(":")[2]
    config.write_text(f'[ingest]\nport = {port}\n[outbox]\npath = "{tmp_path}/outbox.db"\n')

    assert (await ask("status", config=config)).exit_code == 2
    assert (await ask("flush", config=config)).exit_code == 2


async def test_run_on_a_taken_port_ends_with_one_line(
    agent_process: AgentProcess, tmp_path: Path
) -> None:
    config = tmp_path / "second.toml"
    config.write_text(
        f'[ingest]\nport = {agent_process.port}\n[outbox]\npath = "{tmp_path}/second/outbox.db"\n'
    )

    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "agent", "run", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )

    told = [line for line in ended.stderr.splitlines() if line.startswith("tranthor-agent: ")]
    assert ended.returncode == 1
    assert len(told) == 1
    assert f"127.0.0.1:{agent_process.port}: already in use" in told[0]
    assert "Traceback" not in ended.stderr


async def test_the_events_are_listed_over_http_page_by_page(agent_process: AgentProcess) -> None:
    for number in range(3):
        await agent_process.post(event(f"page-{number}"))
    await agent_process.until(lambda now: bool(now["delivered"] == 3))
    first = await agent_process.ask("GET", "events?state=delivered&limit=2")
    assert [each["messageId"] for each in first["events"]] == ["page-0", "page-1"]
    second = await agent_process.ask(
        "GET", f"events?state=delivered&limit=2&after={first['nextAfter']}"
    )
    assert [each["messageId"] for each in second["events"]] == ["page-2"]
    assert second["nextAfter"] is None
    refused = await agent_process.ask("GET", f"events?after={2**63}")
    assert refused["statusCode"] == 400


async def test_what_a_query_or_body_cannot_mean_is_refused(agent_process: AgentProcess) -> None:
    for query in ("reason=null", "limit=null", "upstream=", f"acceptedBeforeMs={10**19}", "limit=1e1",
                  f"after={'9' * 5000}", "user=ann&colour=blue"):  # fmt: skip
        assert (await agent_process.ask("GET", f"events?{query}"))["statusCode"] == 400
    assert (await agent_process.ask("POST", "pause?upstream="))["statusCode"] == 400
    assert (await agent_process.ask("GET", "events?user=null"))["events"] == []
    bodies: list[object] = [
        {"acceptedBeforeMs": 0.5},
        {"acceptedBeforeMs": 1e300},
        {"all": 1},
        [],
        {},
    ]
    for body in bodies:
        assert (await agent_process.ask("POST", "dead/discard", body))["statusCode"] == 400
    assert (await agent_process.ask("POST", "dead/discard", {"acceptedBeforeMs": 164.0})) == {
        "discarded": 0
    }


async def test_a_receipt_is_whole_whatever_an_event_calls_event(
    agent_process: AgentProcess,
) -> None:
    await agent_process.ask("POST", "pause")
    identify = {"messageId": "m-1", "userId": "ann", "event": {"not": "a name"}}
    assert await agent_process.post(identify, "identify") == 204

    shown = await ask("show", "m-1", "--json", config=agent_process.config)

    assert json.loads(shown.stdout)["event"] is None
    assert json.loads(shown.stdout)["waitsFor"] == "resume"


async def test_the_metrics_say_what_status_says(agent_process: AgentProcess) -> None:
    for number in range(3):
        await agent_process.post(event(f"metric-{number}"))
    now = await agent_process.until(lambda now: bool(now["delivered"] == 3))
    text = await agent_process.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def value(name: str) -> float:
        (sample,) = families[f"tranthor_agent_{name}"].samples
        return float(sample.value)

    assert (value("events_accepted"), value("events_delivered")) == (3, 3)
    assert (value("events_pending"), value("events_ambiguous")) == (0, 0)
    assert value("outbox_max_bytes") == now["outbox"]["max_bytes"]
    states = {s.labels["state"]: s.value for s in families["tranthor_agent_state"].samples}
    assert [state for state, in_force in states.items() if in_force] == ["flowing"]
