from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chaccu.cli.recipe import app
from chaccu.errors import RecipeError, StorageError
from chaccu.train.recipe import list_recipes, load_recipe

RUNNER = CliRunner()
COMMAND = "torchrun --nproc_per_node=2 train_mem.py --model_name_or_path m --data_path d.json --output_dir o --max_steps -1"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.sh"
    path.write_text(COMMAND)
    return path


def test_the_recipe_goes_to_stdout_and_the_report_to_stderr(script: Path, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["import", str(script)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr.startswith("Imported from FastChat / Hugging Face Trainer: train.sh\n")
    written = tmp_path / "written.yaml"
    written.write_text(result.stdout)
    assert load_recipe(written).model == "m"
    assert result.stdout.startswith("# Imported from")


def test_out_is_not_replaced_without_force(script: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipes" / "mine.yaml"
    result = RUNNER.invoke(app, ["import", str(script), "--out", str(out)], catch_exceptions=False)
    assert result.stdout == ""
    assert f"chaccu train {out}" in result.stderr
    assert load_recipe(out).output == "o"
    out.write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        RUNNER.invoke(app, ["import", str(script), "--out", str(out)], catch_exceptions=False)
    assert out.read_text() == "mine"
    RUNNER.invoke(app, ["import", str(script), "--out", str(out), "--force"], catch_exceptions=False)
    assert load_recipe(out).output == "o"


YAML = "model_name_or_path: m\ndata_path: d.json\noutput_dir: o\n"


@pytest.mark.parametrize("words", [[COMMAND], COMMAND.split(), COMMAND.split()[3:], [YAML]])
def test_the_command_itself_can_be_given(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    RUNNER.invoke(app, ["import", "--out", str(out), *words], catch_exceptions=False)
    assert load_recipe(out).data[0].path == "d.json"


def test_stdin_and_from(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["import", "-", "--from", "fastchat"], input=YAML, catch_exceptions=False)
    assert "data_path -> data" in result.stderr
    with pytest.raises(RecipeError, match="has no base_model"):
        RUNNER.invoke(app, ["import", "-", "--from", "axolotl"], input=YAML, catch_exceptions=False)


def test_two_files_are_wrong_use(script: Path) -> None:
    assert RUNNER.invoke(app, ["import", str(script), str(script)]).exit_code == 2
    with pytest.raises(RecipeError, match="there is no file"):
        RUNNER.invoke(app, ["import", "absent.yaml"], catch_exceptions=False)
    with pytest.raises(StorageError, match="name too long"):
        RUNNER.invoke(app, ["import", "a" * 300], catch_exceptions=False)


def test_the_list_names_every_shipped_recipe_and_what_it_is_for() -> None:
    lines = CliRunner().invoke(app, ["list"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    assert all(len(line.split()) > 5 for line in lines)
    described = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert described["vicuna-7b"].startswith("Vicuna 7B on one GPU")
