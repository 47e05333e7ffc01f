"""Another trainer's configuration → a recipe: FastChat and Hugging Face Trainer commands, axolotl and LLaMA-Factory YAML.

Invariants: every key of the input is named in the report, as translated, without meaning here, or not supported with what to do
instead; where the input is silent, that trainer's default is written, not Chaccu's; what comes out is a recipe that loads.
Nothing is run, fetched or looked up. This module ignores what the data files hold: `chaccu data clean` reads them. No torch.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import msgspec
import yaml

from chaccu.artifact import storage_errors
from chaccu.errors import RecipeError, did_you_mean
from chaccu.train.foreign.command import TrainingCommand, find_training_command
from chaccu.train.foreign.headings import BEFORE, HEADINGS
from chaccu.train.foreign.trainers import DIALECTS, recognise_trainer
from chaccu.train.foreign.translation import Translation
from chaccu.train.recipe import Recipe, parse_recipe

_WIDTH = 110


class ImportedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """`fields`: the recipe's plain values. `remarks`: what became of the input, lines by heading."""

    trainer: str
    source: str
    fields: dict[str, Any]
    remarks: dict[str, list[str]]

    @property
    def recipe(self) -> Recipe:
        return parse_recipe(self.fields)

    def report(self) -> str:
        """What became of every key, for people; it ends with a line end."""
        lines = [f"Imported from {DIALECTS[self.trainer].title}: {self.source}"]
        for heading in HEADINGS:
            if self.remarks.get(heading):
                lines += ["", heading.format(title=DIALECTS[self.trainer].title)]
                for remark in self.remarks[heading]:
                    lines += _wrap(_printable(remark))
        return "\n".join(lines) + "\n"

    def to_yaml(self) -> str:
        """The recipe's file: the report as comments, then the values."""
        comments = "".join(f"# {line}".rstrip() + "\n" for line in self.report().splitlines())
        return f"{comments}\n{yaml.safe_dump(self.fields, sort_keys=False, allow_unicode=True)}"


def import_recipe_file(path: Path, *, trainer: str | None = None) -> ImportedRecipe:
    """The recipe in another trainer's YAML file or in a script that starts it. Raises `RecipeError` or `StorageError`."""
    with storage_errors(path):
        found = path.is_file()
    if not found:
        raise RecipeError(f"there is no file {path}.", remedy="name a shell script or a YAML file, or give the command itself")
    try:
        with storage_errors(path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text: {error}.", remedy="name a shell script or a YAML file") from error
    return import_recipe_text(text, source=path.name, trainer=trainer, is_yaml=path.suffix in (".yaml", ".yml", ".json"))


def import_recipe_text(text: str, *, source: str, trainer: str | None = None, is_yaml: bool | None = None) -> ImportedRecipe:
    """The recipe in `text`, which is YAML or shell (None: what it reads as), of one of `DIALECTS` (None: its keys tell).

    Raises `RecipeError` when it is of no known trainer, or when a value that decides the run is missing or out of range.
    """
    if trainer is not None and trainer not in DIALECTS:
        raise RecipeError(f"there is no import from {trainer!r}.", remedy=did_you_mean(trainer, DIALECTS))
    values, repeated = _read_yaml(text, source, must_be=is_yaml is True) if is_yaml is not False else ({}, [])
    command: TrainingCommand | None = None
    if not values and not is_yaml and (command := find_training_command(text)) is not None:
        values, repeated = command.flags, command.repeated
    if not values:
        raise RecipeError(
            f"{source} is neither YAML with a trainer's keys nor a command with a trainer's flags.",
            remedy="the flags begin at --model_name_or_path, the YAML at base_model: or model_name_or_path:",
        )
    name = trainer or recognise_trainer(values, source)
    translation = Translation(name, values, command)
    translation.run()
    for key in repeated:
        translation.remark(BEFORE, f"{key} is given more than once: the last counts, as it does there")
    imported = ImportedRecipe(trainer=name, source=source, fields=translation.fields, remarks=translation.remarks)
    try:
        parse_recipe(imported.fields)
    except RecipeError as error:
        raise RecipeError(f"{source} does not give a recipe: {error.message}", remedy=error.remedy) from error
    return imported


def _read_yaml(text: str, source: str, *, must_be: bool) -> tuple[dict[str, Any], list[str]]:
    """The keys of a YAML mapping, and those that stand in it more than once; no keys where the text is something else."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if must_be:
            raise RecipeError(f"{source} is not YAML: {error}.", remedy="correct it, or name a shell script .sh") from error
        return {}, []
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        return {}, []
    if not all(isinstance(key, str) and key.isidentifier() for key in values) and not must_be:
        return {}, []  # a script whose first line has a colon
    names = [str(key.value) for key, _ in node.value]
    return {str(key): value for key, value in values.items()}, sorted({name for name in names if names.count(name) > 1})


def _wrap(remark: str) -> list[str]:
    """`remark` in lines below a heading; a command, which begins with blanks, stays in one."""
    if remark.startswith("    "):
        return [remark]
    return textwrap.wrap(remark, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
