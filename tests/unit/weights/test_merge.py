"""Merging an adapter: the model with base and adapter side by side, on plain, 4-bit and GGUF bases; rounding is measured."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, sha256_file, verify_files
from chaccu.cli.weights import app
from chaccu.errors import StorageError, UsageError, WeightsError
from chaccu.testing.tiny import build_adapter, build_llama

torch = pytest.importorskip("torch", reason="the train extra is not installed")
peft = pytest.importorskip("peft", reason="the train extra is not installed")
transformers = pytest.importorskip("transformers", reason="the train extra is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402 (torch may be absent)

from chaccu.testing.tiny_gguf import write_llama_gguf  # noqa: E402
from chaccu.weights.adapter import Adapter  # noqa: E402
from chaccu.weights.checkpoint import Checkpoint  # noqa: E402
from chaccu.weights.gguf_file import GgufFile  # noqa: E402
from chaccu.weights.gguf_import import import_gguf  # noqa: E402
from chaccu.weights.gguf_merge import merge_into_gguf  # noqa: E402
from chaccu.weights.merge import merge_adapter  # noqa: E402
from chaccu.weights.merge_error import MergeError  # noqa: E402
from chaccu.weights.nf4_form import find_packed  # noqa: E402
from chaccu.weights.row_pieces import split_rows  # noqa: E402

IDS = torch.arange(8)[None]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def generate(model: Any) -> list[int]:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)[0].tolist()


def make_adapter(base: Path, folder: Path, *, std: float = 0.1, targets: Any = "all-linear") -> Any:
    """Save a random adapter of `base`; returns the model that it adapts, base and adapter side by side."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(load(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    return adapted.eval()


def assert_same_answers(merged: Any, adapted: Any, base: Any) -> None:
    expected = logits_of(adapted)
    assert (logits_of(base) - expected).abs().max() > 0.01
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=1e-4)
    assert generate(merged) == generate(adapted)


def error_of(manifest: Manifest) -> MergeError:
    import msgspec

    return msgspec.convert(manifest.facts["merge_error"], MergeError)


def to_dtype(base: Path, out: Path, dtype: torch.dtype) -> Path:
    load(base, dtype).save_pretrained(out)
    return out


