"""Which app an event comes from, who may post, and how much of the outbox one app may take.

Planted bugs that these tests were seen to find: a revoked or unknown token that is good, one that is
refused for good while a damaged outbox is read back, a user that counts more than a token, tokens for
whoever asks, a token that is stored, users that do not exist and so open the socket to all; a quota that
dead letters escape, that calls of one group do not share, that a replay needs, that makes room first;
counters that a rollback leaves changed, that forget a requeue, a discard or the salvaged; tokens and
apps that a salvage loses, one that an old page brings back; a socket that is bound wide, or taken from
a living agent, or from a file. The model of the outbox found an ack of what expired, not counted.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from faults import relics
from processes import DEADLINE_S, AgentProcess, running_agent

from agent.clock import SystemClock
from agent.config.loading import load
from agent.console.sandbox import DEFAULT_WRITE_KEY, Sandbox
from agent.contract import read_event
from agent.errors import (
    AgentError,
    AppQuotaError,
    ConfigError,
    OutboxFullError,
)
from agent.event import Event
from agent.exchange import Answer
from agent.ingest.callers import Callers
from agent.ingest.destinations import Destinations
from agent.ingest.guard import Guard
from agent.ingest.sockets import bind_unix
from agent.observe.logs import Redactor
from agent.outbox import letters
from agent.outbox.access import open_own_reader
from agent.outbox.reader import Reader
from agent.outbox.records import Ack, App, Appended, Bury, Policy, Quotas, Selection
from agent.outbox.rescue import salvage_damaged
from agent.outbox.salvage import survey
from agent.outbox.salvage.rows import Table, row_of
from agent.outbox.store import Store
from agent.outbox.writer import Writer, open_writer
from agent.units import token_digest

APPS = "/api/public/apps/"
TRACK = f"{APPS}track"

TOKEN = "tat_" + "x" * 43

NOBODY = 65_534

POLICY = Policy(max_bytes=1 << 30, evicts=False, remember=True)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def event(message_id: str, app: str = "", *, filler: str = "") -> Event:
    body = {"messageId": message_id, "event": "Sold", "userId": "u", "properties": {"f": filler}}
    parsed = read_event("track", json.dumps(body).encode(), received_ms=1_780_000_000_000)
    return msgspec.structs.replace(parsed, app=app)


@asynccontextmanager
async def opened(path: Path, policy: Policy = POLICY) -> AsyncIterator[tuple[Writer, Reader]]:
    async with (
        open_writer(path, policy, SystemClock()) as writer,
        open_own_reader(path, on_damage=writer.suspect) as reader,
    ):
        yield writer, reader


COUNTED = """
SELECT app.name, app.pending, app.dead, app.body_bytes,
       (SELECT COUNT(*) FROM event JOIN pending USING (seq) WHERE event.app = app.name),
       (SELECT COUNT(*) FROM event JOIN dead USING (seq) WHERE event.app = app.name),
       (SELECT COALESCE(SUM(length(body)), 0)
          FROM event JOIN (SELECT seq, body FROM pending UNION ALL SELECT seq, body FROM dead)
               USING (seq)
         WHERE event.app = app.name)
  FROM app
"""


def miscounted(path: Path) -> list[Any]:
    """Return the apps whose counters are not what their rows say."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return [row for row in db.execute(COUNTED) if row[1:4] != row[4:]]


# --- who is calling -----------------------------------------------------------------------------


def app(name: str, token: str | None = None, *, revoked: bool = False) -> App:
    digest = None if token is None else token_digest(token)
    return App(name=name, token_digest=digest, created_ms=1, revoked_ms=2 if revoked else None)


def by_name(*apps: App) -> dict[str, App]:
    return {it.name: it for it in apps}


def refusal(answer: str | Answer) -> dict[str, Any]:
    assert isinstance(answer, Answer), answer
    said: dict[str, Any] = json.loads(answer.body)
    assert TOKEN not in str(said)
    assert ("WWW-Authenticate" in answer.headers) == (answer.status == 401)
    return said


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    "authorization",
    [TOKEN, f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {TOKEN}", basic(f"{TOKEN}:")],
    ids=["verbatim", "bearer", "odd bearer", "behind Basic", "as Segment's libraries"],
)
def test_a_token_is_found_however_an_app_sends_a_key(authorization: str) -> None:
    apps = by_name(app("other", "tat_other"), app("pos", TOKEN), app("bare"))
    assert Callers().app_of(authorization, None, apps) == "pos"
    assert Callers(require_token=True).app_of(authorization, None, apps) == "pos"


@pytest.mark.parametrize("authorization", ["", "Bearer key", basic("key:"), basic("a:tat_b")])
def test_a_write_key_is_no_token_and_its_app_nobody_in_particular(
    authorization: str,
) -> None:
    apps = by_name(app("pos", TOKEN))
    assert Callers().app_of(authorization, None, apps) == ""
    said = refusal(Callers(require_token=True).app_of(authorization, None, apps))
    assert (said["statusCode"], said["code"]) == (401, "AGENT_TOKEN_REQUIRED")
    assert "app add" in said["message"]


