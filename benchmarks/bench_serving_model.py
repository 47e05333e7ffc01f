"""Tokens a second of a real model behind the gateway, beside those of the bare engine and of FastChat's worker.

Each client asks its next question when the last is answered. The bare engine is llama.cpp's own server on the same GGUF with as
many slots, asked directly; runs of it and of ours take turns, and the median of each is told. FastChat answers from the same
weights before they were quantised (`--base`), in an environment of its own (`--environments DIR`, with `DIR/fschat`); it is
given fewer questions.

    python benchmarks/bench_serving_model.py --gguf base.gguf --tokenizer base --format gemma-3 --never 1 106
    python benchmarks/bench_serving_model.py --gguf base.gguf --tokenizer base --format gemma-3 --environments E --base base
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from closed_loop import Pieces, ask_in_turn, ask_server, open_session
from gateways import OURS, Running, Stage, create_key, free_port, make_absolute, open_stage, start_ours, wait_for
from machine import RESULTS, describe_machine

MODEL = "model"
TOPICS = (
    "the history of glass",
    "how a bicycle stays upright",
    "bread without yeast",
    "why the sky is blue",
    "mountain animals of the Andes",
    "how to learn a language",
    "the rules of chess",
    "tides and the moon",
)


def build_prompt(number: int) -> str:
    """A question that no other number asks."""
    return f"Chapter {number + 1}. A few words on {TOPICS[number % len(TOPICS)]}, for readers who are new to it.\n\n"


async def ask_all(
    running: Running, *, clients: int, questions: int, max_tokens: int, stream: bool, never: Sequence[int] = ()
) -> dict[str, float]:
    """Tokens a second and the median seconds to the first text (of the whole answer where it is not streamed). `never`: tokens
    that no answer has, so that all are equally long."""
    headers = {"Authorization": f"Bearer {running.api_key}"} if running.api_key else {}
    async with open_session() as session:

        def ask(number: int) -> Pieces:
            body: dict[str, Any] = {"model": MODEL, "prompt": build_prompt(number), "max_tokens": max_tokens, "temperature": 0}
            if never:
                body["logit_bias"] = {str(token): -100 for token in never}
            if stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            return ask_server(session, f"{running.url}/completions", body, headers)

        load = await ask_in_turn(ask, clients=clients, questions=range(questions))
    return {
        "tokens_per_s": load.tokens_per_s,
        "first_text_s": statistics.median(load.waits_s),
        "tokens": load.tokens,
        "seconds": load.seconds,
    }


@contextmanager
def serve_bare(options: argparse.Namespace) -> Iterator[Running]:
    """llama.cpp's own server."""
    with tempfile.TemporaryDirectory() as folder, open_stage(Path(folder), None) as stage:
        script = str(Path(__file__).with_name("bare_llamacpp.py"))
        command = [
            sys.executable,
            script,
            str(options.gguf),
            "--slots",
            str(options.clients),
            "--threads",
            str(options.threads),
        ]
        process = stage.start(command, "llamacpp")
        url = _read_url(stage, Path(folder))
        wait_for(stage, f"{url}/health")
        yield Running(f"{url}/v1", [process.pid])


def _read_url(stage: Stage, folder: Path) -> str:
    while True:
        lines = "".join(log.read_text() for log in folder.glob("llamacpp-*.log")).split()
        found = [word for word in lines if word.startswith("http://")]
        if found:
            return found[0]
        stage.check()
        time.sleep(0.1)


@contextmanager
def serve_ours(options: argparse.Namespace) -> Iterator[Running]:
    """A gateway with API keys, and one worker with llama.cpp."""
    with tempfile.TemporaryDirectory() as name, open_stage(Path(name), None) as stage:
        folder = Path(name, "model")
        folder.mkdir()
        (folder / "model.gguf").symlink_to(options.gguf.resolve())
        (folder / "tokenizer.json").symlink_to((options.tokenizer / "tokenizer.json").resolve())
        # Before the gateway: one that runs knows of a new key a second or two later.
        key = create_key(stage.folder / "keys.json", "--name", "worker", "--scope", "worker")
        running = start_ours(stage, [])
        size = ["--slots", str(options.clients), "--threads", str(options.threads), "--context-tokens", "2048"]
        command = ["worker", "--model", str(folder), "--name", MODEL, "--format", options.format, *size]
        stage.start([*OURS, *command, "--gateway", running.url.removesuffix("/v1")], "worker", CHACCU_JOIN_TOKEN=key)
        wait_for(stage, f"{running.url}/models", running.api_key, until=lambda body: MODEL.encode() in body)
        yield running


