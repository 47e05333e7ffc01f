"""Whole runs on a tiny LLaMA: what they learn, what they leave behind, and what stops them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import manifest_sha256, read_manifest, verify_files
from chaccu.conversation import Encoded, TextTokenizer, load_format
from chaccu.errors import ArtifactError, RecipeError, TrainError
from chaccu.train.encode import encode_sources
from chaccu.train.pack import PackedRow, pack_rows
from chaccu.train.recipe import Recipe
from chaccu.train.report import Record, StartReport, StepReport

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.loop import evaluate, run_steps  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel  # noqa: E402
from chaccu.train.run import train  # noqa: E402

ROW = PackedRow([7, 8, 9], [0, 1, 1], [3])


def change(recipe: Recipe, **fields: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **fields)


def left_behind(recipe: Recipe) -> list[str]:
    """Names beside the output that a stopped run should not have made: all but its log."""
    return [entry.name for entry in Path(recipe.output).parent.iterdir() if entry.suffix not in (".jsonl", ".run")]


def test_training_learns_and_the_folder_says_how(recipe: Recipe, llama: Path) -> None:
    told: list[Record] = []
    result = train(recipe, report=told.append)
    seen = [record for record in told if isinstance(record, StepReport)]
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_after < result.loss_before - 0.5
    assert seen == result.log
    assert [step.step for step in seen] == list(range(1, result.steps + 1))
    assert seen[-1].left_s == pytest.approx(0)
    assert all(step.mfu is None and step.memory_bytes > 100e6 and step.tokens_per_s > 0 for step in seen)
    assert 0.5 < result.fill <= 1
    start = told[0]
    assert isinstance(start, StartReport)
    assert (start.device, start.precision, start.weights_precision, start.processes) == ("CPU", "fp32", "fp32", 1)
    assert (start.conversations, start.left_out) == (22, {})
    assert start.attention == "scaled dot product, one conversation after another"
    # Three epochs, each of all rows.
    assert (result.tokens, result.steps) == (3 * start.tokens, 3 * start.rows)
    output = Path(recipe.output)
    manifest = read_manifest(output, kind="adapter")
    assert manifest.chat_format == "chatml"
    assert manifest.parents == {"base": manifest_sha256(llama)}
    assert manifest.tokenizer_sha256 == read_manifest(llama).tokenizer_sha256
    assert manifest.inputs.keys() == {recipe.data[0].path, recipe.validation[0].path}
    assert msgspec.convert(manifest.settings, Recipe) == recipe
    assert manifest.facts["loss_after"] == result.loss_after
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "logs/train_log.jsonl",
    } <= manifest.files.keys()
    verify_files(output, manifest.files)


def test_the_saved_adapter_is_the_trained_one(recipe: Recipe, llama: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    result = train(recipe)
    base = transformers.AutoModelForCausalLM.from_pretrained(str(llama))
    saved = peft.PeftModel.from_pretrained(base, recipe.output)
    model = TrainableModel(recipe, torch.device("cpu"))
    peft.set_peft_model_state_dict(model.full, peft.get_peft_model_state_dict(saved))
    encoded = encode_sources(recipe.validation, load_format("chatml"), TextTokenizer.load(llama), sequence_len=256, seed=0)
    assert evaluate(model, pack_rows(encoded, 256, seed=0)) == pytest.approx(result.loss_after, rel=1e-5)


def test_full_training_writes_a_model(recipe: Recipe) -> None:
    result = train(change(recipe, method="full", max_steps=2, learning_rate=1e-3))
    assert result.steps == 2
    manifest = read_manifest(Path(recipe.output), kind="model")
    assert {"model.safetensors", "config.json"} <= manifest.files.keys()


def test_the_same_run_twice_gives_the_same_losses(recipe: Recipe, tmp_path: Path) -> None:
    first, second = (train(change(recipe, max_steps=3, output=str(tmp_path / name))) for name in ("a", "b"))
    assert [step.loss for step in first.log] == [step.loss for step in second.log]


def test_a_finished_run_is_reused_and_another_recipe_is_refused_by_name(recipe: Recipe) -> None:
    recipe = change(recipe, max_steps=2)
    first = train(recipe)
    before = manifest_sha256(Path(recipe.output))
    again = train(recipe)
    assert again == msgspec.structs.replace(first, reused=True)
    with pytest.raises(ArtifactError, match="another run"):
        train(change(recipe, learning_rate=2e-2))
    with Path(recipe.data[0].path).open("ab") as data:
        data.write(b"\n")
    with pytest.raises(ArtifactError, match=r"train\.jsonl has changed"):
        train(recipe)
    assert manifest_sha256(Path(recipe.output)) == before
    assert not train(recipe, fresh=True).reused
    assert manifest_sha256(Path(recipe.output)) != before


def test_a_loss_that_is_not_finite_stops_the_run_without_a_folder(recipe: Recipe) -> None:
    with pytest.raises(TrainError, match="step 2: loss nan"):
        train(change(recipe, method="full", learning_rate=1e30, warmup_ratio=0.0))
    assert left_behind(recipe) == []


def test_ctrl_c_leaves_no_folder(recipe: Recipe) -> None:
    def interrupt(record: Record) -> None:
        if isinstance(record, StepReport):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, report=interrupt)
    assert left_behind(recipe) == []


def test_without_validation_there_are_no_held_out_losses(recipe: Recipe) -> None:
    result = train(change(recipe, validation=[], max_steps=1))
    assert (result.loss_before, result.loss_after) == (None, None)


def test_a_model_without_a_named_format_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="format"):
        train(change(recipe, model=str(tmp_path)))


def test_max_minutes_ends_the_run_at_the_end_of_its_schedule(recipe: Recipe) -> None:
    # A step takes two seconds of this clock: it is read when the step begins and when it ends.
    log, _ = trajectory(change(recipe, num_train_epochs=100_000, max_minutes=1.0), clock=itertools.count().__next__)
    assert len(log) == 30
    assert log[-1].learning_rate < 0.01 * log[0].learning_rate
    assert log[-1].left_s == pytest.approx(0)
    assert log[9].left_s == pytest.approx(40)


def test_how_a_step_is_split_into_rows_does_not_change_training(recipe: Recipe) -> None:
    conversations = [
        Encoded([(7 * index + step) % 200 for step in range(length)], [0] * (length // 2) + [1] * (length - length // 2), ())
        for index, length in enumerate((40, 12, 25, 9, 33, 18, 21, 14))
    ]
    steps = [conversations[:4], conversations[4:]]
    joined = [row for group in steps for row in pack_rows(group, 256, seed=0)]
    split = [row for group in steps for one in group for row in pack_rows([one], len(one.ids), seed=0)]
    assert (len(joined), len(split)) == (2, 8)
    one_row, one_weights = trajectory(recipe, joined, accumulation=1)
    four_rows, four_weights = trajectory(recipe, split, accumulation=4)
    assert len(one_row) == 6
    assert [step.loss for step in four_rows] == pytest.approx([step.loss for step in one_row], rel=1e-4)
    assert [step.grad_norm for step in four_rows] == pytest.approx([step.grad_norm for step in one_row], rel=1e-3)
    assert [step.learning_rate for step in four_rows] == [step.learning_rate for step in one_row]
    torch.testing.assert_close(four_weights, one_weights, rtol=1e-3, atol=1e-4)


def test_a_run_of_a_model_that_was_trained_before_is_updated_by_its_own_optimizer_alone(recipe: Recipe) -> None:
    recipe = change(recipe, method="full", optimizer="adafactor", optimizer_in_backward=True, num_train_epochs=1)
    model = TrainableModel(recipe, torch.device("cpu"))
    run_steps(model, [ROW], recipe)
    before = [parameter.detach().clone() for parameter in model.parameters]
    run_steps(model, [ROW], change(recipe, learning_rate=1e-12))
    for parameter, old in zip(model.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=1e-6)


def trajectory(
    recipe: Recipe, rows: Sequence[PackedRow] = (ROW,), *, accumulation: int = 1, clock: Callable[[], float] = time.monotonic
) -> tuple[list[StepReport], list[Any]]:
    recipe = change(recipe, method="full", learning_rate=1e-3, gradient_accumulation_steps=accumulation)
    model = TrainableModel(recipe, torch.device("cpu"))
    return run_steps(model, rows, recipe, clock=clock), [parameter.detach() for parameter in model.parameters]