def to_nf4(base: Path, out: Path) -> Path:
    """As transformers itself packs and saves a model."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=options, device_map={"": "cpu"}
    )
    model.save_pretrained(out)
    return out


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder in four bits, as bitsandbytes itself unpacks them."""
    from bitsandbytes import functional

    tensors = load_file(folder / "model.safetensors")
    plain: dict[str, torch.Tensor] = {}
    for name in [one.partition(".quant_state.")[0] for one in tensors if ".quant_state." in one]:
        parts = {part.removeprefix(f"{name}."): tensor for part, tensor in tensors.items() if part.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        plain[name] = functional.dequantize_4bit(tensors[name], state)
    return plain | {name: tensor for name, tensor in tensors.items() if not any(name.startswith(one) for one in plain)}


def test_merged_answers_are_the_adapted_ones(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    adapted = make_adapter(base, tmp_path / "adapter")
    manifest = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same_answers(load(tmp_path / "merged"), adapted, load(base))
    assert manifest.settings["adapted_weights"] == len(Adapter(tmp_path / "adapter").weights) > 0
    assert (manifest.chat_format, manifest.parents) == ("chatml", {"base": manifest_sha256(base)})
    assert manifest.inputs == {"adapter_model.safetensors": sha256_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    verify_files(tmp_path / "merged", read_manifest(tmp_path / "merged", kind="model").files)
    assert error_of(manifest).overall.of_weights == 0.0


def test_what_has_no_manifest_is_named_by_its_hashes(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    (base / "manifest.json").unlink()
    manifest = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert manifest.parents == {}
    assert manifest.inputs["model.safetensors"] == sha256_file(base / "model.safetensors")
    assert manifest.tokenizer_sha256 is not None


def test_the_error_that_is_stated_is_that_of_the_rounding(tmp_path: Path) -> None:
    base = to_dtype(build_llama(tmp_path / "full"), tmp_path / "base", torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", std=0.02)
    manifest = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    adapter, before, after = Adapter(tmp_path / "adapter"), Checkpoint(base), Checkpoint(tmp_path / "merged")
    sums = torch.zeros(3, dtype=torch.float64)
    shares = {}
    for weight in adapter.weights:
        low, high = (torch.from_numpy(one).double() for one in adapter.factors(weight))
        update = 2.0 * high @ low
        error = after.read(weight).double() - before.read(weight).double() - update
        meant = before.read(weight).double() + update
        squares = torch.stack([one.square().sum() for one in (error, update, meant)])
        shares[weight] = float((squares[0] / squares[1]).sqrt())
        sums += squares
    error = error_of(manifest)
    assert error.overall.of_update == pytest.approx(float((sums[0] / sums[1]).sqrt()), rel=1e-3)
    assert error.overall.of_weights == pytest.approx(float((sums[0] / sums[2]).sqrt()), rel=1e-3)
    assert error.worst_weight == max(shares, key=shares.__getitem__)
    assert error.worst.of_update == pytest.approx(max(shares.values()), rel=1e-3)
    # Half a unit in the last of eight places at most, evenly spread.
    assert 0.0005 < error.overall.of_weights < 0.003
    assert after.entries[adapter.weights[0]].dtype == torch.bfloat16


def test_an_adapter_that_rounding_eats_is_said_to_be_eaten(tmp_path: Path) -> None:
    base = to_dtype(build_llama(tmp_path / "full"), tmp_path / "base", torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", std=0.0005)
    manifest = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert error_of(manifest).overall.of_update > 0.9
    assert "lost in rounding" in error_of(manifest).describe()


def test_an_adapter_that_changes_nothing_leaves_every_bit(tmp_path: Path) -> None:
    base = to_dtype(build_llama(tmp_path / "full"), tmp_path / "base", torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", std=0.0)
    manifest = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert error_of(manifest).overall.of_update is None
    assert "no update" in error_of(manifest).describe()
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_in_bfloat16_and_trained_rows_of_tokens_are_merged(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    adapter = build_adapter(tmp_path / "adapter", base, token_rows=[3, 7])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_answers(load(tmp_path / "merged"), adapted, load(base))


def test_an_adapter_of_conv1d_layers_is_merged_the_way_their_weights_lie(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(str(base))
    with pytest.warns(UserWarning, match="Conv1D"):
        adapted = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits_of(load(tmp_path / "merged")), logits_of(adapted), atol=1e-4, rtol=1e-4)


def test_rows_are_merged_piece_by_piece_as_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_llama(tmp_path / "base")
    adapter = build_adapter(tmp_path / "adapter", base, token_rows=[0, 399])
    merge_adapter(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("chaccu.weights.row_pieces._VALUES_AT_ONCE", 1)
    monkeypatch.setattr("chaccu.weights.row_pieces._LARGEST_BLOCK", 64)
    merge_adapter(base, adapter, tmp_path / "pieces", max_shard_bytes=30_000)
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 3
    whole, pieces = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "pieces")
    for name in whole.entries:
        torch.testing.assert_close(pieces.read(name), whole.read(name), rtol=1e-6, atol=1e-6)
    load(tmp_path / "pieces")


@pytest.mark.parametrize("columns", [1, 48, 64, 4096, 11008])
def test_pieces_begin_at_whole_blocks(columns: int) -> None:
    pieces = list(split_rows((20_000, columns)))
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == 20_000
    assert all(begin * columns % 4096 == 0 for begin, _ in pieces)


def test_an_adapter_of_a_base_in_nf4_gives_a_plain_model_with_its_answers(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    packed = to_nf4(base, tmp_path / "nf4")
    # The base that the packed weights stand for, in plain layers, with the adapter beside it.
    plain = shutil.copytree(base, tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json"))
    save_file(unpacked(packed), plain / "model.safetensors", metadata={"format": "pt"})
    adapted = make_adapter(plain, tmp_path / "adapter")
    manifest = merge_adapter(packed, tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert_same_answers(merged, adapted, load(plain))
    assert error_of(manifest).overall.of_weights < 1e-6
    # As the 4-bit model itself answers with the adapter.
    four_bits = transformers.AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"})
    beside = peft.PeftModel.from_pretrained(four_bits, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(beside), atol=2e-2, rtol=2e-2)


def test_what_four_bits_stand_for_is_what_bitsandbytes_says(tmp_path: Path) -> None:
    packed = to_nf4(build_llama(tmp_path / "base"), tmp_path / "nf4")
    expected, checkpoint = unpacked(packed), Checkpoint(packed)
    found = find_packed(checkpoint)
    assert len(found) == 14
    for name, weight in found.items():
        torch.testing.assert_close(weight.open()(0, weight.shape[0]), expected[name].float(), rtol=1e-6, atol=1e-7)


def test_a_merged_base_is_packed_again_and_the_loss_is_stated(tmp_path: Path) -> None:
    packed = to_nf4(build_llama(tmp_path / "base"), tmp_path / "nf4")
    make_adapter(tmp_path / "base", tmp_path / "adapter", targets=["q_proj"])
    plain = merge_adapter(packed, tmp_path / "adapter", tmp_path / "plain")
    manifest = merge_adapter(packed, tmp_path / "adapter", tmp_path / "merged", requantize=True)
    meant, before, after = load_file(tmp_path / "plain" / "model.safetensors"), unpacked(packed), unpacked(tmp_path / "merged")
    changed = [name for name in meant if "q_proj" in name]
    assert len(changed) == 2
    errors = torch.stack([(after[name] - meant[name]).square().sum() for name in changed]).sum().sqrt()
    updates = torch.stack([(meant[name] - before[name]).square().sum() for name in changed]).sum().sqrt()
    assert error_of(manifest).overall.of_update == pytest.approx(float(errors / updates), rel=1e-3)
    assert error_of(manifest).overall.of_update > 10 * error_of(plain).overall.of_update
    assert 0.05 < error_of(manifest).overall.of_weights < 0.15
    was, now = load_file(packed / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was if "q_proj" not in name)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": "cpu"}).eval()
    expected = shutil.copytree(tmp_path / "base", tmp_path / "expected", ignore=shutil.ignore_patterns("manifest.json"))
    save_file(after, expected / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(again), logits_of(load(expected)), atol=2e-2, rtol=2e-2)


def test_going_back_to_four_bits_needs_a_base_in_four_bits(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    with pytest.raises(UsageError, match="not in nf4"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", requantize=True)


def test_a_base_that_is_quantised_otherwise_is_refused(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(WeightsError, match="quantised as gptq"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")


def gguf_base(tmp_path: Path) -> tuple[Path, Path]:
    """A GGUF file and the folder that it was unpacked into."""
    path = write_llama_gguf(build_llama(tmp_path / "made"))
    import_gguf(path, tmp_path / "base", chat_format="chatml", dtype="float32")
    return path, tmp_path / "base"


def test_merged_into_a_gguf_file_the_answers_are_the_adapted_ones(tmp_path: Path) -> None:
    gguf, base = gguf_base(tmp_path)
    adapted = make_adapter(base, tmp_path / "adapter")
    manifest = merge_into_gguf(gguf, base, tmp_path / "adapter", tmp_path / "merged")
    import_gguf(tmp_path / "merged" / "model.gguf", tmp_path / "back", chat_format="chatml", dtype="float32")
    assert_same_answers(load(tmp_path / "back"), adapted, load(base))
    assert error_of(manifest).overall.of_weights == 0.0
    assert (manifest.kind, manifest.chat_format) == ("gguf", "chatml")
    assert manifest.inputs["model.gguf"] == sha256_file(gguf)


def test_merged_weights_of_a_quantised_gguf_file_are_in_q8_0_and_the_loss_is_stated(tmp_path: Path) -> None:
    import gguf as ggml

    path, _ = gguf_base(tmp_path)
    file = GgufFile(path)
    small = tmp_path / "small.gguf"
    with small.open("wb") as target:
        from chaccu.weights.gguf_file import write_gguf

        kinds = {name: 2 if "attn_q.w" in name or "ffn_down" in name else entry.type_id for name, entry in file.tensors.items()}
        list(
            write_gguf(
                target,
                pairs=file.pairs_without(),
                tensors=[(name, entry.shape, kinds[name]) for name, entry in file.tensors.items()],
                packed=lambda name: ggml.quants.quantize(file.dequantized(name), ggml.GGMLQuantizationType(kinds[name])),
            )
        )
    import_gguf(small, tmp_path / "q4", chat_format="chatml", dtype="float32")
    make_adapter(tmp_path / "q4", tmp_path / "adapter", targets=["q_proj"])
    merge_adapter(tmp_path / "q4", tmp_path / "adapter", tmp_path / "meant")
    manifest = merge_into_gguf(small, tmp_path / "q4", tmp_path / "adapter", tmp_path / "merged")
    merged = GgufFile(tmp_path / "merged" / "model.gguf")
    assert {name: entry.type_id for name, entry in merged.tensors.items() if kinds[name] == 2} == {
        name: 8 if "attn_q" in name else 2 for name in kinds if kinds[name] == 2
    }
    assert bytes(merged.packed("blk.0.ffn_down.weight")) == bytes(GgufFile(small).packed("blk.0.ffn_down.weight"))
    import_gguf(tmp_path / "merged" / "model.gguf", tmp_path / "back", chat_format="chatml", dtype="float32")
    meant, before, after = (Checkpoint(tmp_path / name) for name in ("meant", "q4", "back"))
    changed = [name for name in meant.entries if "q_proj" in name]
    errors = torch.stack([(after.read(name) - meant.read(name)).square().sum() for name in changed]).sum().sqrt()
    updates = torch.stack([(meant.read(name) - before.read(name)).square().sum() for name in changed]).sum().sqrt()
    assert error_of(manifest).overall.of_update == pytest.approx(float(errors / updates), rel=1e-3)
    assert 0.001 < error_of(manifest).overall.of_weights < 0.01


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    with pytest.raises(WeightsError, match="no LoRA adapter"):
        merge_adapter(base, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def change_tensor(file: Path, part: str, value: float) -> None:
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if part in name)[0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_values_that_are_not_finite_stop_it(where: str, tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    (base / "manifest.json").unlink()
    name, part = ("model.safetensors", "embed") if where == "base" else ("adapter_model.safetensors", "1.mlp.down_proj.lora_B")
    change_tensor(tmp_path / where / name, part, float("nan"))
    with pytest.raises(WeightsError, match=f"{part}.* in .*{where} holds values that are not finite"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merged_value_that_float16_cannot_hold_stops_it(tmp_path: Path) -> None:
    base = to_dtype(build_llama(tmp_path / "full"), tmp_path / "base", torch.float16)
    make_adapter(base, tmp_path / "adapter")
    change_tensor(tmp_path / "adapter" / "adapter_model.safetensors", "0.self_attn.q_proj.lora_B", 1e7)
    with pytest.raises(WeightsError, match=r"(?s)q_proj.weight, merged, has values of up to .*bfloat16"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, other = build_llama(tmp_path / "base"), build_llama(tmp_path / "other", hidden_size=32)
    make_adapter(other, tmp_path / "adapter")
    with pytest.raises(WeightsError, match=r"is 64 × 128 in .* is for another shape: 32 × 128"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(WeightsError, match="was trained on another base"):
        merge_adapter(base, build_adapter(tmp_path / "known", other), tmp_path / "merged")
    make_adapter(build_llama(tmp_path / "deep", num_hidden_layers=3), tmp_path / "deeper")
    with pytest.raises(WeightsError, match=r"changes model.layers.2.* does not have"):
        merge_adapter(base, tmp_path / "deeper", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-10])
    with pytest.raises(WeightsError, match="cut off"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    lone = next(name for name in tensors if "lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lone}, file)
    with pytest.raises(WeightsError, match=r"lora_B.weight without .*lora_A.weight"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    save_file({}, file)
    with pytest.raises(WeightsError, match="no weights of a LoRA adapter"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_nothing(stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")

    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise stop

    with pytest.raises(StorageError if isinstance(stop, OSError) else KeyboardInterrupt):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_base_and_adapter_may_be_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(build_llama(tmp_path / "base"), tmp_path / "adapter")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name.partition("/")[2]))
    manifest = merge_adapter("someone/base", "someone/adapter", tmp_path / "merged")
    assert manifest.parents == {"base": manifest_sha256(tmp_path / "base")}


def test_the_command_prints_the_error_and_the_manifest(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    options = ["merge", "--base", str(base), "--adapter", str(tmp_path / "adapter"), "--max-shard-bytes", "100000"]
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "merged")], catch_exceptions=False)
    assert "14 weights merged\nrounding error: 0.00% of the update" in result.stdout
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "again"), "--json"], catch_exceptions=False)
    printed = json.loads(result.stdout)
    assert printed["facts"]["merge_error"]["worst_weight"].endswith(".weight")
    assert {"model.safetensors.index.json", "config.json", "tokenizer.json"} < set(printed["files"])
    assert Checkpoint(tmp_path / "again").entries.keys() == Checkpoint(base).entries.keys()
    with pytest.raises(UsageError, match="Hugging Face folder"):
        CliRunner().invoke(app, [*options, "--out", str(tmp_path / "x"), "--gguf", "x.gguf"], catch_exceptions=False)
