"""SentencePiece's models, read without its library, and compared with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from chaccu.errors import WeightsError
from chaccu.weights.sentencepiece_file import read_sentencepiece

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

TEXTS = ["The quick brown fox jumps over the lazy dog.", "A vicuña is small, and lives in the Andes.", "One, two, three: 123."]
LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 340, **LLAMA, **options},
    )
    path.write_bytes(model.getvalue())
    return path


def test_pieces_scores_and_types_are_the_librarys(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model", user_defined_symbols=["<sep>"])
    model = read_sentencepiece(path)
    known = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(known.get_piece_size())
    assert model.pieces == [known.id_to_piece(index) for index in ids]
    assert model.scores == [known.get_score(index) for index in ids]
    assert [kind in (3, 2) for kind in model.types] == [known.is_control(index) or known.is_unknown(index) for index in ids]
    assert [kind == 6 for kind in model.types] == [known.is_byte(index) for index in ids]
    assert model.types[model.pieces.index("<sep>")] == 4
    assert (model.unknown, model.obstacle, model.adds_space) == ("<unk>", "", True)
    assert not read_sentencepiece(train(path, add_dummy_prefix=False)).adds_space


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"model_type": "unigram", "vocab_size": 300}, "no BPE"),
        ({"byte_fallback": False, "vocab_size": 60}, "as bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "repeated spaces"),
        ({"treat_whitespace_as_suffix": True}, "behind words"),
    ],
)
def test_what_no_bpe_is_equal_to_is_said(tmp_path: Path, options: dict[str, Any], obstacle: str) -> None:
    assert obstacle in read_sentencepiece(train(tmp_path / "tokenizer.model", **options)).obstacle


@pytest.mark.parametrize("data", [b"", b"GGUF" + bytes(60), b"\x0a\xff\xff\xff\xff\x7f", b"\xff" * 40, b"{}", b"\x0a\x02\x08"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(WeightsError, match="no SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_a_model_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="cut off"):
        read_sentencepiece(path)
