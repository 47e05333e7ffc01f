"""`chaccu web`: the chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("web", epilog="Example: chaccu web --gateway http://127.0.0.1:8000 --port 7860")(web_command)


def web_command(
    gateway: Annotated[
        str, typer.Option(help="URL of the gateway, or of any OpenAI-compatible server.")
    ] = "http://127.0.0.1:8000",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 lets the system pick one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 shows the page to the whole network.")] = "127.0.0.1",
    path_prefix: Annotated[str, typer.Option(help="Path under which the page lives, such as /chat.")] = "",
    share: Annotated[bool, typer.Option("--share", help="Also open a public link through gradio.live.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="CHACCU_API_KEY", help="Key for the gateway, if it wants one.")] = None,
    url_file: Annotated[Path | None, typer.Option(help="Write the page's URL into this file once it can be opened.")] = None,
) -> None:
    """Serve the chat page until Ctrl-C: every model of the gateway, answers as they are written."""
    from chaccu.web import WebConfig, serve_web

    config = WebConfig(gateway_url=gateway, api_key=api_key, host=host, port=port, path_prefix=path_prefix, share=share)
    serve_web(config, lambda line: typer.echo(line, err=True), url_file=url_file)
