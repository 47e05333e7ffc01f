"""The demo with a released adapter: where it is found, what goes with it, and that nothing is cleaned or trained."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chaccu
from chaccu.artifact import Manifest, write_manifest
from chaccu.demo import released, run
from chaccu.demo.released import RELEASE, check_release, find_release
from chaccu.demo.report import Comparison
from chaccu.demo.run import DemoOptions, run_demo
from chaccu.demo.stages import Stage, StageResult
from chaccu.errors import ArtifactError, ChaccuError, WeightsError
from chaccu.weights.fetch import PACKAGED_MODELS

ROOT = Path(__file__).parents[3]
GEMMA = next(iter(PACKAGED_MODELS.values()))
FACTS: dict[str, Any] = {
    "base_weights": {"base.gguf": GEMMA.sha256},
    "base_name": GEMMA.origin,
    "loss_before": 2.5,
    "loss_after": 1.75,
    "steps": 690,
    "tokens": 22_000_000,
    "fill": 0.99,
    "seconds": 600.0,
    "evaluations": [{"step": 0, "loss": 2.5}, {"step": 150, "loss": 2.0}, {"step": 690, "loss": 1.75}],
    "data": [{"read": 17671, "kept": 16594}],
}


def make_release(folder: Path, **facts: Any) -> Path:
    """A released adapter in all but its weights, which nothing here merges."""
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    write_manifest(folder, Manifest(kind="adapter", name=folder.name, chat_format="gemma-3", facts={**FACTS, **facts}))
    return folder


def options(folder: Path, **changes: Any) -> DemoOptions:
    return DemoOptions(**{"folder": folder / "demo", "released": folder / RELEASE, "stay": False, **changes})


def test_it_is_found_here_or_in_the_checkout_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = make_release(tmp_path / "checkout" / "releases" / RELEASE)
    monkeypatch.setattr(chaccu, "__file__", str(tmp_path / "checkout" / "src" / "chaccu" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert find_release() == checkout
    make_release(tmp_path / "releases" / RELEASE)
    assert find_release() == Path("releases") / RELEASE
    assert find_release(checkout) == checkout


def test_an_installed_package_says_that_it_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released.chaccu, "__file__", str(tmp_path / "lib" / "site-packages" / "chaccu" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="an installed package has none") as caught:
        find_release()
    assert "--adapter" in caught.value.remedy
    with pytest.raises(WeightsError, match="no released adapter in "):
        find_release(tmp_path)


def test_a_damaged_release_or_one_of_another_base_is_refused(tmp_path: Path) -> None:
    good = make_release(tmp_path / "good")
    assert check_release(good).name == "good"
    other = make_release(tmp_path / "other", base_weights={"model.safetensors": "0" * 64}, base_name="some/base")
    with pytest.raises(WeightsError, match="an adapter of some/base that the demo does not have"):
        check_release(other)
    (good / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ArtifactError, match="is damaged"):
        check_release(good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Ada"}, "--name 'Ada' does not go with a released adapter"),
        ({"model": "some/model"}, "--model 'some/model' does not go with"),
        ({"chat_format": "chatml"}, "--format 'chatml' does not go with"),
        ({"released": Path("nowhere")}, "nowhere is no artifact"),
    ],
)
def test_what_is_for_a_model_that_is_trained_here_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_release(tmp_path / RELEASE)
    with pytest.raises(ChaccuError, match=message):
        run_demo(options(tmp_path, **changes), lambda text: None, lambda rows: None)
    assert not (tmp_path / "demo").exists()


def test_base_and_merge_are_all_that_runs_and_results_stand_beside_a_trained_demo_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_release(tmp_path / RELEASE)
    ran: list[Stage] = []
    served: list[list[str]] = []

    def run_stage(stage: Stage) -> StageResult:
        ran.append(stage)
        return StageResult(stage, "", 1.0)

    class Services:
        def start_with_url(self, name: str, arguments: list[str], url_option: str) -> str:
            return "http://127.0.0.1:1"

        def start(self, name: str, arguments: list[str]) -> None:
            served.append(arguments)

        def wait(self, what: str, condition: Any, timeout_s: float) -> None: ...

        def describe(self) -> str:
            return ""

    @contextlib.contextmanager
    def running_services() -> Iterator[Services]:
        yield Services()

    rows = [Comparison("Who?", "Who?", "I am Chaccu.", 0.5, 0.6)]
    monkeypatch.setattr(run, "run_stage", run_stage)
    monkeypatch.setattr(run, "running_services", running_services)
    monkeypatch.setattr(run, "_read_comparisons", lambda file: rows)
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "report.html").write_text("of a trained one", encoding="utf-8")
    said: list[str] = []
    run_demo(options(tmp_path), said.append, lambda shown: None)
    assert [stage.arguments[:2] for stage in ran] == [
        ("weights", "fetch"),
        ("weights", "convert"),
        ("weights", "merge"),
        ("weights", "wrap"),
        ("judge", "run"),
    ]
    merge = ran[2].arguments
    assert merge[merge.index("--adapter") + 1] == str(folder)
    assert merge[merge.index("--out") + 1] == str(demo / "released")
    assert [arguments[2] for arguments in served] == [str(demo / "base-gguf"), str(demo / "released")]
    assert (demo / "report.html").read_text(encoding="utf-8") == "of a trained one"
    assert not (demo / "recipe.yaml").exists()
    assert "nothing is trained" in said[0]
    page = (demo / "released-report.html").read_text(encoding="utf-8")
    for expected in ("Held-out loss", "2.500 → 1.750", "trained elsewhere", "<td>17671</td>", "the model card", "I am Chaccu."):
        assert expected in page
    assert 'points="0.0,0.0 320.0,106.7 640.0,160.0"' in page


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("given", "flag"), [("RELEASED=1", True), ("RELEASED=0", False), ("ARGS=--exit", False)])
def test_make_demo_has_the_flag(given: str, flag: bool) -> None:
    shown = subprocess.run(["make", "-n", "demo", given], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "chaccu demo" in line]
    assert ("--released" in line) is flag
