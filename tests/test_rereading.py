"""A configuration and a key that change while the agent runs: the real daemon, and files as people
write them.

The first takes the ten seconds after which the agent looks at its files by itself.

Planted bugs that these tests were seen to find: no look by time or none before a probe, a file read
while it is written, a stamp of size and time alone, nothing ever refused, TLS files not tried, a
problem that another's mending hides, a hold that stays, an upstream that stays, connections closed
under their attempts, lanes made anew under theirs, guard, policy or redactor left as they were, and
a forwarder that ends for want of an upstream.
"""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import DEADLINE_S, AgentProcess, running_agent

from agent.config.loaded import Loaded
from agent.config.loading import files_beside, load, refresh
from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox
from agent.rereading import Rereading, stamps
from agent.settings import Settings

KEY = DEFAULT_WRITE_KEY
HELD_FOR_EVER = 'hold_probe = "24h"'
EVENTS = 1_500
USERS = 25

pytestmark = pytest.mark.process


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    upstream = Sandbox(KEY)
    async with upstream.serving():
        yield upstream


def event(number: int, user: str = "ann") -> dict[str, Any]:
    return {"messageId": f"m-{number}", "event": "Paid", "userId": user}


def inline(sandbox: Sandbox, key: str = KEY) -> str:
    return f'url = "{sandbox.url}"\nwrite_key = "{key}"'


def from_file(sandbox: Sandbox) -> str:
    return f'url = "{sandbox.url}"\nwrite_key_file = "write_key"'


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name("write_key.new")
    beside.write_text(text)
    beside.replace(path)


def write_over(path: Path, text: str) -> None:
    path.write_text(text)


def reconfigure(agent: AgentProcess, **sections: str) -> None:
    """Write the configuration anew, and tell the agent."""
    bodies = {"ingest": "", "outbox": "", **sections}
    bodies["ingest"] += f"\nport = {agent.port}"
    bodies["outbox"] += f'\npath = "{agent.outbox}"'
    agent.config.write_text("".join(f"[{name}]\n{body}\n" for name, body in bodies.items()))
    hang_up(agent)


def hang_up(agent: AgentProcess) -> None:
    agent.process.send_signal(signal.SIGHUP)


def lines(agent: AgentProcess, event_name: str) -> list[dict[str, Any]]:
    logged = map(json.loads, agent.log.read_text().splitlines())
    return [line for line in logged if line["event"] == event_name]


async def is_held(agent: AgentProcess) -> None:
    await agent.until(lambda status: bool(status["state"] == "held"))


async def holds(sandbox: Sandbox, count: int) -> None:
    await sandbox.wait_for(lambda sandbox: len(sandbox.stored) >= count, DEADLINE_S)


# --- the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_atomically, write_over])
async def test_a_key_put_right_ends_the_hold_without_a_signal(
    tmp_path: Path, sandbox: Sandbox, write: Callable[[Path, str], None]
) -> None:
    write(tmp_path / "write_key", "revoked-key")
    async with running_agent(tmp_path, upstream=from_file(sandbox), forward=HELD_FOR_EVER) as agent:
        await agent.post(event(1))
        await is_held(agent)
        write(tmp_path / "write_key", f"{KEY}\n")
        await holds(sandbox, 1)
        await agent.until(lambda status: bool(status["state"] == "flowing"))
        assert lines(agent, "config.reloaded")[0]["changed"] == ["upstream.write_key"]


