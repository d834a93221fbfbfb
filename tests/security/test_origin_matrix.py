"""Who may do what, as one table, over a real socket: by Host, Origin, Sec-Fetch-Site and content type.

`tests/test_guard.py` has the finer points of each header; here is what they come to together, at the
real paths, with and without allow-lists. A refusal has to come before the body, which those rows
never send.

Planted bugs that these were seen to find: a Host that may begin with a good one, an Origin compared
without its scheme, an allowed page that may steer the agent, Sec-Fetch-Site left out, and a
judgement after the body.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import AgentProcess, running_agent
from security.raw import event, statuses, talk, troubles

pytestmark = pytest.mark.process

ALLOWED = """
allowed_hosts = ["till.local"]
allowed_origins = ["https://shop.example", "http://localhost:3000"]
"""
LISTED = {"https://shop.example", "http://localhost:3000"}

TABLE = """
#  request               Host                    Origin                     Sec-Fetch-Site  Content-Type  none allowed
   POST track            127.0.0.1               -                          -               json          204  204
   POST track            127.0.0.1:PORT          -                          -               json          204  204
   POST track            localhost:PORT          -                          -               json          204  204
   POST track            LOCALHOST               -                          -               json          204  204
   POST track            [::1]:PORT              -                          -               json          204  204
   POST track            till.local              -                          -               json          403  204
   POST track            till.local:PORT         -                          -               json          403  204
   POST track            Till.Local:80           -                          -               json          403  204
   POST track            sub.till.local          -                          -               json          403  403
   POST track            till.local.evil.example -                          -               json          403  403
   POST track            evil.example            -                          -               json          403  403
   POST track            127.0.0.1.evil.example  -                          -               json          403  403
   POST track            evil.example:PORT       -                          none            json          403  403
   POST track            127.0.0.1@evil.example  -                          -               json          403  403
   POST track            127.0.0.2               -                          -               json          403  403
   POST track            0.0.0.0:PORT            -                          -               json          403  403
   POST track            [::ffff:127.0.0.1]      -                          -               json          403  403
   POST track            localhost.              -                          -               json          403  403
   POST track            2130706433              -                          -               json          403  403
   POST track            -                       -                          -               json          403  403

   POST track            127.0.0.1:PORT          http://127.0.0.1:PORT      same-origin     json          204  204
   POST track            localhost:PORT          http://localhost:PORT      same-origin     json          204  204
   POST track            127.0.0.1:PORT          http://localhost:PORT      same-site       json          403  403
   POST track            127.0.0.1:PORT          http://127.0.0.1:1         same-site       json          403  403
   POST track            127.0.0.1:PORT          https://127.0.0.1:PORT     cross-site      json          403  403
   POST track            evil.example:PORT       http://evil.example:PORT   same-origin     json          403  403
   POST track            till.local:PORT         http://till.local:PORT     same-origin     json          403  204
   POST track            till.local              https://till.local         cross-site      json          403  403

   POST track            127.0.0.1:PORT          https://shop.example       cross-site      json          403  204
   POST track            127.0.0.1:PORT          https://shop.example       -               json          403  204
   POST track            till.local              https://shop.example       cross-site      json          403  204
   POST track            evil.example            https://shop.example       cross-site      json          403  403
   POST track            127.0.0.1:PORT          https://shop.example       cross-site      text          403  204
   POST track            127.0.0.1:PORT          https://shop.example       cross-site      form          403  415
   POST track            127.0.0.1:PORT          -                          -               text          415  415
   POST track            127.0.0.1:PORT          -                          -               form          415  415
   POST track            127.0.0.1               http://shop.example        cross-site      json          403  403
   POST track            127.0.0.1               https://shop.example:444   cross-site      json          403  403
   POST track            127.0.0.1               https://shop.example.evil  cross-site      json          403  403
   POST track            127.0.0.1               https://evil-shop.example  cross-site      json          403  403
   POST track            127.0.0.1               https://SHOP.example       cross-site      json          403  403
   POST track            localhost               http://localhost:3000      same-site       json          403  204
   POST track            localhost:PORT          http://localhost           same-site       json          403  403
   POST track            127.0.0.1               https://evil.example       cross-site      json          403  403
   POST track            127.0.0.1               https://evil.example       same-origin     json          403  403
   POST track            127.0.0.1               null                       cross-site      json          403  403
   POST track            127.0.0.1               null                       same-origin     json          403  403
   POST track            127.0.0.1               file://                    none            json          403  403
   POST track            127.0.0.1               *                          -               json          403  403
   POST track            127.0.0.1               https://evil.example       cross-site      text          403  403
   POST track            127.0.0.1               https://evil.example       cross-site      form          403  403
   POST track            127.0.0.1               https://evil.example       cross-site      -             403  403
   POST track            127.0.0.1               -                          cross-site      json          403  403
   POST track            127.0.0.1               -                          cross-site      form          403  403
   POST track            127.0.0.1               -                          same-site       text          403  403
   POST track            127.0.0.1               -                          same-origin     json          204  204
   POST track            127.0.0.1               -                          none            json          204  204
   POST /w/default+track 127.0.0.1               https://shop.example       cross-site      json          403  204
   POST /w/default+track 127.0.0.1               https://evil.example       cross-site      json          403  403

   POST v1               127.0.0.1:PORT          -                          -               json          200  200
   POST v1               127.0.0.1:PORT          -                          -               form          200  200
   POST v1               127.0.0.1:PORT          https://shop.example       cross-site      text          403  200
   POST v1               127.0.0.1:PORT          https://evil.example       cross-site      text          403  403
   POST v1               127.0.0.1:PORT          https://evil.example       cross-site      form          403  403
   POST v1               127.0.0.1:PORT          null                       cross-site      form          403  403
   POST v1               127.0.0.1:PORT          -                          cross-site      form          403  403
   POST v1               evil.example:PORT       http://evil.example:PORT   same-origin     text          403  403

   OPTIONS track         127.0.0.1:PORT          https://shop.example       cross-site      -             403  204
   OPTIONS track         127.0.0.1:PORT          https://evil.example       cross-site      -             403  403
   OPTIONS track         127.0.0.1:PORT          null                       cross-site      -             403  403
   OPTIONS track         evil.example            https://shop.example       cross-site      -             403  403
   OPTIONS flush         127.0.0.1:PORT          https://shop.example       cross-site      -             403  403

   GET status            127.0.0.1               -                          -               -             200  200
   GET status            127.0.0.1:PORT          http://127.0.0.1:PORT      same-origin     -             200  200
   GET status            127.0.0.1               -                          none            -             200  200
   GET status            till.local              -                          -               -             403  200
   GET status            127.0.0.1               https://shop.example       cross-site      -             403  403
   GET status            127.0.0.1               -                          cross-site      -             403  403
   GET status            evil.example            -                          -               -             403  403
   GET events            127.0.0.1               https://shop.example       cross-site      -             403  403
   GET events            evil.example            http://evil.example        same-origin     -             403  403
   GET metrics           127.0.0.1               -                          cross-site      -             403  403
   GET metrics           evil.example            -                          -               -             403  403
   GET healthz           127.0.0.1               https://evil.example       cross-site      -             403  403
   GET healthz           evil.example            -                          -               -             403  403
   POST flush            127.0.0.1:PORT          http://127.0.0.1:PORT      same-origin     json          200  200
   POST flush            127.0.0.1               https://shop.example       cross-site      json          403  403
   POST flush            127.0.0.1               https://evil.example       cross-site      text          403  403
   POST flush            127.0.0.1               -                          cross-site      form          403  403
   POST flush            127.0.0.1               null                       cross-site      form          403  403
   POST flush            evil.example            -                          -               json          403  403
   POST discard          127.0.0.1               https://shop.example       cross-site      json          403  403
