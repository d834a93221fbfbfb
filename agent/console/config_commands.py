"""`config check`, `config show` and `config init`."""

from __future__ import annotations

import os
import secrets
import shlex
from pathlib import Path

import click
import msgspec

from agent.config.loaded import effective
from agent.config.places import search_path
from agent.console.invocation import (
    EX_CONFIG,
    PROGRAM,
    Group,
    echo_json,
    given_config,
    printable,
    settings_in_effect,
)
from agent.console.listing import json_option
from agent.errors import AgentError
from agent.keys import example

_FILE_MODE = 0o640
_FOLDER_MODE = 0o750
"""Readable by the agent's group, for `status`; a write key may stand in the file."""


_VALUE_COLUMNS = 40
"""A longer value pushes its own origin to the right, not those of all."""


@click.group("config", cls=Group)
def config_group() -> None:
    """Check, show or write the configuration."""


@config_group.command()
@json_option
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Say whether the configuration is right, and what is missing.

    Exit code 0: right. 1: the agent would start and keep events, but not deliver all is set up
    for. 78: it would not start.
    """
    loaded = settings_in_effect()
    missing = loaded.missing()
    # A key that cannot be read is a problem, and what is missing: said once.
    problems = [problem for problem in loaded.problems if problem != missing]
    if as_json:
        file = None if loaded.file is None else str(loaded.file)
        echo_json({"file": file, "problems": problems, "missing": missing})
    else:
        click.echo(f"file     {printable(str(loaded.file or '(none found: defaults)'))}")
        for problem in problems:
            click.echo(f"problem  {printable(problem)}")
        if missing is not None:
            click.echo(f"missing  {printable(missing)}")
        if missing is None and not problems:
            click.echo("ok")
    if loaded.unhashable is not None:
        ctx.exit(EX_CONFIG)
    ctx.exit(1 if missing is not None or problems else 0)


@config_group.command()
@json_option
def show(as_json: bool) -> None:
    """Show each value in effect and where it came from; secrets are masked."""
    entries = effective(settings_in_effect())
    if as_json:
        # A value in TOML of a text, number or list of texts is the same in JSON.
        echo_json(
            {
                entry.key: {"value": msgspec.Raw(entry.value.encode()), "origin": entry.origin}
                for entry in entries
            }
        )
        return
    key_columns = max(len(entry.key) for entry in entries)
    value_columns = min(_VALUE_COLUMNS, max(len(entry.value) for entry in entries))
    for entry in entries:
        origin = "" if entry.origin == "default" else f"  # {entry.origin}"
        line = f"{entry.key:<{key_columns}} = {entry.value:<{value_columns}}{origin}"
        click.echo(printable(line.rstrip()))


@config_group.command()
@click.argument("path", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(path: Path | None, force: bool) -> None:
    """Write a file with every key explained, each at its default.

    PATH is your own configuration file unless given; the system's is
    /etc/tranthor-agent/config.toml.
    """
    target = path or given_config() or search_path()[0]
    try:
        target.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        _write(target, example().encode(), replace=force)
    except FileExistsError as exc:
        raise AgentError(f"{target}: is there already; --force replaces it") from exc
    except OSError as exc:
        raise AgentError(f"{target}: cannot be written ({exc.strerror})") from exc
    click.echo(f"wrote {printable(str(target))}")
    try_it = f"{PROGRAM} --config {shlex.quote(str(target))} config check"
    click.echo(f"set upstream.url and a write key in it, then: {printable(try_it)}", err=True)


def _write(target: Path, content: bytes, *, replace: bool) -> None:
    """Write *target* whole or not at all. FileExistsError: it is there, and not to be replaced."""
    fresh = target.with_name(f"{target.name}.{secrets.token_hex(4)}.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        if replace:
            fresh.replace(target)
        else:
            os.link(fresh, target)  # fails where a rename would replace
    finally:
        fresh.unlink(missing_ok=True)
