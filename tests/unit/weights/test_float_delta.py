"""Deltas as FastChat released them: floats added to the base's, in the delta's precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaccu.artifact import Manifest, manifest_sha256, verify_files, write_manifest
from chaccu.errors import WeightsError
from chaccu.testing.tiny import build_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.weights.checkpoint import Checkpoint, write_checkpoint  # noqa: E402 (torch may be absent)
from chaccu.weights.float_delta import apply_float_delta  # noqa: E402
from chaccu.weights.safetensors_file import TensorSpec  # noqa: E402

Tensors = dict[str, torch.Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(folder, specs, tensors.__getitem__)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "of": folder.name}))
    return folder


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
BASE: Tensors = {
    "model.embed_tokens.weight": draw(10, 4, dtype=torch.float32),
    "w": draw(4, 4, seed=1),
    FREQUENCIES: torch.ones(2),
}
DELTA: Tensors = {"model.embed_tokens.weight": draw(11, 4, seed=2), "w": draw(4, 4, seed=3), FREQUENCIES: torch.zeros(2)}


def test_sums_are_the_float16_ones_and_added_rows_are_whole(tmp_path: Path) -> None:
    base, delta = write(tmp_path / "base", BASE), write(tmp_path / "delta", DELTA)
    write_manifest(base, Manifest(kind="base", name="llama", license="llama"))
    tokenizer = build_tokenizer(delta)
    manifest = apply_float_delta(base, delta, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    # As FastChat added them: the base loaded in float16, with rows of zeros for the added tokens.
    padded = torch.cat([BASE["model.embed_tokens.weight"].half(), torch.zeros(1, 4, dtype=torch.float16)])
    assert torch.equal(found.read("model.embed_tokens.weight"), padded + DELTA["model.embed_tokens.weight"])
    assert torch.equal(found.read("w"), BASE["w"] + DELTA["w"])
    assert found.entries.keys() == DELTA.keys() - {FREQUENCIES}
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (delta / name).read_bytes()
    verify_files(tmp_path / "out", manifest.files)
    assert (manifest.kind, manifest.license, manifest.tokenizer_sha256) == ("model", "llama", tokenizer.sha256)
    assert manifest.parents == {"base": manifest_sha256(base)}
    assert set(manifest.inputs) == {"base (tensors)", "delta (tensors)"}


def test_pickled_shards_are_read_and_safetensors_written(tmp_path: Path) -> None:
    base, delta = write(tmp_path / "base", BASE), tmp_path / "delta"
    delta.mkdir()
    (delta / "config.json").write_text("{}")
    # Saved turned over, as a transposed parameter is.
    turned = {**DELTA, "w": DELTA["w"].T.contiguous().T}
    for at, name in enumerate(("model.embed_tokens.weight", "w"), 1):
        torch.save({name: turned[name]}, delta / f"pytorch_model-0000{at}-of-00002.bin")
    apply_float_delta(base, delta, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert torch.equal(found.read("w"), BASE["w"] + DELTA["w"])
    assert torch.equal(found.read("model.embed_tokens.weight")[10:], DELTA["model.embed_tokens.weight"][10:])
    assert [file.path.name for file in found.files] == ["model.safetensors"]
    (delta / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match="is a part of the weights and is not there"):
        apply_float_delta(base, delta, tmp_path / "again")


@pytest.mark.parametrize(
    ("base", "delta", "message"),
    [
        (BASE, {**DELTA, "w": draw(5, 5)}, "w is 5 × 5 in the one, 4 × 4 in the other"),
        (BASE, {**DELTA, "model.embed_tokens.weight": draw(9, 4)}, "is 9 × 4 in the one, 10 × 4"),
        (BASE, {**DELTA, "more": draw(2)}, "more is 2 in the one, not there in the other"),
        ({**BASE, "more": draw(2)}, DELTA, "more is not there in the one, 2 in the other"),
        (BASE, {**DELTA, "w": torch.ones(4, 4, dtype=torch.uint16)}, "has no manifest.json, and w in it is torch.uint16"),
        (BASE, {**DELTA, "w": torch.full((4, 4), float("nan"))}, "w in .*delta holds values that are not finite"),
        (
            {**BASE, "w": torch.full((4, 4), 6e4)},
            {**DELTA, "w": torch.full((4, 4), 6e4).half()},
            "w in .*delta holds values that are not finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, base: Tensors, delta: Tensors, message: str) -> None:
    folders = write(tmp_path / "base", base), write(tmp_path / "delta", delta)
    with pytest.raises(WeightsError, match=message):
        apply_float_delta(*folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]
