"""File, environment and what lies beside them -> `Loaded`, or a ConfigError with a line per fault.

Called at start-up by the commands and the daemon, and again by the daemon when it is told to read
anew, or when a file beside the configuration changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.config.apps import claimed_keys, claimed_users, disputed_keys, disputed_users, uids_of
from agent.config.credentials import (
    HASH_CREDENTIAL,
    credential_of,
    secrets_of,
    settle_hash_key,
    settle_key,
)
from agent.config.decoding import contradictions, decode
from agent.config.given import given_values, misspelt, names_of, tables_of
from agent.config.loaded import Loaded, value_of
from agent.config.places import (
    FILE_VARIABLE,
    credential_path,
    first_there,
    outbox_path,
    search_path,
)
from agent.errors import ConfigError
from agent.keys import APPS, STRUCTS, UPSTREAMS, keys_with, section_of, shown, toml
from agent.redaction import machine_id
from agent.settings import AppSettings, NamedUpstream, Settings
from agent.units import WriteKey, why_readable, write_key

MACHINE_ID_FILE = Path("/etc/machine-id")


def load(
    path: Path | None, environ: Mapping[str, str], *, search: Sequence[Path] | None = None
) -> Loaded:
    """Return the settings of file, environment and credentials; the environment wins.

    *path* is the file that a person named, else $TRANTHOR_AGENT_CONFIG, else the first of *search*
    (by default `search_path`) that exists, else none. Raises ConfigError with a line per fault.
    """
    variable = environ.get(FILE_VARIABLE)
    named = path or (Path(variable) if variable else None)
    file = named.absolute() if named else first_there(search_path() if search is None else search)
    faults: list[str] = []
    values: dict[str, Any] = {}
    tables = {} if file is None else tables_of(file)
    names, apps = (names_of(family, file, tables, environ, faults) for family in (UPSTREAMS, APPS))
    keys = keys_with(names, apps)
    origins = dict.fromkeys(keys, "default")
    for given in given_values(file, tables, environ, keys, faults):
        key = given.key
        try:
            values[key.dotted] = decode(key, given.raw, given.folder)
        except ValueError as exc:
            faults.append(f"{given.where} = {shown(key, given.raw)}: {exc}")
        origins[key.dotted] = given.origin
    secrets = (dotted for dotted, _ in secrets_of(names))
    claims, _ = claimed_keys(values, names)
    users, _ = claimed_users(values, apps)
    faults.extend(
        f"{file or 'environment'}: {fault}"
        for fault in (
            *contradictions(values, origins, secrets=secrets, names=names),
            *disputed_keys(claims),
            *disputed_users(users),
        )
    )
    if faults:
        raise ConfigError("\n".join(faults))
    return _settled(values, origins, environ, file, names, apps)


def refresh(loaded: Loaded, environ: Mapping[str, str]) -> Loaded:
    """Return *loaded* with the files beside the configuration read anew; itself it is not."""
    names, apps = sorted(loaded.settings.upstreams), sorted(loaded.settings.apps)
    values = {key.dotted: value_of(loaded.settings, key) for key in keys_with(names, apps).values()}
    origins = dict(loaded.origins)
    for dotted, credential in secrets_of(names):
        if values[f"{dotted}_file"] or origins[dotted] == f"credential {credential}":
            values[dotted] = None
    # Where the configuration itself holds what is no key, no file mends that.
    own = tuple(f"{section_of(name)}.write_key:" for name in ("", *names))
    lasting = tuple(problem for problem in loaded.problems if problem.startswith(own))
    told = {problem.partition(":")[0] for problem in lasting}
    settled = _settled(values, origins, environ, loaded.file, names, apps, told=told)
    return replace(settled, problems=(*lasting, *settled.problems))


def files_beside(loaded: Loaded, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files that the configuration draws from, there or not: of keys and of TLS."""
    files: list[Path | None] = []
    for name in ("", *loaded.settings.upstreams):
        upstream = loaded.settings.upstream_of(name)
        key = upstream.write_key_file or credential_path(credential_of(name), environ, loaded.file)
        files += (key, upstream.ca_file, upstream.client_cert, upstream.client_key)
    for named in loaded.settings.upstreams.values():
        files += named.app_key_files
    if (redact := loaded.settings.redact).hash:
        files += (redact.key_file or credential_path(HASH_CREDENTIAL, environ, loaded.file),)
    return tuple(file for file in files if file is not None)