async def test_the_probe_of_a_hold_goes_with_the_key_that_was_put_right(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    write_over(tmp_path / "write_key", "revoked-key")
    async with running_agent(tmp_path, upstream=from_file(sandbox), forward=HELD_FOR_EVER) as agent:
        await agent.post(event(1))
        await is_held(agent)
        write_over(tmp_path / "write_key", KEY)
        await agent.ask("POST", "flush")
        await holds(sandbox, 1)
        assert sandbox.stats().answers == {"401": 1, "204": 1}


async def test_a_credential_that_changed_is_taken_over(tmp_path: Path, sandbox: Sandbox) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    async with aiohttp.ClientSession() as session:
        agent = AgentProcess(
            tmp_path, session, upstream=f'url = "{sandbox.url}"', forward=HELD_FOR_EVER
        )
        agent.environ["CREDENTIALS_DIRECTORY"] = str(credentials)
        await agent.start()
        try:
            await agent.post(event(1))
            await agent.until(lambda status: bool(status["state"] == "unconfigured"))
            write_over(credentials / "write_key", KEY)
            hang_up(agent)
            await holds(sandbox, 1)
        finally:
            await agent.kill()


async def test_an_emptied_key_file_loses_no_key_and_is_told_of(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    write_over(tmp_path / "write_key", KEY)
    async with running_agent(tmp_path, upstream=from_file(sandbox)) as agent:
        write_over(tmp_path / "write_key", "")
        hang_up(agent)
        status = await agent.until(lambda status: status["config_problem"] is not None)
        assert "the file is empty" in status["config_problem"]
        await agent.post(event(1))
        await holds(sandbox, 1)
        code, said = await agent.run_command("status")
        assert (code, "CONFIGURATION REFUSED" in said) == (1, True)
        write_over(tmp_path / "write_key", KEY)
        hang_up(agent)
        await agent.until(lambda status: status["config_problem"] is None)


async def test_a_new_key_is_masked_in_the_log_from_its_first_use(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(
        tmp_path, upstream=inline(sandbox, "revoked-key"), forward=HELD_FOR_EVER
    ) as agent:
        await agent.post({**event(1), "messageId": f"{KEY}-1"})
        await is_held(agent)
        sandbox.fault = Fault(mode="status", status=400)  # then its id is logged
        reconfigure(agent, upstream=inline(sandbox), forward=HELD_FOR_EVER)
        await agent.until(lambda _: bool(lines(agent, "event.dead_lettered")))
        assert lines(agent, "event.dead_lettered")[0]["message_id"] == "********-1"


# --- SIGHUP -------------------------------------------------------------------------------------


async def test_a_key_changed_in_the_configuration_ends_the_hold_on_sighup(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(
        tmp_path, upstream=inline(sandbox, "revoked-key"), forward=HELD_FOR_EVER
    ) as agent:
        await agent.post(event(1))
        await is_held(agent)
        reconfigure(agent, upstream=inline(sandbox), forward=HELD_FOR_EVER)
        await holds(sandbox, 1)


async def test_an_agent_without_an_upstream_begins_to_deliver_on_sighup(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(tmp_path) as agent:
        await agent.post(event(1))
        await agent.until(lambda status: bool(status["state"] == "unconfigured"))
        reconfigure(agent, upstream=inline(sandbox))
        await holds(sandbox, 1)
        status = await agent.until(lambda status: bool(status["state"] == "flowing"))
        assert status["upstream"] == sandbox.url


BAD = {
    "not TOML": ("[upstream\n", "not valid TOML"),
    "an unknown key": ('[upstream]\nurll = "http://127.0.0.1:1"\n', "did you mean url?"),
    "a wrong type": ("[forward]\nconcurrency = true\n", "expected a whole number"),
    "no key any more": ('[upstream]\nurl = "http://127.0.0.1:1"\n', "no write key is configured"),
    "a certificate that is not there": (
        '[upstream]\nurl = "http://127.0.0.1:1"\nwrite_key = "k-1"\nca_file = "nowhere.pem"\n',
        "upstream.ca_file",
    ),
    "a certificate that is none": (
        '[upstream]\nurl = "http://127.0.0.1:1"\nwrite_key = "k-1"\nca_file = "config.toml"\n',
        "TLS files cannot be loaded",
    ),
}


async def test_a_bad_configuration_is_refused_and_the_one_before_stays_in_force(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(tmp_path, upstream=inline(sandbox)) as agent:
        good = agent.config.read_text()
        for number, (text, reason) in enumerate(BAD.values(), 1):
            agent.config.write_text(text)
            hang_up(agent)
            status = await agent.until(lambda status: status["config_problem"] is not None)
            assert reason in status["config_problem"]
            assert status["upstream"] == sandbox.url
            assert status["config_problem"] == lines(agent, "config.refused")[-1]["reason"]
            await agent.post(event(number))
            await holds(sandbox, number)
            agent.config.write_text(good)
            hang_up(agent)
            await agent.until(lambda status: status["config_problem"] is None)


async def test_what_only_a_start_can_change_is_named_and_stays(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(tmp_path, upstream=inline(sandbox)) as agent:
        agent.config.write_text(
            f'[ingest]\nport = {agent.port + 1}\n[outbox]\npath = "other.db"\nmax_size = "2MiB"\n'
            f"[upstream]\n{inline(sandbox)}\n"
        )
        hang_up(agent)
        status = await agent.until(
            lambda status: bool(status["outbox"]["max_bytes"] == 2 * 1024**2)
        )
        assert status["outbox"]["path"] == str(agent.outbox)
        (line,) = lines(agent, "config.postponed")
        assert line["keys"] == ["ingest.port", "outbox.path"]


async def test_the_listener_goes_by_what_is_allowed_now_on_connections_that_were_open(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    async with running_agent(tmp_path, upstream=inline(sandbox)) as agent:
        reader, writer = await asyncio.open_connection("127.0.0.1", agent.port)

        async def ask_as(host: str) -> bytes:
            writer.write(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if b"content-length" in line)
            await reader.readexactly(int(length.partition(b":")[2]))
            return head.split()[1]

        async with asyncio.timeout(DEADLINE_S):
            assert await ask_as("localhost") == b"200"
            reconfigure(agent, upstream=inline(sandbox), ingest='allowed_hosts = ["till-7.local"]')
            await agent.until(lambda _: bool(lines(agent, "config.reloaded")))
            assert await ask_as("till-7.local") == b"200"
        writer.close()
        await writer.wait_closed()


async def test_a_full_outbox_takes_events_again_once_it_may_be_larger(tmp_path: Path) -> None:
    big = {**event(0), "properties": {"note": "x" * 100_000}}
    async with running_agent(tmp_path, outbox='max_size = "1MiB"') as agent:
        answers = [await agent.post({**big, "messageId": f"m-{n}"}) for n in range(12)]
        assert answers[-1] == 507
        reconfigure(agent, outbox='max_size = "8MiB"')
        await agent.until(lambda status: bool(status["outbox"]["max_bytes"] == 8 * 1024**2))
        assert await agent.post({**big, "messageId": "m-after"}) == 204


# --- a new upstream -----------------------------------------------------------------------------


@asynccontextmanager
async def two_sandboxes() -> AsyncIterator[tuple[Sandbox, Sandbox]]:
    first, second = Sandbox(KEY), Sandbox(KEY)
    async with first.serving(), second.serving():
        yield first, second


async def test_an_attempt_in_flight_ends_where_it_began_and_what_follows_goes_to_the_new_url(
    tmp_path: Path,
) -> None:
    async with (
        two_sandboxes() as (first, second),
        running_agent(tmp_path, upstream=inline(first)) as agent,
    ):
        first.fault = Fault(mode="slow", delay_s=1)
        await agent.post(event(1))
        await first.wait_for(lambda sandbox: sandbox.requests == 1, DEADLINE_S)
        reconfigure(agent, upstream=inline(second))
        await agent.post(event(2))
        await holds(second, 1)
        assert [arrival.message_id for arrival in first.stored] == ["m-1"]
        assert [arrival.message_id for arrival in second.stored] == ["m-2"]


async def test_sighup_twice_in_a_row_ends_with_the_last_configuration(tmp_path: Path) -> None:
    async with (
        two_sandboxes() as (first, second),
        running_agent(tmp_path, upstream=inline(first)) as agent,
    ):
        reconfigure(agent, upstream=inline(second, "revoked-key"), forward=HELD_FOR_EVER)
        reconfigure(agent, upstream=inline(second), forward=HELD_FOR_EVER)
        await agent.post(event(1))
        await agent.until(lambda status: bool(status["delivered"] == 1))
        await agent.until(lambda status: bool(status["upstream"] == second.url))
        await agent.post(event(2))
        await second.wait_for(
            lambda sandbox: any(arrival.message_id == "m-2" for arrival in sandbox.stored),
            DEADLINE_S,
        )


async def test_sighup_in_full_traffic_loses_repeats_and_reorders_nothing(tmp_path: Path) -> None:
    async with (
        two_sandboxes() as sandboxes,
        running_agent(tmp_path, upstream=inline(sandboxes[0])) as agent,
    ):
        posted = asyncio.Semaphore(0)

        async def use_app(user: int) -> None:
            for number in range(user, EVENTS, USERS):
                assert await agent.post(event(number, user=f"user-{user}")) == 204
                posted.release()

        async def turn_about() -> None:
            for turn in range(EVENTS // 50):
                for _ in range(50):
                    await posted.acquire()
                reconfigure(
                    agent,
                    upstream=inline(sandboxes[turn % 2]),
                    forward=f"concurrency = {1 + turn % 8}",
                )

        async with asyncio.TaskGroup() as world:
            for user in range(USERS):
                world.create_task(use_app(user))
            world.create_task(turn_about())
        status = await agent.until(lambda status: bool(status["pending"] == 0))
        assert await agent.stop() == 0

    assert status["delivered"] == status["accepted"] == EVENTS
    arrivals = sorted(
        [*sandboxes[0].stored, *sandboxes[1].stored], key=lambda arrival: arrival.at_s
    )
    by_user: dict[str, list[int]] = defaultdict(list)
    for arrival in arrivals:
        by_user[arrival.user].append(int(arrival.message_id.removeprefix("m-")))
    assert by_user == {f"user-{user}": list(range(user, EVENTS, USERS)) for user in range(USERS)}
    assert all(sandbox.stored for sandbox in sandboxes)


# --- a terminal ---------------------------------------------------------------------------------


async def test_a_terminal_that_goes_away_ends_the_agent_as_it_always_did(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        agent = AgentProcess(tmp_path, session)
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *agent.command,
            "run",
            "--config",
            str(agent.config),
            stdin=theirs,
            stderr=theirs,
            env=agent.environ,
        )
        agent._process = process
        os.close(theirs)
        assert await agent.becomes_ready()
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0


# --- files being written ------------------------------------------------------------------------


class Recorder:
    """Parts that note what they are told."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.problem: str | None = None

    def fault(self, settings: Settings) -> str | None:
        return None

    async def adopt(self, loaded: Loaded) -> None:
        key = loaded.settings.upstream.write_key
        assert key is not None
        self.keys.append(key.reveal())

    def note(self, problem: str | None) -> None:
        self.problem = problem


def rereading(tmp_path: Path) -> tuple[Rereading, Recorder, Path]:
    """Return one whose key file is at the path returned, and holds key-1."""
    key_file, config = tmp_path / "write_key", tmp_path / "config.toml"
    key_file.write_text("key-1")
    config.write_text('[upstream]\nurl = "https://a.example"\nwrite_key_file = "write_key"\n')
    loaded = load(config, {})
    noticed = stamps(files_beside(loaded, {}))
    parts = Recorder()
    return Rereading(refresh(loaded, {}), noticed, {}, parts), parts, key_file


async def test_a_file_is_read_when_it_was_written_to_its_end(tmp_path: Path) -> None:
    reread, parts, key_file = rereading(tmp_path)
    with key_file.open("w", buffering=1) as file:
        file.write("key-")
        file.flush()
        looking = asyncio.create_task(reread.look())
        await asyncio.sleep(0)  # it has seen the half by now
        file.write("2, and more")
    await looking
    assert parts.keys == ["key-2, and more"]


async def test_files_that_did_not_change_are_not_read(tmp_path: Path) -> None:
    reread, parts, _ = rereading(tmp_path)
    await reread.look()
    assert parts.keys == []


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("\n"), Path.unlink])
async def test_a_key_that_is_gone_is_kept_until_another_is_there(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    reread, parts, key_file = rereading(tmp_path)
    spoil(key_file)
    await reread.look()
    assert parts.keys == []
    assert parts.problem is not None
    key_file.write_text("key-3")
    await reread.look()
    assert parts.keys == ["key-3"]
    assert not parts.problem


async def test_a_key_put_right_does_not_hide_a_mistake_in_the_configuration(
    tmp_path: Path,
) -> None:
    reread, parts, key_file = rereading(tmp_path)
    (tmp_path / "config.toml").write_text("[nonsense]\n")
    await reread.reload()
    key_file.write_text("key-4")
    await reread.look()
    assert parts.keys == ["key-4"]
    assert parts.problem is not None
    assert "nonsense" in parts.problem


async def test_two_that_look_at_once_read_once(tmp_path: Path) -> None:
    reread, parts, key_file = rereading(tmp_path)
    key_file.write_text("key-5")
    async with asyncio.TaskGroup() as both:
        both.create_task(reread.look())
        both.create_task(reread.look())
    assert parts.keys == ["key-5"]


def test_a_file_of_the_same_size_and_time_that_took_its_place_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "write_key"
    file.write_text("key-1")
    before = stamps([file])
    times = file.stat()
    write_atomically(file, "key-2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stamps([file]) != before
