"""SDKs that people have, as they come from PyPI and npm, against the real daemon and the sandbox.

`tests/sdks` has an app for each. Those of npm are installed once, by its lock file, into pytest's cache.
Planted bugs that these tests were seen to find: no form that is JSON, nothing translated, sentAt that
stays, no originalTimestamp, new ids for all, keys of Basic authentication or a path's upstream not
heeded, only the first event of a batch stored, a refusal answered as a success, 507 made a 400.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import DEADLINE_S, AgentProcess, environ, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Fault, Sandbox

pytestmark = pytest.mark.process

APPS = Path(__file__).parent / "sdks"
INSTALL_S = 180.0

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Sdk:
    """One client: the app that uses it, and what is particular about it."""

    app: str
    gzip: bool = False
    kinds: tuple[str, ...] = ("identify", "track", "page", "screen", "group")
    library: str = ""
    """What it calls itself in the context; empty where it does not."""

    def __str__(self) -> str:
        return f"{Path(self.app).stem}{'-gzip' if self.gzip else ''}"


PYTHON = Sdk("segment_python.py", library="analytics-python")
PYTHON_GZIP = Sdk("segment_python.py", gzip=True, library="analytics-python")
SEGMENT = Sdk("segment_node.cjs", library="@segment/analytics-node")
RUDDERSTACK = Sdk("rudderstack_node.cjs", library="analytics-node")
RUDDERSTACK_GZIP = Sdk("rudderstack_node.cjs", gzip=True, library="analytics-node")
DITTOFEED = Sdk("dittofeed_node.cjs", kinds=("identify", "track", "page", "screen"))

RETRYING = (PYTHON, PYTHON_GZIP, SEGMENT, RUDDERSTACK, RUDDERSTACK_GZIP)
ALL = (*RETRYING, DITTOFEED)


@pytest.fixture(scope="session")
def packages(request: pytest.FixtureRequest) -> Path:
    """The folder that the packages of npm are installed in; shared with other workers and runs."""
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    lists = [APPS / "package.json", APPS / "package-lock.json"]
    pinned = hashlib.sha256(b"".join(each.read_bytes() for each in lists)).hexdigest()[:16]
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir(f"sdks-{pinned}")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            for each in lists:
                shutil.copy(each, folder)
            install(folder)
            (folder / "installed").touch()
    return folder


def install(folder: Path) -> None:
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm ci took over {INSTALL_S:.0f} s")
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        pytest.skip(f"npm ci: {' '.join(errors[:4])}")


class App:
    """A process that makes calls with an SDK, and says what became of them."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def told(self, word: str) -> Any:
        """Return what it says under *word*."""
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            async for line in self._process.stdout:
                said = json.loads(line)
                if word in said:
                    return said[word]
        raise AssertionError(f"it ended without a word of {word}")

    async def acknowledged(self) -> list[str]:
        return list(await self.told("acknowledged"))

    async def ended(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def give(process: asyncio.subprocess.Process, task: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(task).encode())
    await process.stdin.drain()
    process.stdin.close()


@asynccontextmanager
async def running_app(
    sdk: Sdk,
    request: pytest.FixtureRequest,
    host: str,
    calls: list[Call],
    *,
    key: str = "any-key",
    pace_s: float = 0,
) -> AsyncIterator[App]:
    python = sdk.app.endswith(".py")
    task = {
        "host": host,
        "key": key,
        "gzip": sdk.gzip,
        "calls": calls,
        "pace_s": pace_s,
        "packages": "" if python else str(request.getfixturevalue("packages")),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable if python else "node",
        str(APPS / sdk.app),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environ(),
    )
    app = App(process)
    try:
        await give(process, task)
        yield app
    finally:
        await app.ended()


def upstream(sandbox_url: str) -> str:
    return f'url = "{sandbox_url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"\ntimeout = "5s"'


QUICK = 'backoff_base = "50ms"\nbackoff_max = "200ms"'


def arrived(sandbox: Sandbox) -> dict[str, dict[str, Any]]:
    """Return what the upstream holds, by messageId; nothing may be there twice."""
    twice = {
        found: n for found, n in Counter(a.message_id for a in sandbox.stored).items() if n > 1
    }
    assert not twice
    return {arrival.message_id: json.loads(arrival.body) for arrival in sandbox.stored}


# --- every call ----------------------------------------------------------------------------------

SAID: dict[str, dict[str, Any]] = {
    "identify": {"userId": "u-1", "traits": {"email": "käse@example.com", "plan": {"seats": 3}}},
    "track": {
        "anonymousId": "a-1",
        "event": "Item Sold",
        "properties": {
            "price": 9.99,
            "count": 9_007_199_254_740_991,
            "tags": ["ü", "☕", None, {"deep": []}],
            "none": None,
            "flag": False,
            "text": '"\\\u2028',
        },
        "context": {"ip": "10.0.0.1"},
        "timestamp": "2026-01-02T03:04:05.678+00:00",
    },
    "page": {"userId": "u-1", "name": "Home", "properties": {"path": "/", "category": "own"}},
    "screen": {"anonymousId": "a-1", "name": "Till", "properties": {"open": True}},
    "group": {"userId": "u-1", "groupId": "g-1", "traits": {"size": 40}},
}


def every_call(sdk: Sdk) -> list[Call]:
    return [(kind, {"messageId": f"m-{kind}", **SAID[kind]}) for kind in sdk.kinds]


@pytest.mark.parametrize("named_by", ["key", "path"])
@pytest.mark.parametrize("sdk", ALL, ids=str)
async def test_each_call_of_an_sdk_arrives_once_and_whole_where_its_key_or_path_says(
    tmp_path: Path, request: pytest.FixtureRequest, sdk: Sdk, named_by: str
) -> None:
    crm, other = Sandbox(), Sandbox()
    claimed = hashlib.sha256(b"crm-key").hexdigest()
    calls = every_call(sdk)
    async with crm.serving() as crm_url, other.serving() as other_url:
        sections = {
            "upstream": upstream(other_url),
            "upstreams.crm": f'{upstream(crm_url)}\napp_key_sha256 = ["{claimed}"]',
        }
        async with running_agent(tmp_path, **sections) as agent:
            by_key = named_by == "key"
            host = agent.url if by_key else f"{agent.url}/w/crm"
            key = "crm-key" if by_key else "any-key"
            async with running_app(sdk, request, host, calls, key=key) as app:
                acknowledged = await app.acknowledged()
            await crm.wait_for(lambda s: len(s.stored) >= len(acknowledged), DEADLINE_S)
            status = await agent.until(lambda status: status["pending"] == 0)

    assert sorted(acknowledged) == sorted(said["messageId"] for _, said in calls)
    assert (status["accepted"], status["delivered"]) == (len(calls), len(calls))
    assert other.stored == []
    kinds = {arrival.message_id: arrival.path.rpartition("/")[2] for arrival in crm.stored}
    for kind, said in calls:
        body = arrived(crm)[said["messageId"]]
        assert kinds[said["messageId"]] == kind
        assert_whole(sdk, kind, said, body)
        assert key not in json.dumps(body)


def assert_whole(sdk: Sdk, kind: str, said: dict[str, Any], body: dict[str, Any]) -> None:
    expected = {**said, "context": body.get("context"), "timestamp": body["timestamp"]}
    assert body.items() >= {k: v for k, v in expected.items() if v is not None}.items()
    assert body.get("context", {}).items() >= said.get("context", {}).items()
    if sdk.library:
        assert body["context"]["library"]["name"] == sdk.library
    if "timestamp" in said:
        assert body["timestamp"][:23] == said["timestamp"][:23]
    unused = {"userId", "anonymousId"} - said.keys()
    assert not {*unused, "sentAt", "type", "writeKey"} & body.keys(), kind
    if "originalTimestamp" in body and "timestamp" not in said:
        assert body["timestamp"] == body["originalTimestamp"]


# --- a daemon that goes and comes ----------------------------------------------------------------

CALLS = 240
PACE_S = 0.01


def track(number: int, filler: str = "☕") -> Call:
    said = {
        "messageId": f"m-{number}",
        "userId": f"u-{number % 7}",
        "event": "Item Sold",
        "properties": {"number": number, "filler": filler},
        "timestamp": f"2026-01-02T03:04:05.{number:03}+00:00",
    }
    return ("track", said)


async def accepts(agent: AgentProcess, count: int) -> None:
    await agent.until(lambda status: status["accepted"] >= count)


@pytest.mark.parametrize("sdk", RETRYING, ids=str)
async def test_an_sdk_that_retries_loses_nothing_when_the_agent_is_killed_and_started_again(
    tmp_path: Path, request: pytest.FixtureRequest, sdk: Sdk
) -> None:
    sandbox = Sandbox()
    # Down, so that what arrives twice is the agent's doing and not the cut link's.
    sandbox.fault = Fault(mode="down")
    calls = [track(number) for number in range(CALLS)]
    async with (
        sandbox.serving() as url,
        running_agent(tmp_path, upstream=upstream(url), forward=QUICK) as agent,
        running_app(sdk, request, agent.url, calls, pace_s=PACE_S) as app,
    ):
        await accepts(agent, CALLS // 8)
        await agent.kill()
        await app.told("retrying")
        await agent.start()
        await accepts(agent, CALLS // 2)
        assert await agent.stop() == 0
        await agent.start()
        acknowledged = await app.acknowledged()
        sandbox.fault = Fault(mode="ok")
        await agent.ask("POST", "flush")
        status = await agent.until(lambda status: status["delivered"] >= CALLS)

    assert sorted(acknowledged) == sorted(said["messageId"] for _, said in calls)
    bodies = arrived(sandbox)
    assert bodies.keys() == set(acknowledged)
    for _, said in calls:
        body = bodies[said["messageId"]]
        assert body["timestamp"][:23] == said["timestamp"][:23]
        assert body.items() >= {k: v for k, v in said.items() if k != "timestamp"}.items()
    assert (status["accepted"], status["dead"]) == (CALLS, 0)
    assert status["conflicts"] == 0, "a retry was taken for another event"


@pytest.mark.parametrize("sdk", [SEGMENT, RUDDERSTACK_GZIP], ids=str)
async def test_an_sdk_that_meets_a_full_outbox_sends_again_until_there_is_room(
    tmp_path: Path, request: pytest.FixtureRequest, sdk: Sdk
) -> None:
    sandbox = Sandbox()
    sandbox.fault = Fault(mode="down")
    sections = {"outbox": 'max_size = "1MiB"', "forward": QUICK}
    calls = [track(number, "x" * 20_000) for number in range(80)]
    async with (
        sandbox.serving() as url,
        running_agent(tmp_path, upstream=upstream(url), **sections) as agent,
        running_app(sdk, request, agent.url, calls) as app,
    ):
        await app.told("retrying")
        assert (await agent.status())["pending"] < len(calls)
        sandbox.fault = Fault(mode="ok")
        await agent.ask("POST", "flush")
        acknowledged = await app.acknowledged()
        await agent.until(lambda status: status["delivered"] == len(calls))

    assert arrived(sandbox).keys() == set(acknowledged) == {f"m-{n}" for n in range(len(calls))}


# --- what the agent refuses ----------------------------------------------------------------------


async def test_an_alias_is_refused_to_an_sdk_with_its_batch_and_the_rest_arrives(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sandbox = Sandbox()
    alias: Call = ("alias", {"messageId": "m-alias", "userId": "u", "previousId": "a"})
    calls = [*(track(number) for number in range(10)), alias]  # ten are a batch of their own
    async with (
        sandbox.serving() as url,
        running_agent(tmp_path, upstream=upstream(url)) as agent,
        running_app(PYTHON, request, agent.url, calls) as app,
    ):
        acknowledged = await app.acknowledged()
        await agent.until(lambda status: status["delivered"] == 10)
    assert acknowledged == [f"m-{number}" for number in range(10)]
    assert arrived(sandbox).keys() == set(acknowledged)


@pytest.mark.parametrize("refusing", ["agent", "upstream"])
async def test_dittofeeds_sdk_told_to_send_no_id_is_refused_as_upstream_refuses_it(
    tmp_path: Path, request: pytest.FixtureRequest, refusing: str
) -> None:
    sandbox = Sandbox()
    # The SDK sends an id that is set and undefined as none at all.
    calls: list[Call] = [("track", {**track(0)[1], "messageId": None}), track(1)]
    async with sandbox.serving() as url, running_agent(tmp_path, upstream=upstream(url)) as agent:
        host = agent.url if refusing == "agent" else url
        key = f"Basic {DEFAULT_WRITE_KEY}"
        async with running_app(DITTOFEED, request, host, calls, key=key) as app:
            assert await app.acknowledged() == ["m-1"]
        await sandbox.wait_for(lambda s: len(s.stored) == 1, DEADLINE_S)
    assert arrived(sandbox).keys() == {"m-1"}
