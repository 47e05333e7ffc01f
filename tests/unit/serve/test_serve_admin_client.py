"""What an operator's command says of a gateway that is none, refuses, or sends it elsewhere."""

from __future__ import annotations

import socket

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from chaccu.errors import ServeError, UsageError
from chaccu.serve.admin_client import AdminClient
from chaccu.testing.http_thread import HttpThread


async def answer(request: Request) -> Response:
    kind = request.path_params["kind"]
    if kind == "moved":
        return RedirectResponse("http://127.0.0.1:9/admin/workers")
    if kind == "page":
        return PlainTextResponse("hello", status_code=200 if request.method == "GET" else 502)
    if kind == "refused":
        return JSONResponse({"error": {"message": "no such thing."}}, status_code=404)
    asked = {"key": request.headers.get("authorization"), "body": (await request.body()).decode(), "kind": kind}
    return JSONResponse(asked)


def test_what_is_asked_and_what_comes_back() -> None:
    with HttpThread([Route("/admin/{kind:path}", answer, methods=["GET", "POST"])], 0) as server:
        client = AdminClient(f"{server.root}/v1/", "secret")
        assert client.ask("POST", "workers", "a/b c", "load", body={"x": 1}) == {
            "key": "Bearer secret",
            "body": '{"x":1}',
            "kind": "workers/a/b c/load",
        }
        assert AdminClient(server.root).ask("GET", "workers")["key"] is None
        for method, kind, text in (
            ("GET", "refused", "the gateway refuses: no such thing."),
            ("POST", "page", "refuses: status 502"),
            ("GET", "page", "does not answer as a gateway does"),
            ("GET", "moved", "refuses: status 307"),
        ):
            with pytest.raises(ServeError, match=text):
                client.ask(method, kind)


def test_a_gateway_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ServeError, match=f"there is no gateway at {url}"):
        AdminClient(url).ask("GET", "workers")
    with pytest.raises(UsageError, match="is no gateway URL"):
        AdminClient("ftp://here")
