"""Several upstreams: which one an event is for, and that none of them slows, stops or sees another.

Planted bugs that these tests were seen to find: ids known whatever the upstream, a scan that does not
look at the upstream, a lane read on with another's events, a cursor that stays before what was passed
over, a requeue that forgets the upstream, a restore that does, a key that is stored, one breaker for
all, counts that a rolled back transaction leaves changed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import msgspec
import pytest
from faults import relics
from processes import DEADLINE_S, AgentProcess, free_port, running_agent

from agent.clock import SystemClock
from agent.config.loaded import effective
from agent.config.loading import load
from agent.console.sandbox import Sandbox
from agent.contract import Terms, read_event
from agent.errors import ConfigError, OutboxFullError
from agent.event import Event
from agent.exchange import Answer, Request
from agent.ingest.destinations import Destinations
from agent.ingest.guard import Guard
from agent.ingest.reply import Later
from agent.ingest.routes import Mount, Routes
from agent.keys import example
from agent.outbox import letters, pauses, schema
from agent.outbox import reader as reading
from agent.outbox.access import open_own_reader
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, App, Appended, Bury, Policy, Selection
from agent.outbox.rescue import salvage_damaged
from agent.outbox.salvage import surviving
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer
from agent.units import MASK

POLICY = Policy(max_bytes=1 << 30, evicts=False, remember=True)

TRACK = "/api/public/apps/track"


def event(message_id: str, upstream: str = "", *, user: str = "u", filler: str = "") -> Event:
    body = {"messageId": message_id, "event": "Sold", "userId": user, "properties": {"f": filler}}
    parsed = read_event("track", json.dumps(body).encode(), received_ms=1_780_000_000_000)
    return msgspec.structs.replace(parsed, upstream=upstream)


@asynccontextmanager
async def opened(path: Path, policy: Policy = POLICY) -> AsyncIterator[tuple[Writer, Reader]]:
    async with (
        open_writer(path, policy, SystemClock()) as writer,
        open_own_reader(path, on_damage=writer.suspect) as reader,
    ):
        yield writer, reader


async def queue(reader: Reader, upstream: str) -> list[str]:
    """Return all that is pending for *upstream*, as a forwarder reads it."""
    found: list[str] = []
    after, more = 0, True
    while more:
        scan = await reader.scan(upstream, after=after, limit=2)
        found += [head.message_id for head in scan.heads]
        after, more = scan.upto, scan.more
    return found


async def until_met(writer: Writer) -> None:
    """Return when the writer has taken up what damaged it."""
    while writer.fault is None:  # noqa: ASYNC110  # what another task does
        await asyncio.sleep(0)


async def until_salvaged(writer: Writer) -> None:
    while writer.fault is not None or writer.rescuing:  # noqa: ASYNC110  # what another task does
        await asyncio.sleep(0.01)


# --- in the outbox ---


async def test_one_id_for_two_upstreams_is_two_events_and_for_one_it_is_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        for name in ("", "crm", "shop"):
            assert await writer.append([event("id", name)]) == [Appended.STORED]
        for name in ("", "crm", "shop"):
            assert await writer.append([event("id", name)]) == [Appended.REPLAYED]
        assert await writer.append([event("id", "crm", filler="x")]) == [Appended.CONFLICTING]

        assert [receipt.upstream for receipt in await reader.receipts("id")] == ["", "crm", "shop"]
        found = await reader.receipt("id", "crm")
        assert found is not None
        assert found.upstream == "crm"


async def test_an_id_is_known_for_its_upstream_alone_after_a_restart_and_in_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.outbox.ids.RECENT", 4)
    ids = [f"id-{n}" for n in range(12)]
    async with opened(tmp_path / "outbox.db") as (writer, _):
        for message_id in ids:
            await writer.append([event(message_id, "crm")])
    async with opened(tmp_path / "outbox.db") as (writer, _):
        again = await writer.append([event(message_id, "crm") for message_id in ids])
        elsewhere = await writer.append([event(message_id) for message_id in ids])

    assert set(again) == {Appended.REPLAYED}
    assert set(elsewhere) == {Appended.STORED}


@pytest.mark.parametrize("looked", [3, 20_000])
async def test_each_queue_has_its_own_events_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: int
) -> None:
    monkeypatch.setattr(reading, "LOOKED", looked)
    names = ["", *["crm"] * 9, "shop", "", *["shop"] * 7, "", "crm"]
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append([event(f"{n:02}", name) for n, name in enumerate(names)])
        found = {name: await queue(reader, name) for name in ("", "crm", "shop", "nobody")}

    expected = {
        name: [f"{n:02}" for n, other in enumerate(names) if other == name] for name in found
    }
    assert found == expected


@pytest.mark.parametrize("looked", [3, 20_000])
@pytest.mark.parametrize("upstream", ["", "crm"])
async def test_a_lane_is_read_on_past_the_same_users_events_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: int, upstream: str
) -> None:
    monkeypatch.setattr(reading, "LOOKED", looked)
    names = ["", "crm"] * 3 + ["shop"] * 20 + ["crm", ""] * 3
    events = [event(f"{n:02}", name) for n, name in enumerate(names)]
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append(events)
        found: list[str] = []
        after, more = 0, True
        while more:
            scan = await reader.lane(events[0].lane, upstream, after=after, upto=31, limit=2)
            assert scan.upto > after or not scan.more, "it would be read on for ever"
            found += [head.message_id for head in scan.heads]
            after, more = scan.upto, scan.more

    assert found == [f"{n:02}" for n, name in enumerate(names[:31]) if name == upstream]


async def test_a_scan_passes_over_no_more_than_its_bound_and_says_how_far_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LOOKED", 10)
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append([event(f"crm-{n}", "crm") for n in range(100)])
        await writer.append([event("mine")])
        first = await reader.scan(after=0, limit=5)
        named = await reader.scan("crm", after=99, limit=5)
        last = await reader.scan(after=99, limit=5)

    assert (first.heads, first.upto, first.more) == ([], 15, True)
    assert [head.message_id for head in named.heads] == ["crm-99"]
    assert not named.more
    assert [head.message_id for head in last.heads] == ["mine"]
    assert (last.upto, last.more) == (101, False)


async def test_what_waits_is_looked_at_for_one_upstream_however_large_its_bodies(
    tmp_path: Path,
) -> None:
    names = ["crm", "", "shop", "", "crm"]
    sizes = [1, 5_000, 5_000, 1, 2_000]
    events = [
        event(f"{n}", name, filler="x" * size)
        for n, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append(events)
        found = {name: await reader.waiting(name, after=0, limit=9) for name in ("", "crm", "shop")}
        part = await reader.waiting(after=0, limit=1)

    lane = events[0].lane
    assert {name: [seq for seq, *_ in it.waiting] for name, it in found.items()} == {
        "": [2, 4],
        "crm": [1, 5],
        "shop": [3],
    }
    assert {lane_ for it in found.values() for _, lane_, _ in it.waiting} == {lane}
    assert (part.waiting, part.upto, part.more) == ([], 1, True)


async def test_what_waits_for_each_is_known_without_counting_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append(
            [event(f"{name}-{n}", name) for name in ("crm", "shop") for n in range(5)]
        )
        await writer.append([event("mine")])
        assert writer.waiting == {"crm": 5, "shop": 5} == await reader.counts()

        def fail(store: Store) -> None:
            store.append([event("lost", "crm")])
            store.settle([Ack(6)], now_ms=1, remember=True)
            full = sqlite3.OperationalError("planned")
            full.sqlite_errorcode = sqlite3.SQLITE_FULL  # undone, with the connection as it was
            raise full

        twice = [Ack(1), Ack(1)]
        await writer.perform(lambda store: store.settle(twice, now_ms=1, remember=True))
        await writer.settle(Ack(1))
        await writer.settle(Bury(seq=2, reason="rejected", status=400, answer=""))
        await writer.perform(lambda store: store.evict(1, limit=1))
        with pytest.raises(OutboxFullError):
            await writer.perform(fail)
        await writer.append([event("more")])
        assert writer.waiting == {"crm": 2, "shop": 5} == await reader.counts()


async def test_a_dead_letter_goes_back_to_its_own_upstream(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append([event("id", "crm"), event("id", "shop"), event("id")])
        for seq in (1, 2, 3):
            await writer.settle(Bury(seq=seq, reason="rejected", status=400, answer=""))
        (letter,) = await reader.select("dead", Selection(upstream="crm"), limit=10)
        (mine,) = await reader.select("dead", Selection(upstream="default"), limit=10)
        assert (letter.upstream, mine.upstream) == ("crm", "")

        await writer.perform(lambda store: letters.requeue(store, [letter.seq], now_ms=1))

        assert await queue(reader, "crm") == ["id"]
        assert await queue(reader, "") == await queue(reader, "shop") == []
        assert writer.waiting == {"crm": 1}
        assert await writer.append([event("id", "crm")]) == [Appended.REPLAYED]


async def test_the_oldest_of_each_is_found_behind_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LOOKED", 3)

    def at(ms: int, message_id: str, name: str = "") -> Event:
        return msgspec.structs.replace(event(message_id, name), received_ms=ms)

    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.append([at(n, f"crm-{n}", "crm") for n in range(10)])
        assert await reader.oldest_pending_ms("") is None
        await writer.append([at(20, "first"), at(21, "crm-x", "crm"), at(22, "second")])
        assert await reader.oldest_pending_ms("") == 20
        assert await reader.oldest_pending_ms("crm") == 0
        assert await reader.oldest_pending_ms("nobody") is None
        await writer.settle(Ack(11))
        assert await reader.oldest_pending_ms("") == 22
        assert await reader.oldest_pending_ms() == 0


async def test_a_pause_by_name_is_one_of_those_that_were_paused(tmp_path: Path) -> None:
    known = ("", "crm", "shop")

    async def paused(reader: Reader) -> set[str]:
        ledger = await reader.ledger()
        return {name for name in known if ledger.pauses(name)}

    async with opened(tmp_path / "outbox.db") as (writer, reader):
        await writer.perform(lambda store: pauses.pause(store, "crm"))
        await writer.perform(lambda store: pauses.pause(store, ""))
        assert await paused(reader) == {"", "crm"}
        await writer.perform(lambda store: pauses.resume(store, "", known=known))
        assert await paused(reader) == {"crm"}
        await writer.perform(pauses.pause)
        await writer.perform(lambda store: pauses.pause(store, "shop"))
        assert await paused(reader) == {"", "crm", "shop"}
        await writer.perform(lambda store: pauses.resume(store, "shop", known=known))
        assert await paused(reader) == {"", "crm"}
        await writer.perform(pauses.resume)
        assert await paused(reader) == set()


async def test_a_salvaged_event_keeps_its_upstream_and_a_pause_its_name(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    names = ("", "crm", "shop")
    async with opened(path) as (writer, reader):
        for name in names:
            await writer.append([event(f"{kind}", name) for kind in ("p", "dead", "sent")])
        for seq in (2, 5, 8):
            await writer.settle(Bury(seq=seq, reason="rejected", status=400, answer=""))
        for seq in (3, 6, 9):
            await writer.settle(Ack(seq))
        await writer.perform(lambda store: pauses.pause(store, "crm"))
        before = {(it.upstream, it.message_id, it.state) for it in surviving(path)}
        assert len(before) == 9

        async with asyncio.TaskGroup() as tasks:
            salvage = tasks.create_task(salvage_damaged(writer))
            writer.suspect("for the test")
            await until_met(writer)
            await until_salvaged(writer)
            salvage.cancel()

        after = {(it.upstream, it.message_id, it.state) for it in surviving(path)}
        assert after == before
        assert [await queue(reader, name) for name in names] == [["p"]] * 3
        assert writer.waiting == {"crm": 1, "shop": 1}
        assert (await reader.ledger()).paused_upstreams == {"crm"}
        assert set(await writer.append([event("sent", name) for name in names])) == {
            Appended.REPLAYED
        }


def test_rows_of_before_the_column_are_the_default_upstreams(tmp_path: Path) -> None:
    relics.restore(2, tmp_path / "outbox.db", in_log=False)

    found = list(surviving(tmp_path / "outbox.db"))

    known = relics.testimony(2)["events"]
    assert {survivor.message_id for survivor in found} == {event["messageId"] for event in known}
    assert {survivor.upstream for survivor in found} == {""}


async def test_only_the_forwarder_that_an_event_is_for_is_woken(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db") as (writer, _):
        mine, theirs = writer.appended.of(""), writer.appended.of("crm")
        await writer.append([event("id", "crm")])
        assert (mine.is_set(), theirs.is_set()) == (False, True)


# --- which one it is for ---


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def asked(path: str = TRACK, authorization: str | None = None, method: str = "POST") -> Request:
    headers = {"content-type": "application/json"}
    if authorization is not None:
        headers["authorization"] = authorization
    body = b'{"messageId":"id","event":"Sold","userId":"u"}'
    return Request(method=method, path=path, query={}, headers=headers, body=body)


DESTINATIONS = Destinations(("crm", "shop"), {digest("crm-key"): "crm", digest("Yjp4"): "shop"})


@pytest.mark.parametrize(
    ("authorization", "upstream"),
    [
        ("", ""),
        ("Bearer crm-key", "crm"),
        ("bearer   crm-key", "crm"),
        ("crm-key", "crm"),
        ("Basic crm-key", "crm"),
        (basic("crm-key:"), "crm"),
        (basic("crm-key"), ""),
        (basic("crm-key:password"), ""),
        ("Basic Yjp4", "shop"),  # a key that is Base64 of its own, "b:x"
        ("Bearer crm-ke", ""),
        ("Bearer CRM-KEY", ""),
        ("Bearer", ""),
        ("Basic \xff\xfe", ""),
    ],
)
def test_the_key_that_an_app_sends_chooses(authorization: str, upstream: str) -> None:
    assert DESTINATIONS.of_key(authorization) == upstream


class Books:
    """A writer's place: notes what it is handed."""

    apps: ClassVar[dict[str, App]] = {}

    def __init__(self) -> None:
        self.events: list[Event] = []

    def append(self, events: list[Event]) -> asyncio.Future[list[Appended]]:
        self.events += events
        done: asyncio.Future[list[Appended]] = asyncio.get_running_loop().create_future()
        done.set_result([Appended.STORED] * len(events))
        return done


