"""`describe_api`: the gateway's API as an OpenAPI 3.1 description.

Invariants: a body is described by the type that checks it, with the parameters that are taken and not carried out; an answer
and an error by the types that write them, where there are such. It ignores `/admin` and `/metrics`, which are the operator's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from chaccu.serve.gateway.access.models import ModelList
from chaccu.serve.gateway.dialects.dialect import Dialect
from chaccu.serve.gateway.dialects.parameters import Unused
from chaccu.serve.gateway.errors import ErrorBody

_REF = "#/components/schemas/{name}"
_JSON, _EVENTS = "application/json", "text/event-stream"
_KEY_ERRORS = (401, 403)
_ANSWER_ERRORS = (400, *_KEY_ERRORS, 404, 408, 413, 429, 500, 502, 503)
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

Schema = dict[str, Any]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A path that a client posts to, as it is described: the types of its `body`, its `answer` (None: some object) and its
    `error`, the parameters that its body takes besides, and those of which it takes exactly `one_of`; `streams`: its answers
    may be events.
    """

    path: str
    summary: str
    body: type[msgspec.Struct]
    answer: type[msgspec.Struct] | None = None
    error: type[msgspec.Struct] = ErrorBody
    unused: Unused | None = None
    one_of: tuple[str, ...] = ()
    streams: bool = False


def describe_dialect(dialect: Dialect) -> Endpoint:
    """The endpoint of `dialect`."""
    return Endpoint(
        path=dialect.path,
        summary=dialect.summary,
        body=dialect.body,
        answer=dialect.answer,
        error=dialect.error,
        unused=dialect.unused,
        streams=True,
    )


def describe_api(endpoints: Sequence[Endpoint], *, with_keys: bool) -> dict[str, Any]:
    """The description of `endpoints`, and of what is got; `with_keys`: requests below `/v1` need an API key."""
    named = [kind for endpoint in endpoints for kind in (endpoint.body, endpoint.answer, endpoint.error)]
    wanted = tuple(dict.fromkeys(kind for kind in (*named, ErrorBody, ModelList) if kind is not None))
    schemas, components = msgspec.json.schema_components(wanted, ref_template=_REF)
    types: dict[type, Schema] = dict(zip(wanted, schemas, strict=True))
    for endpoint in endpoints:
        if endpoint.unused is not None:
            _add_unused(components[endpoint.body.__name__]["properties"], endpoint.unused)
        if endpoint.one_of:
            given = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in endpoint.one_of]
            components[endpoint.body.__name__]["oneOf"] = given
    keyed: dict[str, Any] = {"security": [{name: []} for name in _SECURITY]} if with_keys else {}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Chaccu", "version": "1"},
        "paths": {
            "/v1/models": {"get": {**_describe_models(types), **keyed}},
            **{endpoint.path: {"post": {**_describe(endpoint, types), **keyed}} for endpoint in endpoints},
            **_HEALTH,
        },
        "components": {"schemas": components},
    }
    if with_keys:
        described["components"]["securitySchemes"] = _SECURITY
    return described


def _describe(endpoint: Endpoint, types: Mapping[type, Schema]) -> dict[str, Any]:
    answer = _response("The answer.", _OBJECT if endpoint.answer is None else types[endpoint.answer])
    if endpoint.streams:
        answer["description"] = "The answer, or its events where `stream` is true."
        answer["content"][_EVENTS] = {}
    return {
        "summary": endpoint.summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": types[endpoint.body]}}},
        "responses": {"200": answer, **_errors(types[endpoint.error], _ANSWER_ERRORS)},
    }


def _describe_models(types: Mapping[type, Schema]) -> dict[str, Any]:
    responses = {"200": _response("The models.", types[ModelList]), **_errors(types[ErrorBody], _KEY_ERRORS)}
    return {"summary": "The models that answer now.", "responses": responses}


def _add_unused(properties: Schema, unused: Unused) -> None:
    """Describe the parameters that the type of a body does not have."""
    for name, values in sorted(unused.neutral.items()):
        properties[name] = {"enum": [*values, None], "description": "Taken with these values, which ask for nothing."}
    for name in sorted(unused.about):
        properties[name] = {"description": "Taken, and changes nothing of the answer."}


def _errors(schema: Schema, statuses: Iterable[int]) -> dict[str, Any]:
    return {str(status): _response(f"{HTTPStatus(status).phrase}.", schema) for status in statuses}


def _response(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": schema}}}


_OBJECT: Schema = {"type": "object"}
_HEALTH: dict[str, Any] = {
    "/health": {"get": {"summary": "Whether the gateway runs.", "responses": {"200": _response("It does.", _OBJECT)}}},
    "/ready": {
        "get": {
            "summary": "Whether a model is served.",
            "parameters": [{"name": "model", "in": "query", "schema": {"type": "string"}}],
            "responses": {"200": _response("It is.", _OBJECT), "503": _response("It is not.", _OBJECT)},
        }
    },
}
