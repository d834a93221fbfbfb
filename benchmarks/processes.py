"""The processes of a measurement: the real agent, and helpers that run a module of this folder."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarks import machine

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
"""Where `python -m agent` and `python -m benchmarks.…` find this checkout's code."""

DEADLINE_S = 60.0
"""For a process to start, to answer or to stop; an agent that needs longer has failed."""

DEAD = "dead"
"""The name of an upstream that never answers, for B10."""

_POLL_S = 0.005

_BLOCK_BYTES = 512
"""The unit of ru_oublock (getrusage(2); the kernel shifts write_bytes by 9)."""


class FigureError(Exception):
    """A figure could not be measured, or what was measured is not what it claims to be."""


# --- helpers ------------------------------------------------------------------------------------


def say_result(result: object) -> None:
    """Hand a helper's result to whoever started it: one line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    sys.stdout.flush()


def ask(module: str, *arguments: object, result: type[T], timeout_s: float) -> T:
    """Run *module* to its end and return what it said."""
    try:
        done = subprocess.run(
            (sys.executable, "-m", module, *map(str, arguments)),
            stdout=subprocess.PIPE,
            cwd=ROOT,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.SubprocessError as exc:  # of its own it says more, on standard error
        raise FigureError(f"{module} failed: {exc}") from exc
    return msgspec.json.decode(done.stdout, type=result)


@dataclass(frozen=True, slots=True)
class Server:
    """A helper that listens on *port*."""

    port: int
    pid: int


@contextmanager
def serving(module: str, *arguments: object) -> Iterator[Server]:
    """Run *module* as a server while the block runs; the first that it says is its port."""
    with subprocess.Popen(
        (sys.executable, "-m", module, *map(str, arguments)), stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        try:
            if process.stdout is None or not (line := process.stdout.readline()):
                raise FigureError(f"{module} did not start; what it said stands above")
            yield Server(msgspec.json.decode(line, type=int), process.pid)
        finally:
            process.kill()


# --- the agent ----------------------------------------------------------------------------------


class Agent:
    """One process of the real daemon, of a configuration as an operator would write it."""

    def __init__(
        self, outbox: Path, *, upstream_port: int, mode: str = "track", beside_dead: bool = False
    ) -> None:
        """*beside_dead*: there is one more upstream, `DEAD`, where nobody listens."""
        self.port = free_port()
        self.outbox = outbox
        self.log = outbox.with_suffix(".log")
        self.ready_s = 0.0
        """From the start of the process to its first "ready"."""
        self._config = outbox.with_suffix(".toml")
        self._config.write_text(
            f"[ingest]\nport = {self.port}\n"
            f'[outbox]\npath = "{outbox}"\nmax_size = "64GiB"\n'
            f"[upstream]\n{_upstream(upstream_port, mode)}"
            + (f"[upstreams.{DEAD}]\n{_upstream(free_port(), mode)}" if beside_dead else "")
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise FigureError("the agent was not started")
        return self._process.pid

    def start(self) -> None:
        """Start it; return when it accepts events."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("TRANTHOR_AGENT_")}
        environ["MALLOC_ARENA_MAX"] = "1"  # as the unit sets it
        started_s = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "agent", "run", "--config", str(self._config)),
                stderr=log,
                cwd=ROOT,
                env=environ,
            )
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > started_s + DEADLINE_S:
                raise FigureError(f"the agent did not start: {self._end_of_log()}")
            time.sleep(_POLL_S)
        self.ready_s = time.monotonic() - started_s

    def stop(self) -> int:
        """Stop it in order; return all bytes that it wrote to disk in its life, the last ones too."""
        process, self._process = self._process, None
        if process is None:
            raise FigureError("the agent was not started")
        process.terminate()
        until_s = time.monotonic() + DEADLINE_S
        # By wait4 and not by Popen, for what the process wrote until its very end.
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > until_s:
                process.kill()
            time.sleep(_POLL_S)
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise FigureError(f"the agent ended with {process.returncode}: {self._end_of_log()}")
        return usage.ru_oublock * _BLOCK_BYTES

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def status(self) -> Mapping[str, Any]:
        """Return what `status --json` prints."""
        answer: Mapping[str, Any] = json.loads(get(self.port, "/api/agent/status"))
        return answer

    def until_delivered(self, *, deadline_s: float) -> Mapping[str, Any]:
        """Return the first status with nothing pending, but for what waits for `DEAD`."""
        until_s = time.monotonic() + deadline_s
        while (status := self.status()).get("upstreams", {"default": status})["default"]["pending"]:
            if time.monotonic() > until_s:
                raise FigureError(f"{status['pending']} still pending: {status['reason']}")
            time.sleep(0.1)
        return status

    def written_bytes(self) -> int:
        return machine.written_bytes(self.pid)

    def memory(self) -> machine.Memory:
        return machine.memory(self.pid)

    def _is_ready(self) -> bool:
        try:
            get(self.port, "/readyz")
        except FigureError:
            return False
        return True

    def _end_of_log(self) -> str:
        return self.log.read_text()[-1000:]


@contextmanager
def running(
    outbox: Path, *, upstream_port: int, mode: str = "track", beside_dead: bool = False
) -> Iterator[Agent]:
    """Run an agent on *outbox* while the block runs, and stop it in order; a failed block kills it."""
    agent = Agent(outbox, upstream_port=upstream_port, mode=mode, beside_dead=beside_dead)
    agent.start()
    try:
        yield agent
        if agent.runs:
            agent.stop()
    finally:
        agent.kill()


def _upstream(port: int, mode: str) -> str:
    return f'url = "http://127.0.0.1:{port}"\nwrite_key = "benchmark-key"\nmode = "{mode}"\n'


def get(port: int, path: str) -> bytes:
    """Return the body of an answer of 200; raises `FigureError` for another."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as exc:
        raise FigureError(f"GET {path}: {exc!r}") from exc
    finally:
        connection.close()
    if answer.status != 200:
        raise FigureError(f"GET {path}: {answer.status} {body.decode()[:200]}")
    return body


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
