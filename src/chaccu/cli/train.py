"""`chaccu train`: run a recipe, with a live bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chaccu.train.recipe import Recipe
    from chaccu.train.report import TrainReport


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("train", epilog="Example: chaccu train quickstart-cpu learning_rate=5e-4 output=runs/mine")(train_command)


def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML, or the name of a shipped one: chaccu recipe list.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Values that take the file's place.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the resolved recipe and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again and replace an output that is there.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Reuse an output of this recipe and data; replace one of others.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Fine-tune a model on conversations; the result appears in the recipe's output folder once it is whole."""
    import msgspec
    import yaml

    from chaccu.train.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if explain:
        typer.echo(yaml.safe_dump(msgspec.to_builtins(resolved), sort_keys=False), nl=False)
        return
    from chaccu.train.processes import end_process, launched

    options = {"--fresh": fresh, "--replace": replace, "--json": as_json}
    arguments = ["train", *(name for name, given in options.items() if given), "--", str(recipe), *(overrides or [])]
    result = _run_here_or_launch(resolved, arguments, fresh=fresh, replace=replace)
    if result is not None and as_json:
        typer.echo(msgspec.json.encode(result).decode())
    elif result is not None:
        _print_result(result)
    if resolved.processes > 1 and launched():
        end_process()


def _print_result(result: TrainReport) -> None:
    if result.reused:
        typer.echo(f"{result.output} is there already, made by this recipe from this data.", err=True)
    if result.loss_before is not None and result.loss_after is not None:
        typer.echo(f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} nats a token")
    if result.token_rows:
        typer.echo(f"trained the embedding rows of {', '.join(result.token_rows)}: the base cannot tell them from others")
    for path, count in result.left_out.items():
        typer.echo(f"{count:,} conversations of {path} were left out: they have more than its max_tokens")
    if result.skipped_steps:
        typer.echo(f"{result.skipped_steps} steps were skipped: their loss or gradient was not finite")
    typer.echo(
        f"{result.steps} steps, {result.tokens:,} tokens ({result.trained_tokens:,} trained), rows {result.fill:.1%} full, "
        f"{result.seconds:.0f} s -> {result.output}"
    )


def _run_here_or_launch(recipe: Recipe, arguments: list[str], *, fresh: bool, replace: bool) -> TrainReport | None:
    """Train in this process, or start the recipe's processes with this command; the report, where this one is to print it."""
    from chaccu.cli.train_bar import train_with_bar
    from chaccu.train.base_model import find_base
    from chaccu.train.launch import launch, telling_launcher
    from chaccu.train.outputs import check_output
    from chaccu.train.preflight import check_data
    from chaccu.train.processes import check_processes, launched, speaks

    if recipe.processes > 1 and not launched():
        # What is wrong for all of them is told once, before they start; the hub is asked once too.
        check_processes(recipe)
        check_output(recipe)
        check_data(recipe)
        find_base(recipe.model)
        launch(arguments, recipe.processes)
        return None
    with telling_launcher():
        result = train_with_bar(recipe, fresh=fresh, replace=replace, shown=speaks())
    return result if speaks() else None
