"""Pages of browsers and TLS at a real gateway: who is let in, on the fast path and beside it."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from chaccu.errors import UsageError
from chaccu.serve.gateway.config import GatewayConfig, check_config
from chaccu.serve.tls import build_server_context
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.processes import start_command, start_gateway, start_worker, wait_until

PAGE = "https://chat.example.org"
CHAT = {"model": "up", "messages": [{"role": "user", "content": "Hi"}]}


def ask(
    url: str, method: str = "GET", headers: dict[str, str] | None = None, fields: Any = None, context: Any = None
) -> tuple[int, dict[str, str]]:
    """Status, and headers with lower-case names."""
    data = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            return response.status, {name.lower(): value for name, value in response.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeOpenAI]:
    with FakeOpenAI({"up": FakeModel()}) as server:
        yield server


@pytest.mark.parametrize("is_open", [False, True])
def test_pages_are_let_in_by_origin_alone(tmp_path: Path, upstream: FakeOpenAI, is_open: bool) -> None:
    options = ("--cors-origin", PAGE) if is_open else ()
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
    with start_gateway(tmp_path, "--upstream", f"up={upstream.url}/v1", *options) as gateway:
        chat = f"{gateway.url}/v1/chat/completions"
        for origin, let_in in ((PAGE, is_open), ("https://elsewhere.example.org", False), (f"{PAGE}:8443", False)):
            shown = PAGE if let_in else None
            for method, url, fields, status in (
                ("POST", chat, CHAT, 200),  # the fast path
                ("POST", chat, {**CHAT, "temperature": 9}, 400),
                ("GET", f"{gateway.url}/v1/models", None, 200),
                ("GET", f"{gateway.url}/nowhere", None, 404),
            ):
                got, headers = ask(url, method, {"origin": origin}, fields)
                assert (got, headers.get("access-control-allow-origin")) == (status, shown)
                assert headers.get("vary") == ("Origin" if is_open else None)
                assert ("x-request-id" in headers.get("access-control-expose-headers", "")) == let_in
            status, headers = ask(chat, "OPTIONS", {"origin": origin, **preflight})
            assert (status, headers.get("access-control-allow-origin")) == (204 if let_in else 405, shown)
            if let_in:
                assert headers["access-control-allow-headers"] == preflight["access-control-request-headers"]
                assert "POST" in headers["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in headers


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca.pem`, and `gateway` and `worker` as `.pem` with `.key`."""
    folder = tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("gateway", "worker"):
        cert = authority.issue_cert("127.0.0.1", "localhost")
        cert.private_key_pem.write_to_path(folder / f"{name}.key")
        for blob in cert.cert_chain_pems:
            blob.write_to_path(folder / f"{name}.pem", append=True)
    return folder


def pair(files: Path, name: str) -> tuple[str, ...]:
    return ("--tls-cert", str(files / f"{name}.pem"), "--tls-key", str(files / f"{name}.key"))


def test_gateway_and_worker_speak_tls(tmp_path: Path, files: Path, authority: trustme.CA, upstream: FakeOpenAI) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with start_gateway(tmp_path, "--upstream", f"up={upstream.url}/v1", *pair(files, "gateway")) as gateway:
        assert gateway.url.startswith("https://")
        # A client that speaks plain HTTP by mistake, or breaks off the handshake, gets no answer and harms nobody.
        port = int(gateway.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200" not in plain.recv(1000)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{gateway.url}/health", timeout=5)
        with start_worker(tmp_path, gateway, "scripted:mine", "--tls-ca", str(files / "ca.pem")):
            for model in ("mine", "up"):
                status, headers = ask(f"{gateway.url}/v1/chat/completions", "POST", {}, {**CHAT, "model": model}, context)
                assert status == 200
                assert "x-request-id" in headers
        stranger = start_command(tmp_path, ["worker", "--model", "scripted:other", "--gateway", gateway.url])
        with stranger:
            wait_until(lambda: "not trusted" in stranger.log, stranger, timeout_s=20)
            assert "--tls-ca" in stranger.log
        assert "Traceback" not in gateway.log


def test_a_client_authority_lets_in_its_own_alone(tmp_path: Path, files: Path, authority: trustme.CA) -> None:
    arguments = (*pair(files, "gateway"), "--tls-client-ca", str(files / "ca.pem"))
    with start_gateway(tmp_path, *arguments) as gateway:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)):
            urllib.request.urlopen(f"{gateway.url}/health", timeout=5, context=context)
        with start_worker(tmp_path, gateway, "scripted:mine", "--tls-ca", str(files / "ca.pem"), *pair(files, "worker")):
            context.load_cert_chain(files / "worker.pem", files / "worker.key")
            assert ask(f"{gateway.url}/ready?model=mine", context=context)[0] == 200


@pytest.mark.parametrize(
    ("cert", "key", "client_ca", "said"),
    [
        ("worker.pem", "gateway.key", None, "no certificate with its key"),
        ("none.pem", None, None, r"no certificate with its key \(No such file or directory\)"),
        ("gateway.pem", "gateway.key", "gateway.key", "no certificate of an authority"),
    ],
)
def test_files_that_hold_something_else_are_said(
    files: Path, cert: str, key: str | None, client_ca: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build_server_context(files / cert, key and files / key, client_ca and files / client_ca)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tls_key": Path("gateway.key")}, "no TLS without a certificate"),
        ({"cors_origins": ("*",)}, "without API keys"),
        ({"cors_origins": ("chat.example.org",)}, "is no origin"),
        ({"cors_origins": ("https://chat.example.org/",)}, "is no origin"),
        ({"cors_origins": ("https://Chat.example.org",)}, "is no origin"),
    ],
)
def test_what_must_not_be_served_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_config(GatewayConfig(**options))
