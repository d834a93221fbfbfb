"""`app add`, `app list` and `app revoke`: which apps are known by a token."""

# ruff: noqa: PLC0415  # rich and aiohttp take a while to load on an edge machine: only where needed

from __future__ import annotations

import asyncio
import re
import secrets

import click

from agent.console.invocation import Group, echo_json, program, settings_in_effect
from agent.console.listing import json_option
from agent.settings import APP_NAME
from agent.units import TOKEN_PREFIX, token_digest

_TOKEN_BYTES = 32


@click.group("app", cls=Group)
def app_group() -> None:
    """Give apps a token each, list and revoke them.

    An app sends its token in place of the write key; status and receipts then say which app an
    event came from, and it can have a quota.
    """


def _name(_: click.Context, __: click.Parameter, text: str) -> str:
    if not re.fullmatch(APP_NAME, text):
        raise click.BadParameter(
            "lower-case letters, digits and single dashes between them, 32 at most"
        )
    return text


_named = click.argument("name", callback=_name)


@app_group.command()
@_named
def add(name: str) -> None:
    """Print a new token for an app, once.

    The agent keeps its digest alone. An app that has a token needs that revoked first.
    """
    from agent.console.operations import add_app

    # Made here, so that not even the agent that runs ever has it.
    token = TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    asyncio.run(add_app(settings_in_effect(), name, token_digest(token)))
    click.echo(token)
    click.echo(
        f"app {name} is known by this token, which is not shown again; it is sent in place of the"
        " write key, as Authorization: Bearer or as an SDK sends a key",
        err=True,
    )


@app_group.command("list")
@json_option
def list_apps(as_json: bool) -> None:
    """List the apps, with what the outbox holds of each and what it may."""
    from agent.console.operations import apps

    found = asyncio.run(apps(settings_in_effect()))
    if as_json:
        for app in found:
            echo_json(app)
    elif not found:
        click.echo(f"no apps yet; {program()} app add NAME gives one a token", err=True)
    else:
        from agent.console.rendering import print_apps

        print_apps(found)


@app_group.command()
@_named
def revoke(name: str) -> None:
    """Let an app's token be good for nothing.

    What it posted before stays, and is delivered.
    """
    from agent.console.operations import revoke_app

    asyncio.run(revoke_app(settings_in_effect(), name))
    click.echo(f"revoked the token of app {name}")
