"""Steps that are not finite: what is skipped, what the loss scale does, and what is left when the run stops."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import RecipeError, TrainError
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import DataSource, Recipe, parse_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.loop import StepReport, run_steps  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel, choose_precision, weights_dtype  # noqa: E402
from chaccu.train.run import train  # noqa: E402
from chaccu.train.step_guard import LossScale, StepGuard  # noqa: E402

CPU = torch.device("cpu")
ROWS = [PackedRow([7 + at, 8, 9, 11, 12 + at, 13], [0, 1, 1, 0, 1, 1], [3, 3]) for at in range(8)]
INF, NAN = float("inf"), float("nan")


def change(recipe: Recipe, **fields: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **fields)


def build_guard(tmp_path: Path, dtype: Any = torch.float32, **fields: Any) -> StepGuard:
    recipe = Recipe(model="m", data=[DataSource(path="p")], output=str(tmp_path / "out"), **fields)
    return StepGuard(recipe, dtype, decode=lambda ids: " ".join(map(str, ids)))


class Faulty(TrainableModel):
    """Multiplies the losses of chosen rows, counted from 0, by a factor that is not finite."""

    def __init__(self, recipe: Recipe, factors: dict[int, float]) -> None:
        self._factors: dict[int, float] = {}
        super().__init__(recipe, CPU)
        self._factors, self._seen = factors, -1

    def row_loss(self, row: Any) -> Any:
        loss = super().row_loss(row)
        if not self._factors:
            return loss
        self._seen += 1
        return loss * self._factors.get(self._seen, 1.0)


def run_faulty(
    recipe: Recipe, factors: dict[int, float], rows: list[PackedRow] = ROWS
) -> tuple[list[StepReport], list[list[float]]]:
    """Reports, and the first numbers of the last weight after each step."""
    model = Faulty(recipe, factors)
    weights = [model.parameters[-1].flatten()[:4].tolist()]
    log = run_steps(model, rows, recipe, lambda _: weights.append(model.parameters[-1].flatten()[:4].tolist()))
    return log, weights


@pytest.fixture
def full(recipe: Recipe) -> Recipe:
    return change(recipe, method="full", num_train_epochs=1, learning_rate=1e-3, warmup_ratio=0.0)


@pytest.mark.parametrize(
    ("optimizer", "in_backward"),
    [("adamw", False), *((name, when) for name in ("adamw_8bit", "adamw_bf16_sr", "adafactor") for when in (False, True))],
)
@pytest.mark.parametrize("factor", [NAN, INF])
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(
    full: Recipe, optimizer: Any, in_backward: bool, factor: float
) -> None:
    precision = "bf16" if optimizer == "adamw_bf16_sr" else "fp32"
    recipe = change(full, optimizer=optimizer, optimizer_in_backward=in_backward, precision=precision, learning_rate=1e-2)
    log, weights = run_faulty(recipe, {1: factor, 2: factor, 5: factor})
    assert [step.skipped for step in log] == [False, True, True, False, False, True, False, False]
    assert [step.loss is None for step in log] == [step.skipped for step in log]
    assert [before == after for before, after in pairwise(weights)] == [step.skipped for step in log]
    assert all(abs(number) < 10 for number in weights[-1])


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bf16_sr", "adafactor"])
@pytest.mark.parametrize("bad_row", [2, 3])
def test_with_accumulation_one_row_that_is_not_finite_costs_its_step_alone(full: Recipe, optimizer: Any, bad_row: int) -> None:
    recipe = change(full, optimizer=optimizer, optimizer_in_backward=True, gradient_accumulation_steps=2, learning_rate=1e-2)
    log, weights = run_faulty(change(recipe, precision="bf16"), {bad_row: NAN})
    assert [step.skipped for step in log] == [False, True, False, False]
    assert [before == after for before, after in pairwise(weights)] == [step.skipped for step in log]


def test_so_many_in_a_row_stop_the_run_and_their_rows_are_kept_to_look_at(full: Recipe) -> None:
    with pytest.raises(TrainError) as caught:
        run_faulty(change(full, max_skipped_steps=2), {1: NAN, 3: NAN, 4: NAN})
    message = str(caught.value)
    for part in ("step 4: loss nan, gradient norm nan, in fp32", "2 steps in a row up to step 5", "max_skipped_steps: 2"):
        assert part in message
    file = Path(f"{full.output}.failed-batch.jsonl")
    assert str(file) in message
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["ids"]) for line in lines] == [
        (4, [10, 8, 9]),
        (4, [11, 15, 13]),
        (5, [11, 8, 9]),
        (5, [11, 16, 13]),
    ]
    assert lines[0]["mask"] == [0, 1, 1]
    assert lines[0]["length"] == 3


def test_the_kept_rows_of_a_whole_run_have_their_text_and_there_is_no_output(recipe: Recipe) -> None:
    with pytest.raises(TrainError, match="step 2: loss nan"):
        train(change(recipe, method="full", learning_rate=1e30, warmup_ratio=0.0))
    lines = [json.loads(line) for line in Path(f"{recipe.output}.failed-batch.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2, 3, 4}
    assert all("<|im_start|>user\nWhat colour is the" in line["text"] for line in lines)
    assert not Path(recipe.output).exists()


def test_a_whole_run_counts_what_it_skipped_and_is_reused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    row_loss, calls = TrainableModel.row_loss, iter(range(10_000))

    def fail_once(model: TrainableModel, row: Any) -> Any:
        factor = NAN if torch.is_grad_enabled() and next(calls) == 1 else 1.0
        return row_loss(model, row) * factor

    monkeypatch.setattr(TrainableModel, "row_loss", fail_once)
    recipe = change(recipe, max_steps=4)
    result = train(recipe)
    assert result.skipped_steps == 1
    assert [step.skipped for step in result.log] == [False, True, False, False]
    assert train(recipe) == msgspec.structs.replace(result, reused=True)


def test_the_loss_scale_goes_the_way_of_torchs_own() -> None:
    pattern = [True] * 7 + [False, True, False] + [True] * 4 + [False] * 3 + [True] * 9
    ours, theirs = LossScale(8.0, grow_after=3), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in pattern:
        weight.grad = torch.full((2,), 1.0 if finite else INF)
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.value == theirs.get_scale()


def test_steps_that_the_search_for_a_scale_costs_do_not_stop_the_run(tmp_path: Path) -> None:
    guard = build_guard(tmp_path, torch.float16)
    assert guard.loss_scale is not None
    for number in range(1, 17):
        assert not guard.admits(number, 2.0, INF, ROWS[:1], 1e-3)
    assert guard.loss_scale.value == 1.0
    assert guard.admits(17, 2.0, 1.0, ROWS[:1], 1e-3)
    for number in (18, 19):
        assert not guard.admits(number, 2.0, INF, ROWS[:1], 1e-3)
    with pytest.raises(TrainError, match=r"step 18: loss 2.0, gradient norm inf, in fp16(.|\n)*bf16"):
        guard.admits(20, 2.0, INF, ROWS[:1], 1e-3)


def test_a_loss_that_is_not_finite_counts_while_a_scale_is_searched_too(tmp_path: Path) -> None:
    guard = build_guard(tmp_path, torch.float16, max_skipped_steps=2)
    assert not guard.admits(1, NAN, NAN, ROWS[:1], 1e-3)
    assert not guard.admits(2, 2.0, INF, ROWS[:1], 1e-3)
    with pytest.raises(TrainError, match="step 1: loss nan"):
        guard.admits(3, NAN, NAN, ROWS[:1], 1e-3)


def test_other_precisions_have_no_loss_scale(tmp_path: Path) -> None:
    guard, loss = build_guard(tmp_path, torch.bfloat16), torch.ones(())
    assert guard.loss_scale is None
    assert guard.scale_loss(loss) is loss


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fp16_learns_as_fp32_does(recipe: Recipe, method: Any) -> None:
    recipe = change(recipe, method=method, learning_rate=3e-3)
    exact, half = (
        train(change(recipe, precision=precision, output=f"{recipe.output}-{precision}")) for precision in ("fp32", "fp16")
    )
    assert half.loss_after is not None
    assert half.loss_after == pytest.approx(exact.loss_after, rel=0.02)
    assert half.log[0].loss == pytest.approx(exact.log[0].loss, rel=1e-3)
    # The scale that it begins with may be too large for a step or two.
    assert half.skipped_steps <= 4


def test_fp16_keeps_the_weights_that_are_trained_in_float32(full: Recipe) -> None:
    half = change(full, precision="fp16")
    assert weights_dtype(half, CPU) == torch.float32
    model = TrainableModel(half, CPU)
    assert {parameter.dtype for parameter in model.parameters} == {torch.float32}
    assert model.dtype == torch.float16
    adapter = TrainableModel(change(half, method="lora"), CPU)
    assert {parameter.dtype for parameter in adapter.parameters} == {torch.float32}
    assert adapter.full.get_decoder().embed_tokens.weight.dtype == torch.float16


@pytest.mark.parametrize("fields", [{"optimizer": "adamw_8bit"}, {"optimizer": "adamw_8bit", "optimizer_in_backward": True}])
def test_fp16_is_refused_where_no_float32_weights_are(fields: dict[str, Any]) -> None:
    told = {"model": "m", "output": "o", "data": [{"path": "p"}], "method": "full"}
    with pytest.raises(RecipeError, match=r"fp16(.|\n)*no float32 weights(.|\n)*optimizer: adamw"):
        parse_recipe({**told, "precision": "fp16", **fields})
    assert parse_recipe({**told, **fields}).precision == "auto"


@pytest.mark.parametrize(
    ("native", "fields", "dtype"),
    [
        (True, {}, torch.bfloat16),
        (False, {}, torch.float16),
        (False, {"method": "full"}, torch.float16),
        (False, {"method": "full", "optimizer": "adamw_8bit"}, torch.float32),
    ],
)
def test_auto_takes_fp16_on_a_gpu_without_native_bf16(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, native: bool, fields: Any, dtype: Any
) -> None:
    # Asked without more, PyTorch counts bf16 that a GPU only emulates.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_precision(change(recipe, precision="auto", **fields), torch.device("cuda")) == dtype


def test_a_base_without_a_finite_loss_is_refused_before_training(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from chaccu.train import model as model_module

    load = model_module.load_causal_lm

    def load_damaged(*args: Any, **kwargs: Any) -> Any:
        causal = load(*args, **kwargs)
        causal.get_output_embeddings().weight.data.fill_(INF)
        return causal

    monkeypatch.setattr(model_module, "load_causal_lm", load_damaged)
    with pytest.raises(TrainError, match=r"loses nan on sixteen tokens in float32(.|\n)*precision"):
        TrainableModel(recipe, CPU)
