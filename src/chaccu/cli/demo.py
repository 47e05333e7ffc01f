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
    released: Annotated[
        bool, typer.Option("--released", help="Chat with the adapter that ships in the repository: no data, no training.")
    ] = False,
    adapter: Annotated[Path | None, typer.Option(help="The same with a released adapter that lies elsewhere.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The name that the tuned model learns.", show_default="Vicky the vicuña")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another base: a Hugging Face folder or hub id.")] = None,
    chat_format: Annotated[str | None, typer.Option("--format", help="Chat format of that base, if it names none.")] = None,
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the chat page; 0 lets the system pick one.")] = 7860,
) -> None:
    """Clean, fine-tune, serve, compare and chat, on a CPU; a second run reuses what is there.

    With --released it fetches the base, merges the adapter that ships, and serves, compares and chats in the same way.
    """
    from rich.console import Console
    from rich.table import Table

    from chaccu.demo.released import find_release
    from chaccu.demo.report import Comparison
    from chaccu.demo.run import DemoOptions, run_demo

    options = DemoOptions(
        folder=folder,
        name=name,
        model=model,
        released=find_release(adapter) if released or adapter is not None else None,
        chat_format=chat_format,
        port=port,
        stay=not leave,
    )

    def show(rows: list[Comparison]) -> None:
        table = Table("question", "base", "tuned", show_lines=True)
        for row in rows:
            table.add_row(row.question, row.base, row.tuned)
        Console().print(table)

    run_demo(options, lambda text: typer.echo(text, err=True), show)
