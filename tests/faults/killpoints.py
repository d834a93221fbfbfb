"""Every moment at which an agent can be killed between its start and its end.

Its files change by a handful of system calls, and between two of them nothing does. So a run is
traced once to number the calls, and repeated with a SIGKILL instead of the n-th. strace does both.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from typing import NamedTuple

import pytest
from processes import DEADLINE_S, AgentProcess

_CALLS = "pwrite64,pwritev,write,fdatasync,fsync,ftruncate,fallocate,?unlink,unlinkat"
"""What changes a file. "?": not every machine has it."""

_SUFFIXES = ("", "-journal", "-wal", "-shm", ".lock", ".reserve")

_POLL_S = 0.02


class Killpoint(NamedTuple):
    """Before the *nth* (1-based) *call* that one thread makes on the file with *suffix*."""

    suffix: str
    call: str
    nth: int


def need_strace() -> None:
    """Skip where processes cannot be traced."""
    tried = shutil.which("strace") and subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, check=False
    )
    if not tried or tried.returncode:
        pytest.skip("needs strace, and the right to trace a process")


async def killpoints(agent: AgentProcess) -> list[Killpoint]:
    """Start and stop *agent*; return the calls by which it changed its outbox, in their order."""
    trace = agent.outbox.with_name("trace")
    options = ("-o", str(trace), "-y", "-s", "0", "-e", f"trace={_CALLS}")
    paths = [option for suffix in _SUFFIXES for option in ("-P", f"{agent.outbox}{suffix}")]
    assert not await _run(agent, *options, *paths)
    found: dict[Killpoint, None] = {}
    counts = Counter[tuple[str, ...]]()
    for line in trace.read_text().splitlines():
        # The path stands after the number of the open file, or by itself, as for unlink.
        if match := re.match(rf"(\d+) +(\w+)\(.*?{re.escape(str(agent.outbox))}([-.\w]*)", line):
            counts[match.groups()] += 1
            _, call, suffix = match.groups()
            found[Killpoint(suffix, call, counts[match.groups()])] = None
    return list(found)


async def killed_at(agent: AgentProcess, point: Killpoint) -> bool:
    """Start *agent* to be killed at *point*; return False if it came and went without reaching it."""
    suffix, call, nth = point
    return await _run(
        agent,
        *("-o", "/dev/null", "-P", f"{agent.outbox}{suffix}", "-e", f"trace={call}"),
        *("-e", f"inject={call}:signal=SIGKILL:when={nth}"),
    )


async def _run(agent: AgentProcess, *options: str) -> bool:
    """Start and stop *agent* under strace; return whether it was killed."""
    with agent.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *("strace", "-f", *options),  # not --seccomp-bpf: with it no signal is injected
            *(*agent.command, "run", "--config", str(agent.config)),
            stderr=log,
            env=agent.environ,
            start_new_session=True,  # signals go to the agent, which is not our child
        )
    try:
        async with asyncio.timeout(DEADLINE_S):
            while process.returncode is None and not await agent._is_ready():  # noqa: ASYNC110  # another process
                await asyncio.sleep(_POLL_S)
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
            return await process.wait() == -signal.SIGKILL
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
