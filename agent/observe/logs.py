"""Log lines: one format for our own events and for those of the libraries, with secrets masked.

Owns the processor chain, the levels and the two renderings (console, JSON Lines). Whoever learns a
secret gives it to the `Redactor`; everything that is logged passes through it last, when tracebacks
are already text. Does not own what is worth a line: each part logs its own events with
`structlog.get_logger()`. Called once by the daemon, before the first line.

    event ─▶ level, traceback as text ─▶ timestamp ─▶ Redactor ─▶ console or JSON ─▶ stream
    stdlib record (aiohttp, asyncio) ────▲
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from agent.clock import SystemClock
from agent.errors import ConfigError
from agent.event import rfc3339
from agent.units import MASK, TOKEN_PREFIX

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
FORMATS = ("auto", "console", "json")

SHORTEST_SECRET = 4
"""Characters. To mask anything shorter would maul ordinary words and still keep no secret."""

_LIBRARY_FLOOR = logging.INFO
"""Libraries speak from here up, whatever our level: aiosqlite's debug lines hold the parameters of
each statement, which are the users' events."""

_TOKEN = re.compile(rf"(?:{TOKEN_PREFIX}|dGF0X)[A-Za-z0-9+/_-]{{20,}}")
"""As it is, or in Base64: tokens are known by their digests alone, and so to be told by their form."""

_SECRET_NAMES = ("authorization", "writekey", "password", "token")
"""Endings of key names, lower case, without "-" and "_": proxy-authorization, publicWriteKey, …"""


def configure(level: str, log_format: str, stream: TextIO, redactor: Redactor) -> None:
    """Send all log lines of this process to *stream*.

    *level* is one of LEVELS and *log_format* one of FORMATS: "auto" is "console" on a terminal,
    else "json". May be called again: what it then says counts for every logger.
    """
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is unknown: use one of {', '.join(LEVELS)}")
    if log_format not in FORMATS:
        raise ConfigError(f"log format {log_format!r} is unknown: use one of {', '.join(FORMATS)}")
    on_terminal = stream.isatty()
    console = log_format == "console" or (log_format == "auto" and on_terminal)
    chain: list[Processor] = [
        # Plain tracebacks: those of rich show local variables, and a local could hold a key.
        structlog.processors.format_exc_info,
        _stamp,
        redactor,
        _Console(colours=on_terminal) if console else _json_line,
    ]
    sink = cast(TextIO, _Sink(stream))
    structlog.configure(
        processors=[structlog.processors.add_log_level, *chain],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sink),
        # A level that changes while the agent runs must reach loggers that were used before.
        cache_logger_on_first_use=False,
    )
    _route_libraries(chain, sink, max(LEVELS[level], _LIBRARY_FLOOR))


def _route_libraries(chain: list[Processor], sink: TextIO, level: int) -> None:
    """Make the records of stdlib logging run through *chain*."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *chain],
    )
    handler = logging.StreamHandler(sink)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # A line per request would wear out flash, and paths hold message ids.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    # A record that cannot be formatted would be printed to stderr as it is, past the redactor.
    logging.raiseExceptions = False


class Redactor:
    """Masks secrets in whatever is about to be shown; a structlog processor, and usable alone.

    A secret is found as it is, URL-quoted in whole or part, with signs escaped (in a repr or JSON), and
    in Base64, alone or as the user name of Basic authentication.
    Values under the name of a secret (`password`, `Authorization`, …) are masked whatever they are.
    """

    def __init__(self) -> None:
        self._forms: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, secret: str) -> None:
        """Mask *secret* from now on; "Basic …" and "Bearer …" also without their scheme.

        Ignored when shorter than SHORTEST_SECRET.
        """
        self._forms.update(_forms(secret.strip()))
        if self._forms:
            # The longest first: Base64 of "key" may begin Base64 of "key:", which would be cut.
            forms = sorted(self._forms, key=len, reverse=True)
            self._pattern = re.compile("|".join("".join(map(_spelling, form)) for form in forms))

    def clean(self, text: str) -> str:
        """Return *text* with each secret replaced by MASK, and all that looks like an app's token."""
        text = _TOKEN.sub(MASK, text)
        return text if self._pattern is None else self._pattern.sub(MASK, text)

    def __call__(self, _logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
        return self._clean_mapping(event_dict)

    def _clean_mapping(self, mapping: Mapping[Any, Any]) -> dict[str, Any]:
        return {
            self.clean(str(name)): MASK if _names_secret(str(name)) else self._clean_value(value)
            for name, value in mapping.items()
        }

    def _clean_value(self, value: object) -> Any:
        """Return *value* as plain data. Objects become text here: a renderer would do it too late."""
        match value:
            case str():
                return self.clean(value)
            case None | bool() | int():
                return value
            case float() if math.isfinite(value):  # JSON has no NaN
                return value
            case Mapping():
                return self._clean_mapping(value)
            case list() | tuple() | set() | frozenset():
                return [self._clean_value(item) for item in value]
            case BaseException() | bytes():
                return self.clean(repr(value))
            case _:
                return self.clean(str(value))


def _forms(secret: str) -> Iterator[str]:
    """Yield the texts that give *secret* away."""
    for bare in _bare(secret):
        if len(bare) < SHORTEST_SECRET:
            continue
        yield bare
        for text in (bare, bare + ":"):  # Basic authentication: the key is the user name
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                yield encode(text.encode(errors="surrogatepass")).decode().rstrip("=")


def _bare(secret: str) -> Iterator[str]:
    """Yield *secret*, and what is left of it without scheme, Base64 and the colon of Basic."""
    yield secret
    scheme, _, credentials = secret.partition(" ")
    if not credentials:
        return
    yield credentials.strip()
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):  # then it is not what it says it is
            yield from base64.b64decode(credentials.strip()).decode().split(":", 1)


