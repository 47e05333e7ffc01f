"""A real gateway with API keys: clients, workers and administration, each with its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.serve.gateway.access.limits import Limits
from chaccu.testing.processes import Service, start_command, start_gateway, start_serve, start_worker

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    made = {
        "chat": file.create("alice"),
        "bound": file.create("bob", models=["one"]),
        "admin": file.create("root", ["admin"]),
        "worker": file.create("gpu", ["worker"], models=["one"]),
        "leaver": file.create("old gpu", ["worker"]),
    }
    return {"file": str(file.path), "leaver_id": made["leaver"][1].id, **{name: shown for name, (shown, _) in made.items()}}


@pytest.fixture(scope="module")
def gateway(keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("keyed")
    with (
        start_gateway(
            folder,
            *("--keys", keys["file"], "--join-token", "the token"),
            *("--upstream", "far=http://127.0.0.1:9/v1", "--rejoin-wait", "0"),
        ) as service,
        start_worker(folder, service, "scripted:one?text=1", "--join-token", keys["worker"]),
        start_worker(folder, service, "scripted:two?text=2", "--join-token", "the token"),
    ):
        yield service
    log = service.log
    assert not [name for name in ("chat", "bound", "admin", "worker") if keys[name] in log]


def client(gateway: Service, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def get(gateway: Service, path: str, key: str) -> Any:
    return client(gateway, key).get(f"{gateway.url}{path}", cast_to=object)


def test_a_key_opens_chat_and_no_key_or_a_wrong_one_does_not(gateway: Service, keys: dict[str, str]) -> None:
    answer = client(gateway, keys["chat"]).chat.completions.create(model="two", messages=HELLO)
    assert answer.choices[0].message.content == "2"
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        client(gateway, "sk-wrong").chat.completions.create(model="two", messages=HELLO)
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        client(gateway, "sk-wrong").models.list()
    with pytest.raises(openai.PermissionDeniedError, match="this needs chat"):
        client(gateway, keys["worker"]).completions.create(model="two", prompt="Hi")


def test_an_upstream_is_behind_the_same_keys(gateway: Service, keys: dict[str, str]) -> None:
    with pytest.raises(openai.AuthenticationError):
        client(gateway, "sk-wrong").chat.completions.create(model="far", messages=HELLO)
    with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'far'"):
        client(gateway, keys["bound"]).chat.completions.create(model="far", messages=HELLO)
    with pytest.raises(openai.InternalServerError, match="not reachable"):
        client(gateway, keys["chat"]).chat.completions.create(model="far", messages=HELLO)


@pytest.mark.parametrize("model", ["two", "far"])
def test_a_limit_is_told_with_every_answer_and_refuses_what_is_beyond(
    gateway: Service, keys: dict[str, str], model: str
) -> None:
    shown, key = KeyFile(Path(keys["file"])).create("eve", limits=Limits(requests_per_minute=2, tokens_per_minute=10_000))
    time.sleep(1.1)
    for left in (1, 0):
        if model == "far":
            with pytest.raises(openai.InternalServerError, match="not reachable"):
                client(gateway, shown).chat.completions.create(model=model, messages=HELLO)
            continue
        answer = client(gateway, shown).chat.completions.with_raw_response.create(model=model, messages=HELLO)
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert 9_900 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 10_000
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as refused:
        client(gateway, shown).chat.completions.create(model=model, messages=HELLO)
    assert 25 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.code == "rate_limit_exceeded"
    metrics = client(gateway, keys["admin"]).get(f"{gateway.url}/metrics", cast_to=str)
    assert f'chaccu_key_requests_total{{key="{key.id}",status="429"}} 1.0' in metrics
    if model == "two":
        assert f'chaccu_key_tokens_total{{key="{key.id}",kind="completion"}} 2.0' in metrics
    assert shown not in metrics


def test_a_bound_key_sees_and_uses_its_models_alone(gateway: Service, keys: dict[str, str]) -> None:
    bound = client(gateway, keys["bound"])
    assert [model.id for model in bound.models.list()] == ["one"]
    assert bound.chat.completions.create(model="one", messages=HELLO).choices[0].message.content == "1"
    with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'two'"):
        bound.chat.completions.create(model="two", messages=HELLO)


def test_administration_and_metrics_have_their_own_scope(gateway: Service, keys: dict[str, str]) -> None:
    for path in ("/admin/workers", "/metrics"):
        with pytest.raises(openai.PermissionDeniedError):
            get(gateway, path, keys["chat"])
        assert get(gateway, path, keys["admin"])
    assert {worker["model"] for worker in get(gateway, "/admin/workers", keys["admin"])} >= {"one", "two"}


@pytest.mark.parametrize(
    ("token", "model", "why"),
    [
        ("worker", "two", "is not for 'two'"),
        ("chat", "one", "neither the join token nor a key of scope worker"),
        ("", "one", "neither the join token nor a key of scope worker"),
    ],
)
def test_a_worker_joins_only_with_what_entitles_it(
    gateway: Service, keys: dict[str, str], tmp_path: Path, token: str, model: str, why: str
) -> None:
    shown = ["--join-token", keys[token]] if token else []
    with start_command(tmp_path, ["worker", "--model", f"scripted:{model}", "--gateway", gateway.url, *shown]) as stranger:
        assert stranger.wait(20) == 1
        assert why in stranger.log


def test_a_worker_whose_key_is_revoked_is_let_go(gateway: Service, keys: dict[str, str], tmp_path: Path) -> None:
    with start_worker(tmp_path, gateway, "scripted:three", "--join-token", keys["leaver"]) as worker:
        KeyFile(Path(keys["file"])).revoke(keys["leaver_id"])
        assert worker.wait(10) == 1
        assert "neither the join token nor a key" in worker.log


def test_serve_with_keys_is_ready_and_its_workers_have_joined(keys: dict[str, str], tmp_path: Path) -> None:
    with start_serve(tmp_path, "scripted:one?text=1", "--keys", keys["file"]) as service:
        assert client(service, keys["chat"]).chat.completions.create(model="one", messages=HELLO).choices[0].message.content
        with start_command(tmp_path, ["worker", "--model", "scripted:one", "--gateway", service.url]) as stranger:
            assert stranger.wait(20) == 1
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10
