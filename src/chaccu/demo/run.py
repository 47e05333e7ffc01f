"""`run_demo`: base → clean → fine-tune → weights → serve → compare → report, then a chat page until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import MANIFEST_NAME, manifest_sha256, read_manifest, require_free_space
from chaccu.conversation import resolve_format
from chaccu.demo.report import Comparison, write_report
from chaccu.demo.services import Services, running_services
from chaccu.demo.stages import Stage, StageResult, build_stages, run_stage, write_recipe
from chaccu.errors import ChildFailedError, ServeError, UsageError, WeightsError

_NEEDED_BYTES = 2_000_000_000
_WATCH_S = 0.5
_MODELS = ("base", "tuned")


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a demo is to do. `model` None takes the packaged base; `stay`: keep a chat page open until Ctrl-C."""

    folder: Path
    name: str
    model: str | None = None
    chat_format: str | None = None
    port: int = 7860
    stay: bool = True


def run_demo(options: DemoOptions, say: Callable[[str], None], show: Callable[[list[Comparison]], None]) -> None:
    """Run every stage; `say` gets a line a stage, `show` the compared answers.

    Raises `UsageError`, `WeightsError` or `StorageError` before anything starts for what can be known by then, and
    `ChildFailedError` when a stage fails, which has said why.
    """
    _check_options(options)
    begun = time.monotonic()
    options.folder.mkdir(parents=True, exist_ok=True)
    require_free_space(options.folder, _NEEDED_BYTES, "the demo")
    write_recipe(options.folder, model=options.model, chat_format=options.chat_format)
    stages = build_stages(options.folder, name=options.name, model=options.model)
    total = len(stages) + 2
    results: list[StageResult] = []
    for number, stage in enumerate(stages, 1):
        if _is_done(stage):
            say(f"[{number}/{total}] {stage.title}: there already")
            continue
        say(f"[{number}/{total}] {stage.title}: {stage.command}")
        try:
            results.append(run_stage(stage))
        except ChildFailedError:
            say(f"[{number}/{total}] {stage.title} failed; mend that, and the demo goes on from here when it is run again")
            raise
        for line in results[-1].output.splitlines():
            say(f"      {line}")
        say(f"      {results[-1].seconds:.0f} s")
    with running_services() as services:
        say(f"[{total - 1}/{total}] serve: a gateway and two workers")
        url, commands = _start_serving(services, options)
        say(f"      {url}: {services.describe()}")
        answers_folder = options.folder / "answers"
        # Answers are kept by question and model name, and the tuned model behind that name may be a new one.
        shutil.rmtree(answers_folder, ignore_errors=True)
        compare = Stage(
            "compare", ("judge", "run", "--url", url, *_named(_MODELS), "--max-tokens", "64", "--out", str(answers_folder))
        )
        say(f"[{total}/{total}] compare: {compare.command}")
        results.append(run_stage(compare))
        comparisons = _read_comparisons(answers_folder / "answers.jsonl")
        report = options.folder / "report.html"
        write_report(
            report, options.folder, comparisons, [*(stage.command for stage in stages), *commands, compare.command], results
        )
        say(f"report: {report}")
        show(comparisons)
        say(f"total: {time.monotonic() - begun:.0f} s")
        if options.stay:
            page = services.start_with_url("chat page", ["web", "--gateway", url, "--port", str(options.port)], "--url-file")
            say(f"chat with both models at {page} (Ctrl-C ends the demo)")
            _watch_until_interrupt(services, say)


def _watch_until_interrupt(services: Services, say: Callable[[str], None]) -> None:
    """Tell of a process that ends before the demo. Ctrl-C is how a demo is meant to end, so it is no error here."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for ended in services.newly_ended():
                say(ended)
            time.sleep(_WATCH_S)


def _check_options(options: DemoOptions) -> None:
    if not options.name.strip():
        raise UsageError("the name is empty.", remedy="--name 'Vicky the vicuña'")
    if options.stay and options.port:
        _refuse_busy_port(options.port)
    if options.model is None:
        return
    if options.model.startswith((".", "/", "~")) and not Path(options.model).exists():
        raise WeightsError(f"there is no model at {options.model}.", remedy="check the path for a typing error")
    if not (Path(options.model) / MANIFEST_NAME).is_file() and options.chat_format is None:
        raise UsageError(f"no chat format is known for {options.model}.", remedy="name one with --format (chaccu format list)")
    if options.chat_format is not None:
        resolve_format(options.chat_format, Path(options.model))


def _refuse_busy_port(port: int) -> None:
    """The chat page comes last; a port that is taken is told before minutes of work."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServeError(
                f"port {port} is taken: {error.strerror}.", remedy="--port 0 lets the system pick a free one"
            ) from error


def _is_done(stage: Stage) -> bool:
    """Whether a merge or wrap has left its folder; the other commands look for themselves."""
    if stage.arguments[:2] not in (("weights", "merge"), ("weights", "wrap")):
        return False
    out = Path(stage.arguments[stage.arguments.index("--out") + 1])
    if not (out / MANIFEST_NAME).is_file():
        return False
    parents = read_manifest(out).parents
    named = {"base": "--base", "adapter": "--adapter"}
    given = {
        role: Path(stage.arguments[stage.arguments.index(option) + 1])
        for role, option in named.items()
        if option in stage.arguments
    }
    return all(parents.get(role) == manifest_sha256(folder) for role, folder in given.items())


def _start_serving(services: Services, options: DemoOptions) -> tuple[str, list[str]]:
    """Start gateway and workers; the gateway's URL and the commands to do it by hand."""
    url = services.start_with_url("gateway", ["gateway", "--port", "0"], "--port-file")
    packaged = options.model is None
    folders = {
        "base": options.model or str(options.folder / "base-gguf"),
        "tuned": str(options.folder / ("tuned" if packaged else "merged")),
    }
    shown = []
    for name, folder in folders.items():
        arguments = ["worker", "--model", folder, "--name", name, "--gateway", url, "--threads", "1"]
        if options.chat_format:
            arguments += ["--format", options.chat_format]
        services.start(f"{name} worker", arguments)
        shown.append(Stage(name, tuple(arguments)).command)
    services.wait("both workers", lambda: set(_MODELS) <= set(_list_models(url)), 120)
    return url, ["chaccu gateway --port 0", *shown]


def _list_models(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        listing: dict[str, Any] = json.load(response)
    return [str(entry["id"]) for entry in listing["data"]]


def _named(models: tuple[str, ...]) -> list[str]:
    return [text for model in models for text in ("--model", model)]


def _read_comparisons(file: Path) -> list[Comparison]:
    from chaccu.judge.answers import read_answers
    from chaccu.judge.questions import load_questions

    answers = {(answer.question_id, answer.model): answer for answer in read_answers(file)}
    rows = []
    for question in load_questions():
        base, tuned = (answers.get((question.question_id, model)) for model in _MODELS)
        if base is not None and tuned is not None:
            rows.append(Comparison(question.turns[0], base.text, tuned.text, base.total_s, tuned.total_s))
    return rows
