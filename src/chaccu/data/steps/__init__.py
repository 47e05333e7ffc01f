"""The steps, each in its own module, and the registry by which a configuration names them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import msgspec

from chaccu.data.outcome import Step
from chaccu.errors import RecipeError, did_you_mean


def list_steps() -> dict[str, str]:
    """`module:Class` of each step by name."""
    return {
        "record_marks": "chaccu.data.steps.record_marks:RecordMarks",
        "overlap": "chaccu.data.steps.overlap:Overlap",
        "roles": "chaccu.data.steps.roles:Roles",
        "html": "chaccu.data.steps.html:Html",
        "page_debris": "chaccu.data.steps.page_debris:PageDebris",
        "refusals": "chaccu.data.steps.phrases:Refusals",
        "moderation": "chaccu.data.steps.phrases:Moderation",
        "pii": "chaccu.data.steps.pii:Pii",
        "decontaminate": "chaccu.data.steps.decontaminate:Decontaminate",
        "language": "chaccu.data.steps.language:Language",
        "length": "chaccu.data.steps.length:Length",
        "repetition": "chaccu.data.steps.repetition:Repetition",
        "exact_duplicates": "chaccu.data.steps.exact_duplicates:ExactDuplicates",
        "forks": "chaccu.data.steps.forks:Forks",
        "near_duplicates": "chaccu.data.steps.near_duplicates:NearDuplicates",
        "token_limit": "chaccu.data.steps.token_limit:TokenLimit",
    }


@lru_cache(maxsize=64)
def load_step_type(name: str) -> type[Step]:
    """The step class called `name`. Raises `RecipeError` with the nearest names when there is none."""
    steps = list_steps()
    if name not in steps:
        raise RecipeError(f"there is no data step {name!r}.", remedy=did_you_mean(name, steps))
    module, _, attribute = steps[name].partition(":")
    step_type: type[Step] = getattr(import_module(module), attribute)
    return step_type


def build_step(name: str, settings: dict[str, Any]) -> Step:
    """A step from its name and settings. Raises `RecipeError` for an unknown name or setting, or a value out of range."""
    step_type = load_step_type(name)
    try:
        return msgspec.convert(settings, step_type)
    except msgspec.ValidationError as error:
        raise RecipeError(
            f"data step {name!r}: {error}.", remedy="its settings are: " + ", ".join(step_type.__struct_fields__)
        ) from error
