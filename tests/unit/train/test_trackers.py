"""Where a run's records go: the log, TensorBoard files, wandb and trackio, and what is there when a run dies."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import MissingDependencyError
from chaccu.train.recipe import Recipe
from chaccu.train.report import LOG_NAME, EvalReport, Record, SampleAnswer, StartReport, StepReport, read_log

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.run import train  # noqa: E402 (torch may be absent)
from chaccu.train.trackers import RunFolder, name_values, open_reporter  # noqa: E402

START = StartReport(
    device="CPU",
    processes=1,
    precision="bf16",
    weights_precision="fp32",
    float8_products=0,
    attention="scaled dot product",
    trained_parameters=100,
    conversations=24,
    left_out={"train.jsonl": 3},
    rows=4,
    tokens=900,
)
STEP = StepReport(
    step=1, steps=2, loss=2.5, grad_norm=0.5, learning_rate=1e-3, tokens_per_s=100.0, mfu=None, memory_bytes=2_000_000_000,
    left_s=1.0,
)  # fmt: skip
EVAL = EvalReport(step=1, loss=2.0, best_loss=1.5, best_step=0, samples=(SampleAnswer("Sky?", "Blue.", True),))


def change(recipe: Recipe, **fields: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **fields)


def records_in(folder: Path) -> list[Record]:
    return read_log(folder / LOG_NAME)


def read_events(folder: Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_log_and_tensorboard_hold_every_step_and_evaluation(recipe: Recipe) -> None:
    seen: list[Record] = []
    result = train(change(recipe, eval_steps=2, max_steps=5, sample_tokens=4), report=seen.append)
    logs = Path(recipe.output) / "logs"
    records = records_in(logs)
    assert records == seen
    start = records.pop(0)
    assert isinstance(start, StartReport)
    assert [record for record in records if isinstance(record, StepReport)] == result.log
    evals = [record for record in records if isinstance(record, EvalReport)]
    kinds = [(type(record).__name__[:4], record.step) for record in records]
    assert kinds == [
        ("Eval", 0),
        ("Step", 1),
        ("Step", 2),
        ("Eval", 2),
        ("Step", 3),
        ("Step", 4),
        ("Eval", 4),
        ("Step", 5),
        ("Eval", 5),
    ]
    events = read_events(logs)
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_s"):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert shown == [(step.step, pytest.approx(getattr(step, name), rel=1e-6)) for step in result.log]
    assert [event.value for event in events.Scalars("eval/loss")] == pytest.approx([one.loss for one in evals], rel=1e-6)
    assert "train/mfu" not in events.Tags()["scalars"]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 2, 4, 5]
    assert start.attention in events.Tensors("start/text_summary")[0].tensor_proto.string_val[0].decode()
    assert evals[-1].samples[0].question in texts[-1].tensor_proto.string_val[0].decode()


def test_the_files_go_into_the_artifact_under_names_that_tell_no_machine(recipe: Recipe) -> None:
    train(change(recipe, max_steps=1, sample_tokens=4))
    assert sorted(entry.name for entry in (Path(recipe.output) / "logs").iterdir()) == [
        "events.out.tfevents.0",
        "train_log.jsonl",
    ]
    assert not RunFolder(Path(recipe.output)).path.exists()


def test_evaluations_note_the_best_loss_and_do_not_change_training(recipe: Recipe, tmp_path: Path) -> None:
    # With a dropout, random numbers that sampling took would change what follows.
    recipe = change(recipe, max_steps=6, lora=msgspec.structs.replace(recipe.lora, dropout=0.2), learning_rate=5e-2)
    seen: list[Record] = []
    watched = train(change(recipe, eval_steps=1, sample_tokens=4), report=seen.append)
    evals = [record for record in seen if isinstance(record, EvalReport)]
    plain = train(change(recipe, output=str(tmp_path / "plain"), sample_answers=0, report_to="none"))
    assert [step.loss for step in watched.log] == [step.loss for step in plain.log]
    losses = [one.loss for one in evals]
    assert (watched.loss_before, watched.loss_after) == (losses[0], losses[-1]) == (plain.loss_before, plain.loss_after)
    assert (watched.best_loss, watched.best_step) == (min(losses), losses.index(min(losses)))
    assert [one.best_loss for one in evals] == [min(losses[: count + 1]) for count in range(len(losses))]
    assert watched.samples == evals[-1].samples
    # Both held-out conversations ask the same.
    assert [sample.question for sample in watched.samples] == ["What colour is the egg?"]
    assert plain.samples == ()


def test_the_log_is_complete_after_ctrl_c_and_the_next_run_begins_it_afresh(recipe: Recipe) -> None:
    seen: list[Record] = []

    def interrupt(record: Record) -> None:
        seen.append(record)
        if isinstance(record, StepReport) and record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(change(recipe, sample_answers=0), report=interrupt)
    folder = RunFolder(Path(recipe.output)).path
    assert not Path(recipe.output).exists()
    assert records_in(folder) == seen
    assert [event.step for event in read_events(folder).Scalars("train/loss")] == [1, 2, 3]
    (folder / "notes.txt").write_text("mine")
    result = train(change(recipe, max_steps=1, sample_answers=0))
    assert records_in(Path(recipe.output) / "logs")[2:-1] == result.log
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]


def test_a_record_is_on_disk_before_anybody_hears_of_it(recipe: Recipe) -> None:
    folder = RunFolder(Path(recipe.output)).path
    counts: list[int] = []
    train(change(recipe, max_steps=2, sample_answers=0), report=lambda _: counts.append(len(records_in(folder))))
    assert counts == [1, 2, 3, 4, 5]


def test_report_to_none_writes_the_log_alone(recipe: Recipe) -> None:
    train(change(recipe, max_steps=1, sample_answers=0, report_to="none"))
    assert [entry.name for entry in (Path(recipe.output) / "logs").iterdir()] == ["train_log.jsonl"]


def test_without_tensorboard_the_run_warns_once_and_goes_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match=r"chaccu\[train\]") as caught:
        train(change(recipe, max_steps=2, sample_answers=0))
    assert len([one for one in caught if "tensorboard" in str(one.message)]) == 1
    assert [entry.name for entry in (Path(recipe.output) / "logs").iterdir()] == ["train_log.jsonl"]


class FakeTracker(types.ModuleType):
    """A package with wandb's calls; it notes them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> None:
        print("a welcome")
        self.calls.append(("init", options))

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.calls.append(("log", (values, step)))

    def finish(self, **options: Any) -> None:
        self.calls.append(("finish", options))

    def Table(self, *, columns: list[str], data: list[list[Any]]) -> Any:
        return {"columns": columns, "data": data}

    def Markdown(self, text: str) -> Any:
        return {"markdown": text}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeTracker]:
    def install(name: str) -> FakeTracker:
        module = FakeTracker(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_recipe_the_numbers_and_the_samples(
    recipe: Recipe, fake: Callable[[str], FakeTracker], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    module = fake(name)
    recipe = change(recipe, report_to=name, output="runs/mine")
    with open_reporter(recipe, RunFolder(Path(recipe.data[0].path).parent / "out")) as reporter:
        for record in (START, STEP, EVAL):
            reporter.record(record)
    (begun, options), (_, (step, number)), (_, (evaluated, _)), (ended, end) = module.calls
    assert (begun, options["name"], options["config"]) == ("init", "mine", msgspec.to_builtins(recipe))
    assert (step, number) == (name_values(STEP), 1)
    assert evaluated["eval/loss"] == 2.0
    if name == "wandb":
        assert evaluated["samples"]["data"] == [["Sky?", "Blue.", True]]
        assert (ended, end) == ("finish", {"exit_code": 0})
    else:
        assert "Blue." in evaluated["samples"]["markdown"]
        assert (ended, end) == ("finish", {})
    # stdout is for the command's result.
    assert capsys.readouterr().out == ""


def test_wandb_hears_that_a_run_failed(recipe: Recipe, fake: Callable[[str], FakeTracker], tmp_path: Path) -> None:
    module = fake("wandb")
    with pytest.raises(KeyboardInterrupt), open_reporter(change(recipe, report_to="wandb"), RunFolder(tmp_path / "out")):
        raise KeyboardInterrupt
    assert module.calls[-1] == ("finish", {"exit_code": 1})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_stops_the_run_before_it_begins(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"chaccu\[{name}\]"):
        train(change(recipe, report_to=name))
    assert not RunFolder(Path(recipe.output)).path.exists()
