"""A write key is sent to its upstream and shows nowhere else, whatever goes wrong.

Canary keys, of the upstream, of an app, of a proxy and of hashes, and what is redacted of events, in a
daemon that logs at debug level. Every
error there is is provoked, with peers that quote the key in all they say; then everything that a
person or another program could read is searched, for pieces and disguises too.

A key that is set by an environment variable stands in /proc/PID/environ for whoever runs as the same
user, since the kernel shows there what a process was started with. That alone is left out here; the
README advises a file or a credential.

Planted bugs that these were seen to find: an answer that is stored as it came, or masked but for its
disguises, or cut before it is masked; a redirect and an error of the client that are shown as they came;
values of the configuration in errors, and a secret that shows itself in `config show`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from certificates import Certificates, why_no_certificates
from click.testing import CliRunner
from processes import DEADLINE_S, AgentProcess, free_port, running_agent
from security.peers import STORED, Peer, listening, response
from security.raw import event, post, statuses, talk
from security.secrets_told import traces

import agent.__main__  # noqa: F401  # adds `run` to the commands
from agent.console.commands import cli

pytestmark = pytest.mark.process

KEY = "wk/Canary+7f3a:e91c==d04b"
APP_KEY = "app/Canary+55aa:0c0c==9e9e"
PROXY_PASSWORD = "proxy-Canary-c3c3d4d4"
HASH_KEY = "hash/Canary+9d9d:5e5e==77aa"
CARD = "4111-canary-0000-9999"
MAIL = "somebody+canary@post.invalid"
SECRETS = (KEY, APP_KEY, PROXY_PASSWORD, HASH_KEY, CARD, MAIL)

FORWARD = 'backoff_base = "20ms"\nbackoff_max = "50ms"\nhold_probe = "100ms"\n'


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("TRANTHOR_AGENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))


def test_a_secret_is_traced_in_every_disguise() -> None:
    for told in (
        KEY,
        KEY[:12],
        KEY.upper(),
        quote(KEY, safe=""),
        KEY.replace("/", "\\/"),
        KEY.replace("=", "\\u003d"),
        KEY.encode().hex(),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f"{KEY}:".encode()).decode(),
        base64.b64encode(f"user:{KEY}".encode()).decode(),
        base64.urlsafe_b64encode(f"x:{KEY}".encode()).decode(),
    ):
        assert traces(KEY, f"before {told} behind".encode()), told
    assert not traces(KEY, b"Authorization: Bearer ********, wk/Canary")


# --- a daemon that has keys, and peers that quote them ---


@dataclass(slots=True)
class Canary:
    """A daemon and its upstream. *found* is all that was read of it, by where it was read."""

    agent: AgentProcess
    upstream: Peer
    found: dict[str, bytes] = field(default_factory=dict)

    def keep(self, where: str, told: bytes | str) -> None:
        told = told if isinstance(told, bytes) else told.encode()
        self.found[where] = self.found.get(where, b"") + told

    def told(self) -> list[str]:
        return [
            f"{where}: {found} in {told[-3000:]!r}"
            for where, told in self.found.items()
            for secret in SECRETS
            if (found := traces(secret, told))
        ]


UPSTREAMS = ("", "dns", "tls", "refused", "proxied", "plain")
"""By name. All have the same key, and each a misfortune of its own."""


@asynccontextmanager
async def canary(
    folder: Path, source: str, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Canary]:
    """Run an agent that has its keys from *source*."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        upstream = await enter(listening(STORED))
        impostor = await enter(listening(STORED, certificates.server("other")))
        proxy = await enter(listening(_quoting("407 Proxy Authentication Required")))
        urls = {
            "": f"http://127.0.0.1:{upstream.port}",
            "dns": "https://nowhere.invalid",
            "tls": f"https://127.0.0.1:{impostor.port}",
            "refused": f"http://127.0.0.1:{free_port()}",
            "proxied": f"http://127.0.0.1:{upstream.port}",
            "plain": "http://192.0.2.1",
        }
        more = {
            "dns": 'app_key_files = ["app_key"]',
            "proxied": f'proxy = "http://till:{PROXY_PASSWORD}@127.0.0.1:{proxy.port}"',
        }
        (folder / "app_key").write_text(APP_KEY)
        sections = {
            f"upstreams.{name}" if name else "upstream": "\n".join(
                [f'url = "{url}"', _key_of(source, name, folder, monkeypatch), more.get(name, "")]
            )
            for name, url in urls.items()
        }
        redact = "drop = ['\"card\"']\nhash = ['\"mail\"']\n" + _hash_key_of(
            source, folder, monkeypatch
        )
        agent = await enter(
            running_agent(folder, log='level = "debug"', forward=FORWARD, redact=redact, **sections)
        )
        yield Canary(agent, upstream)


