"""What a configuration read anew changes while the agent runs. Pure.

    in force, read anew ──decide──▶ Takeover: what is in force now, and what waits for the next start
                                  ▶ Refusal:  why the one in force stays

An agent that can deliver never lets go of that for a configuration with which it could not: a key
file caught empty, a certificate that is gone. None takes one by which it would store what it is
told to hash. Values appear in no text, for some are secret. The
daemon reads, asks and carries out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.settings import NamedUpstream, Settings

AT_START = frozenset(
    {"ingest.host", "ingest.port", "ingest.unix_socket", "outbox.path", "log.format"}
)
"""What is bound, opened or begun once: listening sockets, the database, the form of the log. So is
which upstreams there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """*settings* are in force from now on; *changed* names their new keys, "upstream.url".

    *postponed* names the keys of which the old value stays until the next start.
    """

    settings: Settings
    changed: tuple[str, ...]
    postponed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """*why* is a sentence for a person."""

    why: str


def decide(old: Settings, new: Settings, problems: Sequence[str]) -> Takeover | Refusal:
    """Return what to make of *new*, read while *old* is in force.

    *problems* are what is wrong with *new*, and was not with *old*.
    """
    if (problems and _can_deliver(old)) or new.redact.unhashable:
        return Refusal("; ".join(problems))
    kept = _kept_upstreams(old, new)
    differing = [
        _dotted(section, key) for section, key in _keys() if _differ(old, new, section, key)
    ]
    return Takeover(
        settings=_keeping(old, new),
        changed=(
            *(key for key in differing if key not in AT_START),
            *(f"upstreams.{name}" for name in kept if kept[name] != old.upstreams[name]),
        ),
        postponed=(
            *(key for key in differing if key in AT_START),
            *(("upstreams",) if old.upstreams.keys() != new.upstreams.keys() else ()),
        ),
    )


def _can_deliver(settings: Settings) -> bool:
    return bool(settings.upstream.url) and settings.upstream.write_key is not None


def _keeping(old: Settings, new: Settings) -> Settings:
    """Return *new* with what only a start can change as it is in *old*."""
    sections = {}
    for section in _sections():
        kept = {
            key: getattr(getattr(old, section.name), key)
            for owner, key in _keys()
            if owner == section.name and _dotted(owner, key) in AT_START
        }
        sections[section.name] = msgspec.structs.replace(getattr(new, section.name), **kept)
    return Settings(**sections, upstreams=_kept_upstreams(old, new))


def _kept_upstreams(old: Settings, new: Settings) -> dict[str, NamedUpstream]:
    """Return the sections in force of the names that there were: each has a forwarder for life."""
    return {name: new.upstreams.get(name, section) for name, section in old.upstreams.items()}


def _differ(old: Settings, new: Settings, section: str, key: str) -> bool:
    before: Any = getattr(getattr(old, section), key)
    after: Any = getattr(getattr(new, section), key)
    return bool(before != after)


def _keys() -> Iterator[tuple[str, str]]:
    for section in _sections():
        for key in msgspec.structs.fields(type(section.default)):
            yield section.name, key.name


def _sections() -> Iterator[Any]:
    return (it for it in msgspec.structs.fields(Settings) if it.name != "upstreams")


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}"
