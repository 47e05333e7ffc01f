"""Real models on this machine's GPU behind the gateway, beside their bare engines: tokens a second and times to first tokens.

    python benchmarks/bench_serving_gpu.py
    python benchmarks/bench_serving_gpu.py --shapes 7b --engines vllm --vllm-python ../vllm/bin/python --clients 1 64
    python benchmarks/bench_serving_gpu.py --show

Weights are random LLaMAs (`random_llama.py`), answers greedy and all of the same length. Each of so many clients asks its next
question when its last is answered. Bare: the engine `transformers` asked in its own process, and `vllm serve` by HTTP. The
gateway is one with API keys, asked by HTTP, with one worker joined to it.

A part is one shape on one engine, bare or behind the gateway, in processes of its own. Writes `results/serving-h100.json`
(named after the GPU, or `serving-cpu.json`) after each figure: a new one takes the place of that of the same load, GPU and
commit; a part that fails is noted with its last words. Ends with 1 where one did.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from closed_loop import Pieces, ask_server, measure_levels, open_session
from gateways import OURS, Running, Stage, create_key, free_port, make_absolute, open_stage, start_ours, wait_for
from limited import LAST_LINES, hide_folders, run_limited
from machine import describe_machine, results_file, write_results
from random_llama import CHAT_FORMAT, choose_prompt
from shapes import SHAPES

from chaccu.engine.vllm import find_vllm

PACKAGES = ("torch", "transformers", "tokenizers", "aiohttp", "uvicorn")
MODEL = "model"
SCRIPTS = Path(__file__).parent
WAYS = ("bare", "gateway")
Found = dict[str, Any]
Tell = Callable[[Found], None]


class FailedPartError(Exception):
    """A part gave not all figures; with its last lines."""


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    device = name_device()
    out = options.out or results_file("serving", device or "cpu")
    found: Found = {"runs": [], **(json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {})}
    if options.show:
        print(format_table(found))
        return
    versions = describe_machine(*PACKAGES, commit=options.commit)
    about = {**versions, "device": device or versions["processor"]}
    load = {"prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
    failed = False
    with ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for shape in options.shapes:
            for engine in options.engines:
                for way in (*WAYS, *(["peer"] if options.peer and engine == "transformers" else [])):
                    part = {"shape": shape, "engine": engine, "way": way, **load}

                    def tell(figures: Found, part: Found = part) -> None:
                        keep({**part, **figures, **about}, found, out)

                    try:
                        measure_part(part, prepare_model(scratch, shape, options), options, tell)
                    except FailedPartError as error:
                        failed = True
                        tell({"failed": "no or not all figures", "last_lines": str(error).splitlines()})
    print(format_table(found, about["device"]))
    sys.exit(failed)


def parse_options() -> argparse.Namespace:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "7b"])
    cli.add_argument("--engines", nargs="+", choices=["transformers", "vllm"], help="default: those that are there")
    cli.add_argument("--vllm-python", help="Python or vllm executable of the environment that has vLLM")
    cli.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    cli.add_argument("--prompt-tokens", type=int, default=128)
    cli.add_argument("--max-tokens", type=int, default=128)
    cli.add_argument("--peer", action="store_true", help="also transformers' own continuous batching")
    cli.add_argument("--limit-s", type=float, default=240, help="seconds for each part")
    cli.add_argument(
        "--scratch", type=Path, help="where models are written, and found again; default: a folder that is removed"
    )
    cli.add_argument("--out", type=Path, help="the results file")
    cli.add_argument("--commit", help="what is measured, where the code lies outside of its repository")
    cli.add_argument("--show", action="store_true", help="print what the results file holds, and measure nothing")
    options = cli.parse_args()
    make_absolute(options)
    if options.vllm_python:
        found = shutil.which(options.vllm_python) or cli.error(f"{options.vllm_python} is no program")
        options.vllm_python = str(Path(found).absolute())
    if options.engines is None:
        options.engines = ["transformers", *(["vllm"] if find_vllm(options.vllm_python) else [])]
    elif "vllm" in options.engines and find_vllm(options.vllm_python) is None:
        cli.error("there is no vLLM on the PATH or beside this Python: name it with --vllm-python")
    return options


def name_device() -> str | None:
    """The GPU's name, None without one; CUDA in this process would take memory from the engines."""
    if shutil.which("nvidia-smi") is None:
        return None
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(ask, capture_output=True, text=True)
    return told.stdout.splitlines()[0].strip() if told.returncode == 0 else None


def prepare_model(scratch: Path, shape: str, options: argparse.Namespace) -> Path:
    """The folder of a shape's model, written where it is not there."""
    folder = scratch / shape
    if not folder.is_dir():
        unfinished = scratch / f"{shape}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, str(SCRIPTS / "random_llama.py"), str(unfinished), "--shape", shape]
        ended = run_limited(command, limit_s=options.limit_s)
        if ended.exit_code != 0:
            raise FailedPartError("\n".join(["the model could not be written", *ended.last_lines]))
        unfinished.rename(folder)
    return folder


def measure_part(part: Found, model: Path, options: argparse.Namespace, tell: Tell) -> None:
    """Give `tell` the figures of a part as they come. Raises `FailedPartError`."""
    deadline_s = time.monotonic() + options.limit_s
    if part["engine"] == "transformers" and part["way"] != "gateway":
        measure_bare_transformers(part, model, options, tell)
        return
    try:
        with tempfile.TemporaryDirectory() as folder, open_stage(Path(folder), None) as stage:
            serve = serve_gateway if part["way"] == "gateway" else serve_bare_vllm
            try:
                with serve(stage, part["engine"], model, options) as running:
                    loop = ask_levels(running, options, tell)
                    asyncio.run(asyncio.wait_for(loop, deadline_s - time.monotonic()))
            except (TimeoutError, OSError, RuntimeError, ExceptionGroup, aiohttp.ClientError) as error:
                raise FailedPartError("\n".join([describe(error), *last_words(stage)])) from error
    except subprocess.CalledProcessError as error:
        raise FailedPartError(describe(error)) from error


