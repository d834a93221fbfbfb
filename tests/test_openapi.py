"""The OpenAPI document: it is there, it is whole, and the real agent does what it says.

Planted bugs that Schemathesis was seen to find here: a status that is not described, an answer of
another shape, a body refused that the document allows, a query taken that it does not, a crash.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from processes import environ, running_agent

from agent import __version__
from agent.console.control import PREFIX
from agent.console.openapi import document
from agent.event import KINDS
from agent.ingest.routes import _ALIAS, _ENDPOINTS

SCHEMATHESIS_S = 180.0
"""It takes some 15 s; generous, for a busy machine."""


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from walk(inner)


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    told: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document(["default", "crm"])))
    return told


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    names = {
        f"#/components/{part}/{name}"
        for part, each in described["components"].items()
        for name in each
    }
    used = {node["$ref"] for node in walk(described) if "$ref" in node}

    assert used == names


def test_every_operation_has_a_name_of_its_own_and_its_path_parameters(
    described: dict[str, Any],
) -> None:
    operations = [
        (path, operation)
        for path, methods in described["paths"].items()
        for operation in methods.values()
    ]
    ids = [operation["operationId"] for _, operation in operations]

    assert len(set(ids)) == len(ids)
    for path, operation in operations:
        named = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))


def test_all_that_takes_events_is_described(described: dict[str, Any]) -> None:
    taken = {*_ENDPOINTS, _ALIAS}

    assert taken <= set(described["paths"])
    assert {f"/w/{{upstream}}{path}" for path in taken} <= set(described["paths"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_needs_what_the_contract_asks_beyond_its_types(
    described: dict[str, Any], kind: str
) -> None:
    operation = described["paths"][f"/api/public/apps/{kind}"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    schema = described["components"]["schemas"][body["$ref"].rpartition("/")[2]]

    assert [each["required"] for each in body["anyOf"]] == [["userId"], ["anonymousId"]]
    assert {"type": "string", "minLength": 1} in schema["properties"]["messageId"]["anyOf"]


@pytest.mark.process
async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed; it is in requirements-dev.txt")
    second = 'url = "http://127.0.0.1:9"\nwrite_key = "a-key"'  # nobody listens there
    async with running_agent(tmp_path, **{"upstreams.crm": second}) as agent:
        told = json.loads(await agent.get(f"{PREFIX}openapi.json"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "--config-file",
            str(Path(__file__).with_name("schemathesis.toml")), "run",
            f"{agent.url}{PREFIX}openapi.json",
            cwd=tmp_path,
            # A proxy of the environment knows no loopback.
            env={name: text for name, text in environ().items() if "proxy" not in name.lower()},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(SCHEMATHESIS_S):
            said, _ = await process.communicate()
        status = await agent.status()

    assert process.returncode == 0, said.decode()
    assert "No issues found" in said.decode()
    assert (told["openapi"][:3], told["info"]["version"]) == ("3.1", __version__)
    assert status["accepted"] > 0, "nothing that it sent was an event"
