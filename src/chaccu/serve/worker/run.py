"""`run_worker`: load an engine, join the gateways, serve; join again whenever one of them comes back.

Invariants: whatever is wrong with the model is said before a gateway hears of it; a lost gateway never ends the worker, a
refusal does where it is the only one; SIGTERM drains, Ctrl-C ends at once. It ignores which engine serves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import Callable, Sequence

from websockets.asyncio.client import ClientConnection

from chaccu.conversation import TextTokenizer, check_format, resolve_format
from chaccu.engine import Engine, ModelSource, choose_engine, load_engine, resolve_model
from chaccu.engine.scripted import build_byte_tokenizer
from chaccu.serve.link import PROTOCOL_VERSION, Join, ModelOffer
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tls import build_client_context
from chaccu.serve.worker.config import WorkerConfig
from chaccu.serve.worker.gateways import GatewayAddress, NamedGateway, parse_gateway
from chaccu.serve.worker.joined import stay_joined
from chaccu.serve.worker.membership import Membership
from chaccu.serve.worker.prompt import PromptBuilder
from chaccu.serve.worker.session import WorkerSession
from chaccu.serve.worker.sharing import GatewayShares


def run_worker(config: WorkerConfig, announce: Callable[[str], None], *, lines: LogWriter | None = None) -> None:
    """Serve one model until SIGTERM or Ctrl-C; `announce` gets one line an event, `lines` one a request.

    Raises `EngineError`, `UsageError`, `TokenizerError` or `MissingDependencyError` before joining, `ServeError` when the
    last gateway refuses.
    """
    gateways = [parse_gateway(gateway) for gateway in config.gateways]
    context = None
    if any(gateway.url.startswith("wss:") for gateway in gateways):
        context = build_client_context(config.tls_ca, config.tls_cert, config.tls_key)
    source = resolve_model(config.model, chat_format=config.chat_format, name=config.name)
    engine_name, reason = choose_engine(source, config.engine)
    builder = _build_prompts(source)
    announce(f"loading {source.name} with the engine {engine_name}: {reason}")
    # Loaded before the event loop starts, so Ctrl-C ends a long load as it ends any program.
    engine = load_engine(engine_name).load(source, config.options)
    asyncio.run(_serve(config, gateways, context, source, engine, builder, announce, lines))


def _build_prompts(source: ModelSource) -> PromptBuilder:
    """Raises `FormatError` or `TokenizerError` when format and tokenizer cannot keep the promise of token identity."""
    chat_format, tokenizer = resolve_format(source.chat_format, source.folder), _load_tokenizer(source)
    if not source.is_scripted:
        check_format(chat_format, tokenizer)
    return PromptBuilder(chat_format, tokenizer)


def _load_tokenizer(source: ModelSource) -> TextTokenizer:
    return build_byte_tokenizer() if source.folder is None else TextTokenizer.load(source.folder)


async def _serve(
    config: WorkerConfig,
    gateways: Sequence[NamedGateway],
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
    shares = GatewayShares()

    async def serve(connection: ClientConnection) -> None:
        await WorkerSession(connection, engine, builder, announce, lines, shares).run(draining, config.drain_s)

    async def join_one(gateway: GatewayAddress, is_named: Callable[[], bool]) -> None:
        ready = (
            f"worker ready: {source.name} at {gateway.shown} ({info.engine} on {info.device}, {info.slots} slots "
            f"of {info.context_tokens:,} tokens)"
        )
        await stay_joined(gateway, join, serve, is_named, draining, announce, context=context, ready=ready)

    try:
        await Membership(gateways, join_one, announce).run(draining)
    finally:
        await engine.close()
    announce(f"{source.name}: drained and stopped")
