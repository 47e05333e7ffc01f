"""What `chaccu weights inspect` tells of folders and files, and that it loads nothing for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from chaccu.artifact import MANIFEST_NAME, Manifest, manifest_sha256, read_manifest, write_manifest
from chaccu.cli.main import app
from chaccu.errors import ArtifactError, WeightsError
from chaccu.testing.tiny import build_adapter, build_llama

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from safetensors.torch import save_file  # noqa: E402 (torch may be absent)

from chaccu.weights.gguf_file import string_pair, write_gguf  # noqa: E402
from chaccu.weights.inspection import inspect_weights  # noqa: E402
from chaccu.weights.tensor_stats import measure_tensor  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("weights") / "llama")


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return build_adapter(llama.with_name("lora"), llama)


def run_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["weights", "inspect", *arguments, "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_an_artifact_is_told_with_its_manifest(llama: Path) -> None:
    import transformers

    found = run_json(str(llama), "--verify")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert found["parameters"] == sum(one.numel() for one in model.parameters())
    assert (found["kind"], found["name"], found["architecture"]) == ("base", "tiny-llama", "LlamaForCausalLM")
    assert (found["chat_format"], found["verified"], found["license"]) == ("chatml", True, None)
    assert found["dtypes"] == {
        "F32": {"tensors": len(model.state_dict()), "parameters": found["parameters"], "size_bytes": 4 * found["parameters"]}
    }
    assert found["manifest"] == json.loads((llama / MANIFEST_NAME).read_text())
    assert {one["name"]: one["sha256"] for one in found["files"]} == {
        name: entry.sha256 for name, entry in read_manifest(llama).files.items()
    }
    assert found["size_bytes"] == sum(one.stat().st_size for one in llama.iterdir() if one.name != MANIFEST_NAME)
    assert "tensors" not in found


def test_tensors_are_listed_and_measured(llama: Path) -> None:
    import transformers

    found = run_json(str(llama), "--tensors")
    state = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert {one["name"]: tuple(one["shape"]) for one in found["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    assert "stats" not in found["tensors"][0]
    measured = {one["name"]: one["stats"] for one in run_json(str(llama), "--stats")["tensors"]}
    for name, tensor in state.items():
        assert measured[name]["minimum"] == pytest.approx(float(tensor.min()))
        assert measured[name]["maximum"] == pytest.approx(float(tensor.max()))
        assert measured[name]["mean"] == pytest.approx(float(tensor.double().mean()))
        assert measured[name]["std"] == pytest.approx(float(tensor.double().std(unbiased=False)))
        assert measured[name]["non_finite"] == 0


def test_the_pieces_of_a_tensor_give_its_own_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaccu.weights.tensor_stats._PIECE", 7)
    tensor = torch.arange(100, dtype=torch.float32).reshape(10, 10) ** 2 + 1e6
    found = measure_tensor(tensor)
    assert found.std == pytest.approx(float(tensor.double().std(unbiased=False)), rel=1e-12)
    assert found.mean == pytest.approx(float(tensor.double().mean()), rel=1e-12)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    found = measure_tensor(torch.tensor([1.0, float("nan"), 3.0, float("inf"), -float("inf")], dtype=torch.bfloat16))
    assert (found.minimum, found.maximum, found.mean, found.std, found.non_finite) == (1.0, 3.0, 2.0, 1.0, 3)
    empty = measure_tensor(torch.empty(0, 4))
    assert (empty.minimum, empty.mean, empty.non_finite) == (None, None, 0)


def test_an_adapters_base_is_found_beside_it(adapter: Path, llama: Path) -> None:
    found = inspect_weights(str(adapter))
    assert (found.kind, found.adapter and found.adapter["rank"]) == ("adapter", 4)
    (parent,) = found.parents
    assert (parent.role, parent.sha256, parent.kind) == ("base", manifest_sha256(llama), "base")
    assert parent.folder == str(llama)
    shown = CliRunner().invoke(app, ["weights", "inspect", str(adapter)]).stdout
    assert f"base {manifest_sha256(llama)[:12]}… (base tiny-llama, {llama})" in shown


def test_a_lineage_goes_on_above_what_was_found_and_says_what_was_not(adapter: Path) -> None:
    merged = adapter.with_name("merged")
    merged.mkdir()
    parents = {"adapter": manifest_sha256(adapter), "base": "0" * 64}
    write_manifest(merged, Manifest(kind="model", name="m", parents=parents, facts={"loss_after": 1.25}))
    found = inspect_weights(str(merged))
    one, other = found.parents
    assert (one.name, [above.role for above in one.parents]) == (adapter.name, ["base"])
    assert (other.sha256, other.folder) == ("0" * 64, None)
    assert found.losses == {"loss_after": 1.25}
    assert "base 000000000000… (not found beside it)" in CliRunner().invoke(app, ["weights", "inspect", str(merged)]).stdout


def test_a_folder_without_a_manifest_is_told_too(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        if file.name != MANIFEST_NAME:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    found = inspect_weights(str(tmp_path))
    assert (found.kind, found.license, found.manifest, found.verified) == ("model", "apache-2.0", None, None)
    assert found.tokenizer_sha256 == read_manifest(llama).tokenizer_sha256
    assert [one.sha256 for one in found.files] == [None] * len(found.files)
    hashed = {one.name: one.sha256 for one in inspect_weights(str(tmp_path), verify=True).files}
    assert hashed["config.json"] == read_manifest(llama).files["config.json"].sha256


def test_a_gguf_file_is_told(tmp_path: Path) -> None:
    pairs = [("general.architecture", "llama"), ("general.name", "Tiny\x1b[2J"), ("general.license", "mit")]
    values = np.arange(64, dtype=np.float32)
    with (tmp_path / "tiny.gguf").open("wb") as file:
        packed = (len(pairs), b"".join(string_pair(*pair) for pair in pairs))
        list(write_gguf(file, pairs=packed, tensors=[("w", (2, 32), 0)], packed=lambda name: values.view(np.uint8)))
    found = run_json(str(tmp_path / "tiny.gguf"), "--stats")
    assert (found["kind"], found["architecture"], found["license"], found["parameters"]) == ("gguf", "llama", "mit", 64)
    (tensor,) = found["tensors"]
    assert (tensor["dtype"], tensor["shape"], tensor["size_bytes"]) == ("F32", [2, 32], 256)
    assert (tensor["stats"]["maximum"], tensor["stats"]["mean"]) == (63.0, 31.5)
    shown = CliRunner().invoke(app, ["weights", "inspect", str(tmp_path / "tiny.gguf")]).stdout
    assert "Tiny" in shown
    assert "\x1b" not in shown


def test_packed_weights_count_as_what_they_stand_for(tmp_path: Path) -> None:
    weights = {
        "w": torch.zeros(32, 1, dtype=torch.uint8),
        "w.absmax": torch.zeros(1),
        "w.quant_map": torch.zeros(16),
        "w.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
        "norm": torch.ones(8),
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert inspect_weights(str(tmp_path)).parameters == 64 + 8


def test_dtypes_that_torch_cannot_read_are_told(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert inspect_weights(str(tmp_path)).dtypes["F4"].parameters == 16
    result = CliRunner().invoke(app, ["weights", "inspect", str(tmp_path), "--stats"])
    assert isinstance(result.exception, WeightsError)
    assert "F4" in str(result.exception)


def test_what_is_damaged_or_no_model_is_said(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights"):
        inspect_weights(str(tmp_path))
    whole = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="cut off"):
        inspect_weights(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    write_manifest(tmp_path, Manifest(kind="model", name="m"))
    (tmp_path / "model.safetensors").write_bytes(whole[:-1] + b"\xff")
    assert inspect_weights(str(tmp_path)).verified is None
    with pytest.raises(ArtifactError, match="not the one in the manifest"):
        inspect_weights(str(tmp_path), verify=True)
    with pytest.raises(WeightsError, match="no model at"):
        inspect_weights(str(tmp_path / "absent" / "deep" / "er"))


def test_a_tensor_counts_once(llama: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, tmp_path / name)
    alone = inspect_weights(str(tmp_path))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path / name)
    found = inspect_weights(str(tmp_path))
    assert (found.kind, found.parameters) == ("model", alone.parameters)
    shutil.copy(llama / "model.safetensors", tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match="is both in"):
        inspect_weights(str(tmp_path))


def test_headers_are_enough(adapter: Path) -> None:
    code = (
        "import sys; from chaccu.weights.inspection import inspect_weights; "
        f"inspect_weights({str(adapter)!r}, verify=True); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
