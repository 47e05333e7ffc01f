"""Which base an adapter belongs to: told by manifest, by weights, and by tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.artifact import Manifest, manifest_sha256, read_manifest, sha256_file, write_json, write_manifest
from chaccu.errors import WeightsError
from chaccu.lineage import check_base, find_tokenizer_sha256, identify_weights, source_inputs, source_parents
from chaccu.testing.tiny import build_tokenizer


def make_base(folder: Path, weights: bytes = b"weights", *, versions: dict[str, str] | None = None) -> Path:
    """A base folder whose weights are any bytes, unpacked from a file of the same bytes."""
    tokenizer = build_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(weights)
    packed = sha256_file(folder / "model.safetensors")[::-1]
    write_manifest(
        folder,
        Manifest(kind="base", name="b", tokenizer_sha256=tokenizer.sha256, inputs={"b.gguf": packed}, versions=versions or {}),
    )
    return folder


def make_adapter(folder: Path, base: Path, **changes: Any) -> Path:
    """An adapter's manifest alone, as training on `base` writes it, with these fields changed."""
    manifest = Manifest(
        kind="adapter",
        name="a",
        tokenizer_sha256=read_manifest(base).tokenizer_sha256,
        parents={"base": manifest_sha256(base)},
        facts={"base_weights": identify_weights(base)},
    )
    folder.mkdir()
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))
    return folder


def test_the_same_weights_unpacked_elsewhere_are_the_same_base(tmp_path: Path) -> None:
    here, there = make_base(tmp_path / "here"), make_base(tmp_path / "there", versions={"python": "3.99"})
    assert manifest_sha256(here) != manifest_sha256(there)
    check_base(there, make_adapter(tmp_path / "adapter", here))


def test_a_base_whose_packed_file_is_the_same_needs_no_equal_shards(tmp_path: Path) -> None:
    here, there = make_base(tmp_path / "here"), make_base(tmp_path / "there")
    (there / "model.safetensors").write_bytes(b"the same weights as another version of the library writes them")
    manifest = read_manifest(there)
    write_manifest(there, manifest)
    check_base(there, make_adapter(tmp_path / "adapter", here))


def test_without_a_manifest_the_base_s_own_files_are_hashed(tmp_path: Path) -> None:
    here, there = make_base(tmp_path / "here"), make_base(tmp_path / "there")
    (there / "manifest.json").unlink()
    adapter = make_adapter(tmp_path / "adapter", here)
    check_base(there, adapter)
    (there / "model.safetensors").write_bytes(b"others")
    with pytest.raises(WeightsError, match="another base"):
        check_base(there, adapter)


def make_copy(folder: Path, source: Path) -> Path:
    """A copy of `source` in fewer bits, by its manifest."""
    origin = read_manifest(source)
    make_base(folder, b"fewer bits")
    parents, inputs = source_parents(source, origin), source_inputs(source, origin)
    manifest = msgspec.structs.replace(origin, kind="model", parents=parents, inputs=inputs, facts={}, files={})
    write_manifest(folder, manifest)
    return folder


def test_a_copy_in_fewer_bits_counts_as_the_base_and_so_does_a_copy_of_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    small = make_copy(tmp_path / "small", base)
    smaller = make_copy(tmp_path / "smaller", small)
    for folder in (small, smaller, make_copy(tmp_path / "least", smaller)):
        check_base(folder, adapter)
    check_base(small, make_adapter(tmp_path / "trained-on-it", small))
    # Trained on another machine, where the base's manifest is another.
    there = make_base(tmp_path / "there", versions={"python": "3.99"})
    check_base(smaller, make_adapter(tmp_path / "from-there", there))
    with pytest.raises(WeightsError, match="another base"):
        check_base(base, make_adapter(tmp_path / "trained-elsewhere", smaller))
    with pytest.raises(WeightsError, match="another base"):
        check_base(make_copy(tmp_path / "copy", make_base(tmp_path / "other", b"others")), adapter)


def test_a_copy_of_the_packed_file_counts_as_what_that_was_unpacked_into_and_one_of_a_merged_model_does_not(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    for name, parents in (
        ("wrapped", {"base": manifest_sha256(base)}),
        ("merged", {"base": manifest_sha256(base), "adapter": "0"}),
    ):
        folder = make_base(tmp_path / name, b"other weights")
        write_manifest(folder, msgspec.structs.replace(read_manifest(folder), kind="gguf", parents=parents, inputs={}))
        make_copy(tmp_path / f"{name}-small", folder)
    check_base(tmp_path / "wrapped-small", adapter)
    with pytest.raises(WeightsError, match="another base"):
        check_base(tmp_path / "merged-small", adapter)


@pytest.mark.parametrize("facts", [{}, {"base_weights": {"model.safetensors": "0" * 64}, "base_name": "some/base"}])
def test_other_weights_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    here, there = make_base(tmp_path / "here"), make_base(tmp_path / "there", b"other weights")
    with pytest.raises(WeightsError, match="another base") as caught:
        check_base(there, make_adapter(tmp_path / "adapter", here, facts=facts))
    assert facts.get("base_name", "the base") in caught.value.remedy


def test_another_tokenizer_is_refused_though_the_weights_are_the_same(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    check_base(base, adapter)
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"][1]["content"] = "<another>"
    write_json(base / "tokenizer.json", tokenizer)
    with pytest.raises(WeightsError, match="another tokenizer"):
        check_base(base, adapter)
    assert find_tokenizer_sha256(base) != read_manifest(base).tokenizer_sha256


def test_an_adapter_without_a_manifest_names_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    check_base(tmp_path / "nothing", tmp_path / "adapter")


def test_models_made_of_the_same_data_are_not_the_same_base(tmp_path: Path) -> None:
    here, there = make_base(tmp_path / "here"), make_base(tmp_path / "there", b"others")
    for folder in (here, there):
        write_manifest(folder, msgspec.structs.replace(read_manifest(folder), kind="model", inputs={"data.jsonl": "0" * 64}))
    with pytest.raises(WeightsError, match="another base"):
        check_base(there, make_adapter(tmp_path / "adapter", here))


def test_a_packed_base_is_the_base_and_a_merged_one_is_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    gguf = msgspec.structs.replace(read_manifest(base), kind="gguf", parents={"base": manifest_sha256(base)})
    packed = make_base(tmp_path / "packed")
    (packed / "model.safetensors").unlink()
    write_manifest(packed, gguf)
    check_base(packed, adapter)
    write_manifest(packed, msgspec.structs.replace(gguf, parents={**gguf.parents, "adapter": manifest_sha256(adapter)}))
    with pytest.raises(WeightsError, match="another base"):
        check_base(packed, adapter)


def test_a_bare_gguf_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    base, bare = make_base(tmp_path / "base"), make_base(tmp_path / "bare")
    (bare / "manifest.json").unlink()
    (bare / "model.gguf").write_bytes(b"packed")
    packed = sha256_file(bare / "model.gguf")
    check_base(bare, make_adapter(tmp_path / "a", base, facts={"base_weights": {"b.gguf": packed}}), gguf=bare / "model.gguf")
    with pytest.raises(WeightsError, match="another base"):
        check_base(bare, make_adapter(tmp_path / "b", base), gguf=bare / "model.gguf")
