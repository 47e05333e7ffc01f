"""Snapshots in the middle of a run: whole artifacts, the last few of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import read_manifest, verify_files
from chaccu.conversation import TextTokenizer, load_format
from chaccu.errors import RecipeError
from chaccu.train.encode import encode_sources
from chaccu.train.pack import pack_rows
from chaccu.train.recipe import Recipe, parse_recipe

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.loop import evaluate  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel  # noqa: E402
from chaccu.train.report import Record, StepReport  # noqa: E402
from chaccu.train.run import train  # noqa: E402
from chaccu.train.snapshots import Snapshots  # noqa: E402


def change(recipe: Recipe, **fields: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **{"sample_answers": 0, **fields})


def kept(recipe: Recipe) -> list[Path]:
    return sorted(Path(f"{recipe.output}.snapshots").iterdir())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_snapshot_is_whole_and_gives_the_held_out_loss_that_it_states(recipe: Recipe, llama: Path, method: str) -> None:
    recipe = change(recipe, method=method, learning_rate=5e-3, max_steps=7, save_steps=2, eval_steps=2)
    train(recipe)
    assert [path.name for path in kept(recipe)] == ["step-000004", "step-000006"]
    snapshot = kept(recipe)[0]
    manifest = read_manifest(snapshot, kind="model" if method == "full" else "adapter")
    verify_files(snapshot, manifest.files)
    result = read_manifest(Path(recipe.output))
    assert manifest.files.keys() == {name for name in result.files if not name.startswith("logs/")}
    assert (manifest.name, manifest.chat_format, manifest.settings) == ("out-step-000004", "chatml", result.settings)
    assert (manifest.facts["step"], manifest.facts["steps"]) == (4, 7)
    if method == "full":
        model = TrainableModel(change(recipe, model=str(snapshot)), torch.device("cpu"))
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = TrainableModel(recipe, torch.device("cpu"))
        base = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(str(llama))
        saved = peft.PeftModel.from_pretrained(base, str(snapshot))
        peft.set_peft_model_state_dict(model.full, peft.get_peft_model_state_dict(saved))
    encoded = encode_sources(recipe.validation, load_format("chatml"), TextTokenizer.load(llama), sequence_len=256, seed=0)
    stated = manifest.facts["held_out_loss"]
    assert evaluate(model, pack_rows(encoded, 256, seed=0)) == pytest.approx(stated, rel=1e-5)
    assert stated != pytest.approx(result.facts["loss_after"], rel=1e-3)


def test_a_snapshot_states_no_held_out_loss_that_was_not_measured(recipe: Recipe) -> None:
    recipe = change(recipe, max_steps=1, save_steps=1)
    train(recipe)
    assert read_manifest(kept(recipe)[0]).facts["held_out_loss"] is None


def test_snapshots_do_not_change_training(recipe: Recipe, tmp_path: Path) -> None:
    plain = train(change(recipe, max_steps=4, output=str(tmp_path / "plain")))
    saved = train(change(recipe, max_steps=4, save_steps=1, save_total_limit=1))
    assert [step.loss for step in saved.log] == [step.loss for step in plain.log]
    assert [path.name for path in kept(change(recipe))] == ["step-000004"]


def test_a_stopped_run_leaves_its_snapshots_and_no_output(recipe: Recipe) -> None:
    def interrupt(record: Record) -> None:
        if isinstance(record, StepReport) and record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(change(recipe, save_steps=1), report=interrupt)
    assert not Path(recipe.output).exists()
    assert [path.name for path in kept(recipe)] == ["step-000001", "step-000002"]
    for path in kept(recipe):
        verify_files(path, read_manifest(path).files)


def test_those_of_an_earlier_run_go_first_and_only_as_new_ones_come(tmp_path: Path) -> None:
    folder = tmp_path / "out.snapshots"
    for name in ("step-000300", "step-000400", "notes", "step-000100.txt"):
        (folder / name).mkdir(parents=True)

    def save(path: Path, facts: dict[str, Any]) -> None:
        path.mkdir()

    snapshots = Snapshots(tmp_path / "out", limit=2, save=save)
    names = []
    for step in (100, 200, 1_000_000):
        snapshots.write(step, {})
        names.append(sorted(entry.name for entry in folder.iterdir() if entry.name not in ("notes", "step-000100.txt")))
    assert names == [["step-000100", "step-000400"], ["step-000100", "step-000200"], ["step-000200", "step-1000000"]]
    assert (folder / "notes").exists()
    assert (folder / "step-000100.txt").exists()


def test_evaluations_need_validation_data() -> None:
    with pytest.raises(RecipeError, match="eval_steps is 5"):
        parse_recipe({"model": "m", "output": "o", "data": [{"path": "p"}], "eval_steps": 5})
