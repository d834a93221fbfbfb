"""The machine's network: says that it changed, so that a backoff need not be waited out.

Owns the kernel's messages about links, addresses and routes (rtnetlink(7)) and how often one of
them may count. What brings a network counts, what takes it away does not, nor what is said again:
radios and routers repeat themselves for ever. `Network` and `tell_at_s` are pure; `watching` is the
shell around them, entered by the daemon. What a change ends is the breaker's business.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

SETTLE_S = 1.0
"""From the first sign to the telling: one cable brings dozens of messages, the route last of all."""

INTERVAL_S = 5.0
"""Between two tellings: a loose plug must not make of a backoff a probe a second."""

_MEMORY = 4096
"""Links and addresses remembered; a machine has a few. Beyond it all is forgotten, and counts anew."""

_RECEIVE_BYTES = 65_536
"""More than the kernel puts into one datagram (NLMSG_GOODSIZE is 8 KiB)."""

# Of linux/rtnetlink.h, linux/if.h, linux/if_addr.h and linux/if_link.h.
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE = 16, 17, 20, 21, 24
_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, and _IFADDR and _ROUTE of IPv4 and IPv6."""
_UP_AND_RUNNING = 0x1 | 0x40
_NOT_USABLE = 0x40 | 0x08
"""IFA_F_TENTATIVE: not yet, told again when it is. IFA_F_DADFAILED: another machine has it."""
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTN_UNICAST = 1
_RTM_F_CLONED = 0x200

# All in the machine's own byte order, as structures of C.
_MESSAGE = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefix, flags, scope, index
_ROUTE = struct.Struct("=8BI")  # rtmsg: family … type, flags
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type

log = structlog.get_logger()


class Network:
    """What is known of links and addresses from the kernel's messages so far."""

    def __init__(self) -> None:
        self._known: set[tuple[int, bytes]] = set()
        """(link, b"") is a link that runs, (link, address) an address that can be used."""

    def hear(self, datagram: bytes) -> bool:
        """Return whether *datagram* says that a link, an address or a route came."""
        # All of them first: what stands behind the one that decides must be heard, too.
        news = [self._hear_one(kind, body) for kind, body in _messages(datagram)]
        return any(news)

    def forget(self) -> None:
        """Some messages were lost: whatever is heard next counts."""
        self._known.clear()

    def _hear_one(self, kind: int, body: bytes) -> bool:
        if kind in {_NEWLINK, _DELLINK} and len(body) >= _LINK.size:
            _, _, index, flags, _ = _LINK.unpack_from(body)
            runs = kind == _NEWLINK and flags & _UP_AND_RUNNING == _UP_AND_RUNNING
            return self._note((index, b""), there=runs)
        if kind in {_NEWADDR, _DELADDR} and len(body) >= _ADDRESS.size:
            _, _, flags, _, index = _ADDRESS.unpack_from(body)
            attributes = dict(_attributes(body[_ADDRESS.size :]))
            if len(attributes.get(_IFA_FLAGS, b"")) == 4:  # all of them; the header has room for 8
                flags = int.from_bytes(attributes[_IFA_FLAGS], sys.byteorder)
            address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS) or b"?"
            usable = kind == _NEWADDR and not flags & _NOT_USABLE
            return self._note((index, address), there=usable)
        if kind == _NEWROUTE and len(body) >= _ROUTE.size:
            *_, route_type, flags = _ROUTE.unpack_from(body)
            # Those to the machine's own addresses come with these; cloned ones are a cache.
            return route_type == _RTN_UNICAST and not flags & _RTM_F_CLONED
        return False

    def _note(self, what: tuple[int, bytes], *, there: bool) -> bool:
        """Remember whether *what* is there; return True if it just came."""
        if not there:
            self._known.discard(what)
            return False
        if what in self._known:
            return False
        if len(self._known) >= _MEMORY:
            self._known.clear()
        self._known.add(what)
        return True


def tell_at_s(now_s: float, told_at_s: float) -> float:
    """Return when to tell of a change heard at *now_s*, the last having been told at *told_at_s*."""
    return max(now_s + SETTLE_S, told_at_s + INTERVAL_S)


@contextmanager
def watching(changed: Callable[[], None]) -> Iterator[None]:
    """Call *changed* after the machine's network changed, while the block runs.

    A burst is one change, and the last of a burst is always followed by a call. Where there is no
    netlink (another system, a sandbox) nothing is ever called: a backoff then ends by its time.
    """
    try:
        kernel = _subscribe()
    except OSError as exc:
        log.debug("link.unwatched", reason=exc.strerror or str(exc))
        yield
        return
    loop = asyncio.get_running_loop()
    with kernel:
        watch = _Watch(kernel, changed, loop)
        # By its number: a loop may look for the methods of a TCP socket on the object.
        loop.add_reader(kernel.fileno(), watch.read)
        try:
            yield
        finally:
            loop.remove_reader(kernel.fileno())
            watch.stop()


class _Watch:
    """Reads what the kernel says, and tells at most every `INTERVAL_S`."""

    def __init__(
        self, kernel: socket.socket, changed: Callable[[], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._kernel = kernel
        self._changed = changed
        self._loop = loop
        self._network = Network()
        self._told_at_s = float("-inf")
        self._due: asyncio.TimerHandle | None = None

    def read(self) -> None:
        try:
            datagram, (sender, _) = self._kernel.recvfrom(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: more happened than the socket holds, so something did
            self._network.forget()
            self._sign()
            return
        # Another process may write to us, too; the kernel's port is 0.
        if sender == 0 and self._network.hear(datagram):
            self._sign()

    def stop(self) -> None:
        if self._due is not None:
            self._due.cancel()

    def _sign(self) -> None:
        if self._due is None:
            at_s = tell_at_s(self._loop.time(), self._told_at_s)
            self._due = self._loop.call_at(at_s, self._tell)

    def _tell(self) -> None:
        self._due = None
        self._told_at_s = self._loop.time()
        self._changed()


def _subscribe() -> socket.socket:
    """Return a socket on which the kernel tells of its network. Raises OSError where it cannot."""
    if not hasattr(socket, "AF_NETLINK"):
        raise OSError("this system has no netlink")
    # The protocol NETLINK_ROUTE is 0.
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        kernel.setblocking(False)
        kernel.bind((0, _GROUPS))
    except OSError:
        kernel.close()
        raise
    return kernel


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of each message; what is cut short ends it. Source: netlink(7)."""
    offset = 0
    while offset + _MESSAGE.size <= len(datagram):
        length, kind, _, _, _ = _MESSAGE.unpack_from(datagram, offset)
        if length < _MESSAGE.size or offset + length > len(datagram):
            return
        yield kind, datagram[offset + _MESSAGE.size : offset + length]
        offset += _aligned(length)


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size or offset + length > len(body):
            return
        yield kind, body[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
