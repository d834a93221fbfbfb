"""`dead list`, `dead requeue` and `dead discard`: what a person does about dead letters."""

# ruff: noqa: PLC0415  # rich and aiohttp take a while to load on an edge machine: only where needed

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
import msgspec

from agent.config.loaded import Loaded
from agent.console.diagnosis import count
from agent.console.invocation import Group, complain, program, settings_in_effect
from agent.console.listing import (
    app_option,
    given,
    json_option,
    limit_option,
    list_to_stdout,
    upstream_option,
)
from agent.outbox.records import Reason, Selection

_F = TypeVar("_F", bound=Callable[..., Any])

_NOTHING = Selection()


@click.group("dead", cls=Group)
def dead_group() -> None:
    """List, requeue or discard dead letters.

    Those are events that were set aside: refused by the upstream, answered 5xx to the end, or
    older than outbox.max_age.
    """


def _conditions(command: _F) -> _F:
    for option in (
        click.option(
            "--text", callback=given, help="Only those with this text anywhere in their JSON."
        ),
        click.option("--reason", type=click.Choice(get_args(Reason)), help="Why set aside."),
        click.option("--user", callback=given, help="Only those of this userId or anonymousId."),
        click.option("--event", callback=given, help="Only those of this event name."),
        app_option,
        upstream_option,
    ):
        command = option(command)
    return command


def _selection(command: _F) -> _F:
    command = _conditions(command)
    command = click.option("--all", "everything", is_flag=True, help="All dead letters.")(command)
    return click.argument("ids", nargs=-1, metavar="[MESSAGE_ID]...")(command)


@dead_group.command("list")
@_conditions
@limit_option
@json_option
def list_dead(
    upstream: str | None,
    app: str | None,
    event: str | None,
    user: str | None,
    reason: Reason | None,
    text: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List dead letters with the upstream's answers, oldest first."""
    selection = Selection(
        upstream=upstream, app=app, event=event, user=user, reason=reason, text=text
    )
    list_to_stdout("dead", selection, limit=limit, as_json=as_json)


@dead_group.command()
@_selection
@click.pass_context
def requeue(
    ctx: click.Context, /, ids: tuple[str, ...], everything: bool, **conditions: Any
) -> None:
    """Put dead letters back, at the end of the queue."""
    from agent.console.operations import requeue as requeue_letters

    selection = _selected(ids, everything=everything, **conditions)
    requeued = asyncio.run(requeue_letters(settings_in_effect(), selection))
    click.echo(f"requeued {count(requeued, 'dead letter')}")
    _tell_of_others(ctx, selection, requeued)


@dead_group.command()
@_selection
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def discard(
    ctx: click.Context, /, ids: tuple[str, ...], everything: bool, yes: bool, **conditions: Any
) -> None:
    """Delete dead letters for good; asks first."""
    from agent.console.operations import discard as discard_letters

    loaded = settings_in_effect()
    selection = _selected(ids, everything=everything, **conditions)
    # What was counted is what goes: not also what died while the person was thinking.
    doomed = selection if yes else _confirmed(ctx, loaded, selection)
    discarded = 0 if doomed is None else asyncio.run(discard_letters(loaded, doomed))
    click.echo(f"discarded {count(discarded, 'dead letter')}")
    _tell_of_others(ctx, selection, discarded)


def _selected(ids: tuple[str, ...], *, everything: bool, **conditions: Any) -> Selection:
    selection = Selection(message_ids=ids, **conditions)
    if everything and selection != _NOTHING:
        raise click.UsageError("--all stands alone: leave it out to select by id or condition")
    if not everything and selection == _NOTHING:
        raise click.UsageError(
            "say which dead letters: ids, --upstream, --app, --event, --user, --reason, --text, or --all"
            f" ({program()} dead list shows them)"
        )
    return selection


def _confirmed(ctx: click.Context, loaded: Loaded, selection: Selection) -> Selection | None:
    """Return the letters that the person agreed to discard; None if there are none."""
    from agent.console.operations import dead_ids

    ids = asyncio.run(dead_ids(loaded, selection))
    if not ids:
        return None
    try:
        agreed = click.confirm(f"discard {count(len(ids), 'dead letter')} for good?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        complain("nobody is there to be asked, so nothing was discarded; --yes skips the question")
        ctx.exit(1)
    if not agreed:
        click.echo("nothing was discarded", err=True)
        ctx.exit(1)
    # With its conditions: another upstream may have a dead letter of the same id.
    return msgspec.structs.replace(selection, message_ids=ids)


def _tell_of_others(ctx: click.Context, selection: Selection, changed: int) -> None:
    """End with 1 if ids were given that are no dead letters."""
    others = len(set(selection.message_ids)) - changed
    if others > 0:
        complain(
            f"{others:,} of the ids given did not match a dead letter;"
            f" {program()} show MESSAGE_ID says where one stands"
        )
        ctx.exit(1)