def _key_of(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the key where *source* says; return the line of the configuration that it takes."""
    match source:
        case "inline":
            return f'write_key = "{KEY}"'
        case "file":
            (folder / "key").write_text(f"{KEY}\n")
            return 'write_key_file = "key"'
        case "credential":
            credentials = folder / "credentials"
            credentials.mkdir(exist_ok=True)
            (credentials / (f"write_key.{name}" if name else "write_key")).write_text(KEY)
            monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
        case _:
            section = f"UPSTREAMS__{name.upper()}" if name else "UPSTREAM"
            monkeypatch.setenv(f"TRANTHOR_AGENT_{section}__WRITE_KEY", KEY)
    return ""


def _hash_key_of(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    match source:
        case "inline":
            return f'key = "{HASH_KEY}"'
        case "file":
            (folder / "hash_key").write_text(HASH_KEY)
            return 'key_file = "hash_key"'
        case "credential":
            (folder / "credentials" / "redact_key").write_text(HASH_KEY)
        case _:
            monkeypatch.setenv("TRANTHOR_AGENT_REDACT__KEY", HASH_KEY)
    return ""


def _quoting(status: str) -> Callable[[bytes], bytes]:
    """Say *status*, and in a header and the body what was heard, key and all."""

    def answer(head: bytes) -> bytes:
        line = b" ".join(head.split(b"\r\n"))
        return response(status, line, f"X-Heard: {line.decode()}")

    return answer


def _saying(status: str, message: str, *headers: str) -> Callable[[bytes], bytes]:
    body = json.dumps({"message": message}).encode()
    return lambda _: response(status, body, "Content-Type: application/json", *headers)


def _raw(body: bytes) -> Callable[[bytes], bytes]:
    return lambda _: response("400 Bad Request", body, "Content-Type: application/json")


IN_BASE64 = base64.b64encode(f"{KEY}:".encode()).decode()
IN_URL = quote(KEY, safe="")
IN_ESCAPES = "".join(f"\\u{ord(char):04x}" for char in KEY)

MISFORTUNES: dict[str, Callable[[bytes], bytes]] = {
    "401": _saying("401 Unauthorized", f"unknown key {KEY}"),
    "403": _saying("403 Forbidden", f"key {KEY} is not for this"),
    "400 for the header": _quoting("400 Bad Request"),
    "400": _saying("400 Bad Request", f"a key is {KEY}, an event is not"),
    "400, Base64": _saying("400 Bad Request", f"you are {IN_BASE64}"),
    "400, URL": _saying("400 Bad Request", f"/track?writeKey={IN_URL}"),
    "400, escaped": _raw(b'{"message": "you are %b"}' % IN_ESCAPES.encode()),
    "400, slashes escaped": _raw(b"you are %b" % KEY.replace("/", "\\/").encode()),
    "400, signs escaped": _raw(b"you are %b" % KEY.replace("=", "\\u003d").encode()),
    "400, cut": _saying("400 Bad Request", "x" * 488 + KEY),
    "400, cut escapes": _raw(b'{"message": "%b%b"}' % (b"x" * 488, IN_ESCAPES.encode())),
    "400, a page": lambda _: response("400 Bad Request", b"<p>" + KEY.encode() * 9),
    "500": _saying("500 Internal Server Error", f"no {KEY}"),
    "503": _saying("503 Service Unavailable", KEY, "Retry-After: 0"),
    "a portal": lambda _: response("200 OK", b"<html>" + KEY.encode(), "Content-Type: text/html"),
    "a redirect": _saying("307 There", "", f"Location: https://other.example/?key={IN_URL}"),
    "a redirect, cut": _saying("302 There", "", f"Location: /{'x' * 186}{KEY}"),
    "no HTTP": lambda head: head,
    "a bad header": lambda _: f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n".encode(),
    "a bad length": lambda _: f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n".encode(),
    "a bad status": lambda _: f"HTTP/1.1 {KEY}\r\n\r\n".encode(),
    "a bad encoding": lambda _: response("200 OK", KEY.encode(), "Content-Encoding: gzip"),
}

_AUTHORIZATION = f"Authorization: Basic {base64.b64encode(f'{APP_KEY}:'.encode()).decode()}"


FEW = ("401", "400 for the header", "400", "a redirect", "a bad header")


async def provoke(canary: Canary, misfortunes: Sequence[str]) -> None:
    """Let everything go wrong, one after the other, each until the agent has met it."""
    agent, upstream = canary.agent, canary.upstream
    for number, name in enumerate(misfortunes):
        upstream.answer, asked = MISFORTUNES[name], upstream.requests
        sent = post(event(f"m{number}", note=name, card=CARD, mail=MAIL), _AUTHORIZATION)
        # To the upstream that has no more to do with the app's key than the path says.
        sent = sent.replace(b"POST /", b"POST /w/default/", 1)
        assert statuses(await talk(agent.port, sent)) == (204,), name
        await agent.ask("POST", "flush")
        async with asyncio.timeout(DEADLINE_S):
            while upstream.requests < asked + 2:
                if (await agent.status())["pending"] == 0:
                    break
                await asyncio.sleep(0.01)  # another process
        canary.keep("GET /api/agent/status", await agent.get("/api/agent/status"))
    for name in UPSTREAMS[1:]:
        path = f"/w/{name}/api/public/apps/track"
        sent = post(event(f"to-{name}"), _AUTHORIZATION, start=f"POST {path} HTTP/1.1")
        assert statuses(await talk(agent.port, sent)) == (204,)
    # By the app's key, and by one that is refused before anything is read of it.
    for sent in (
        post(event("by-key"), _AUTHORIZATION),
        post(event("in-the-body", writeKey=APP_KEY), start="POST /v1/track HTTP/1.1"),
        post(b"{}", _AUTHORIZATION),
        post(event("x"), _AUTHORIZATION, host="evil.example"),
        post(event("x"), f"Authorization: Bearer {APP_KEY}", "Content-Length: 5"),
        post(event("x"), _AUTHORIZATION, start="POST /w/other/x HTTP/1.1"),
    ):
        canary.keep("an answer to an app", await talk(agent.port, sent))
    await agent.until(
        lambda status: all(status["upstreams"][name]["reason"] for name in UPSTREAMS[1:])
    )


GETS = (
    *("/healthz", "/readyz", "/metrics", "/", "/api/agent/status", "/api/agent/events/m2"),
    *("/api/agent/events?state=dead&limit=1000", "/api/agent/events?limit=1000"),
    *("/api/agent/openapi.json", "/api/agent/nothing"),
)

READING = (
    ("status",),
    ("status", "--json"),
    ("list", "--json"),
    ("show", "m2"),
    ("show", "m2", "--json"),
    ("dead", "list"),
    ("dead", "list", "--json"),
    ("config", "show"),
    ("config", "show", "--json"),
    ("config", "check"),
)


async def read_everything(canary: Canary, folder: Path) -> None:
    agent = canary.agent
    for path in GETS:
        canary.keep(f"GET {path}", await talk(agent.port, _get(path)))
    for words in READING:
        command = [*words, "--config", str(agent.config)]
        said = await asyncio.to_thread(CliRunner().invoke, cli, command, prog_name="tranthor-agent")
        canary.keep(" ".join(words), said.output + repr(said.exception))
    for name in ("cmdline", "environ", "status"):
        canary.keep(f"/proc/PID/{name}", read(f"/proc/{agent.process.pid}/{name}"))
    # PYTHONFAULTHANDLER, as in the unit: what the interpreter says when it dies.
    agent.process.send_signal(signal.SIGABRT)
    await agent.process.wait()
    canary.keep("the log", read(agent.log))
    for name, content in state(folder):
        canary.keep(name, content)


def state(folder: Path) -> list[tuple[str, bytes]]:
    return [(file.name, read(file)) for file in folder.glob("outbox*")]


def read(file: Path | str) -> bytes:
    return Path(file).read_bytes()


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if why := why_no_certificates():
        pytest.skip(why)
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("source", ["inline", "file", "credential", "environment"])
async def test_no_error_brings_a_key_to_light(
    tmp_path: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    async with canary(tmp_path, source, certificates, monkeypatch) as found:
        # What is masked does not go by where it came from: all that can go wrong does so once.
        await provoke(found, list(MISFORTUNES) if source == "inline" else FEW)
        await be_told_anew(found, tmp_path, source)
        assert KEY.encode() in found.upstream.heard, "the canary is not in use"
        await read_everything(found, tmp_path)
    assert b"Fatal Python error: Aborted" in found.found["the log"]
    assert b"dead" in found.found["status --json"]
    if source == "environment":
        assert traces(KEY, found.found.pop("/proc/PID/environ")), "say so in the README"
    told = found.told()
    assert not told, "\n".join(told)


# --- a configuration with a mistake beside the key, or in it ---

BROKEN = {
    "no quotes": f"[upstream]\nwrite_key = {KEY}",
    "no end": f'[upstream]\nwrite_key = "{KEY}',
    "something behind": f'[upstream]\nwrite_key = "{KEY}" "{KEY}"',
    "twice": f'[upstream]\nwrite_key = "{KEY}"\nwrite_key = "{KEY}"',
    "a list": f'[upstream]\nwrite_key = ["{KEY}"]',
    "a table": f'[upstream.write_key]\nvalue = "{KEY}"',
    "a bad escape": f'[upstream]\nwrite_key = "\\q{KEY}"',
    "two lines": f'[upstream]\nwrite_key = """{KEY}\n{KEY}"""',
    "a control character": f'[upstream]\nwrite_key = "{KEY}\\u0001"',
    "beyond ASCII": f'[upstream]\nwrite_key = "{KEY}\\u00e9"',
    "in another section": f'[ingest]\nwrite_key = "{KEY}"',
    "misspelt": f'[upstream]\nwritekey = "{KEY}"',
    "in no section": f'write_key = "{KEY}"',
    "as the user of the address": f'[upstream]\nurl = "https://{KEY}@app.example"',
    "in the query of the address": f'[upstream]\nurl = "https://app.example/?key={KEY}"',
    "in a proxy of another scheme": f'[upstream]\nproxy = "socks5://me:{KEY}@proxy.example"',
    "in a proxy that is none": f'[upstream]\nproxy = "me:{KEY}@proxy.example"',
    "beside a file": f'[upstream]\nwrite_key = "{KEY}"\nwrite_key_file = "key"',
    "for a digest": f'[upstreams.crm]\napp_key_sha256 = ["{KEY}"]',
    "of a named upstream": f'[upstreams.crm]\nwrite_key = ["{KEY}"]',
    "of hashes": f'[redact]\nhash = ["userId"]\nkey = ["{KEY}"]',
    "of hashes, beside a file": f'[redact]\nkey = "{KEY}"\nkey_file = "key"',
    "of hashes, in two lines": f'[redact]\nkey = "{KEY}\\n{KEY}"',
    "beside a bad value": f'[upstream]\nwrite_key = "{KEY}"\ntimeout = 5',
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_in_the_configuration_is_told_without_the_key(
    tmp_path: Path, mistake: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(BROKEN[mistake] + "\n")
    for words in (["config", "check"], ["config", "show", "--json"], ["run"]):
        if words == ["run"] and mistake in STARTS:
            continue
        said = CliRunner().invoke(cli, [*words, "--config", str(config)])
        assert said.exit_code != 0 or words != ["config", "check"]
        assert traces(KEY, (said.output + repr(said.exception)).encode()) == []


STARTS = {"two lines", "a control character", "beyond ASCII"}
"""What is no mistake of the file: the agent runs, keeps events, and says what is wrong with the key."""


def test_a_variable_that_is_misspelt_is_told_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRANTHOR_AGENT_UPSTREAM__WRITEKEY", "TRANTHOR_AGENT_UPSTREAM__URL"):
        monkeypatch.setenv(name, f"https://{KEY}@app.example")
    monkeypatch.setenv("TRANTHOR_AGENT_UPSTREAM_WRITE_KEY", KEY)
    said = CliRunner().invoke(cli, ["config", "check"])
    assert said.exit_code == 78
    assert traces(KEY, said.output.encode()) == []


def _is_told_of_another_problem(before: str | None, status: dict[str, Any]) -> bool:
    return bool(status["config_problem"] != before)


async def be_told_anew(canary: Canary, folder: Path, source: str) -> None:
    """Reload a few of the mistakes, a key file that cannot be read, and at last what was there."""
    agent = canary.agent
    right = agent.config.read_text()
    for mistake in ("no quotes", "a list", "as the user of the address", "beside a bad value"):
        before = (await agent.status())["config_problem"]
        agent.config.write_text(BROKEN[mistake])
        agent.process.send_signal(signal.SIGHUP)
        await agent.until(partial(_is_told_of_another_problem, before))
        canary.keep("GET /api/agent/status", await agent.get("/api/agent/status"))
    if source == "file":
        (folder / "key").unlink()
        (folder / "key").mkdir()
    agent.config.write_text(right)
    agent.process.send_signal(signal.SIGHUP)
    gone = source == "file"
    await agent.until(lambda status: bool(status["config_problem"]) is gone)
    canary.keep("GET /api/agent/status", await agent.get("/api/agent/status"))
