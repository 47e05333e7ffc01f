"""`chaccu format`: list chat formats, render a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="format", help="Chat formats: how a conversation becomes text.", no_args_is_help=True)


@app.command("list", epilog="Example: chaccu format list")
def list_command() -> None:
    """Print the names of the known formats, one a line."""
    from chaccu.conversation import list_formats

    for name in list_formats():
        typer.echo(name)


@app.command("render", epilog="Example: chaccu format render vicuna_v1.1 --pending < conversation.json")
def render_command(
    name: Annotated[str, typer.Argument(help="A name out of `chaccu format list`.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with tokenizer.json: print ids and loss mask as JSON.")
    ] = None,
    pending: Annotated[
        bool, typer.Option("--pending", help="End where the assistant's next (or last) answer would begin.")
    ] = False,
) -> None:
    """Render a conversation read from stdin; prints exactly the text, with no newline added.

    With --tokenizer it prints one JSON line: {"ids": […], "mask": […]}.
    """
    import msgspec

    from chaccu.conversation import TextTokenizer, encode_conversation, load_format, parse_conversation

    chat_format = load_format(name)
    conversation = parse_conversation(sys.stdin.buffer.read())
    awaited = True if pending else None
    if tokenizer is None:
        sys.stdout.buffer.write(chat_format.render(conversation, pending=awaited).text.encode("utf-8"))
    else:
        encoded = encode_conversation(conversation, chat_format, TextTokenizer.load(tokenizer), pending=awaited)
        typer.echo(msgspec.json.encode({"ids": encoded.ids, "mask": encoded.mask}).decode())
