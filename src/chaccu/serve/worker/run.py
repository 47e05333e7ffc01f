"""`run_worker`: load an engine, join the gateways, serve; join again whenever one of them comes back.

Invariants: whatever is wrong with the model is said before a gateway hears of it; a lost gateway never ends the worker, a
refusal does where it is the only one; a lost engine makes it leave all of them until it has loaded it again; SIGTERM drains,
Ctrl-C ends at once. It ignores which engine serves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from websockets.asyncio.client import ClientConnection

from chaccu.conversation import TextTokenizer, check_format, resolve_format
from chaccu.engine import (
    AdapterEngine,
    AdapterSource,
    Engine,
    EngineInfo,
    EngineLostError,
    ModelSource,
    choose_engine,
    load_engine,
    resolve_adapter,
    resolve_model,
)
from chaccu.engine.scripted import build_byte_tokenizer
from chaccu.errors import EngineError, UsageError
from chaccu.serve.link import PROTOCOL_VERSION, Join, ModelOffer
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tls import build_client_context
from chaccu.serve.tracing import Tracing
from chaccu.serve.worker.config import WorkerConfig
from chaccu.serve.worker.gateways import GatewayAddress, NamedGateway, parse_gateway
from chaccu.serve.worker.joined import stay_joined
from chaccu.serve.worker.membership import Membership
from chaccu.serve.worker.prompt import PromptBuilder
from chaccu.serve.worker.served import Served, ServedModels
from chaccu.serve.worker.session import WorkerSession
from chaccu.serve.worker.sharing import GatewayShares
from chaccu.serve.worker.work_log import WorkLog, open_work_log

_FIRST_LOAD_DELAY_S = 0.5
_LONGEST_LOAD_DELAY_S = 30.0
_OF_ENGINES = "serve the model with llamacpp or transformers"
_OTHER_WAY = {"vllm": "name them by its own flags: -- --enable-lora --lora-modules NAME=FOLDER"}


def run_worker(
    config: WorkerConfig, announce: Callable[[str], None], *, lines: LogWriter | None = None, tracing: Tracing | None = None
) -> None:
    """Serve one model until SIGTERM or Ctrl-C; `announce` gets one line an event, `lines` one a request, and `tracing` its
    span.

    Raises `EngineError`, `UsageError`, `TokenizerError` or `MissingDependencyError` before joining, `ServeError` when the
    last gateway refuses, `EngineLostError` when only a new process can load the engine again.
    """
    gateways = [parse_gateway(gateway) for gateway in config.gateways]
    context = _build_context(config, is_tls=any(gateway.url.startswith("wss:") for gateway in gateways))
    source = resolve_model(config.model, chat_format=config.chat_format, name=config.name, url=config.model_url)
    engine_name, reason = choose_engine(source, config.engine, program=config.options.program)
    if config.options.arguments and engine_name != "vllm":
        raise UsageError(
            f"{config.options.arguments[0]!r} is a flag for vLLM, and the engine is {engine_name} ({reason}).",
            remedy="--engine vllm, or no flags behind --",
        )
    builder = _build_prompts(source)
    adapters = _find_adapters(config, source, engine_name)
    announce(f"loading {source.name} with the engine {engine_name}: {reason}")
    # Loaded before the event loop starts, so Ctrl-C ends a long load as it ends any program.
    load = partial(load_engine(engine_name).load, source, config.options)
    engine = load()
    while True:
        try:
            open_log = partial(open_work_log, lines, tracing)
            asyncio.run(_serve(config, gateways, context, source, engine, builder, adapters, announce, open_log))
        except EngineLostError as error:
            if error.needs_new_process:
                raise
            announce(f"{source.name} has lost its engine and leaves: {error.message}")
            engine = _load_again(load, announce)
        else:
            return


def _find_adapters(config: WorkerConfig, source: ModelSource, engine_name: str) -> list[AdapterSource]:
    """Those to be loaded at the start. Raises `UsageError` for an engine that loads none, or two of one name."""
    names = [source.name, *(name for name, _ in config.adapters)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two models would be served as {twice!r}.", remedy="give each --adapter a name of its own")
    if (config.adapters or config.allow_load) and not issubclass(load_engine(engine_name), AdapterEngine):
        raise UsageError(f"the engine {engine_name} loads no adapters.", remedy=_OTHER_WAY.get(engine_name, _OF_ENGINES))
    if config.allow_load is not None and not config.allow_load.is_dir():
        raise UsageError(f"--allow-load {config.allow_load} is no folder.", remedy="make it, or name another")
    return [resolve_adapter(name, folder, source) for name, folder in config.adapters]


def _load_again(load: Callable[[], Engine], announce: Callable[[str], None]) -> Engine:
    """However often it takes: what is lost by a fault of a machine or a network may be back in an hour."""
    delay_s = _FIRST_LOAD_DELAY_S
    while True:
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, _LONGEST_LOAD_DELAY_S)
        try:
            return load()
        except EngineError as error:
            announce(f"the engine cannot be loaded again; next try in {delay_s:g} s: {error.message}")


def _build_context(config: WorkerConfig, *, is_tls: bool) -> ssl.SSLContext | None:
    if is_tls:
        return build_client_context(config.tls_ca, config.tls_cert, config.tls_key)
    if config.tls_ca is not None or config.tls_cert is not None:
        raise UsageError(f"there is no TLS to {config.gateways[0]}.", remedy="write the gateway's URL as https://HOST:PORT")
    return None


def _build_prompts(source: ModelSource) -> PromptBuilder:
    """Raises `FormatError` or `TokenizerError` when format and tokenizer cannot keep the promise of token identity."""
    chat_format, tokenizer = resolve_format(source.chat_format, source.folder), _load_tokenizer(source)
    if source.folder is not None:
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
    adapters: Sequence[AdapterSource],
    announce: Callable[[str], None],
    open_log: Callable[[str], WorkLog | None],
) -> None:
    draining = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, draining.set)
    info = engine.info
    served = ServedModels(
        engine,
        Served(offer=_describe(config, source, info, builder), builder=builder),
        source,
        lambda chat_format: _build_prompts(msgspec.structs.replace(source, chat_format=chat_format)),
        config.allow_load,
    )
    identity = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"

    def build_join() -> Join:
        return Join(protocol=PROTOCOL_VERSION, worker=identity, models=served.offers, token=config.join_token)

    shares = GatewayShares()

    async def serve(connection: ClientConnection, join: Join) -> None:
        await WorkerSession(connection, served, announce, open_log(identity), shares, join.models).run(draining, config.drain_s)

    async def join_one(gateway: GatewayAddress, is_named: Callable[[], bool]) -> None:
        names = ", ".join(offer.name for offer in served.offers)
        ready = (
            f"worker ready: {names} at {gateway.shown} ({info.engine} on {info.device}, {info.slots} slots "
            f"of {info.context_tokens:,} tokens)"
        )
        await stay_joined(gateway, build_join, serve, is_named, draining, announce, context=context, ready=ready)

    try:
        for adapter in adapters:
            announce(f"loading the adapter {adapter.name}")
            await served.add(adapter)
        await Membership(gateways, join_one, announce).run(draining)
    finally:
        await engine.close()
    announce(f"{source.name}: drained and stopped")


def _describe(config: WorkerConfig, source: ModelSource, info: EngineInfo, builder: PromptBuilder) -> ModelOffer:
    return ModelOffer(
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