"""

PATHS = {
    "track": "/api/public/apps/track",
    "/w/default+track": "/w/default/api/public/apps/track",
    "v1": "/v1/track",
    "status": "/api/agent/status",
    "events": "/api/agent/events",
    "flush": "/api/agent/flush",
    "discard": "/api/agent/dead/discard",
    "metrics": "/metrics",
    "healthz": "/healthz",
}
TYPES = {
    "json": "application/json",
    "text": "text/plain;charset=UTF-8",
    "form": "application/x-www-form-urlencoded",
}


@dataclass(frozen=True, slots=True)
class Row:
    line: str
    method: str
    path: str
    host: str | None
    origin: str | None
    site: str | None
    content_type: str | None
    statuses: dict[str, int]

    @property
    def takes_events(self) -> bool:
        return self.method == "POST" and self.path.endswith("/track")

    def sent(self, port: int, message_id: str, status: int) -> bytes:
        """Return the request; of one that must be refused only the head."""
        post = self.method == "POST"
        body = event(message_id) if self.takes_events else b"{}"
        lines = {
            "Host": self.host,
            "Origin": self.origin,
            "Sec-Fetch-Site": self.site,
            "Content-Type": self.content_type,
            "Content-Length": str(len(body)) if post else None,
            "Access-Control-Request-Method": "POST" if self.method == "OPTIONS" else None,
        }
        head = f"{self.method} {self.path} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in lines.items() if value is not None
        )
        whole = post and status != 403
        return head.replace("PORT", str(port)).encode() + b"\r\n" + (body if whole else b"")


def rows() -> list[Row]:
    found = []
    for line in TABLE.strip().splitlines()[1:]:
        if not line:
            continue
        method, path, *values, none, allowed = line.split()
        host, origin, site, content_type = (None if value == "-" else value for value in values)
        found.append(
            Row(
                line=line.strip(),
                method=method,
                path=PATHS[path],
                host=host,
                origin=origin,
                site=site,
                content_type=None if content_type is None else TYPES[content_type],
                statuses={"none": int(none), "allowed": int(allowed)},
            )
        )
    return found


@pytest.fixture(params=["none", "allowed"])
async def lists(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def agent(tmp_path: Path, lists: str) -> AsyncIterator[AgentProcess]:
    async with running_agent(tmp_path, ingest=ALLOWED if lists == "allowed" else "") as agent:
        yield agent


async def test_only_apps_of_this_machine_and_listed_pages_may_do_anything(
    agent: AgentProcess, lists: str
) -> None:
    assert len(rows()) >= 40
    pid, wrong, accepted = agent.process.pid, [], 0
    for number, row in enumerate(rows()):
        status = row.statuses[lists]
        answered = await talk(agent.port, row.sent(agent.port, f"m{number}", status))
        if statuses(answered) != (status,):
            wrong.append(f"{row.line}: {answered!r}")
        accepted += status < 300 and row.takes_events
        # A page reads an answer only by this header, and none but a listed one has it.
        named = f"Access-Control-Allow-Origin: {row.origin}\r\n".encode()
        listed = lists == "allowed" and row.origin in LISTED
        if (named in answered) != listed or (b"Access-Control-" in answered) != listed:
            wrong.append(f"{row.line}: {answered!r}")
        if b"Access-Control-Allow-Origin: *" in answered:
            wrong.append(f"{row.line}: {answered!r}")
    assert not wrong, "\n".join(wrong)
    assert (await agent.status())["accepted"] == accepted
    assert not troubles(agent, pid)
