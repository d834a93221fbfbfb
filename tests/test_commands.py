"""The commands where no daemon runs: exit codes, looking in, changing things under the lock."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import pytest
import structlog
from click.testing import CliRunner, Result
from processes import free_port

import agent.__main__  # noqa: F401  # adds `run` to the commands
from agent.clock import SystemClock
from agent.config.loaded import effective
from agent.config.loading import load
from agent.console import dead_letters
from agent.console.commands import cli
from agent.console.diagnosis import duration, exit_code, findings
from agent.console.invocation import Program
from agent.console.status import OutboxStatus, Status
from agent.contract import read_event
from agent.errors import AgentError, ConfigError
from agent.outbox.access import open_own_reader, open_reader
from agent.outbox.records import Ack, Bury, Ledger, Policy, Selection
from agent.outbox.writer import Writer, open_writer

KEY = "a-key-that-nobody-may-see"

HOSTILE = "\x1b[31mred\x1b[0m\x07[bold]\u202e\u009b\nnext"
"""An escape sequence, a bell, rich markup, a reversal of direction, C1's CSI and a line feed."""

SAME_ID = b'{"messageId": "same", "event": "Paid", "userId": "ann"}'

DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("TRANTHOR_AGENT_")]:
        monkeypatch.delenv(name)
    for name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))
    handlers = logging.getLogger().handlers[:]
    yield
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "state" / "outbox.db"


