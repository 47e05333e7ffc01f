"""The training table's runner with commands in place of a GPU's, its file, and the table."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ABOUT = {"date": "2026-01-31", "commit": "abc1234", "device": "NVIDIA H100 80GB HBM3"}
FIGURES = {
    "layers_recomputed": 2,
    "useful_tokens_per_s": 14_100,
    "mfu": 0.5812,
    "peak_gb": 80.9,
    "attention": "FlashAttention 4",
}


def command_that_prints(*lines: str, exit_code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({chr(10).join(lines)!r}); sys.exit({exit_code})"]


def measure(bench: ModuleType, name: str = "7b", **figures: Any) -> dict[str, Any]:
    command = command_that_prints("first step: loss 11.0", json.dumps({**FIGURES, **figures}))
    return dict(bench.measure(name, command, ABOUT, limit_s=30))


def test_a_run_is_held_beside_its_bar(bench: ModuleType) -> None:
    entry = measure(bench, mfu=0.5799)
    assert (entry["shape"], entry["tokens"], entry["commit"]) == ("7b", 12288, "abc1234")
    assert entry["bar"] == {"tokens_per_s": 14_000, "mfu": 0.58}
    assert entry["met"] == {"tokens_per_s": True, "mfu": False}
    assert measure(bench, "13b")["met"] == {"tokens_per_s": True, "mfu": True, "peak_gb": False}


def test_on_another_gpu_no_bar_is_met_or_missed(bench: ModuleType) -> None:
    command = command_that_prints(json.dumps(FIGURES))
    assert bench.measure("7b", command, {**ABOUT, "device": "NVIDIA A100-SXM4-80GB"}, limit_s=30)["met"] == {}


def test_what_gives_no_figures_is_noted_with_its_last_lines(bench: ModuleType) -> None:
    failing = command_that_prints("step 1", "torch.OutOfMemoryError in /somewhere/else/model.py", exit_code=1)
    entry = bench.measure("1b", failing, ABOUT, limit_s=30)
    assert entry["failed"] == "ended with exit code 1"
    assert entry["last_lines"] == ["step 1", "torch.OutOfMemoryError in model.py"]
    assert "useful_tokens_per_s" not in entry
    late = bench.measure("1b", [sys.executable, "-c", "import time; time.sleep(60)"], ABOUT, limit_s=0.5)
    assert late["failed"].startswith("did not end within")
    assert bench.measure("1b", command_that_prints("{}"), ABOUT, limit_s=30)["failed"] == "no result in its output"
    assert bench.measure("1b", ["no-such-command-of-any-name"], ABOUT, limit_s=30)["failed"] == "did not start"


def test_the_file_is_whole_after_each_and_keeps_what_was_there(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "train.json"
    found = bench.read_results(path)
    failed = bench.measure("7b", command_that_prints(exit_code=1), ABOUT, limit_s=30)
    older = {**measure(bench), "commit": "old0000"}
    assert not bench.keep(failed, found["runs"], path, found)
    assert bench.keep(older, found["runs"], path, found)
    assert bench.keep(measure(bench), found["runs"], path, found)
    assert bench.keep(measure(bench, useful_tokens_per_s=14_200), found["runs"], path, found)
    # A failure at the same commit does not take the place of figures.
    assert not bench.keep(failed, found["runs"], path, found)
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert [(entry["commit"], entry.get("useful_tokens_per_s")) for entry in kept] == [
        ("old0000", 14_100),
        ("abc1234", 14_200),
        ("abc1234", None),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["train.json"]


def test_a_rival_stands_beside_ours_of_its_shape(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("print('RESULT theirs shape=7b: 2,820 useful tok/s, MFU 0.116, peak 70.0 GiB')")
    rival = bench.measure_rival(f"{sys.executable} theirs.py --shape 7b", ABOUT, limit_s=30, folder=tmp_path)
    assert rival["command"] == f"{Path(sys.executable).name} theirs.py --shape 7b"
    assert (rival["useful_tokens_per_s"], rival["mfu"], rival["peak_gb"]) == (2820, 0.116, 75.2)
    fp8 = measure(bench, "7b-fp8", useful_tokens_per_s=16_900)
    lines = bench.format_table({"runs": [measure(bench, "1b"), measure(bench), fp8], "rivals": [rival]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["shape", "---", "1b", "7b", "7b", "7b"]
    assert cells[3][:10] == [
        "7b", "full", "bf16", "12,288", "2", "14,100", "0.581", "80.9", "≥ 14,000, MFU ≥ 0.58", "yes",
    ]  # fmt: skip
    assert cells[2][9] == "no: tokens/s"
    assert cells[5][1] == "theirs shape=7b"
    assert cells[5][5:10] == ["2,820", "0.116", "75.2", "", "ours: 5.00 ×"]


def test_a_rival_without_a_result_is_noted(bench: ModuleType) -> None:
    rival = bench.measure_rival(f"{sys.executable} -c 'print(1)'", ABOUT, limit_s=30, folder=None)
    assert (rival["failed"], rival["last_lines"], rival["shape"]) == ("no result in its output", ["1"], None)
    assert "no result in its output" in bench.format_table({"runs": [], "rivals": [rival]})


def test_a_failure_is_in_the_table_until_there_are_figures(bench: ModuleType) -> None:
    failed = bench.measure("7b", command_that_prints(exit_code=1), ABOUT, limit_s=30)
    good = measure(bench)
    assert "exit code 1" in bench.format_table({"runs": [good, failed], "rivals": []})
    assert "exit code 1" not in bench.format_table({"runs": [failed, good], "rivals": []})


def test_the_command_runs_what_is_asked_for_and_fails_when_one_does(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs.py").write_text("print('RESULT theirs: 100 useful tok/s, MFU 0.1, peak 1 GB')")
    fake = tmp_path / "bench.py"
    fake.write_text(
        f"import sys\nif '--in-backward' in sys.argv:\n    sys.exit('out of memory')\nprint({json.dumps(FIGURES)!r})"
    )
    monkeypatch.setattr(bench, "BENCH", fake)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.setattr(bench, "ask_device", lambda limit_s: ABOUT["device"])
    out = tmp_path / "out.json"

    def run(*words: str) -> object:
        rival = f"{sys.executable} theirs.py --shape 13b"
        options = ["--data", "rows.npz", "--out", str(out), "--commit", "abc1234", "--rival-folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["bench_training_table.py", *options, "--rival", rival, *words])
        with pytest.raises(SystemExit) as ended:
            bench.main()
        return ended.value.code

    assert not run("--only", "13b-qlora")
    assert run("--only", "1b")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [(one["configuration"], one.get("failed")) for one in found["runs"]] == [
        ("13b-qlora", None),
        ("1b", "ended with exit code 1"),
    ]
    assert found["runs"][1]["last_lines"] == ["out of memory"]
    assert found["runs"][0]["versions"].keys() == set(bench.PACKAGES)
    assert [one["useful_tokens_per_s"] for one in found["rivals"]] == [100]
    assert "| theirs |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "train-h100.json"),
        ("NVIDIA A100-SXM4-80GB", "train-a100.json"),
        ("NVIDIA GeForce RTX 4090", "train-nvidia-geforce-rtx-4090.json"),
    ],
)
def test_the_file_is_named_after_the_gpu(bench: ModuleType, device: str, name: str) -> None:
    assert bench.results_file("train", device).name == name


def test_each_configuration_is_a_recipe_that_bench_train_takes(bench: ModuleType) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    import bench_train

    for configuration in bench.CONFIGURATIONS.values():
        options = bench_train.build_parser().parse_args(["--data", "rows.npz", *configuration.arguments()])
        recipe = bench_train.build_recipe(options)
        assert (recipe.row_len, recipe.method, recipe.precision) == (
            configuration.tokens,
            configuration.method,
            configuration.precision,
        )
        assert recipe.optimizer_in_backward == (configuration.method == "full")
        assert recipe.activation_checkpointing == configuration.checkpoint


def test_the_figures_of_the_training_page_are_those_of_the_results() -> None:
    runs = json.loads((ROOT / "benchmarks/results/train-h100.json").read_text(encoding="utf-8"))["runs"]
    measured = {(one["shape"], f"{one['tokens']:,}", f"{one['useful_tokens_per_s']:,}", one["peak_gb"]) for one in runs}
    rows = re.findall(r"^\| (1\.1|7|13) B \|.*$", page := (ROOT / "docs/train.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = re.findall(
        r"^\| (1|7|13)(?:\.1)? B \|(?: \w+, \w+ \|)? ([\d,]+) \|[^|]*\| ([\d,]+) \| [\d.]+ \| ([\d.]+) GB", page, re.MULTILINE
    )
    assert len(shown) == len(rows) > 10
    assert [row for row in shown if (f"{row[0]}b", row[1], row[2], float(row[3])) not in measured] == []


def test_results_name_no_folders(limited: ModuleType) -> None:
    text = (ROOT / "benchmarks/results/train-h100.json").read_text(encoding="utf-8")
    assert limited.hide_folders(text) == text
