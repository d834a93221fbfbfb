"""The scene of `test_untrusted_upstreams.py` that needs a network namespace: plain_http_scene.py FOLDER."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from security.peers import STORED, listening
from security.test_untrusted_upstreams import held, with_an_event

ADDRESS = "10.9.8.7"


def begin() -> None:
    for arguments in (
        ["link", "set", "lo", "up"],
        ["address", "add", f"{ADDRESS}/32", "dev", "lo"],
    ):
        subprocess.run(["ip", *arguments], check=True)


async def play(folder: Path) -> None:
    async with (
        listening(STORED, host=ADDRESS) as peer,
        listening(STORED, host=ADDRESS) as proxy,
    ):
        for name, url, keys in (
            ("upstream", f"http://{ADDRESS}:{peer.port}", {}),
            ("proxy", "http://127.0.0.1:9", {"proxy": f"http://{ADDRESS}:{proxy.port}"}),
        ):
            (folder / name).mkdir()
            async with with_an_event(folder / name, url, **keys) as agent:
                await held(agent, "plain http", "use https")
                await agent.ask("POST", "flush")
                await held(agent)
        assert (peer.connections, proxy.connections) == (0, 0)


if __name__ == "__main__":
    begin()
    asyncio.run(play(Path(sys.argv[1])))
