"""The faults that are looked for, in the order in which they are mended: what a later one reads, an earlier one has settled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from chaccu.errors import WeightsError
from chaccu.weights.repair import config_faults, token_faults, tokenizer_faults, weights_faults, writing
from chaccu.weights.repair.draft import Draft, Finding, RepairOptions

FAULTS: dict[str, Callable[[Draft], Iterator[Finding]]] = {
    "json": config_faults.find_broken_json,
    "class-names": config_faults.find_old_class_names,
    "remote-code": config_faults.note_remote_code,
    "weights": weights_faults.find_unreadable_weights,
    "stopped-mending": weights_faults.find_stopped_mending,
    "rotary-buffers": weights_faults.find_rotary_buffers,
    "pickled-index": weights_faults.find_stale_pickled_index,
    "dtype": config_faults.find_wrong_dtype,
    "vocabulary-size": config_faults.find_wrong_vocabulary_size,
    "tokenizer": tokenizer_faults.find_missing_tokenizer,
    "special-tokens": token_faults.find_wrong_texts,
    "special-ids": token_faults.find_wrong_ids,
    "generation-config": config_faults.find_missing_generation_config,
    "context-length": config_faults.find_endless_context,
    "missing-rows": tokenizer_faults.find_missing_rows,
    "chat-template": tokenizer_faults.find_wrong_template,
    "manifest": writing.find_stale_manifest,
}


def examine_folder(folder: Path, options: RepairOptions | None = None) -> Draft:
    """What is wrong in a model folder, and how it would be mended; nothing is changed.

    Raises `WeightsError` when there is no such folder, `StorageError` when a file cannot be read, `UsageError` for an unknown
    format.
    """
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder}.", remedy="name a folder with config.json and weights")
    draft = Draft(folder, options or RepairOptions())
    for name, find in FAULTS.items():
        draft.findings += [msgspec.structs.replace(finding, fault=name) for finding in find(draft)]
    return draft