def _settled(
    values: dict[str, Any],
    origins: dict[str, str],
    environ: Mapping[str, str],
    file: Path | None,
    names: Sequence[str],
    apps: Sequence[str],
    *,
    told: Collection[str] = (),
) -> Loaded:
    """Return the decoded *values* with what lies outside of the file.

    The keys *told* are known to be none, and nothing stands in for them.
    """
    claims, unread = claimed_keys(values, names)
    users, strangers = claimed_users(values, apps)
    socket_users, unknown = uids_of("ingest.unix_socket_users", values)
    problems = [*unread, *strangers, *unknown]
    for name in ("", *names):
        dotted, credential = f"{section_of(name)}.write_key", credential_of(name)
        if dotted not in told:
            handed_over = credential_path(credential, environ, file)
            problems += settle_key(dotted, WriteKey, write_key, values, origins, handed_over)
        problems += _unreadable(section_of(name), values)
        problems += _in_clear(section_of(name), values)
    if values.get("redact.hash"):
        problems += settle_hash_key(values, origins, environ, file)
    machine, unknown_machine = _machine(values)
    problems += (*unknown_machine, *misspelt(environ, keys_with(names, apps)))
    if values.get("outbox.path", Path()) == Path():
        values["outbox.path"], origins["outbox.path"] = outbox_path(environ, file)
    return Loaded(
        settings=_build(values, names, apps),
        file=file,
        origins=origins,
        problems=tuple(problems),
        app_keys={digest: claimants[0] for digest, claimants in claims.items()},
        unknown_app_keys=next(iter(unread), ""),
        app_users={uid: claimants[0] for uid, claimants in users.items()},
        # None of those that were named is none, and not everyone.
        socket_users=frozenset(socket_users) if values.get("ingest.unix_socket_users") else None,
        machine_id=machine,
    )


def _unreadable(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each file of TLS that cannot be read."""
    for name in (f"{section}.{key}" for key in ("ca_file", "client_cert", "client_key")):
        path: Path | None = values.get(name)
        if path is None:
            continue
        try:
            with path.open("rb"):
                pass
        except OSError as exc:
            yield (
                f"{name} = {toml(path)}: cannot be read ({exc.strerror});"
                " check the path and its permissions"
            )


def _in_clear(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem if whoever is on the way could read what is sent."""
    url = values.get(f"{section}.url")
    if url and (why := why_readable(url, values.get(f"{section}.proxy"))):
        yield f"{section}.url = {toml(url)} {why}"


def _machine(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the id of this machine if it is to be added to each event, and why it cannot be."""
    if not values.get("context.machine_id"):
        return "", []
    try:
        return machine_id(MACHINE_ID_FILE.read_text(errors="replace").strip()), []
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        problem = (
            f"context.machine_id = true: {MACHINE_ID_FILE}: {why}; set it to false, and name the"
            ' machine in context.agent: "machine=till-7"'
        )
        return "", [problem]


def _build(values: Mapping[str, Any], names: Sequence[str], apps: Sequence[str]) -> Settings:
    """Return the settings of *values*; what is not in them stands at its default."""

    def given(section: str) -> dict[str, Any]:
        start = f"{section}."
        return {
            dotted.removeprefix(start): value
            for dotted, value in values.items()
            if dotted.startswith(start)
        }

    sections = {section: struct(**given(section)) for section, struct in STRUCTS.items()}
    upstreams = {name: NamedUpstream(**given(section_of(name))) for name in names}
    named_apps = {name: AppSettings(**given(f"{APPS}.{name}")) for name in apps}
    return Settings(**sections, upstreams=upstreams, apps=named_apps)
