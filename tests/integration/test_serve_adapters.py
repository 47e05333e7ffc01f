"""Adapters behind a real gateway: named at a worker's start, loaded and unloaded through the admin API."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from typer.testing import CliRunner

from chaccu.cli import workers
from chaccu.errors import ServeError
from chaccu.serve.admin_client import AdminClient
from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.testing.processes import Service, list_workers, start_gateway, start_serve, start_worker, wait_until

pytest.importorskip("peft", reason="the train extra is not installed")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

from chaccu.artifact import read_manifest, write_manifest
from chaccu.testing.tiny import build_adapter, build_llama
from chaccu.testing.tiny_gguf import write_llama_gguf
from chaccu.weights.adapter_gguf import write_adapter_gguf

MESSAGES = [{"role": "user", "content": "What colour is the sky?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and below `adapters` two for transformers and one of them for llama.cpp."""
    root = tmp_path_factory.mktemp("models")
    base = build_llama(root / "base", initializer_range=0.4)
    for seed, name in enumerate(("law", "prose")):
        build_adapter(root / "adapters" / name, base, seed=seed)
    write_llama_gguf(base)
    write_adapter_gguf(root / "adapters" / "law", base / "model.gguf", root / "adapters" / "law-gguf")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def gateway(folder: Path, models: Path) -> Iterator[Service]:
    options = ("--threads", "1", "--context-tokens", "200")
    allowed = ("--allow-load", str(models / "adapters"))
    with (
        start_gateway(folder, "--rejoin-wait", "0.2", "--alias", "old=base") as service,
        start_worker(
            folder, service, str(models / "base"), "--name", "base", "--engine", "transformers",
            "--adapter", f"law={models / 'adapters' / 'law'}", *allowed, *options,
        ),
        start_worker(
            folder, service, str(models / "base" / "model.gguf"), "--format", "chatml", "--name", "gguf", *allowed, *options
        ),
        start_worker(folder, service, "scripted:plain?text=1"),
    ):  # fmt: skip
        yield service


async def ask(http: aiohttp.ClientSession, model: str, **more: Any) -> tuple[int, Any]:
    body = {"model": model, "messages": MESSAGES, **GREEDY, **more}
    async with http.post("/v1/chat/completions", json=body) as response:
        return response.status, await response.json()


async def text_of(http: aiohttp.ClientSession, model: str) -> str:
    status, answer = await ask(http, model)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


def worker_of(gateway: Service, model: str) -> str:
    return next(str(worker["worker"]) for worker in list_workers(gateway) if worker["model"] == model)


async def order(http: aiohttp.ClientSession, worker: str, what: str, **body: Any) -> tuple[int, Any]:
    async with http.post(f"/admin/workers/{worker}/{what}", json=body) as response:
        return response.status, await response.json()


async def test_an_adapter_named_at_the_start_is_a_model_beside_its_base(gateway: Service, http: aiohttp.ClientSession) -> None:
    names = ["base", "law", "base", "law"]
    said = await asyncio.gather(*(text_of(http, name) for name in names))
    assert said == [await text_of(http, "base"), await text_of(http, "law")] * 2
    assert said[0] != said[1]
    (law,) = [worker for worker in list_workers(gateway) if worker["model"] == "law"]
    assert (law["base"], law["worker"]) == ("base", worker_of(gateway, "base"))
    async with http.get("/v1/models") as response:
        assert {"base", "law"} <= {model["id"] for model in (await response.json())["data"]}


@pytest.mark.parametrize(("base", "path"), [("base", "law"), ("gguf", "law-gguf")])
async def test_an_adapter_is_loaded_asked_and_unloaded(
    gateway: Service, http: aiohttp.ClientSession, models: Path, base: str, path: str
) -> None:
    worker, alone = worker_of(gateway, base), await text_of(http, base)
    status, served = await order(http, worker, "load", adapter="late", path=path)
    assert status == 200, served
    assert [(one["model"], one["base"]) for one in served][-1] == ("late", base)
    # Equal to what the other engine says: the unit tests compare each with the merged model.
    assert await text_of(http, "late") == await text_of(http, "law")
    assert await text_of(http, base) == alone
    status, again = await order(http, worker, "load", adapter="late", path=str(models / "adapters" / path))
    assert (status, again["error"]["code"]) == (400, "order_refused")
    assert "serves 'late' already" in again["error"]["message"]
    status, served = await order(http, worker, "unload", adapter="late")
    assert (status, "late" in [one["model"] for one in served]) == (200, False)
    status, answer = await ask(http, "late")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert (await order(http, worker, "unload", adapter="late"))[0] == 404
    assert await text_of(http, base) == alone


