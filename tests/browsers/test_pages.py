"""What web pages can do to the agent, tried by the pages themselves in a real Chromium.

All websites are on loopback under made-up names: Chromium holds nothing back then, as a browser
without rules for the local network would. `test_chrome_…` is about those rules.

Planted bugs that these tests were seen to find: an Origin of null that passes; text that is not
judged; an origin or the agent's own page told by its host alone, without the port; any Host; no look
at Sec-Fetch-Site; an allowed page let into /api/agent/; no credentials for beacons; refusals that
the page cannot read; a preflight for each event.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from browsers.chromium import PROGRAM, Chromium, Page, running_chromium
from browsers.tricks import TRACK, TRICKS, scripted
from browsers.websites import Passed, Relay, certificate, website
from processes import AgentProcess, free_port, running_agent

from agent.console.sandbox import DEFAULT_WRITE_KEY, Sandbox

pytestmark = [
    pytest.mark.process,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]

EVENT = '{"messageId": "%s", "event": "Tried", "userId": "u1", "properties": {"at": "@"}}'
"""The @ is where a form has its "="."""


NAMES = "MAP rebound.test 127.0.0.2, MAP till.test 127.0.0.2, MAP *.test 127.0.0.1"
"""Where they lead in the browser; the first rule that fits counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """An agent that allows two websites, a browser, and strangers. All are origins but the relay."""

    sandbox: Sandbox
    agent: AgentProcess
    relay: Relay
    front: str
    """The agent's URL, as pages know it."""
    browser: Chromium
    shop: str
    """Allowed, and served from this machine."""
    far: str
    """Allowed, and served from the internet, as far as Chromium knows."""
    far_stranger: str
    strangers: tuple[str, ...]

    async def attempt(
        self, tab: Page, name: str, origin: str, mark: str, *, allowed: bool
    ) -> list[Passed]:
        """Let a page of *origin* try that trick; return what came to the agent by it."""
        trick = TRICKS[name]
        script, path = trick.script, trick.path
        if allowed and trick.control:
            script, path = trick.control, "/"
        await tab.show(f"{origin}{path}")
        url = f"{self.front}{trick.to}?mark={mark}"
        await tab.run(scripted(script, url=url, body=EVENT % mark, shop=self.shop))
        if allowed:
            await self.delivered(mark)
        return await self.relay.answered(mark)

    async def delivered(self, message_id: str) -> None:
        await self.sandbox.wait_for(
            lambda it: any(one.message_id == message_id for one in it.stored), 30
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder: Path = tmp_path_factory.mktemp("browsers")
    sandbox = Sandbox(DEFAULT_WRITE_KEY)
    async with AsyncExitStack() as opened:
        enter = opened.enter_async_context
        tls = certificate(folder)
        shop_port, evil_port, far_port = (
            await enter(website()),
            await enter(website()),
            await enter(website(tls=tls)),
        )
        shop, far = f"http://shop.test:{shop_port}", f"https://far.test:{far_port}"
        agent = await enter(
            running_agent(
                folder,
                ingest=f'allowed_origins = ["{shop}", "{far}"]\nallowed_hosts = ["till.test"]',
                upstream=f'url = "{await enter(sandbox.serving())}"\nwrite_key = "{DEFAULT_WRITE_KEY}"',
            )
        )
        relay = Relay(agent.port)
        front = await enter(relay.serving())
        strangers = (
            f"http://evil.test:{evil_port}",
            f"http://shop.test:{evil_port}",
            f"http://127.0.0.1:{evil_port}",
        )
        browser = await enter(
            running_chromium(
                folder / "profile",
                [
                    f"--host-resolver-rules={NAMES}",
                    # Service workers are for https; and nobody knows the certificate.
                    f"--unsafely-treat-insecure-origin-as-secure={','.join((shop, *strangers))}",
                    "--ignore-certificate-errors",
                    f"--ip-address-space-overrides=127.0.0.1:{far_port}=public",
                ],
            )
        )
        yield World(
            sandbox=sandbox,
            agent=agent,
            relay=relay,
            front=front,
            browser=browser,
            shop=shop,
            far=far,
            far_stranger=f"https://evil.test:{far_port}",
            strangers=strangers,
        )


async def test_a_page_that_is_not_allowed_stores_nothing_by_any_trick(world: World) -> None:
    before = await world.agent.status()

    async with asyncio.TaskGroup() as pages:
        for place, stranger in enumerate(world.strangers):
            pages.create_task(try_all(world, stranger, f"evil-{place}", allowed=False))
        pages.create_task(try_all(world, world.shop, "good", allowed=True))

    assert len(world.relay.passed("mark=evil-")) == len(TRICKS) * len(world.strangers)
    after = await world.agent.status()
    assert after["accepted"] - before["accepted"] == len(TRICKS)
    assert not [one for one in world.sandbox.stored if one.message_id.startswith("evil-")]


async def try_all(world: World, origin: str, mark: str, *, allowed: bool) -> None:
    """Try one trick after the other; each is stored if *allowed*, and answered 403 if not."""
    async with world.browser.tab() as tab:
        for number, (name, trick) in enumerate(TRICKS.items()):
            tried = await world.attempt(tab, name, origin, f"{mark}-{number}", allowed=allowed)
            told = f"{name}, by {origin}: {tried}"
            assert {each.status for each in tried} == {trick.stored if allowed else 403}, told
            # What was tried is what it is called.
            hidden = {each.headers["origin"] for each in tried} == {"null"}
            assert hidden == (trick.hides and not allowed), told


@pytest.mark.parametrize("name", ["rebound.test", "till.test"])
async def test_a_name_that_a_page_has_rebound_is_no_name_of_the_agent(
    world: World, name: str
) -> None:
    """The page comes from a server of its own; then its name, and port, lead to the agent."""
    port = free_port()
    origin, mark = f"http://{name}:{port}", f"rebinding-{name}"
    allowed = name == "till.test"  # by ingest.allowed_hosts: such a page is the agent's own
    async with world.browser.tab() as tab:
        async with website("127.0.0.2", port):
            await tab.show(origin)
        relay = Relay(world.agent.port)
        async with relay.serving("127.0.0.2", port):
            script = """
                const json = {"Content-Type": "application/json"};
                return [await post(), await post({headers: json}), (await fetch(status)).status];
            """
            status, url = f"{origin}/api/agent/status?mark={mark}", f"{origin}{TRACK}?mark={mark}"
            answered = await tab.run(scripted(script, url=url, status=status, body=EVENT % mark))
            tried = await relay.answered(mark)

    assert answered == ([204, 204, 200] if allowed else [403, 403, 403])
    assert {each.headers["host"] for each in tried} == {f"{name}:{port}"}
    assert [each.headers.get("origin") for each in tried] == [origin, origin, None]
    if allowed:
        await world.delivered(mark)


READING = {
    "fetch": "return fetch(url).then(it => it.status, String)",
    "fetch without CORS": 'return fetch(url, {mode: "no-cors"}).then(it => it.type, String)',
    "script": 'return element("script", {src: url})',
    "module": "return import(url).then(String, String)",
    "stylesheet": 'return element("link", {rel: "stylesheet", href: url})',
    "image": 'return element("img", {src: url})',
    "frame": 'return element("iframe", {src: url})',
    "object": 'return element("object", {data: url})',
    "new tab": "open(url)",
    "stream of events": """
        const stream = new EventSource(url);
        return new Promise(resolve => { stream.onerror = () => resolve(stream.readyState) });
    """,
    "WebSocket": """
        const socket = new WebSocket(url.replace("http", "ws"));
        return new Promise(resolve => { socket.onerror = socket.onopen = it => resolve(it.type) });
    """,
}

ELEMENT = """
function element(tag, attributes) {
    const made = Object.assign(document.createElement(tag), attributes);
    const said = new Promise(resolve => { made.onload = made.onerror = it => resolve(it.type) });
    document.body.append(made);
    return said;
}
"""


async def test_no_page_may_look_into_the_agent(world: World) -> None:
    for place, origin in enumerate((world.shop, *world.strangers)):
        async with world.browser.page(origin) as page:
            for number, (name, script) in enumerate(READING.items()):
                mark = f"look-{place}-{number}"
                url = f"{world.front}/api/agent/status?mark={mark}"
                await page.run(scripted(ELEMENT + script, url=url))
                tried = await world.relay.answered(mark)
                assert {each.status for each in tried} == {403}, f"{name}, by {origin}: {tried}"

    # A person may, in the same browser.
    async with world.browser.page(f"{world.front}/api/agent/status?mark=typed") as page:
        assert '"accepted"' in await page.run("return document.body.textContent")


STEERING = ("return post()", 'return post({mode: "no-cors"})', "submit()")


async def test_no_page_may_steer_the_agent(world: World) -> None:
    for place, origin in enumerate((world.shop, *world.strangers)):
        async with world.browser.tab() as tab:
            for number, script in enumerate(STEERING):
                mark = f"pause-{place}-{number}"
                url = f"{world.front}/api/agent/pause?mark={mark}"
                await tab.show(origin)
                await tab.run(scripted(script, url=url, body="@"))
                tried = await world.relay.answered(mark)
                assert {each.status for each in tried} == {403}, f"{script}, by {origin}: {tried}"

    assert (await world.agent.status())["state"] == "flowing"


async def test_what_chrome_asks_for_a_page_without_saying_so_is_kept_from_that_page(
    world: World,
) -> None:
    """Of names beside the loopback ones Chromium says neither Origin nor Sec-Fetch-Site in a GET."""
    relay = Relay(world.agent.port)
    async with (
        relay.serving("127.0.0.2") as front,
        world.browser.page(world.strangers[0]) as page,
    ):
        url = front.replace("127.0.0.2", "till.test") + "/api/agent/status?mark=plain"
        fetched, run = [
            await page.run(scripted(ELEMENT + READING[name], url=url))
            for name in ("fetch without CORS", "script")
        ]
        tried = await relay.answered("mark=plain")

    assert [each.status for each in tried] == [200, 200]
    assert not {"origin", "sec-fetch-site"} & tried[0].headers.keys()
    # By Cross-Origin-Resource-Policy; without it one would be "opaque", the other loaded and run.
    assert fetched.startswith("TypeError")
    assert run == "error"


async def test_an_allowed_page_can_read_what_it_is_told(world: World) -> None:
    said = await ask_four_times(world, world.shop)

    assert said == {
        "stored": [204, None, ""],
        "again": [204, "true", ""],
        "wrong": [400, None, "properties: expected object, got array"],
        "elsewhere": [
            *(403, None),
            (
                f"Origin: '{world.shop}' may post events to /api/public/apps/ or /v1/, and nothing"
                " else; ask from a program on this machine"
            ),
        ],
    }
    # The permission to post JSON is asked for once, and remembered.
    assert [each.method for each in world.relay.passed("mark=told")] == [
        *("OPTIONS", "POST", "POST", "POST"),
        "GET",
    ]


async def ask_four_times(world: World, origin: str) -> dict[str, Any]:
    script = """
        const json = {"Content-Type": "application/json"};
        async function told(answering) {
            const answer = await answering, text = await answer.text();
            const replayed = answer.headers.get("Idempotent-Replayed");
            return [answer.status, replayed, text && JSON.parse(text).message];
        }
        return {
            stored: await told(fetch(url, {method: "POST", headers: json, body})),
            again: await told(fetch(url, {method: "POST", headers: json, body})),
            wrong: await told(fetch(url, {method: "POST", headers: json, body: wrong})),
            elsewhere: await told(fetch(status)),
        };
    """
    body = EVENT % "told"
    async with world.browser.page(origin) as page:
        said: dict[str, Any] = await page.run(
            scripted(
                script,
                url=f"{world.front}{TRACK}?mark=told",
                status=f"{world.front}/api/agent/status?mark=told",
                body=body,
                wrong=body.replace('{"at": "@"}', "[]"),
            )
        )
        return said


async def test_the_example_for_pages_stores_its_event(world: World) -> None:
    apps = (Path(__file__).parents[2] / "docs" / "apps.md").read_text()
    (script,) = re.findall(r"^```js\n(.*?)^```$", apps, re.MULTILINE | re.DOTALL)
    at_home = script.replace("http://127.0.0.1:7227", world.front)
    assert at_home != script
    before = await world.agent.status()

    async with world.browser.page(world.shop) as page:
        await page.run(at_home)
        # By fetch, and once more by the beacon.
        await world.agent.until(lambda it: it["duplicates"] == before["duplicates"] + 1)
    assert (await world.agent.status())["accepted"] == before["accepted"] + 1


# --- Chrome's own rules ----------------------------------------------------------------------------

FIRST_WITH_LOOPBACK = 145
"""The first Chromium that has a permission for this machine alone; 142 had one for all near networks."""


async def test_chrome_asks_the_person_before_a_page_from_the_internet_reaches_the_agent(
    world: World,
) -> None:
    await skip_without_the_permission(world)
    await permit(world, world.far, "denied")
    async with world.browser.page(world.far) as page:
        url = f"{world.front}{TRACK}?mark=far"
        for script in ("return post()", "return post({mode: 'no-cors'})"):
            said = await page.run(scripted(script, url=url, body=EVENT % "far-denied"))
            assert said.startswith("TypeError")
    assert world.relay.passed("mark=far") == []

    await permit(world, world.far, "granted")
    async with world.browser.tab() as tab:
        for number, (name, trick) in enumerate(TRICKS.items()):
            if "submit" in (trick.control or trick.script):
                continue
            tried = await world.attempt(tab, name, world.far, f"far-{number}", allowed=True)
            assert {each.status for each in tried} == {trick.stored}, f"{name}: {tried}"


async def test_what_chrome_lets_through_for_a_stranger_is_refused_all_the_same(
    world: World,
) -> None:
    await skip_without_the_permission(world)
    # A form in the whole tab is let through without a question.
    await permit(world, world.far_stranger, "denied")
    async with world.browser.tab() as tab:
        tried = await world.attempt(tab, "form", world.far_stranger, "posed", allowed=False)
        assert [(each.headers["origin"], each.status) for each in tried] == [("null", 403)]

    # And whoever said yes to a stranger has not said yes for the agent.
    await permit(world, world.far_stranger, "granted")
    async with world.browser.tab() as tab:
        for number, name in enumerate(TRICKS):
            mark = f"far-evil-{number}"
            tried = await world.attempt(tab, name, world.far_stranger, mark, allowed=False)
            assert {each.status for each in tried} == {403}, f"{name}: {tried}"
    assert not [one for one in world.sandbox.stored if one.message_id.startswith("far-evil-")]


async def permit(world: World, origin: str, setting: str) -> None:
    """Answer what Chrome would ask the person about that website."""
    await world.browser.ask(
        "Browser.setPermission",
        permission={"name": "loopback-network"},
        setting=setting,
        origin=origin,
    )


async def skip_without_the_permission(world: World) -> None:
    product = (await world.browser.ask("Browser.getVersion"))["product"]
    version = int(product.partition("/")[2].partition(".")[0])
    if version < FIRST_WITH_LOOPBACK:
        pytest.skip(f"{product} has no permission for this machine alone")
