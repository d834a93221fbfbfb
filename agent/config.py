"""The configuration: TOML, environment and credentials -> frozen `Settings`, or errors that help.

The keys are declared in `agent.settings`, and `agent.keys` has them as a table; this module finds
their values, and where each came from. Two kinds of fault:

    ConfigError   a value that cannot be meant (unknown key, bad unit, out of range): the daemon
                  does not start. All of them at once, one line each.
    problem       something outside the file is not right yet (no key file, no certificate): a
                  sentence in `Loaded.problems`. The daemon runs and stores; events wait.

Does not own what a setting does. Called at start-up by the commands and the daemon, and again by
the daemon when it is told to read anew, or when a file beside the configuration changed.
"""

from __future__ import annotations

import pwd
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_origin

import msgspec
import platformdirs

from agent.errors import ConfigError
from agent.keys import APPS, KEYS, PREFIX, STRUCTS, UPSTREAMS, Key, bare, keys_with, shown, toml
from agent.redaction import hash_key, machine_id
from agent.settings import (
    APP_NAME,
    DEFAULT_UPSTREAM,
    UPSTREAM_NAME,
    AppSettings,
    Forward,
    NamedUpstream,
    Settings,
)
from agent.units import (
    Bytes,
    Seconds,
    Secret,
    WriteKey,
    app_keys,
    key_digest,
    why_readable,
    write_key,
)

APP = "tranthor-agent"
FILE_VARIABLE = f"{PREFIX}CONFIG"
SYSTEM_FILE = Path("/etc/tranthor-agent/config.toml")
SYSTEM_STATE = Path("/var/lib/tranthor-agent")
MACHINE_ID_FILE = Path("/etc/machine-id")
CREDENTIAL = "write_key"
HASH_KEY, HASH_CREDENTIAL = "redact.key", "redact_key"

_KEY_BYTES = 8_192
"""The longest write key file that is read: servers refuse longer headers, and it is no key."""


# --- what the commands and the daemon ask for ---


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
        upstream, section = self.settings.upstream_of(name), _section(name)
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


def search_path() -> tuple[Path, ...]:
    """Return where a file is looked for when none is named; the first that is there counts."""
    return platformdirs.user_config_path(APP) / "config.toml", SYSTEM_FILE


def load(
    path: Path | None, environ: Mapping[str, str], *, search: Sequence[Path] | None = None
) -> Loaded:
    """Return the settings of file, environment and credentials; the environment wins.

    *path* is the file that a person named, else $TRANTHOR_AGENT_CONFIG, else the first of *search*
    (by default `search_path`) that exists, else none. Raises ConfigError with a line per fault.
    """
    variable = environ.get(FILE_VARIABLE)
    named = path or (Path(variable) if variable else None)
    file = named.absolute() if named else _first(search_path() if search is None else search)
    faults: list[str] = []
    values: dict[str, Any] = {}
    tables = {} if file is None else _sections(_parse(file))
    names, apps = (
        sorted({*_named_in_file(family, file, tables, faults), *_named_in_environ(family, environ)})
        for family in (UPSTREAMS, APPS)
    )
    keys = keys_with(names, apps)
    origins = dict.fromkeys(keys, "default")
    for given in [*_from_file(file, tables, keys, faults), *_from_environ(environ, keys, faults)]:
        key = given.key
        try:
            values[key.dotted] = _decode(key, given.raw, given.folder)
        except ValueError as exc:
            faults.append(f"{given.where} = {shown(key, given.raw)}: {exc}")
        origins[key.dotted] = given.origin
    claims, _ = _app_keys(values, names)
    users, _ = _app_users(values, apps)
    faults.extend(
        f"{file or 'environment'}: {fault}"
        for fault in (
            *_contradictions(values, origins, names),
            *_disputes(claims),
            *_user_disputes(users),
        )
    )
    if faults:
        raise ConfigError("\n".join(faults))
    return _settled(values, origins, environ, file, names, apps)


