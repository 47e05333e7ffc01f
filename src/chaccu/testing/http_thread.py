"""A small HTTP server in a thread, for the fakes that tests talk to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from chaccu.errors import ServeError

S = TypeVar("S", bound="HttpThread")


class HttpThread:
    """Listens from when it is made, and answers while its block runs; `root` is its address, at a port that the kernel picks
    unless one is given."""

    def __init__(self, routes: Sequence[Route], port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.root = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        settings = uvicorn.Config(Starlette(routes=list(routes)), log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def __enter__(self: S) -> S:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._listener.close()
        if self._thread.is_alive():
            raise ServeError(f"the fake server at {self.root} did not end within 10 s.")

    def wait(self) -> None:
        """Until the server ends."""
        self._thread.join()