@contextmanager
def serve_fastchat(options: argparse.Namespace) -> Iterator[Running]:
    """FastChat's controller, worker and API server."""
    with tempfile.TemporaryDirectory() as folder, open_stage(Path(folder), options.environments) as stage:
        python = stage.tool("fschat", "python")
        ports = [free_port() for _ in range(3)]
        controller, worker, api = (f"http://127.0.0.1:{port}" for port in ports)
        at = [["--host", "127.0.0.1", "--port", str(port)] for port in ports]
        stage.start([python, "-m", "fastchat.serve.controller", *at[0]], "controller")
        wait_for(stage, f"{controller}/test_connection")
        join = ["--controller-address", controller, "--worker-address", worker]
        served = ["--model-path", str(options.base.resolve()), "--model-names", MODEL, "--device", "cpu"]
        stage.start([python, "-m", "fastchat.serve.model_worker", *at[1], *join, *served], "worker")
        stage.start([python, "-m", "fastchat.serve.openai_api_server", *at[2], *join[:2]], "api")
        wait_for(stage, f"{api}/v1/models", until=lambda body: MODEL.encode() in body, limit_s=300)
        yield Running(f"{api}/v1", [])


def main() -> None:
    """Measure, print and write."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--gguf", type=Path, required=True)
    cli.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json")
    cli.add_argument("--format", required=True)
    cli.add_argument("--base", type=Path, help="the same weights as a Hugging Face folder, for FastChat")
    cli.add_argument("--environments", type=Path)
    cli.add_argument("--clients", type=int, default=8)
    cli.add_argument("--questions", type=int, default=24)
    cli.add_argument("--max-tokens", type=int, default=128)
    cli.add_argument("--never", type=int, nargs="*", default=[], help="tokens that would end an answer early, by id")
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--runs", type=int, default=3)
    cli.add_argument("--out", type=Path, default=RESULTS / "serving-model.json")
    options = cli.parse_args()
    make_absolute(options)
    load: dict[str, Any] = {name: getattr(options, name) for name in ("clients", "questions", "max_tokens", "never")}
    runs: dict[str, list[dict[str, float]]] = {}
    with serve_bare(options) as bare, serve_ours(options) as ours:
        for running in (bare, ours):
            asyncio.run(ask_all(running, clients=options.clients, questions=8, max_tokens=8, stream=True))
        for number in range(options.runs):
            for stream in (True, False):
                # Who is first changes: a machine's clock falls as it warms.
                pair = [("bare", bare), ("chaccu", ours)]
                for name, running in pair if number % 2 else reversed(pair):
                    found = asyncio.run(ask_all(running, **load, stream=stream))
                    runs.setdefault(f"{name}, {'streamed' if stream else 'whole'}", []).append(found)
                    print(name, "streamed" if stream else "whole", {key: round(value, 2) for key, value in found.items()})
    if options.base is not None and options.environments is not None:
        with serve_fastchat(options) as fastchat:
            few = {**load, "questions": options.clients}
            runs["fastchat, whole"] = [asyncio.run(ask_all(fastchat, **few, stream=False))]
    medians = {name: statistics.median(one["tokens_per_s"] for one in found) for name, found in runs.items()}
    ratios = {how: medians[f"chaccu, {how}"] / medians[f"bare, {how}"] for how in ("streamed", "whole")}
    result = {"machine": describe_machine("xllamacpp", "aiohttp"), "load": load, "tokens_per_s": medians, "to_bare": ratios}
    options.out.write_text(json.dumps({**result, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"tokens_per_s": medians, "to_bare": ratios}, indent=1))


if __name__ == "__main__":
    main()
