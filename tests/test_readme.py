"""What the README and the pages behind it say is typed as it stands, against a real agent and sandbox."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import DEADLINE_S, free_port

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("apps", "configuration", "operating")))
"""In the order in which a reader goes on: each takes what was left running before."""

STAYS = ("tranthor-agent run", "tranthor-agent sandbox")
"""Commands that a reader leaves running in a terminal of its own."""

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]


@dataclass(frozen=True)
class Line:
    """A command of a page and the output lines that stand below it."""

    command: str
    output: tuple[str, ...]


def console_lines() -> Iterator[Line]:
    text = "\n".join(page.read_text() for page in PAGES)
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *output = step.rstrip("\n").split("\n")
            yield Line(command, tuple(output))


class Reader:
    """Somebody who types what the pages say, with other ports than everybody else's."""

    def __init__(self, folder: Path) -> None:
        self.ports = {"7227": str(free_port()), "7228": str(free_port())}
        self._folder = folder
        self._exports: list[str] = []
        self._running: list[subprocess.Popen[bytes]] = []
        self._environ = {
            **os.environ,
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TRANTHOR_AGENT_INGEST__PORT": self.ports["7227"],
            "TRANTHOR_AGENT_OUTBOX__PATH": str(folder / "outbox.db"),
        }

    def type(self, line: Line) -> None:
        command = line.command
        for documented, free in self.ports.items():
            command = command.replace(documented, free)
        if command.startswith("export"):
            self._exports.append(command)
        elif command.startswith(STAYS):
            self._leave_running(command)
        else:
            self._run(command, line.output)

    def _shell(self, command: str) -> list[str]:
        return ["bash", "-ec", "\n".join([*self._exports, command])]

    def _run(self, command: str, expected: tuple[str, ...]) -> None:
        done = subprocess.run(
            self._shell(command),
            cwd=self._folder,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        for output in expected:
            assert output in done.stdout, f"{command}\n{done.stdout}{done.stderr}"

    def _leave_running(self, command: str) -> None:
        with (self._folder / "terminals.log").open("ab") as log:
            self._running.append(
                subprocess.Popen(
                    self._shell(f"exec {command}"),
                    cwd=self._folder,
                    env=self._environ,
                    stdout=log,
                    stderr=log,
                )
            )
        is_agent = command.startswith("tranthor-agent run")
        self._wait_for("7227" if is_agent else "7228", "readyz" if is_agent else "sandbox/stats")

    def _wait_for(self, port: str, path: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}/{path}", timeout=5)
            except urllib.error.URLError:
                assert self._running[-1].poll() is None, (
                    self._folder / "terminals.log"
                ).read_text()
                time.sleep(0.05)
            else:
                return
        raise AssertionError(f"nothing answers on the port that stands for {port}")

    def press_ctrl_c(self) -> list[int]:
        """End what was left running, last first; return the exit codes."""
        codes = []
        for process in reversed(self._running):
            process.send_signal(signal.SIGINT)
            codes.append(process.wait(DEADLINE_S))
        self._running.clear()
        return codes

    def leave(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.leave()


def test_every_command_that_the_pages_show_works_as_it_stands(reader: Reader) -> None:
    lines = list(console_lines())
    assert len(lines) > 25
    for line in lines:
        reader.type(line)
    agent_code, _ = reader.press_ctrl_c()
    assert agent_code == 0


LINK = re.compile(r"\[[^\]]*\]\(([^)#]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda it: it.name
)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link[0].startswith("http")]
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_demo_finds_that_every_sum_matches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent", "demo"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every sum matches" in done.stdout


def test_the_two_one_line_commands_stand_where_the_check_looks_for_them() -> None:
    text = README.read_text()
    for mark, end in (
        ("the demo", "tranthor-agent demo"),
        ("the tests", "-m pytest -n 4 --dist worksteal"),
    ):
        block = re.search(rf"<!-- {mark} -->\n```sh\n([^\n]+)\n```", text)
        assert block is not None
        assert block[1].startswith("python3 -m venv .venv && ")
        assert block[1].endswith(end)
