"""What a file and the environment give, before it is decoded: raw values, each with where it stands.

What is no key of the table is a fault, with the word that was probably meant. Knows no type.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from agent.config.places import FILE_VARIABLE
from agent.errors import ConfigError
from agent.keys import APPS, KEYS, PREFIX, STRUCTS, UPSTREAMS, Key, bare
from agent.settings import APP_NAME, DEFAULT_UPSTREAM, UPSTREAM_NAME

_FAMILIES = {UPSTREAMS: (UPSTREAM_NAME, "an upstream"), APPS: (APP_NAME, "an app")}
"""Sections of which there is one for each name: what that may be, and of what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A value before it is decoded. *where* begins an error; relative paths start at *folder*."""

    key: Key
    raw: object
    where: str
    origin: str
    folder: Path


def tables_of(file: Path) -> dict[str, Any]:
    """Return the tables of *file* by the names that stand in brackets above them.

    Raises ConfigError where there is no file, none that may be read, or none of TOML.
    """
    tables = _parsed(file)
    for family in _FAMILIES:
        if isinstance(tables.get(family), dict):
            named = tables.pop(family)
            tables |= {f"{family}.{name}": table for name, table in named.items()}
    return tables


def names_of(
    family: str,
    file: Path | None,
    tables: dict[str, Any],
    environ: Mapping[str, str],
    faults: list[str],
) -> list[str]:
    """Return the names of a *family* in file and environment, sorted.

    Sections that cannot be one are taken out of *tables*, and said in *faults*.
    """
    in_file = _named_in_file(family, file, tables, faults)
    return sorted({*in_file, *_named_in_environ(family, environ)})


def given_values(
    file: Path | None,
    tables: Mapping[str, Any],
    environ: Mapping[str, str],
    keys: Mapping[str, Key],
    faults: list[str],
) -> list[Given]:
    """Return what is given for *keys*, in the order in which it counts: the last of a key wins.

    What is given for no key is said in *faults*.
    """
    in_file = () if file is None else _from_file(file, tables, keys, faults)
    return [*in_file, *_from_environ(environ, keys, faults)]


def misspelt(environ: Mapping[str, str], keys: Mapping[str, Key]) -> Iterator[str]:
    """Yield a problem for each variable that lacks one underscore.

    It is no error, since Kubernetes makes such names by itself for a service "tranthor-agent-...".
    """
    for key in keys.values():
        variable = key.variable
        slip = variable.replace("__", "_")
        if slip in environ:
            yield f"environment: {slip} is ignored; did you mean {variable}?"


def _parsed(file: Path) -> dict[str, Any]:
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
    file: Path, tables: Mapping[str, Any], keys: Mapping[str, Key], faults: list[str]
) -> Iterator[Given]:
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
                    yield Given(key=key, raw=raw, where=where, origin=str(file), folder=file.parent)


def _from_environ(
    environ: Mapping[str, str], keys: Mapping[str, Key], faults: list[str]
) -> Iterator[Given]:
    variables = {key.variable: key for key in keys.values()}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or "__" not in name:
            continue
        where = f"environment: {bare(name)}"
        key = variables.get(name)
        if key is None:
            faults.append(f"{where}: unknown variable; {_nearest(name, list(variables))}")
        else:
            yield Given(
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
