"""The commands: `status`, looking into the outbox, steering the daemon, `sandbox` and `demo`.

`cli` is the whole command line but for `run`, which `agent.__main__` adds: it is on the level of
the daemon. Data goes to stdout, everything else to stderr.
"""

# ruff: noqa: PLC0415  # rich and aiohttp take a while to load on an edge machine: only where needed

from __future__ import annotations

import asyncio
import os
from typing import get_args

import click

from agent import __version__
from agent.clock import SystemClock
from agent.config.loaded import Loaded
from agent.console.app_commands import app_group
from agent.console.config_commands import config_group
from agent.console.dead_commands import dead_group
from agent.console.diagnosis import count
from agent.console.invocation import (
    NOT_RUNNING,
    PROGRAM,
    STILL_PENDING,
    Program,
    complain,
    echo_json,
    program,
    settings_in_effect,
)
from agent.console.listing import (
    app_option,
    given,
    json_option,
    limit_option,
    list_to_stdout,
    seconds,
    upstream_option,
)
from agent.console.receipts import unknown
from agent.console.status import Report, Status
from agent.errors import AgentError
from agent.outbox.records import Selection, State

_WATCH_INTERVAL_S = 1.0

_SANDBOX_PORT = 7228
"""Beside the agent's own 7227."""


