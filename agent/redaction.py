"""What of an event is dropped or hashed, and what is added to it, before anything is stored. Pure.

    fields as checked ──refine──▶ fields as they are encoded, digested, stored and sent

A path is names with dots between them: `properties.email`. An array is gone through: what holds of
a value holds of each of its elements. `*` is any one name, and a name in quotes is just that name:
`properties."e.mail"`. Where paths overlap, the outer one counts, and dropping before hashing.

Nothing here depends on clock, order or process, so that a retry comes out as the same bytes. The
configuration is checked by `droppable` and `hashable`; the daemon hands what `refinement` returns
to intake, which calls it once for each event.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec

from agent.errors import InvalidEventError
from agent.units import Secret

Refine = Callable[[dict[str, Any]], None]
"""Edits the fields of an event in place. What was a valid event still is one, unless it has come to be
too large: then `InvalidEventError`."""

APP = "app"
"""Holds what an app has as context.agent that is no object: it is kept, beside what is added."""

MACHINE_ID = "machineId"


def refinement(
    *,
    drop: Iterable[str] = (),
    hashed: Sequence[str] = (),
    key: Secret | None = None,
    agent: Mapping[str, str] | None = None,
) -> Refine | None:
    """Return what makes of an app's event the one that is stored; None if that is the same.

    The paths were checked; *hashed* ones need the *key*. *agent* is added to context.agent.
    """
    if hashed and key is None:
        raise ValueError("without a key the values at these paths would be stored as they are")
    secret = key.reveal().encode() if key is not None else b""
    added = dict(agent or {})
    rules = [(_names(path), _Verdict.DROP) for path in drop]
    rules += [(_names(path), _Verdict.HASH) for path in hashed]
    if not rules and not added:
        return None
    tree = _tree(rules)

    def refine(fields: dict[str, Any]) -> None:
        _redact(fields, tree, _Hashing(secret))
        if added:
            _add(fields, added)

    return refine


def hash_of(value: object, key: bytes) -> str:
    """Return HMAC-SHA256 of a text, or of the JSON of anything else with its keys in order, in hex."""
    text = value.encode() if isinstance(value, str) else msgspec.json.encode(value, order="sorted")
    return hmac.digest(key, text, "sha256").hex()


# --- the rules, as a tree of names ---


class _Verdict(Enum):
    DROP = "drop"
    HASH = "hash"


_ANY = None
"""What `*` stands as among names: no name is it."""

_Names = tuple[str | None, ...]
_Tree = dict[str | None, "_Verdict | _Tree"]


def _tree(rules: Sequence[tuple[_Names, _Verdict]]) -> _Tree:
    """Return for each first name what is done with its value, or the rules for what is below.

    What holds of any name is told at each that is named, too, so that one look-up finds it all.
    """
    return {
        name: _below([(names[1:], verdict) for names, verdict in rules if names[0] in {name, _ANY}])
        for name in dict.fromkeys(names[0] for names, _ in rules)
    }


def _below(rules: Sequence[tuple[_Names, _Verdict]]) -> _Verdict | _Tree:
    ended = {verdict for names, verdict in rules if not names}
    if not ended:
        return _tree(rules)
    return _Verdict.DROP if _Verdict.DROP in ended else _Verdict.HASH


def _redact(value: object, tree: _Tree, hashing: _Hashing) -> None:
    if isinstance(value, list):
        for item in value:
            _redact(item, tree, hashing)
    elif isinstance(value, dict):
        for name in list(value) if _ANY in tree else [name for name in tree if name in value]:
            match tree.get(name, tree.get(_ANY)):
                case _Verdict.DROP:
                    del value[name]
                case _Verdict.HASH:
                    value[name] = hashing.of(value[name])
                case dict() as below:
                    _redact(value[name], below, hashing)
                case None:
                    pass


_HASH_BYTES = 67
"""What a hash takes in an array or object: 64 digits, quotes and a comma."""

_MOST_HASHES = 5_242_880 // _HASH_BYTES
"""With more of them no event keeps within the upstream's limit; an array of 5 MiB would come to 170 MiB."""


class _Hashing:
    """Hashes the values of one event, as many as one may have."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._left = _MOST_HASHES

    def of(self, value: object) -> object:
        if isinstance(value, list):
            return [self.of(item) for item in value]
        if value is None:
            return None  # it says that there is nothing, and goes on saying so
        if self._left == 0:
            raise InvalidEventError(
                f"body: over {_MOST_HASHES} values are to be hashed here, and the hashes would not fit"
                " into an event; send less, or split it",
                status=413,
                code="FST_ERR_CTP_BODY_TOO_LARGE",
            )
        self._left -= 1
        return hash_of(value, self._key)


def _add(fields: dict[str, Any], added: Mapping[str, str]) -> None:
    """Put *added* into context.agent, where it wins over what an app has by the same name."""
    context = fields.setdefault("context", {})
    own = context.get("agent")
    if own is not None and not isinstance(own, dict):
        own = {APP: own}
    context["agent"] = {**(own or {}), **added}


# --- what may be configured: each returns it, or says what to write ---


def droppable(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return *paths*. Raises ValueError for what is no path, and where an event would be none."""
    return _checked(paths, _NOT_DROPPED)


