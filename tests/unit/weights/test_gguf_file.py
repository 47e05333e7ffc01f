"""Reading and writing GGUF files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from chaccu.errors import WeightsError
from chaccu.weights.gguf_file import GgufFile, integer_pair, string_pair, write_gguf
from chaccu.weights.gguf_tensors import swap_rotary_halves

gguf = pytest.importorskip("gguf", reason="the train extra is not installed")
F32, Q8_0 = 0, 8


def write_small(path: Path) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = {"small": generator.normal(size=(3,)), "blk.0.attn_q.weight": generator.normal(size=(4, 64))}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    packed = {
        "small": values["small"],
        "blk.0.attn_q.weight": gguf.quants.quantize(values["blk.0.attn_q.weight"], gguf.GGMLQuantizationType.Q8_0),
    }
    pairs = (2, string_pair("general.architecture", "llama") + integer_pair("llama.block_count", 1))
    table = [("small", (3,), F32), ("blk.0.attn_q.weight", (4, 64), Q8_0)]
    with path.open("wb") as file:
        written = list(write_gguf(file, pairs=pairs, tensors=table, packed=packed.__getitem__))
    assert written[-1] == 3 * 4 + 4 * 64 // 32 * 34
    return values


def test_what_is_written_is_read(tmp_path: Path) -> None:
    values = write_small(tmp_path / "small.gguf")
    file = GgufFile(tmp_path / "small.gguf")
    assert file.architecture == "llama"
    assert file.get("llama.block_count") == 1
    assert file.get("absent", "default") == "default"
    np.testing.assert_array_equal(file.dequantized("small"), values["small"])
    np.testing.assert_allclose(file.dequantized("blk.0.attn_q.weight"), values["blk.0.attn_q.weight"], atol=0.02)


def test_the_gguf_package_reads_it_too(tmp_path: Path) -> None:
    write_small(tmp_path / "small.gguf")
    ours, theirs = GgufFile(tmp_path / "small.gguf"), gguf.GGUFReader(tmp_path / "small.gguf")
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(tensor.data.reshape(-1).view(np.uint8), ours.packed(tensor.name))


def test_a_cut_file_says_how_much_is_missing(tmp_path: Path) -> None:
    whole = tmp_path / "small.gguf"
    write_small(whole)
    data = whole.read_bytes()
    for kept in (len(data) - 40, 60, 30):
        (tmp_path / "cut.gguf").write_bytes(data[:kept])
        with pytest.raises(WeightsError, match="cut off"):
            GgufFile(tmp_path / "cut.gguf")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(WeightsError, match="not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + bytes(8))
    with pytest.raises(WeightsError, match="version 99"):
        GgufFile(tmp_path / "y.gguf")


def test_pairs_are_carried_over_but_the_dropped(tmp_path: Path) -> None:
    write_small(tmp_path / "small.gguf")
    file = GgufFile(tmp_path / "small.gguf")
    assert file.pairs_without() == (2, string_pair("general.architecture", "llama") + integer_pair("llama.block_count", 1))
    assert file.pairs_without("llama.block_count") == (1, string_pair("general.architecture", "llama"))


def test_rotary_halves_swap_back_and_forth() -> None:
    values = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    interleaved = swap_rotary_halves(values, heads=2, inverse=False)
    assert interleaved[:4, 0].tolist() == [0.0, 12.0, 3.0, 15.0]
    np.testing.assert_array_equal(swap_rotary_halves(interleaved, heads=2, inverse=True), values)