def routes(books: Books, destinations: Destinations = DESTINATIONS) -> Routes:
    mounts = [Mount("/api/agent/", lambda _: Answer(status=200))]
    return Routes(
        books,  # type: ignore[arg-type]
        SystemClock(),
        terms=Terms(max_body_bytes=1000),
        mounts=mounts,
        destinations=destinations,
    )


async def test_the_path_chooses_before_the_key() -> None:
    books = Books()
    for path, key in (
        (f"/w/shop{TRACK}", "Bearer crm-key"),
        (f"/w/default{TRACK}", "Bearer crm-key"),
        (TRACK, "Bearer crm-key"),
        (TRACK, None),
    ):
        assert isinstance(routes(books).answer(asked(path, key)), Later)

    assert [event.upstream for event in books.events] == ["shop", "", "crm", ""]


@pytest.mark.parametrize(
    "path", [f"/w/other{TRACK}", f"/w/{TRACK}", "/w/crm", "/w/", f"/w/CRM{TRACK}"]
)
async def test_an_unknown_name_is_a_404_that_has_the_known_ones(path: str) -> None:
    books = Books()
    answer = routes(books).answer(asked(path))

    assert isinstance(answer, Answer)
    said = json.loads(answer.body)
    assert (answer.status, said["statusCode"], said["error"]) == (404, 404, "Not Found")
    assert "/w/default/, /w/crm/, /w/shop/" in said["message"]
    assert books.events == []


