"""What the service manager is told and what it hands over: readiness, watchdog, listening sockets.

Owns the protocols of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3), which need no more
than a datagram and four environment variables. Reads no clock and starts no task: the daemon calls
in, and decides with `WatchdogGate` whether there was progress worth reporting. Credentials are the
configuration's business.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

import structlog

from agent.errors import ConfigError

FIRST_FD = 3
"""The first inherited descriptor. Source: sd_listen_fds(3), SD_LISTEN_FDS_START."""

log = structlog.get_logger()


class Notifier:
    """Tells the service manager about the state of the daemon; says nothing when there is none.

    A send never blocks, since it happens on the event loop, and never raises. What could not be
    said (the manager does not read while it reloads) goes along with the next message, so that a
    lost READY=1 does not end in a start timeout. The first failure in a row is logged.
    """

    def __init__(self, address: str | None) -> None:
        """*address* is a path, or "@" and a name in the abstract namespace; None is no manager."""
        self._address = address
        self._owed: dict[str, str] = {}
        self._failing = False

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Return the notifier of this process, and take its address out of *environ*.

        A child would otherwise inherit it and could speak in the daemon's name.
        """
        # "If $NOTIFY_SOCKET was not set [...] the function returns 0": not under systemd.
        return cls(environ.pop("NOTIFY_SOCKET", "") or None)

    def ready(self, text: str) -> None:
        """Say that start-up, or a reload, is over; *text* is what `systemctl status` shows."""
        # What was not heard of a reload is over, too: said along, it would seem to begin now.
        for name in ("RELOADING", "MONOTONIC_USEC"):
            self._owed.pop(name, None)
        self._tell(READY="1", STATUS=_one_line(text))

    def reloading(self, monotonic_s: float) -> None:
        """Say that the configuration is read anew; `ready` ends that. Source: sd_notify(3)."""
        self._tell(RELOADING="1", MONOTONIC_USEC=str(int(monotonic_s * 1_000_000)))

    def status(self, text: str) -> None:
        """Say in one line how things stand."""
        self._tell(STATUS=_one_line(text))

    def stopping(self, text: str) -> None:
        """Say that shutdown has begun."""
        self._tell(STOPPING="1", STATUS=_one_line(text))

    def watchdog(self) -> None:
        """Say that there was progress. A lost one is not said later: by then it may be untrue."""
        self._send({**self._owed, "WATCHDOG": "1"})

    def _tell(self, **assignments: str) -> None:
        self._owed.update(assignments)
        self._send(self._owed)

    def _send(self, assignments: Mapping[str, str]) -> None:
        if self._address is None:
            return
        message = "\n".join(f"{name}={value}" for name, value in assignments.items())
        try:
            # A socket per message: nothing to close, and a manager that re-executed is found again.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
                datagram.setblocking(False)
                datagram.sendto(message.encode(errors="replace"), _unix_address(self._address))
        except OSError as exc:
            if not self._failing:
                log.warning("systemd.notification_delayed", error=str(exc))
            self._failing = True
        else:
            self._failing = False
            self._owed.clear()


def watchdog_interval_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Return how often to feed the watchdog, in seconds, or None when it does not watch *pid*.

    Half of what it allows. Source: sd_watchdog_enabled(3): "it is recommended that a daemon sends
    a keep-alive notification message to the service manager every half of the time returned here".
    """
    if not environ.get("WATCHDOG_USEC") or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return _number(environ, "WATCHDOG_USEC") / 1_000_000 / 2


def inherited_sockets(environ: MutableMapping[str, str], pid: int) -> list[socket.socket]:
    """Return the listening sockets that a .socket unit passed to *pid*, in its order.

    They are closed on exec, and their variables are taken out of *environ*: a child has no use for
    either. Raises ConfigError for a descriptor that is not a listening stream socket.
    """
    ours = environ.get("LISTEN_FDS") and environ.get("LISTEN_PID") == str(pid)
    count = _number(environ, "LISTEN_FDS") if ours else 0
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    sockets: list[socket.socket] = []
    try:
        for fd in range(FIRST_FD, FIRST_FD + count):
            sockets.append(_adopt(fd))  # noqa: PERF401 - what came before a bad one must be closed
    except ConfigError:
        for adopted in sockets:
            adopted.close()
        raise
    return sockets


class WatchdogGate:
    """Says who is stuck: a party that has work, and has got nothing done for *stall_s*.

    The daemon feeds the watchdog only while nobody is, so that a hang that leaves the event loop
    running is healed by a restart. To wait for work is no hang; nor is to wait out a backoff or a
    hold, and whoever does that is idle. Instants are monotonic seconds.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._progressed_s: dict[str, float] = {}  # of the busy ones only

    def busy(self, name: str, now_s: float) -> None:
        """*name* has work. Said again while it has some, this is no progress."""
        self._progressed_s.setdefault(name, now_s)

    def idle(self, name: str) -> None:
        """*name* has nothing to do, and may stay silent."""
        self._progressed_s.pop(name, None)

    def beat(self, name: str, now_s: float) -> None:
        """*name* got something done. An idle one stays idle."""
        if name in self._progressed_s:
            self._progressed_s[name] = now_s

    def stalled(self, now_s: float) -> str | None:
        """Return the name of the party that has been stuck longest, or None when nobody is."""
        if not self._progressed_s:
            return None
        name, progressed_s = min(self._progressed_s.items(), key=lambda item: item[1])
        return name if now_s - progressed_s > self._stall_s else None


def _adopt(fd: int) -> socket.socket:
    """Return the inherited *fd* as a socket. Raises ConfigError."""
    try:
        adopted = socket.socket(fileno=fd)
    except OSError as exc:
        raise ConfigError(
            f"inherited descriptor {fd} is not a socket ({exc.strerror}):"
            " the .socket unit may hold ListenStream= lines only"
        ) from exc
    adopted.set_inheritable(False)
    stream = adopted.type == socket.SOCK_STREAM
    if not stream or not adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        adopted.close()
        raise ConfigError(
            f"inherited descriptor {fd} is not a listening stream socket:"
            " the .socket unit may hold ListenStream= lines only, and needs Accept=no"
        )
    return adopted


def _unix_address(text: str) -> str:
    """Return *text* as the kernel takes it: abstract names begin with NUL where systemd writes @."""
    return "\0" + text[1:] if text.startswith("@") else text


def _one_line(text: str) -> str:
    """Return *text* without line breaks: the next line of a message is the next assignment."""
    return " ".join(text.split())


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdecimal() and int(value) > 0):
        raise ConfigError(
            f"{name}={value!r} in the environment is not a positive number:"
            " the service manager sets it; start the agent without it to run by hand"
        )
    return int(value)
