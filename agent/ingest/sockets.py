"""The sockets that the server listens on: bound, or refused with the remedy."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct

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


def bind_unix(path: str, mode: int) -> socket.socket:
    """Return a socket at *path*, where one left behind by a dead agent is replaced.

    It is never open to more than *mode* says, not even for a moment.
    """
    bound = [socket.socket(socket.AF_UNIX)]
    with _explained(path, "set ingest.unix_socket to another path", bound):
        _clear(path)
        # What bind() makes the file of, less the umask: unix(7) does not say so, Linux does it.
        os.fchmod(bound[0].fileno(), mode)
        bound[0].bind(path)
        Path(path).chmod(mode)  # with what the umask took
        # Already here, so that another agent does not take it for that of a dead one.
        bound[0].listen()
    return bound[0]


def user_at(connected: socket.socket) -> int:
    """Return the number of the user who connected a Unix socket. Source: unix(7), SO_PEERCRED."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return int(uid)


_UCRED = Struct("iII")
"""pid, uid, gid."""


def shown(bound: socket.socket) -> str:
    """Return the address as a URL or a path."""
    match bound.getsockname():
        case (str(host), int(port), *_):
            return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        case address:
            return str(address)


def _clear(path: str) -> None:
    """Remove the socket of a dead agent from *path*; what is none, or in use, stays.

    A living one would silently be replaced, and binding alone refuses both kinds alike.
    """
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found):
        raise AgentError(
            f"{path}: something else is there, and stays; move it, or set ingest.unix_socket to"
            " another path"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # one whose queue is full would keep us waiting
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass
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
