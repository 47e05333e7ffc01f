"""`Recipe`: everything that decides a training run, from a YAML file and `key=value` overrides.

Invariant: a key that is not known, or a value out of range, stops the run before anything is loaded; nothing is ignored. Keys
follow the names that other trainers use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.errors import RecipeError, did_you_mean


class DataSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations to train on. `conversations`: take so many, chosen by the seed (None = all). `max_tokens`: leave out those that
    are longer. `repeat`: times each is seen in one epoch."""

    path: str
    conversations: int | None = None
    max_tokens: int | None = None
    repeat: int = 1


class LoraOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): the update of a weight is `alpha / rank · B·A`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run. Lengths are tokens; `max_minutes` ends the run early, with the schedule bent so that it still ends at its end."""

    model: str
    data: list[DataSource]
    output: str
    format: str | None = None
    validation: list[DataSource] = []
    method: Literal["full", "lora"] = "lora"
    lora: LoraOptions = LoraOptions()
    sequence_len: int = 2048
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-5
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: int = 1
    max_steps: int | None = None
    max_minutes: float | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0


_POSITIVE = ("sequence_len", "gradient_accumulation_steps", "learning_rate", "max_grad_norm", "num_train_epochs")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `key=value` overrides (`lora.rank=16` reaches inside).

    Raises `RecipeError` naming the key, the value and the nearest right one; `StorageError` when the file is missing.
    """
    with storage_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}.") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} is not a recipe: it holds no keys.", remedy="write key: value lines")
    for override in overrides:
        _apply_override(fields, override)
    return parse_recipe(fields)


def parse_recipe(fields: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values. Raises `RecipeError`."""
    known = set(get_type_hints(Recipe))
    for key in fields:
        if key not in known:
            raise RecipeError(f"the recipe key {key!r} is not known.", remedy=did_you_mean(str(key), known))
    try:
        recipe = msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"the recipe is not valid: {error}.") from error
    for key in _POSITIVE:
        if getattr(recipe, key) <= 0:
            raise RecipeError(f"{key} is {getattr(recipe, key)}; it must be above 0.")
    if not recipe.data:
        raise RecipeError("the recipe names no data.", remedy="data: [{path: conversations.jsonl}]")
    if not 0 <= recipe.warmup_ratio < 1:
        raise RecipeError(f"warmup_ratio is {recipe.warmup_ratio}; it must be from 0 to below 1.")
    return recipe


def _apply_override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"{override!r} is no override.", remedy="write key=value, such as learning_rate=1e-4")
    *outer, last = key.split(".")
    for name in outer:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"{key!r} reaches into {name!r}, which has no keys inside.")
    # YAML reads 1e-4 as text (it wants 1.0e-4); people write the former.
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):
        try:
            parsed = float(parsed)
        except ValueError:
            parsed = value
    fields[last] = parsed
