"""`CleanConfig`: which reader and which steps, in which order, out of a YAML file.

Invariant: `roles`, which makes a conversation of what a reader found, comes before all other steps but those that look at
records and their parts; `token_limit`, which makes several of one, is last. Settings are checked when the file is read,
before any data is.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.data.outcome import DraftStep, PartsStep, RecordStep, Step
from chaccu.data.readers import load_reader
from chaccu.data.steps import build_step
from chaccu.data.steps.plain_yaml import parse_yaml
from chaccu.errors import RecipeError

AUTO_READER = "auto"
_LIMIT = "token_limit"
_ROLES_RANK = 2


class CleanConfig(msgspec.Struct, frozen=True):
    """`reader`: a reader's name or "auto"; `steps`: in the order in which they run."""

    reader: str
    steps: tuple[Step, ...]

    def settings(self) -> dict[str, Any]:
        """Everything resolved, as plain values, for the manifest; a tokenizer's path is left to its hash there."""
        steps = [{step.name: _plain(step)} for step in self.steps]
        return {"reader": self.reader, "steps": steps}

    def with_token_limit(self, tokenizer: str, max_tokens: int, chat_format: str | None = None) -> CleanConfig:
        """The same with a token limit as the last step. One that was there keeps all settings but these; a format that is
        None is that one's too, or the step's own default. Raises `RecipeError` for a value out of range."""
        given = {"tokenizer": tokenizer, "max_tokens": max_tokens} | (
            {} if chat_format is None else {"chat_format": chat_format}
        )
        configured: dict[str, Any] = next((msgspec.to_builtins(step) for step in self.steps if step.name == _LIMIT), {})
        limit = build_step(_LIMIT, configured | given)
        return CleanConfig(self.reader, (*(step for step in self.steps if step.name != _LIMIT), limit))


def _plain(step: Step) -> dict[str, Any]:
    settings = step.describe()
    settings.pop("tokenizer", None)
    return settings


def default_config_text() -> str:
    """The YAML of the configuration that ships with Chaccu."""
    return (resources.files("chaccu.data") / "clean.yaml").read_text(encoding="utf-8")


def load_config(path: Path | None = None) -> CleanConfig:
    """The configuration in `path`, or the one that ships with Chaccu.

    Raises `StorageError` when the file cannot be read, `RecipeError` for bad YAML, unknown names, values out of range, a
    bad order.
    """
    if path is None:
        text = default_config_text()
    else:
        with storage_errors(path):
            text = path.read_text(encoding="utf-8", errors="replace")
    name = str(path or "clean.yaml")
    try:
        return _parse_config(parse_yaml(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is no YAML: {error}.") from error
    except RecipeError as error:
        raise RecipeError(f"{name}: {error.message}", remedy=error.remedy) from error


def _parse_config(value: Any) -> CleanConfig:
    form = "the form is: reader: auto, steps: [- roles: {}, - length: {min_chars: 16}, …]"
    if not isinstance(value, dict) or not set(value) <= {"reader", "steps"} or not isinstance(value.get("steps"), list):
        raise RecipeError("this is no configuration for cleaning.", remedy=form)
    steps = []
    for entry in value["steps"]:
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise RecipeError(f"a step must be one name with its settings, not {entry!r}.", remedy=form)
        ((step_name, settings),) = entry.items()
        steps.append(build_step(str(step_name), {} if settings is None else settings))
    reader = str(value.get("reader", AUTO_READER))
    if reader != AUTO_READER:
        load_reader(reader)
    return CleanConfig(reader, _check_order(tuple(steps)))


def _check_order(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    names = [step.name for step in steps]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(f"the step {repeated[0]!r} is named twice.", remedy="leave one of the two out")
    order = [_rank(step) for step in steps]
    if order.count(_ROLES_RANK) != 1:
        raise RecipeError(f"the first step must be 'roles'; the steps are {names}.", remedy="put `- roles: {}` first")
    for step, before, after in zip(steps[1:], order, order[1:], strict=False):
        if after < before:
            raise RecipeError(
                f"the step {step.name!r} is too late.",
                remedy="the first step must be 'roles'; only 'record_marks' and then 'overlap' may stand before it",
            )
    if _LIMIT in names[:-1]:
        raise RecipeError(f"{_LIMIT!r} must be the last step.", remedy="move it to the end")
    return steps


def _rank(step: Step) -> int:
    """The order that kinds of steps must have."""
    kinds = ((RecordStep, 0), (PartsStep, 1), (DraftStep, _ROLES_RANK))
    return next((rank for kind, rank in kinds if isinstance(step, kind)), _ROLES_RANK + 1)
