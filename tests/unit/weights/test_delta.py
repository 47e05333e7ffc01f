"""A model as its difference from another, and back: every bit, from any shards, and never from a wrong or damaged base."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, sha256_file, verify_files, write_manifest
from chaccu.errors import ArtifactError, StorageError, WeightsError
from chaccu.testing.tiny import build_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from chaccu.weights import checkpoint as checkpoint_module  # noqa: E402 (torch may be absent)
from chaccu.weights import tensor_stream  # noqa: E402
from chaccu.weights.checkpoint import Checkpoint, write_checkpoint  # noqa: E402
from chaccu.weights.delta import apply_delta, make_delta  # noqa: E402
from chaccu.weights.safetensors_file import SafetensorsWriter, TensorSpec  # noqa: E402

Tensors = dict[str, torch.Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(folder: Path, tensors: Tensors, *, max_shard_bytes: int = 10**9, manifest: Manifest | None = None) -> Path:
    folder.mkdir(parents=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(folder, specs, tensors.__getitem__, max_shard_bytes=max_shard_bytes)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "of": folder.name}))
    if manifest is not None:
        write_manifest(folder, manifest)
    return folder


BASE: Tensors = {
    "embed.weight": draw(10, 6),
    "layers.0.q_proj.weight": draw(6, 6, seed=1),
    "layers.0.norm.weight": torch.ones(6, dtype=torch.bfloat16),
    "layers.0.inv_freq": torch.ones(3),
}
# The most awkward neighbours: another sign, the largest and the smallest numbers, both zeros.
CHANGED = BASE["layers.0.q_proj.weight"].clone()
CHANGED[0] = torch.tensor([-0.0, 0.0, 3.3e38, -3.3e38, 1e-40, -1.0]).to(torch.bfloat16)
TARGET: Tensors = {
    "embed.weight": torch.cat([BASE["embed.weight"] * 1.01, draw(2, 6, seed=5)]),
    "layers.0.q_proj.weight": CHANGED,
    "layers.0.norm.weight": BASE["layers.0.norm.weight"],
    "lm_head.weight": draw(12, 6, seed=6),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", BASE, manifest=Manifest(kind="base", name="llama-9b", license="llama2"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = write(tmp_path / "target", TARGET, max_shard_bytes=250)
    tokenizer = build_tokenizer(folder)
    for name in ("generation_config.json", "tokenizer.model"):
        (folder / name).write_text("{}")
    write_manifest(folder, Manifest(kind="model", name="vicuna", chat_format="chatml", tokenizer_sha256=tokenizer.sha256))
    return folder


def assert_target(folder: Path) -> None:
    found = Checkpoint(folder)
    assert found.entries.keys() == TARGET.keys()
    for name, tensor in TARGET.items():
        assert found.read(name).dtype == tensor.dtype
        assert torch.equal(found.read(name).view(torch.int16), tensor.view(torch.int16)), name


def test_a_target_comes_back_bit_for_bit_in_its_own_files(tmp_path: Path, base: Path, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = make_delta(base, target, tmp_path / "delta", progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] == 2 * (12 * 6 + 36 + 6 + 12 * 6)
    applied = apply_delta(base, tmp_path / "delta", tmp_path / "back")
    assert_target(tmp_path / "back")
    weights = sorted(target.glob("*.safetensors*"))
    assert len(weights) == 3
    for file in [*weights, target / "config.json", target / "tokenizer.json", target / "tokenizer.model"]:
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    for folder, manifest in ((tmp_path / "delta", made), (tmp_path / "back", applied)):
        verify_files(folder, manifest.files)
        assert (manifest.chat_format, manifest.license) == ("chatml", "llama2")
        assert manifest.tokenizer_sha256 == read_manifest(target).tokenizer_sha256
    assert made.parents == {"base": manifest_sha256(base), "target": manifest_sha256(target)}
    assert (applied.kind, applied.parents) == (
        "model",
        {"base": manifest_sha256(base), "delta": manifest_sha256(tmp_path / "delta")},
    )


def test_it_holds_integers_whole_tensors_and_what_became_of_each(tmp_path: Path, base: Path, target: Path) -> None:
    facts = make_delta(base, target, tmp_path / "delta").facts
    found = Checkpoint(tmp_path / "delta")
    assert found.entries["layers.0.q_proj.weight"].dtype == torch.uint16
    assert not found.read("layers.0.norm.weight").to(torch.int32).any()
    # Added rows, and tensors that the base lacks.
    assert torch.equal(found.read("embed.weight").view(torch.bfloat16)[10:], TARGET["embed.weight"][10:])
    assert torch.equal(found.read("lm_head.weight"), TARGET["lm_head.weight"])
    assert facts["tensors"]["lm_head.weight"]["base"] is None
    assert (facts["base_name"], facts["unchanged"], facts["dropped"]) == ("llama-9b", 1, ["layers.0.inv_freq"])


def test_pieces_of_a_tensor_make_the_same_delta(
    tmp_path: Path, base: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_delta(base, target, tmp_path / "whole")
    monkeypatch.setattr(tensor_stream, "_PIECE", 7)
    assert make_delta(base, target, tmp_path / "pieces").files == whole.files
    apply_delta(base, tmp_path / "pieces", tmp_path / "back")
    assert_target(tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_base_of_another_dtype_is_rounded_first(tmp_path: Path, dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    base = write(tmp_path / "base", {"w": draw(8, 4, dtype=base_dtype), "n": torch.tensor([1, 2])})
    after = {"w": draw(8, 4, dtype=dtype, seed=1), "n": torch.tensor([3, -4])}
    make_delta(base, write(tmp_path / "target", after), tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    back = Checkpoint(tmp_path / "back")
    assert all(torch.equal(back.read(name).view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in after.items())


def test_a_smaller_vocabulary_and_empty_or_single_values_come_back(tmp_path: Path) -> None:
    base = write(
        tmp_path / "base",
        {"embed": draw(9, 3), "scale": torch.tensor(2.0), "none": torch.zeros(0, 3), "flag": torch.tensor([True])},
    )
    after = {"embed": draw(5, 3, seed=1), "scale": torch.tensor(-3.0), "none": torch.zeros(0, 3), "flag": torch.tensor([False])}
    make_delta(base, write(tmp_path / "target", after), tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    back = Checkpoint(tmp_path / "back")
    assert all(torch.equal(back.read(name), tensor) for name, tensor in after.items())


def test_the_same_base_in_other_shards_and_another_folder_is_the_same(tmp_path: Path, base: Path, target: Path) -> None:
    make_delta(base, target, tmp_path / "delta")
    turned = dict(reversed([*BASE.items(), ("more", torch.ones(2))]))
    apply_delta(
        write(tmp_path / "elsewhere", turned, max_shard_bytes=80), tmp_path / "delta", tmp_path / "back", max_shard_bytes=100
    )
    assert_target(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 3


def _other_value(tensors: Tensors) -> None:
    tensors["embed.weight"][0, 0] += 1


def _other_dtype(tensors: Tensors) -> None:
    tensors["embed.weight"] = tensors["embed.weight"].half()


def _other_shape(tensors: Tensors) -> None:
    tensors["embed.weight"] = draw(11, 6)


def _missing(tensors: Tensors) -> None:
    del tensors["embed.weight"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_other_value, "embed.weight has other values"),
        (_other_dtype, "embed.weight is F16 of 10 × 6, not BF16 of 10 × 6"),
        (_other_shape, "embed.weight is BF16 of 11 × 6, not BF16 of 10 × 6"),
        (_missing, "it has no embed.weight"),
    ],
)
def test_a_wrong_base_is_known_before_anything_is_written(
    tmp_path: Path, base: Path, target: Path, change: Callable[[Tensors], None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_delta(base, target, tmp_path / "delta")
    wrong = {name: tensor.clone() for name, tensor in BASE.items()}
    change(wrong)
    monkeypatch.setattr("chaccu.weights.delta.atomic_folder", None)
    with pytest.raises(WeightsError, match=f"(?s)is not the base of .*, which is llama-9b: {why}.*name llama-9b's folder"):
        apply_delta(write(tmp_path / "wrong", wrong), tmp_path / "delta", tmp_path / "back")


def test_a_base_that_differs_in_the_middle_fails_at_that_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    before, after = {"a": draw(4), "w": draw(80, 80)}, {"a": draw(4, seed=2), "w": draw(80, 80, seed=1)}
    base = write(tmp_path / "base", before)
    make_delta(base, write(tmp_path / "target", after), tmp_path / "delta")
    before["w"][40, 40] += 1
    with pytest.raises(WeightsError, match="w has other values, or is damaged"):
        apply_delta(write(tmp_path / "wrong", before), tmp_path / "delta", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "target", "wrong"]


def test_a_damaged_delta_is_named(tmp_path: Path, base: Path, target: Path) -> None:
    make_delta(base, target, tmp_path / "delta")
    file = next((tmp_path / "delta").glob("*-00002-of-*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match=r"lm_head.weight in .*delta is damaged"):
        apply_delta(base, tmp_path / "delta", tmp_path / "back")
    file.write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="is cut off"):
        apply_delta(base, tmp_path / "delta", tmp_path / "back")
    file.write_bytes(whole)
    manifest = tmp_path / "delta" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"lm_head.weight"', '"head.weight"'))
    with pytest.raises(WeightsError, match=r"head.weight in .* is missing"):
        apply_delta(base, tmp_path / "delta", tmp_path / "back")
    manifest.write_text(text.replace('"base_name"', '"name_of_base"'))
    with pytest.raises(WeightsError, match=r"manifest of .* is damaged"):
        apply_delta(base, tmp_path / "delta", tmp_path / "back")
    with pytest.raises(ArtifactError, match="of kind 'base'; expected 'delta'"):
        apply_delta(base, base, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_models_without_a_common_tensor_or_of_other_widths_are_refused(tmp_path: Path, base: Path) -> None:
    other = write(tmp_path / "other", {"x": draw(2, 2)})
    with pytest.raises(WeightsError, match=r"no tensor in common.*the first ones are x and embed.weight"):
        make_delta(base, other, tmp_path / "delta")
    wide = write(tmp_path / "wide", {**TARGET, "layers.0.q_proj.weight": draw(6, 8)})
    with pytest.raises(WeightsError, match=r"q_proj.weight is BF16 of 6 × 6 in .* and BF16 of 6 × 8"):
        make_delta(base, wide, tmp_path / "delta")


@pytest.mark.parametrize("side", ["base", "target"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, base: Path, target: Path, side: str) -> None:
    broken = {**(BASE if side == "base" else TARGET), "layers.0.norm.weight": torch.full((6,), float("nan")).bfloat16()}
    folders = {"base": base, "target": target, side: write(tmp_path / "broken", broken)}
    with pytest.raises(WeightsError, match=r"layers.0.norm.weight in .*broken holds values that are not finite"):
        make_delta(folders["base"], folders["target"], tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, base: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_delta(base, target, tmp_path / "delta")

    def fail(self: SafetensorsWriter, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.SafetensorsWriter, "write", fail)
    for work in (
        lambda: make_delta(base, target, tmp_path / "again"),
        lambda: apply_delta(base, tmp_path / "delta", tmp_path / "again"),
    ):
        with pytest.raises(StorageError, match="no space left"):
            work()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "target"]


def test_what_transformers_wrote_comes_back_byte_for_byte(tmp_path: Path, base: Path) -> None:
    (tmp_path / "saved").mkdir()
    safetensors_torch.save_file(TARGET, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    make_delta(base, tmp_path / "saved", tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    assert sha256_file(tmp_path / "back" / "model.safetensors") == sha256_file(tmp_path / "saved" / "model.safetensors")
