"""A small LLaMA folder with SentencePiece's tokenizer, and what is done to such folders in the wild: one function a fault."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from chaccu.testing.tiny import build_model

VOCABULARY = 420
_TEXTS = (
    *(
        "A chat between a curious user and an artificial intelligence assistant.",
        "What is a vicuña? A small relative of the llama.",
    ),
    *("The quick brown fox jumps over the lazy dog, and the dog sleeps on.", "It costs 3,141.59 in 2024 and 42 in 1999."),
    *("def largest(numbers):\n    return max(numbers)", "How do I boil an egg? Put it into hot water and wait."),
)
TEXTS = ("What is  a vicuña?", "  def f(x):\n\treturn x", "🦙 42", "The answer is wait")


def build_sound(folder: Path) -> Path:
    """Weights in float32 in one file, LlamaTokenizer with tokenizer.json and tokenizer.model, as transformers writes them."""
    build_model(folder, "llama", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (folder / name).unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder, add_bos_token=True, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; None takes one out."""
    value = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
    path.write_text(json.dumps({key: one for key, one in value.items() if one is not None}, indent=2))


def shard(folder: Path, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Take the one file of weights away, and give its tensors in `count` parts."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    return [{name: tensors[name] for name in names[at::count]} for at in range(count)]


def write_shards(folder: Path) -> None:
    parts = shard(folder)
    for at, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{at:05}-of-{len(parts):05}.safetensors", metadata={"format": "pt"})
    places = {name: f"model-{at:05}-of-{len(parts):05}.safetensors" for at, part in enumerate(parts, 1) for name in part}
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=places)


def write_pickle(folder: Path, *, parts: int = 1, tie: bool = False, **options: Any) -> None:
    """The weights as `torch.save` writes them, `parts` files with an index."""
    shards = shard(folder, parts)
    if tie:
        shards[0]["lm_head.weight"] = shards[0]["model.embed_tokens.weight"]
    if parts == 1:
        torch.save(shards[0], folder / "pytorch_model.bin", **options)
        return
    names = [f"pytorch_model-{at:05}-of-{parts:05}.bin" for at in range(1, parts + 1)]
    for name, part in zip(names, shards, strict=True):
        torch.save(part, folder / name, **options)
    places = {tensor: name for name, part in zip(names, shards, strict=True) for tensor in part}
    edit(folder / "pytorch_model.bin.index.json", metadata={"total_size": 0}, weight_map=places)


def _old_class_names(folder: Path) -> None:
    edit(folder / "config.json", architectures=["LLaMAForCausalLM"])
    edit(folder / "tokenizer_config.json", tokenizer_class="LLaMATokenizer")


def _decapoda(folder: Path) -> None:
    """As decapoda-research's folders were."""
    _old_class_names(folder)
    edit(folder / "config.json", bos_token_id=0, eos_token_id=0, pad_token_id=-1, torch_dtype="float32", dtype=None)
    edit(folder / "generation_config.json", bos_token_id=0, eos_token_id=0, pad_token_id=0)
    (folder / "tokenizer.json").unlink()
    texts = {"bos_token": "", "eos_token": "", "unk_token": "", "model_max_length": 1e30, "tokenizer_class": "LLaMATokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    (folder / "special_tokens_map.json").write_text("{}")
    write_pickle(folder, parts=3)


def _unknown_as_padding(folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=0)
    edit(folder / "generation_config.json", pad_token_id=0)
    edit(folder / "tokenizer_config.json", pad_token="<unk>")


def _special_tokens_junk(folder: Path) -> None:
    junk = {"bos_token": "AddedToken('<s>', rstrip=False, lstrip=False)", "eos_token": {"content": ""}, "unk_token": ""}
    edit(folder / "special_tokens_map.json", **junk)


def _token_objects(folder: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    edit(folder / "tokenizer_config.json", bos_token={"content": "<s>", **flags})
    edit(folder / "special_tokens_map.json", eos_token={"__type": "AddedToken", "content": "</s>", **flags})


def _two_ends(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<s>")
    edit(folder / "special_tokens_map.json", eos_token="</s>")


def _rotary(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _not_quite_json(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}").rstrip() + ",\n}\n"
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "generation_config.json").read_bytes())


def _missing_index(folder: Path) -> None:
    write_shards(folder)
    (folder / "model.safetensors.index.json").unlink()


def _wrong_index(folder: Path) -> None:
    write_shards(folder)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=dict.fromkeys(places, "model-00001-of-00002.safetensors"))


def _index_of_others(folder: Path) -> None:
    edit(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "model-00001-of-00007.safetensors"})


# The fault's names by what is done, and the doing.
BROKEN: dict[str, tuple[set[str], Callable[[Path], None]]] = {
    "old class names": ({"class-names"}, _old_class_names),
    "LLaMAConfig as model type": ({"class-names"}, lambda folder: edit(folder / "config.json", model_type="LLaMAConfig")),
    "decapoda": (
        {"class-names", "weights", "tokenizer", "special-tokens", "special-ids", "context-length"},
        _decapoda,
    ),
    "unknown token as padding": ({"special-ids", "special-tokens"}, _unknown_as_padding),
    "padding of -1": ({"special-ids"}, lambda folder: edit(folder / "config.json", pad_token_id=-1)),
    "id beyond the vocabulary": ({"special-ids"}, lambda folder: edit(folder / "generation_config.json", eos_token_id=32000)),
    "ends disagree": (
        {"special-ids"},
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[0, 7], bos_token_id=2),
    ),
    "junk in special_tokens_map": ({"special-tokens"}, _special_tokens_junk),
    "token objects of each other's form": ({"special-tokens"}, _token_objects),
    "two ends of text": ({"special-tokens"}, _two_ends),
    "endless context": ({"context-length"}, lambda folder: edit(folder / "tokenizer_config.json", model_max_length=int(1e30))),
    "no generation config": ({"generation-config"}, lambda folder: (folder / "generation_config.json").unlink()),
    "no dtype": ({"dtype"}, lambda folder: edit(folder / "config.json", dtype=None)),
    "another dtype": ({"dtype"}, lambda folder: edit(folder / "config.json", dtype="float16")),
    "dtype spelt as torch does": ({"dtype"}, lambda folder: edit(folder / "config.json", dtype="torch.float32")),
    "vocabulary size": ({"vocabulary-size"}, lambda folder: edit(folder / "config.json", vocab_size=VOCABULARY + 1)),
    "a pickle": ({"weights"}, write_pickle),
    "a pickle of the older layout": ({"weights"}, lambda folder: write_pickle(folder, _use_new_zipfile_serialization=False)),
    "pickled shards": ({"weights"}, lambda folder: write_pickle(folder, parts=3)),
    "no index": ({"weights"}, _missing_index),
    "an index that is wrong": ({"weights"}, _wrong_index),
    "an index of other files": ({"weights"}, lambda folder: None),
    "an index of pickles that are gone": (
        {"pickled-index"},
        lambda folder: edit(
            folder / "pytorch_model.bin.index.json", weight_map={"model.norm.weight": "pytorch_model-00001-of-00002.bin"}
        ),
    ),
    "rotary buffers": ({"rotary-buffers"}, _rotary),
    "not quite JSON": ({"json"}, _not_quite_json),
    "no tokenizer.json": ({"tokenizer"}, lambda folder: (folder / "tokenizer.json").unlink()),
}


def _useless_index(folder: Path) -> None:
    places = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=places)


BROKEN["an index of other files"] = ({"weights"}, _useless_index)


def copy(sound: Path, folder: Path) -> Path:
    shutil.copytree(sound, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by its name in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
