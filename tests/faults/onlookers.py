"""People and scripts that look at an outbox ten times a second, every other one killed at it.

    PYTHONPATH=tests python -m faults.onlookers PLAN

To load Python and the commands takes many times as long as to look. So one process loads them and
forks for each look, which then runs the command from its first line; one look in ten is a process
from nothing. `looking` starts that process and stops it; PLAN is its affair.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
from faults import planted

# What the commands load when they need it is loaded here, once.
from agent.__main__ import main
from agent.console import diagnosis, listing, operations, rendering  # noqa: F401
from agent.outbox import access
from agent.outbox.records import Selection

_INTERVAL_S = 0.1

_FROM_NOTHING = 10
"""Of so many looks one loads Python anew."""

_AT_ONCE = 4
"""Looks at most; on a machine that does not keep up they would only pile up."""

_POLL_S = 0.001
"""Between two glances at what a look has open: it reads for some milliseconds."""

_LIFE_S = 0.1
"""About as long as a look takes; killed ones die somewhere in it."""

_READ_S = 0.005
"""About as long as it has the outbox open."""

_DEADLINE_S = 60.0
"""A look that has not ended by itself then never will."""

_TEXT_BYTES = 4096
"""Of what a look said; the end of a traceback says most."""

DIRECTLY = "reader"
"""Instead of a command: read by `open_reader`, whatever runs."""


class Order(msgspec.Struct, frozen=True):
    """A command to give again and again. *user* is a uid and the one gid; None: whoever runs the tests."""

    argv: list[str]
    user: tuple[int, int] | None = None


class Look(msgspec.Struct, frozen=True):
    """What became of one. *open* is whether it was killed with the outbox open."""

    order: Order
    killed: bool
    open: bool
    code: int
    output: str

    @property
    def name(self) -> str:
        return self.order.argv[0]


class _Plan(msgspec.Struct, frozen=True):
    outbox: str
    orders: list[Order]
    kills: bool
    bug: str | None


@asynccontextmanager
async def looking(
    outbox: Path,
    orders: Sequence[Order],
    *,
    python: str = sys.executable,
    environ: dict[str, str] | None = None,
    kills: bool = True,
    bug: str | None = None,
) -> AsyncIterator[list[Look]]:
    """Look at *outbox* while the block runs; the list grows, and is whole when the block has ended.

    The commands have the planted *bug*, if any.
    """
    plan = _Plan(str(outbox), list(orders), kills, bug)
    process = await asyncio.create_subprocess_exec(
        *(python, "-m", "faults.onlookers", msgspec.json.encode(plan).decode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environ,
        start_new_session=True,  # so that all looks end with it if need be
    )
    assert process.stdin is not None
    assert process.stdout is not None
    looks: list[Look] = []
    try:
        await process.stdout.readline()  # all is loaded
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_collect(process.stdout, looks))
            yield looks
            process.stdin.close()
            async with asyncio.timeout(_DEADLINE_S):
                await process.wait()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _collect(stdout: asyncio.StreamReader, looks: list[Look]) -> None:
    async for line in stdout:
        looks.append(msgspec.json.decode(line, type=Look))  # noqa: PERF401  # it is read as it grows


# --- the process that forks ---


def _look_until_told(plan: _Plan) -> None:
    """Start a look every `_INTERVAL_S`, in turn through the orders, until stdin ends."""
    rng = random.Random(1)
    _say(b"loaded\n")
    alive = set[int]()
    for number in itertools.count():
        due_s = time.monotonic() + _INTERVAL_S
        alive.add(_fork(_one_look, plan, number, rng.random()))
        while (wait_s := due_s - time.monotonic()) > 0 or len(alive) == _AT_ONCE:
            if select.select([0], [], [], max(wait_s, _POLL_S))[0]:
                return  # nothing is ever written there
            alive -= {pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]}


def _one_look(plan: _Plan, number: int, moment: float) -> None:
    order = plan.orders[number % len(plan.orders)]
    output = os.memfd_create("output")
    pid = _fork(_become, order, output, number % _FROM_NOTHING == 0)
    # In turn through the orders twice: each of them is killed, and each is not.
    killed = plan.kills and bool(number // len(plan.orders) % 2)
    is_open = killed and _kill(pid, Path(plan.outbox), moment)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = os.pread(output, _TEXT_BYTES, max(0, os.fstat(output).st_size - _TEXT_BYTES))
    _say(
        msgspec.json.encode(Look(order, killed, is_open, code, text.decode(errors="replace")))
        + b"\n"
    )


def _kill(pid: int, outbox: Path, moment: float) -> bool:
    """Kill a look at *moment* (0 to 1) of its life; return whether it had *outbox* open.

    Most are let live until they read: that is the moment worth being killed at.
    """
    if moment < 0.25:
        time.sleep(moment * 4 * _LIFE_S)
    else:
        while not _has_open(pid, outbox) and not _has_ended(pid):
            time.sleep(_POLL_S)
        time.sleep((moment - 0.25) * _READ_S)
    os.kill(pid, signal.SIGSTOP)
    is_open = _has_open(pid, outbox)
    os.kill(pid, signal.SIGKILL)
    return is_open


def _has_open(pid: int, outbox: Path) -> bool:
    try:
        fds = list(Path(f"/proc/{pid}/fd").iterdir())
        return any(fd.readlink() == outbox for fd in fds)
    except OSError:  # one was closed meanwhile, or the process has ended
        return False


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _become(order: Order, output: int, anew: bool) -> None:
    """Be the process of *order*."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    if order.user is not None:
        uid, gid = order.user
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    sys.argv[1:] = order.argv
    if order.argv[0] == DIRECTLY:
        asyncio.run(_read_directly(Path(order.argv[1])))
    elif anew:
        os.execv(sys.executable, [sys.executable, "-m", "agent", *order.argv])
    else:
        main()


async def _read_directly(outbox: Path) -> None:
    async with access.open_reader(outbox) as reading:
        await reading.ledger()
        await reading.scan(after=0, limit=10_000)
        await reading.select("pending", Selection(text="in no event"), limit=1)


def _fork(run: Callable[..., None], *args: object) -> int:
    """Run `run(*args)` in a process of its own; return its number."""
    if pid := os.fork():
        return pid
    code = 70  # EX_SOFTWARE of sysexits.h
    try:
        run(*args)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # noqa: BLE001  # of a child process, which ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(line: bytes) -> None:
    os.write(1, line)


if __name__ == "__main__":
    orders = msgspec.json.decode(sys.argv[1], type=_Plan)
    if orders.bug is not None:
        planted.BUGS[orders.bug]()
    _look_until_told(orders)
    with suppress(ChildProcessError):
        while True:
            os.wait()
