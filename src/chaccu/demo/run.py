"""`run_demo`: base → clean → fine-tune → weights → serve → compare → report, then a chat page until Ctrl-C.

With a released adapter nothing is cleaned or trained: base → weights → serve, and so on.
"""

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
from chaccu.demo.released import check_release
from chaccu.demo.report import Comparison, read_released, read_run, write_report
from chaccu.demo.services import Services, running_services
from chaccu.demo.stages import (
    RELEASED_FOLDER,
    Stage,
    StageResult,
    build_released_stages,
    build_stages,
    run_stage,
    write_recipe,
)
from chaccu.errors import ChildFailedError, ServeError, UsageError, WeightsError

_NEEDED_BYTES = 2_000_000_000
_WATCH_S = 0.5
_MODELS = ("base", "tuned")
DEFAULT_NAME = "Vicky the vicuña"


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a demo is to do. `name`: the one that the model learns (None: `DEFAULT_NAME`). `model` None takes the packaged base.
    `released`: the folder of an adapter of that base to merge, instead of training one. `stay`: keep a chat page open until
    Ctrl-C."""

    folder: Path
    name: str | None = None
    model: str | None = None
    released: Path | None = None
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
    if options.released is not None:
        stages = build_released_stages(options.folder, options.released)
        say(f"{options.released}: nothing is trained; its data, limits and terms are in {options.released / 'README.md'}")
    else:
        write_recipe(options.folder, model=options.model, chat_format=options.chat_format)
        stages = build_stages(options.folder, name=options.name or DEFAULT_NAME, model=options.model)
    total = len(stages) + 2
    results = _run_stages(stages, total, say)
    with running_services() as services:
        say(f"[{total - 1}/{total}] serve: a gateway and two workers")
        url, commands = _start_serving(services, options)
        say(f"      {url}: {services.describe()}")
        answers_folder = options.folder / _result_name("answers", options)
        # Answers are kept by question and model name, and the tuned model behind that name may be a new one.
        shutil.rmtree(answers_folder, ignore_errors=True)
        compare = Stage(
            "compare", ("judge", "run", "--url", url, *_named(_MODELS), "--max-tokens", "64", "--out", str(answers_folder))
        )
        say(f"[{total}/{total}] compare: {compare.command}")
        results.append(run_stage(compare))
        comparisons = _read_comparisons(answers_folder / "answers.jsonl")
        report = options.folder / _result_name("report.html", options)
        run = read_released(options.released) if options.released is not None else read_run(options.folder)
        write_report(report, run, comparisons, [*(stage.command for stage in stages), *commands, compare.command], results)
        say(f"report: {report}")
        show(comparisons)
        say(f"total: {time.monotonic() - begun:.0f} s")
        if options.stay:
            page = services.start_with_url("chat page", ["web", "--gateway", url, "--port", str(options.port)], "--url-file")
            say(f"chat with both models at {page} (Ctrl-C ends the demo)")
            _watch_until_interrupt(services, say)


def _run_stages(stages: list[Stage], total: int, say: Callable[[str], None]) -> list[StageResult]:
    results = []
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
    return results


def _result_name(name: str, options: DemoOptions) -> str:
    """Where a result goes: those of a released adapter stand beside those of one that was trained here."""
    return name if options.released is None else f"{RELEASED_FOLDER}-{name}"


def _watch_until_interrupt(services: Services, say: Callable[[str], None]) -> None:
    """Tell of a process that ends before the demo. Ctrl-C is how a demo is meant to end, so it is no error here."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for ended in services.newly_ended():
                say(ended)
            time.sleep(_WATCH_S)


def _check_options(options: DemoOptions) -> None:
    if options.name is not None and not options.name.strip():
        raise UsageError("the name is empty.", remedy=f"--name '{DEFAULT_NAME}'")
    if options.released is not None:
        _check_released(options, options.released)
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


def _check_released(options: DemoOptions, released: Path) -> None:
    """Refuse what is for a model that is trained here, and a release that is damaged or of another base."""
    given = {"--name": options.name, "--model": options.model, "--format": options.chat_format}
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} {value!r} does not go with a released adapter: its base, its format and the name that it gives "
                "itself are what it was trained with.",
                remedy=f"leave {option} out, or train: chaccu demo without --released and --adapter",
            )
    check_release(released)


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
    tuned = RELEASED_FOLDER if options.released is not None else ("tuned" if packaged else "merged")
    folders = {"base": options.model or str(options.folder / "base-gguf"), "tuned": str(options.folder / tuned)}
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
