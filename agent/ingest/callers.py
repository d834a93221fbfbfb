"""Which app a request comes from: by the token that it sends, else by the user who sends it.

Pure. Knows digests of tokens, and no token: what an app sent is forgotten with its request.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from agent.exchange import Answer, refuse
from agent.outbox.records import App
from agent.units import app_token, token_digest

_RETRY_S = 5
"""A damaged outbox is read back in seconds, and its tokens come first."""

_CHALLENGE = {"WWW-Authenticate": "Bearer"}
"""Due with each 401. Source: RFC 9110, 11.6.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callers:
    """What the operator says of apps: *users* by their numbers, and whether all must be known."""

    users: Mapping[int, str] = field(default_factory=dict)
    require_token: bool = False

    def app_of(self, key: str, peer: int | None, apps: Mapping[str, App] | None) -> str | Answer:
        """Return the name of the app that sent *key*, empty for none, or why it may not post.

        *peer* is the user who sent it, None where nobody knows. *apps* are those that have or had a
        token; None while some may be missing. A token says more than a user: one user may run
        several apps.
        """
        token = app_token(key) if key else None
        if token is not None:
            return _by_token(token, apps)
        app = "" if peer is None else self.users.get(peer, "")
        if not app and self.require_token:
            return _unauthorized(
                "AGENT_TOKEN_REQUIRED",
                "Authorization: this agent takes events from known apps alone; send the app's token as"
                " Bearer (`tranthor-agent app add NAME` gives one out)",
            )
        return app


def _by_token(token: str, apps: Mapping[str, App] | None) -> str | Answer:
    sent = token_digest(token)
    # All are compared, each in constant time: how long it takes tells nothing of them.
    found = [
        app
        for app in (apps or {}).values()
        if app.token_digest is not None and hmac.compare_digest(app.token_digest, sent)
    ]
    if found and found[0].revoked_ms is None:
        return found[0].name
    if found:
        return _unauthorized(
            "AGENT_TOKEN_REVOKED",
            f"Authorization: the token of app {found[0].name} was revoked; `tranthor-agent app add"
            f" {found[0].name}` gives out a new one",
        )
    if apps is None:
        return refuse(
            503,
            "AGENT_UNKNOWN_TOKEN",
            "Authorization: the apps' tokens are not at hand; send again with the same messageId",
            retry_after_s=_RETRY_S,
        )
    return _unauthorized(
        "AGENT_UNKNOWN_TOKEN",
        "Authorization: no app of this agent has that token; `tranthor-agent app list` shows who has"
        " one, `tranthor-agent app add NAME` gives one out",
    )


def _unauthorized(code: str, message: str) -> Answer:
    answer = refuse(401, code, message)
    return replace(answer, headers={**answer.headers, **_CHALLENGE})
