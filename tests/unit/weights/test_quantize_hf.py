"""Linear weights in nf4, int8 and fp8: what the libraries make of them, what loads again, and what is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chaccu.artifact import manifest_sha256, read_manifest, verify_files
from chaccu.cli.weights import app
from chaccu.errors import MissingDependencyError, StorageError, UsageError, WeightsError
from chaccu.testing.tiny import build_llama, build_model

torch = pytest.importorskip("torch", reason="the train extra is not installed")
transformers = pytest.importorskip("transformers", reason="the train extra is not installed")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
torchao = pytest.importorskip("torchao", reason="torchao is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402 (torch may be absent)

from chaccu.weights.checkpoint import Checkpoint  # noqa: E402
from chaccu.weights.fp8_form import read_fp8  # noqa: E402
from chaccu.weights.perplexity import load_model  # noqa: E402
from chaccu.weights.quantize import find_source, quantize  # noqa: E402
from chaccu.weights.quantize_hf import quantize_hf  # noqa: E402

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, with nothing but its files."""
    folder = tmp_path_factory.mktemp("base")
    build_llama(folder, hidden_size=64, intermediate_size=192)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "manifest.json").unlink()
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def with_weights(base: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The model of `base` with other weights, in float32."""
    shutil.copytree(base, folder)
    plain = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file({**plain, **weights}, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_rest_is_kept(base: Path, out: Path) -> list[str]:
    """That all but linear weights are as they were; returns the names of those."""
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [
        name for name in before if name in after and torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    ]
    linear = sorted(set(before) - set(kept))
    assert len(linear) == 14
    assert all(name.endswith("_proj.weight") for name in linear)
    return linear


def test_nf4_is_bit_for_bit_what_transformers_itself_packs(base: Path, tmp_path: Path) -> None:
    quantize_hf(base, tmp_path / "out", "nf4")
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=options, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name])) == json.loads(bytes(tensor))
        else:
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert_rest_is_kept(base, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-6, rtol=1e-6)


def test_nf4_in_small_shards_is_packed_piece_by_piece_as_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_hf(base, tmp_path / "whole", "nf4")
    monkeypatch.setattr("chaccu.weights.row_pieces._VALUES_AT_ONCE", 1)
    monkeypatch.setattr("chaccu.weights.row_pieces._LARGEST_BLOCK", 64)
    quantize_hf(base, tmp_path / "pieces", "nf4", max_shard_bytes=20_000)
    whole, pieces = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "pieces")
    assert len(pieces.files) > 3
    assert all(torch.equal(whole.read(name), pieces.read(name)) for name in whole.entries)


def test_int8_loads_as_torchao_quantises_it_in_one_file_or_many(base: Path, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    quantize_(theirs.model.layers, Int8WeightOnlyConfig(set_inductor_config=False))
    quantize_hf(base, tmp_path / "out", "int8")
    quantize_hf(base, tmp_path / "shards", "int8", max_shard_bytes=50_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in (tmp_path / "out", tmp_path / "shards"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
        weight = model.model.layers[1].mlp.up_proj.weight
        assert type(weight).__name__ == "Int8Tensor"
        assert torch.equal(weight.qdata, theirs.model.layers[1].mlp.up_proj.weight.qdata)
        torch.testing.assert_close(logits_of(model), logits_of(theirs), atol=0.0, rtol=0.0)
    assert_rest_is_kept(base, tmp_path / "out")


def test_fp8_is_in_the_form_that_vllm_loads(base: Path, tmp_path: Path) -> None:
    quantize_hf(base, tmp_path / "out", "fp8")
    linear = assert_rest_is_kept(base, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before) | {f"{name}_scale" for name in linear}
    for name in linear:
        weight, scale = before[name].float(), after[f"{name}_scale"]
        assert (after[name].dtype, after[name].shape) == (torch.float8_e4m3fn, weight.shape)
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert float(scale) == pytest.approx(float(weight.abs().max()) / 448)
        # Three bits after the first one, and a least step of 2⁻⁹ near nothing.
        assert ((after[name].float() * scale - weight).abs() <= weight.abs() / 16 + scale * 2**-10).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["activation_scheme"]) == ("fp8", "dynamic")
    assert {"lm_head", "model.embed_tokens"} <= set(config["ignored_layers"])
    meant = with_weights(base, tmp_path / "meant", dict(read_fp8(Checkpoint(tmp_path / "out"))))
    torch.testing.assert_close(logits_of(load_model(tmp_path / "out")), logits_of(meant), atol=1e-5, rtol=1e-5)


def test_weights_of_zeros_alone_are_zeros_in_fp8(base: Path, tmp_path: Path) -> None:
    zeroed = tmp_path / "zeroed"
    with_weights(base, zeroed, {"model.layers.0.mlp.up_proj.weight": torch.zeros(192, 64)})
    quantize_hf(zeroed, tmp_path / "out", "fp8")
    assert not dict(read_fp8(Checkpoint(tmp_path / "out")))["model.layers.0.mlp.up_proj.weight"].any()


def test_the_manifest_names_its_source(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base")
    manifest = quantize_hf(base, tmp_path / "out", "fp8")
    assert (manifest.kind, manifest.parents, manifest.chat_format) == ("model", {"source": manifest_sha256(base)}, "chatml")
    assert manifest.tokenizer_sha256 == read_manifest(base).tokenizer_sha256
    assert manifest.settings["type"] == "fp8"
    verify_files(tmp_path / "out", manifest.files)


def test_what_cannot_be_quantised_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_hf(base, tmp_path / "fp8", "fp8")
    with pytest.raises(WeightsError, match="quantised already, as fp8"):
        quantize_hf(tmp_path / "fp8", tmp_path / "out", "nf4")
    with pytest.raises(WeightsError, match="lie turned over"):
        quantize_hf(build_model(tmp_path / "gpt2", "distilgpt2"), tmp_path / "out", "int8")
    save_file({"tower.weight": torch.ones(4, 4)}, shutil.copytree(base, tmp_path / "odd") / "model.safetensors")
    with pytest.raises(WeightsError, match="no weights that are known to be linear"):
        quantize_hf(tmp_path / "odd", tmp_path / "out", "fp8")
    with_weights(base, tmp_path / "nan", {"model.layers.1.mlp.up_proj.weight": torch.full((192, 64), float("nan"))})
    for kind in ("nf4", "int8", "fp8"):
        with pytest.raises(WeightsError, match=r"up_proj.weight in .* not finite"):
            quantize_hf(tmp_path / "nan", tmp_path / "out", kind)
    with pytest.raises(UsageError, match=r"no type int4: .*pickles"):
        quantize(base, tmp_path / "out", "int4")
    with pytest.raises(WeightsError, match="no Hugging Face folder"):
        find_source(tmp_path, "nf4")
    with pytest.raises(WeightsError, match="there is no model at"):
        find_source(tmp_path / "nowhere", "nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for kind, library in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(MissingDependencyError, match=library):
            quantize_hf(base, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_nothing(base: Path, stop: BaseException, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise stop

    with pytest.raises(StorageError if isinstance(stop, OSError) else KeyboardInterrupt):
        quantize_hf(base, tmp_path / "out", "fp8", progress=fail)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_was_gained_and_lost(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The sky is blue, and the grass below it is green. " * 20)
    options = ["quantize", str(base), "--type", "fp8", "--text", str(tmp_path / "text"), "--out"]
    result = CliRunner().invoke(app, [*options, str(tmp_path / "out"), "--json"], catch_exceptions=False)
    printed = json.loads(result.stdout)
    before, after = printed["before"], printed["after"]
    assert before["size_bytes"] == Checkpoint(base).size_bytes > after["size_bytes"] == Checkpoint(tmp_path / "out").size_bytes
    assert before["perplexity"]["tokens"] == after["perplexity"]["tokens"]
    assert before["perplexity"]["perplexity"] == pytest.approx(after["perplexity"]["perplexity"], rel=0.05)
    assert before["tokens_per_s"] > 0 < after["tokens_per_s"]
    result = CliRunner().invoke(app, [*options, str(tmp_path / "quick"), "--no-measure"], catch_exceptions=False)
    assert "perplexity" not in result.stdout
    assert re.search(r"before: 0\.\d MB\n +after: 0\.\d MB\n$", result.stdout)
    with pytest.raises(UsageError, match="did you mean 'q4_k_m'"):
        CliRunner().invoke(app, ["quantize", str(base), "--type", "q4_k", "--out", "x"], catch_exceptions=False)
