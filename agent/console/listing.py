"""What `list` and `dead list` share: their options, and how events come out page by page."""

# ruff: noqa: PLC0415  # rich and aiohttp take a while to load on an edge machine: only where needed

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import click

from agent.clock import SystemClock
from agent.config.loaded import Loaded
from agent.console.invocation import echo_json, settings_in_effect
from agent.console.receipts import view
from agent.outbox.records import Receipt, Selection, State
from agent.units import Seconds

_F = TypeVar("_F", bound=Callable[..., Any])


def seconds(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """Return the duration that a person wrote, as in the configuration; a callback of options."""
    if text is None:
        return None
    try:
        return Seconds.parse(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def given(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """Return *text*, which is not empty; a callback of options.

    Empty is what a variable of a script without a value becomes, and would select what nobody meant.
    """
    if text == "":
        raise click.BadParameter("it is empty; leave the option out to mean all")
    return text


def json_option(command: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout, for scripts.")(
        command
    )


def upstream_option(command: _F) -> _F:
    return click.option(
        "--upstream",
        metavar="NAME",
        callback=given,
        help="Only that one of several; [upstream] is default.",
    )(command)


def app_option(command: _F) -> _F:
    return click.option(
        "--app", metavar="NAME", callback=given, help="Only those that came from this app."
    )(command)


def limit_option(command: _F) -> _F:
    return click.option(
        "--limit",
        type=click.IntRange(min=1),
        default=50,
        show_default=True,
        help="Events at most.",
    )(command)


def list_to_stdout(state: State, selection: Selection, *, limit: int, as_json: bool) -> None:
    """Print the first *limit* events that *selection* means, as a table or as JSON Lines."""
    loaded = settings_in_effect()
    if as_json:
        asyncio.run(_print_lines(loaded, state, selection, limit=limit))
        return
    from agent.console.rendering import print_events

    found = asyncio.run(_collect(loaded, state, selection, limit=limit + 1))
    if not found:
        click.echo(f"no {state} events{' like that' if selection != Selection() else ''}", err=True)
        return
    print_events(found[:limit], state, now_ms=SystemClock().wall_ms())
    if len(found) > limit:
        click.echo(f"the oldest {limit} are shown; --limit shows more", err=True)


async def _print_lines(loaded: Loaded, state: State, selection: Selection, *, limit: int) -> None:
    from agent.console.operations import events

    async for page in events(loaded, state, selection, limit=limit):
        for receipt in page:
            echo_json(view(receipt))


async def _collect(
    loaded: Loaded, state: State, selection: Selection, *, limit: int
) -> list[Receipt]:
    from agent.console.operations import events

    return [
        receipt async for page in events(loaded, state, selection, limit=limit) for receipt in page
    ]
