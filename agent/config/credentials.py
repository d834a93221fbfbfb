"""The agent's own secrets: what each is called, where it is looked for, and whether it is one.

A secret stands in the configuration, in a file that it names, or is handed over by systemd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from agent.config.places import credential_path
from agent.keys import section_of, toml
from agent.redaction import hash_key
from agent.units import Secret, WriteKey

CREDENTIAL = "write_key"
HASH_KEY, HASH_CREDENTIAL = "redact.key", "redact_key"

S = TypeVar("S", bound=Secret)

_KEY_BYTES = 8_192
"""The longest write key file that is read: servers refuse longer headers, and it is no key."""


def credential_of(name: str) -> str:
    """Return what systemd calls the write key of that upstream."""
    return f"{CREDENTIAL}.{name}" if name else CREDENTIAL


def secrets_of(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the keys that hold a secret, or have it in a file, and the credential of each."""
    for name in ("", *names):
        yield f"{section_of(name)}.write_key", credential_of(name)
    yield HASH_KEY, HASH_CREDENTIAL


def settle_key(
    dotted: str,
    kind: type[S],
    check: Callable[[S], S],
    values: dict[str, Any],
    origins: dict[str, str],
    credential: Path | None,
) -> Iterator[str]:
    """Put the key that counts into *values*, or yield what is wrong with it.

    *credential* is where systemd hands it over, if it does.
    """
    where = dotted
    key: S | None = values.get(dotted)
    try:
        if path := values.get(f"{dotted}_file"):
            where, origins[dotted] = f"{dotted}_file = {toml(path)}", str(path)
            key = read_key(path, kind)
            if key is None:
                word = "write key" if kind is WriteKey else "key"
                yield f"{where}: the file is empty; put the {word} into it"
        elif key is None and credential is not None and credential.exists():
            where = f"{dotted} (systemd credential {credential.name})"
            # The unit gives an empty one where no key was installed yet: that is none.
            key = read_key(credential, kind)
            if key is not None:
                origins[dotted] = f"credential {credential.name}"
        if key is not None:
            key = check(key)
    except OSError as exc:
        key = None
        yield f"{where}: cannot be read ({exc.strerror}); check the path and its permissions"
    except ValueError as exc:
        key = None
        yield f"{where}: {exc}"
    values[dotted] = key


def settle_hash_key(
    values: dict[str, Any], origins: dict[str, str], environ: Mapping[str, str], file: Path | None
) -> Iterator[str]:
    """Put the key of `redact.hash` into *values*, or yield why there is none."""
    credential = credential_path(HASH_CREDENTIAL, environ, file)
    problems = list(settle_key(HASH_KEY, Secret, hash_key, values, origins, credential))
    yield from problems
    if values[HASH_KEY] is None and not problems:
        where = f" in {file}" if file else ""
        yield (
            f"redact.hash needs a key, and there is none: set {HASH_KEY}_file{where}, or hand over the"
            f" systemd credential {HASH_CREDENTIAL}"
        )


def read_key(path: Path, kind: type[S]) -> S | None:
    """Return the key in *path*, None if it is blank. What is not ASCII stays so, to be told later."""
    with path.open("rb") as file:
        text = file.read(_KEY_BYTES).decode("utf-8-sig", "replace").strip()
    return kind(text) if text else None