@pytest.fixture
def config(tmp_path: Path, outbox: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(
        f"""
        [ingest]
        port = {free_port()}
        [outbox]
        path = "{outbox}"
        [upstream]
        url = "http://127.0.0.1:9"
        write_key = "{KEY}"
        """
    )
    return path


def ask(*args: str | Path, answer: str | None = None) -> Result:
    """Run the program as a person would, with *answer* on stdin."""
    return CliRunner().invoke(
        cli, [str(arg) for arg in args], input=answer, prog_name="tranthor-agent"
    )


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def append(writer: Writer, *bodies: dict[str, Any], age_s: float = 0) -> None:
    received_ms = SystemClock().wall_ms() - round(age_s * 1000)
    await writer.append(
        [
            read_event(
                "track",
                json.dumps({"event": "Paid", "userId": "ann", **body}).encode(),
                received_ms=received_ms,
            )
            for body in bodies
        ]
    )


def writing(path: Path) -> Any:
    return open_writer(path, Policy(max_bytes=1 << 30, evicts=False, remember=True), SystemClock())


async def bury(writer: Writer, path: Path, *message_ids: str, answer: str = "no") -> None:
    async with open_own_reader(path) as reader:
        for letter in await reader.select(
            "pending", Selection(message_ids=message_ids), limit=10_000
        ):
            await writer.settle(Bury(seq=letter.seq, reason="rejected", status=400, answer=answer))


def fill(path: Path, *, pending: int = 0, dead: int = 0, delivered: int = 0) -> None:
    """Make an outbox with events p-0 …, d-0 … and a-0 …, in these states."""

    async def make() -> None:
        async with writing(path) as writer:
            await append(writer, *({"messageId": f"a-{i}"} for i in range(delivered)))
            async with open_own_reader(path) as reader:
                for event in await reader.select("pending", Selection(), limit=10_000):
                    await writer.settle(Ack(event.seq))
            await append(writer, *({"messageId": f"d-{i}"} for i in range(dead)))
            await bury(writer, path, *(f"d-{i}" for i in range(dead)))
            await append(writer, *({"messageId": f"p-{i}"} for i in range(pending)))

    asyncio.run(make())


def ledger(path: Path) -> Ledger:
    async def read() -> Ledger:
        async with open_reader(path) as reader:
            return await reader.ledger()

    return asyncio.run(read())


# --- status ---


def test_status_without_an_outbox_says_so_and_makes_none(config: Path, outbox: Path) -> None:
    result = ask("status", "--config", config)

    assert result.exit_code == 2
    assert result.stdout.startswith("NOT RUNNING")
    assert f"{outbox}: no outbox here" in result.stdout
    assert not outbox.parent.exists()


def test_status_of_a_stopped_agent_still_counts(config: Path, outbox: Path) -> None:
    fill(outbox, pending=3, dead=1, delivered=2)

    result = ask("status", "--config", config, "--json")

    status = json.loads(result.stdout)
    assert result.exit_code == 2
    assert status["state"] == "stopped"
    assert (status["accepted"], status["delivered"]) == (6, 2)
    assert (status["pending"], status["dead"], status["discarded"]) == (3, 1, 0)
    assert status["oldest_pending_age_s"] >= 0
    assert status["outbox"]["path"] == str(outbox)
    assert "1 dead letter set aside" in ask("status", "--config", config).stdout


def test_status_of_what_is_no_outbox_is_unreadable(config: Path, outbox: Path) -> None:
    outbox.parent.mkdir()
    outbox.write_text("this is no database, however long one looks at it")

    result = ask("status", "--config", config, "--json")

    assert result.exit_code == 3
    assert json.loads(result.stdout)["state"] == "unreadable"
    assert "not a database" in json.loads(result.stdout)["reason"]
    assert ask("status", "--config", config).stdout.startswith("OUTBOX UNREADABLE: ")


async def test_status_tells_an_owner_that_does_not_answer(config: Path, outbox: Path) -> None:
    async with writing(outbox) as writer:
        await append(writer, {"messageId": "p-0"})
        result = await asyncio.to_thread(ask, "status", "--config", config, "--json")
        changing = await asyncio.to_thread(ask, "pause", "--config", config)

    status = json.loads(result.stdout)
    assert result.exit_code == 3
    assert status["state"] == "unresponsive"
    assert f"process {os.getpid()} owns {outbox}" in status["reason"]
    assert status["pending"] == 1
    assert changing.exit_code == 1
    assert f"process {os.getpid()} owns {outbox}" in changing.stderr


def test_a_watched_status_ends_quietly_with_ctrl_c(config: Path, outbox: Path) -> None:
    fill(outbox, pending=1)
    # A shell in the background starts its children with SIGINT ignored, and they inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "status", "--watch", "--json", "--config", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["pending"] == 1
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 130
    assert errors == ""


def _status(**changes: Any) -> Status:
    known: dict[str, Any] = dict.fromkeys(
        ("accepted", "delivered", "pending", "dead", "discarded", "evicted", "duplicates",
         "conflicts", "in_flight", "limit", "parked_users", "ambiguous"), 0
    )  # fmt: skip
    known |= dict.fromkeys(
        ("oldest_pending_age_s", "next_attempt_in_s", "last_error", "last_error_age_s", "salvage")
    )
    known |= {"state": "flowing", "reason": "", "outbox": _outbox(), "upstream": "", "version": "1"}
    return Status(**(known | changes))


def _outbox(**changes: Any) -> OutboxStatus:
    known: dict[str, Any] = {"path": "o", "bytes": 10, "wal_bytes": 0, "max_bytes": 100}
    return OutboxStatus(**(known | {"full": None, "fault": None} | changes))


@pytest.mark.parametrize(
    ("status", "code", "verdict"),
    [
        (_status(), 0, "flowing"),
        (_status(state="backing_off", reason="no route"), 0, "backing off: no route"),
        (_status(state="held", reason="401 no"), 1, "HELD: 401 no"),
        (_status(state="paused"), 1, "PAUSED by a person"),
        (_status(state="unconfigured", reason="no url"), 1, "NOT CONFIGURED: no url"),
        (_status(dead=2), 1, "flowing"),
        (_status(outbox=_outbox(bytes=95)), 1, "flowing"),
        (_status(outbox=_outbox(full="disk")), 1, "OUTBOX FULL: disk"),
        (_status(outbox=_outbox(fault="I/O")), 1, "OUTBOX FAILED: I/O"),
        (_status(state="stopped", dead=2), 2, "NOT RUNNING"),
        (_status(state="unresponsive", reason="x"), 3, "NO ANSWER: x"),
    ],
)
def test_the_verdict_comes_first_and_agrees_with_the_exit_code(
    status: Status, code: int, verdict: str
) -> None:
    told = findings(status, "tranthor-agent")

    assert exit_code(status) == code
    assert told[0].title == verdict
    assert code == 0 or any(finding.remedy for finding in told)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "under 1s"), (59.9, "59s"), (60, "1m"), (192, "3m 12s"), (3_605, "1h"), (90_000, "1d 1h")],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- list and show ---


