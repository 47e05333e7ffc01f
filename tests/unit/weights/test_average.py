"""The mean of checkpoints: of one model, in float32, rounded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaccu.artifact import Manifest, manifest_sha256, verify_files, write_manifest
from chaccu.errors import UsageError, WeightsError
from chaccu.testing.tiny import build_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.weights import tensor_stream  # noqa: E402 (torch may be absent)
from chaccu.weights.average import average_models  # noqa: E402
from chaccu.weights.checkpoint import Checkpoint, write_checkpoint  # noqa: E402
from chaccu.weights.safetensors_file import TensorSpec  # noqa: E402


def build(
    folder: Path, seed: int, *, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 10**9, **config: object
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in (("w", (6, 5)), ("norm", (5,)))}
    folder.mkdir()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(folder, specs, tensors.__getitem__, max_shard_bytes=max_shard_bytes)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, **config}))
    build_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("weights", "shares"), [(None, [1 / 3, 1 / 3, 1 / 3]), ([2, 1, 1], [0.5, 0.25, 0.25])])
def test_the_mean_is_taken_in_float32_and_has_the_first_dtype_and_files(
    tmp_path: Path, weights: list[float] | None, shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_stream, "_PIECE", 7)
    folders = [
        build(tmp_path / "a", 1, max_shard_bytes=60),
        build(tmp_path / "b", 2, dtype=torch.float32, torch_dtype="float32"),
        build(tmp_path / "c", 3, pad_token_id=3),
    ]
    write_manifest(folders[0], Manifest(kind="model", name="a", license="mit"))
    write_manifest(folders[1], Manifest(kind="model", name="b", license="apache-2.0", chat_format="chatml"))
    manifest = average_models(folders, tmp_path / "mean", weights=weights)
    found, sources = Checkpoint(tmp_path / "mean"), [Checkpoint(folder) for folder in folders]
    for name in ("w", "norm"):
        mean = sum(share * source.read(name).double() for share, source in zip(shares, sources, strict=True))
        assert found.read(name).dtype == torch.bfloat16
        torch.testing.assert_close(found.read(name).double(), mean, rtol=2**-8, atol=1e-7)
    assert [file.path.name for file in found.files] == [file.path.name for file in sources[0].files]
    verify_files(tmp_path / "mean", manifest.files)
    assert (manifest.kind, manifest.chat_format, manifest.license) == ("model", "chatml", "mit AND apache-2.0")
    assert manifest.parents == {"model_1": manifest_sha256(folders[0]), "model_2": manifest_sha256(folders[1])}
    assert list(manifest.settings["weights"].values()) == pytest.approx(shares)
    assert len(set(manifest.inputs.values())) == 3


def test_a_model_with_itself_is_itself(tmp_path: Path) -> None:
    folder = build(tmp_path / "a", 1)
    average_models([folder, folder], tmp_path / "mean", weights=[0.25, 0.75])
    assert (tmp_path / "mean" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def _rename(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"norm"', b'"nurm"'))


def _reshape(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[6,5]", b"[5,6]"))


def _other_heads(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8}))


def _quantised(folder: Path) -> None:
    config = {"model_type": "llama", "num_attention_heads": 4, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))


def _other_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<start_of_turn>", "<turn>"))


def _other_rules(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(
        file.read_text()
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
        .replace('"add_prefix_space":false', '"add_prefix_space":true')
    )


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _other_format(folder: Path) -> None:
    write_manifest(folder, Manifest(kind="model", name="b", chat_format="llama-3"))


def _nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\xc0\x7f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "norm is in .*a alone"),
        (_reshape, "w is 5 × 6 in it, and 6 × 5 in the first"),
        (_other_heads, "num_attention_heads in config.json is 8 in it and 4 in the first"),
        (_quantised, r"the weights in .*b are quantised \(fp8\)"),
        (_other_token, "token 4 is '<turn>' in it and '<start_of_turn>' in the first"),
        (_other_rules, "the same tokens and split text in other ways"),
        (_no_tokenizer, "only one of them has a tokenizer.json"),
        (_other_format, "other chat formats: chatml, llama-3"),
        (_nan, "norm in .*b holds values that are not finite"),
    ],
)
def test_models_that_differ_are_refused_by_the_first_difference(tmp_path: Path, change: object, message: str) -> None:
    first, other = build(tmp_path / "a", 1), build(tmp_path / "b", 2)
    write_manifest(first, Manifest(kind="model", name="a", chat_format="chatml"))
    assert callable(change)
    change(other)
    with pytest.raises(WeightsError, match=message):
        average_models([first, other], tmp_path / "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (1, None, "two models or more"),
        (2, [1.0], "1 weights for 2 models"),
        (2, [1.0, 0.0], "a weight is 0"),
        (2, [1.0, -1.0], "a weight is -1"),
        (2, [1.0, float("nan")], "a weight is nan"),
    ],
)
def test_weights_that_make_no_mean_are_wrong_use(tmp_path: Path, count: int, weights: list[float] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        average_models([tmp_path] * count, tmp_path / "mean", weights=weights)
