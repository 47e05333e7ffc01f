from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from chaccu.conversation import TextTokenizer
from chaccu.errors import TokenizerError

from .small_tokenizers import KINDS, build_tokenizer


def save(kind: str, folder: Path, config: object = None) -> TextTokenizer:
    tokenizer = build_tokenizer(kind)
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_with_its_named_tokens(kind: str, tmp_path: Path) -> None:
    bos, eos = build_tokenizer(kind).bos_token, build_tokenizer(kind).eos_token
    built = save(kind, tmp_path, {"bos_token": bos, "eos_token": {"content": eos, "lstrip": False}})
    loaded = TextTokenizer.load(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.bos_id) == (bos, eos, built.bos_id)
    assert (loaded.adds_bos, loaded.vocab_size, loaded.sha256) == (built.adds_bos, built.vocab_size, built.sha256)
    texts = ["Hello", " <s> there\n", ""]
    first = [True, False, False]
    sent = pickle.loads(pickle.dumps(loaded))
    assert (sent.bos_token, sent.eos_token, sent.adds_bos, sent.sha256) == (bos, eos, built.adds_bos, built.sha256)
    for tokenizer in (loaded, sent):
        assert tokenizer.encode_texts(texts, first=first) == built.encode_texts(texts, first=first)


def test_only_some_kinds_add_bos_and_only_llama_s_marks_first_words() -> None:
    assert [build_tokenizer(kind).adds_bos for kind in KINDS] == [False, True, True]
    for kind in KINDS:
        tokenizer = build_tokenizer(kind)
        begun, continued = tokenizer.encode_texts(["user", "user"], first=[True, False])
        assert tokenizer.decode(begun) == (" user" if kind == "sentencepiece" else "user")
        assert tokenizer.decode(continued) == "user"


def test_without_a_configuration_no_token_is_named(tmp_path: Path) -> None:
    save("byte_level", tmp_path)
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.bos_token, loaded.eos_token, loaded.bos_id, loaded.adds_bos) == ("", "", None, False)


def test_truncation_and_padding_of_a_saved_file_are_switched_off(tmp_path: Path) -> None:
    whole = save("byte_level", tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    texts = ["a long text that would be cut"]
    assert TextTokenizer.load(tmp_path).encode_texts(texts, first=[True]) == whole.encode_texts(texts, first=[True])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    save("byte_level", tmp_path, {})
    (tmp_path / name).write_text("{")
    with pytest.raises(TokenizerError, match="is not a readable tokenizer"):
        TextTokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_metaspace_mark_is_left_out_of_continued_text_too(scheme: str) -> None:
    backend = Tokenizer.from_str(build_tokenizer("sentencepiece")._backend.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = TextTokenizer(backend)
    known = build_tokenizer("sentencepiece")
    texts = ["user", "user", " user", "\n\nuser"]
    first = [True, False, False, False]
    assert tokenizer.encode_texts(texts, first=first) == known.encode_texts(texts, first=first)
