"""A headless Chromium that does what a test says, over its DevTools protocol; no other library needed.

Source: Chrome DevTools Protocol, domains Target, Page, Runtime and Browser, in flattened sessions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from processes import DEADLINE_S

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")

_QUIET = (
    "--headless=new",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
    "--password-store=basic",
    "--remote-debugging-port=0",
)
"""No window, no talk with anybody but the test's servers, no question to anybody."""


class PageError(Exception):
    """What a script in a page threw."""


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session

    async def show(self, url: str) -> None:
        """Go to *url*, as if it were typed; return when it is loaded."""
        shown = await self._browser.ask("Page.navigate", self._session, url=url)
        assert "errorText" not in shown, f"{url}: {shown}"
        async with asyncio.timeout(DEADLINE_S):
            await self._browser.loaded(shown["loaderId"])

    async def run(self, script: str) -> Any:
        """Run the body of an async function in the page; return what it returns. Raises PageError."""
        said = await self._browser.ask(
            "Runtime.evaluate",
            session=self._session,
            expression=f"(async () => {{{script}}})()",
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in said:
            thrown = said["exceptionDetails"].get("exception", {})
            raise PageError(thrown.get("description") or str(said["exceptionDetails"]))
        return said["result"].get("value")


class Chromium:
    """A running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loads: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """By the id that the protocol has for a navigation."""

    async def ask(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; return its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        call: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session:
            call["sessionId"] = session
        await self._socket.send_json(call)
        async with asyncio.timeout(DEADLINE_S):
            said = await answer
        assert "error" not in said, f"{method}: {said['error']}"
        result: dict[str, Any] = said["result"]
        return result

    @asynccontextmanager
    async def tab(self) -> AsyncIterator[Page]:
        """Open a tab; the block's end closes it."""
        target = (await self.ask("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.ask("Target.attachToTarget", targetId=target, flatten=True)
        session: str = attached["sessionId"]
        await self.ask("Page.enable", session)
        await self.ask("Page.setLifecycleEventsEnabled", session, enabled=True)
        try:
            yield Page(self, session)
        finally:
            await self.ask("Target.closeTarget", targetId=target)

    @asynccontextmanager
    async def page(self, url: str) -> AsyncIterator[Page]:
        """Show *url* in a tab of its own, loaded; the block's end closes it."""
        async with self.tab() as page:
            await page.show(url)
            yield page

    async def loaded(self, loader: str) -> None:
        await self._loads[loader].wait()

    async def listen(self) -> None:
        """Take up what the browser says, for as long as it runs."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._answers.pop(said["id"])
                if not answer.cancelled():  # who asked may have given up
                    answer.set_result(said)
            elif said["method"] == "Page.lifecycleEvent" and said["params"]["name"] == "load":
                self._loads[said["params"]["loaderId"]].set()


@asynccontextmanager
async def running_chromium(folder: Path, arguments: Iterable[str] = ()) -> AsyncIterator[Chromium]:
    """Start a browser with a profile of its own in *folder*; end it with the block."""
    assert PROGRAM is not None
    unconfined = ["--no-sandbox"] if os.geteuid() == 0 else []
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *_QUIET,
        *unconfined,
        f"--user-data-dir={folder}",
        *arguments,
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(folder)},
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            address = await _address(process)
        async with (
            asyncio.TaskGroup() as tasks,
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as socket,
        ):
            browser = Chromium(socket)
            chores = [tasks.create_task(browser.listen()), tasks.create_task(_drain(process))]
            try:
                yield browser
            finally:
                await browser.ask("Browser.close")
                for chore in chores:
                    chore.cancel()
    finally:
        if process.returncode is None:
            async with asyncio.timeout(DEADLINE_S):
                await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said = b""
    while line := await process.stderr.readline():
        said += line
        if found := re.match(rb"DevTools listening on (ws://\S+)", line):
            return found[1].decode()
    raise AssertionError(f"Chromium did not start: {said.decode(errors='replace')}")


async def _drain(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while await process.stderr.read(65_536):
        pass
