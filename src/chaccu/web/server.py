"""`serve_web`: the pages on a socket.

Invariants: the port is bound before anything is said to be ready; a busy port is one clear error; a header forbids the browser
to load anything from another host, whatever a model writes.
"""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaccu.artifact import atomic_file
from chaccu.errors import ServeError, UsageError, explain_listening
from chaccu.web.config import WebConfig
from chaccu.web.page import create_page
from chaccu.web.theme import build_theme, read_asset

_BACKLOG = 128
_SHUTDOWN_S = 2
# Gradio's own scripts are inline and evaluated; all else must come from the page's own address.
_CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


def create_web_app(config: WebConfig) -> Any:
    """The pages as an ASGI app. Raises `UsageError` for a bad prefix or URL, `MissingDependencyError` without Gradio."""
    prefix = "/" + config.path_prefix.strip("/") if config.path_prefix.strip("/") else ""
    if any(letter in prefix for letter in "?#% \\"):
        raise UsageError(f"--path-prefix {config.path_prefix!r} is no path.", remedy="give one such as /chat")
    page = create_page(config)

    import gradio
    from fastapi import FastAPI

    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path=prefix or "/",
        theme=build_theme(),
        css=read_asset("page.css"),
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
    )
    return _ForeignHostsBarred(app)


def serve_web(config: WebConfig, announce: Callable[[str], None], *, url_file: Path | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; `announce` gets the lines that say where.

    Raises `ServeError` when the address cannot be listened on or no tunnel can be had.
    """
    import uvicorn

    listener = _listen(config.host, config.port)
    if url_file is not None:
        url_file.unlink(missing_ok=True)
    # uvicorn raises the signal that stopped it once more; a SIGTERM that has been obeyed is a normal end.
    former = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        app = create_web_app(config)
        settings = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S, server_header=False, ws="none"
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                _tell(config, listener.getsockname()[1], announce, url_file)

        Server(settings).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, former)
        listener.close()
        if url_file is not None:
            url_file.unlink(missing_ok=True)


def _tell(config: WebConfig, port: int, announce: Callable[[str], None], url_file: Path | None) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host else host
    prefix = config.path_prefix.strip("/")
    url = f"http://{host}:{port}/{prefix + '/' if prefix else ''}"
    if url_file is not None:
        with atomic_file(url_file) as file:
            file.write(url.encode() + b"\n")
    announce(f"chat page ready at {url}")
    if config.share:
        announce(f"shared at {_open_tunnel(port)}{prefix}")


def _open_tunnel(port: int) -> str:
    from gradio.networking import setup_tunnel

    try:
        address = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        raise ServeError(
            f"no share link could be had from gradio.live: {str(error).splitlines()[0]}",
            remedy="run without --share, or put the page behind your own proxy with --path-prefix",
        ) from error
    return str(address).rstrip("/") + "/"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise explain_listening(error, host, port) from error


class _ForeignHostsBarred:
    """Adds the content policy to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [
                    (b"content-security-policy", _CONTENT_POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._app(scope, receive, send_with_policy if scope["type"] == "http" else send)