@click.group(cls=Program, name=PROGRAM, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Store-and-forward agent for Tranthor analytics events.

    Apps post to 127.0.0.1; the agent makes each event durable, and delivers it when it can.
    """


# --- looking ---


@cli.command()
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@json_option
@click.pass_context
def status(ctx: click.Context, watch: bool, as_json: bool) -> None:
    """Say whether events flow, and what to do.

    Exit code 0: flowing, or backing off until the network returns. 1: a person should act (held,
    paused, not configured, dead letters, full). 2: not running. 3: the outbox cannot be read, or
    the daemon does not answer.
    """
    from agent.console.diagnosis import exit_code
    from agent.console.operations import inspect

    loaded = settings_in_effect()
    if watch:
        asyncio.run(_watch(loaded, as_json=as_json))
    report = asyncio.run(inspect(loaded))
    if as_json:
        echo_json(report)
    else:
        from agent.console.rendering import print_report

        print_report(report, program())
    ctx.exit(exit_code(report))


async def _watch(loaded: Loaded, *, as_json: bool) -> None:
    from agent.console.operations import inspect
    from agent.console.rendering import live_report

    with live_report(program()) as show_live:
        show = echo_json if as_json else show_live
        while True:
            report: Report = await inspect(loaded)
            show(report)
            await asyncio.sleep(_WATCH_INTERVAL_S)


@cli.command("list")
@click.option("--state", type=click.Choice(get_args(State)), default="pending", show_default=True)
@upstream_option
@app_option
@click.option("--event", callback=given, help="Only events of this name.")
@click.option("--user", callback=given, help="Only events of this userId or anonymousId.")
@click.option("--text", callback=given, help="Only events with this text anywhere in their JSON.")
@click.option(
    "--older-than", metavar="AGE", callback=seconds, help="Accepted longer ago than 30s, 1h, 7d …"
)
@click.option("--newer-than", metavar="AGE", callback=seconds, help="Accepted less long ago.")
@limit_option
@json_option
def list_events(
    state: State,
    upstream: str | None,
    app: str | None,
    event: str | None,
    user: str | None,
    text: str | None,
    older_than: float | None,
    newer_than: float | None,
    limit: int,
    as_json: bool,
) -> None:
    """List events in the outbox, oldest first. With --json one object per line."""
    if state == "delivered" and (event or user or text):
        raise click.UsageError(
            "of a delivered event only its id and times are kept: it cannot be found by --event,"
            " --user or --text"
        )
    now_ms = SystemClock().wall_ms()
    selection = Selection(
        upstream=upstream,
        app=app,
        event=event,
        user=user,
        text=text,
        accepted_before_ms=None if older_than is None else now_ms - round(older_than * 1000),
        accepted_after_ms=None if newer_than is None else now_ms - round(newer_than * 1000),
    )
    list_to_stdout(state, selection, limit=limit, as_json=as_json)


@cli.command()
@click.argument("message_id")
@upstream_option
@click.option(
    "--wait",
    "wait_s",
    metavar="TIME",
    callback=seconds,
    help="Return once it is delivered or dead, or after 30s, 5m …",
)
@json_option
@click.pass_context
def show(
    ctx: click.Context, message_id: str, upstream: str | None, wait_s: float | None, as_json: bool
) -> None:
    """Show all that is known of one event.

    Where it stands and what it waits for, since when, its attempts, the upstream's answer, and its
    body. An id that was sent to several upstreams is as many events.

    Exit code 0: known; with --wait: delivered. 1: unknown; with --wait: or dead. 3: with --wait,
    still pending.
    """
    from agent.console.operations import receipts

    loaded = settings_in_effect()
    found = asyncio.run(receipts(loaded, message_id, upstream, wait_s=wait_s or 0))
    if not found:
        kept = loaded.settings.outbox.delivered_retention.text
        complain(
            f"{message_id[:200]}: unknown here; it was never accepted, or discarded, or delivered"
            f" more than {kept} ago (outbox.delivered_retention)"
        )
        if as_json:
            echo_json(unknown(message_id))
        ctx.exit(1)
    if as_json:
        for receipt in found:
            echo_json(receipt)
    else:
        from agent.console.rendering import print_receipt

        for receipt in found:
            print_receipt(receipt, program(), now_ms=SystemClock().wall_ms())
    if wait_s is not None:
        ctx.exit(_exit_code({receipt.state for receipt in found}))


def _exit_code(states: set[State]) -> int:
    if "dead" in states:
        return 1
    return STILL_PENDING if "pending" in states else 0


cli.add_command(dead_group)
cli.add_command(app_group)


# --- steering ---


@cli.command()
@upstream_option
def pause(upstream: str | None) -> None:
    """Stop sending; events are still kept.

    It stays so after a restart, until `resume`.
    """
    from agent.console.operations import pause as pause_agent

    after = asyncio.run(pause_agent(settings_in_effect(), upstream))
    again = (
        f"{program()} resume" if upstream is None else f"{program()} resume --upstream {upstream}"
    )
    click.echo(f"paused: {_waiting(after, upstream)}, nothing is sent until {again}")
    _tell_if_stopped(after)


@cli.command()
@upstream_option
def resume(upstream: str | None) -> None:
    """End a pause."""
    from agent.console.operations import resume as resume_agent

    after = asyncio.run(resume_agent(settings_in_effect(), upstream))
    click.echo(f"resumed: {_waiting(after, upstream)}")
    _tell_if_stopped(after)


@cli.command()
@upstream_option
@click.pass_context
def flush(ctx: click.Context, upstream: str | None) -> None:
    """End every wait: try to send now."""
    from agent.console.operations import flush as flush_agent

    after = asyncio.run(flush_agent(settings_in_effect(), upstream))
    if after is None:
        complain(f"no agent runs here, so there is nothing to hurry; start it: {program()} run")
        ctx.exit(NOT_RUNNING)
    asked = after if upstream is None else after.of(upstream)
    each = after.each.values() if upstream is None and after.each else [asked]
    if all(one.state in {"paused", "unconfigured"} for one in each):
        complain(f"nothing is sent: {asked.reason}")
        ctx.exit(1)
    click.echo(f"trying now: {_waiting(after, upstream)}")


def _waiting(after: Status, upstream: str | None) -> str:
    if upstream is None:
        return f"{count(after.pending, 'event')} waiting"
    return f"{count(after.of(upstream).pending, 'event')} waiting for {upstream}"


def _tell_if_stopped(after: Status) -> None:
    if after.state == "stopped":
        click.echo("no agent runs now; this holds from its next start", err=True)


cli.add_command(config_group)


# --- trying out ---


@cli.command()
@click.option("--port", type=click.IntRange(1, 65_535), default=_SANDBOX_PORT, show_default=True)
@click.option("--write-key", metavar="KEY", help="The key to accept; sandbox-key by default.")
def sandbox(port: int, write_key: str | None) -> None:
    """Run a stand-in upstream for developers.

    It holds what arrives in memory, and fails on demand. Ctrl-C ends it.
    """
    from agent.console.sandbox import DEFAULT_WRITE_KEY, run_sandbox

    told = False

    def announce(line: str) -> None:
        nonlocal told
        click.echo(line)
        if told:
            return
        told = True
        click.echo("  in the agent's configuration:\n")
        click.echo("[upstream]")
        click.echo(f'url = "http://127.0.0.1:{port}"')
        click.echo(f'write_key = "{DEFAULT_WRITE_KEY if write_key is None else "<the one given>"}"')
        click.echo()

    key = DEFAULT_WRITE_KEY if write_key is None else write_key
    try:
        asyncio.run(run_sandbox("127.0.0.1", port, key, announce))
    except OSError as exc:
        raise AgentError(
            f"127.0.0.1:{port}: cannot listen ({os.strerror(exc.errno or 0)}); choose another --port"
        ) from exc


@cli.command()
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Watch the agent survive a cut link.

    The whole job on this machine in under a minute, with no account and nothing left behind:
    events, an outage, a killed agent, recovery, and a count of what arrived.
    """
    from agent.console.demo import run_demo

    if not asyncio.run(run_demo(click.echo)):
        ctx.exit(1)
