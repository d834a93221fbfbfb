"""The sockets that the server listens on: bound, or refused with the remedy."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import AgentError


def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address that *host* stands for."""
    bound: list[socket.socket] = []
    with _explained(f"{host}:{port}", "set ingest.port to a free one", bound):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            opened = socket.socket(family, kind, protocol)
            bound.append(opened)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind(address)
            # Already here: between a bind and a later listen another process could do both.
            opened.listen()
    return bound


def bind_unix(path: str) -> socket.socket:
    """Return a socket at *path*, where one left behind by a dead agent is replaced."""
    bound = [socket.socket(socket.AF_UNIX)]
    with _explained(path, "set ingest.unix_socket to another path", bound):
        _require_unused(path)
        if Path(path).is_socket():
            Path(path).unlink()
        bound[0].bind(path)
        # Whoever may enter its folder may post; the umask would have shut out the group.
        Path(path).chmod(0o660)
    return bound[0]


def shown(bound: socket.socket) -> str:
    """Return the address as a URL or a path."""
    match bound.getsockname():
        case (str(host), int(port), *_):
            return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        case address:
            return str(address)


def _require_unused(path: str) -> None:
    """Refuse the socket of a living agent, which binding would silently replace."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise AgentError(f"{path}: another agent listens on it; set ingest.unix_socket to another path")


@contextmanager
def _explained(address: str, remedy: str, bound: list[socket.socket]) -> Iterator[None]:
    """Close what was *bound* if the block fails, and say why in words."""
    try:
        yield
    except BaseException as exc:
        for opened in bound:
            opened.close()
        if not isinstance(exc, OSError):
            raise
        if exc.errno == errno.EADDRINUSE:
            raise AgentError(
                f"{address}: already in use; another agent may be running"
                f" (tranthor-agent status), or {remedy}"
            ) from exc
        raise AgentError(f"{address}: cannot listen ({exc.strerror or exc}); {remedy}") from exc
