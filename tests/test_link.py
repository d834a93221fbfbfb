"""What counts as a change of network, how often, and that the daemon tries at once when one comes.

Planted bugs that these were seen to find: a watch that is never entered, one that reads nothing,
messages skipped behind the first, deletions that count, no pause between two tellings, an overflow
that is no change, a Retry-After cut short, and lanes that go on waiting for themselves.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop
from processes import DEADLINE_S, environ

from agent.forward.link import INTERVAL_S, SETTLE_S, Network, tell_at_s, watching

LOOPS = {"uvloop": uvloop.new_event_loop}

NEWLINK, DELLINK, NEWADDR, DELADDR, NEWROUTE, DELROUTE = 16, 17, 20, 21, 24, 25
UP, RUNNING = 0x1, 0x40
TENTATIVE, PERMANENT = 0x40, 0x80
UNICAST, LOCAL = 1, 2
CLONED = 0x200


def message(kind: int, body: bytes) -> bytes:
    padding = bytes(-len(body) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body + padding


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(*flags: int, kind: int = NEWLINK, index: int = 2) -> bytes:
    head = struct.pack("=BxHiII", socket.AF_UNSPEC, 1, index, sum(flags), 0)
    return message(kind, head + attribute(3, b"eth0\0"))


def address(text: str, *, kind: int = NEWADDR, flags: int = PERMANENT, index: int = 2) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    packed = socket.inet_pton(family, text)
    head = struct.pack("=BBBBi", family, 24, flags & 0xFF, 0, index)
    return message(kind, head + attribute(1, packed) + attribute(8, struct.pack("=I", flags)))


def route(*, kind: int = NEWROUTE, route_type: int = UNICAST, flags: int = 0) -> bytes:
    return message(kind, struct.pack("=8BI", socket.AF_INET, 0, 0, 0, 254, 3, 0, route_type, flags))


# Heard from a kernel 6.1: `ip address add 10.9.8.7/24 dev dummy0`.
RECORDED = bytes.fromhex(
    "50000000140000000000000000000000"  # nlmsghdr
    "0218800002000000"  # ifaddrmsg: IPv4, /24, IFA_F_PERMANENT, link 2
    "080001000a090807"  # IFA_ADDRESS
    "080002000a090807"  # IFA_LOCAL
    "0b00030064756d6d7930" + "0000"  # IFA_LABEL
    "0800080080000000"  # IFA_FLAGS
    "14000600ffffffffffffffff0000000000000000"  # IFA_CACHEINFO
)


@pytest.mark.parametrize(
    "datagram",
    [
        link(UP, RUNNING),
        address("10.9.8.7"),
        address("2001:db8::7"),
        route(),
        RECORDED,
    ],
)
def test_a_link_an_address_and_a_route_that_come_are_changes(datagram: bytes) -> None:
    assert Network().hear(datagram)


@pytest.mark.parametrize(
    "datagram",
    [
        link(UP, RUNNING, kind=DELLINK),
        address("10.9.8.7", kind=DELADDR),
        route(kind=DELROUTE),
        link(UP),  # without a carrier
        link(RUNNING),  # not switched on
        address("fe80::7", flags=TENTATIVE),
        route(route_type=LOCAL),
        route(flags=CLONED),
        message(28, b"\0" * 12),  # a neighbour
    ],
)
def test_what_goes_or_cannot_be_used_is_none(datagram: bytes) -> None:
    assert not Network().hear(datagram)


def test_what_is_there_already_is_no_change_when_it_is_said_again() -> None:
    network = Network()
    network.hear(link(UP, RUNNING) + address("10.9.8.7"))
    assert not network.hear(link(UP, RUNNING) + address("10.9.8.7"))
    assert network.hear(address("10.9.8.8"))
    assert network.hear(link(UP, RUNNING, index=3))


@pytest.mark.parametrize(
    ("gone", "back"),
    [
        (link(UP), link(UP, RUNNING)),
        (link(0, kind=DELLINK), link(UP, RUNNING)),
        (address("10.9.8.7", kind=DELADDR), address("10.9.8.7")),
        (address("10.9.8.7", flags=TENTATIVE), address("10.9.8.7")),
    ],
)
def test_what_went_and_comes_back_is_a_change(gone: bytes, back: bytes) -> None:
    network = Network()
    network.hear(back)
    network.hear(gone)
    assert network.hear(back)


def test_every_message_of_a_datagram_is_heard() -> None:
    network = Network()
    assert network.hear(route(kind=DELROUTE) + link(UP) + address("10.9.8.7"))
    assert network.hear(route() + link(UP, RUNNING))
    assert not network.hear(link(UP, RUNNING)), "it was behind one that had decided already"


@pytest.mark.parametrize("whole", [link(UP, RUNNING), address("10.9.8.7"), route(), RECORDED])
def test_a_datagram_cut_short_anywhere_says_nothing(whole: bytes) -> None:
    for size in range(len(whole)):
        assert not Network().hear(whole[:size])


def test_lengths_that_cannot_be_end_the_reading() -> None:
    for length in (0, 15, 2**32 - 1):
        assert not Network().hear(struct.pack("=IHHII", length, NEWROUTE, 0, 0, 0) + route())
    bad = struct.pack("=BBBBi", socket.AF_INET, 24, 0, 0, 2) + struct.pack("=HH", 0, 1)
    assert Network().hear(message(NEWADDR, bad)), "an address, though it cannot be read"


def test_a_change_is_told_when_its_burst_is_over_and_not_too_often() -> None:
    assert tell_at_s(100.0, float("-inf")) == 100.0 + SETTLE_S
    assert tell_at_s(100.0, 99.9) == 99.9 + INTERVAL_S


# --- the shell ----------------------------------------------------------------------------------


async def test_a_machine_without_netlink_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_NETLINK", raising=False)
    with watching(lambda: None):
        await asyncio.sleep(0)


SCENE = Path(__file__).with_name("link_scene.py")


def a_network_of_ones_own() -> str | None:
    """Return why there can be none here."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs iproute2 and util-linux"
    if os.geteuid() != 0:
        return "needs root, for a network namespace"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "set", "lo", "up"], check=False, capture_output=True
    )
    return tried.stderr.decode() if tried.returncode else None


@pytest.mark.process
@pytest.mark.parametrize("scene", ["address", "burst", "retry_after", "overflow"])
def test_in_a_network_of_its_own(tmp_path: Path, scene: str) -> None:
    if why := a_network_of_ones_own():
        pytest.skip(why)
    subprocess.run(
        ["unshare", "--net", sys.executable, str(SCENE), scene, str(tmp_path)],
        check=True,
        env=environ(),
        timeout=4 * DEADLINE_S,
    )
