"""The demo's stages as commands, and what it refuses before it starts."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path

import msgspec
import pytest

from chaccu.demo.report import Comparison, read_run, write_report
from chaccu.demo.run import DemoOptions, run_demo
from chaccu.demo.stages import Stage, build_stages, run_stage, write_recipe
from chaccu.errors import ChaccuError, ChildFailedError
from chaccu.train.recipe import load_recipe


def test_stages_are_commands_to_type(tmp_path: Path) -> None:
    stages = build_stages(tmp_path, name="Ada L.", model=None)
    assert [stage.arguments[:2] for stage in stages][:4] == [
        ("weights", "fetch"),
        ("weights", "convert"),
        ("data", "identity"),
        ("data", "clean"),
    ]
    assert all(shlex.split(stage.command) == ["chaccu", *stage.arguments] for stage in stages)
    assert not list(tmp_path.iterdir())


def test_the_recipe_is_the_shipped_one_over_this_folder(tmp_path: Path) -> None:
    write_recipe(tmp_path, model=None, chat_format=None)
    shipped, ours = load_recipe(Path("quickstart-cpu")), load_recipe(tmp_path / "recipe.yaml")
    assert [source.path for source in ours.data] == [str(tmp_path / "identity.jsonl"), str(tmp_path / "data" / "train.jsonl")]
    assert (ours.model, ours.output) == (str(tmp_path / "base"), str(tmp_path / "adapter"))
    moved = msgspec.structs.replace(ours, **{key: getattr(shipped, key) for key in ("data", "validation", "model", "output")})
    assert moved == shipped


def test_a_base_of_ones_own_needs_no_gguf(tmp_path: Path) -> None:
    stages = build_stages(tmp_path, name="Ada", model="some/model")
    assert not any("gguf" in argument for stage in stages for argument in stage.arguments[:2])
    write_recipe(tmp_path, model="some/model", chat_format="chatml")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model, recipe.format) == ("some/model", "chatml")


def test_a_failing_stage_names_itself_and_its_command(capfd: pytest.CaptureFixture[str]) -> None:
    stage = Stage("nonsense", ("weights", "inspect", "/no/such/folder"))
    with pytest.raises(ChildFailedError, match="'nonsense' failed with exit code 1"):
        run_stage(stage)
    assert "/no/such/folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "./not-there"}, "there is no model at"),
        ({"model": "some/model"}, "no chat format is known"),
        ({"model": "some/model", "chat_format": "chatlm"}, "chatml"),
        ({"name": " "}, "the name is empty"),
    ],
)
def test_wrong_options_stop_before_anything_starts(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    folder = tmp_path / "demo"
    options = DemoOptions(**{"folder": folder, "name": "Ada", **changed})
    with pytest.raises(ChaccuError, match=message):
        run_demo(options, lambda text: None, lambda rows: None)
    assert not folder.exists()


def test_a_busy_port_is_told_first(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ChaccuError, match=f"port {port} is taken"):
            run_demo(DemoOptions(folder=tmp_path / "demo", name="Ada", port=port), lambda text: None, lambda rows: None)
    assert not (tmp_path / "demo").exists()


def test_no_space_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaccu.artifact._free_bytes", lambda folder: 5_000_000)
    with pytest.raises(ChaccuError, match=r"needs 2,000 MB .* and 5 MB are free"):
        run_demo(DemoOptions(folder=tmp_path / "demo", name="Ada"), lambda text: None, lambda rows: None)


def test_the_report_escapes_what_models_say(tmp_path: Path) -> None:
    from chaccu.artifact import Manifest, write_manifest

    training = {"loss_before": 2.5, "loss_after": 2.1, "steps": 2, "tokens": 1000, "fill": 0.99, "seconds": 3.0}
    step = {"step": 1, "steps": 2, "grad_norm": 1.0, "learning_rate": 0.1, "tokens_per_s": 9.0, "mfu": None, "memory_bytes": 1}
    lines = [json.dumps({"kind": "step", "loss": loss, "left_s": 0.0, **step}) for loss in (2.0, 1.0)]
    (tmp_path / "adapter" / "logs").mkdir(parents=True)
    (tmp_path / "adapter" / "logs" / "train_log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, facts in (("adapter", training), ("data", {"read": 5, "kept": 4})):
        (tmp_path / name).mkdir(exist_ok=True)
        write_manifest(tmp_path / name, Manifest(kind=name, name=name, facts=facts))
    rows = [Comparison("<q>?", "<script>alert(1)</script>", "fine", 0.5, 0.6)]
    write_report(tmp_path / "report.html", read_run(tmp_path), rows, ["chaccu train x"], [])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "2.500 → 2.100" in page
    assert 'points="0.0,0.0 640.0,160.0"' in page
    assert "chaccu train x" in page
