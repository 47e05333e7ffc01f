"""GGUF in fewer bits: llama.cpp's own blocks, its choice of types, a file that it loads, and what is refused."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chaccu.artifact import manifest_sha256, sha256_file, verify_files
from chaccu.cli.weights import app
from chaccu.errors import MissingDependencyError, WeightsError
from chaccu.testing.tiny import build_llama

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf", reason="the train extra is not installed")
torch = pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("xllamacpp", reason="the cpu-engine extra is not installed")

from chaccu.testing.tiny_gguf import write_llama_gguf  # noqa: E402 (gguf may be absent)
from chaccu.weights.checkpoint import Checkpoint  # noqa: E402
from chaccu.weights.ggml_blocks import Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, find_quantiser, row_bytes  # noqa: E402
from chaccu.weights.gguf_file import GgufFile  # noqa: E402
from chaccu.weights.gguf_import import import_gguf  # noqa: E402
from chaccu.weights.quantize import find_source, quantize  # noqa: E402
from chaccu.weights.quantize_gguf import asks_for_more, quantize_gguf, type_name  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model.gguf` in float32, whose rows are whole blocks of 256 but for one of the MLP."""
    folder = build_llama(tmp_path_factory.mktemp("base"), hidden_size=256, intermediate_size=288, num_hidden_layers=4)
    write_llama_gguf(folder)
    return folder


def types_of(path: Path) -> dict[str, str]:
    return {name: type_name(entry.type_id) for name, entry in GgufFile(path).tensors.items()}


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        *((Q4_0, 0.05, 0.12), (Q5_0, 0.02, 0.06), (Q5_1, 0.02, 0.06), (Q8_0, 0.002, 0.008)),
        *((Q4_K, 0.04, 0.1), (Q5_K, 0.02, 0.05), (Q6_K, 0.01, 0.025)),
    ],
)
def test_llama_cpp_s_blocks_are_as_near_as_their_bits_allow(kind: int, least: float, most: float) -> None:
    quantiser = find_quantiser()
    assert quantiser.name.startswith("llama.cpp of xllamacpp ")
    # More rows than threads, and a number that does not share out evenly.
    values = np.random.default_rng(0).standard_normal((37, 512)).astype(np.float32)
    packed = quantiser.quantise(values, kind)
    assert packed.shape == (37, row_bytes(512, kind))
    back = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind)).reshape(values.shape)
    assert least < np.linalg.norm(back - values) / np.linalg.norm(values) < most
    if kind in (Q4_0, Q5_0, Q5_1, Q8_0):
        theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
        assert (packed != theirs.reshape(packed.shape)).mean() < 1e-3