def test_a_token_that_is_unknown_or_revoked_is_refused_with_what_to_do() -> None:
    apps = by_name(app("pos", TOKEN, revoked=True))
    revoked = refusal(Callers().app_of(f"Bearer {TOKEN}", None, apps))
    unknown = refusal(Callers().app_of("Bearer tat_else", None, apps))

    assert (revoked["statusCode"], revoked["code"]) == (401, "AGENT_TOKEN_REVOKED")
    assert "app add pos" in revoked["message"]
    assert (unknown["statusCode"], unknown["code"]) == (401, "AGENT_UNKNOWN_TOKEN")
    assert "app list" in unknown["message"]


def test_while_apps_may_be_missing_no_token_is_refused_for_good() -> None:
    said = refusal(Callers().app_of(f"Bearer {TOKEN}", None, None))
    assert (said["statusCode"], said["code"]) == (503, "AGENT_UNKNOWN_TOKEN")


def test_a_user_on_the_socket_is_an_app_unless_a_token_says_another() -> None:
    callers = Callers(users={1001: "pos"}, require_token=True)
    apps = by_name(app("kiosk", TOKEN))
    assert callers.app_of("", 1001, apps) == "pos"
    assert callers.app_of("Bearer write-key", 1001, apps) == "pos"
    assert callers.app_of(f"Bearer {TOKEN}", 1001, apps) == "kiosk"
    assert refusal(callers.app_of("", 1002, apps))["statusCode"] == 401
    # A token that is good for nothing is a mistake to be told of, whoever sends it.
    assert refusal(callers.app_of("tat_else", 1001, apps))["statusCode"] == 401


def test_a_token_is_looked_for_among_no_write_keys() -> None:
    destinations = Destinations(("crm",), {}, "a file of keys cannot be read")
    assert destinations.of_key(f"Bearer {TOKEN}") == ""
    assert isinstance(destinations.of_key("Bearer key"), Answer)


def test_only_named_users_may_use_the_socket_and_none_named_that_exist_is_nobody() -> None:
    guard = Guard(allowed_hosts=frozenset(), allowed_origins=frozenset(), max_body_bytes=1)
    assert guard.judge_peer(7) is None
    guard.socket_users = frozenset({7})
    assert guard.judge_peer(7) is None
    assert guard.judge_peer(None) is None
    assert refusal(guard.judge_peer(8) or "")["statusCode"] == 403
    guard.socket_users = frozenset()
    assert guard.judge_peer(7) is not None


def test_a_token_that_comes_into_a_log_is_masked_whoever_gave_it_out() -> None:
    redactor = Redactor()
    for form in (TOKEN, f"Bearer {TOKEN}", basic(f"{TOKEN}:"), f"'{TOKEN}'"):
        shown = redactor.clean(f"failed on {form}.")
        assert "x" * 20 not in shown
        assert basic(TOKEN).split()[1][:20] not in shown
    assert redactor.clean("what_tat_means") == "what_tat_means"


# --- what the configuration says ----------------------------------------------------------------


def configured(tmp_path: Path, text: str, **environ: str) -> Any:
    (tmp_path / "config.toml").write_text(text)
    return load(tmp_path / "config.toml", environ)


def test_apps_are_read_from_the_file_and_the_environment(tmp_path: Path) -> None:
    loaded = configured(
        tmp_path,
        '[outbox]\nmax_size_per_app = "2MiB"\n[apps.pos]\nusers = ["root", "1001"]\n'
        '[apps.front-desk]\nmax_size = "3MiB"\n[ingest]\nunix_socket_users = ["root"]',
        TRANTHOR_AGENT_APPS__KIOSK__MAX_SIZE="4MiB",
        TRANTHOR_AGENT_INGEST__REQUIRE_TOKEN="true",
    )
    quotas = {name: loaded.settings.quota_of(name) for name in ("pos", "front-desk", "kiosk", "x")}
    mib = 1 << 20
    assert quotas == {"pos": 2 * mib, "front-desk": 3 * mib, "kiosk": 4 * mib, "x": 2 * mib}
    assert loaded.app_users == {0: "pos", 1001: "pos"}
    assert loaded.socket_users == {0}
    assert loaded.settings.ingest.require_token
    assert loaded.problems == ()


def test_a_user_that_the_machine_does_not_have_is_a_problem_and_opens_nothing(
    tmp_path: Path,
) -> None:
    loaded = configured(
        tmp_path, '[apps.pos]\nusers = ["gh0st"]\n[ingest]\nunix_socket_users = ["gh0st"]'
    )
    assert len(loaded.problems) == 2
    assert all("gh0st" in problem for problem in loaded.problems)
    assert loaded.app_users == {}
    assert loaded.socket_users == frozenset()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[apps.POS]\nmax_size = "1MiB"', "the name of an app has lower-case letters"),
        ("[apps]\npos = 1", "write [apps.NAME] above it"),
        ('[apps.pos]\nmax_sise = "1MiB"', "did you mean max_size?"),
        ('[apps.pos]\nmax_size = "1KiB"', 'a size from "1MiB"'),
        ('[apps.a]\nusers = ["root"]\n[apps.b]\nusers = ["0"]', "claim the same user (number 0)"),
        ('[apps.a]\nusers = ["no body"]', "no name of a user"),
        ('[ingest]\nunix_socket_mode = "660w"', "expected an octal mode"),
        ("[ingest]\nunix_socket_mode = 660", "expected an octal mode"),
        ('[ingest]\nrequire_token = "yes"', "expected true or false"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, text)
    assert why in str(refused.value)


