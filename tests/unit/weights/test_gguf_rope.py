"""Stretched positions in a GGUF file's metadata, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chaccu.errors import WeightsError
from chaccu.weights.gguf_file import GgufFile, integer_pair, string_pair, write_gguf
from chaccu.weights.gguf_rope import read_rope, stretch_pairs

pytest.importorskip("gguf", reason="the train extra is not installed")
CONTEXT = "llama.context_length"


def write_pairs(path: Path, count: int, pairs: bytes) -> GgufFile:
    with path.open("wb") as file:
        list(write_gguf(file, pairs=(count, pairs), tensors=[], packed=lambda _: pytest.fail("there are no tensors")))
    return GgufFile(path)


def plain_file(path: Path) -> GgufFile:
    return write_pairs(path, 2, string_pair("general.architecture", "llama") + integer_pair(CONTEXT, 2048))


@pytest.mark.parametrize(
    ("rope", "read"),
    [
        ({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"full_attention": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048}},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048},
        ),
    ],
)
def test_a_stretch_is_written_and_read(rope: dict[str, Any], read: dict[str, Any], tmp_path: Path) -> None:
    plain = plain_file(tmp_path / "plain.gguf")
    assert read_rope(plain) == {"rope_type": "default"}
    changes = {"rope_parameters": rope, "max_position_embeddings": 16384}
    stretched = write_pairs(tmp_path / "stretched.gguf", *stretch_pairs(plain, changes))
    assert read_rope(stretched) == read
    assert stretched.get(CONTEXT) == 16384
    assert stretched.architecture == "llama"


def test_nothing_changes_without_a_stretch(tmp_path: Path) -> None:
    plain = plain_file(tmp_path / "plain.gguf")
    assert stretch_pairs(plain, {}) == plain.pairs_without()


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    plain = plain_file(tmp_path / "plain.gguf")
    with pytest.raises(WeightsError, match="rope_scaling llama3"):
        stretch_pairs(plain, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 1})
