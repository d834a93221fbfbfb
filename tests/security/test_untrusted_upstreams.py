"""An upstream that must not be trusted gets neither key nor event, and a person is told why.

A real daemon with one event to deliver, and a peer that keeps all that it was told. The event stays,
and `status` names what to mend; `config check` tells what can be known beforehand.

Planted bugs that these were seen to find: redirects that are followed, certificates or their names
that are not checked, plain HTTP to any machine or by any proxy, a problem that is kept quiet, and an
answer that is read to its end.
"""

from __future__ import annotations

import gzip
import json
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates, why_no_certificates
from click.testing import CliRunner
from processes import DEADLINE_S, AgentProcess, environ, running_agent
from security.peers import STORED, Peer, listening, response
from security.raw import memory_bytes
from test_link import a_network_of_ones_own

import agent.__main__  # noqa: F401  # adds `run` to the commands
from agent.console.commands import cli

pytestmark = pytest.mark.process

KEY = "wk-canary-5up3r-s3cr3t"
SECRET_BODY = "Quarterly Figures"
EVENT = {"messageId": "m1", "event": SECRET_BODY, "userId": "1043"}

FORWARD = 'backoff_base = "20ms"\nbackoff_max = "100ms"\nhold_probe = "100ms"\n'


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if why := why_no_certificates():
        pytest.skip(why)
    return Certificates(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def with_an_event(folder: Path, url: str, **keys: object) -> AsyncIterator[AgentProcess]:
    """Run an agent that has an event for *url*."""
    lines = [f"{name} = {json.dumps(str(value))}" for name, value in keys.items()]
    upstream = "\n".join([f'url = "{url}"', f'write_key = "{KEY}"', 'timeout = "2s"', *lines])
    async with running_agent(folder, upstream=upstream, forward=FORWARD) as agent:
        assert await agent.post(EVENT) == 204
        yield agent


async def held(agent: AgentProcess, *words: str) -> dict[str, Any]:
    """Return the status of an agent that is held, with its event."""
    status = await agent.until(lambda status: status["state"] == "held")
    for word in words:
        assert word in status["reason"]
    assert (status["pending"], status["dead"], status["delivered"]) == (1, 0, 0)
    return status


def assert_kept_from(peer: Peer) -> None:
    for secret in (KEY, SECRET_BODY):
        assert secret.encode() not in peer.heard


async def test_no_redirect_is_followed_to_another_origin(tmp_path: Path) -> None:
    async with (
        listening(STORED) as other,
        listening(partial(_redirecting, 301, _location_of(other))) as first,
        with_an_event(tmp_path, f"http://127.0.0.1:{first.port}") as agent,
    ):
        for status in (302, 303, 307, 308, 301):
            first.answer = partial(_redirecting, status, _location_of(other))
            await agent.until(partial(_is_held_for, f"{status}: redirected to"))
        held_for = await held(agent, "redirected to", "upstream.url")
        # A person reads the same from the command.
        code, said = await agent.run_command("status", "--json")
        assert code == 1
        assert json.loads(said)["reason"] == held_for["reason"]
        assert first.requests >= 5
        assert other.connections == 0


def _location_of(peer: Peer) -> str:
    return f"Location: http://127.0.0.1:{peer.port}/api/public/apps/track"


def _redirecting(status: int, location: str, _: bytes) -> bytes:
    return response(f"{status} Elsewhere", b"", location)


def _is_held_for(reason: str, status: dict[str, Any]) -> bool:
    return status["state"] == "held" and reason in status["reason"]


async def test_whom_the_machine_trusts_is_trusted(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon spares itself some loading of these; what it needs it must have."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates["ca.pem"]))
    async with (
        listening(STORED, certificates.server()) as peer,
        with_an_event(tmp_path, f"https://127.0.0.1:{peer.port}") as agent,
    ):
        await agent.until(lambda status: status["delivered"] == 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("expired", "expired"), ("stranger", "127.0.0.1"), ("other", "self-signed")],
)
async def test_a_certificate_that_is_not_good_holds_before_anything_is_said(
    tmp_path: Path, certificates: Certificates, name: str, reason: str
) -> None:
    async with (
        listening(STORED, certificates.server(name)) as peer,
        with_an_event(
            tmp_path, f"https://127.0.0.1:{peer.port}", ca_file=certificates["ca.pem"]
        ) as agent,
    ):
        await held(agent, "certificate", reason, "upstream.ca_file")
        assert peer.heard == b""


async def test_a_good_certificate_of_an_authority_nobody_named_holds(
    tmp_path: Path, certificates: Certificates
) -> None:
    async with (
        listening(STORED, certificates.server()) as peer,
        with_an_event(tmp_path, f"https://127.0.0.1:{peer.port}") as agent,
    ):
        await held(agent, "certificate", "upstream.ca_file")
        assert peer.heard == b""


async def test_the_same_event_goes_once_the_certificate_is_good(
    tmp_path: Path, certificates: Certificates
) -> None:
    """That they are told of nothing above is due to their certificates alone."""
    async with (
        listening(STORED, certificates.server()) as peer,
        with_an_event(
            tmp_path, f"https://127.0.0.1:{peer.port}", ca_file=certificates["ca.pem"]
        ) as agent,
    ):
        await agent.until(lambda status: status["delivered"] == 1)
        assert f"PublicWriteKey: {KEY}".encode() in peer.heard
        assert SECRET_BODY.encode() in peer.heard


async def test_no_plain_answer_to_a_greeting_of_tls_makes_it_speak_plainly(tmp_path: Path) -> None:
    """As whoever sits in between would answer, to be told the rest without TLS."""
    async with (
        listening(response("400 Bad Request", b"speak HTTP")) as peer,
        with_an_event(tmp_path, f"https://127.0.0.1:{peer.port}") as agent,
    ):
        await agent.until(lambda status: peer.connections > 2 and status["state"] != "flowing")
        status = await agent.status()
        assert (status["pending"], status["dead"]) == (1, 0)
        assert peer.heard.startswith(b"\x16\x03")
        assert_kept_from(peer)


async def test_old_tls_is_not_spoken(tmp_path: Path, certificates: Certificates) -> None:
    old = certificates.server()
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with (
        listening(STORED, old) as peer,
        with_an_event(
            tmp_path, f"https://127.0.0.1:{peer.port}", ca_file=certificates["ca.pem"]
        ) as agent,
    ):
        status = await agent.until(lambda status: status["state"] not in {"flowing", "stopped"})
        assert (status["pending"], status["dead"]) == (1, 0)
        assert peer.heard == b""


async def test_a_proxy_that_answers_for_the_upstream_is_told_nothing(tmp_path: Path) -> None:
    async with (
        listening(response("200 OK", b"{}")) as proxy,
        with_an_event(
            tmp_path, "https://upstream.example", proxy=f"http://127.0.0.1:{proxy.port}"
        ) as agent,
    ):
        await agent.until(lambda status: proxy.connections > 1 and status["state"] != "flowing")
        assert (await agent.status())["pending"] == 1
        assert proxy.heard.startswith(b"CONNECT upstream.example:443 ")
        assert_kept_from(proxy)


async def test_an_answer_that_is_a_bomb_is_read_no_further_than_its_beginning(
    tmp_path: Path,
) -> None:
    bomb = response("400 Bad Request", gzip.compress(bytes(64 * MIB)), "Content-Encoding: gzip")
    async with (
        listening(bomb) as peer,
        with_an_event(tmp_path, f"http://127.0.0.1:{peer.port}") as agent,
    ):
        await agent.until(lambda status: status["dead"] == 1)
        assert memory_bytes(agent.process.pid, "VmHWM") < PEAK_BYTES


MIB = 1024 * 1024
PEAK_BYTES = 80 * MIB
"""At rest it takes 45 to 50."""


# --- plain HTTP beyond this machine ---


@pytest.mark.parametrize(
    ("url", "keys"),
    [
        ("http://192.0.2.1", {}),
        ("http://upstream.example:8080", {}),
        ("http://127.0.0.1:9", {"proxy": "http://192.0.2.1:3128"}),
    ],
    ids=["an address", "a name", "a proxy"],
)
async def test_plain_http_beyond_this_machine_is_told_before_any_event(
    tmp_path: Path, url: str, keys: dict[str, str]
) -> None:
    async with with_an_event(tmp_path, url, **keys) as agent:
        started = [json.loads(line) for line in agent.log.read_text().splitlines()]
        problems = [said["problem"] for said in started if said["event"] == "agent.misconfigured"]
        (problem,) = problems
        assert url in problem
        assert "use https" in problem
        said = CliRunner().invoke(cli, ["config", "check", "--json", "--config", str(agent.config)])
        assert (said.exit_code, json.loads(said.stdout)["problems"]) == (1, problems)
        await held(agent, url, "plain http", "use https")


SCENE = Path(__file__).with_name("plain_http_scene.py")


def test_nothing_is_sent_to_a_plain_upstream_on_the_network(tmp_path: Path) -> None:
    """Which listens, and would take it: on an address of its own, in a network of its own."""
    if why := a_network_of_ones_own():
        pytest.skip(why)
    subprocess.run(
        ["unshare", "--net", sys.executable, str(SCENE), str(tmp_path)],
        check=True,
        env=environ(),
        timeout=4 * DEADLINE_S,
    )
