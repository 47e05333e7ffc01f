"""`chaccu demo`: the whole road once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("demo", epilog="Example: chaccu demo --exit --name 'Vicky the vicuña'")(demo_command)


def demo_command(
    leave: Annotated[bool, typer.Option("--exit", help="End after the report instead of keeping a chat page open.")] = False,
    name: Annotated[str, typer.Option(help="The name that the tuned model learns.")] = "Vicky the vicuña",
    model: Annotated[str | None, typer.Option(help="Another base: a Hugging Face folder or hub id.")] = None,
    chat_format: Annotated[str | None, typer.Option("--format", help="Chat format of that base, if it names none.")] = None,
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the chat page; 0 lets the system pick one.")] = 7860,
) -> None:
    """Clean, fine-tune, serve, compare and chat, on a CPU; a second run reuses what is there."""
    from rich.console import Console
    from rich.table import Table

    from chaccu.demo.report import Comparison
    from chaccu.demo.run import DemoOptions, run_demo

    options = DemoOptions(folder=folder, name=name, model=model, chat_format=chat_format, port=port, stay=not leave)

    def show(rows: list[Comparison]) -> None:
        table = Table("question", "base", "tuned", show_lines=True)
        for row in rows:
            table.add_row(row.question, row.base, row.tuned)
        Console().print(table)

    run_demo(options, lambda text: typer.echo(text, err=True), show)