def _spelling(char: str) -> str:
    """Return the pattern of *char* as it is, URL-quoted, behind a backslash, or as JSON may write it."""
    if char.isascii() and (char.isalnum() or char in "-._~"):  # RFC 3986, 2.3: never quoted
        return re.escape(char)
    quoted = "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogatepass"))
    plain = r"\\{1,2}" if char == "\\" else r"\\?" + re.escape(char)
    plus = r"|\+" if char == " " else ""
    escaped = rf"\\u{ord(char):04x}"  # as JSON for web pages is written: \u003d
    return f"(?:{plain}|(?i:{quoted}|{escaped}){plus})"


@lru_cache(maxsize=512)  # our own key names are few; a remote's headers are not
def _names_secret(name: str) -> bool:
    return name.lower().replace("-", "").replace("_", "").endswith(_SECRET_NAMES)


def _stamp(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> EventDict:
    """Put first what a reader looks for first: when, how bad, what."""
    return {
        "timestamp": rfc3339(SystemClock().wall_ms()),
        "level": event_dict.pop("level"),
        "event": event_dict.pop("event"),
        **event_dict,
    }


def _json_line(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> str:
    """Return one line of ASCII: control characters and line separators are escaped by JSON."""
    return json.dumps(event_dict, ensure_ascii=True)


class _Console:
    """Renders for a person, one line per event and a traceback indented below it.

    What cannot be printed is escaped: a value that an app or the upstream chose must neither begin
    a line of its own nor reach the terminal as a command.
    """

    _RESET = "\x1b[0m"
    _DIM = "\x1b[2m"
    _BOLD = "\x1b[1m"
    _LEVEL_COLOURS = {  # noqa: RUF012 - a constant
        "debug": "\x1b[34m",
        "info": "\x1b[32m",
        "warning": "\x1b[33m",
        "error": "\x1b[31m",
        "critical": "\x1b[31m",
    }

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, _logger: WrappedLogger, _method: str, event_dict: EventDict) -> str:
        timestamp, level, event = (event_dict.pop(key) for key in ("timestamp", "level", "event"))
        traceback = event_dict.pop("exception", None)
        line = " ".join(
            (
                self._paint(timestamp, self._DIM),
                self._paint(f"{level:<8}", self._LEVEL_COLOURS.get(level, "")),
                self._paint(_visible(str(event)), self._BOLD),
                *(
                    self._paint(_visible(name) + "=", self._DIM) + _value(value)
                    for name, value in event_dict.items()
                ),
            )
        )
        if traceback is None:
            return line
        below = "\n".join("    " + _visible(text) for text in str(traceback).split("\n"))
        return f"{line}\n{below}"

    def _paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{self._RESET}" if self._colours and colour else text


def _value(value: object) -> str:
    if not isinstance(value, str):
        return _visible(repr(value))
    if value and not re.search(r"[\s\"'=]", value):
        return _visible(value)
    return '"' + _visible(value.replace('"', '\\"')) + '"'


def _visible(text: str) -> str:
    """Return *text* with each character that cannot be printed written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class _Sink:
    """The stream, except that a line that cannot be written is dropped.

    A full disk, a closed pipe or a terminal that went away must not stop an event on its way, and
    there is nowhere left to say so.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        # ValueError: the stream is closed, or cannot encode the text.
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()
