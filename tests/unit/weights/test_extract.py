"""An adapter out of two models: what merging put in comes out again, and what an adapter cannot hold is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chaccu.artifact import manifest_sha256, read_manifest, verify_files
from chaccu.errors import UsageError, WeightsError
from chaccu.lineage import check_base
from chaccu.testing.tiny import build_adapter, build_llama, build_model

torch = pytest.importorskip("torch", reason="the train extra is not installed")
peft = pytest.importorskip("peft", reason="the train extra is not installed")
transformers = pytest.importorskip("transformers", reason="the train extra is not installed")

from chaccu.weights.checkpoint import Checkpoint, write_checkpoint  # noqa: E402 (torch may be absent)
from chaccu.weights.extract import choose_rank, extract_adapter, require_nothing_lost  # noqa: E402
from chaccu.weights.merge import merge_adapter  # noqa: E402
from chaccu.weights.model_comparison import Comparison  # noqa: E402
from chaccu.weights.safetensors_file import TensorSpec  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("extract") / "base")


@pytest.fixture(scope="module")
def merged(base: Path) -> Path:
    """Base and an adapter of rank 4."""
    build_adapter(base.parent / "adapter", base)
    merge_adapter(base, base.parent / "adapter", base.parent / "merged")
    return base.parent / "merged"


def change(source: Path, folder: Path, changes: dict[str, torch.Tensor]) -> Path:
    """A copy of a model with other tensors, without a manifest."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    old = Checkpoint(source)
    tensors = {**{name: old.read(name) for name in old.entries}, **changes}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(folder, specs, tensors.__getitem__)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(8)[None]).logits
    return found


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_what_was_merged_comes_out_again(tmp_path: Path, base: Path, merged: Path) -> None:
    comparison = Comparison(base, merged)
    require_nothing_lost(comparison)
    manifest, report = extract_adapter(comparison, 4, tmp_path / "adapter", base_name="tiny")
    assert report.layers_energy_kept >= 0.9999
    assert report.energy_kept >= 0.9999
    assert {one.module for one in report.modules} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(one.layers == 2 and one.energy_kept > 0.9999 for one in report.modules)
    assert sum(one.share for one in report.modules) == pytest.approx(1)

    adapted = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(adapted), logits(load(merged)), atol=1e-3, rtol=1e-3)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(load(merged)), atol=1e-3, rtol=1e-3)

    verify_files(tmp_path / "adapter", manifest.files)
    assert manifest == read_manifest(tmp_path / "adapter", kind="adapter")
    assert (manifest.chat_format, manifest.facts["base_name"]) == ("chatml", "tiny")
    assert manifest.parents == {"base": manifest_sha256(base), "tuned": manifest_sha256(merged)}
    check_base(base, tmp_path / "adapter")
    with pytest.raises(WeightsError, match="trained on another base"):
        check_base(merged, tmp_path / "adapter")


def test_a_smaller_rank_keeps_less_and_energy_finds_the_rank(tmp_path: Path, base: Path, merged: Path) -> None:
    comparison = Comparison(base, merged)
    kept = [extract_adapter(comparison, rank, tmp_path / str(rank))[1].layers_energy_kept for rank in (1, 2, 4)]
    assert 0.2 < kept[0] < kept[1] < 0.999 < kept[2]
    assert choose_rank(comparison, (kept[0] + kept[1]) / 2) == 2
    assert choose_rank(comparison, kept[1] - 1e-4) == 2
    assert choose_rank(comparison, kept[1] + 1e-4) == 3
    for energy in (0, 1, 1.5):
        with pytest.raises(UsageError, match="between 0 and 1"):
            choose_rank(comparison, energy)
    with pytest.raises(UsageError, match="--rank is 0"):
        extract_adapter(comparison, 0, tmp_path / "none")


def test_weights_that_lie_turned_over_come_out_again(tmp_path: Path) -> None:
    base = build_model(tmp_path / "base", "distilgpt2")
    build_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    _, report = extract_adapter(Comparison(base, tmp_path / "merged"), 4, tmp_path / "out")
    assert report.energy_kept >= 0.9999
    merge_adapter(base, tmp_path / "out", tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(load(tmp_path / "merged")), atol=1e-3, rtol=1e-3)


