"""Where a run's records go while it runs: a JSON-lines log, TensorBoard files, wandb or trackio, and whoever listens.

The log and the TensorBoard files lie in `<output>.run` beside the output, which does not exist yet; the finished artifact takes
them in as `logs/`. Invariants: each record is on disk before anybody hears of it, so the log of a run that dies is complete; a
new run of the same output begins its log afresh, and removes nothing that it did not write.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import MissingDependencyError
from chaccu.train.recipe import Recipe
from chaccu.train.report import LOG_NAME, EvalReport, Record, SampleAnswer, StartReport, StepReport

_EVENTS = "events.out.tfevents."
_PROJECT = "chaccu"


class Tracker(Protocol):
    """One place that records go to."""

    def record(self, record: Record) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class RunFolder:
    """`<output>.run`: the log and the TensorBoard files of the run that makes `output`."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.run")

    def begin(self) -> None:
        """Make it, without what an earlier run has written there. Raises `StorageError`."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self._files():
                file.unlink()

    def copy_to(self, folder: Path) -> None:
        """Copy the files, under names that tell neither the machine nor the time."""
        folder.mkdir()
        events = 0
        for file in self._files():
            name = file.name
            if name.startswith(_EVENTS):
                name, events = f"{_EVENTS}{events}", events + 1
            shutil.copyfile(file, folder / name)

    def remove(self) -> None:
        """Remove the files, and the folder unless something else lies in it. Raises `StorageError`."""
        with storage_errors(self.path):
            for file in self._files():
                file.unlink()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _files(self) -> list[Path]:
        return sorted(entry for entry in self.path.iterdir() if entry.name == LOG_NAME or entry.name.startswith(_EVENTS))


class Reporter:
    """Hands each record to all trackers, then to whoever listens. One with neither reports nothing: that of a process beside
    the first."""

    def __init__(
        self,
        trackers: Sequence[Tracker] = (),
        listener: Callable[[Record], None] | None = None,
    ) -> None:
        self._trackers = trackers
        self._listener = listener

    def record(self, record: Record) -> None:
        """The run begins, or a step or an evaluation is done."""
        for tracker in self._trackers:
            tracker.record(record)
        if self._listener is not None:
            self._listener(record)


@contextlib.contextmanager
def open_reporter(recipe: Recipe, folder: RunFolder, listener: Callable[[Record], None] | None = None) -> Iterator[Reporter]:
    """Trackers as the recipe wants them, closed at the end of the block, however it ends.

    Raises `StorageError`, or `MissingDependencyError` for a tracker that is not installed; of TensorBoard, which is written by
    default, it only warns.
    """
    folder.begin()
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        for build in _builders(recipe, folder):
            tracker = build()
            trackers.append(tracker)
            stack.push(lambda kind, _, __, tracker=tracker: tracker.close(failed=kind is not None))
        yield Reporter(trackers, listener)


def import_tracker(report_to: str) -> Any:
    """The package of a tracker of its own (wandb, trackio), None for the others. Raises `MissingDependencyError`."""
    if report_to not in ("wandb", "trackio"):
        return None
    try:
        return importlib.import_module(report_to)
    except ImportError as error:
        raise MissingDependencyError(report_to, extra=report_to, needed_for=f"report_to: {report_to}") from error


def _builders(recipe: Recipe, folder: RunFolder) -> Iterator[Callable[[], Tracker]]:
    yield lambda: _JsonLines(folder.path / LOG_NAME)
    if recipe.report_to != "none" and (writer := _import_summary_writer()) is not None:
        yield lambda: _TensorBoard(writer(log_dir=str(folder.path), flush_secs=10), recipe)
    if (module := import_tracker(recipe.report_to)) is not None:
        yield lambda: _Remote(recipe.report_to, module, recipe)


def _import_summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "no TensorBoard files are written: tensorboard is not installed (pip install 'chaccu[train]'; report_to: none asks "
            "for none). The log is written all the same.",
            stacklevel=2,
        )
        return None
    return SummaryWriter


class _JsonLines:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage_errors(path):
            self._file = path.open("wb")

    def record(self, record: Record) -> None:
        with storage_errors(self._path):
            self._file.write(msgspec.json.encode(record) + b"\n")
            self._file.flush()

    def close(self, *, failed: bool) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, writer: Any, recipe: Recipe) -> None:
        self._writer = writer
        writer.add_text("recipe", _show_as_json(recipe))

    def record(self, record: Record) -> None:
        if isinstance(record, StartReport):
            self._writer.add_text("start", _show_as_json(record))
            return
        for name, value in name_values(record).items():
            self._writer.add_scalar(name, value, record.step)
        if isinstance(record, EvalReport) and record.samples:
            self._writer.add_text("samples", format_samples(record.samples), record.step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Remote:
    """wandb, or trackio, which has wandb's calls. What they print goes to stderr: stdout is the command's own."""

    def __init__(self, name: str, module: Any, recipe: Recipe) -> None:
        self._name = name
        self._module = module
        with contextlib.redirect_stdout(sys.stderr):
            module.init(project=_PROJECT, name=Path(recipe.output).name, config=msgspec.to_builtins(recipe))

    def record(self, record: Record) -> None:
        if isinstance(record, StartReport):
            return  # wandb and trackio note the machine by themselves, and the recipe is their config
        values: dict[str, Any] = dict(name_values(record))
        if isinstance(record, EvalReport) and record.samples:
            values["samples"] = self._show(record.samples)
        self._module.log(values, step=record.step)

    def _show(self, samples: Sequence[SampleAnswer]) -> Any:
        if self._name == "trackio":
            return self._module.Markdown(format_samples(samples))
        return self._module.Table(
            columns=["question", "answer", "ended"], data=[[one.question, one.answer, one.ended] for one in samples]
        )

    def close(self, *, failed: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            if self._name == "wandb":
                self._module.finish(exit_code=int(failed))
            else:
                self._module.finish()


def _show_as_json(value: msgspec.Struct) -> str:
    return f"```json\n{msgspec.json.format(msgspec.json.encode(value), indent=2).decode()}\n```"


def name_values(record: StepReport | EvalReport) -> dict[str, float]:
    """A record's numbers by the names that trackers show; what is not known is left out."""
    if isinstance(record, StepReport):
        values = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate,
            "train/tokens_per_s": record.tokens_per_s,
            "train/mfu": record.mfu,
            "train/memory_gb": record.memory_bytes / 1e9,
        }
    else:
        values = {"eval/loss": record.loss, "eval/best_loss": record.best_loss}
    return {name: value for name, value in values.items() if value is not None}


def format_samples(samples: Sequence[SampleAnswer]) -> str:
    """Questions and answers as Markdown, each quoted as it is; an answer that was cut off ends in …"""
    blocks = (f"**{sample.question}**\n\n{sample.answer}{'' if sample.ended else ' …'}" for sample in samples)
    return "\n\n---\n\n".join(blocks)
