"""`Recipe`: everything that decides a training run, from a YAML file and `key=value` overrides.

Invariant: a key that is not known, or a value out of range, stops the run before anything is loaded; nothing is ignored. Keys
follow the names that other trainers use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.errors import RecipeError, did_you_mean
from chaccu.train.batch import resolve_accumulation

Count = Annotated[int, msgspec.Meta(ge=1)]
FromZeroCount = Annotated[int, msgspec.Meta(ge=0)]
AboveZero = Annotated[float, msgspec.Meta(gt=0)]
FromOne = Annotated[float, msgspec.Meta(ge=1)]
FromZero = Annotated[float, msgspec.Meta(ge=0)]
BelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class DataSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations to train on. `conversations`: take so many, chosen by the seed (None = all). `max_tokens`: leave out those
    that are longer. `repeat`: times each is seen in one epoch."""

    path: str
    conversations: Count | None = None
    max_tokens: Count | None = None
    repeat: Count = 1


class LoraOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): the update of a weight is `alpha / rank · B·A`.

    `trainable_tokens`: tokens whose embedding rows are trained too; `auto`: the control tokens of a reply that the base model
    cannot tell from others.
    """

    rank: Count = 8
    alpha: Count = 16
    dropout: BelowOne = 0.0
    target_modules: str | list[str] = "all-linear"
    trainable_tokens: Literal["auto"] | list[str] = "auto"


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Rotary positions stretched by `factor`, in transformers' names; what is None is its default.

    `original_max_position_embeddings`: the length that is stretched, where the base's config does not say it right.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: FromOne
    original_max_position_embeddings: Count | None = None
    attention_factor: AboveZero | None = None
    beta_fast: AboveZero | None = None
    beta_slow: AboveZero | None = None
    low_freq_factor: AboveZero | None = None
    high_freq_factor: AboveZero | None = None


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run. Lengths are tokens; `max_minutes` ends the run early, with the schedule bent so that it ends
    there too.

    `method`: all weights (`full`), an adapter (`lora`), or an adapter on a base packed into 4 bits (`qlora`).
    `micro_batch_tokens`: of a packed row, from `sequence_len` (the most that a conversation may have, and the default) up.
    `global_batch_size`: of a step over all `processes` (one a GPU), in sequences of `sequence_len` tokens;
    `gradient_accumulation_steps`, rows that a process takes one after another in a step, follows from it.
    `max_skipped_steps`: a step whose loss or gradient is not finite is skipped, and so many in a row end the run.
    `optimizer`: `adamw` keeps float32 weights and moments; `adamw_8bit` keeps weights in the run's precision, rounded
    stochastically, and 8-bit moments; `adamw_bf16_sr` keeps weights and moments in bf16, rounded stochastically; `adafactor`
    such weights and one moment for each row and column. `optimizer_in_backward` updates each weight as soon as its gradient is
    there, so no gradients are kept, but for their sum over several rows, in 8 bits. `activation_checkpointing` recomputes
    every layer (`full`), or on a GPU as few as the memory allows (`selective`).

    `eval_steps`: how often the held-out loss is measured and `sample_answers` held-out questions are answered, in at most
    `sample_tokens` tokens each (0 of either: none); both are done before the first step and after the last in any case.
    `save_steps`: how often the model as it is becomes a snapshot beside the output, of which `save_total_limit` stay.
    """

    model: str
    data: list[DataSource]
    output: str
    format: str | None = None
    validation: list[DataSource] = []
    method: Literal["full", "lora", "qlora"] = "lora"
    lora: LoraOptions = LoraOptions()
    sequence_len: Count = 2048
    rope_scaling: RopeScaling | None = None
    micro_batch_tokens: Count | None = None
    processes: Count = 1
    global_batch_size: Count | None = None
    gradient_accumulation_steps: Count = 1
    learning_rate: AboveZero = 2e-5
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: BelowOne = 0.03
    weight_decay: FromZero = 0.0
    max_grad_norm: AboveZero = 1.0
    num_train_epochs: Count = 1
    max_steps: Count | None = None
    max_minutes: AboveZero | None = None
    max_skipped_steps: Count = 3
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = "auto"
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16_sr", "adafactor"] = "adamw"
    optimizer_in_backward: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    eval_steps: Count | None = None
    sample_answers: FromZeroCount = 4
    sample_tokens: FromZeroCount = 64
    save_steps: Count | None = None
    save_total_limit: Count = 2
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    seed: int = 0

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA adapter is trained beside a frozen base."""
        return self.method != "full"

    @property
    def keeps_masters(self) -> bool:
        """Whether all weights are trained in float32 and computed with in the run's precision: an optimizer that rounds
        stochastically needs no such copy, and an adapter's own weights are float32 anyway."""
        return self.method == "full" and self.optimizer == "adamw"

    @property
    def row_len(self) -> int:
        """Tokens of a packed row: what one forward pass takes."""
        return self.micro_batch_tokens or self.sequence_len


