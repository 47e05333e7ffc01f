"""Tokenizers in GGUF: llama.cpp's ids are transformers', and what it would read otherwise is refused."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from chaccu.conversation import TextTokenizer
from chaccu.errors import WeightsError
from chaccu.weights.gguf_vocabulary import write_vocabulary
from chaccu.weights.word_patterns import WORD_PATTERNS

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("gguf", reason="the train extra is not installed")

from chaccu.testing.generated_texts import CODE, SCRIPTS, WORDS, draw_texts
from chaccu.testing.tiny import build_model
from chaccu.weights.gguf_export import export_gguf
from chaccu.weights.gguf_import import import_gguf

TINY_TEXTS = [" ".join(WORDS), *SCRIPTS, *CODE, "a story about a llama who told the story of the llama 12 123 1234"]


def build_byte_level(folder: Path, pattern: str) -> Path:
    """A tiny byte-level BPE that cuts by one of `WORD_PATTERNS`."""
    known = WORD_PATTERNS[pattern]
    backend = Tokenizer(models.BPE(ignore_merges=known.whole_words))
    if known.normalizer is not None:
        backend.normalizer = known.normalizer
    backend.pre_tokenizer, backend.decoder = known.pre_tokenizer, decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TINY_TEXTS, trainer)
    backend.add_tokens([AddedToken("[INST]", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    return save(backend, folder)


def build_sentencepiece(folder: Path) -> Path:
    """The LLaMA-like SentencePiece vocabulary of 32,000 tokens that ships with mistral-common."""
    from benchmarks.llama_tokenizer import write_tokenizer_folder

    spec = importlib.util.find_spec("mistral_common")
    places = list(spec.submodule_search_locations or []) if spec else []
    model = next((file for place in places if (file := Path(place) / "data" / "tokenizer.model.v1").is_file()), None)
    if model is None:
        pytest.skip("mistral-common is not installed")
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    write_tokenizer_folder(model, folder)
    return save(Tokenizer.from_file(str(folder / "tokenizer.json")), folder)


def build_small_sentencepiece(folder: Path, **changes: Any) -> Path:
    """A few merges with byte fallback, in the order of SentencePiece's conversion; `changes` are made to its definition."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlorstuy.,"]
    made = ["▁a", "he", "▁t", "llo", "ll", "▁the", "▁▁", "▁▁▁", "▁▁▁▁", "▁the▁"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *made])}
    merges = [
        pair
        for token in made
        for cut in range(len(token) - 1, 0, -1)
        if (pair := (token[:cut], token[cut:]))[0] in vocabulary and pair[1] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    definition = {**json.loads(backend.to_str()), "normalizer": normalizer, **changes}
    return save(Tokenizer.from_str(json.dumps(definition)), folder)


def save(backend: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def with_model(tokenizer: Path, folder: Path, rows: int) -> Path:
    """A tiny LLaMA that has so many rows for the tokenizer's ids."""
    build_model(folder, "llama", vocab_size=rows, num_hidden_layers=1)
    (folder / "manifest.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def compare(folder: Path, gguf: Path, texts: list[str], work: Path) -> None:
    """llama.cpp's ids of `texts` are transformers', control tokens read as text and as tokens; and those of the way back."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    import transformers

    from chaccu.testing.llama_logits import LlamaLogits

    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    import_gguf(gguf, work / "back", chat_format="raw", dtype="float32")
    back = TextTokenizer.load(work / "back")
    plain = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert back.encode_texts(texts, first=[True] * len(texts)) == plain
    with LlamaLogits(gguf) as llama:
        assert llama.tokenize(texts) == plain
        assert llama.tokenize(texts, special=True) == theirs(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("pattern", WORD_PATTERNS)
def test_byte_level_ids_are_the_same_for_5000_texts(pattern: str, tmp_path: Path) -> None:
    # llama.cpp does not compose characters, as the manifest says.
    texts = [unicodedata.normalize("NFC", text) if pattern == "qwen2" else text for text in draw_texts(5000)]
    folder = with_model(build_byte_level(tmp_path / "tokenizer", pattern), tmp_path / "hf", rows=448)
    manifest = export_gguf(folder, tmp_path / "gguf")
    assert bool(manifest.facts.get("tokenizer_differences")) == (pattern == "qwen2")
    compare(folder, tmp_path / "gguf" / "model.gguf", texts, tmp_path)


def test_sentencepiece_ids_are_the_same_for_5000_texts(tmp_path: Path) -> None:
    folder = with_model(build_sentencepiece(tmp_path / "tokenizer"), tmp_path / "hf", rows=32000)
    export_gguf(folder, tmp_path / "gguf")
    compare(folder, tmp_path / "gguf" / "model.gguf", draw_texts(5000), tmp_path)


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_small_sentencepiece_vocabulary_is_the_same_without_any_package(adds_space: bool, tmp_path: Path) -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    changes = {} if adds_space else {"normalizer": replace}
    folder = with_model(build_small_sentencepiece(tmp_path / "tokenizer", **changes), tmp_path / "hf", rows=300)
    export_gguf(folder, tmp_path / "gguf")
    compare(folder, tmp_path / "gguf" / "model.gguf", draw_texts(500), tmp_path)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def test_a_mark_for_the_first_word_alone_is_written_and_the_difference_named(tmp_path: Path) -> None:
    folder = build_small_sentencepiece(tmp_path, normalizer=None, pre_tokenizer=METASPACE)
    vocabulary = write_vocabulary(folder, 300)
    assert vocabulary.pairs["tokenizer.ggml.add_space_prefix"] is True
    assert "behind a control token" in vocabulary.differences[0]


def change(folder: Path, changing: Callable[[dict[str, Any]], None]) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    changing(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))


def drop_pair(definition: dict[str, Any]) -> None:
    definition["model"]["merges"].remove(["ll", "o"])


def mix(definition: dict[str, Any], order: list[tuple[int, int]]) -> None:
    """Put the merges that make three and four spaces into `order` (lengths of left and right), behind all others."""
    merges = definition["model"]["merges"]
    others = [pair for pair in merges if set("".join(pair)) != {"▁"} or len("".join(pair)) < 3]
    definition["model"]["merges"] = others + [["▁" * left, "▁" * right] for left, right in order]


@pytest.mark.parametrize(
    ("order", "known"), [([(3, 1), (2, 2), (2, 1), (1, 3), (1, 2)], True), ([(2, 1), (2, 2), (3, 1), (1, 3), (1, 2)], False)]
)
def test_merges_that_are_mixed_have_one_score_if_a_score_can_say_their_order(
    order: list[tuple[int, int]], known: bool, tmp_path: Path
) -> None:
    folder = build_small_sentencepiece(tmp_path)
    change(folder, lambda one: mix(one, order))
    if not known:
        with pytest.raises(WeightsError, match="orders its merges in a way that no scores say"):
            write_vocabulary(folder, 300)
        return
    pairs: dict[str, Any] = write_vocabulary(folder, 300).pairs
    scores = dict(zip(pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.scores"].tolist(), strict=True))
    assert scores["▁▁▁"] == scores["▁▁▁▁"] < scores["▁▁"] < 0


@pytest.mark.parametrize(
    ("changing", "message"),
    [
        (lambda one: one["pre_tokenizer"].update(add_prefix_space=True), "cuts text into words in a way that llama"),
        (lambda one: one["model"].update(ignore_merges=True), "has ignore_merges True"),
        (lambda one: one["model"].update(dropout=0.1), "of the kind BPE dropout"),
        (lambda one: one["added_tokens"][0].update(lstrip=True), "matches '<s>' with lstrip"),
        (lambda one: one["post_processor"]["single"].reverse(), "adds more to a text than its BOS and EOS"),
        (lambda one: one.update(normalizer={"type": "Lowercase"}), "with the normalizer .*Lowercase"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_byte_level_tokenizer_that_llama_cpp_does_not_know_is_refused(
    changing: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = build_byte_level(tmp_path, "gpt-2")
    change(folder, changing)
    with pytest.raises(WeightsError, match=message):
        write_vocabulary(folder, 448)


@pytest.mark.parametrize(
    ("changes", "changing", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, lambda _: None, "prepares text in a way"),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "split": True}}, lambda _: None, "prepares text in a way"),
        ({}, drop_pair, "never merges 'll' with 'o', which llama.cpp would: 'llo' is a token"),
        ({}, lambda one: one["model"]["vocab"].pop("<0x41>"), "no token for the byte '<0x41>'"),
    ],
)
def test_a_sentencepiece_like_tokenizer_that_no_scores_say_is_refused(
    changes: dict[str, Any], changing: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = build_small_sentencepiece(tmp_path, **changes)
    change(folder, changing)
    with pytest.raises(WeightsError, match=message):
        write_vocabulary(folder, 300)


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    folder = build_byte_level(tmp_path, "gpt-2")
    with pytest.raises(WeightsError, match=r"ids up to \d+, and the model's embedding has 300 rows"):
        write_vocabulary(folder, 300)


def test_the_end_of_a_turn_and_rows_without_a_token_are_written(tmp_path: Path) -> None:
    vocabulary = write_vocabulary(build_byte_level(tmp_path, "llama-bpe"), 448, turn_end="<|im_end|>")
    pairs: dict[str, Any] = vocabulary.pairs
    assert pairs["tokenizer.ggml.eot_token_id"] == 3
    assert pairs["tokenizer.ggml.tokens"][447] == "[PAD447]"
    assert pairs["tokenizer.ggml.token_type"].tolist()[447] == 5
    assert (pairs["tokenizer.ggml.add_bos_token"], pairs["tokenizer.ggml.add_eos_token"]) == (True, False)