# --- in the outbox ------------------------------------------------------------------------------


async def test_an_event_keeps_the_app_that_sent_it_first(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        assert await writer.append([event("id", "pos")]) == [Appended.STORED]
        assert await writer.append([event("id", "kiosk")]) == [Appended.REPLAYED]
        assert await writer.append([event("id")]) == [Appended.REPLAYED]
        await writer.append([event("none")])
        await writer.settle(Ack(1))
        found = await reader.receipt("id")
        listed = await reader.select("delivered", Selection(app="pos"), limit=9)
        others = await reader.select("pending", Selection(app="pos"), limit=9)

    assert found is not None
    assert (found.state, found.app) == ("delivered", "pos")
    assert [it.message_id for it in listed] == ["id"]
    assert others == []


RATION = Policy(
    max_bytes=1 << 30,
    evicts=False,
    remember=True,
    quotas=Quotas(named={"pos": 5_000}),
)


async def test_what_is_larger_than_a_quota_is_not_told_to_come_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db", RATION) as (writer, _):
        with pytest.raises(AppQuotaError, match="they never will: send less at once, or raise"):
            await writer.append([event("pos-1", "pos", filler="x" * 6000)])
        await writer.append([event("pos-2", "pos", filler="x" * 3000)])
        with pytest.raises(AppQuotaError, match="send again when some of its events were"):
            await writer.append([event("pos-3", "pos", filler="x" * 3000)])


async def test_an_app_over_its_quota_is_refused_and_others_are_not(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db", RATION) as (writer, _):
        await writer.append([event("pos-1", "pos", filler="x" * 3000)])
        with pytest.raises(AppQuotaError, match=r"app pos: .* of the 5000 bytes .*apps\.pos"):
            await writer.append([event("pos-2", "pos", filler="x" * 3000)])
        full = writer.full
        for name in ("kiosk", ""):
            stored = await writer.append([event(f"{name}-1", name, filler="x" * 30_000)])
            assert stored == [Appended.STORED]
        # A batch is let in whole or not at all; what is known takes no room.
        with pytest.raises(AppQuotaError):
            await writer.append([event("pos-3", "pos"), event("pos-4", "pos", filler="x" * 3000)])
        assert await writer.append([event("pos-1", "pos", filler="x" * 3000)]) == [
            Appended.REPLAYED
        ]
        # A dead letter takes what it took before; one that was delivered takes nothing.
        await writer.settle(Bury(seq=1, reason="rejected", status=400, answer=""))
        with pytest.raises(AppQuotaError):
            await writer.append([event("pos-2", "pos", filler="x" * 3000)])
        await writer.perform(lambda store: letters.discard(store, [1]))
        assert await writer.append([event("pos-2", "pos", filler="x" * 3000)]) == [Appended.STORED]

    assert full is None, "the outbox is not full when an app is"
    assert miscounted(tmp_path / "outbox.db") == []


async def test_calls_that_are_stored_together_share_one_quota(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db", RATION) as (writer, _):
        calls = [writer.append([event(f"{n}", "pos", filler="x" * 1000)]) for n in range(8)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        known = await writer.perform(lambda store: store.apps.get("pos"))

    assert known is not None
    assert known.held_bytes <= 5_000
    assert [outcome == [Appended.STORED] for outcome in outcomes] == [True] * 3 + [False] * 5


async def test_what_is_known_already_takes_nothing_of_a_quota(tmp_path: Path) -> None:
    held = [event(f"{n}", "pos", filler="x" * 500) for n in range(4)]
    fifth, sixth, seventh = (event(name, "pos", filler="x" * 500) for name in "abc")
    footprint = len(held[0].body) + 256
    policy = replace(POLICY, quotas=Quotas(named={"pos": 6 * footprint}))
    async with opened(tmp_path / "outbox.db", policy) as (writer, _):
        await writer.append(held)
        together = [writer.append([each]) for each in (*held, fifth)]
        outcomes = [await each for each in together]
        mixed = await writer.append([*held, sixth])
        with pytest.raises(AppQuotaError):
            await writer.append([*held, seventh])

    assert outcomes == [[Appended.REPLAYED]] * 4 + [[Appended.STORED]]
    assert mixed == [Appended.REPLAYED] * 4 + [Appended.STORED]


async def test_nothing_of_others_makes_room_for_an_app_over_its_quota(tmp_path: Path) -> None:
    policy = Policy(
        max_bytes=100_000, evicts=True, remember=True, quotas=Quotas(named={"pos": 5_000})
    )
    async with opened(tmp_path / "outbox.db", policy) as (writer, reader):
        for n in range(5):
            await writer.append([event(f"other-{n}", filler="x" * 8_000)])
        with pytest.raises(AppQuotaError):
            await writer.append([event("pos", "pos", filler="x" * 50_000)])
        ledger = await reader.ledger()

    assert (ledger.pending, ledger.evicted) == (5, 0)


async def test_what_is_rolled_back_counts_for_no_app(tmp_path: Path) -> None:
    def fails(store: Store) -> None:
        store.append([event("b", "pos"), event("c", "kiosk")])
        store.settle([Ack(1)], now_ms=1, remember=True)
        store.apps.issue("pos", b"d" * 32, now_ms=1)
        full = sqlite3.OperationalError("for the test")
        full.sqlite_errorcode = sqlite3.SQLITE_FULL  # the one failure after which memory is kept
        raise full

    path = tmp_path / "outbox.db"
    async with opened(path) as (writer, reader):
        await writer.append([event("a", "pos")])
        before = writer.apps
        with pytest.raises(OutboxFullError):
            await writer.perform(fails)
        assert writer.apps == before
        await writer.append([event("d", "pos")])
        (known,) = await reader.apps()

    assert before is not None
    assert (before["pos"].pending, before["pos"].token_digest) == (1, None)
    assert (known.pending, known.delivered, known.token_digest) == (2, 0, None)
    assert miscounted(path) == []


async def test_a_start_finds_the_counters_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as (writer, reader):
        await writer.perform(lambda store: store.apps.issue("pos", b"d" * 32, now_ms=7))
        await writer.append([event(f"{n}", "pos" if n % 2 else "kiosk") for n in range(8)])
        await writer.settle(*map(Ack, (1, 2, 3)))
        await writer.settle(Bury(seq=4, reason="rejected", status=400, answer=""))
        before = await reader.apps()
    async with opened(path) as (writer, reader):
        assert writer.apps == {it.name: it for it in before}
        assert await reader.apps() == before
        await writer.perform(lambda store: letters.requeue(store, [4], now_ms=9))
        await writer.settle(*map(Ack, range(1, 10)))
        after = await reader.apps()

    assert [(it.name, it.accepted, it.delivered, it.held_bytes) for it in after] == [
        ("kiosk", 4, 4, 0),
        ("pos", 4, 4, 0),
    ]
    assert miscounted(path) == []


@pytest.mark.parametrize("version", [1, 2, 3])
async def test_an_older_outbox_takes_events_of_apps_once_it_is_migrated(
    tmp_path: Path, version: int
) -> None:
    path = tmp_path / "outbox.db"
    relics.restore(version, path, in_log=True)
    async with opened(path) as (writer, reader):
        old = await reader.select("pending", Selection(), limit=99)
        await writer.append([event("new", "pos")])
        await writer.settle(*(Ack(receipt.seq) for receipt in old))
        (known,) = await reader.apps()

    assert {receipt.app for receipt in old} == {""}
    assert (known.name, known.accepted, known.pending) == ("pos", 1, 1)
    assert miscounted(path) == []


# --- out of a damaged outbox --------------------------------------------------------------------


async def until_salvaged(writer: Writer, *names: str) -> bool:
    """Return whether the apps *names* were known before all of their events were back."""
    known_early = False
    while writer.fault is None and not writer.rescuing:  # noqa: ASYNC110  # another task
        await asyncio.sleep(0)
    while writer.fault is not None or writer.rescuing:  # another task
        known = writer.apps
        assert known is None or {*names} <= known.keys(), "it must not be refused for good"
        known_early |= known is not None
        await asyncio.sleep(0)
    return known_early


async def test_tokens_and_apps_come_back_from_a_damaged_outbox(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    digests = {name: token_digest(f"tat_{name}") for name in ("pos", "kiosk")}
    async with opened(path) as (writer, reader):
        for name, digest in digests.items():
            await writer.perform(
                lambda store, name=name, digest=digest: store.apps.issue(name, digest, now_ms=5)  # type: ignore[misc]
            )
        await writer.append([event(f"{n}", "pos", filler="x" * n * 900) for n in range(6)])
        await writer.append([event("other"), event("user", "by-user")])
        await writer.settle(Ack(1), Ack(2))
        await writer.settle(Bury(seq=3, reason="rejected", status=400, answer=""))
        await writer.perform(lambda store: store.apps.revoke("kiosk", now_ms=6))
        before = await reader.apps()
        async with asyncio.TaskGroup() as tasks:
            salvage = tasks.create_task(salvage_damaged(writer))
            writer.suspect("for the test")
            known_early = await until_salvaged(writer, *digests)
            salvage.cancel()
        after = await reader.apps()
        receipts = [await reader.receipt(f"{n}") for n in range(6)]

    assert known_early, "an app is not kept waiting for what others posted"
    named = {it.name: it for it in before}
    assert [msgspec.to_builtins(it) for it in after if it.token_digest] == [
        msgspec.to_builtins(named[name]) for name in ("kiosk", "pos")
    ]
    assert [(it.name, it.pending) for it in after] == [("by-user", 1), ("kiosk", 0), ("pos", 3)]
    assert {receipt and receipt.app for receipt in receipts} == {"pos"}
    assert miscounted(path) == []


async def test_a_token_that_was_revoked_is_not_brought_back_by_an_older_page(
    tmp_path: Path,
) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as (writer, _):
        await writer.perform(lambda store: store.apps.issue("pos", b"d" * 32, now_ms=5))
    # In the database the token is good, in the log it is revoked; the log is damaged behind that.
    async with opened(path) as (writer, _):
        await writer.perform(lambda store: store.apps.revoke("pos", now_ms=6))
        for n in range(3):
            await writer.append([event(f"{n}")])
        aside = tmp_path / "aside.db"
        shutil.copy(path, aside)
        log = bytearray(path.with_name("outbox.db-wal").read_bytes())
    log[-700] ^= 255
    aside.with_name("aside.db-wal").write_bytes(log)

    with survey(aside) as found:
        assert [it.revoked_ms for it in found.report.apps] == [6]


async def test_what_a_person_did_since_the_damage_counts_more_than_what_is_read_back(
    tmp_path: Path,
) -> None:
    from agent.outbox.restore import put_back_apps  # noqa: PLC0415  # beside its one use

    old = [
        App(name="given-anew", token_digest=b"o" * 32, created_ms=5),
        App(name="revoked-since", token_digest=b"o" * 32, created_ms=5),
        App(name="met-since", token_digest=b"o" * 32, created_ms=5),
    ]
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        for name in ("given-anew", "revoked-since"):
            await writer.perform(
                lambda store, name=name: store.apps.issue(name, b"n" * 32, now_ms=8)  # type: ignore[misc]
            )
        await writer.perform(lambda store: store.apps.revoke("revoked-since", now_ms=9))
        await writer.append([event("id", "met-since")])
        for _ in range(2):  # a salvage that was cut off begins again
            await writer.perform(lambda store: put_back_apps(store, old))
        found = {it.name: it for it in await reader.apps()}

    assert found["given-anew"].token_digest == b"n" * 32
    assert found["revoked-since"].revoked_ms == 9
    assert (found["met-since"].token_digest, found["met-since"].pending) == (b"o" * 32, 1)


async def test_of_two_damaged_outboxes_a_token_comes_back_as_the_later_one_had_it(
    tmp_path: Path,
) -> None:
    from agent.outbox.restore import put_back_apps  # noqa: PLC0415  # beside its one use

    given = App(name="pos", token_digest=b"o" * 32, created_ms=5)
    revoked = replace(given, revoked_ms=9)
    async with opened(tmp_path / "outbox.db") as (writer, reader):
        for apps in ([given], [revoked], [given]):  # the last: read again from the beginning
            await writer.perform(lambda store, apps=apps: put_back_apps(store, apps))  # type: ignore[misc]
        (found,) = await reader.apps()

    assert found == revoked


def test_a_row_of_an_app_that_no_database_would_take_is_no_row() -> None:
    name, digest = b"pos", b"d" * 32

    assert row_of(Table.APP, [name, digest, 5, 6, 0, 0, 0, 0, 0, 0]) is not None
    revoked_without_a_token = row_of(Table.APP, [name, None, 5, 6, 0, 0, 0, 0, 0, 0])
    fewer_than_none = row_of(Table.APP, [name, digest, 5, None, 0, -1, 1, 0, 0, 0])
    assert (revoked_without_a_token, fewer_than_none) == (None, None)


# --- the socket's file --------------------------------------------------------------------------


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o027, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_socket_is_never_open_wider_than_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int, mode: int
) -> None:
    path = tmp_path / "a.sock"
    before: list[int] = []
    chmod = Path.chmod

    def seen(self: Path, to: int) -> None:
        before.append(self.stat().st_mode & 0o777)
        chmod(self, to)

    monkeypatch.setattr(Path, "chmod", seen)
    with umask(mask), bind_unix(str(path), mode):
        assert path.stat().st_mode & 0o777 == mode
    assert [wider & ~mode for wider in before] == [0]


def test_a_socket_on_which_nobody_listens_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    for _ in range(2):
        with (
            bind_unix(str(path), 0o660),
            pytest.raises(AgentError, match="another agent listens"),
        ):
            bind_unix(str(path), 0o660)
        assert path.is_socket()


def test_a_socket_whose_queue_is_full_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        waiting: list[socket.socket] = []
        try:
            while True:
                client = socket.socket(socket.AF_UNIX)
                waiting.append(client)
                client.setblocking(False)
                client.connect(str(path))
        except BlockingIOError:
            pass
        with pytest.raises(AgentError, match="another agent listens"):
            bind_unix(str(path), 0o660)
        for client in waiting:
            client.close()
        assert path.is_socket()


def test_what_is_no_socket_stays_whatever_it_is(tmp_path: Path) -> None:
    path, target = tmp_path / "a.sock", tmp_path / "target"
    path.write_text("precious")
    with pytest.raises(AgentError, match="something else is there"):
        bind_unix(str(path), 0o660)
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(target))
    path.symlink_to(target)
    with pytest.raises(AgentError, match="something else is there"):
        bind_unix(str(path), 0o660)
    assert path.is_symlink()
    assert target.is_socket()


# --- the whole agent ----------------------------------------------------------------------------


def body(message_id: str, filler: str = "") -> bytes:
    fields = {"messageId": message_id, "event": "Sold", "userId": "u", "properties": {"f": filler}}
    return json.dumps(fields).encode()


async def post(
    agent: AgentProcess, sent: bytes, authorization: str = "", *, path: str = TRACK
) -> tuple[int, dict[str, Any], dict[str, str]]:
    headers = {"Content-Type": "application/json"}
    if authorization:
        headers["Authorization"] = authorization
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session,
        session.post(f"{agent.url}{path}", data=sent, headers=headers) as response,
    ):
        text = await response.read()
        return response.status, json.loads(text or "{}"), dict(response.headers)


def held(place: Path) -> dict[Path, bytes]:
    """Return what is in a file, or in all files of a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return {file: file.read_bytes() for file in files if file.is_file()}


async def receipt(agent: AgentProcess, message_id: str) -> dict[str, Any]:
    return await agent.ask("GET", f"events/{message_id}")


async def added(agent: AgentProcess, name: str) -> str:
    code, said = await agent.run_command("app", "add", name)
    assert code == 0
    return said.strip()


@pytest.mark.process
async def test_status_and_receipts_say_which_app_an_event_came_from(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        token = await added(agent, "pos")
        assert token.startswith("tat_")
        for n, sent in enumerate((token, f"Bearer {token}", basic(f"{token}:"))):
            assert (await post(agent, body(f"pos-{n}"), sent))[0] == 204
        several = b'{"batch":[%b]}' % body("pos-3").replace(b"{", b'{"type":"track",', 1)
        assert (await post(agent, several, f"Bearer {token}", path=f"{APPS}batch"))[0] == 204
        assert (await post(agent, body("nobodys")))[0] == 204
        assert (await post(agent, body("key"), "Bearer a-write-key"))[0] == 204

        assert {(await receipt(agent, f"pos-{n}"))["app"] for n in range(4)} == {"pos"}
        assert {(await receipt(agent, it))["app"] for it in ("nobodys", "key")} == {None}
        (known,) = (await agent.status())["apps"]
        listed = await agent.ask("GET", "events?app=pos")
        _, by_command = await agent.run_command("list", "--app", "pos", "--json")
        _, shown = await agent.run_command("show", "pos-1")
        _, report = await agent.run_command("status")
        metrics = await agent.get("/metrics")

    assert (known["name"], known["token"], known["accepted"], known["pending"]) == (
        "pos",
        "active",
        4,
        4,
    )
    assert known["max_bytes"] is None
    ids = [f"pos-{n}" for n in range(4)]
    assert [it["messageId"] for it in listed["events"]] == ids
    assert [json.loads(line)["messageId"] for line in by_command.splitlines()] == ids
    assert "pos" in shown
    assert "pos" in report
    assert 'tranthor_agent_app_events_accepted_total{app="pos"} 4.0' in metrics
    assert 'tranthor_agent_app_pending{app="pos"} 4.0' in metrics


@pytest.mark.process
async def test_a_token_is_found_nowhere_but_at_its_app(tmp_path: Path) -> None:
    said: list[str] = []
    async with running_agent(tmp_path, log='level = "debug"') as agent:
        tokens = [await added(agent, name) for name in ("pos", "kiosk")]
        for n in range(20):
            assert (await post(agent, body(f"{n}"), f"Bearer {tokens[0]}"))[0] == 204
        # As analytics.js sends a key, which is no member of the event that is stored.
        keyed = {**json.loads(body("keyed")), "writeKey": tokens[0]}
        for path, sent in (
            ("/v1/track", keyed),
            ("/v1/batch", {"batch": [{**keyed, "type": "track"}], "writeKey": tokens[0]}),
            (f"{APPS}batch", {"batch": [], "writeKey": tokens[0]}),
        ):
            answer = await post(agent, json.dumps(sent).encode(), path=path)
            assert answer[0] in {200, 204}
        assert (await receipt(agent, "keyed"))["app"] == "pos"
        said += [str(await post(agent, b"{", f"Bearer {tokens[0]}"))]
        said += [(await agent.run_command("app", "revoke", "kiosk"))[1]]
        said += [str(await post(agent, body("x"), basic(f"{tokens[1]}:")))]
        said += [str(await post(agent, body("x"), f"{tokens[1]}x"))]
        said += [str(await agent.status()), await agent.get("/metrics")]
        said += [str(await agent.ask("GET", "apps"))]
        said += [
            (await agent.run_command(*it))[1] for it in (("app", "list"), ("status", "--json"))
        ]
        said += [
            str(held(Path(f"/proc/{agent.process.pid}/{it}"))) for it in ("cmdline", "environ")
        ]
        await agent.kill()
        files = held(tmp_path)

    assert {"outbox.db", "agent.log"} <= {file.name for file in files}
    for token in tokens:
        for form in (token, token.removeprefix("tat_"), basic(f"{token}:").split()[1][:40]):
            assert [file for file, content in files.items() if form.encode() in content] == []
            assert [it for it in said if form in it] == []
        # Kept is its digest, which shows that the right place was searched.
        kept = [file.name for file, content in files.items() if token_digest(token) in content]
        assert set(kept) & {"outbox.db", "outbox.db-wal"}


@pytest.mark.process
async def test_tokens_and_counters_outlive_a_kill(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as agent:
        token = await added(agent, "pos")
        await agent.kill()
        await agent.start()
        assert (await post(agent, body("1"), token))[0] == 204
        await agent.kill()
        await agent.start()
        assert (await post(agent, body("2"), token))[0] == 204
        (known,) = (await agent.status())["apps"]
        assert await agent.stop() == 0

        # Without an agent the commands do the same under the lock.
        code, listed = await agent.run_command("app", "list", "--json")
        assert (code, json.loads(listed)["pending"]) == (0, 2)
        assert (await agent.run_command("app", "add", "pos"))[0] == 1
        assert (await agent.run_command("app", "revoke", "pos"))[0] == 0
        assert (await agent.run_command("app", "revoke", "pos"))[0] == 1
        again = await added(agent, "pos")
        await agent.start()
        assert (await post(agent, body("3"), token))[0] == 401
        assert (await post(agent, body("3"), again))[0] == 204

    assert known["pending"] == 2
    assert miscounted(agent.outbox) == []


@pytest.mark.process
async def test_whenever_it_is_killed_each_app_has_its_events_and_its_sums(tmp_path: Path) -> None:
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    async with sandbox.serving() as url:
        upstream = f'url = "{url}"\nwrite_key = "{DEFAULT_WRITE_KEY}"'
        async with running_agent(tmp_path, upstream=upstream) as agent:
            tokens = {name: await added(agent, name) for name in ("pos", "kiosk")} | {"": ""}
            acknowledged: dict[str, str] = {}

            async def use(name: str, life: int) -> None:
                with suppress(aiohttp.ClientError):  # killed
                    for n in itertools.count():
                        message_id = f"{life}-{name}-{n}"
                        if (await post(agent, body(message_id), tokens[name]))[0] == 204:
                            acknowledged[message_id] = name

            for life in range(3):
                async with asyncio.TaskGroup() as apps:
                    for name in tokens:
                        apps.create_task(use(name, life))
                    while len(acknowledged) < 60 * (life + 1):  # noqa: ASYNC110  # other tasks
                        await asyncio.sleep(0.001)
                    await agent.kill()
                assert miscounted(agent.outbox) == []
                await agent.start()
            status = await agent.until(lambda it: it["pending"] == 0)
            assert await agent.stop() == 0

    with closing(sqlite3.connect(agent.outbox)) as db:
        kept = dict(db.execute("SELECT message_id, app FROM event"))
    assert kept | acknowledged == kept
    assert {it["name"]: it["accepted"] for it in status["apps"]} == {
        name: list(kept.values()).count(name) for name in ("pos", "kiosk")
    }
    assert all(it["accepted"] == it["delivered"] and it["bytes"] == 0 for it in status["apps"])


@pytest.mark.process
async def test_no_token_is_given_out_where_no_agent_ever_ran(tmp_path: Path) -> None:
    """Else who names the wrong configuration would get one that is good nowhere."""
    async with aiohttp.ClientSession() as session:
        agent = AgentProcess(tmp_path, session)
        assert await agent.run_command("app", "add", "pos") == (1, "")
    assert not agent.outbox.exists()


@pytest.mark.process
async def test_where_tokens_are_required_nobody_else_may_post_and_all_else_goes_on(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path, ingest="require_token = true") as agent:
        token = await added(agent, "pos")
        refused = await post(agent, body("1"))
        assert (refused[0], refused[1]["code"]) == (401, "AGENT_TOKEN_REQUIRED")
        assert (await post(agent, body("1"), "Bearer write-key"))[0] == 401
        assert (await post(agent, body("1"), token))[0] == 204
        assert await agent.get("/healthz")
        assert (await agent.status())["accepted"] == 1


@pytest.mark.process
async def test_only_who_may_read_the_files_of_the_outbox_gives_out_tokens(tmp_path: Path) -> None:
    digest = token_digest(TOKEN).hex()
    async with running_agent(tmp_path) as agent:
        for authorization in ("", "Bearer ", "Bearer operator-", f"Bearer {'0' * 32}", "Bearer é"):
            for path, sent in (
                ("add", {"name": "pos", "tokenSha256": digest}),
                ("revoke", {"name": "pos"}),
            ):
                answer = await post(
                    agent,
                    json.dumps(sent).encode(),
                    authorization,
                    path=f"/api/agent/apps/{path}",
                )
                assert (answer[0], answer[1]["code"]) == (401, "AGENT_NOT_AN_OPERATOR")
        assert (await agent.status())["apps"] == []
        lock = agent.outbox.with_name("outbox.db.lock")
        assert lock.stat().st_mode & 0o007 == 0


@pytest.mark.process
async def test_a_noisy_app_is_told_to_wait_and_the_others_go_on(tmp_path: Path) -> None:
    big = "x" * 300_000
    async with running_agent(
        tmp_path, outbox='max_size_per_app = "1MiB"\nwhen_full = "drop_oldest"'
    ) as agent:
        noisy, quiet = await added(agent, "noisy"), await added(agent, "quiet")
        answers = [(await post(agent, body(f"n-{n}", big), noisy)) for n in range(6)]
        assert [status for status, _, _ in answers] == [204] * 3 + [507] * 3
        _, said, headers = answers[-1]
        assert said["code"] == "AGENT_APP_QUOTA"
        assert "app noisy" in said["message"]
        assert "1048576" in said["message"]
        assert int(headers["Retry-After"]) > 0
        assert (await post(agent, body("q", big), quiet))[0] == 204
        assert (await post(agent, body("nobodys", big)))[0] == 204
        assert (await post(agent, body("n-0", big), noisy))[0] == 204, "a replay takes no room"
        assert await agent.get("/readyz")

        status = await agent.status()
        assert {it["name"]: it["pending"] for it in status["apps"]} == {"noisy": 3, "quiet": 1}
        assert status["discarded"] == 0
        assert status["outbox"]["full"] is None

        with agent.config.open("a") as config:
            config.write('[apps.noisy]\nmax_size = "2MiB"\n')
        agent.process.send_signal(signal.SIGHUP)
        await agent.until(lambda it: it["apps"][0]["max_bytes"] == 2 << 20)
        assert (await post(agent, body("n-5", big), noisy))[0] == 204


@pytest.mark.process
async def test_status_asks_for_attention_when_an_app_has_used_its_quota(tmp_path: Path) -> None:
    async with running_agent(tmp_path, outbox='max_size_per_app = "1MiB"') as agent:
        token = await added(agent, "pos")
        assert (await post(agent, body("1", "x" * 1_000_000), token))[0] == 204
        _, said = await agent.run_command("status")

    assert "app pos has used 95% of its quota" in said


# --- real users on a real socket ----------------------------------------------------------------


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Yield a folder that every user may enter, and in which none but we may write."""
    with tempfile.TemporaryDirectory(prefix="apps-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


async def post_as(uid: int, path: Path, sent: bytes, *headers: str) -> int:
    """Post over the socket at *path* as another user; return the status, 0 for no connection."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", str(path),
        f"http://localhost{TRACK}", "-H", "Content-Type: application/json",
        *(part for header in headers for part in ("-H", header)), "--data-binary", "@-",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        user=uid, group=uid, extra_groups=[], cwd="/", env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    said, _ = await process.communicate(sent)
    return int(said)


@pytest.mark.process
@needs_curl
@needs_root
async def test_an_app_is_known_by_its_user_as_the_kernel_tells_it(
    tmp_path: Path, shared_folder: Path
) -> None:
    path = shared_folder / "a.sock"
    ingest = f'unix_socket = "{path}"\nunix_socket_mode = "0666"\nrequire_token = true'
    async with running_agent(
        tmp_path, ingest=ingest, **{"apps.pos": 'users = ["nobody"]\nmax_size = "1MiB"'}
    ) as agent:
        token = await added(agent, "kiosk")
        assert await post_as(NOBODY, path, body("1")) == 204
        assert await post_as(NOBODY, path, body("2"), f"Authorization: Bearer {token}") == 204
        assert await post_as(1, path, body("3")) == 401
        assert await post_as(0, path, body("3")) == 401
        assert (await post(agent, body("3")))[0] == 401, "over TCP nobody is known by a user"
        assert (await receipt(agent, "1"))["app"] == "pos"
        assert (await receipt(agent, "2"))["app"] == "kiosk"
        big = body("4", "x" * 900_000)
        assert [await post_as(NOBODY, path, big.replace(b'"4"', b'"%d"' % n)) for n in (4, 5)] == [
            204,
            507,
        ]
        names = {it["name"]: it["token"] for it in (await agent.status())["apps"]}
        assert names == {"kiosk": "active", "pos": "none"}


@pytest.mark.process
@needs_curl
@needs_root
async def test_who_may_use_the_socket_is_said_by_its_mode_and_by_its_users(
    tmp_path: Path, shared_folder: Path
) -> None:
    path = shared_folder / "a.sock"
    ingest = f'unix_socket = "{path}"\nunix_socket_mode = "0600"'
    async with running_agent(tmp_path, ingest=ingest) as agent:
        assert path.stat().st_mode & 0o777 == 0o600
        assert await post_as(NOBODY, path, body("1")) == 0, "the kernel lets nobody in"
        assert await post_as(0, path, body("1")) == 204
        assert await agent.stop() == 0

    (tmp_path / "b").mkdir()
    ingest = f'unix_socket = "{path}"\nunix_socket_mode = "0666"\nunix_socket_users = ["{NOBODY}"]'
    async with running_agent(tmp_path / "b", ingest=ingest) as agent:
        assert await post_as(NOBODY, path, body("1")) == 204
        assert await post_as(1, path, body("2")) == 403
        assert await post_as(0, path, body("2")) == 403
        agent.config.write_text(
            agent.config.read_text().replace(f'["{NOBODY}"]', f'["{NOBODY}", "daemon"]')
        )
        agent.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(DEADLINE_S):
            while await post_as(1, path, body("2")) != 204:  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.05)
        assert (await agent.status())["accepted"] == 2