def test_list_selects_by_event_user_text_and_age(config: Path, outbox: Path) -> None:
    async def make() -> None:
        async with writing(outbox) as writer:
            await append(writer, {"messageId": "old"}, age_s=7200)
            await append(
                writer,
                {"messageId": "event", "event": "Sold"},
                {"messageId": "user", "userId": "bob"},
                {"messageId": "text", "properties": {"note": "needle"}},
            )

    asyncio.run(make())

    def listed(*options: str) -> list[str]:
        result = ask("list", "--config", config, "--json", *options)
        assert result.exit_code == 0
        return [event["messageId"] for event in lines(result.stdout)]

    assert listed() == ["old", "event", "user", "text"]
    assert listed("--limit", "2") == ["old", "event"]
    assert listed("--event", "Sold") == ["event"]
    assert listed("--user", "bob") == ["user"]
    assert listed("--text", "needle") == ["text"]
    assert listed("--older-than", "1h") == ["old"]
    assert listed("--newer-than", "1h") == ["event", "user", "text"]


def test_list_says_when_there_is_more_than_it_shows(config: Path, outbox: Path) -> None:
    fill(outbox, pending=3)

    result = ask("list", "--config", config, "--limit", "2")

    assert "p-1" in result.stdout
    assert "p-2" not in result.stdout
    assert "--limit shows more" in result.stderr


def test_a_list_of_more_than_one_page_is_whole_and_in_order(config: Path, outbox: Path) -> None:
    fill(outbox, pending=250)

    result = ask("list", "--config", config, "--json", "--limit", "230")

    assert [event["messageId"] for event in lines(result.stdout)] == [f"p-{i}" for i in range(230)]


def test_delivered_events_cannot_be_selected_by_what_was_not_kept(
    config: Path, outbox: Path
) -> None:
    fill(outbox, delivered=1)

    assert "a-0" in ask("list", "--state", "delivered", "--config", config).stdout
    refused = ask("list", "--state", "delivered", "--user", "ann", "--config", config)
    assert refused.exit_code == 2
    assert "only its id and times are kept" in refused.stderr


@pytest.mark.parametrize("option", ["--app", "--upstream", "--event", "--user", "--text"])
@pytest.mark.parametrize("command", [["list"], ["dead", "discard", "--yes"]])
def test_an_empty_condition_selects_nothing_that_nobody_meant(
    config: Path, outbox: Path, command: list[str], option: str
) -> None:
    fill(outbox, dead=1)

    refused = ask(*command, option, "", "--config", config)

    assert refused.exit_code == 2
    assert "leave the option out" in refused.stderr
    assert ask("dead", "list", "--json", "--config", config).stdout


def test_an_age_without_a_unit_is_refused(config: Path) -> None:
    result = ask("list", "--older-than", "5", "--config", config)

    assert result.exit_code == 2
    assert "1h30m" in result.stderr


def test_show_has_the_body_the_answer_and_the_next_command(config: Path, outbox: Path) -> None:
    fill(outbox, dead=1)

    result = ask("show", "d-0", "--config", config)

    assert result.exit_code == 0
    assert "dead: rejected" in result.stdout
    assert '"messageId": "d-0"' in result.stdout
    assert f"tranthor-agent --config {config} dead requeue d-0" in result.stdout
    assert json.loads(ask("show", "d-0", "--json", "--config", config).stdout)["status"] == 400


def test_show_of_an_unknown_id_says_what_that_can_mean(config: Path, outbox: Path) -> None:
    fill(outbox, pending=1)

    result = ask("show", "nobody", "--config", config)

    assert result.exit_code == 1
    assert "never accepted, or discarded, or delivered more than 7d ago" in result.stderr


