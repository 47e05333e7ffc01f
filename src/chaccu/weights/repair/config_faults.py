"""Faults of config.json and generation_config.json, and of JSON itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from chaccu.weights.repair.draft import CONFIG, GENERATION, TOKENIZER_CONFIG, Draft, Finding

# As transformers wrote them before version 4.28.
_OLD_CLASS = re.compile(r"LLaMA(ForCausalLM|ForSequenceClassification|Model|TokenizerFast|Tokenizer|Config)")
_CLASS_KEYS = ("architectures", "tokenizer_class", "config_class", "model_type")
_POSITIONS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx", "seq_length")
# A real one is below it; what stands for "none" is 1e30 and the like.
_LONGEST_CONTEXT = 1e9


def find_broken_json(draft: Draft) -> Iterator[Finding]:
    """JSON that other readers refuse: a byte order mark, commas before closing brackets; and a missing config.json."""
    for name, document in draft.documents.items():
        if not document.problem:
            continue
        if document.value is None:
            yield Finding(name, document.problem, "mend it by hand, or fetch it again", mendable=False)
        else:
            draft.contents[name] = document.text
            yield Finding(name, document.problem, "is written without")
    if CONFIG not in draft.documents:
        yield Finding(
            CONFIG, "is missing: nothing says what the weights are of", "fetch it from where they are from", mendable=False
        )


def find_old_class_names(draft: Draft) -> Iterator[Finding]:
    """`LLaMA…`, as LLaMA's classes were called in transformers for some weeks."""
    for name in (CONFIG, TOKENIZER_CONFIG):
        value = draft.get(name) or {}
        changed = {key: _rename_class(key, value[key]) for key in _CLASS_KEYS if key in value}
        changed = {key: new for key, new in changed.items() if new != value[key]}
        if changed:
            said = ", ".join(f"{key} is {_shown(value[key])}" for key in changed)
            remedy = f"becomes {', '.join(_shown(new) for new in changed.values())}"
            yield Finding(name, f"{said}, which transformers does not know", remedy, diff=draft.put(name, {**value, **changed}))


def _rename_class(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_rename_class(key, part) for part in value]
    if not isinstance(value, str):
        return value
    if key == "model_type":
        return "llama" if value.removesuffix("Config").lower() == "llama" else value
    new = _OLD_CLASS.sub(r"Llama\1", value)
    return "LlamaForCausalLM" if key == "architectures" and new == "LlamaConfig" else new


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def note_remote_code(draft: Draft) -> Iterator[Finding]:
    """Code that the folder asks to be run. It is not, here or when Chaccu loads the folder."""
    for name in (CONFIG, TOKENIZER_CONFIG):
        if named := (draft.get(name) or {}).get("auto_map"):
            classes = named.values() if isinstance(named, dict) else named
            draft.notes.append(f"{name} names code of its own in auto_map ({_shown(list(classes))}), which is never run here.")
    return iter(())


def find_wrong_dtype(draft: Draft) -> Iterator[Finding]:
    """A dtype that is missing, not spelt as transformers reads it, or not that of most of the weights."""
    held = draft.get(CONFIG)
    if held is None or draft.weights is None or held.get("quantization_config"):
        return
    sizes: Counter[str] = Counter()
    for name, spec in draft.weights.entries.items():
        if spec.dtype.is_floating_point and name not in draft.left_out:
            sizes[str(spec.dtype).removeprefix("torch.")] += spec.size_bytes
    if not sizes:
        return
    dtype = sizes.most_common(1)[0][0]
    keys = [key for key in ("dtype", "torch_dtype") if held.get(key) is not None]
    # What each part of a composite model has is its own affair.
    if any(isinstance(held[key], dict) for key in keys) or (not keys and held is not draft.text_config):
        return
    wrong = [key for key in keys if held[key] != dtype]
    if keys and not wrong:
        return
    problem = (
        f"{wrong[0]} is {held[wrong[0]]}, and the weights are {dtype}" if wrong else f"has no dtype; the weights are {dtype}"
    )
    diff = draft.put(CONFIG, {**held, **dict.fromkeys(wrong or ["torch_dtype"], dtype)})
    yield Finding(CONFIG, problem, f"says {dtype}", diff=diff)


def find_wrong_vocabulary_size(draft: Draft) -> Iterator[Finding]:
    """A `vocab_size` that is not the number of the embedding's rows."""
    embedding, head, held = draft.find_embedding(), draft.find_head(), draft.get(CONFIG)
    if embedding is None or held is None or held.get("quantization_config"):
        return
    rows = embedding.shape[0]
    if head is not None and head.shape[0] != rows:
        yield Finding(
            draft.weights.places[head.name] if draft.weights else "",
            f"{head.name} has {head.shape[0]:,} rows and {embedding.name} {rows:,}",
            "take the model from another place",
            mendable=False,
        )
        return
    size = draft.text_config.get("vocab_size")
    if size == rows:
        return
    is_inner = draft.text_config is not held
    if size is None and is_inner:
        # A part of a composite model may leave it to its class.
        return
    value = {**held, "text_config": {**draft.text_config, "vocab_size": rows}} if is_inner else {**held, "vocab_size": rows}
    diff = draft.put(CONFIG, value)
    yield Finding(CONFIG, f"vocab_size is {size}, and {embedding.name} has {rows:,} rows", f"becomes {rows}", diff=diff)


def find_missing_generation_config(draft: Draft) -> Iterator[Finding]:
    """No generation_config.json: where to stop then depends on the version of transformers."""
    held = draft.get(CONFIG)
    if held is None or GENERATION in draft.documents or GENERATION in draft.contents:
        return
    ids = {key: held[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if held.get(key) is not None}
    diff = draft.put(GENERATION, {"_from_model_config": True, **ids})
    yield Finding(GENERATION, "is missing", "is written with the config's special tokens", diff=diff)


def find_endless_context(draft: Draft) -> Iterator[Finding]:
    """A `model_max_length` that stands for "not known": texts are then never cut."""
    held = draft.get(TOKENIZER_CONFIG)
    longest = (held or {}).get("model_max_length")
    if held is None or not isinstance(longest, int | float) or longest < _LONGEST_CONTEXT:
        return
    positions = next((draft.text_config[key] for key in _POSITIONS if type(draft.text_config.get(key)) is int), None)
    if positions is None:
        yield Finding(
            TOKENIZER_CONFIG,
            f"model_max_length is {longest:g}",
            "set it: the config does not say the positions",
            mendable=False,
        )
        return
    diff = draft.put(TOKENIZER_CONFIG, {**held, "model_max_length": positions})
    yield Finding(TOKENIZER_CONFIG, f"model_max_length is {longest:g}", f"becomes {positions}, as the config has it", diff=diff)