@pytest.mark.parametrize("path", ["/w/crm/api/agent/status", "/w/crm/w/shop" + TRACK, "/w/crm/"])
async def test_what_is_not_about_events_is_not_below_a_prefix(path: str) -> None:
    answer = routes(Books()).answer(asked(path))

    assert isinstance(answer, Answer)
    assert answer.status == 404


def test_an_allowed_page_may_post_below_a_prefix_and_do_no_more() -> None:
    page = "https://shop.example"
    guard = Guard(allowed_hosts=frozenset(), allowed_origins=frozenset({page}), max_body_bytes=1000)
    headers = {"host": "127.0.0.1:7227", "origin": page}

    assert guard.judge(headers, f"/w/crm{TRACK}") is None
    assert guard.judge(headers, "/w/crm/api/agent/pause") is not None
    assert guard.judge(headers, "/w/api/public/") is not None


async def test_while_a_file_of_keys_is_unreadable_an_unknown_key_is_sent_nowhere() -> None:
    books = Books()
    unsure = Destinations(("crm",), {digest("crm-key"): "crm"}, "shop.key: cannot be read")
    ask = routes(books, unsure).answer

    refused = ask(asked(authorization="Bearer another"))
    assert isinstance(refused, Answer)
    assert (refused.status, "Retry-After" in refused.headers) == (503, True)
    assert b"shop.key" in refused.body
    for known in (asked(authorization="crm-key"), asked(), asked(f"/w/default{TRACK}", "another")):
        assert isinstance(ask(known), Later)
    assert [event.upstream for event in books.events] == ["crm", "", ""]