def refresh(loaded: Loaded, environ: Mapping[str, str]) -> Loaded:
    """Return *loaded* with the files beside the configuration read anew; itself it is not."""
    names, apps = sorted(loaded.settings.upstreams), sorted(loaded.settings.apps)
    values = {
        key.dotted: _value_of(loaded.settings, key) for key in keys_with(names, apps).values()
    }
    origins = dict(loaded.origins)
    for dotted, credential in _secrets(names):
        if values[f"{dotted}_file"] or origins[dotted] == f"credential {credential}":
            values[dotted] = None
    # Where the configuration itself holds what is no key, no file mends that.
    own = tuple(f"{_section(name)}.write_key:" for name in ("", *names))
    lasting = tuple(problem for problem in loaded.problems if problem.startswith(own))
    told = {problem.partition(":")[0] for problem in lasting}
    settled = _settled(values, origins, environ, loaded.file, names, apps, told=told)
    return replace(settled, problems=(*lasting, *settled.problems))


def files_beside(loaded: Loaded, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files that the configuration draws from, there or not: of keys and of TLS."""
    files: list[Path | None] = []
    for name in ("", *loaded.settings.upstreams):
        upstream = loaded.settings.upstream_of(name)
        key = upstream.write_key_file or _credential_path(
            _credential_of(name), environ, loaded.file
        )
        files += (key, upstream.ca_file, upstream.client_cert, upstream.client_key)
    for named in loaded.settings.upstreams.values():
        files += named.app_key_files
    if (redact := loaded.settings.redact).hash:
        files += (redact.key_file or _credential_path(HASH_CREDENTIAL, environ, loaded.file),)
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
    claims, unread = _app_keys(values, names)
    users, strangers = _app_users(values, apps)
    socket_users, unknown = _uids("ingest.unix_socket_users", values)
    problems = [*unread, *strangers, *unknown]
    for name in ("", *names):
        dotted, credential = f"{_section(name)}.write_key", _credential_of(name)
        if dotted not in told:
            handed_over = _credential_path(credential, environ, file)
            problems += _settle_key(dotted, WriteKey, write_key, values, origins, handed_over)
        problems += _file_problems(_section(name), values)
        problems += _readable(_section(name), values)
    if values.get("redact.hash"):
        problems += _settle_hash_key(values, origins, environ, file)
    machine = ""
    if values.get("context.machine_id"):
        try:
            machine = machine_id(MACHINE_ID_FILE.read_text(errors="replace").strip())
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else exc
            problems.append(f"context.machine_id = true: {MACHINE_ID_FILE}: {why}; {_INSTEAD}")
    problems += _near(environ, keys_with(names, apps))
    if values.get("outbox.path", Path()) == Path():
        values["outbox.path"], origins["outbox.path"] = _outbox_path(environ, file)
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


_INSTEAD = 'set it to false, and name the machine in context.agent: "machine=till-7"'


def effective(loaded: Loaded) -> list[Effective]:
    """Return every key with its value in effect, in the order of `agent.keys.example`."""
    return [
        Effective(
            key=key.dotted,
            value=toml(_value_of(loaded.settings, key)),
            origin=loaded.origins[key.dotted],
        )
        for key in keys_with(loaded.settings.upstreams, loaded.settings.apps).values()
    ]


def _value_of(settings: Settings, key: Key) -> object:
    section, _, name = key.section.partition(".")
    table = getattr(settings, section)
    table = table[name] if name else table
    return getattr(table, key.name)


def _build(values: Mapping[str, Any], names: Sequence[str], apps: Sequence[str]) -> Settings:
    def given(section: str) -> dict[str, Any]:
        start = f"{section}."
        return {
            dotted.removeprefix(start): value
            for dotted, value in values.items()
            if dotted.startswith(start)
        }

    sections = {section: struct(**given(section)) for section, struct in STRUCTS.items()}
    upstreams = {name: NamedUpstream(**given(_section(name))) for name in names}
    named_apps = {name: AppSettings(**given(f"{APPS}.{name}")) for name in apps}
    return Settings(**sections, upstreams=upstreams, apps=named_apps)


def _section(name: str) -> str:
    """Return the section of one upstream; that without a name is the default one."""
    return f"{UPSTREAMS}.{name}" if name else "upstream"


# --- reading ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """A value before it is decoded. *where* begins an error; relative paths start at *folder*."""

    key: Key
    raw: object
    where: str
    origin: str
    folder: Path


def _first(candidates: Sequence[Path]) -> Path | None:
    for candidate in candidates:
        try:
            candidate.stat()
        except PermissionError:
            # ProtectHome= makes a home like this, and there is no file for the agent in it. Below
            # /etc it is an operator outside the group, who must not be shown defaults instead.
            if candidate != SYSTEM_FILE:
                continue
        except OSError:
            continue
        return candidate
    return None


def _sections(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of a file by the names that stand in brackets above them."""
    sections = dict(tables)
    for family in (UPSTREAMS, APPS):
        if isinstance(sections.get(family), dict):
            named = sections.pop(family)
            sections |= {f"{family}.{name}": table for name, table in named.items()}
    return sections


_FAMILIES = {UPSTREAMS: (UPSTREAM_NAME, "an upstream"), APPS: (APP_NAME, "an app")}
"""Sections of which there is one for each name: what that may be, and of what."""


def _named_in_file(
    family: str, file: Path | None, tables: dict[str, Any], faults: list[str]
) -> Iterator[str]:
    """Yield the names of a *family*; sections that cannot be one are taken out of *tables*."""
    pattern, what = _FAMILIES[family]
    for section in [section for section in tables if section.startswith(f"{family}.")]:
        name = section.removeprefix(f"{family}.")
        if not isinstance(tables[section], dict):
            why = f"[{family}] {bare(name)}: write [{family}.NAME] above it"
        elif family == UPSTREAMS and name == DEFAULT_UPSTREAM:
            why = f"[{section}]: so the one of [upstream] is called: choose another name"
        elif not re.fullmatch(pattern, name):
            why = (
                f"[{family}.{bare(name)}]: the name of {what} has lower-case letters, digits"
                " and single dashes between them, 32 at most"
            )
        else:
            yield name
            continue
        faults.append(f"{file}: {why}")
        del tables[section]


def _named_in_environ(family: str, environ: Mapping[str, str]) -> Iterator[str]:
    pattern, _ = _FAMILIES[family]
    for variable in environ:
        found = re.fullmatch(rf"{PREFIX}{family.upper()}__([A-Z0-9_]+?)__[A-Z0-9_]+", variable)
        name = found[1].lower().replace("_", "-") if found else ""
        if re.fullmatch(pattern, name) and (family, name) != (UPSTREAMS, DEFAULT_UPSTREAM):
            yield name


def _from_file(
    file: Path | None, tables: Mapping[str, Any], keys: Mapping[str, Key], faults: list[str]
) -> Iterator[_Given]:
    if file is None:
        return
    sections = {key.section for key in keys.values()}
    for section, table in tables.items():
        if section not in sections:
            faults.append(f"{file}: {_unknown_section(section)}")
        elif not isinstance(table, dict):
            faults.append(
                f"{file}: {section} is a section: write [{section}], and its keys beneath"
            )
        else:
            for name, raw in table.items():
                where = f"{file}: [{section}] {bare(name)}"
                key = keys.get(f"{section}.{name}")
                if key is None and section == "upstream" and isinstance(raw, dict):
                    faults.append(f"{where}: did you mean [{UPSTREAMS}.{bare(name)}]?")
                elif key is None:
                    faults.append(f"{where}: {_unknown_key(section, name, keys)}")
                else:
                    yield _Given(
                        key=key, raw=raw, where=where, origin=str(file), folder=file.parent
                    )


def _parse(file: Path) -> dict[str, Any]:
    try:
        # Editors on Windows begin a file with a byte order mark, which TOML does not know.
        return tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such file; check --config and ${FILE_VARIABLE},"
            " or write one with `tranthor-agent config init`"
        ) from None
    except OSError as exc:
        raise ConfigError(
            f"{file}: cannot be read ({exc.strerror}); check its permissions and your groups"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: not UTF-8 (at byte {exc.start}); save it as UTF-8") from exc
    except tomllib.TOMLDecodeError as exc:
        quotes = "; texts, durations and sizes need quotes" if "Invalid value" in str(exc) else ""
        raise ConfigError(f"{file}: not valid TOML: {exc}{quotes}") from exc


def _from_environ(
    environ: Mapping[str, str], keys: Mapping[str, Key], faults: list[str]
) -> Iterator[_Given]:
    variables = {key.variable: key for key in keys.values()}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or "__" not in name:
            continue
        where = f"environment: {bare(name)}"
        key = variables.get(name)
        if key is None:
            faults.append(f"{where}: unknown variable; {_nearest(name, list(variables))}")
        else:
            yield _Given(
                key=key,
                raw=_untext(key, text),
                where=where,
                origin=f"environment {name}",
                folder=Path.cwd(),
            )


def _untext(key: Key, text: str) -> object:
    """Return what TOML would have given for *text*, so that both are decoded alike."""
    if get_origin(key.base) is tuple:
        return [entry for part in text.split(",") if (entry := part.strip())]
    if key.base is bool and text.strip() in {"true", "false"}:
        return text.strip() == "true"
    if key.base is int and re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII):
        return int(text)
    return text


