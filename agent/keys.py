"""The table of keys that can be set, and how they stand in a file.

Made from the declarations in `agent.settings`. `agent.config` reads by it and words its errors
with it; `config init` writes the `example`. Knows no file and no environment.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from agent.settings import AppSettings, Help, NamedUpstream, Settings
from agent.units import (
    MASK,
    Bytes,
    ProxyUrl,
    Seconds,
    Secret,
    WriteKey,
    http_proxy,
    server_root,
    sha256_digests,
    without_credentials,
)

PREFIX = "TRANTHOR_AGENT_"

_COLUMNS = 100
"""Width of the example file, and of a value in an error message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, as its Struct declares it. *base* is the type without the None of an empty text."""

    section: str
    name: str
    type: Any
    default: Any
    help: Help

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        section = self.section.replace(".", "__").replace("-", "_")
        return f"{PREFIX}{section}__{self.name}".upper()

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def base(self) -> Any:
        return get_args(self.type)[0] if self.optional else self.type

    @property
    def secret(self) -> bool:
        return self.base in {WriteKey, Secret}

    @property
    def allowed(self) -> str:
        if get_origin(self.base) is Literal:
            *others, last = map(toml, get_args(self.base))
            return f"{', '.join(others)} or {last}" if others else last
        if self.base is bool:
            return "true or false"
        if self.help.low is None or self.help.high is None:
            return self.help.allowed or "a path"
        kind = {int: "a whole number", Seconds: "a duration", Bytes: "a size"}[self.base]
        low, high = (toml(self.base(limit)) for limit in (self.help.low, self.help.high))
        return f"{kind} from {low} to {high}"


def _declared(section: str, struct: type[msgspec.Struct]) -> Iterator[Key]:
    for declared in msgspec.structs.fields(struct):
        kind, help_ = get_args(declared.type)
        yield Key(
            section=section, name=declared.name, type=kind, default=declared.default, help=help_
        )


_HELP = {
    section.name: get_args(section.type)[1].text for section in msgspec.structs.fields(Settings)
}

UPSTREAMS = "upstreams"
"""Holds a section for each named upstream: their keys are in no table before their names are known."""

APPS = "apps"
"""The same of apps."""

STRUCTS = {
    section.name: get_args(section.type)[0]
    for section in msgspec.structs.fields(Settings)
    if section.name not in {UPSTREAMS, APPS}
}
KEYS = {
    key.dotted: key for section, struct in STRUCTS.items() for key in _declared(section, struct)
}


def keys_with(names: Iterable[str], apps: Iterable[str] = ()) -> dict[str, Key]:
    """Return the table with the keys of the upstreams of these *names* in it, and of *apps*."""
    named = [
        *(key for name in names for key in _declared(f"{UPSTREAMS}.{name}", NamedUpstream)),
        *(key for name in apps for key in _declared(f"{APPS}.{name}", AppSettings)),
    ]
    return KEYS | {key.dotted: key for key in named}


def section_of(name: str) -> str:
    """Return the section of one upstream; that without a name is the default one."""
    return f"{UPSTREAMS}.{name}" if name else "upstream"


# --- the example file ---


def example() -> str:
    """Return a configuration file that explains every key and changes none."""
    lines = [*_EXAMPLE_HEAD.splitlines()]
    section = ""
    for key in KEYS.values():
        if key.section != section:
            section = key.section
            if section == "forward":  # it follows [upstream]
                lines += _named_upstreams()
            lines += ["", "", f"[{section}]", *_comment(_HELP[section])]
        text = f"{key.help.text} Allowed: {key.allowed}."
        lines += ["", *_comment(text), f"#{key.name} = {toml(key.default)}"]
    lines += _apps()
    return "\n".join(lines) + "\n"


def _named_upstreams() -> Iterator[str]:
    """Yield what the example says of sections that nobody has by default."""
    yield from ("", "", *_EXAMPLE_UPSTREAM.splitlines(), "#", *_comment(_HELP[UPSTREAMS]))
    for key in _declared(UPSTREAMS, NamedUpstream):
        if f"upstream.{key.name}" not in KEYS:
            yield "#"
            yield from _comment(f"{key.name}: {key.help.text} Allowed: {key.allowed}.")


def _apps() -> Iterator[str]:
    """The same of apps."""
    yield from ("", "", *_EXAMPLE_APP.splitlines(), "#", *_comment(_HELP[APPS]))
    for key in _declared(APPS, AppSettings):
        yield "#"
        yield from _comment(f"{key.name}: {key.help.text} Allowed: {key.allowed}.")


_EXAMPLE_APP = """\
# [apps.pos]
# users = ["pos"]
# max_size = "100MiB\""""

_EXAMPLE_UPSTREAM = """\
# [upstreams.crm]
# url = "https://app.tranthor.com"
# write_key_file = "crm_key"
# app_key_files = ["crm_key"]"""


_EXAMPLE_HEAD = """\
# The configuration of tranthor-agent.
#
# Every key is here, commented out at its default: remove the "#" before those you change. Two are
# needed before anything is delivered: url and a write key, both under [upstream]. Until then the
# agent stores events and waits, and loses none.
#
# Durations are text with a unit: "500ms", "30s", "5m", "1h30m", "7d". So are sizes: "512KiB",
# "5MiB", "1GiB", or KB, MB, GB by the thousand. A relative path starts at the folder of this file.
#
# Any key can also be set in the environment, and wins there: timeout under [upstream] is
# TRANTHOR_AGENT_UPSTREAM__TIMEOUT. Commas separate the entries of a list.
#
# `tranthor-agent config check` tests this file; `config show` says what is in effect, and why."""


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- how values are written ---


def toml(value: object) -> str:
    """Return *value* as it stands in TOML; None, and a path not chosen, is the empty text."""
    match value:
        case Seconds() | Bytes():
            return f'"{value.text}"'
        case bool():
            return json.dumps(value)
        case int():
            return str(value)
        case tuple():
            return f"[{', '.join(map(toml, value))}]"
        case None:
            return '""'
        case Path():
            return _quoted("" if value == Path() else str(value))
        case ProxyUrl():
            return _quoted(without_credentials(value))
        case _:
            return _quoted(str(value))


def shown(key: Key, raw: object) -> str:
    """Return what a person gave, for an error message: short, on one line, and no secret in it."""
    if key.secret or (key.base is ProxyUrl and not isinstance(raw, str)):
        return MASK
    if key.help.check is sha256_digests:  # someone may have written the key in place of its digest
        return MASK
    if key.help.check in {server_root, http_proxy} and isinstance(raw, str):
        raw = without_credentials(raw)
    text = _quoted(raw) if isinstance(raw, str) else json.dumps(raw, default=str)
    return text if len(text) <= _COLUMNS else f"{text[:_COLUMNS]}..."


def bare(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    # Letters of any language stay readable; what would move the cursor or end the line does not.
    return json.dumps(text, ensure_ascii=not text.isprintable())