def hashable(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return *paths*. Raises ValueError for what is no path, and where no text may stand."""
    return _checked(paths, _NOT_HASHED)


_FIELDS = (
    "messageId",
    "event",
    "userId",
    "anonymousId",
    "timestamp",
    "context",
    "properties",
    "traits",
    "files",
    "name",
    "groupId",
    "assigned",
)
"""The contract's. Any other at the top is a slip more often than an app's own: it needs quotes."""

_KNOWN_BY = "an event is known by it, here and upstream"
_WHOSE = "an event must say whose it is: hash it"
_WHOLE_FILE = "a file without it is refused upstream: drop files, or hash files.name and files.data"
_OBJECT = 'it must stay an object: hash what is in it, such as "{}.*"'

_NOT_DROPPED: Mapping[_Names, str] = {
    ("messageId",): _KNOWN_BY,
    ("event",): _KNOWN_BY,
    ("userId",): _WHOSE,
    ("anonymousId",): _WHOSE,
    ("groupId",): "a group event must have it: hash it",
    **{("files", name): _WHOLE_FILE for name in ("type", "name", "mimeType", "data")},
}
_NOT_HASHED: Mapping[_Names, str] = {
    ("messageId",): _KNOWN_BY,
    ("event",): _KNOWN_BY,
    ("timestamp",): "it must stay a time; dropped, it becomes the time of receipt",
    **{(name,): _OBJECT.format(name) for name in ("context", "properties", "traits")},
    ("files",): "it must stay a list of files: drop it, or hash files.name and files.data",
    ("files", "type"): "it must stay what it is, or the file is refused upstream",
    ("assigned",): "it must stay true or false: drop it",
}

_NAME = r'"[^"]*"|[\w-]+|\*'
_PATH = re.compile(rf"(?:{_NAME})(?:\.(?:{_NAME}))*")


def _checked(paths: tuple[str, ...], forbidden: Mapping[_Names, str]) -> tuple[str, ...]:
    for path in paths:
        shown = json.dumps(path, ensure_ascii=False)
        if not _PATH.fullmatch(path):
            raise ValueError(
                f"{shown} is no path. Write names with dots between them, and in quotes what is more"
                ' than letters, digits, "_" and "-": \'properties."e.mail"\'. An array needs no sign'
            )
        names = _names(path)
        if names[0] not in {*_FIELDS, _ANY} and not path.startswith('"'):
            raise ValueError(
                f"{shown} begins with no field of an event, such as properties, traits or context;"
                " a field of an app's own beside those stands in quotes"
            )
        for kept, why in forbidden.items():
            if len(kept) == len(names) and all(
                name in {wanted, _ANY} for name, wanted in zip(names, kept, strict=True)
            ):
                raise ValueError(f"{shown} would take {'.'.join(map(str, kept))}, and {why}")
    return paths


def _names(path: str) -> _Names:
    return tuple(_ANY if name == "*" else name.strip('"') for name in re.findall(_NAME, path))


def additions(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return *entries*, "name=value" each, in one form. Raises ValueError."""
    return tuple(f"{name}={value}" for name, value in added_by(entries).items())


def added_by(entries: Iterable[str]) -> dict[str, str]:
    """Return what *entries* add, by name. Raises ValueError."""
    added: dict[str, str] = {}
    for entry in entries:
        name, _, value = (part.strip() for part in entry.partition("="))
        shown = json.dumps(entry, ensure_ascii=False)
        if not re.fullmatch(r"[\w-]+", name) or not value:
            raise ValueError(
                f'{shown} adds nothing: write a name and a text, such as "site=berlin-3"'
            )
        if name in {APP, MACHINE_ID, "__proto__"}:
            raise ValueError(f"{shown}: {name} has a meaning of its own: choose another name")
        if name in added:
            raise ValueError(f"{name} is there twice: keep one")
        added[name] = value
    return added


_MIN_KEY_CHARS = 16
"""Shorter, and whoever knows a value and its hash could find the key by trying."""


def hash_key(key: Secret) -> Secret:
    """Return *key*. Raises ValueError, which does not quote it."""
    text = key.reveal()
    if not (text.isascii() and text.isprintable()) or len(text) < _MIN_KEY_CHARS:
        raise ValueError(
            f"a key to hash with is one line of printable ASCII, {_MIN_KEY_CHARS} characters at least:"
            " make one with `openssl rand -hex 32`, the same for all machines whose users are the same"
        )
    return key


# --- this machine ---

_APP_ID = UUID("9a012db3-f662-48bc-afec-12faf9d8dd09").bytes
"""What makes our ids other than everybody else's for the same machine."""


def machine_id(text: str) -> str:
    """Return the id of a machine for us, of what stands in its /etc/machine-id. Raises ValueError.

    That one must not leave the machine: this is a keyed hash of it, as 32 hex digits.
    Source: machine-id(5), and sd_id128_get_machine_app_specific(3) for how it is made.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ValueError("it holds no machine id, which is 32 hex digits")
    digest = hmac.digest(bytes.fromhex(text), _APP_ID, "sha256")
    return UUID(bytes=digest[:16], version=4).hex
