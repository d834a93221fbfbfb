"""A client for the control API of the daemon on this machine. Knows HTTP, decides nothing.

Called by `agent.console.operations`; the other end is `agent.console.control`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from yarl import URL

from agent.console.control import PREFIX
from agent.console.messages import Discarded, Requeued
from agent.console.receipts import UNKNOWN_EVENT, ReceiptView
from agent.console.status import Status
from agent.errors import AgentError
from agent.exchange import Refusal
from agent.outbox.records import Selection

_SERVER = "tranthor-agent"
"""What our listener calls itself; the port may be another program's while no agent runs."""

_STATUS_S = 2.0
"""A sound daemon answers in milliseconds; on slow flash, under load, a query may wait its turn."""

_CHANGE_S = 10.0
"""Pause, resume and flush wait for one commit at most."""

_BULK_S = 300.0
"""Requeue and discard take some milliseconds for each 500 dead letters; there may be a million."""

_T = TypeVar("_T")


class DaemonSilentError(AgentError):
    """Nothing answered as an agent does."""


class DaemonRefusedError(AgentError):
    """The daemon answered that it will not, or cannot. The text is its own, as is *code*."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class DaemonClient:
    """An open client. Each call raises `DaemonSilentError` or `DaemonRefusedError`."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.address = address
        self._session = session

    async def status(self) -> Status:
        return await self._call("GET", "status", answer=Status, timeout_s=_STATUS_S)

    async def pause(self, upstream: str | None = None) -> Status:
        """Pause the upstream of that label; None: all. So with the next two."""
        return await self._call("POST", _about("pause", upstream), answer=Status)

    async def resume(self, upstream: str | None = None) -> Status:
        return await self._call("POST", _about("resume", upstream), answer=Status)

    async def flush(self, upstream: str | None = None) -> Status:
        return await self._call("POST", _about("flush", upstream), answer=Status)

    async def receipt(
        self, message_id: str, upstream: str | None = None, *, wait_s: float = 0
    ) -> ReceiptView | None:
        """Return where the event stands once it is settled or *wait_s* are over; None: not known.

        *upstream* is a label; None: the first of those that the id is known for.
        """
        query = {"wait": f"{wait_s:.3f}"} | ({} if upstream is None else {"upstream": upstream})
        path = f"events/{quote(message_id, safe='')}?{urlencode(query)}"
        try:
            return await self._call("GET", path, answer=ReceiptView, timeout_s=wait_s + _STATUS_S)
        except DaemonRefusedError as exc:
            if exc.code == UNKNOWN_EVENT:
                return None
            raise

    async def requeue(self, selection: Selection) -> int:
        """Return how many dead letters of *selection* are pending again; none given means all."""
        path, body = "dead/requeue", _body(selection)
        answer = await self._call("POST", path, answer=Requeued, body=body, timeout_s=_BULK_S)
        return answer.requeued

    async def discard(self, selection: Selection) -> int:
        """Return how many dead letters of *selection* are gone for good; none given means all."""
        path, body = "dead/discard", _body(selection)
        answer = await self._call("POST", path, answer=Discarded, body=body, timeout_s=_BULK_S)
        return answer.discarded

    async def _call(
        self,
        method: str,
        path: str,
        *,
        answer: type[_T],
        body: dict[str, Any] | None = None,
        timeout_s: float = _CHANGE_S,
    ) -> _T:
        try:
            async with self._session.request(
                method,
                URL(f"{self.address}{PREFIX}{path}", encoded=True),
                data=b"" if body is None else msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                allow_redirects=False,
            ) as response:
                status, content = response.status, await response.read()
                is_agent = response.headers.get("Server") == _SERVER
        except TimeoutError as exc:
            raise DaemonSilentError(
                f"{self.address} gave no answer to {method} {path} within {timeout_s:.0f} s"
            ) from exc
        except aiohttp.ClientConnectorError as exc:
            why = exc.os_error.strerror or exc.os_error
            raise DaemonSilentError(f"{self.address} does not answer ({why})") from exc
        except aiohttp.ClientError as exc:
            raise DaemonSilentError(f"{self.address} broke off ({exc})") from exc
        if not is_agent:
            raise DaemonSilentError(f"{self.address} is answered by another program")
        return self._read(status, content, answer)

    def _read(self, status: int, content: bytes, answer: type[_T]) -> _T:
        try:
            if status == 200:
                return msgspec.json.decode(content, type=answer)
            refusal = msgspec.json.decode(content, type=Refusal)
        except msgspec.DecodeError as exc:
            raise DaemonSilentError(
                f"{self.address} is answered by an agent of another version (status {status});"
                " restart it"
            ) from exc
        raise DaemonRefusedError(f"the agent answers {status}: {refusal.message}", refusal.code)


@asynccontextmanager
async def open_client(host: str, port: int) -> AsyncIterator[DaemonClient]:
    """Open a client for the daemon that listens on ingest.*host* and *port*."""
    # Never by the proxy of the environment: it would not know this machine's loopback.
    async with aiohttp.ClientSession(trust_env=False) as session:
        yield DaemonClient(session, _address(host, port))


def _address(host: str, port: int) -> str:
    if host == "localhost":  # as a name it might resolve to ::1 first, where nothing listens
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _about(path: str, upstream: str | None) -> str:
    return path if upstream is None else f"{path}?{urlencode({'upstream': upstream})}"


def _body(selection: Selection) -> dict[str, Any]:
    return {**msgspec.to_builtins(selection), "all": selection == Selection()}
