"""`chaccu chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

_DEFAULT_URL = "http://127.0.0.1:8000"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "chat", epilog="Example: chaccu chat runs/demo/tuned    or: chaccu chat --url http://127.0.0.1:8000 --model tuned"
    )(chat_command)


def chat_command(
    source: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model folder, .gguf file or hub id, served here while you talk.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help=f"A running gateway or any OpenAI-compatible server; without MODEL {_DEFAULT_URL}.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of the server's models, if it has more than one.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt to begin with.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="CHACCU_API_KEY", help="Key for the server, if it asks.")] = None,
) -> None:
    """Talk to a model: answers stream, Ctrl-C stops one, /help lists what else there is.

    When stdin is no terminal, each of its lines is a message, answers go to stdout, and the first failure ends it with code 1.
    """
    import contextlib

    from chaccu.cli.local_server import serve_while
    from chaccu.cli.terminal_chat import TerminalChat
    from chaccu.client import Sampling
    from chaccu.errors import UsageError

    if source is not None and url is not None:
        raise UsageError(
            f"both MODEL ({source}) and --url ({url}) were given.",
            remedy="give MODEL to serve one here, or --url to use a running server (with --model to choose one of its models)",
        )
    with contextlib.ExitStack() as stack:
        address = url or _DEFAULT_URL if source is None else stack.enter_context(serve_while(source, _say))
        chat = stack.enter_context(
            TerminalChat(
                address,
                api_key=api_key,
                model=model,
                system=system,
                sampling=Sampling(temperature=temperature, max_tokens=max_tokens),
            )
        )
        chat.run()


def _say(text: str) -> None:
    typer.echo(text, err=True)
