"""One call to the upstream, and what came of it as an `Outcome`. The one module that sends.

Nothing here is raised for what a network or a server does. The write key goes into two headers
and nowhere else; redirects are not followed, for a 307 would carry body and key elsewhere.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import aiohttp

from agent import __version__
from agent.clock import Clock
from agent.event import Kind
from agent.forward.disposition import (
    Misconfigured,
    Outcome,
    Unavailable,
    classify,
    one_line,
)
from agent.forward.plan import Target
from agent.forward.pool import Pool, open_pool
from agent.observe.logs import Redactor
from agent.units import proxy_secrets, why_readable

_WHY_CHARS = 500
"""How much of a reason is kept and shown."""

Endpoint = Kind | Literal["batch"]
"""What follows /api/public/apps/."""


class Upstream(Protocol):
    """Whatever takes one request and says what became of it."""

    async def send(self, endpoint: Endpoint, body: bytes) -> Outcome:
        """Try once to deliver *body*. Never raises for what a network or a server does."""


@asynccontextmanager
async def open_upstream(
    target: Target, clock: Clock, *, connections: int
) -> AsyncIterator[Upstream]:
    """Yield the upstream of *target*, with at most *connections* kept alive while the block runs."""
    if why := why_readable(target.url, target.proxy):
        yield Refusing(f"upstream.url {target.url} {why}")
        return
    async with open_pool(target, _headers(target), connections=connections) as pool:
        yield HttpUpstream(pool, target, clock)


def _headers(target: Target) -> dict[str, str]:
    return {
        "Authorization": target.authorization,
        "PublicWriteKey": target.bare_key,
        "Content-Type": "application/json",
        "User-Agent": f"tranthor-agent/{__version__}",
        "Accept-Encoding": "identity",  # its answers are short, or not its own
    }


class HttpUpstream:
    """The Tranthor API over HTTP. Made by `open_upstream`."""

    def __init__(self, pool: Pool, target: Target, clock: Clock) -> None:
        self._pool = pool
        self._target = target
        self._tls: ssl.SSLContext | None = None
        # Answers and errors are kept and shown: what they quote of these must not go there.
        self._redactor = Redactor()
        for secret in (target.authorization, target.bare_key, *proxy_secrets(target.proxy or "")):
            self._redactor.add(secret)
        self._clock = clock

    async def send(self, endpoint: Endpoint, body: bytes) -> Outcome:
        """POST *body* once."""
        try:
            # Here and not at the start: a file that comes later ends the hold without a restart.
            self._tls = self._tls or _tls(self._target)
        except OSError as exc:  # of ssl, too
            return Misconfigured(_why_no_tls(exc))
        try:
            response = await self._pool.post(f"/api/public/apps/{endpoint}", body, self._tls)
            outcome = classify(response, now_ms=self._clock.wall_ms(), clean=self._redactor.clean)
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            outcome = _outcome_of(exc)
        if isinstance(outcome, Unavailable | Misconfigured):
            # It may quote a header: another place where a stranger's words, or the key, come in.
            why = self._redactor.clean(one_line(outcome.why))
            return replace(outcome, why=why[:_WHY_CHARS])
        return outcome


@dataclass(frozen=True, slots=True)
class Refusing:
    """Stands in for an upstream that must not be spoken to: holds every event and says why."""

    why: str

    async def send(self, endpoint: Endpoint, body: bytes) -> Outcome:  # noqa: ARG002  # the Protocol's
        """Return the reason; nothing leaves the machine."""
        return Misconfigured(self.why)


def _outcome_of(exc: Exception) -> Outcome:
    """Translate what the client raised. Ambiguous is all that may have happened after sending."""
    match exc:
        case aiohttp.ClientConnectorCertificateError():
            return Misconfigured(
                f"the upstream's certificate is not trusted ({exc.certificate_error});"
                " check the clock, upstream.url and upstream.ca_file, or a captive portal is in between"
            )
        case aiohttp.InvalidURL():
            return Misconfigured("upstream.url or upstream.proxy is not a URL")
        case aiohttp.ClientHttpProxyError() if exc.status in {401, 403, 407}:
            return Misconfigured(f"the proxy refuses ({exc.status}); check upstream.proxy")
        case aiohttp.ClientHttpProxyError():
            return Unavailable(why=f"the proxy answers {exc.status}")
        case aiohttp.ClientConnectorDNSError():
            return Unavailable(why=f"the name {exc.host} is not found: {_reason(exc.os_error)}")
        case aiohttp.ClientConnectorError():
            return Unavailable(
                why=f"cannot connect to {exc.host}:{exc.port}: {_reason(exc.os_error)}"
            )
        case aiohttp.ConnectionTimeoutError():
            return Unavailable(why="connecting took too long (upstream.connect_timeout)")
        case TimeoutError():
            return Unavailable(why="no answer in time (upstream.timeout)", ambiguous=True)
        case aiohttp.ServerDisconnectedError():
            return Unavailable(why="the upstream closed without an answer", ambiguous=True)
        case _:
            return Unavailable(why=f"the connection broke: {_reason(exc)}", ambiguous=True)


def tls_fault(target: Target) -> str | None:
    """Return why the TLS files of *target* are of no use; None if they are, or there are none."""
    if target.ca_file is None and target.client_cert is None:
        return None
    try:
        _tls(target)
    except OSError as exc:
        return _why_no_tls(exc)
    return None


def _why_no_tls(exc: OSError) -> str:
    return f"TLS files cannot be loaded ({exc}); check upstream.ca_file, client_cert and client_key"


def _reason(exc: BaseException) -> str:
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


def _tls(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=target.ca_file)
    if target.client_cert is not None:
        context.load_cert_chain(target.client_cert, target.client_key)
    return context
