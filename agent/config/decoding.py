"""Raw values to those of the settings, each by its key; and what cannot stand together. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from agent.keys import Key, section_of, toml
from agent.settings import Forward
from agent.units import Bytes, Seconds, Secret

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def decode(key: Key, raw: object, folder: Path) -> Any:
    """Return the value of *key*. Raises ValueError with what is allowed, never with the value."""
    if key.optional and isinstance(raw, str) and not raw.strip():
        return None
    try:
        value = msgspec.convert(raw, key.type, dec_hook=_decode_own)
    except msgspec.ValidationError as exc:
        own = isinstance(exc.__cause__, ValueError)
        raise ValueError(str(exc) if own else f"expected {key.allowed}") from None
    if not key.secret and any(map(_CONTROL.search, _texts(raw))):
        raise ValueError("a control character cannot be meant: remove it")
    low, high = key.help.low, key.help.high
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"expected {key.allowed}")
    if isinstance(value, Path) and value != Path():
        value = _absolute(value, folder)
    if key.base == tuple[Path, ...]:
        value = tuple(_absolute(path, folder) for path in value)
    return value if key.help.check is None else key.help.check(value)


def _decode_own(kind: Any, raw: object) -> object:
    if issubclass(kind, Seconds | Bytes):
        return kind.parse(raw)
    if not isinstance(raw, str):
        raise ValueError("expected text in quotes")  # noqa: TRY004  # msgspec passes on a ValueError
    return kind(raw.strip() if issubclass(kind, Secret) else raw)


def _texts(raw: object) -> list[str]:
    return [text for text in (raw if isinstance(raw, list) else [raw]) if isinstance(text, str)]


def _absolute(path: Path, folder: Path) -> Path:
    try:
        return folder / path.expanduser()
    except RuntimeError:
        raise ValueError("there is no home folder for ~: write the whole path") from None


def contradictions(
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    *,
    secrets: Iterable[str],
    names: Iterable[str],
) -> Iterator[str]:
    """Yield a fault for each pair of *values* of which one makes the other senseless.

    *secrets* are the keys that may stand in a file instead, *names* those of the named upstreams.
    """
    for dotted in secrets:
        if values.get(dotted) and values.get(f"{dotted}_file"):
            section, _, key = dotted.rpartition(".")
            yield (
                f"[{section}] {key} ({origins[dotted]}) and {key}_file ({origins[f'{dotted}_file']})"
                " are both set: keep one, and make the other empty"
            )
    for section in map(section_of, ("", *names)):
        if values.get(f"{section}.client_key") and not values.get(f"{section}.client_cert"):
            yield f"[{section}] client_key is of no use without client_cert: set both, or neither"
    base = values.get("forward.backoff_base", Forward().backoff_base)
    cap = values.get("forward.backoff_max", Forward().backoff_max)
    if cap < base:
        yield (
            f"[forward] backoff_max = {toml(cap)}: shorter than backoff_base = {toml(base)};"
            " raise the one or lower the other"
        )
