"""The description of the API: whole, and of all that clients may ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.routing import Route
from starlette.testclient import TestClient

from chaccu.serve.gateway import GatewayConfig, create_gateway
from chaccu.serve.gateway.access.keys import KeyFile

OPERATORS = ("/admin", "/metrics", "/openapi.json")


def describe(config: GatewayConfig) -> dict[str, Any]:
    described: dict[str, Any] = TestClient(create_gateway(config)).get("/openapi.json").json()
    return described


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        yield from references(part)


def test_every_path_of_a_client_is_described() -> None:
    app = create_gateway(GatewayConfig())
    described = describe(GatewayConfig())["paths"]
    served = {
        (route.path, method.lower())
        for route in app.routes
        if isinstance(route, Route) and not route.path.startswith(OPERATORS)
        for method in route.methods or ()
        if method != "HEAD"
    }
    missing = served - {(path, method) for path, methods in described.items() for method in methods}
    assert not missing, "describe them in gateway/openapi.py"


def test_the_description_is_whole() -> None:
    described = describe(GatewayConfig())
    schemas = described["components"]["schemas"]
    assert {reference.rpartition("/")[2] for reference in references(described)} <= set(schemas)
    body = schemas["MessagesBody"]
    assert (body["required"], body["additionalProperties"]) == (["model", "max_tokens", "messages"], False)
    assert body["properties"]["speed"]["enum"] == ["standard", None]
    assert "temperature" in schemas["ChatBody"]["properties"]
    errors = described["paths"]["/v1/messages"]["post"]["responses"]["404"]["content"]["application/json"]["schema"]
    assert errors == {"$ref": "#/components/schemas/MessagesErrorBody"}
    assert json.dumps(described) == json.dumps(describe(GatewayConfig()))


def test_keys_are_described_where_they_are_asked_for(tmp_path: Path) -> None:
    assert "securitySchemes" not in describe(GatewayConfig())["components"]
    KeyFile(tmp_path / "keys.json").create("alice")
    described = describe(GatewayConfig(keys=tmp_path / "keys.json"))
    assert set(described["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert described["paths"]["/v1/responses"]["post"]["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "security" not in described["paths"]["/health"]["get"]
