"""A Hugging Face folder as a GGUF file: what llama.cpp computes with it, the way back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, verify_files, write_manifest
from chaccu.errors import StorageError, WeightsError
from chaccu.weights import gguf_export
from chaccu.weights.gguf_export import export_gguf
from chaccu.weights.gguf_file import GgufFile
from chaccu.weights.gguf_import import import_gguf

pytest.importorskip("gguf", reason="the train extra is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from chaccu.testing.tiny import build_model
from chaccu.weights.checkpoint import Checkpoint, write_checkpoint
from chaccu.weights.safetensors_file import TensorSpec

# Wide weights, as random ones of the usual range hardly prefer any token.
WIDE = {"initializer_range": 0.4}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA3_ROPE = {
    "full_attention": {**LINEAR_ROPE, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3_ROPE}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama, yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma-2": ("llama", GEMMA2),
    "gemma-3": ("gemma-3", {}),
    "gemma-3, linear": ("gemma-3", {"rope_parameters": GEMMA3_ROPE}),
}


def build(folder: Path, architecture: str, **fields: Any) -> Path:
    """A tiny model whose norms and biases are not those that every model begins with."""
    build_model(folder, architecture, **{**WIDE, **fields})
    checkpoint, generator = Checkpoint(folder), torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
        for name, tensor in ((name, checkpoint.read(name)) for name in checkpoint.entries)
    }
    return rewrite(folder, tensors)


def rewrite(folder: Path, tensors: dict[str, Any]) -> Path:
    """The same folder with other weights, and its manifest made anew."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(folder, specs, tensors.__getitem__)
    write_manifest(folder, read_manifest(folder))
    return folder


def draw_prompts(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(6, vocabulary, generator.integers(1, longest)).tolist() for _ in range(count)]


def hf_logprobs(folder: Path, prompts: list[list[int]]) -> np.ndarray:
    import transformers

    # Gemma 2's capped attention is in this implementation alone.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        rows = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).numpy() for prompt in prompts]
    return np.stack(rows)


def llama_logprobs(gguf: Path, prompts: list[list[int]], vocabulary: int) -> np.ndarray:
    from chaccu.testing.llama_logits import LlamaLogits

    with LlamaLogits(gguf) as llama:
        return np.stack([llama.next_logprobs(prompt, vocabulary) for prompt in prompts])


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_computes_what_transformers_computes(model: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    from chaccu.testing.llama_logits import agreement

    architecture, fields = MODELS[model]
    folder = build(tmp_path / "hf", architecture, **fields)
    export_gguf(folder, tmp_path / "gguf", kind="f32")
    size = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    # Longer than a window of 32 where llama.cpp knows of it; Mistral's is the context that is written.
    prompts = draw_prompts(6, size, 30 if model == "mistral" else 90)
    cosine, same = agreement(hf_logprobs(folder, prompts), llama_logprobs(tmp_path / "gguf" / "model.gguf", prompts, size))
    assert cosine > 0.9999
    assert same == 1


def test_half_precision_keeps_the_likeliest_token_of_200_prompts(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    from chaccu.testing.llama_logits import agreement

    folder = build(tmp_path / "hf", "llama")
    prompts = draw_prompts(200, 400, 24)
    expected = hf_logprobs(folder, prompts)
    for kind, least in (("f16", 0.999), ("bf16", 0.98), ("q8_0", 0.95)):
        export_gguf(folder, tmp_path / kind, kind=kind)
        cosine, same = agreement(expected, llama_logprobs(tmp_path / kind / "model.gguf", prompts, expected.shape[1]))
        print(f"{kind}: least cosine {cosine:.6f}, same likeliest token {same:.1%}")
        assert cosine > least
        assert same >= (0.99 if kind == "f16" else 0.85)


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_every_bit_is_the_same(model: str, tmp_path: Path) -> None:
    architecture, fields = MODELS[model]
    folder = build(tmp_path / "hf", architecture, **fields)
    export_gguf(folder, tmp_path / "gguf", kind="f32")
    import_gguf(tmp_path / "gguf" / "model.gguf", tmp_path / "back", chat_format="chatml", dtype="float32")
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "back")
    assert set(after.entries) == set(before.entries)
    for name in before.entries:
        expected = before.read(name)
        if "gemma" in model and name.endswith("norm.weight"):
            expected = (expected + 1) - 1  # GGUF has Gemma's norms with 1 added, which float32 rounds
        assert torch.equal(after.read(name), expected), name
    was, now = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "back"))
    for key in ("rms_norm_eps", "tie_word_embeddings", "num_key_value_heads"):
        assert now[key] == was[key], key
    if "gemma" in model:
        assert (now["layer_types"], now["sliding_window"]) == (was["layer_types"], was["sliding_window"])
    if "rope_parameters" in fields:
        assert now["rope_parameters"] == was["rope_parameters"]


