"""Log lines: parseable, filtered, unforgeable, and without secrets."""

import base64
import io
import json
import logging
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent.errors import ConfigError
from agent.observe import logs
from agent.observe.logs import Redactor
from agent.units import MASK

CANARY = "wk_live/Ca+nary:7f3a"

Configure = Callable[..., io.StringIO]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.fixture
def redactor() -> Redactor:
    redactor = Redactor()
    redactor.add(CANARY)
    return redactor


@pytest.fixture
def configure(redactor: Redactor) -> Iterator[Configure]:
    """Configure logging into a stream, which is returned; undone afterwards."""
    root, access = logging.getLogger(), logging.getLogger("aiohttp.access")
    before = (root.handlers[:], root.level, access.level, logging.raiseExceptions)

    def configure(
        level: str = "debug", log_format: str = "json", stream: io.StringIO | None = None
    ) -> io.StringIO:
        stream = stream or io.StringIO()
        logs.configure(level, log_format, stream, redactor)
        return stream

    yield configure
    structlog.reset_defaults()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    access.setLevel(before[2])
    logging.raiseExceptions = before[3]


def _parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def _fail_with(message: str) -> None:
    raise ValueError(message)


# --- format -------------------------------------------------------------------------------------


def test_a_json_line_has_time_level_event_and_keys_in_this_order(configure: Configure) -> None:
    stream = configure()

    structlog.get_logger().info("batch.forwarded", events=3, upstream="a b")

    [line] = _parsed(stream)
    assert list(line) == ["timestamp", "level", "event", "events", "upstream"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {"level": "info", "event": "batch.forwarded", "events": 3, "upstream": "a b"}


def test_objects_and_numbers_that_json_does_not_know_become_text(configure: Configure) -> None:
    stream = configure()

    structlog.get_logger().info("x.y", path=Path("/tmp/a"), error=TimeoutError(), rate=float("nan"))

    [line] = _parsed(stream)
    assert (line["path"], line["error"], line["rate"]) == ("/tmp/a", "TimeoutError()", "nan")


def test_auto_is_json_in_a_file_and_console_on_a_terminal(configure: Configure) -> None:
    file = configure(log_format="auto")
    structlog.get_logger().info("agent.started")
    terminal = configure(log_format="auto", stream=_Terminal())
    structlog.get_logger().info("agent.started")

    assert _parsed(file)[0]["event"] == "agent.started"
    assert "\x1b[" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


def test_the_console_has_no_colours_in_a_file(configure: Configure) -> None:
    stream = configure(log_format="console")

    structlog.get_logger().warning("disk.filled", used=0.9, path="/var/a b", note="")

    assert stream.getvalue().split(" ", 1)[1] == (
        'warning  disk.filled used=0.9 path="/var/a b" note=""\n'
    )


def test_lines_below_the_level_are_not_written(configure: Configure) -> None:
    stream = configure(level="warning")

    log = structlog.get_logger()
    log.debug("a.b")
    log.info("a.b")
    log.warning("c.d")
    log.error("e.f")

    assert [line["level"] for line in _parsed(stream)] == ["warning", "error"]


def test_a_level_that_changes_counts_for_loggers_that_were_used_before(
    configure: Configure,
) -> None:
    stream = configure(level="warning")
    log = structlog.get_logger()
    log.info("a.b")
    configure(level="info", stream=stream)
    log.info("c.d")
    configure(level="error", stream=stream)
    log.warning("e.f")

    assert [line["event"] for line in _parsed(stream)] == ["c.d"]


@pytest.mark.parametrize(("level", "log_format"), [("loud", "json"), ("info", "xml")])
def test_an_unknown_level_or_format_is_refused(
    configure: Configure, level: str, log_format: str
) -> None:
    with pytest.raises(ConfigError, match="use one of"):
        configure(level=level, log_format=log_format)


def test_a_line_that_cannot_be_written_stops_nobody(configure: Configure) -> None:
    configure(stream=_FullDisk())
    structlog.get_logger().error("outbox.failed")
    logging.getLogger("asyncio").error("lost")

    closed = configure()
    closed.close()
    structlog.get_logger().error("outbox.failed")


# --- libraries ----------------------------------------------------------------------------------


def test_library_records_take_the_same_way(configure: Configure) -> None:
    stream = configure()

    logging.getLogger("aiohttp.server").warning("bad request from %s", "127.0.0.1")

    [line] = _parsed(stream)
    assert line["event"] == "bad request from 127.0.0.1"
    assert (line["level"], line["logger"]) == ("warning", "aiohttp.server")
    assert line["timestamp"].endswith("Z")


def test_library_tracebacks_are_masked_too(configure: Configure) -> None:
    stream = configure()

    try:
        _fail_with(f"upstream said {CANARY}")
    except ValueError:
        logging.getLogger("aiohttp.server").exception("Error handling request %s", CANARY)

    [line] = _parsed(stream)
    assert "upstream said ********" in line["exception"]
    assert CANARY not in stream.getvalue()


def test_debug_records_of_libraries_and_access_lines_are_never_written(
    configure: Configure,
) -> None:
    stream = configure(level="debug")

    logging.getLogger("aiosqlite").debug("executing INSERT ('body of a user')")
    logging.getLogger("aiohttp.access").info("GET /api/agent/events/id-of-a-user")

    assert stream.getvalue() == ""


# --- secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_secret_is_masked_wherever_it_stands(configure: Configure, log_format: str) -> None:
    stream = configure(log_format=log_format)
    log = structlog.get_logger().bind(bound=CANARY)
    event = "x." + CANARY

    try:
        _fail_with(CANARY)
    except ValueError as exc:
        log.exception(
            event,
            plain=f"a{CANARY}b",
            nested={"list": [{"deep": (CANARY,)}], CANARY: 1, "set": {CANARY}},
            error=exc,
            raw=CANARY.encode(),
            path=Path(CANARY),
        )

    assert "Ca+nary" not in stream.getvalue()
    assert "7f3a" not in stream.getvalue()
    assert stream.getvalue().count(MASK) >= 9
    assert "Traceback" in stream.getvalue()


def test_a_traceback_shows_no_local_variables(configure: Configure) -> None:
    stream = configure(log_format="console")

    def deliver() -> None:
        local = "not-registered-" + "but-secret"
        raise ValueError(len(local))

    try:
        deliver()
    except ValueError:
        structlog.get_logger().exception("request.failed")

    assert "not-registered-but-secret" not in stream.getvalue()
    assert "in deliver" in stream.getvalue()


def test_a_chained_exception_and_its_notes_are_masked(configure: Configure) -> None:
    stream = configure()

    try:
        try:
            _fail_with(f"inner {CANARY}")
        except ValueError as exc:
            exc.add_note(f"note {CANARY}")
            raise RuntimeError("outer") from exc
    except RuntimeError:
        structlog.get_logger().exception("request.failed")

    [line] = _parsed(stream)
    assert CANARY not in line["exception"]
    assert f"inner {MASK}" in line["exception"]
    assert f"note {MASK}" in line["exception"]


@pytest.mark.parametrize(
    "disguise",
    [
        base64.b64encode(CANARY.encode()).decode(),
        base64.b64encode(f"{CANARY}:".encode()).decode(),
        base64.urlsafe_b64encode(f"{CANARY}:".encode()).decode(),
        urllib.parse.quote(base64.b64encode(f"{CANARY}:".encode()).decode(), safe=""),
        urllib.parse.quote(CANARY),
        urllib.parse.quote(CANARY, safe=""),
        urllib.parse.quote_plus(CANARY),
        urllib.parse.quote(CANARY, safe="").lower().replace("ca", "Ca"),
        f"https://{urllib.parse.quote(CANARY, safe='+')}@host/",
    ],
)
def test_a_secret_is_found_in_disguise(redactor: Redactor, disguise: str) -> None:
    cleaned = redactor.clean(f"before {disguise} after")

    assert MASK in cleaned
    assert disguise.rstrip("=") not in cleaned
    assert "nary" not in cleaned


@pytest.mark.parametrize("secret", ["a\"b\\c'd", "tab\tand space", "schlüssel"])
def test_a_secret_is_found_escaped(secret: str) -> None:
    redactor = Redactor()
    redactor.add(secret)

    for text in (json.dumps(secret, ensure_ascii=False), repr([secret]), secret):
        assert secret[-3:] not in redactor.clean(text.replace("\\t", "\t"))
    assert redactor.clean(urllib.parse.quote_plus(secret)) == MASK


def test_a_key_with_a_scheme_is_masked_without_it_too() -> None:
    redactor = Redactor()
    redactor.add("Basic " + base64.b64encode(b"canary-key:").decode())
    redactor.add("Bearer other-key")

    assert redactor.clean("invalid key canary-key") == f"invalid key {MASK}"
    assert redactor.clean("got Y2FuYXJ5LWtleTo=") == f"got {MASK}"
    assert redactor.clean("other-key") == MASK
    assert redactor.clean("use Basic or Bearer") == "use Basic or Bearer"


def test_a_scheme_whose_rest_is_not_base64_is_masked_as_it_is() -> None:
    redactor = Redactor()
    redactor.add("Basic not/base64!")

    assert redactor.clean("key not/base64! is refused") == f"key {MASK} is refused"


def test_several_secrets_are_masked_at_once() -> None:
    redactor = Redactor()
    redactor.add("first-key")
    redactor.add("first-key-longer")

    assert redactor.clean("first-key first-key-longer") == f"{MASK} {MASK}"


def test_a_secret_too_short_to_mask_is_ignored() -> None:
    redactor = Redactor()
    redactor.add("abc")
    redactor.add("")

    assert redactor.clean("abc YWJj") == "abc YWJj"


@pytest.mark.parametrize(
    "name",
    ["authorization", "Proxy-Authorization", "write_key", "publicWriteKey", "password", "token"],
)
def test_a_value_under_the_name_of_a_secret_is_masked_whatever_it_is(
    configure: Configure, name: str
) -> None:
    stream = configure()

    structlog.get_logger().info("x.y", **{name: "unregistered"}, headers={name: ["unregistered"]})

    [line] = _parsed(stream)
    assert (line[name], line["headers"]) == (MASK, {name: MASK})


def test_the_path_of_a_key_file_is_not_a_secret(configure: Configure) -> None:
    stream = configure()

    structlog.get_logger().info("key.read", write_key_file="/etc/key")

    assert _parsed(stream)[0]["write_key_file"] == "/etc/key"


# --- forgery ------------------------------------------------------------------------------------

HOSTILE = "a\n2026-01-01T00:00:00.000Z error forged\r\x1b[2J\x9b1A\u2028\u202e\ud800\x00z"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_hostile_text_can_neither_begin_a_line_nor_command_the_terminal(
    configure: Configure, log_format: str
) -> None:
    stream = configure(log_format=log_format)

    structlog.get_logger().info(HOSTILE, value=HOSTILE, nested=[HOSTILE], **{HOSTILE: 1})
    logging.getLogger("aiohttp.server").error(HOSTILE)

    text = stream.getvalue()
    assert len(text.splitlines()) == 2
    assert text.replace("\n", "").isprintable()


def test_a_traceback_on_the_console_is_indented_below_its_line(configure: Configure) -> None:
    stream = configure(log_format="console")

    try:
        _fail_with(HOSTILE)
    except ValueError:
        structlog.get_logger().exception("request.failed")

    first, *below = stream.getvalue().splitlines()
    assert first.endswith("error    request.failed")
    assert below
    assert all(line.startswith("    ") and line.isprintable() for line in below)
