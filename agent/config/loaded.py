"""What a configuration came to: the settings in effect, and where each came from. Pure.

Made by `agent.config.loading`; read by the daemon and by every command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.keys import Key, keys_with, section_of, toml
from agent.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The settings in effect and where they came from.

    *file* is None when none was found. *origins* has every key ("upstream.url"): "default", the path
    of a file, "environment NAME" or "credential write_key". *problems* are sentences for a person.
    *app_keys* has for the digest of an app's write key the upstream that its events are for;
    *unknown_app_keys* is not empty while there is one that could not be read. *app_users* has for the
    number of a user the app that its events on the Unix socket are from; only *socket_users* may post
    there, None: whoever can. *machine_id* is empty unless it is to be added to each event.
    """

    settings: Settings
    file: Path | None
    origins: Mapping[str, str]
    problems: tuple[str, ...]
    app_keys: Mapping[str, str] = field(default_factory=dict)
    unknown_app_keys: str = ""
    app_users: Mapping[int, str] = field(default_factory=dict)
    socket_users: frozenset[int] | None = None
    machine_id: str = ""

    def missing(self, name: str = "") -> str | None:
        """Return why nothing can be forwarded to the upstream of that name; None when it can."""
        upstream, section = self.settings.upstream_of(name), section_of(name)
        where = f" in {self.file}" if self.file else "; `tranthor-agent config init` writes a file"
        key = f"{section}.write_key (or write_key_file)"
        known = next((it for it in self.problems if it.startswith(f"{section}.write_key")), "")
        if not upstream.url and upstream.write_key is None and not known:
            return f"no upstream is configured: set {section}.url and {key}{where}"
        if not upstream.url:
            return f"no upstream is configured: set {section}.url{where}"
        if upstream.write_key is None:
            return known or f"no write key is configured: set {key}{where}"
        return None

    @property
    def unhashable(self) -> str | None:
        """Why no event may be taken: values are to be hashed, and there is no key; else None."""
        if not self.settings.redact.unhashable:
            return None
        return next(problem for problem in self.problems if problem.startswith("redact."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """One key for `config show`: *value* as it would stand in TOML, secrets masked."""

    key: str
    value: str
    origin: str


def effective(loaded: Loaded) -> list[Effective]:
    """Return every key with its value in effect, in the order of `agent.keys.example`."""
    return [
        Effective(
            key=key.dotted,
            value=toml(value_of(loaded.settings, key)),
            origin=loaded.origins[key.dotted],
        )
        for key in keys_with(loaded.settings.upstreams, loaded.settings.apps).values()
    ]


def value_of(settings: Settings, key: Key) -> object:
    """Return what *settings* have for *key*."""
    section, _, name = key.section.partition(".")
    table = getattr(settings, section)
    table = table[name] if name else table
    return getattr(table, key.name)
