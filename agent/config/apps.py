"""What apps are known by: the write keys and the users of this machine that sections claim.

Where two sections claim the same, nobody could say whose an event is: that is a fault. A key file
that cannot be read, or a user that this machine does not have, is a problem that may pass.
"""

from __future__ import annotations

import pwd
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent.config.credentials import read_key
from agent.keys import APPS, bare, section_of, toml
from agent.units import WriteKey, app_keys, key_digest


def claimed_keys(
    values: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the digests of apps' keys with the upstreams that claim each, and what cannot be read."""
    claims: dict[str, list[str]] = {}
    problems: list[str] = []
    for name in names:
        section = section_of(name)
        digests = set(values.get(f"{section}.app_key_sha256", ()))
        for path in values.get(f"{section}.app_key_files", ()):
            where = f"{section}.app_key_files = {toml(path)}"
            try:
                key = read_key(path, WriteKey)
            except OSError as exc:
                problems.append(
                    f"{where}: cannot be read ({exc.strerror}); check the path and its permissions"
                )
                continue
            if key is None:
                problems.append(f"{where}: the file is empty; put the app's write key into it")
            else:
                digests |= set(map(key_digest, app_keys(key.reveal())))
        for digest in sorted(digests):
            claims.setdefault(digest, []).append(name)
    return claims, problems


def claimed_users(
    values: Mapping[str, Any], apps: Sequence[str]
) -> tuple[dict[int, list[str]], list[str]]:
    """Return the users with the apps that claim each, and those that this machine does not have."""
    claims: dict[int, list[str]] = {}
    problems: list[str] = []
    for name in apps:
        uids, strangers = uids_of(f"{APPS}.{name}.users", values)
        problems += strangers
        for uid in sorted(uids):
            claims.setdefault(uid, []).append(name)
    return claims, problems


def uids_of(dotted: str, values: Mapping[str, Any]) -> tuple[set[int], list[str]]:
    """Return the numbers of the users that a key names, and a problem for each that is unknown."""
    uids: set[int] = set()
    problems: list[str] = []
    for user in values.get(dotted, ()):
        try:
            uids.add(int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid)
        except KeyError:
            problems.append(f"{dotted}: this machine has no user {bare(user)}; until then, nobody")
    return uids, problems


def disputed_keys(claims: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a fault for each key that several upstreams claim; *claims* as `claimed_keys` has them."""
    for digest, claimants in claims.items():
        if len(claimants) > 1:
            first, second, *_ = claimants
            yield (
                f"[{section_of(first)}] and [{section_of(second)}] claim the same app's key (SHA-256"
                f" {digest[:12]}...): leave it to one of them"
            )


def disputed_users(claims: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Yield a fault for each user that several apps claim; *claims* as `claimed_users` has them."""
    for uid, claimants in claims.items():
        if len(claimants) > 1:
            first, second, *_ = claimants
            yield (
                f"[{APPS}.{first}] and [{APPS}.{second}] claim the same user (number {uid}): leave"
                " it to one of them"
            )
