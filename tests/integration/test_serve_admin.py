"""Administration of a real gateway: drains, aliases and keys."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.testing.processes import start_gateway, start_worker

HELLO = [{"role": "user", "content": "Hi"}]


async def ask(http: aiohttp.ClientSession, model: str, **more: Any) -> tuple[int, Any]:
    async with http.post("/v1/chat/completions", json={"model": model, "messages": HELLO}, **more) as response:
        return response.status, await response.json()


async def call(http: aiohttp.ClientSession, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with http.request(method, path, **more) as response:
        return response.status, await response.json()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin")


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Any:
    with (
        start_gateway(folder, "--alias", "gpt-3.5-turbo=one", "--rejoin-wait", "0.2") as service,
        start_worker(folder, service, "scripted:one?text=1"),
        start_worker(folder, service, "scripted:two?text=2"),
    ):
        yield service


async def test_an_alias_answers_with_its_model_and_is_listed(http: aiohttp.ClientSession) -> None:
    status, answer = await ask(http, "gpt-3.5-turbo")
    assert (status, answer["model"], answer["choices"][0]["message"]["content"]) == (200, "one", "1")
    _, models = await call(http, "GET", "/v1/models")
    assert [model["id"] for model in models["data"]] == ["gpt-3.5-turbo", "one", "two"]


async def test_traffic_is_split_by_weight_while_the_gateway_runs(http: aiohttp.ClientSession) -> None:
    assert await call(http, "PUT", "/admin/aliases/both", json={"models": {"one": 3, "two": 1}}) == (
        200,
        {"both": {"one": 3, "two": 1}},
    )
    seen = Counter([(await ask(http, "both"))[1]["model"] for _ in range(8)])
    assert seen == {"one": 6, "two": 2}
    assert (await call(http, "GET", "/admin/aliases"))[1]["both"] == {"one": 3, "two": 1}
    assert (await call(http, "DELETE", "/admin/aliases/both"))[0] == 200
    assert (await call(http, "DELETE", "/admin/aliases/both"))[0] == 404
    assert (await ask(http, "both"))[0] == 404


@pytest.mark.parametrize(
    ("name", "body", "text"),
    [
        ("one", {"models": {"two": 1}}, "is a model itself"),
        ("x", {"models": {}}, "length"),
        ("x", {"models": {"one": -1}}, "weight -1"),
        ("x", {"model": "one"}, "'model' is no parameter"),
    ],
)
async def test_wrong_aliases_are_refused(http: aiohttp.ClientSession, name: str, body: Any, text: str) -> None:
    status, answer = await call(http, "PUT", f"/admin/aliases/{name}", json=body)
    assert status == 400
    assert text in answer["error"]["message"]


async def test_a_drained_worker_gets_nothing_new_until_it_is_undrained(http: aiohttp.ClientSession) -> None:
    _, workers = await call(http, "GET", "/admin/workers")
    worker = next(worker["worker"] for worker in workers if worker["model"] == "two")
    status, held = await call(http, "POST", f"/admin/workers/{worker}/drain")
    assert (status, held[0]["state"]) == (200, "draining")
    status, answer = await ask(http, "two")
    assert (status, answer["error"]["code"]) == (503, "no_worker")
    status, held = await call(http, "POST", f"/admin/workers/{worker}/undrain")
    assert (status, held[0]["state"]) == (200, "ready")
    assert (await ask(http, "two"))[0] == 200
    assert (await call(http, "POST", "/admin/workers/nobody/drain"))[0] == 404


async def test_a_page_in_a_browser_administers_nothing(http: aiohttp.ClientSession) -> None:
    status, _ = await call(http, "DELETE", "/admin/aliases/gpt-3.5-turbo", headers={"origin": "http://evil.example"})
    assert status == 403
    assert (await call(http, "GET", "/admin/keys"))[0] == 404


async def test_keys_are_made_and_revoked_by_api(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    root = {"authorization": f"Bearer {file.create('root', ['admin'])[0]}"}
    with (
        start_gateway(tmp_path, "--keys", str(file.path), "--join-token", "t") as service,
        start_worker(tmp_path, service, "scripted:one?text=1", "--join-token", "t"),
    ):
        async with aiohttp.ClientSession(service.url) as http:
            body = {"name": "alice", "models": ["one"], "limits": {"concurrent": 3}}
            status, made = await call(http, "POST", "/admin/keys", json=body, headers=root)
            assert (status, made["scopes"], made["limits"]) == (201, ["chat"], {"concurrent": 3})
            alice = {"authorization": f"Bearer {made['key']}"}
            assert (await ask(http, "one", headers=alice))[0] == 200
            assert (await call(http, "POST", "/admin/keys", json=body, headers=alice))[0] == 403
            status, listed = await call(http, "GET", "/admin/keys", headers=root)
            assert [key["name"] for key in listed] == ["root", "alice"]
            assert made["key"] not in str(listed)
            assert "hash" not in str(listed)
            status, ended = await call(http, "DELETE", f"/admin/keys/{made['id']}", headers=root)
            assert ended["revoked"]
            assert (await ask(http, "one", headers=alice))[0] == 401
            status, wrong = await call(http, "POST", "/admin/keys", json={"name": "x", "scopes": ["root"]}, headers=root)
            assert (status, "no scope 'root'" in wrong["error"]["message"]) == (400, True)
            assert (await call(http, "DELETE", "/admin/keys/none", headers=root))[0] == 404
        assert made["key"] not in service.log