def _unknown_section(section: str) -> str:
    home = next((key for key in KEYS.values() if key.name == section), None)
    if home is not None:
        return f"{section} stands in no section: put it beneath [{home.section}]"
    if section in _FAMILIES:
        return (
            f"{section} has a section for each name: write [{section}.NAME], and its keys beneath"
        )
    return f"[{bare(section)}]: unknown section; {_nearest(section, [*STRUCTS, *_FAMILIES])}"


def _unknown_key(section: str, name: str, keys: Mapping[str, Key]) -> str:
    home = next((key for key in keys.values() if key.name == name), None)
    if home is not None:
        return f"unknown key; it belongs to [{home.section}]"
    return f"unknown key; {_nearest(name, [k.name for k in keys.values() if k.section == section])}"


def _nearest(word: str, known: list[str]) -> str:
    import difflib  # noqa: PLC0415  # for a misspelt key only

    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {close[0]}?"
    if word.startswith(PREFIX):
        return (
            "`tranthor-agent config show` lists every key; TRANTHOR_AGENT_<SECTION>__<KEY> sets one"
        )
    return f"there are {', '.join(known)}"


def _near(environ: Mapping[str, str], keys: Mapping[str, Key]) -> Iterator[str]:
    """Yield a problem for each variable that lacks one underscore.

    It is no error, since Kubernetes makes such names by itself for a service "tranthor-agent-...".
    """
    for key in keys.values():
        variable = key.variable
        slip = variable.replace("__", "_")
        if slip in environ:
            yield f"environment: {slip} is ignored; did you mean {variable}?"


