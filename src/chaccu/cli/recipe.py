"""`chaccu recipe`: the shipped recipes, and recipes out of other trainers' configurations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chaccu.train.recipe_import import ImportedRecipe

app = typer.Typer(name="recipe", help="Recipes: what decides a training run.", no_args_is_help=True)


@app.callback()
def recipe_group() -> None:
    """Recipes: what decides a training run."""


@app.command("list", epilog="Example: chaccu recipe list")
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print names and descriptions as one JSON object.")] = False,
) -> None:
    """List the shipped recipes, one a line: the name, then what it is for. `chaccu train NAME` runs one."""
    import json

    from chaccu.train.recipe import describe_recipe, list_recipes

    described = {name: describe_recipe(name) for name in list_recipes()}
    if as_json:
        typer.echo(json.dumps(described))
        return
    width = max(map(len, described))
    for name, line in described.items():
        typer.echo(f"{name:{width}}  {line}")


@app.command(
    "import",
    epilog="Example: chaccu recipe import train_vicuna.sh --out my.yaml",
    context_settings={"ignore_unknown_options": True},
)
def import_command(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE_OR_FLAGS",
            help="A shell script or YAML file, - for what stands on stdin, or the training command itself.",
        ),
    ],
    trainer: Annotated[
        str | None, typer.Option("--from", help="fastchat, axolotl or llama-factory; by default its keys tell.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write; by default the recipe goes to stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out.")] = False,
) -> None:
    """Turn a configuration of FastChat, Hugging Face's Trainer, axolotl or LLaMA-Factory into a recipe.

    Every key is translated, explained or named as not supported: on stderr, and in comments at the head of the recipe.
    """
    from chaccu.artifact import atomic_file
    from chaccu.errors import RecipeError

    if out is not None and out.exists() and not force:
        raise RecipeError(f"{out} is there already.", remedy="--force replaces it; --out takes another name")
    imported = _import(source, trainer)
    typer.echo(imported.report(), err=True, nl=False)
    if out is None:
        typer.echo(imported.to_yaml(), nl=False)
        return
    with atomic_file(out) as file:
        file.write(imported.to_yaml().encode("utf-8"))
    typer.echo(f"\n{out}: chaccu train {out}", err=True)


def _import(source: list[str], trainer: str | None) -> ImportedRecipe:
    import re
    import shlex

    from chaccu.train.recipe_import import import_recipe_file, import_recipe_text

    if source == ["-"]:
        return import_recipe_text(sys.stdin.read(), source="stdin", trainer=trainer)
    text = source[0] if len(source) == 1 else shlex.join(source)
    if "\n" in text or re.search(r"(?:^|\s)--\w", text):
        return import_recipe_text(text, source="the command", trainer=trainer)
    if len(source) > 1:
        raise typer.BadParameter("one file at a time, or a command with its flags")
    return import_recipe_file(Path(text), trainer=trainer)
