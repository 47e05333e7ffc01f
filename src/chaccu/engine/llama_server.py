"""`LlamaServer`: llama.cpp's own server inside this process, over one GGUF file, with one adapter or none.

It listens on a loopback port of its own with a random key; what is asked goes to it as JSON and comes back as a stream.
Invariants: leaving a response closes its connection, which frees the slot there; errors are told in its words, without paths.

It ignores what is asked, and who waits for a slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chaccu.engine.server_text import tell_error
from chaccu.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    import aiohttp

EMBEDDED_TOKENS = 512  # of one input at most: llama.cpp's own size of a batch


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`context_tokens`: of one request."""

    gguf: Path
    threads: int
    slots: int
    context_tokens: int


class LlamaServer:
    """Starts with its making, which blocks until the weights are there. Raises `EngineError` or `MissingDependencyError`."""

    def __init__(self, settings: ServerSettings, adapter: Path | None = None) -> None:
        xllamacpp = _load_library()
        key = secrets.token_urlsafe(24)
        params = _build_params(settings, key)
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # the binding raises whatever llama.cpp's loader met
            if adapter is not None:
                raise EngineError(
                    f"llama.cpp cannot load {adapter} with {settings.gguf.name}: it is damaged, or for another model.",
                    remedy="make it with chaccu weights adapter-gguf from an adapter of this very base",
                ) from error
            raise EngineError(
                f"llama.cpp cannot load {settings.gguf}: {error}.", remedy="check the file; make it again if it is damaged"
            ) from error
        self.url = self._server.listening_address
        self.key = key
        self._session: aiohttp.ClientSession | None = None

    def trained_context(self) -> int:
        """The longest context the weights were trained for, in tokens."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        try:
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {self.key}"})
            models = msgspec.json.decode(connection.getresponse().read())
        finally:
            connection.close()
        return int(models["data"][0]["meta"]["n_ctx_train"])

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response, which is none of an error. Raises `EngineError`."""
        import aiohttp

        if self._session is None:
            # A kept-alive connection of this server can break after a stream, and closing one is what cancels its work.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Authorization": f"Bearer {self.key}"},
                trust_env=False,
            )
        try:
            async with self._session.post(self.url + path, json=body) as response:
                if response.status != 200:
                    raise EngineError(f"llama.cpp refused the request: {tell_error(await response.read())}")
                yield response
        except aiohttp.ClientError as error:
            raise EngineError(f"the connection to llama.cpp broke: {error}.", remedy="ask again") from error

    async def close(self) -> None:
        """End it and free what it holds."""
        if self._session is not None:
            await self._session.close()
        # The server joins its threads when it is freed, which may take as long as one batch.
        server, self._server = self._server, None
        await asyncio.to_thread(_free, [server])


def _load_library() -> Any:
    # OpenMP's threads that spin for long starve everything else on shared cores; those that do not spin at all lose a tenth
    # of the speed in waking. The library reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        import xllamacpp
    except ImportError as error:
        raise MissingDependencyError("xllamacpp", extra="cpu-engine", needed_for="the engine llamacpp") from error
    return xllamacpp


def _build_params(settings: ServerSettings, key: str) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(settings.gguf)
    params.n_parallel = settings.slots
    params.n_ctx = settings.context_tokens * settings.slots  # llama.cpp divides its context among the slots
    params.ctx_shift = False
    params.cpuparams.n_threads = settings.threads
    params.cpuparams_batch.n_threads = settings.threads
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.n_threads_http = settings.slots + 2  # one a running stream, and some to refuse with
    params.verbosity = -1
    params.ui = False
    # Texts too: it still answers, and gives vectors beside. Their mean is made inside one batch of the processor's.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_ubatch = EMBEDDED_TOKENS
    params.endpoint_slots = False
    params.endpoint_props = False
    return params


def _free(owners: list[Any]) -> None:
    owners.clear()