def measure_bare_transformers(part: Found, model: Path, options: argparse.Namespace, tell: Tell) -> None:
    sizes = ["--prompt-tokens", str(options.prompt_tokens), "--max-tokens", str(options.max_tokens)]
    command = [sys.executable, str(SCRIPTS / "bare_transformers.py"), str(model), *sizes]
    command += ["--clients", *map(str, options.clients), *(["--peer"] if part["way"] == "peer" else [])]
    ended = run_limited(command, limit_s=options.limit_s)
    for line in ended.output.splitlines():
        if line.startswith('{"clients"'):
            tell(json.loads(line))
    if ended.exit_code != 0:
        raise FailedPartError("\n".join(ended.last_lines))


@contextmanager
def serve_gateway(stage: Stage, engine: str, model: Path, options: argparse.Namespace) -> Iterator[Running]:
    """A gateway with API keys, and one worker."""
    # Before the gateway: one that runs knows of a new key a second or two later.
    key = create_key(stage.folder / "keys.json", "--name", "worker", "--scope", "worker")
    running = start_ours(stage, [])
    command = ["worker", "--model", str(model), "--name", MODEL, "--format", CHAT_FORMAT, "--engine", engine]
    command += ["--slots", str(max(options.clients)), "--gateway", running.url.removesuffix("/v1")]
    if engine == "vllm" and options.vllm_python:
        command += ["--vllm-python", options.vllm_python]
    stage.start([*OURS, *command], "worker", CHACCU_JOIN_TOKEN=key)
    joined = MODEL.encode()
    wait_for(stage, f"{running.url}/models", running.api_key, until=lambda body: joined in body, limit_s=options.limit_s)
    yield running


@contextmanager
def serve_bare_vllm(stage: Stage, engine: str, model: Path, options: argparse.Namespace) -> Iterator[Running]:
    """vLLM's own server, with the flags that the engine `vllm` gives it."""
    port = free_port()
    command = [*(find_vllm(options.vllm_python) or ()), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", MODEL, "--max-num-seqs", str(max(options.clients))]
    # What is on our path is not for another environment's Python.
    stage.start(command, engine, VLLM_API_KEY="bare", **({"PYTHONPATH": ""} if options.vllm_python else {}))
    wait_for(stage, f"http://127.0.0.1:{port}/health", until=lambda _: True, limit_s=options.limit_s)
    yield Running(f"http://127.0.0.1:{port}/v1", [], "bare")


async def ask_levels(running: Running, options: argparse.Namespace, tell: Tell) -> None:
    """The clients, by HTTP."""
    headers = {"Authorization": f"Bearer {running.api_key}"}
    async with open_session() as session:

        def ask(number: int, length: int) -> Pieces:
            prompt = choose_prompt(number, options.prompt_tokens)
            body = {"model": MODEL, "prompt": prompt, "max_tokens": length, "temperature": 0, "stream": True}
            return ask_server(
                session, f"{running.url}/completions", {**body, "stream_options": {"include_usage": True}}, headers
            )

        async for figures in measure_levels(ask, options.clients, max_tokens=options.max_tokens):
            tell(figures)


def describe(error: BaseException) -> str:
    """What it is and says, without folders; of a group its first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return hide_folders(f"{type(error).__name__}: {error}")


def last_words(stage: Stage) -> list[str]:
    """The last lines of each log, without folders."""
    return [
        f"{log.stem}: {hide_folders(line)[:300]}"
        for log in sorted(stage.folder.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    ]


def keep(entry: Found, found: Found, path: Path) -> None:
    """Put an entry in place of the like and of failures of its part, and write the file."""
    part = ("shape", "engine", "way", "prompt_tokens", "max_tokens", "device", "commit")

    def replaced(old: Found) -> bool:
        same = all(entry[key] == old[key] for key in part)
        return same and ("failed" in old or old["clients"] == entry.get("clients"))

    found["runs"] = [old for old in found["runs"] if not replaced(old)] + [entry]
    write_results(found, path)
    print(json.dumps(entry, ensure_ascii=False), flush=True)


HEADS = ("shape", "engine", "way", "clients", "tokens/s", "of the bare engine", "TTFT p50 ms", "TTFT p99 ms", "measured")


def format_table(found: Found, device: str | None = None) -> str:
    """Markdown, in the order of the measurements. `device`: of this one alone."""
    runs = [entry for entry in found["runs"] if device in (None, entry["device"])]
    rows = [HEADS, ("---",) * len(HEADS), *(format_run(entry, runs) for entry in runs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_run(entry: Found, runs: list[Found]) -> tuple[str, ...]:
    what = (entry["shape"], entry["engine"], entry["way"])
    where = f"{entry['date']}, {entry['commit']}"
    if "failed" in entry:
        return (*what, "", entry["failed"], "", "", "", where)
    same = ("shape", "engine", "clients", "prompt_tokens", "max_tokens", "device", "commit")
    bare = [one for one in runs if one["way"] == "bare" and all(one.get(key) == entry[key] for key in same)]
    ratio = f"{entry['tokens_per_s'] / bare[-1]['tokens_per_s']:.1%}" if bare and entry["way"] != "bare" else ""
    waits = [f"{entry[key]:,.0f}" if key in entry else "" for key in ("ttft_p50_ms", "ttft_p99_ms")]
    return (*what, str(entry["clients"]), f"{entry['tokens_per_s']:,.0f}", ratio, *waits, where)


if __name__ == "__main__":
    main()
