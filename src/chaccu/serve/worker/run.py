"""`run_worker`: load an engine, join the gateway, serve; join again whenever the gateway comes back.

Invariants: whatever is wrong with the model is said before the gateway hears of it; a lost gateway never ends the worker, a
refusal does; SIGTERM drains, Ctrl-C ends at once. It ignores which engine serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from chaccu.conversation import TextTokenizer, check_format, resolve_format
from chaccu.engine import Engine, ModelSource, choose_engine, load_engine, resolve_model
from chaccu.engine.scripted import build_byte_tokenizer
from chaccu.errors import ServeError, UsageError
from chaccu.serve.link import (
    JOIN_PATH,
    JOIN_TIMEOUT_S,
    MAX_FRAME_BYTES,
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
    PROTOCOL_VERSION,
    Join,
    ModelOffer,
    Refused,
    Welcome,
    decode_to_worker,
    encode_frame,
)
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tls import build_client_context
from chaccu.serve.worker.config import WorkerConfig
from chaccu.serve.worker.prompt import PromptBuilder
from chaccu.serve.worker.session import WorkerSession

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 1.5


def run_worker(config: WorkerConfig, announce: Callable[[str], None], *, lines: LogWriter | None = None) -> None:
    """Serve one model until SIGTERM or Ctrl-C; `announce` gets one line an event, `lines` one a request.

    Raises `EngineError`, `UsageError`, `TokenizerError` or `MissingDependencyError` before joining, `ServeError` when the
    gateway refuses.
    """
    url = join_url(config.gateway)
    context = None
    if url.startswith("wss:"):
        context = build_client_context(config.tls_ca, config.tls_cert, config.tls_key)
    source = resolve_model(config.model, chat_format=config.chat_format, name=config.name)
    engine_name, reason = choose_engine(source, config.engine)
    builder = _build_prompts(source)
    announce(f"loading {source.name} with the engine {engine_name}: {reason}")
    # Loaded before the event loop starts, so Ctrl-C ends a long load as it ends any program.
    engine = load_engine(engine_name).load(source, config.options)
    asyncio.run(_serve(config, url, context, source, engine, builder, announce, lines))


def _build_prompts(source: ModelSource) -> PromptBuilder:
    """Raises `FormatError` or `TokenizerError` when format and tokenizer cannot keep the promise of token identity."""
    chat_format, tokenizer = resolve_format(source.chat_format, source.folder), _load_tokenizer(source)
    if not source.is_scripted:
        check_format(chat_format, tokenizer)
    return PromptBuilder(chat_format, tokenizer)


def join_url(gateway: str) -> str:
    """The WebSocket URL at which workers join the gateway at `gateway`. Raises `UsageError` when that is no http(s) URL."""
    parts = urlsplit(gateway if "://" in gateway else f"http://{gateway}")
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise UsageError(f"{gateway!r} is no gateway URL.", remedy="write it as http://HOST:PORT")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + JOIN_PATH, "", ""))


def _load_tokenizer(source: ModelSource) -> TextTokenizer:
    return build_byte_tokenizer() if source.folder is None else TextTokenizer.load(source.folder)


async def _serve(
    config: WorkerConfig,
    url: str,
    context: ssl.SSLContext | None,
    source: ModelSource,
    engine: Engine,
    builder: PromptBuilder,
    announce: Callable[[str], None],
    lines: LogWriter | None,
) -> None:
    draining = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, draining.set)
    info = engine.info
    offer = ModelOffer(
        name=source.name,
        engine=info.engine,
        context_tokens=info.context_tokens,
        slots=info.slots,
        chat_format=source.chat_format,
        device=info.device,
        weight=config.weight,
        priority=config.priority,
        abilities=info.abilities,
        vocab_size=builder.vocab_size,
    )
    identity = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
    join = Join(protocol=PROTOCOL_VERSION, worker=identity, models=(offer,), token=config.join_token)
    delay_s, reported = _FIRST_DELAY_S, False
    try:
        while not draining.is_set():
            try:
                async with _connect(url, context) as connection:
                    await _join(connection, join)
                    announce(
                        f"worker ready: {source.name} at {config.gateway} ({info.engine} on {info.device}, {info.slots} slots "
                        f"of {info.context_tokens:,} tokens)"
                    )
                    delay_s, reported = _FIRST_DELAY_S, False
                    await WorkerSession(connection, engine, builder, announce, lines).run(draining, config.drain_s)
            except (OSError, WebSocketException, TimeoutError) as error:
                if not reported:
                    announce(f"{_reason(error, config.gateway)}; trying again")
                    reported = True
            # Jitter: a restarted gateway must not meet all its workers in one instant.
            await _wait(draining, delay_s * random.uniform(0.7, 1.0))
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
    finally:
        await engine.close()
    announce(f"{source.name}: drained and stopped")


def _connect(url: str, context: ssl.SSLContext | None) -> connect:
    loopback = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return connect(
        url,
        ssl=context,
        max_size=MAX_FRAME_BYTES,
        compression=None,
        ping_interval=PING_INTERVAL_S,
        ping_timeout=PING_TIMEOUT_S,
        open_timeout=JOIN_TIMEOUT_S,
        close_timeout=1,
        proxy=None if loopback else True,
    )


async def _join(connection: ClientConnection, join: Join) -> None:
    await connection.send(encode_frame(join))
    async with asyncio.timeout(JOIN_TIMEOUT_S):
        data = await connection.recv()
    answer = decode_to_worker(data if isinstance(data, bytes) else data.encode())
    if isinstance(answer, Refused):
        raise ServeError(f"the gateway refused this worker: {answer.reason}", remedy=answer.remedy)
    if not isinstance(answer, Welcome):
        raise ServeError(
            f"the gateway answered a join with a {type(answer).__name__} frame.", remedy="run the same version on both sides"
        )


def _reason(error: Exception, gateway: str) -> str:
    if isinstance(error, ConnectionClosed):
        return f"the connection to the gateway at {gateway} is lost"
    if isinstance(error, InvalidStatus):
        return f"{gateway} answers with status {error.response.status_code} and is no Chaccu gateway"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {gateway} is not trusted ({error.verify_message}; --tls-ca names its authority)"
    return f"the gateway at {gateway} is not reachable ({error or type(error).__name__})"


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for `event`, `timeout_s` at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
