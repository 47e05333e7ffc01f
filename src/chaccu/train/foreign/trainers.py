"""The trainers that a configuration can come from: their names for things, their defaults, and the table of their other keys.

Invariant: a name of a chat template stands for a format only where `keys.yaml` or the list of formats says so; none is guessed.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from typing import Any

import msgspec
import yaml

from chaccu.conversation import TOKENIZER_FORMAT, list_formats
from chaccu.errors import RecipeError


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer's names for what a recipe says, the usual one first, and the values that it takes where nothing is given."""

    title: str
    model: tuple[str, ...] = ("model_name_or_path",)
    length: tuple[str, ...]
    batch: tuple[str, ...] = ("per_device_train_batch_size", "per_gpu_train_batch_size")
    epochs: tuple[str, ...] = ("num_train_epochs",)
    scheduler: tuple[str, ...] = ("lr_scheduler_type",)
    optimizer: tuple[str, ...] = ("optim",)
    rank: tuple[str, ...] = ("lora_r", "lora_rank")
    targets: tuple[str, ...] = ("lora_target_modules", "lora_target")
    defaults: dict[str, Any]


# What a configuration must have one of, and what must be there beside it to tell it from the next ones.
_SIGNS: dict[str, tuple[set[str], set[str]]] = {
    "axolotl": ({"base_model"}, set()),
    "llama-factory": (
        {"model_name_or_path"},
        {"stage", "finetuning_type", "template", "cutoff_len", "dataset", "dataset_dir", "lora_rank", "lora_target"},
    ),
    "fastchat": ({"model_name_or_path"}, set()),
}
_TRAINER_DEFAULTS: dict[str, Any] = {
    "output_dir": "trainer_output",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "seed": 42,
}
DIALECTS = {
    "fastchat": Dialect(
        title="FastChat / Hugging Face Trainer",
        length=("model_max_length", "max_seq_length", "max_length"),
        defaults={
            **_TRAINER_DEFAULTS,
            "model_max_length": 512,
            "gradient_checkpointing": False,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "lora_target_modules": ["q_proj", "v_proj"],
            "precision": "fp32",
        },
    ),
    "axolotl": Dialect(
        title="axolotl",
        model=("base_model",),
        length=("sequence_len",),
        batch=("micro_batch_size",),
        epochs=("num_epochs",),
        scheduler=("lr_scheduler",),
        optimizer=("optimizer",),
        defaults={
            "output_dir": "./model-out",
            "sequence_len": 512,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optimizer": "adamw_torch_fused",
            "seed": 42,
            "gradient_checkpointing": False,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj"],
            "precision": "auto",
        },
    ),
    "llama-factory": Dialect(
        title="LLaMA-Factory",
        length=("cutoff_len",),
        rank=("lora_rank",),
        targets=("lora_target",),
        defaults={
            **_TRAINER_DEFAULTS,
            "cutoff_len": 2048,
            "finetuning_type": "lora",
            "gradient_checkpointing": True,
            "lora_rank": 8,
            "lora_dropout": 0.0,
            "lora_target": "all",
            "precision": "auto",
        },
    ),
}


def recognise_trainer(keys: Iterable[str], source: str) -> str:
    """Name of the trainer whose keys these are. Raises `RecipeError`."""
    given = set(keys)
    for name, (needed, telling) in _SIGNS.items():
        if given & needed and (not telling or given & telling):
            return name
    if {"model", "data"} <= given:
        raise RecipeError(f"{source} is a recipe of Chaccu's already.", remedy=f"chaccu train {source}")
    shown = ", ".join(sorted(given)[:5])
    raise RecipeError(
        f"{source} has the keys of no trainer that can be imported: {shown}{', …' if len(given) > 5 else ''}.",
        remedy=f"--from with one of {', '.join(DIALECTS)}, whose configurations begin with base_model or model_name_or_path",
    )


def find_entry(table: str, trainer: str, key: str) -> str | None:
    """What `keys.yaml` says of a key in `meaningless` or `unsupported`, or None."""
    for entries in (_read_tables()[table].get(trainer, {}), _read_tables()[table]["any"]):
        for pattern, entry in entries.items():
            if fnmatch.fnmatchcase(key, pattern):
                return str(entry)
    return None


def find_format(trainer: str, template: str) -> tuple[str | None, str]:
    """The chat format that a template's name stands for and in what the two differ; without one, None and what to do."""
    name = template.strip()
    own = {one.lower(): one for one in [*list_formats(), TOKENIZER_FORMAT]}
    tables = _read_tables()["formats"]
    entries = {**tables["any"], **own, **tables.get(trainer, {})}
    if name.lower().startswith("tokenizer_default_fallback_"):
        return TOKENIZER_FORMAT, f"set format by hand for a tokenizer without a template: {name} falls back there"
    entry = entries.get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), own, n=3, cutoff=0.6)
        nearest = f"; {' and '.join(own[one] for one in near)} {'is' if len(near) == 1 else 'are'} near by name" if near else ""
        return None, f"no format stands for it{nearest}. format: {TOKENIZER_FORMAT} takes the model's own template"
    return (entry, "") if isinstance(entry, str) else (entry[0], entry[1])


@lru_cache(maxsize=1)
def _read_tables() -> dict[str, dict[str, dict[str, Any]]]:
    text = (resources.files("chaccu.train.foreign") / "keys.yaml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return tables