async def test_the_key_of_an_upstream_that_begins_with_the_next_start_is_sent_nowhere() -> None:
    books = Books()
    running = Destinations(("crm",), {digest("crm-key"): "crm", digest("new-key"): "new"})

    refused = routes(books, running).answer(asked(authorization="Bearer new-key"))
    assert isinstance(refused, Answer)
    assert (refused.status, "Retry-After" in refused.headers) == (503, True)
    assert b"[upstreams.new] is used from the agent's next start on" in refused.body
    assert books.events == []


# --- as it is configured ---


def configured(folder: Path, text: str, **environ: str) -> Any:
    file = folder / "config.toml"
    file.write_text(text)
    return load(file, {f"TRANTHOR_AGENT_{name}": value for name, value in environ.items()})


def test_a_named_upstream_has_the_keys_of_the_default_one_and_its_own(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("Bearer crm-key\n")
    loaded = configured(
        tmp_path,
        '[upstreams.crm]\nurl = "https://a.example/"\nwrite_key_file = "key"\ntimeout = "3s"\n'
        f'app_key_files = ["key"]\napp_key_sha256 = ["{digest("other").upper()}"]\n',
        UPSTREAMS__CRM__PROXY="http://proxy:3128",
        UPSTREAMS__MY_SHOP__URL="https://b.example",
    )
    crm, shop = loaded.settings.upstreams["crm"], loaded.settings.upstreams["my-shop"]

    assert (crm.url, crm.timeout, crm.proxy) == ("https://a.example", 3, "http://proxy:3128")
    assert crm.write_key.bare == "crm-key"
    assert crm.app_key_files == (tmp_path / "key",)
    assert loaded.app_keys == {digest("crm-key"): "crm", digest("other"): "crm"}
    assert shop.url == "https://b.example"
    assert (loaded.missing("crm"), loaded.problems) == (None, ())
    assert "upstreams.my-shop.write_key" in loaded.missing("my-shop")
    shown = {entry.key: (entry.value, entry.origin) for entry in effective(loaded)}
    assert shown["upstreams.my-shop.url"] == (
        '"https://b.example"',
        "environment TRANTHOR_AGENT_UPSTREAMS__MY_SHOP__URL",
    )
    assert shown["upstreams.crm.write_key"] == (f'"{MASK}"', str(tmp_path / "key"))


def test_the_example_of_a_named_upstream_is_one(tmp_path: Path) -> None:
    (tmp_path / "crm_key").write_text("crm-key")
    _, found, rest = example().partition("# [upstreams.crm]\n")
    text = "".join(line.removeprefix("# ") for line in rest.split("#\n")[0].splitlines(True))
    loaded = configured(tmp_path, found.removeprefix("# ") + text)

    assert (loaded.missing("crm"), loaded.problems) == (None, ())
    assert loaded.app_keys == {digest("crm-key"): "crm"}


def test_the_credential_of_a_named_upstream_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "write_key").write_text("one")
    (tmp_path / "write_key.crm").write_text("two")
    file = tmp_path / "config.toml"
    file.write_text("[upstreams.crm]\n")
    loaded = load(file, {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    keys = [loaded.settings.upstream_of(name).write_key for name in ("", "crm")]
    assert [key and key.reveal() for key in keys] == ["one", "two"]
    assert loaded.origins["upstreams.crm.write_key"] == "credential write_key.crm"


TWICE = (("a", "ab" * 32), ("b", "AB" * 32))


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "capitals": ("[upstreams.CRM]", "lower-case letters, digits"),
        "too long": (f"[upstreams.{'a' * 33}]", "32 at most"),
        "two dashes": ("[upstreams.a--b]", "single dashes"),
        "taken": ("[upstreams.default]", "choose another name"),
        "no name": ('[upstreams]\nurl = "https://a.example"', "[upstreams.NAME]"),
        "no table": ("upstreams = 1", "[upstreams.NAME]"),
        "singular": ('[upstream.crm]\nurl = "https://a.example"', "did you mean [upstreams.crm]?"),
        "misspelt": ('[upstreams.crm]\nulr = ""', "did you mean url?"),
        "elsewhere": ("[upstreams.crm]\nconcurrency = 2", "it belongs to [forward]"),
        "no digest": ('[upstreams.crm]\napp_key_sha256 = ["wk-secret"]', "64 hex digits"),
        "two keys": (
            '[upstreams.crm]\nwrite_key = "a"\nwrite_key_file = "b"',
            "[upstreams.crm] write_key",
        ),
        "one claim twice": (
            "\n".join(
                f'[upstreams.{name}]\napp_key_sha256 = ["{digest_}"]' for name, digest_ in TWICE
            ),
            "[upstreams.a] and [upstreams.b] claim the same app's key",
        ),
    }.values(),
)
def test_a_fault_in_a_named_upstream_says_what_to_do(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configured(tmp_path, text)

    (line,) = str(raised.value).splitlines()
    assert told in line
    assert "wk-secret" not in line


def test_a_misspelt_variable_of_a_named_upstream_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean TRANTHOR_AGENT_UPSTREAMS__CRM__URL\?"):
        configured(tmp_path, "", UPSTREAMS__CRM__ULR="https://a.example")


@pytest.mark.parametrize("content", [None, ""])
def test_a_file_of_keys_that_cannot_be_used_is_a_problem(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    loaded = configured(tmp_path, '[upstreams.crm]\napp_key_files = ["key"]')

    (problem,) = loaded.problems
    assert problem == loaded.unknown_app_keys
    assert problem.startswith("upstreams.crm.app_key_files")


# --- the daemon ---

FORWARD = 'backoff_base = "20ms"\nbackoff_max = "40ms"\nhold_probe = "100ms"'
"""Both wait shortly: that another waits must not be noticed."""


def section(url: str, key: str, more: str = "") -> str:
    return f'url = "{url}"\nwrite_key = "{key}"\n{more}'


def claims(key: str) -> str:
    return f'app_key_sha256 = ["{digest(key)}"]'


async def post(agent: AgentProcess, body: dict[str, Any], *, to: str = "", key: str = "") -> int:
    headers = {"Authorization": key} if key else {}
    prefix = f"/w/{to}" if to else ""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session,
        session.post(f"{agent.url}{prefix}{TRACK}", json=body, headers=headers) as response,
    ):
        await response.read()
        return response.status


def sold(message_id: str, user: str = "u") -> dict[str, Any]:
    return {"messageId": message_id, "event": "Sold", "userId": user}


def ids(sandbox: Sandbox) -> list[str]:
    return [arrival.message_id for arrival in sandbox.stored]


@pytest.mark.process
async def test_one_held_and_one_dead_never_stop_the_third(tmp_path: Path) -> None:
    alive, picky = Sandbox("alive-key"), Sandbox("another-key")
    async with AsyncExitStack() as stack:
        sections = {
            "upstream": section(await stack.enter_async_context(alive.serving()), "alive-key"),
            "upstreams.held": section(
                await stack.enter_async_context(picky.serving()), "wrong-key", claims("app-held")
            ),
            "upstreams.dead": section(
                f"http://127.0.0.1:{free_port()}", "dead-key", claims("app-dead")
            ),
            "forward": FORWARD,
        }
        agent = await stack.enter_async_context(running_agent(tmp_path, **sections))
        for n in range(20):
            assert await post(agent, sold(f"{n}"), key="Bearer app-held") == 204
            assert await post(agent, sold(f"{n}"), to="dead") == 204
        await agent.until(
            lambda status: (
                {name: it["state"] for name, it in status["upstreams"].items()}
                == {"default": "flowing", "held": "held", "dead": "backing_off"}
            )
        )
        for n in range(20):
            assert await post(agent, sold(f"{n}")) == 204
        status = await agent.until(lambda status: status["delivered"] == 20)
        _, shown = await agent.run_command("status")
        code, _ = await agent.run_command("status", "--json")
        assert await agent.stop() == 0
        log = agent.log.read_text()

    assert ids(alive) == [f"{n}" for n in range(20)]
    assert picky.stored == []
    each = status["upstreams"]
    assert {name: it["pending"] for name, it in each.items()} == {
        "default": 0,
        "held": 20,
        "dead": 20,
    }
    assert each["default"]["oldest_pending_age_s"] is None
    assert each["dead"]["oldest_pending_age_s"] >= 0
    assert status["state"] == "held"
    assert status["reason"].startswith("held: 401")
    assert (status["pending"], code) == (40, 1)
    for name, state in (("default", "flowing"), ("held", "held"), ("dead", "backing off")):
        assert any(line.split()[:1] == [name] and state in line for line in shown.splitlines())
    held = [line for line in log.splitlines() if "forwarder.held" in line]
    assert all(json.loads(line)["upstream"] == "held" for line in held)
    assert held


@pytest.mark.process
async def test_one_id_to_two_upstreams_arrives_at_both_and_no_key_of_an_app_is_kept(
    tmp_path: Path,
) -> None:
    first, second = Sandbox("first-upstream-key"), Sandbox("second-upstream-key")
    key = "wk-app-of-the-second-0123456789"
    (tmp_path / "keys").mkdir()
    folder = tmp_path / "agent"
    folder.mkdir()
    async with first.serving() as one, second.serving() as two:
        sections = {
            "upstream": section(one, "first-upstream-key"),
            "upstreams.second": section(two, "second-upstream-key", claims(key)),
            "forward": FORWARD,
            "log": 'level = "debug"',
        }
        async with running_agent(folder, **sections) as agent:
            for sent in (f"Bearer {key}", key, basic(f"{key}:")):
                assert await post(agent, sold("same"), key=sent) == 204
            assert await post(agent, sold("same")) == 204
            assert await post(agent, sold("same"), to="second") == 204
            status = await agent.until(lambda status: status["delivered"] == 2)
            assert await post(agent, sold("same"), key="Bearer unknown-key-of-nobody") == 204
            shown = await agent.run_command("show", "same", "--json")
            await agent.kill()
            found = [
                (path.name, text)
                for path in sorted(folder.iterdir())
                for text in (key, basic(f"{key}:").removeprefix("Basic "), "unknown-key-of-nobody")
                if text.encode() in path.read_bytes()
            ]

    assert ids(first) == ids(second) == ["same"]
    assert status["duplicates"] == 3
    assert found == []
    assert [json.loads(line)["upstream"] for line in shown[1].splitlines()] == ["default", "second"]


@pytest.mark.process
async def test_a_pause_by_name_stops_that_one_also_after_a_restart(tmp_path: Path) -> None:
    first, second = Sandbox("one"), Sandbox("two")
    async with first.serving() as one, second.serving() as two:
        sections = {
            "upstream": section(one, "one"),
            "upstreams.second": section(two, "two"),
            "forward": FORWARD,
        }
        async with running_agent(tmp_path, **sections) as agent:
            code, said = await agent.run_command("pause", "--upstream", "second")
            assert (code, "waiting for second" in said) == (0, True)
            assert (await agent.run_command("pause", "--upstream", "third"))[0] == 1
            await agent.kill()
            await agent.start()
            await post(agent, sold("a"), to="second")
            await post(agent, sold("b"))
            status = await agent.until(lambda status: status["delivered"] == 1)
            assert (status["state"], ids(second)) == ("paused", [])
            assert status["upstreams"]["default"]["state"] == "flowing"

            await agent.ask("POST", "resume?upstream=second")
            await agent.until(lambda status: status["delivered"] == 2)
            assert await agent.stop() == 0

    assert (ids(first), ids(second)) == (["b"], ["a"])


@pytest.mark.process
async def test_events_of_a_name_that_is_gone_wait_and_status_says_so(tmp_path: Path) -> None:
    sandbox = Sandbox("one")
    async with sandbox.serving() as url:
        dead = section(f"http://127.0.0.1:{free_port()}", "two")
        default = section(url, "one")
        async with running_agent(tmp_path, upstream=default, **{"upstreams.gone": dead}) as agent:
            assert await post(agent, sold("a"), to="gone") == 204
            assert await agent.stop() == 0
        async with running_agent(tmp_path, upstream=default) as agent:
            assert await post(agent, sold("b")) == 204
            status = await agent.until(lambda status: status["delivered"] == 1)
            code, _ = await agent.run_command("status")
            assert await post(agent, sold("c"), to="gone") == 404
            assert await agent.stop() == 0
            _, stopped = await agent.run_command("status", "--json")

        gone = status["upstreams"]["gone"]
        assert (gone["state"], gone["pending"]) == ("unconfigured", 1)
        assert "[upstreams.gone]" in gone["reason"]
        assert (status["state"], code) == ("unconfigured", 1)
        assert json.loads(stopped)["upstreams"]["gone"]["pending"] == 1

        back = section(url, "one")
        async with running_agent(tmp_path, upstream=default, **{"upstreams.gone": back}) as agent:
            await agent.until(lambda status: status["delivered"] == 2)
            assert await agent.stop() == 0

    assert ids(sandbox) == ["b", "a"]


@pytest.mark.process
async def test_the_right_key_in_its_file_ends_the_hold_of_a_named_one(tmp_path: Path) -> None:
    sandbox = Sandbox("right")
    key = tmp_path / "crm_key"
    key.write_text("wrong")
    async with sandbox.serving() as url:
        sections = {
            "upstream": section(url, "right"),
            "upstreams.crm": f'url = "{url}"\nwrite_key_file = "crm_key"',
            "forward": FORWARD,
        }
        async with running_agent(tmp_path, **sections) as agent:
            await post(agent, sold("a"), to="crm")
            await agent.until(lambda status: status["upstreams"]["crm"]["state"] == "held")
            key.write_text("right")
            await agent.until(lambda status: status["delivered"] == 1)
            assert await agent.stop() == 0

    assert ids(sandbox) == ["a"]


@pytest.mark.process
async def test_a_section_that_is_taken_out_stays_in_force_until_the_next_start(
    tmp_path: Path,
) -> None:
    sandbox = Sandbox("right")
    async with sandbox.serving() as url:
        default = section(url, "right")
        sections = {"upstream": default, "upstreams.crm": section(url, "right")}
        async with running_agent(tmp_path, **sections) as agent:
            text = agent.config.read_text()
            agent.config.write_text(text.replace("[upstreams.crm]", "[upstreams.shop]"))
            agent.process.send_signal(signal.SIGHUP)
            while "config.postponed" not in agent.log.read_text():
                assert agent.alive
                await asyncio.sleep(0.02)  # another process
            assert await post(agent, sold("a"), to="crm") == 204
            assert await post(agent, sold("b"), to="shop") == 404
            status = await agent.until(lambda status: status["delivered"] == 1)
            assert await agent.stop() == 0

    assert status["upstreams"].keys() == {"default", "crm"}
    assert ids(sandbox) == ["a"]


@pytest.mark.process
async def test_with_one_upstream_status_is_what_it_was(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        status = await agent.status()
        _, shown = await agent.run_command("status")

    assert "upstreams" not in status
    assert "default" not in shown


def test_the_migration_writes_no_row_of_what_is_there(tmp_path: Path) -> None:
    relics.restore(2, tmp_path / "outbox.db", in_log=False)
    with closing(sqlite3.connect(tmp_path / "outbox.db", isolation_level=None)) as db:
        body = b"x" * 1000
        db.executemany(
            "INSERT INTO pending VALUES (?, 'track', 1, 1, 0, NULL, ?)",
            [(seq, body) for seq in range(100, 2_000)],
        )
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        schema.migrate(db, 2)
        log_bytes = (tmp_path / "outbox.db-wal").stat().st_size
        assert db.execute("SELECT DISTINCT upstream FROM pending").fetchall() == [("",)]

    assert log_bytes < 100_000
