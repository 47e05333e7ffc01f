"""`chaccu format`: list chat formats, show one, render a conversation."""

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


@app.command("show", epilog="Example: chaccu format show llama-2")
def show_command(
    name: Annotated[str, typer.Argument(help="A name out of `chaccu format list`, or `tokenizer`.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A model folder: the format is tried out with its tokenizer; `tokenizer` reads its template."),
    ] = None,
) -> None:
    """Tell what a format is, where it stops, and how it writes a conversation.

    With --tokenizer it also checks that the format keeps its promises with that tokenizer, and fails where it does not.
    """
    from chaccu.conversation import Conversation, Message, TextTokenizer, check_format, resolve_format

    chat_format = resolve_format(name, tokenizer)
    rounds = (Message("user", "QUESTION"), Message("assistant", "ANSWER")) * 2
    example = chat_format.render(Conversation(messages=rounds))
    lines = [
        chat_format.description.strip(),
        f"default system text: {chat_format.default_system!r}" if chat_format.default_system else "no default system text",
        "stops at: " + (", ".join(map(repr, chat_format.stop)) or "the end-of-sequence token"),
        "two rounds, the generated text between » and «:",
        "".join(f"»{one.text}«" if one.reply is not None else one.text for one in example.segments).replace("«»", ""),
    ]
    for line in lines:
        typer.echo(line)
    if tokenizer is not None:
        check_format(chat_format, TextTokenizer.load(tokenizer))
        typer.echo("keeps token identity and its loss mask with this tokenizer")


@app.command("render", epilog="Example: chaccu format render vicuna_v1.1 --pending < conversation.json")
def render_command(
    name: Annotated[str, typer.Argument(help="A name out of `chaccu format list`, or `tokenizer` for its own template.")],
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

    from chaccu.conversation import TextTokenizer, encode_conversation, parse_conversation, resolve_format

    chat_format = resolve_format(name, tokenizer)
    conversation = parse_conversation(sys.stdin.buffer.read())
    awaited = True if pending else None
    if tokenizer is None:
        sys.stdout.buffer.write(chat_format.render(conversation, pending=awaited).text.encode("utf-8"))
    else:
        encoded = encode_conversation(conversation, chat_format, TextTokenizer.load(tokenizer), pending=awaited)
        typer.echo(msgspec.json.encode({"ids": encoded.ids, "mask": encoded.mask}).decode())