def test_a_mixture_gives_more_bits_at_both_ends_and_to_every_third_between() -> None:
    assert [layer for layer in range(16) if asks_for_more(layer, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]
    # Those of a published Gemma 3 270M in Q4_K_M.
    assert [layer for layer in range(18) if asks_for_more(layer, 18)] == [0, 1, 4, 7, 10, 13, 15, 16, 17]


def test_every_tensor_gets_the_type_that_its_name_and_rows_ask_for(base: Path, tmp_path: Path) -> None:
    quantize_gguf(base / "model.gguf", tmp_path / "out", "q4_k_m")
    found = types_of(tmp_path / "out" / "model.gguf")
    assert {found[f"blk.{layer}.{name}.weight"] for layer in range(4) for name in ("attn_q", "attn_k", "ffn_up")} == {"Q4_K"}
    assert [found[f"blk.{layer}.attn_v.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    # Rows of 288 are no whole blocks of 256.
    assert [found[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q5_0", "Q5_0", "Q8_0", "Q8_0"]
    assert (found["output.weight"], found["token_embd.weight"], found["output_norm.weight"]) == ("Q6_K", "Q4_K", "F32")


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.01), ("q6_k", 0.03), ("q5_k_m", 0.06), ("q5_0", 0.07)])
def test_what_is_written_is_the_model_with_its_metadata(base: Path, tmp_path: Path, kind: str, most: float) -> None:
    manifest = quantize_gguf(base / "model.gguf", tmp_path / "out", kind)
    before, after = GgufFile(base / "model.gguf"), GgufFile(tmp_path / "out" / "model.gguf")
    dropped = ("general.file_type", "general.quantization_version")
    assert before.pairs_without(*dropped) == after.pairs_without(*dropped)
    assert after.get("general.file_type") == getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}")
    for name in before.tensors:
        meant, found = before.dequantized(name), after.dequantized(name)
        assert np.linalg.norm(found - meant) <= most * np.linalg.norm(meant)
    assert (manifest.kind, manifest.chat_format, manifest.settings["type"]) == ("gguf", "chatml", kind)
    assert manifest.parents == {"source": manifest_sha256(base)}
    assert manifest.inputs == {name: sha256_file(base / name) for name in ("model.gguf", "model.safetensors")}
    verify_files(tmp_path / "out", manifest.files)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_command_measures_both_files_and_llama_cpp_runs_them(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The sky is blue, and the grass below it is green. " * 20)
    options = ["quantize", str(base), "--type", "q4_k_m", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
    printed = json.loads(CliRunner().invoke(app, [*options, "--json"], catch_exceptions=False).stdout)
    before, after = printed["before"], printed["after"]
    assert before["size_bytes"] == (base / "model.gguf").stat().st_size > 4 * after["size_bytes"]
    assert before["perplexity"]["perplexity"] == pytest.approx(after["perplexity"]["perplexity"], rel=0.1)
    assert before["perplexity"] != after["perplexity"]
    assert before["tokens_per_s"] > 0 < after["tokens_per_s"]
    assert after["measured_by"] == "transformers, with the file's weights unpacked"
    assert printed["settings"]["quantiser"] == find_quantiser().name
    assert not list(base.glob(".unpacked*"))


def test_without_llama_cpp_the_package_s_types_are_left(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    manifest = quantize_gguf(base / "model.gguf", tmp_path / "out", "q4_0")
    assert manifest.settings["quantiser"] == f"gguf {metadata.version('gguf')}"
    assert types_of(tmp_path / "out" / "model.gguf")["output.weight"] == "Q8_0"
    with pytest.raises(MissingDependencyError, match=r"q4_k_m needs xllamacpp.*\n.*cpu-engine"):
        quantize_gguf(base / "model.gguf", tmp_path / "k", "q4_k_m")
    assert not (tmp_path / "k").exists()


def rewritten(base: Path, path: Path, change: Any) -> Path:
    """The file with tensors that `change(name, values)` gives."""
    from chaccu.weights.gguf_file import write_gguf

    file = GgufFile(base / "model.gguf")
    table = [(entry.name, entry.shape, entry.type_id) for entry in file.tensors.values()]
    with path.open("wb") as target:
        list(
            write_gguf(
                target,
                pairs=file.pairs_without(),
                tensors=table,
                packed=lambda name: change(name, file.dequantized(name).copy()),
            )
        )
    return path


@pytest.mark.parametrize("spoilt", ["blk.1.ffn_up.weight", "blk.0.attn_norm.weight"])
def test_values_that_are_not_finite_stop_it(base: Path, tmp_path: Path, spoilt: str) -> None:
    def spoil(name: str, values: Any) -> Any:
        values.reshape(-1)[7] = np.nan if name == spoilt else values.reshape(-1)[7]
        return values

    source = rewritten(base, tmp_path / "nan.gguf", spoil)
    with pytest.raises(WeightsError, match=f"{spoilt} in .* not finite"):
        quantize_gguf(source, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_quantised_or_cut_off_or_not_one_file_is_refused(base: Path, tmp_path: Path) -> None:
    quantize_gguf(base / "model.gguf", tmp_path / "small", "q4_0")
    with pytest.raises(WeightsError, match=r"quantised already: output.weight is in Q6_K"):
        quantize_gguf(tmp_path / "small" / "model.gguf", tmp_path / "out", "q8_0")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((base / "model.gguf").read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cut off"):
        quantize_gguf(tmp_path / "a.gguf", tmp_path / "out", "q8_0")
    with pytest.raises(WeightsError, match=r"holds no single GGUF file: a.gguf, b.gguf"):
        find_source(tmp_path, "q8_0")
    assert find_source(base, "q8_0") == base / "model.gguf"
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_folder_becomes_a_file_in_fewer_bits_and_nothing_else_is_left(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "base", hidden_size=256, intermediate_size=512)
    assert find_source(source, "q6_k") == source
    manifest = quantize(source, tmp_path / "out", "q6_k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert (manifest.kind, manifest.chat_format, manifest.parents) == ("gguf", "chatml", {"source": manifest_sha256(source)})
    weights = Checkpoint(source)
    import_gguf(tmp_path / "out" / "model.gguf", tmp_path / "back", chat_format="chatml", dtype="float32")
    found = Checkpoint(tmp_path / "back")
    for name in weights.entries:
        meant = weights.read(name).float()
        assert torch.linalg.vector_norm(found.read(name) - meant) <= 0.03 * torch.linalg.vector_norm(meant)
    (source / "manifest.json").unlink()
    assert quantize(source, tmp_path / "plain", "q8_0").inputs == weights.sha256()
