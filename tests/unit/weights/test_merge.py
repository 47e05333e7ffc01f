"""Merging an adapter: the same model as base and adapter side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaccu.artifact import read_manifest, verify_files
from chaccu.errors import WeightsError
from chaccu.testing.tiny import build_llama
from chaccu.weights.merge import Adapter, merge_adapter

torch = pytest.importorskip("torch", reason="the train extra is not installed")
peft = pytest.importorskip("peft", reason="the train extra is not installed")
transformers = pytest.importorskip("transformers", reason="the train extra is not installed")


def make_adapter(base: Path, folder: Path) -> torch.Tensor:
    """Save a random adapter of `base`; returns the adapted model's logits for eight ids."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(torch.arange(8)[None]).logits


def test_merged_logits_are_the_adapted_ones(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter")
    manifest = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = merged(torch.arange(8)[None]).logits
        assert (plain(torch.arange(8)[None]).logits - expected).abs().max() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert manifest.settings["adapted_weights"] == len(Adapter(tmp_path / "adapter").weights) > 0
    verify_files(tmp_path / "merged", read_manifest(tmp_path / "merged", kind="model").files)


def test_an_adapter_of_conv1d_layers_is_merged_the_way_their_weights_lie(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(str(base))
    with pytest.warns(UserWarning, match="Conv1D"):
        expected = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(torch.arange(8)[None]).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    with pytest.raises(WeightsError, match="no LoRA adapter"):
        merge_adapter(base, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
