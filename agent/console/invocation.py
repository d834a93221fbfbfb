"""What every command shares: --config in both places, exit codes, quiet ends and safe output.

Exit codes: 0 done; 1 failed; 2 used wrongly, or nothing runs; 78 misconfigured (EX_CONFIG of
sysexits.h); 130 ended by Ctrl-C (128 + SIGINT). `status` has its own meanings of 1, 2 and 3, and
`show --wait` of 1 and 3.
Loads neither rich nor aiohttp.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.config.loaded import Loaded
from agent.config.loading import load
from agent.errors import AgentError, ConfigError

PROGRAM = "tranthor-agent"

NOT_RUNNING = 2
STILL_PENDING = 3
EX_CONFIG = 78
INTERRUPTED = 130

_CONFIG = f"{__name__}.config"
"""The key in click's context, which a group shares with its commands."""


class Command(click.Command):
    """A command that takes --config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_config_option())


class Group(click.Group):
    """A group that takes --config, and shows its commands in the order of their writing."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_config_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


class Program(Group):
    """The whole command line: turns foreseen failures into a line on stderr and an exit code."""

    group_class = Group

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(INTERRUPTED)
        except (AgentError, BaseExceptionGroup) as exc:
            failures = list(_leaves(exc))
            if not all(isinstance(failure, AgentError) for failure in failures):
                raise
            for line in dict.fromkeys(_lines(failures)):
                complain(line)
            misconfigured = any(isinstance(failure, ConfigError) for failure in failures)
            ctx.exit(EX_CONFIG if misconfigured else 1)


def settings_in_effect() -> Loaded:
    """Return the configuration that the running command was given. Raises `ConfigError`."""
    return load(given_config(), os.environ)


def given_config() -> Path | None:
    """Return the PATH of --config; None if it was not given."""
    path: Path | None = click.get_current_context().meta.get(_CONFIG)
    return path


def program() -> str:
    """Return how this person calls the program, to be put before a command that they should run."""
    path = given_config()
    return PROGRAM if path is None else f"{PROGRAM} --config {shlex.quote(str(path))}"


# --- output ---


def complain(message: str) -> None:
    """Print one line on stderr, under the program's name."""
    click.echo(f"{PROGRAM}: {printable(message)}", err=True)


def echo_json(value: object) -> None:
    """Print *value* as one line of JSON."""
    click.echo(printable_json(msgspec.json.encode(value).decode()))


def printable(text: str) -> str:
    """Return *text* with each character that could steer a terminal written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def printable_json(line: str) -> str:
    """Return *line* of JSON, the value unchanged, without what could steer a terminal."""
    if line.isprintable():
        return line
    # Outside of strings a line of JSON is printable, so each of these stands in a string.
    return "".join(c if c.isprintable() else _json_escape(c) for c in line)


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="PATH",
        expose_value=False,
        callback=_remember,
        help="The configuration file; before or after the command.",
    )


def _remember(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        ctx.meta[_CONFIG] = path


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def _lines(failures: list[BaseException]) -> Iterator[str]:
    for failure in failures:
        yield from str(failure).splitlines()