_INNER: dict[str, Any] = {"lora": LoraOptions, "rope_scaling": RopeScaling}
# How keys are written that are no plain values.
_EXAMPLES = {
    "data": "data: [{path: conversations.jsonl}]",
    "validation": "validation: [{path: held-out.jsonl}]",
    "lora": "lora: {rank: 8}",
    "rope_scaling": "rope_scaling: {rope_type: linear, factor: 4}",
}
_OF_ONE_TYPE = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _shipped().iterdir() if entry.name.endswith(".yaml"))


def describe_recipe(name: str) -> str:
    """What the shipped recipe of that name is for: its first comment line."""
    first = (_shipped() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def load_recipe(source: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name, with `key=value` overrides (`lora.rank=16` reaches inside).

    Raises `RecipeError` naming the key, the value and the nearest right one, or the recipes there are.
    """
    fields = read_fields(source)
    for override in overrides:
        _apply_override(fields, override)
    return parse_recipe(fields)


def find_single_gpu_recipe(recipe: Recipe) -> str | None:
    """The shipped recipe for one GPU (`…-1gpu`), of the same model where there is one."""
    names = [name for name in list_recipes() if name.endswith("-1gpu")]
    same = [name for name in names if read_fields(Path(name)).get("model") == recipe.model]
    return next(iter(same + names), None)


def read_fields(source: Path) -> dict[str, Any]:
    """The plain, unchecked values of a recipe file or of the shipped recipe of that name. Raises `RecipeError`."""
    if source.is_file():
        with storage_errors(source):
            text = source.read_text(encoding="utf-8")
    elif str(source) in list_recipes():
        text = (_shipped() / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"there is no recipe {str(source)!r}: no such file, and no shipped recipe of that name.",
            remedy=did_you_mean(str(source), list_recipes()),
        )
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not YAML: {error}.") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{source} is not a recipe: it holds no keys.", remedy="write key: value lines")
    return fields


def _shipped() -> Traversable:
    return resources.files("chaccu.train") / "recipes"


def parse_recipe(fields: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values. Raises `RecipeError`."""
    known = set(get_type_hints(Recipe))
    for key in fields:
        if key not in known:
            raise RecipeError(f"the recipe key {key!r} is not known.", remedy=did_you_mean(str(key), known))
    try:
        # Not strict: YAML reads 1e-4 as text (it wants 1.0e-4); people write the former.
        recipe = msgspec.convert(fields, Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(error, fields) from error
    if not recipe.data:
        raise RecipeError("the recipe names no data.", remedy=_EXAMPLES["data"])
    recipe = resolve_accumulation(recipe, given="gradient_accumulation_steps" in fields)
    _check_together(recipe)
    if recipe.rope_scaling is not None:
        _check_rope_scaling(recipe.rope_scaling)
    return recipe


def why_not_fp16(recipe: Recipe) -> str:
    """Why the recipe cannot be trained in float16, whose small updates need float32 weights beside it; "" when it can."""
    if not recipe.trains_adapter and not recipe.keeps_masters:
        return f"optimizer {recipe.optimizer} keeps no float32 weights, and float16 ones lose small updates"
    if recipe.optimizer_in_backward:
        return "optimizer_in_backward would use gradients whose loss scale is still in them"
    return ""


def _check_together(recipe: Recipe) -> None:
    """Raise `RecipeError` for values that are right one by one and wrong together."""
    if recipe.row_len < recipe.sequence_len:
        raise RecipeError(
            f"micro_batch_tokens is {recipe.micro_batch_tokens} and sequence_len {recipe.sequence_len}.",
            remedy="a row holds at least one whole conversation: raise the one, or lower the other",
        )
    if recipe.eval_steps is not None and not recipe.validation:
        raise RecipeError(
            f"eval_steps is {recipe.eval_steps}, and there is no validation data to evaluate on.",
            remedy="validation: [{path: held-out.jsonl}], or leave eval_steps out",
        )
    if recipe.optimizer in ("adamw_8bit", "adamw_bf16_sr") and recipe.method != "full":
        raise RecipeError(
            f"optimizer {recipe.optimizer} is for method: full, and the method is {recipe.method}.",
            remedy="set optimizer: adamw; an adapter's moments are small",
        )
    if recipe.precision == "fp16" and (reason := why_not_fp16(recipe)):
        raise RecipeError(
            f"precision: fp16 does not go with this recipe: {reason}.",
            remedy="set optimizer: adamw and optimizer_in_backward: false; or precision: bf16 on a GPU from Ampere on, or fp32",
        )
    if recipe.optimizer == "adamw_bf16_sr" and recipe.precision not in ("auto", "bf16", "fp8"):
        raise RecipeError(
            f"optimizer adamw_bf16_sr keeps weights in bf16, and precision is {recipe.precision}.",
            remedy="set precision: bf16, or optimizer: adamw_8bit, which keeps them in the run's precision",
        )
    if recipe.optimizer_in_backward and recipe.optimizer == "adamw":
        raise RecipeError(
            "optimizer_in_backward does not go with optimizer adamw.",
            remedy="set optimizer: adamw_8bit, adamw_bf16_sr or adafactor",
        )
    if recipe.precision == "fp8":
        _check_float8(recipe)


def parse_rope_scaling(fields: dict[str, Any]) -> RopeScaling:
    """A checked `rope_scaling` from plain values. Raises `RecipeError`."""
    try:
        scaling = msgspec.convert(fields, RopeScaling, strict=False)
    except msgspec.ValidationError as error:
        raise RecipeError(f"rope_scaling is not valid: {error}.") from error
    _check_rope_scaling(scaling)
    return scaling


def _check_rope_scaling(scaling: RopeScaling) -> None:
    for rope_type, keys in _OF_ONE_TYPE.items():
        given = [key for key in keys if getattr(scaling, key) is not None]
        if given and scaling.rope_type != rope_type:
            raise RecipeError(
                f"rope_scaling has {given[0]}, which {scaling.rope_type} does not know.",
                remedy=f"leave it out, or set rope_type: {rope_type}",
            )


def _check_float8(recipe: Recipe) -> None:
    """Raise `RecipeError` where products in float8 would gain nothing, or could not be formed."""
    if recipe.method != "full":
        raise RecipeError(
            f"precision fp8 is for method: full, and the method is {recipe.method}.",
            remedy="set precision: bf16; an adapter's products are small",
        )
    if not recipe.compile:
        raise RecipeError(
            "precision fp8 goes with compile: true: uncompiled, rounding costs more than it gains.",
            remedy="set compile: true, or precision: bf16",
        )
    if recipe.row_len % 16:
        raise RecipeError(
            f"precision fp8 wants rows of a multiple of 16 tokens, and they have {recipe.row_len}.",
            remedy=f"set micro_batch_tokens: {-(-recipe.row_len // 16) * 16}",
        )


def _explain(error: msgspec.ValidationError, fields: dict[str, Any]) -> RecipeError:
    """msgspec's message with what it leaves out: the value that was wrong and the nearest right name."""
    problem, _, path = str(error).partition(" - at `$")
    steps = re.findall(r"\w+", path)
    hints = get_type_hints(Recipe)
    value: Any = fields
    for step in steps:
        value = value[int(step) if isinstance(value, list) else step]
    if (unknown := re.search("unknown field `(.*)`", problem)) is not None:
        inner = get_type_hints(_INNER.get(steps[0], DataSource))
        return RecipeError(f"the key {unknown[1]!r} in {steps[0]} is not known.", remedy=did_you_mean(unknown[1], inner))
    if not steps or isinstance(value, dict):
        return RecipeError(f"the recipe is not valid: {error}.")
    hint = get_type_hints(_INNER[steps[0]])[steps[1]] if steps[0] in _INNER and steps[1:] else hints[steps[0]]
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    key = next(step for step in reversed(steps) if not step.isdigit())
    remedy = did_you_mean(str(value), choices) if choices else _EXAMPLES.get(key, "")
    return RecipeError(f"{'.'.join(steps)} is {value!r}: {problem}.", remedy=remedy)


def _apply_override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"{override!r} is no override.", remedy="write key=value, such as learning_rate=1e-4")
    *outer, last = key.split(".")
    for name in outer:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise RecipeError(f"{key!r} reaches into {name!r}, which has no keys inside.")
    try:
        fields[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value in {override!r} is not YAML: {error}.") from error
