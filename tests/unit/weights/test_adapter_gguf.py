"""A LoRA adapter as a GGUF file: its factors in llama.cpp's order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, write_manifest
from chaccu.errors import WeightsError
from chaccu.testing.tiny import build_llama
from chaccu.weights.adapter_gguf import write_adapter_gguf
from chaccu.weights.gguf_file import GgufFile
from chaccu.weights.gguf_tensors import hf_tensor

torch = pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("gguf", reason="the train extra is not installed")
pytest.importorskip("peft", reason="the train extra is not installed")

from chaccu.testing.tiny import build_adapter  # noqa: E402 (torch may be absent)
from chaccu.testing.tiny_gguf import write_llama_gguf  # noqa: E402
from chaccu.weights.adapter import Adapter  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_llama(tmp_path_factory.mktemp("base"))
    write_llama_gguf(folder)
    return folder


def test_its_product_is_the_update_of_the_weight_as_the_base_s_file_has_it(base: Path, tmp_path: Path) -> None:
    adapter = Adapter(build_adapter(tmp_path / "adapter", base))
    manifest = write_adapter_gguf(adapter.folder, base / "model.gguf", tmp_path / "out", base=base)
    made, file = GgufFile(tmp_path / "out" / "adapter.gguf"), GgufFile(base / "model.gguf")
    assert (made.get("general.type"), made.architecture, made.get("adapter.type")) == ("adapter", "llama", "lora")
    assert len(made.tensors) == 2 * len(adapter.weights) > 4
    name, weight = "blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight"
    low, high = made.dequantized(f"{name}.lora_a"), made.dequantized(f"{name}.lora_b")
    update = made.get("adapter.lora.alpha") / len(low) * high @ low
    values = hf_tensor(file, name)
    # Rows of keys lie in another order there, in the base as in the update.
    expected = np.sort(adapter.change(weight).apply(0, torch.from_numpy(values.copy())).numpy() - values, axis=0)
    np.testing.assert_allclose(np.sort(update, axis=0), expected, atol=1e-5)
    assert manifest.parents == {"base": manifest_sha256(base), "adapter": manifest_sha256(adapter.folder)}
    assert read_manifest(tmp_path / "out", kind="adapter").chat_format == "chatml"


def test_the_base_s_folder_alone_gives_the_same_file(base: Path, tmp_path: Path) -> None:
    adapter = build_adapter(tmp_path / "adapter", base)
    write_adapter_gguf(adapter, base / "model.gguf", tmp_path / "of-file", base=base)
    manifest = write_adapter_gguf(adapter, None, tmp_path / "of-folder", base=base)
    same = [(tmp_path / name / "adapter.gguf").read_bytes() for name in ("of-file", "of-folder")]
    assert same[0] == same[1]
    assert manifest.parents == {"base": manifest_sha256(base), "adapter": manifest_sha256(adapter)}
    with pytest.raises(WeightsError, match="neither the base's folder nor a GGUF file"):
        write_adapter_gguf(adapter, None, tmp_path / "none")


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    other = build_llama(tmp_path / "other", hidden_size=32)
    adapter = build_adapter(tmp_path / "adapter", other)
    with pytest.raises(WeightsError, match="another shape: 32 × 128"):
        write_adapter_gguf(adapter, base / "model.gguf", tmp_path / "out")
    with pytest.raises(WeightsError, match="another base"):
        write_adapter_gguf(adapter, base / "model.gguf", tmp_path / "out", base=base)
    deeper = build_adapter(tmp_path / "deeper", build_llama(tmp_path / "deep", num_hidden_layers=3))
    with pytest.raises(WeightsError, match="does not have"):
        write_adapter_gguf(deeper, base / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_llama_cpp_does_not_take_from_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    rows = build_adapter(tmp_path / "rows", base, token_rows=[5, 6])
    with pytest.raises(WeightsError, match="trains 2 rows of"):
        write_adapter_gguf(rows, base / "model.gguf", tmp_path / "out")
    stretched = build_adapter(tmp_path / "stretched", base)
    write_manifest(stretched, Manifest(kind="adapter", name="a", facts={"config_changes": {"max_position_embeddings": 8}}))
    with pytest.raises(WeightsError, match="positions stretched"):
        write_adapter_gguf(stretched, base / "model.gguf", tmp_path / "out")