def test_what_apps_and_the_upstream_wrote_cannot_steer_the_terminal(
    config: Path, outbox: Path
) -> None:
    async def make() -> None:
        async with writing(outbox) as writer:
            await append(
                writer, {"messageId": HOSTILE, "event": HOSTILE, "userId": HOSTILE, "x": HOSTILE}
            )
            await bury(writer, outbox, HOSTILE, answer=HOSTILE)

    asyncio.run(make())

    shown = [
        ask("dead", "list", "--config", config),
        ask("dead", "list", "--config", config, "--json"),
        ask("show", HOSTILE, "--config", config),
        ask("show", HOSTILE, "--config", config, "--json"),
        ask("show", f"not {HOSTILE}", "--config", config),
    ]

    for result in shown:
        assert all(line.isprintable() for line in result.output.split("\n"))
        assert "[bold]" in result.output
    assert lines(shown[1].stdout)[0]["event"] == HOSTILE
    assert lines(shown[3].stdout)[0]["body"]["x"] == HOSTILE


def test_a_reader_that_leaves_early_is_no_error(config: Path, outbox: Path) -> None:
    fill(outbox, pending=2_000)
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "list", "--json", "--limit", "2000", "--config", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["messageId"] == "p-0"
        process.stdout.close()
        assert process.stderr.read() == ""


# --- dead letters ---


def test_requeue_puts_the_chosen_dead_letters_back(config: Path, outbox: Path) -> None:
    fill(outbox, dead=3)

    one = ask("dead", "requeue", "d-1", "--config", config)
    rest = ask("dead", "requeue", "--all", "--config", config)

    assert (one.exit_code, one.stdout) == (0, "requeued 1 dead letter\n")
    assert (rest.exit_code, rest.stdout) == (0, "requeued 2 dead letters\n")
    assert (ledger(outbox).dead, ledger(outbox).pending) == (0, 3)


def test_requeue_takes_more_ids_than_one_request_holds(config: Path, outbox: Path) -> None:
    fill(outbox, dead=1_100)

    result = ask("dead", "requeue", *(f"d-{i}" for i in range(1_100)), "--config", config)

    assert result.stdout == "requeued 1,100 dead letters\n"


async def test_requeue_ends_where_the_upstream_refuses_them_again_at_once(outbox: Path) -> None:
    async with writing(outbox) as writer:
        ids = [f"d-{i}" for i in range(3)]
        await append(writer, *({"messageId": message_id} for message_id in ids))
        await bury(writer, outbox, *ids)

        class Refused:
            """A writer whose every requeue is followed by the upstream's refusal."""

            async def perform(self, verb: Any) -> Any:
                done = await writer.perform(verb)
                await bury(writer, outbox, *ids)
                return done

        async with open_own_reader(outbox) as reader, asyncio.timeout(DEADLINE_S):
            refused = cast(Writer, Refused())
            assert await dead_letters.requeue(reader, refused, Selection(), now_ms=1) == 3


def test_an_id_that_is_no_dead_letter_is_told(config: Path, outbox: Path) -> None:
    fill(outbox, dead=1, pending=1)

    result = ask("dead", "requeue", "d-0", "p-0", "--config", config)

    assert result.exit_code == 1
    assert result.stdout == "requeued 1 dead letter\n"
    assert "1 of the ids given did not match a dead letter" in result.stderr


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_dead_letters_must_be_chosen_in_so_many_words(verb: str, config: Path) -> None:
    nothing = ask("dead", verb, "--config", config)
    both = ask("dead", verb, "--all", "--user", "ann", "--config", config)

    assert nothing.exit_code == both.exit_code == 2
    assert "say which dead letters" in nothing.stderr
    assert "--all stands alone" in both.stderr


