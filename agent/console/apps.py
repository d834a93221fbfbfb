"""Apps as people see them, and what a person does with their tokens: give out, withdraw.

The same functions serve the control API, and the command line when no daemon runs. A token itself
comes by here never: whoever asks for one makes it, and hands over its digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import msgspec

from agent.errors import AgentError, OutboxUnavailableError
from agent.event import rfc3339
from agent.outbox.records import App, Quotas
from agent.settings import Settings

if TYPE_CHECKING:  # `status` has no use for it
    from agent.outbox.writer import Writer


class AppTokenError(AgentError):
    """An app has a token already, or none."""


class AppStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One app in `status --json`. *token_since* is when its token was given out, or revoked.

    *bytes* is what the outbox holds of it, pending or dead; *max_bytes* what it may, None: no limit.
    """

    name: str
    token: Literal["active", "revoked", "none"]
    token_since: str | None
    accepted: int
    delivered: int
    pending: int
    dead: int
    discarded: int
    bytes: int
    max_bytes: int | None


def quotas(settings: Settings) -> Quotas:
    return Quotas(
        named={name: settings.quota_of(name) for name in settings.apps},
        other=settings.quota_of(""),
    )


def overview(known: Iterable[App], quotas: Quotas) -> list[AppStatus]:
    """Return the apps that the outbox knows and those that are configured, by name."""
    new = {name: App(name=name, token_digest=None, created_ms=0) for name in quotas.named}
    apps = new | {app.name: app for app in known}
    return [_status(apps[name], quotas.of(name)) for name in sorted(apps)]


def _status(app: App, max_bytes: int | None) -> AppStatus:
    since_ms = app.created_ms if app.has_token else app.revoked_ms
    return AppStatus(
        name=app.name,
        token="active" if app.has_token else "none" if since_ms is None else "revoked",
        token_since=None if since_ms is None else rfc3339(since_ms),
        accepted=app.accepted,
        delivered=app.delivered,
        pending=app.pending,
        dead=app.dead,
        discarded=app.discarded,
        bytes=app.held_bytes,
        max_bytes=max_bytes,
    )


async def add(writer: Writer, name: str, token_digest: bytes, *, now_ms: int) -> None:
    """Let *name* be known by the token of that digest."""
    _require_all(writer)
    if not await writer.perform(lambda store: store.apps.issue(name, token_digest, now_ms=now_ms)):
        raise AppTokenError(
            f"app {name} has a token already, which is shown to nobody again; for a new one"
            f" `tranthor-agent app revoke {name}` first"
        )


async def revoke(writer: Writer, name: str, *, now_ms: int) -> None:
    """Let the token of *name* be good for nothing; its events stay, and are delivered."""
    _require_all(writer)
    if not await writer.perform(lambda store: store.apps.revoke(name, now_ms=now_ms)):
        raise AppTokenError(
            f"app {name} has no token that could be revoked; `tranthor-agent app list` shows who has"
        )


def _require_all(writer: Writer) -> None:
    if writer.apps is None:
        raise OutboxUnavailableError(
            "the apps are still to be read back from a damaged outbox; try again in a moment"
        )