# --- decoding ---

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _decode(key: Key, raw: object, folder: Path) -> Any:
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


def _contradictions(
    values: Mapping[str, Any], origins: Mapping[str, str], names: Sequence[str]
) -> Iterator[str]:
    for dotted, _ in _secrets(names):
        if values.get(dotted) and values.get(f"{dotted}_file"):
            section, _, key = dotted.rpartition(".")
            yield (
                f"[{section}] {key} ({origins[dotted]}) and {key}_file ({origins[f'{dotted}_file']})"
                " are both set: keep one, and make the other empty"
            )
    for section in map(_section, ("", *names)):
        if values.get(f"{section}.client_key") and not values.get(f"{section}.client_cert"):
            yield f"[{section}] client_key is of no use without client_cert: set both, or neither"
    base = values.get("forward.backoff_base", Forward().backoff_base)
    cap = values.get("forward.backoff_max", Forward().backoff_max)
    if cap < base:
        yield (
            f"[forward] backoff_max = {toml(cap)}: shorter than backoff_base = {toml(base)};"
            " raise the one or lower the other"
        )


def _disputes(claims: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for digest, claimants in claims.items():
        if len(claimants) > 1:
            first, second, *_ = claimants
            yield (
                f"[{_section(first)}] and [{_section(second)}] claim the same app's key (SHA-256"
                f" {digest[:12]}...): leave it to one of them"
            )


def _user_disputes(claims: Mapping[int, Sequence[str]]) -> Iterator[str]:
    for uid, claimants in claims.items():
        if len(claimants) > 1:
            first, second, *_ = claimants
            yield (
                f"[{APPS}.{first}] and [{APPS}.{second}] claim the same user (number {uid}): leave"
                " it to one of them"
            )


# --- what lies outside the file ---


def _app_users(
    values: Mapping[str, Any], apps: Sequence[str]
) -> tuple[dict[int, list[str]], list[str]]:
    """Return the users with the apps that claim each, and those that this machine does not have."""
    claims: dict[int, list[str]] = {}
    problems: list[str] = []
    for name in apps:
        uids, strangers = _uids(f"{APPS}.{name}.users", values)
        problems += strangers
        for uid in sorted(uids):
            claims.setdefault(uid, []).append(name)
    return claims, problems


def _uids(dotted: str, values: Mapping[str, Any]) -> tuple[set[int], list[str]]:
    """Return the numbers of the users that a key names, and a problem for each that is unknown."""
    uids: set[int] = set()
    problems: list[str] = []
    for user in values.get(dotted, ()):
        try:
            uids.add(int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid)
        except KeyError:
            problems.append(f"{dotted}: this machine has no user {bare(user)}; until then, nobody")
    return uids, problems


def _app_keys(
    values: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the digests of apps' keys with the upstreams that claim each, and what cannot be read."""
    claims: dict[str, list[str]] = {}
    problems: list[str] = []
    for name in names:
        section = _section(name)
        digests = set(values.get(f"{section}.app_key_sha256", ()))
        for path in values.get(f"{section}.app_key_files", ()):
            where = f"{section}.app_key_files = {toml(path)}"
            try:
                key = _read_key(path, WriteKey)
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


S = TypeVar("S", bound=Secret)


def _settle_key(
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
            key = _read_key(path, kind)
            if key is None:
                word = "write key" if kind is WriteKey else "key"
                yield f"{where}: the file is empty; put the {word} into it"
        elif key is None and credential is not None and credential.exists():
            where = f"{dotted} (systemd credential {credential.name})"
            # The unit gives an empty one where no key was installed yet: that is none.
            key = _read_key(credential, kind)
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


def _settle_hash_key(
    values: dict[str, Any], origins: dict[str, str], environ: Mapping[str, str], file: Path | None
) -> Iterator[str]:
    """Put the key of `redact.hash` into *values*, or yield why there is none."""
    credential = _credential_path(HASH_CREDENTIAL, environ, file)
    problems = list(_settle_key(HASH_KEY, Secret, hash_key, values, origins, credential))
    yield from problems
    if values[HASH_KEY] is None and not problems:
        where = f" in {file}" if file else ""
        yield (
            f"redact.hash needs a key, and there is none: set {HASH_KEY}_file{where}, or hand over the"
            f" systemd credential {HASH_CREDENTIAL}"
        )


def _credential_of(name: str) -> str:
    return f"{CREDENTIAL}.{name}" if name else CREDENTIAL


def _secrets(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the keys that hold a secret, or have it in a file, and the credential of each."""
    for name in ("", *names):
        yield f"{_section(name)}.write_key", _credential_of(name)
    yield HASH_KEY, HASH_CREDENTIAL


def _credential_path(name: str, environ: Mapping[str, str], file: Path | None) -> Path | None:
    """Return where a systemd credential would be.

    A person's command has none handed over; with the system's configuration it means the service,
    and reads what the unit loads.
    """
    if folder := environ.get("CREDENTIALS_DIRECTORY"):
        return Path(folder) / name
    return SYSTEM_FILE.with_name(name) if file == SYSTEM_FILE else None


def _read_key(path: Path, kind: type[S]) -> S | None:
    """Return the key in *path*, None if it is blank. What is not ASCII stays so, to be told later."""
    with path.open("rb") as file:
        text = file.read(_KEY_BYTES).decode("utf-8-sig", "replace").strip()
    return kind(text) if text else None


def _file_problems(section: str, values: Mapping[str, Any]) -> Iterator[str]:
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


def _readable(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    url = values.get(f"{section}.url")
    if url and (why := why_readable(url, values.get(f"{section}.proxy"))):
        yield f"{section}.url = {toml(url)} {why}"


def _outbox_path(environ: Mapping[str, str], file: Path | None) -> tuple[Path, str]:
    # systemd.exec(5): several directories are separated by colons; the unit's first is ours.
    if state := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(state) / "outbox.db", "environment STATE_DIRECTORY"
    if file == SYSTEM_FILE:
        # An operator's `status` has no STATE_DIRECTORY, and means the service's outbox.
        return SYSTEM_STATE / "outbox.db", f"default beside {SYSTEM_FILE}"
    return platformdirs.user_data_path(APP) / "outbox.db", "default"