def test_what_an_adapter_cannot_hold_is_reported_or_refused(tmp_path: Path, base: Path) -> None:
    old = Checkpoint(base)
    q, norm, embed = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
    rows = torch.full((2, 64), 0.5)
    new = {
        q: old.read(q) + torch.outer(torch.ones(64), torch.arange(64.0)) / 64,
        norm: old.read(norm) + 0.5,
        embed: torch.cat([old.read(embed), rows]),
    }
    tuned = change(base, tmp_path / "tuned", new)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 2}))
    comparison = Comparison(base, tuned)
    manifest, report = extract_adapter(comparison, 1, tmp_path / "out")
    # Layer 0 has the module too, and has not changed.
    assert [(one.module, one.layers) for one in report.modules] == [("q_proj", 2)]
    assert report.layers_energy_kept == pytest.approx(1, abs=1e-6)
    changes = {"q": float(((new[q] - old.read(q)) ** 2).sum()), "norm": 64 * 0.25, "rows": float((rows**2).sum())}
    shares = {one.kind: (one.tensors, one.share) for one in report.lost}
    assert shares["norms"] == ([norm], pytest.approx(changes["norm"] / sum(changes.values()), rel=1e-4))
    assert shares["embeddings and head"] == ([embed], pytest.approx(changes["rows"] / sum(changes.values()), rel=1e-4))
    assert report.energy_kept == pytest.approx(changes["q"] / sum(changes.values()), rel=1e-4)
    assert len(report.differences) == 1
    assert "vocab_size" in report.differences[0]
    assert manifest.facts["extracted"]["energy_kept"] == report.energy_kept
    assert set(manifest.inputs) == {"model.safetensors"}
    with pytest.raises(WeightsError, match=r"(?s)norms: model\.norm\.weight, [0-9.]+% of the change.*vocab_size.*delta-make"):
        require_nothing_lost(comparison)


def test_a_changed_head_of_its_own_is_a_linear_layer(tmp_path: Path, base: Path) -> None:
    head = Checkpoint(base).read("lm_head.weight")
    tuned = change(base, tmp_path / "tuned", {"lm_head.weight": head + torch.outer(torch.ones(len(head)), torch.ones(64))})
    _, report = extract_adapter(Comparison(base, tuned), 2, tmp_path / "out")
    assert [(one.module, one.layers) for one in report.modules] == [("lm_head", 1)]
    adapted = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(adapted), logits(load(tuned)), atol=1e-3, rtol=1e-3)


def test_models_without_a_change_for_an_adapter_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(WeightsError, match="no linear layer of"):
        Comparison(base, base)
    norm = "model.norm.weight"
    broken = change(base, tmp_path / "broken", {norm: torch.full((64,), float("inf"))})
    with pytest.raises(WeightsError, match=r"model.norm.weight in .*broken holds values that are not finite"):
        Comparison(base, broken)
    wide = change(base, tmp_path / "wide", {"model.embed_tokens.weight": torch.ones(10, 32)})
    with pytest.raises(WeightsError, match=r"model.embed_tokens.weight is .* × 64 in .* and 10 × 32"):
        Comparison(base, wide)


def test_a_quantised_model_is_refused(tmp_path: Path, base: Path) -> None:
    tuned = change(base, tmp_path / "tuned", {})
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(WeightsError, match=r"tuned are quantised \(bitsandbytes\)"):
        Comparison(base, tuned)


def test_an_adapter_for_a_base_without_a_manifest_knows_its_files(tmp_path: Path, base: Path, merged: Path) -> None:
    plain = change(base, tmp_path / "plain", {})
    extract_adapter(Comparison(plain, merged), 4, tmp_path / "out")
    check_base(plain, tmp_path / "out")
    with pytest.raises(WeightsError, match="trained on another base"):
        check_base(change(base, tmp_path / "other", {"model.norm.weight": torch.zeros(64)}), tmp_path / "out")
