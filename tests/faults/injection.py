"""System calls that fail on request: strace puts errors into the agent's writing, from outside.

Only calls on the outbox's own files are hit; sockets and logs are left alone. strace counts the
calls of each thread, and each of the agent's connections has a thread of its own, so a connection
that is opened again counts anew. What that means for the two ways to put a fault in:

    born_with    every thread from the first call on: for what an agent does while it starts
    striking     the threads that run now: a fault that is over once the outbox was opened again;
                 or, *lasting*, all threads now and to come, until the block ends
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from processes import DEADLINE_S, AgentProcess

WRITE: Final = "pwrite64,write"
SYNC: Final = "fdatasync,fsync"
TRUNCATE: Final = "ftruncate"
ALLOCATE: Final = "fallocate"

ALWAYS: Final = "1+"

QUEUE: Final = ("", "-wal", "-shm", "-journal")
ASIDE: Final = (".lock", ".reserve")
"""How the names of the files end that SQLite writes, and of those that the agent itself does."""


_LARGEST_WRITE_BYTES = 16 * 1024 * 1024
"""More than any one call writes: what is traced is the whole of it."""


@dataclass(frozen=True, slots=True)
class DiskFault:
    """Which *calls* fail, with which *error*; *when* is strace's: "7", "7..10", "7+"."""

    calls: str
    error: str
    when: str

    def __str__(self) -> str:
        return f"{self.error} at {self.calls.partition(',')[0]} {self.when}"


def unavailable() -> str:
    """Return why no fault can be put in on this machine; empty when one can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as victim:
        command = ["strace", "-o", "/dev/null", "-p", str(victim.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            victim.kill()
    return "" if "attached" in said else f"strace cannot attach: {said.strip()}"


def born_with(
    fault: DiskFault | None,
    agent: AgentProcess,
    trace: Path,
    *,
    files: Sequence[str] = QUEUE,
    data: bool = False,
) -> list[str]:
    """Return the command of *agent* so that *fault* is in it from its first call on.

    Without a fault its calls are only traced; with *data*, so that they can be replayed
    (`page_cache`). The process stays a child of who starts it (-D).
    """
    options = _options(fault, agent, trace, files, data=data)
    return ["strace", "-D", "-f", "--seccomp-bpf", *options, *agent.command]


@asynccontextmanager
async def striking(
    fault: DiskFault | None,
    agent: AgentProcess,
    trace: Path,
    *,
    lasting: bool = False,
    data: bool = False,
) -> AsyncIterator[None]:
    """Put *fault* into the running *agent* while the block runs, or only trace its calls."""
    pid = str(agent.process.pid)
    threads = [pid] if lasting else os.listdir(f"/proc/{pid}/task")  # noqa: PTH208  # names, no paths
    strace = await asyncio.create_subprocess_exec(
        "strace",
        *(["-f"] if lasting else []),
        *_options(fault, agent, trace, QUEUE, data=data),
        *(argument for thread in threads for argument in ("-p", thread)),
        stderr=subprocess.PIPE,
    )
    assert strace.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            for _ in threads:
                assert b"attached" in (line := await strace.stderr.readline()), line
        yield
    finally:
        if agent.alive:  # otherwise it ends by itself
            strace.terminate()
        async with asyncio.timeout(DEADLINE_S):
            await strace.communicate()


def calls_made(trace: Path) -> Counter[str]:
    """Return how often each kind of call was made, by the thread that made most of them."""
    made: dict[str, Counter[str]] = {}
    for thread, call in re.findall(r"^(\d+) +(\w+)\(", _text(trace), re.MULTILINE):
        for kind in (WRITE, SYNC, TRUNCATE, ALLOCATE):
            if call in kind.split(","):
                made.setdefault(thread, Counter())[kind] += 1
    return max(made.values(), key=Counter.total, default=Counter())


def struck(trace: Path) -> int:
    """Return how many calls failed by request."""
    return _text(trace).count("(INJECTED)")


def _text(trace: Path) -> str:
    return trace.read_text(errors="replace") if trace.exists() else ""


def _options(
    fault: DiskFault | None,
    agent: AgentProcess,
    trace: Path,
    files: Sequence[str],
    *,
    data: bool,
) -> list[str]:
    """Return what strace is told: the calls and files to look at, and what to do to them."""
    watched = f"{WRITE},{SYNC},{TRUNCATE},{ALLOCATE}"
    options = ["-o", str(trace), "-e", f"trace={watched}", "-e", "signal=none"]
    options += ["-y", "-xx", "-s", str(_LARGEST_WRITE_BYTES)] if data else ["-s", "0"]
    if fault is not None:
        options += ["-e", f"inject={fault.calls}:error={fault.error}:when={fault.when}"]
    paths = [f"{agent.outbox}{ending}" for ending in files]
    if files is QUEUE:
        paths.append(str(agent.outbox.parent))  # a folder is synced, too
    return [*options, *(argument for path in paths for argument in ("-P", path))]