@pytest.mark.parametrize(("answer", "left"), [("n\n", 2), ("", 2), ("y\n", 0)])
def test_discard_asks_with_the_number(config: Path, outbox: Path, answer: str, left: int) -> None:
    fill(outbox, dead=2)

    result = ask("dead", "discard", "--all", "--config", config, answer=answer)

    assert "discard 2 dead letters for good?" in result.stderr
    assert result.exit_code == (0 if left == 0 else 1)
    assert ledger(outbox).dead == left
    assert ledger(outbox).discarded == 2 - left


def test_discard_does_not_ask_twice_when_told_yes(config: Path, outbox: Path) -> None:
    fill(outbox, dead=2)

    result = ask("dead", "discard", "--reason", "rejected", "--yes", "--config", config)

    assert (result.stdout, result.stderr) == ("discarded 2 dead letters\n", "")
    assert ledger(outbox).discarded == 2


def test_discard_takes_nothing_that_died_after_the_question(
    config: Path, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(outbox, dead=1, pending=1)

    async def die() -> None:
        async with writing(outbox) as writer:
            await bury(writer, outbox, "p-0")

    def agree(*_: object, **__: object) -> bool:
        asyncio.run(die())
        return True

    monkeypatch.setattr(click, "confirm", agree)
    result = ask("dead", "discard", "--all", "--config", config)

    assert result.stdout == "discarded 1 dead letter\n"
    assert (ledger(outbox).dead, ledger(outbox).discarded) == (1, 1)


def test_discard_leaves_alone_what_has_the_same_id_for_another_upstream(
    config: Path, outbox: Path
) -> None:
    async def make() -> None:
        async with writing(outbox) as writer:
            for name in ("", "crm"):
                letter = read_event("track", SAME_ID, received_ms=SystemClock().wall_ms())
                await writer.append([msgspec.structs.replace(letter, upstream=name)])
            for seq in (1, 2):
                await writer.settle(Bury(seq=seq, reason="rejected", status=400, answer="no"))

    asyncio.run(make())

    result = ask("dead", "discard", "--upstream", "crm", "--config", config, answer="y\n")

    assert "discard 1 dead letter for good?" in result.stderr
    assert result.stdout == "discarded 1 dead letter\n"
    left = lines(ask("dead", "list", "--json", "--config", config).stdout)
    assert [letter["upstream"] for letter in left] == ["default"]


# --- pause, resume, flush ---


def test_pause_of_a_stopped_agent_holds_from_its_next_start(config: Path, outbox: Path) -> None:
    fill(outbox, pending=1)

    paused = ask("pause", "--config", config)
    assert paused.exit_code == 0
    assert "no agent runs now" in paused.stderr
    assert ledger(outbox).paused
    assert "paused by a person" in ask("status", "--config", config).stdout

    assert ask("resume", "--config", config).exit_code == 0
    assert not ledger(outbox).paused


@pytest.mark.parametrize(
    "command", [["pause"], ["resume"], ["dead", "requeue", "--all"], ["dead", "discard", "--all"]]
)
def test_no_change_makes_an_outbox(command: list[str], config: Path, outbox: Path) -> None:
    result = ask(*command, "--config", config)

    assert result.exit_code == 1
    assert "no outbox here" in result.stderr
    assert not outbox.parent.exists()


def test_flush_without_a_daemon_says_that_nothing_runs(config: Path, outbox: Path) -> None:
    fill(outbox, pending=1)

    result = ask("flush", "--config", config)

    assert result.exit_code == 2
    assert "no agent runs here" in result.stderr


# --- config ---


def test_config_check_is_content_with_a_whole_configuration(config: Path) -> None:
    result = ask("config", "check", "--config", config)

    assert (result.exit_code, result.stdout) == (0, f"file     {config}\nok\n")


def test_config_check_names_what_is_missing() -> None:
    result = ask("config", "check", "--json")

    checked = json.loads(result.stdout)
    assert result.exit_code == 1
    assert checked["file"] is None
    assert "upstream.url" in checked["missing"]


@pytest.mark.parametrize("command", [["config", "check"], ["status"], ["run"], ["pause"]])
def test_a_wrong_configuration_is_told_line_by_line(command: list[str], tmp_path: Path) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text('[ingest]\nprot = 1\n[forward]\nconcurrency = "many"\n')

    result = ask(*command, "--config", config)

    assert result.exit_code == 78
    first, second = result.stderr.splitlines()
    assert first.startswith("tranthor-agent: ")
    assert "did you mean port?" in first
    assert "concurrency" in second


def test_config_show_masks_secrets_and_says_where_values_come_from(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANTHOR_AGENT_LOG__LEVEL", "debug")

    plain = ask("config", "show", "--config", config)
    shown = json.loads(ask("config", "show", "--json", "--config", config).stdout)

    assert "TRANTHOR_AGENT_LOG__LEVEL" in plain.stdout
    assert shown["log.level"] == {
        "value": "debug",
        "origin": "environment TRANTHOR_AGENT_LOG__LEVEL",
    }
    assert shown["ingest.port"]["origin"] == str(config)
    assert KEY not in plain.stdout
    assert KEY not in json.dumps(shown)
    assert shown.keys() == {entry.key for entry in effective(load(config, {}))}


def test_config_init_writes_a_file_that_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "config.toml"

    result = ask("config", "init", target)

    assert result.exit_code == 0
    assert f"--config {target} config check" in result.stderr
    assert stat.S_IMODE(target.stat().st_mode) & ~0o640 == 0
    assert not any(tomllib.loads(target.read_text()).values())
    assert list(target.parent.iterdir()) == [target]


def test_config_init_goes_where_the_agent_looks(tmp_path: Path) -> None:
    assert ask("config", "init").exit_code == 0

    found = tmp_path / "xdg-config" / "tranthor-agent" / "config.toml"
    assert json.loads(ask("config", "check", "--json").stdout)["file"] == str(found)


def test_config_init_replaces_a_file_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "config.toml"
    target.write_text("mine")

    refused = ask("config", "init", target)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert target.read_text() == "mine"

    assert ask("config", "init", target, "--force").exit_code == 0
    assert target.read_text() != "mine"


# --- the program ---


def test_config_is_taken_before_and_after_the_command(config: Path) -> None:
    places: list[list[str | Path]] = [
        ["--config", config, "config", "check"],
        ["config", "--config", config, "check"],
        ["config", "check", "--config", config],
    ]
    for args in places:
        assert f"file     {config}\n" in ask(*args).stdout


def test_every_command_takes_config_and_has_help() -> None:
    def walk(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
        for name, command in group.commands.items():
            yield (*path, name)
            if isinstance(command, click.Group):
                yield from walk(command, *path, name)

    for path in walk(cli):
        result = ask(*path, "-h")
        assert result.exit_code == 0
        assert "--config PATH" in result.stdout


def test_a_slip_is_answered_with_the_nearest_word() -> None:
    assert "Did you mean 'status'?" in ask("statsu").stderr
    assert "Did you mean '--json'?" in ask("status", "--jsno").stderr


def test_start_up_loads_neither_rich_nor_aiohttp() -> None:
    heavy = {"rich", "aiohttp", "agent.daemon"}
    probe = f"import sys, agent.__main__; sys.exit(str({heavy} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    ).stderr

    assert loaded.strip() == "set()"


def _program_that_raises(failure: Exception) -> Result:
    @click.group(cls=Program)
    def broken() -> None: ...

    @broken.command()
    def now() -> None:
        raise failure

    return CliRunner().invoke(broken, ["now"])


def test_failures_of_a_group_are_told_once_each() -> None:
    twice = [AgentError("the disk"), ExceptionGroup("inner", [AgentError("the disk")])]

    result = _program_that_raises(ExceptionGroup("outer", twice))

    assert (result.exit_code, result.stderr) == (1, "tranthor-agent: the disk\n")
    assert _program_that_raises(ExceptionGroup("g", [ConfigError("x")])).exit_code == 78


def test_a_bug_keeps_its_traceback() -> None:
    bug = ExceptionGroup("outer", [AgentError("the disk"), ZeroDivisionError()])

    assert _program_that_raises(bug).exception is bug
