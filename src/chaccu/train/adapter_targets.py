"""Which of a model's layers an adapter is for, checked before peft adds it.

peft itself passes over what no layer is called, as long as another name of the list is right: the run would train less than it
says.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from chaccu.errors import RecipeError, did_you_mean

# peft's word for all linear layers but the output projection.
_ALL = "all-linear"


def check_targets(causal: Any, targets: str | list[str]) -> None:
    """Raise `RecipeError` unless each of `targets`, as peft reads them, is a layer of `causal` that can have an adapter.

    A list holds names of modules or ends of them (`q_proj`, `self_attn.q_proj`); a text is `all-linear`, or a regular
    expression for whole names.
    """
    names = [name for name, module in causal.named_modules() if _can_have_adapter(module)]
    if isinstance(targets, str):
        missing = [] if targets == _ALL or _matches(targets, names) else [targets]
    else:
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing or not targets:
        known = {name.rpartition(".")[2] for name in names}
        raise RecipeError(
            f"lora.target_modules has {missing[0]!r}, which no linear layer of {type(causal).__name__} is called."
            if missing
            else "lora.target_modules is empty.",
            remedy=did_you_mean(missing[0] if missing else "", {*known, _ALL}),
        )


def _can_have_adapter(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, torch.nn.Embedding, Conv1D))


def _matches(expression: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(expression, name) for name in names)
    except re.error as error:
        raise RecipeError(f"lora.target_modules is {expression!r}, no regular expression: {error}.") from error
