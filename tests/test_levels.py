"""Imports go down the levels that `agent/__init__.py` draws, and decisions import no I/O."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import agent

ROOT = Path(agent.__file__).parent

DECISIONS = (
    "config.decoding",
    "config.loaded",
    "console.sandbox_contract",
    "contract",
    "document",
    "errors",
    "event",
    "exchange",
    "flow",
    "forward.backoff",
    "forward.batch",
    "forward.breaker",
    "forward.budget",
    "forward.census",
    "forward.claims",
    "forward.concurrency",
    "forward.disposition",
    "forward.gate",
    "forward.lanes",
    "forward.plan",
    "forward.trials",
    "forward.waits",
    "ingest.callers",
    "ingest.destinations",
    "ingest.dialect",
    "ingest.guard",
    "ingest.wire",
    "keys",
    "outbox.records",
    "outbox.refusals",
    "outbox.salvage.log",
    "outbox.salvage.pages",
    "outbox.salvage.rows",
    "redaction",
    "reload",
    "segment",
    "settings",
    "translation",
    "units",
)
IMPURE = {
    "aiohttp",
    "aiosqlite",
    "asyncio",
    "fcntl",
    "os",
    "platformdirs",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "structlog",
    "subprocess",
    "threading",
    "time",
    "uvloop",
}
PURE = {"os.fsencode"}
"""Of those packages, what does no I/O."""


def levels(root: Path) -> list[set[str]]:
    """Return the parts of each level, the highest first, as the package's own docstring lists them."""
    drawn = ast.get_docstring(ast.parse((root / "__init__.py").read_text())) or ""
    listed = drawn.partition("The levels;")[2].splitlines()[1:]
    names = r"\w+(?:(?:, | \| )\w+)*"
    rows = [re.match(rf"    ({names}) +\S", line) for line in listed]
    return [set(re.split(r", | \| ", row[1])) for row in rows if row]


def modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield every module of the package with its tree; names without the leading `agent.`."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, ast.parse(path.read_text(), filename=str(path))


def imported(name: str, tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each import, wherever it stands in the module."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                # `from agent import event` brings a module, `from agent.event import Event` does not.
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            case ast.ImportFrom():
                yield node.lineno, f"{package}.<relative, in {name}>"


def violations(root: Path) -> list[str]:
    """Return the imports that climb or go sideways, and the parts that stand on no level."""
    package = root.name
    rank = {part: depth for depth, level in enumerate(levels(root)) for part in level}
    found = []
    for name, tree in modules(root):
        part = name.partition(".")[0]
        if part and part not in rank:
            found.append(f"{name}: stands on no level of {package}/__init__.py")
            continue
        for line, target in imported(name, tree, package):
            top, _, rest = target.partition(".")
            if top != package:
                continue
            other = rest.partition(".")[0]
            if other == part or other.startswith("__version__"):
                continue
            if other not in rank:
                found.append(f"{name}:{line}: imports {target}, which stands on no level")
            elif not part or rank[other] <= rank[part]:
                found.append(f"{name}:{line}: imports {target}, which is not below it")
    return found


def shells(root: Path) -> set[str]:
    """Return the full names of the modules that do I/O: they import it, or a module that does."""
    uses = {
        f"{root.name}.{name}": {target for _, target in imported(name, tree, root.name)}
        for name, tree in modules(root)
    }
    found: set[str] = set()
    while more := {
        name
        for name, targets in uses.items()
        if name not in found and any(is_io(target, found) for target in targets)
    }:
        found |= more
    return found


def is_io(target: str, shells: set[str]) -> bool:
    """Return whether an import brings I/O: its package's, or a shell or something of one."""
    return (
        (target.partition(".")[0] in IMPURE and target not in PURE)
        or target in shells
        or target.rpartition(".")[0] in shells
    )


def impurities(name: str, tree: ast.Module) -> list[str]:
    """Return the imports of a module that a decision must not have."""
    return [
        f"{name}:{line}: imports {target}"
        for line, target in imported(name, tree, "agent")
        if is_io(target, SHELLS)
    ]


SHELLS = shells(ROOT)


def test_the_drawing_has_its_levels() -> None:
    drawn = levels(ROOT)
    assert drawn[0] == {"__main__"}
    assert {"ingest", "forward", "console"} in drawn
    assert {"errors", "clock", "exchange"} <= drawn[-1]


def test_every_import_goes_down() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize("name", DECISIONS)
def test_a_decision_imports_no_clock_socket_or_database(name: str) -> None:
    assert impurities(name, tree_of(name)) == []


def tree_of(name: str, behind: str = "") -> ast.Module:
    return ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text() + behind)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    pycache = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "agent", ignore=pycache))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("event.py", "from agent.outbox.records import Head"),
        ("clock.py", "import agent.event"),
        ("exchange.py", "from agent import errors"),
        ("errors.py", "import agent.clock as clock"),
        ("outbox/store.py", "from agent.forward import lanes"),
        ("outbox/records.py", "from agent import daemon"),
        ("ingest/guard.py", "from agent.forward.breaker import Breaker"),
        ("ingest/routes.py", "import agent.console.status"),
        ("forward/upstream.py", "from agent.ingest import guard"),
        ("forward/lanes.py", "from agent.console.sandbox import Fault"),
        ("console/status.py", "from agent.ingest.server import serving"),
        ("console/control.py", "from agent.forward.forwarder import Flow"),
        ("console/control.py", "from agent import daemon"),
        ("forward/backoff.py", "def late():\n    from agent.daemon import run"),
        ("forward/backoff.py", "if TYPE_CHECKING:\n    from agent.ingest import guard"),
        ("forward/backoff.py", "from ..ingest import guard"),
        ("__init__.py", "from agent.event import Event"),
        ("elsewhere.py", "import json"),
    ],
)
def test_a_planted_import_that_climbs_or_goes_sideways_is_found(
    copy: Path, module: str, line: str
) -> None:
    with (copy / module).open("a") as planted:
        planted.write(f"\n{line}\n")
    name = module.removesuffix(".py").removesuffix("__init__").replace("/", ".")
    assert [found.partition(":")[0] for found in violations(copy)] == [name]


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "from asyncio import sleep",
        "import aiohttp.web",
        "import sqlite3 as db",
        "from agent.clock import SystemClock",
        "from agent.outbox import writer",
        "from agent.outbox.upkeep import tend",
        "from agent import daemon",
    ],
)
@pytest.mark.parametrize("name", DECISIONS)
def test_a_planted_import_of_io_is_found(name: str, line: str) -> None:
    (found,) = impurities(name, tree_of(name, f"\ndef late():\n    {line}\n"))
    assert line.split()[1].partition(".")[0] in found
