"""Whatever is posted, the parser takes it by the contract or refuses it in a sentence, and no more.

Hundreds of thousands of bodies, each judged by two implementations that share nothing: the agent's
contract and the sandbox's stand-in for the server. `tests/test_contract_properties.py` asks more of
fewer bodies. A failure names seed and number, and shows the body cut down to what matters.

Planted bugs that these were seen to find: an exception of another kind, a null that is kept, a type
that stays, a message that quotes without end, and a body that is remembered.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from processes import DEADLINE_S, running_agent
from security.fuzzing import ENDPOINTS, MADE, bodies, shrunk
from security.raw import memory_bytes, troubles
from test_contract_properties import instant, read_strictly, require, require_sound

from agent.console import sandbox_contract
from agent.errors import InvalidEventError
from agent.event import Event

SEED = 20261123
SHARDS = 8
"""So that several workers share them; each has a seed of its own."""

QUICK = 100_000
DEEP = 1_000_000

RECEIVED_MS = 1_795_428_000_000

LONGEST_MESSAGE = 500
"""Characters: a sentence, with a name and a value of 100 each and a few of escapes."""


def judge(name: str, raw: bytes) -> None:
    """Raise unless the agent does right with *raw*."""
    endpoint = ENDPOINTS[name]
    try:
        events = endpoint.read(raw, RECEIVED_MS)
    except InvalidEventError as exc:
        require(exc.status in {400, 413}, f"status {exc.status}")
        require(": " in str(exc), f"names no field: {exc}")
        require(len(str(exc)) <= LONGEST_MESSAGE, f"{len(str(exc))} characters")
        json.dumps(str(exc)).encode()
        return
    if endpoint.is_batch:
        # What stands beside the batch is not looked at: not even whether it is UTF-8.
        whole = json.loads(raw.decode(errors="replace"))
        require(len(events) == len(whole["batch"]), "not all of the batch")
    for event in events:
        judge_event(event)
    if endpoint.is_batch:
        return
    if endpoint.translated:
        judge_translation(raw, events[0])
    else:
        judge_change(raw, events[0])
        again = endpoint.read(events[0].body, RECEIVED_MS + 1)
        require(again[0].body == events[0].body, "read again it is another body")


def judge_event(event: Event) -> None:
    """Raise unless *event* is what the contract says, and what the server would take."""
    fields = read_strictly(event.body)
    require_sound(fields)
    verdict = sandbox_contract.judge(
        f"{sandbox_contract.PREFIX}{event.kind}",
        content_type="application/json",
        authorization="Bearer key",
        body=event.body,
        write_key="key",
    )
    require(verdict.status == 204, f"the server answers {verdict.status}: {verdict.payload}")
    (found,) = verdict.found
    require(found.message_id == event.message_id, "another messageId")
    require(found.kind == event.kind, "another kind")
    require(found.user == fields.get("userId", fields.get("anonymousId")), "another user")
    require(found.user != "", "no user")
    require("type" not in fields, "a type that would override the kind")
    instant(fields["timestamp"])
    for name in TEXTS[event.kind]:
        require(isinstance(fields.get(name, ""), str), name)
    for name in OBJECTS[event.kind]:
        require(isinstance(fields.get(name, {}), dict), name)
    if event.kind == "group":
        require(fields.get("assigned", True) in (True, False), "assigned")


COMMON = ("messageId", "userId", "anonymousId")
TEXTS = {
    "track": (*COMMON, "event"),
    "identify": COMMON,
    "page": COMMON,
    "screen": COMMON,
    "group": (*COMMON, "groupId"),
}
OBJECTS = {
    "track": ("context", "properties"),
    "identify": ("context", "traits"),
    "page": ("context", "properties"),
    "screen": ("context", "properties"),
    "group": ("context", "traits"),
}


def judge_change(raw: bytes, event: Event) -> None:
    """Raise if anything else was changed than the contract lets the agent repair."""
    given, stored = json.loads(raw), json.loads(event.body)
    for name in given.keys() | stored.keys():
        # As text, so that 1 is not 1.0 and True is not 1.
        if repr(given.get(name)) == repr(stored.get(name)):
            continue
        repaired = name in {"type", "timestamp"} or (
            name in TEXTS[event.kind] and isinstance(given.get(name), int | float)
        )
        require(repaired, f"{name}: {given.get(name)!r} became {stored.get(name)!r}")


def judge_translation(raw: bytes, event: Event) -> None:
    """Raise if anything was lost that a Segment message said, but for what is of the request."""
    given, stored = json.loads(raw), json.loads(event.body)
    for name, value in given.items():
        kept = stored.get(name)
        if value is None or name in {"type", "sentAt", "writeKey", "timestamp", "_metadata"}:
            continue
        if name in COMMON and value == "":
            continue
        if name == "properties" and isinstance(value, dict):
            # A category was added to them, where they had none.
            require(isinstance(kept, dict), name)
            kept = {key: kept[key] for key in value}
        is_text = name in TEXTS[event.kind] and isinstance(value, int | float)
        require(is_text or repr(kept) == repr(value), f"{name}: {value!r} became {kept!r}")
    require("sentAt" not in stored, "a retry would be another event")
    require("writeKey" not in stored, "a key is stored")


def failure(name: str, raw: bytes) -> str | None:
    try:
        judge(name, raw)
    except Exception as exc:  # noqa: BLE001  # whatever it is, it is a finding
        return f"{type(exc).__name__}: {exc}"
    return None


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_body_is_taken_by_the_contract_or_refused_in_a_sentence(
    shard: int, tier: Callable[[int, int], int]
) -> None:
    count = tier(QUICK, DEEP) // SHARDS
    seed = SEED + shard
    warm_bytes = 0
    for number, (name, raw) in enumerate(bodies(seed, count)):
        if number == WARM:
            warm_bytes = memory_bytes(os.getpid())
        if (found := failure(name, raw)) is not None:
            less = shrunk(raw, partial(fails_so, name, found.partition(":")[0]))
            pytest.fail(f"seed {seed}, body {number}, {name}: {found}\n{less!r}\nof {raw[:5000]!r}")
    assert memory_bytes(os.getpid()) < warm_bytes + SLACK_BYTES


def fails_so(name: str, kind: str, raw: bytes) -> bool:
    return (failure(name, raw) or "").startswith(f"{kind}:")


WARM = 2_000
SLACK_BYTES = 2 * 1024 * 1024
"""What is read of a shard would come to more, were it kept."""


def test_the_bodies_are_of_all_sorts() -> None:
    taken: dict[str, list[bool]] = defaultdict(list)
    for name, raw in bodies(SEED, 3_000):
        try:
            taken[name].append(bool(ENDPOINTS[name].read(raw, RECEIVED_MS)))
        except InvalidEventError:
            taken[name].append(False)
    assert taken.keys() == ENDPOINTS.keys()
    for name, each in taken.items():
        share = sum(each) / len(each)
        assert 0.2 < share < 0.8, f"{name}: {share:.0%} are taken"


# --- over HTTP, to the disk ---

POSTED = 3_000
CLIENTS = 8


@dataclass
class Made:
    """What the contract makes of bodies: of each messageId, and of messages that have none yet."""

    of_id: dict[str, list[tuple[str, bytes]]] = field(default_factory=lambda: defaultdict(list))
    nameless: Counter[str] = field(default_factory=Counter)

    def status_of(self, path: str, raw: bytes) -> int:
        """Return what it must be answered."""
        try:
            events = ENDPOINTS[path].read(raw, RECEIVED_MS)
        except InvalidEventError as exc:
            return exc.status
        for event in events:
            if event.message_id == MADE:
                self.nameless[but_for_id_and_time(event.kind, event.body)] += 1
            else:
                self.of_id[event.message_id].append((path, raw))
        return ENDPOINTS[path].stored

    def includes(self, message_id: str, accepted_ms: int, kind: str, body: bytes) -> bool:
        """Return whether a stored event is one of these; one without an id is so but once."""
        if message_id not in self.of_id:
            known = but_for_id_and_time(kind, body)
            self.nameless[known] -= 1
            return self.nameless[known] >= 0
        return any(
            (event.message_id, event.kind, event.body) == (message_id, kind, body)
            for path, raw in self.of_id[message_id]
            for event in ENDPOINTS[path].read(raw, accepted_ms)
        )


@pytest.mark.process
async def test_what_a_daemon_stores_of_them_is_what_the_contract_makes_of_them(
    tmp_path: Path,
) -> None:
    """Byte for byte; any of the bodies may have won where several have one messageId."""
    made = Made()
    wrong: list[str] = []
    work = iter(list(bodies(SEED - 1, POSTED)))

    async def client() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session:
            for path, raw in work:
                expected = made.status_of(path, raw)
                headers = {"Content-Type": ENDPOINTS[path].content_type}
                async with session.post(agent.url + path, data=raw, headers=headers) as answer:
                    if answer.status != expected:
                        wrong.append(f"{path}: {answer.status}, expected {expected}: {raw[:500]!r}")

    async with running_agent(tmp_path) as agent:
        pid = agent.process.pid
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(client())
        if wrong:
            pytest.fail("\n".join(wrong[:10]))
        assert not troubles(agent, pid)
        assert await agent.stop() == 0
    with closing(sqlite3.connect(agent.outbox)) as db:
        stored = db.execute(
            "SELECT message_id, accepted_ms, kind, body FROM event JOIN pending USING (seq)"
        ).fetchall()
    assert made.of_id.keys() <= {message_id for message_id, *_ in stored}
    assert [row for row in stored if not made.includes(*row)] == []
    assert not +made.nameless, "not all of them were stored"


def but_for_id_and_time(kind: str, body: bytes) -> str:
    """Return what is known of an event beforehand whose id is made at its receipt."""
    fields = json.loads(body)
    del fields["messageId"], fields["timestamp"]
    return kind + json.dumps(fields)