def test_the_folder_is_an_artifact_that_names_where_it_came_from(tmp_path: Path) -> None:
    folder = build(tmp_path / "hf", "llama")
    steps: list[tuple[int, int]] = []
    manifest = export_gguf(folder, tmp_path / "gguf", kind="q8_0", progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0
    assert manifest == read_manifest(tmp_path / "gguf", kind="gguf")
    verify_files(tmp_path / "gguf", manifest.files)
    assert manifest.parents == {"base": manifest_sha256(folder)}
    assert manifest.chat_format == "chatml"
    assert manifest.tokenizer_sha256 == read_manifest(folder).tokenizer_sha256
    assert set(manifest.files) == {"model.gguf", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    file = GgufFile(tmp_path / "gguf" / "model.gguf")
    kinds = {entry.name: entry.type_id for entry in file.tensors.values()}
    assert kinds["blk.0.attn_q.weight"] == 8
    assert kinds["blk.0.attn_norm.weight"] == 0
    assert file.get("tokenizer.chat_template") == (tmp_path / "gguf" / "chat_template.jinja").read_text()


def test_a_window_that_llama_cpp_does_not_know_ends_the_context(tmp_path: Path) -> None:
    folder = build(tmp_path / "hf", "mistral")
    manifest = export_gguf(folder, tmp_path / "gguf")
    assert manifest.facts["context_tokens"] == 32
    assert GgufFile(tmp_path / "gguf" / "model.gguf").get("llama.context_length") == 32


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def without(folder: Path, name: str) -> None:
    checkpoint = Checkpoint(folder)
    rewrite(folder, {one: checkpoint.read(one) for one in checkpoint.entries if one != name})


def with_value(folder: Path, name: str, value: float) -> None:
    checkpoint = Checkpoint(folder)
    tensors = {one: checkpoint.read(one) for one in checkpoint.entries}
    tensors[name][0] = value
    rewrite(folder, tensors)


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda folder: change_config(folder, model_type="lama"), "of model type 'lama'"),
        (lambda folder: change_config(folder, hidden_act="gelu"), "hidden_act = gelu"),
        (lambda folder: change_config(folder, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (lambda folder: change_config(folder, rope_parameters=DYNAMIC), "rope_scaling 'dynamic'"),
        (
            lambda folder: change_config(folder, rope_parameters={**YARN_ROPE, "beta_fast": 16}),
            "beta_fast 32, and the model has 16",
        ),
        (lambda folder: change_config(folder, num_hidden_layers=3), "lacks model.layers.2"),
        (lambda folder: change_config(folder, vocab_size=500), "the embedding has 400 rows"),
        (lambda folder: change_config(folder, vocab_size=300), "ids up to"),
        (lambda folder: change_config(folder, quantization_config={"bits": 4}), "quantised"),
        (lambda folder: without(folder, QUERY), f"lacks {QUERY}"),
        (lambda folder: with_value(folder, QUERY, float("nan")), "not finite"),
        (lambda folder: with_value(folder, QUERY, 70000.0), f"{QUERY} has values up to 70000"),
        (cut, "cut off"),
        (other_tokenizer, "another tokenizer than its weights were trained with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    breaking: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = build(tmp_path / "hf", "llama")
    breaking(folder)
    with pytest.raises(WeightsError, match=message):
        export_gguf(folder, tmp_path / "gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_gemma_s_other_scale_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "hf", "gemma-3", query_pre_attn_scalar=64)
    with pytest.raises(WeightsError, match=r"query_pre_attn_scalar = 64; llama\.cpp computes gemma3_text with 16"):
        export_gguf(folder, tmp_path / "gguf")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "hf", "llama")

    def write_nothing(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chaccu.weights.hashed_file.HashedFile.write", write_nothing)
    with pytest.raises(StorageError, match="no space left"):
        export_gguf(folder, tmp_path / "gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    folder = build(tmp_path / "hf", "llama")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(folder, tmp_path / "gguf", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_a_vocabulary_that_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "hf", "llama")
    write = gguf_export.write_vocabulary

    def lose_a_merge(*args: Any, **kwargs: Any) -> Any:
        vocabulary = write(*args, **kwargs)
        vocabulary.pairs["tokenizer.ggml.merges"] = vocabulary.pairs["tokenizer.ggml.merges"][20:]
        return vocabulary

    monkeypatch.setattr(gguf_export, "write_vocabulary", lose_a_merge)
    with pytest.raises(
        WeightsError, match=r"other ids than training saw: in probe \d+ \(format chatml\) they part at token \d+"
    ):
        export_gguf(folder, tmp_path / "gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_a_folder_without_a_manifest_is_exported_as_it_is(tmp_path: Path) -> None:
    folder = build(tmp_path / "hf", "llama")
    (folder / "manifest.json").unlink()
    manifest = export_gguf(folder, tmp_path / "gguf")
    assert (manifest.chat_format, manifest.parents, manifest.name) == (None, {}, "hf")
    assert set(manifest.inputs) == {"model.safetensors"}
    assert "tokenizer.chat_template" not in GgufFile(tmp_path / "gguf" / "model.gguf").keys
    assert export_gguf(folder, tmp_path / "named", chat_format="chatml").chat_format == "chatml"


def test_the_licence_goes_along(tmp_path: Path) -> None:
    folder = build(tmp_path / "hf", "llama")
    write_manifest(folder, Manifest(kind="model", name="tuned", license="apache-2.0"))
    manifest = export_gguf(folder, tmp_path / "gguf")
    assert (manifest.license, manifest.parents) == ("apache-2.0", {"model": manifest_sha256(folder)})
    assert GgufFile(tmp_path / "gguf" / "model.gguf").get("general.license") == "apache-2.0"