async def test_unloading_waits_for_what_runs_and_takes_nothing_new(gateway: Service, http: aiohttp.ClientSession) -> None:
    worker = worker_of(gateway, "base")
    assert (await order(http, worker, "load", adapter="busy", path="prose"))[0] == 200
    endless = {str(token): -100 for token in (0, 1, 3)}
    body = {"model": "busy", "messages": MESSAGES, "temperature": 0, "max_tokens": 150, "logit_bias": endless, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as response:
        await response.content.readline()
        unloading = asyncio.create_task(order(http, worker, "unload", adapter="busy"))
        while (await ask(http, "busy", max_tokens=1))[0] == 200:
            assert not unloading.done()
        rest = await response.content.read()
    assert b'"finish_reason":"length"' in rest.replace(b" ", b"")
    assert rest.rstrip().endswith(b"[DONE]")
    assert (await unloading)[0] == 200
    assert (await ask(http, "busy"))[1]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("base", "body", "text"),
    [
        ("base", {"adapter": "x", "path": "../base"}, "does not lie"),
        ("base", {"adapter": "x", "path": "/etc"}, "does not lie"),
        ("base", {"adapter": "x", "path": "../nothing"}, "does not lie"),
        ("base", {"adapter": "x", "path": "."}, "does not lie"),
        ("base", {"adapter": "x", "path": "nothing"}, "there is no folder 'nothing'"),
        ("base", {"adapter": "x", "path": "la\0w"}, "is no folder that can be read"),
        ("base", {"adapter": "x", "path": "linked"}, "does not lie"),
        ("base", {"adapter": "x", "path": "leaking"}, "does not lie"),
        ("base", {"adapter": "x", "path": "foreign"}, "trained on another base"),
        ("base", {"adapter": "x", "path": "unnamed"}, "is for a layer of"),
        ("base", {"adapter": "x", "path": "law-gguf"}, "which transformers needs"),
        ("gguf", {"adapter": "x", "path": "law"}, "which llama.cpp needs"),
        ("base", {"adapter": "base", "path": "law"}, "serves 'base' already"),
        ("base", {"adapter": "old", "path": "law"}, "'old' is an alias"),
        ("base", {"adapter": "", "path": "law"}, "1 to 200 printable characters"),
        ("base", {"adapter": "x"}, "'path' is missing"),
        ("plain", {"adapter": "x", "path": "law"}, "this worker loads nothing while it runs. (start it with --allow-load DIR)"),
    ],
    ids=str,
)
async def test_what_a_worker_does_not_load(
    gateway: Service, http: aiohttp.ClientSession, models: Path, tmp_path: Path, base: str, body: dict[str, str], text: str
) -> None:
    adapters = models / "adapters"
    path = body.get("path")
    if path == "linked":
        (adapters / "linked").symlink_to(models / "base")
    elif path == "leaking":
        shutil.copytree(adapters / "law", adapters / "leaking")
        (adapters / "leaking" / "adapter_config.json").unlink()
        (adapters / "leaking" / "adapter_config.json").symlink_to("/etc/hostname")
    elif path in ("foreign", "unnamed"):
        build_adapter(adapters / path, build_llama(tmp_path / "other", hidden_size=32))
        if path == "unnamed":
            (adapters / path / "manifest.json").unlink()
    status, answer = await order(http, worker_of(gateway, base), "load", **body)
    assert (status, text in answer["error"]["message"]) == (400, True), answer
    assert await text_of(http, base)


async def test_a_worker_keeps_its_own_model_and_others_are_not_there(gateway: Service, http: aiohttp.ClientSession) -> None:
    status, answer = await order(http, worker_of(gateway, "base"), "unload", adapter="base")
    assert (status, "cannot unload 'base': it is its own model" in answer["error"]["message"]) == (400, True)
    assert (await order(http, "nobody", "load", adapter="x", path="law"))[0] == 404
    assert (await order(http, "nobody", "unload", adapter="x"))[0] == 404


async def test_a_second_gateway_learns_of_it_and_a_new_one_too(
    gateway: Service, http: aiohttp.ClientSession, folder: Path, models: Path, tmp_path: Path
) -> None:
    first, other = start_gateway(tmp_path), start_gateway(tmp_path)
    with (
        first,
        start_worker(
            tmp_path, first, str(models / "base" / "model.gguf"), "--format", "chatml", "--name", "gguf", "--threads", "1",
            "--gateway", other.url, "--allow-load", str(models / "adapters"),
        ) as worker,
    ):  # fmt: skip
        wait_until(lambda: len(list_workers(other)) == 1, other)
        async with aiohttp.ClientSession(first.url) as client:
            assert (await order(client, worker_of(first, "gguf"), "load", adapter="late", path="law-gguf"))[0] == 200
        wait_until(lambda: {"gguf", "late"} == {one["model"] for one in list_workers(other)}, other)
        port = int(other.url.rpartition(":")[2])
        other.kill()
        with start_gateway(tmp_path, port=port) as revived:
            wait_until(lambda: len(list_workers(revived)) == 2, worker)
            async with aiohttp.ClientSession(revived.url) as client:
                assert await text_of(client, "late") == await text_of(http, "law")


