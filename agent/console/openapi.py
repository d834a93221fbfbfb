"""The OpenAPI document of the agent, made of the types that validate. Loaded by the first GET for it.

Here is what no type says: the paths, what each is for, and which answers it can give.
Source: OpenAPI Specification 3.1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any, Literal

import msgspec

from agent import __version__
from agent.console.messages import (
    DeadRequest,
    Discarded,
    EventQuery,
    EventsPage,
    EventsQuery,
    Health,
    Requeued,
    SteeringQuery,
)
from agent.console.receipts import ReceiptView, UnknownView
from agent.console.status import Status
from agent.contract import type_of
from agent.event import KINDS
from agent.exchange import Refusal

Schema = dict[str, Any]

_REF = "#/components/schemas/"

_APPS = "/api/public/apps/"

_EVENTS_ABOUT = (
    "204 once it is on stable storage. The same messageId again is 204 with Idempotent-Replayed, and"
    " nothing is stored twice. What is not a member of the type is kept. Refused are also keys named"
    " __proto__, a constructor with a prototype, more than 100 levels, numbers out of range, and half"
    " surrogate pairs. The body may be compressed (Content-Encoding: gzip or deflate)."
)

_EVERYWHERE: dict[int, str] = {
    400: "Not what is described here; the message names it",
    403: "The Host, the Origin or the page may not ask",
    408: "The request did not come whole in time",
    413: "The body is larger than ingest.max_body",
    414: "The target is longer than 8 KiB",
    415: "The Content-Type or Content-Encoding is not one that is read",
    431: "The headers are more than 100, or longer than 32 KiB",
    500: "A bug of the agent; its log shows where",
    503: "Not now: send again after Retry-After",
}
"""Answers that any request may get, all of them a `Refusal`."""

_UNKNOWN_UPSTREAM = {404: "No such upstream is configured"}
_FULL = {507: "The outbox is full: send again after Retry-After"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """One method of one path. *answers* and *refusals* come beside those of `_EVERYWHERE`."""

    method: Literal["get", "post"]
    path: str
    about: str
    more: str = ""
    path_parameters: Mapping[str, Schema] | None = None
    query: type[msgspec.Struct] | None = None
    body: Callable[[_Components], Schema] | None = None
    answers: Mapping[int, Any]
    refusals: Mapping[int, str]


def document(upstreams: Iterable[str]) -> Schema:
    """Return the document of an agent with these *upstreams*, by their labels."""
    labels = sorted(upstreams)
    operations = [*_event_operations(labels), *_agent_operations()]
    components = _Components(operations)
    paths: Schema = {}
    for operation in operations:
        path = paths.setdefault(operation.path, {})
        path[operation.method] = _described(operation, components, labels)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "tranthor-agent",
            "version": __version__,
            "description": "Store-and-forward agent for Tranthor analytics events.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components.schemas,
            "responses": {
                str(status): _refusal(status, text, components)
                for status, text in _EVERYWHERE.items()
            },
        },
    }


# --- paths ---


def _event_operations(labels: list[str]) -> Iterable[_Operation]:
    """Yield what apps post to: the usual paths, and those that name an upstream.

    What else takes events, in other words, belongs here, too.
    """
    upstream = {"upstream": {"type": "string", "enum": labels}}
    yield from _posts(_APPS, {}, {})
    yield from _posts(f"/w/{{upstream}}{_APPS}", upstream, _UNKNOWN_UPSTREAM)


def _posts(
    prefix: str, parameters: Mapping[str, Schema], refusals: Mapping[int, str]
) -> Iterable[_Operation]:
    for kind in KINDS:
        yield _Operation(
            method="post",
            path=f"{prefix}{kind}",
            about=f"Take a {kind} event",
            more=_EVENTS_ABOUT,
            path_parameters=parameters,
            body=partial(_Components.of, type_=type_of(kind)),
            answers={204: None},
            refusals={**refusals, **_FULL},
        )
    yield _Operation(
        method="post",
        path=f"{prefix}batch",
        about="Take events of any kind, all or none",
        more=_EVENTS_ABOUT + " The message of a refusal names the index.",
        path_parameters=parameters,
        body=_batch,
        answers={204: None},
        refusals={**refusals, **_FULL},
    )
    yield _Operation(
        method="post",
        path=f"{prefix}alias",
        about="Refused as by the upstream, which has it not implemented",
        path_parameters=parameters,
        answers={},
        refusals=refusals,
    )


def _agent_operations() -> Iterable[_Operation]:
    get: Literal["get"] = "get"
    for path, about, answer in (
        ("/healthz", "Say that the process answers", Health),
        ("/readyz", "Say that events are accepted; 503 says why not", Health),
        ("/metrics", "The numbers of the status, for Prometheus", str),
        ("/api/agent/openapi.json", "This document", dict[str, Any]),
        ("/api/agent/status", "Say whether events flow, and if not, why", Status),
    ):
        yield _Operation(method=get, path=path, about=about, answers={200: answer}, refusals={})
    yield _Operation(
        method=get,
        path="/api/agent/events",
        about="List events, oldest first",
        query=EventsQuery,
        answers={200: EventsPage},
        refusals={},
    )
    yield _Operation(
        method=get,
        path="/api/agent/events/{messageId}",
        about="Say where one event stands",
        more="At once, or, with wait, when it is delivered or dead. An id that is not known is 404.",
        path_parameters={"messageId": {"type": "string", "minLength": 1}},
        query=EventQuery,
        answers={200: ReceiptView, 404: UnknownView},
        refusals={},
    )
    for verb, about in (
        ("pause", "Stop sending, also after a restart"),
        ("resume", "End a pause"),
        ("flush", "End every wait: try now"),
    ):
        yield _Operation(
            method="post",
            path=f"/api/agent/{verb}",
            about=about,
            query=SteeringQuery,
            answers={200: Status},
            refusals={**_UNKNOWN_UPSTREAM, **_FULL},
        )
    for path, about, done in (
        ("dead/requeue", "Put dead letters back, at the end of the queue", Requeued),
        ("dead/discard", "Delete dead letters for good", Discarded),
    ):
        yield _Operation(
            method="post",
            path=f"/api/agent/{path}",
            about=about,
            body=_dead,
            answers={200: done},
            refusals=_FULL,
        )


# --- schemas ---


class _Components:
    """The schemas of all types that bodies have."""

    def __init__(self, operations: Iterable[_Operation]) -> None:
        answers = (operation.answers.values() for operation in operations)
        bodies = [type_of(kind) for kind in KINDS]
        self._types = [*bodies, DeadRequest, Refusal, *filter(None, chain.from_iterable(answers))]
        self._schemas, self.schemas = _schemas(self._types)

    def of(self, type_: Any) -> Schema:
        return self._schemas[self._types.index(type_)]


def _schemas(types: list[Any]) -> tuple[list[Schema], dict[str, Schema]]:
    """Return a schema for each type, and those that they refer to, by their names."""
    described = msgspec.json.schema_components(types, ref_template=f"{_REF}{{name}}")
    # The leading underscore is Python's, and nobody else's.
    text = msgspec.json.encode(described).replace(f"{_REF}_".encode(), _REF.encode())
    schemas, components = msgspec.json.decode(text)
    return schemas, {name.removeprefix("_"): _plain(schema) for name, schema in components.items()}


def _members(struct: type[msgspec.Struct]) -> dict[str, Schema]:
    """Return the schemas of the members of *struct*, by their names."""
    _, components = _schemas([struct])
    members: dict[str, Schema] = components[struct.__name__]["properties"]
    return members


def _plain(schema: Schema) -> Schema:
    """Return the schema of a struct without what is for readers of the code."""
    description = schema.get("description")
    if description is not None:
        schema["description"] = " ".join(description.replace("*", "").split())
    if "title" in schema:
        schema["title"] = schema["title"].removeprefix("_")
    return schema


def _batch(components: _Components) -> Schema:
    """Return what is posted to /batch: there is no type of the whole, which is read item by item."""
    items = [
        {
            **components.of(type_of(kind)),
            "required": ["type"],
            "properties": {"type": {"const": kind}},
        }
        for kind in KINDS
    ]
    return {
        "type": "object",
        "properties": {
            "batch": {"type": "array", "items": {"anyOf": items}},
            "context": {
                "type": ["object", "null"],
                "description": "Of all items, where their own says nothing else.",
            },
        },
        "required": ["batch"],
    }


def _dead(components: _Components) -> Schema:
    """Return what names dead letters: at least one condition, or all of them."""
    conditions = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
        for name in _members(DeadRequest)
        if name not in {"all", "messageIds"}
    ]
    return {
        **components.of(DeadRequest),
        "anyOf": [
            {"required": ["all"], "properties": {"all": {"const": True}}},
            {"required": ["messageIds"], "properties": {"messageIds": {"minItems": 1}}},
            *conditions,
        ],
    }


# --- one operation ---


def _described(operation: _Operation, components: _Components, labels: list[str]) -> Schema:
    described: Schema = {"summary": operation.about, "operationId": _id_of(operation)}
    if operation.more:
        described["description"] = operation.more
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in (operation.path_parameters or {}).items()
    ]
    if operation.query is not None:
        parameters += _query(operation.query, labels)
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        content = _json(operation.body(components))
        described["requestBody"] = {"required": True, "content": content}
    described["responses"] = _responses(operation, components)
    return described


def _id_of(operation: _Operation) -> str:
    words = operation.path.replace("{upstream}", "to").replace("{messageId}", "receipt")
    return "_".join([operation.method, *words.removeprefix("/api/").strip("/").split("/")])


def _query(query: type[msgspec.Struct], labels: list[str]) -> list[Schema]:
    parameters = []
    for name, schema in _members(query).items():
        if name == "messageIds":  # a query has one value of each name
            continue
        variants = [each for each in schema.get("anyOf", [schema]) if each != {"type": "null"}]
        (known,) = variants  # in a query nothing is null
        if query is SteeringQuery and name == "upstream":
            known = {**known, "enum": labels}
        parameters.append({"name": name, "in": "query", "schema": known})
    return parameters


def _responses(operation: _Operation, components: _Components) -> Schema:
    responses: Schema = {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in _EVERYWHERE
    }
    for status, text in operation.refusals.items():
        responses[str(status)] = _refusal(status, text, components)
    for status, answer in operation.answers.items():
        response: Schema = {"description": HTTPStatus(status).phrase}
        if answer is str:
            response["content"] = {"text/plain": {"schema": {"type": "string"}}}
        elif answer is not None:
            response["content"] = _json(components.of(answer))
        else:
            response["headers"] = {
                "Idempotent-Replayed": {
                    "schema": {"const": "true"},
                    "description": "All of it was stored before.",
                }
            }
        responses[str(status)] = response
    return dict(sorted(responses.items()))


def _refusal(status: int, text: str, components: _Components) -> Schema:
    refusal: Schema = {"description": text, "content": _json(components.of(Refusal))}
    if status in {503, 507}:
        refusal["headers"] = {
            "Retry-After": {"schema": {"type": "integer"}, "description": "In seconds."}
        }
    return refusal


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
