"""Perplexity: every token counted once, after enough of the text, and in a unit that tokenizers share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from chaccu.conversation import TextTokenizer
from chaccu.errors import StorageError, WeightsError
from chaccu.testing.tiny import build_llama, build_tokenizer

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from chaccu.weights.perplexity import foretelling, load_model, measure_perplexity, read_text  # noqa: E402 (torch may be absent)

TEXT = "What colour is the sky at noon? The sky is blue — and the grass below it is green. " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def without_bos(tokenizer: TextTokenizer) -> TextTokenizer:
    return TextTokenizer(tokenizer._backend)


@pytest.mark.parametrize("has_bos", [True, False])
def test_who_knows_nothing_is_as_perplexed_as_the_vocabulary_is_large(tokenizer: TextTokenizer, has_bos: bool) -> None:
    tokenizer = tokenizer if has_bos else without_bos(tokenizer)
    ids = tokenizer.encode_texts([TEXT], first=[True])[0]
    seen: list[tuple[int, int]] = []
    found = measure_perplexity(
        lambda ids_T, count: torch.zeros(count, 400),
        tokenizer,
        TEXT,
        window=64,
        stride=24,
        progress=lambda *at: seen.append(at),
    )
    counted = len(ids) if has_bos else len(ids) - 1
    unseen = 0 if has_bos else len(tokenizer.decode(ids[:1]).encode())
    assert (found.tokens, found.bytes, found.window, found.stride) == (counted, len(TEXT.encode()) - unseen, 64, 24)
    assert found.perplexity == pytest.approx(400, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(400) * counted / found.bytes, rel=1e-6)
    assert seen[-1] == (counted, counted)


def test_every_token_is_foretold_once_after_enough_of_the_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_texts([TEXT], first=[True])[0]
    foretold: list[int] = []

    def foretell(ids_T: torch.Tensor, count: int) -> torch.Tensor:
        given = ids_T.tolist()
        assert given[0] == tokenizer.bos_id
        assert len(given) <= 64
        # Which part of the text this is, by what came before.
        begin = len(foretold) - (len(given) - count)
        assert given[1:] == ids[begin : begin + len(given) - 1]
        assert not foretold or len(given) - count >= 64 - 24
        foretold.extend(ids[len(foretold) : len(foretold) + count])
        return torch.zeros(count, 400)

    measure_perplexity(foretell, tokenizer, TEXT, window=64, stride=24)
    assert foretold == ids


@pytest.mark.parametrize("window", [4096, 128])
def test_a_model_s_is_that_of_its_likelihoods(tmp_path: Path, window: int) -> None:
    folder = build_llama(tmp_path / "base", max_position_embeddings=4096)
    model, tokenizer = load_model(folder), TextTokenizer.load(folder)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode_texts([TEXT], first=[True])[0]]])
    found = measure_perplexity(foretelling(model), tokenizer, TEXT, window=window, stride=64)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    # In one window it is the very same; in short ones the model, which is random, hardly does worse.
    assert math.log(found.perplexity) == pytest.approx(expected, rel=1e-5 if window == 4096 else 0.02)


def test_texts_and_models_that_give_no_figure_are_errors(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert len(read_text(None).encode()) > 20_000
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(WeightsError, match="holds no text"):
        read_text(tmp_path / "empty")
    with pytest.raises(WeightsError, match="no text in UTF-8: byte 2 is 0xf6"):
        read_text(tmp_path / "latin")
    with pytest.raises(StorageError, match="no file"):
        read_text(tmp_path / "missing")
    with pytest.raises(WeightsError, match="nothing to foretell"):
        measure_perplexity(lambda ids, count: torch.zeros(count, 400), without_bos(tokenizer), "a")
    with pytest.raises(WeightsError, match="not numbers"):
        measure_perplexity(lambda ids, count: torch.full((count, 400), math.nan), tokenizer, TEXT)