def test_an_operator_s_commands_do_the_same(gateway: Service, models: Path) -> None:
    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(workers.app, [*arguments, "--url", gateway.url])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    worker = worker_of(gateway, "gguf")
    assert f"{worker}  late over gguf  llamacpp on cpu  ready  0 under way" in run("load", worker, "late", "law-gguf")
    with pytest.raises(ServeError, match="refuses: the worker refuses: this worker serves 'late' already"):
        run("load", worker, "late", "law-gguf")
    assert "late" in run("list")
    assert [one["model"] for one in json.loads(run("unload", worker, "late", "--json"))] == ["gguf"]
    assert "draining" in run("drain", worker)
    assert "ready" in run("undrain", worker)
    with pytest.raises(ServeError, match="no worker 'nobody' is joined"):
        run("drain", "nobody")


async def test_a_key_s_models_hold_for_adapters(models: Path, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    shown = file.create("root", ["admin", "chat"])[0]
    root = {"authorization": f"Bearer {shown}"}
    joins = file.create("gpu", ["worker"], ["gguf", "late"])[0]
    with (
        start_gateway(tmp_path, "--keys", str(file.path)) as service,
        start_worker(
            tmp_path, service, str(models / "base" / "model.gguf"), "--format", "chatml", "--name", "gguf", "--threads", "1",
            "--allow-load", str(models / "adapters"), "--join-token", joins,
        ),
    ):  # fmt: skip
        async with aiohttp.ClientSession(service.url, headers=root) as client:
            async with client.get("/admin/workers") as response:
                worker = (await response.json())[0]["worker"]
            status, answer = await order(client, worker, "load", adapter="other", path="law-gguf")
            assert (status, "is not for 'other'" in answer["error"]["message"]) == (400, True)
            assert (await order(client, worker, "load", adapter="late", path="law-gguf"))[0] == 200
            assert (await ask(client, "late"))[0] == 200
            # Its name has a slash in it: the key's id comes before.
            operator = AdminClient(service.url, shown)
            served = await asyncio.to_thread(operator.ask, "POST", "workers", worker, "unload", body={"adapter": "late"})
            assert [one["model"] for one in served] == ["gguf"]


async def test_a_worker_that_freezes_or_dies_with_an_order_is_an_error(models: Path, tmp_path: Path) -> None:
    with (
        start_gateway(tmp_path, "--stall-seconds", "0.4") as service,
        start_worker(
            tmp_path, service, str(models / "base" / "model.gguf"), "--format", "chatml", "--name", "gguf", "--threads", "1",
            "--allow-load", str(models / "adapters"),
        ) as worker,
    ):  # fmt: skip
        async with aiohttp.ClientSession(service.url) as client:
            identity = worker_of(service, "gguf")
            worker.signal(signal.SIGSTOP)
            status, answer = await order(client, identity, "load", adapter="law", path="law-gguf")
            assert (status, answer["error"]["code"]) == (503, "worker_lost")
            assert "not heard" in answer["error"]["message"]
            # It has carried it out once it is awake, and says what it serves.
            worker.signal(signal.SIGCONT)
            wait_until(lambda: len(list_workers(service)) == 2, worker)
            worker.signal(signal.SIGSTOP)
            unloading = asyncio.create_task(order(client, identity, "unload", adapter="law"))
            await asyncio.sleep(0.1)
            worker.kill()
            status, answer = await unloading
            assert (status, answer["error"]["code"]) == (503, "worker_lost")


async def test_serve_passes_adapters_on(models: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(models / "adapters" / "law-gguf", tmp_path / "named")
    # Trained for another format than its base is served in.
    write_manifest(adapter, msgspec.structs.replace(read_manifest(adapter), chat_format="gemma-3"))
    spec = str(models / "base" / "model.gguf")
    with start_serve(
        tmp_path, spec, "--format", "chatml", "--name", "base", "--adapter", f"law={adapter}", "--threads", "1"
    ) as service:
        async with aiohttp.ClientSession(service.url) as client:
            texts = []
            for model in ("base", "law"):
                async with client.post("/tokenize", json={"model": model, "messages": MESSAGES}) as response:
                    tokens = (await response.json())["tokens"]
                async with client.post("/detokenize", json={"model": model, "tokens": tokens}) as response:
                    texts.append((await response.json())["prompt"])
            assert "<|im_start|>user" in texts[0]
            assert "<start_of_turn>user" in texts[1]
            assert (await ask(client, "law"))[0] == 200
