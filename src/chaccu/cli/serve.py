"""`chaccu serve`, `chaccu gateway`, `chaccu worker`: models as a service."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chaccu.cli.serve_options import (
    Adapters,
    AllowLoad,
    Context,
    CorsOrigins,
    Drain,
    Engine,
    Format,
    Host,
    Keys,
    LogFolder,
    LogFormat,
    LogFormatOption,
    LogLevel,
    LogLevelOption,
    Open,
    Otlp,
    Port,
    PortFile,
    Records,
    Slots,
    Threads,
    Token,
    Upstreams,
    VllmPython,
    WithoutSharedState,
)

if TYPE_CHECKING:
    from chaccu.serve.log_writer import LogWriter
    from chaccu.serve.tracing import Tracing


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("serve", epilog="Example: chaccu serve runs/demo/tuned --port 8000")(serve_command)
    app.command("gateway", epilog="Example: chaccu gateway --port 8000 --upstream llama3=http://127.0.0.1:11434/v1")(
        gateway_command
    )
    app.command("worker", epilog="Example: chaccu worker --model runs/demo/tuned --gateway http://127.0.0.1:8000")(
        worker_command
    )


def serve_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders, .gguf files or hub ids.")],
    name: Annotated[list[str] | None, typer.Option(help="Name to serve under; repeat it once a MODEL, in order.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    port_file: PortFile = None,
    upstream: Upstreams = None,
    log_conversations: LogFolder = None,
    records: Records = "",
    keys: Keys = None,
    is_open: Open = False,
    join_token: Token = "",
    cors_origin: CorsOrigins = None,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
    otlp: Otlp = "",
    engine: Engine = "auto",
    vllm_python: VllmPython = None,
    chat_format: Format = None,
    adapter: Adapters = None,
    allow_load: AllowLoad = None,
    threads: Threads = None,
    slots: Slots = None,
    context_tokens: Context = None,
    drain: Drain = 30.0,
) -> None:
    """Serve models on this machine: a gateway and one worker a model, until Ctrl-C."""
    import os
    import secrets

    from chaccu.engine import parse_adapter, resolve_adapter, resolve_model
    from chaccu.errors import UsageError
    from chaccu.serve.local import LocalModel, serve_locally

    names = name or []
    if names and len(names) != len(models):
        raise UsageError(f"{len(names)} --name for {len(models)} models.", remedy="give one --name a MODEL, or none")
    # Found before anything starts: a wrong path is one message and no processes.
    sources = [
        resolve_model(model, chat_format=chat_format, name=names[index] if names else None)
        for index, model in enumerate(models)
    ]
    served = [source.name for source in sources]
    twice = sorted({one for one in served if served.count(one) > 1})
    if twice:
        raise UsageError(f"two models would be served as {twice[0]!r}.", remedy="tell them apart with --name, once a MODEL")
    if adapter and len(models) > 1:
        raise UsageError(
            f"--adapter with {len(models)} models: over which one?", remedy="one MODEL, or a chaccu worker for each"
        )
    for text in adapter or []:
        resolve_adapter(*parse_adapter(text), sources[0])
    log_options = {"--log-format": log_format, "--log-level": log_level, "--otlp": otlp or None}
    worker_arguments = _repeat(
        {
            "--engine": engine,
            "--vllm-python": vllm_python,
            "--format": chat_format,
            "--adapter": adapter,
            "--allow-load": allow_load,
            "--threads": threads,
            "--slots": slots,
            "--context-tokens": context_tokens,
            **log_options,
        }
    )
    gateway_arguments = _repeat(
        {
            "--host": host,
            "--port": port,
            "--upstream": upstream,
            "--log-conversations": log_conversations,
            "--cors-origin": cors_origin,
            "--keys": keys,
            "--open": is_open,
            "--drain": drain,
            **log_options,
        }
    )
    if records:
        # It may hold a password, and a command line can be read by everyone on the machine.
        os.environ["CHACCU_RECORDS"] = records
    # With keys nobody joins by an empty token; our own workers get one that nobody else has.
    _share_token(join_token or ("" if keys is None else secrets.token_urlsafe()))
    with _open_log(log_format, log_level) as lines:
        serve_locally(
            gateway_arguments,
            [
                LocalModel(
                    name=source.name, worker_arguments=("--model", source.spec, "--name", source.name, *worker_arguments)
                )
                for source in sources
            ],
            lines.say,
            port_file=port_file,
            drain_s=drain,
        )


def gateway_command(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    upstream: Upstreams = None,
    port_file: PortFile = None,
    log_conversations: LogFolder = None,
    records: Records = "",
    keys: Keys = None,
    is_open: Open = False,
    join_token: Token = "",
    shared_state: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="CHACCU_SHARED_STATE",
            help="redis://HOST:6379 (Valkey too): several gateways keep the limits of keys together.",
        ),
    ] = "",
    shared_state_down: Annotated[
        WithoutSharedState,
        typer.Option(help="While it does not answer: keep to the limits each gateway by itself, or refuse keys with limits."),
    ] = WithoutSharedState.LOCAL,
    cors_origin: CorsOrigins = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate with its chain (PEM): serve https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM), where the certificate's file has none.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Let in only who shows a certificate of this authority (PEM).")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL, or NAME=MODEL:9,OTHER:1 to split its requests by weight; repeat for more."),
    ] = None,
    queue_size: Annotated[
        int, typer.Option(min=0, help="Requests of one model that may wait for a free slot; more get status 429.")
    ] = 1000,
    queue_seconds: Annotated[float, typer.Option(min=0, help="Seconds such a request waits, then it gets status 429.")] = 60.0,
    rejoin_wait: Annotated[
        float, typer.Option(min=0, help="Seconds a request waits when its model has lost its last worker or upstream.")
    ] = 5.0,
    stall_seconds: Annotated[
        float,
        typer.Option(min=0, help="Seconds after which the answers of a worker that hangs go on elsewhere; 0: never."),
    ] = 5.0,
    hedge: Annotated[
        bool, typer.Option(help="Ask a second worker where the first text takes unusually long, for 5 % of requests at most.")
    ] = True,
    upstream_stall_seconds: Annotated[
        float,
        typer.Option(min=0, help="Seconds an upstream's stream may stand still, then another goes on with it; 0: for ever."),
    ] = 60.0,
    first_byte_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds of an upstream's silence to a request, then another is asked if it is frozen; 0: never."
        ),
    ] = 120.0,
    request_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that a whole request may take, waiting included; 0: without end.")
    ] = 3600.0,
    drain: Drain = 30.0,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections that clients may have open at once.")] = 10_000,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
    otlp: Otlp = "",
) -> None:
    """The one address for clients; workers join it."""
    from chaccu.serve.gateway import GatewayConfig, parse_upstream, serve_gateway
    from chaccu.serve.gateway.access.aliases import parse_alias

    config = GatewayConfig(
        host=host,
        port=port,
        upstreams=tuple(parse_upstream(text) for text in upstream or []),
        join_token=join_token,
        keys=keys,
        is_open=is_open,
        shared_state=shared_state,
        shared_state_down=shared_state_down.value,
        cors_origins=tuple(cors_origin or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        aliases=dict(parse_alias(text) for text in alias or []),
        queue_size=queue_size,
        queue_wait_s=queue_seconds,
        rejoin_wait_s=rejoin_wait,
        stall_s=stall_seconds,
        request_timeout_s=request_seconds,
        max_connections=max_connections,
        drain_s=drain,
        hedge=hedge,
        upstream_stall_s=upstream_stall_seconds,
        first_byte_s=first_byte_seconds,
    )
    with _open_log(log_format, log_level) as lines, _open_tracing(otlp, "chaccu-gateway") as tracing:
        serve_gateway(
            config,
            lines.say,
            port_file=port_file,
            log_folder=log_conversations,
            records_url=records,
            lines=lines,
            tracing=tracing,
        )


def worker_command(
    model: Annotated[str, typer.Option(help="Model folder, .gguf file, hub id or scripted:NAME; with --url a server's name.")],
    gateway: Annotated[
        list[str],
        typer.Option(help="URL of a gateway to join; repeat for more. dns+http://NAME:PORT joins every address of NAME."),
    ],
    engine_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="FLAGS", help="Flags for vLLM, as they are; write them behind --.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name to serve under; default: the model's own.")] = None,
    engine: Engine = "auto",
    url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible server that has the model (http://HOST:PORT/v1); CHACCU_ENGINE_KEY is its key."
        ),
    ] = None,
    vllm_python: VllmPython = None,
    chat_format: Format = None,
    adapter: Adapters = None,
    allow_load: AllowLoad = None,
    threads: Threads = None,
    slots: Slots = None,
    context_tokens: Context = None,
    join_token: Token = "",
    drain: Drain = 30.0,
    weight: Annotated[
        float, typer.Option(min=0.001, max=1000, help="Share of the model's requests, beside equal workers of weight 1.")
    ] = 1.0,
    priority: Annotated[
        int, typer.Option(min=-1000, max=1000, help="A worker of higher priority gets requests first, while it has free slots.")
    ] = 0,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authority to trust for an https gateway (PEM), instead of the system's.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate to show to a gateway that asks for one (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM), where the certificate's file has none.")] = None,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
    otlp: Otlp = "",
) -> None:
    """Load one model and join one or more gateways with it; joins again whenever one comes back."""
    from chaccu.engine import EngineOptions, parse_adapter
    from chaccu.serve.worker import WorkerConfig, run_worker

    config = WorkerConfig(
        model=model,
        gateways=tuple(gateway),
        name=name,
        engine=engine,
        chat_format=chat_format,
        model_url=url,
        adapters=tuple(parse_adapter(text) for text in adapter or []),
        allow_load=allow_load,
        options=EngineOptions(
            threads=threads,
            slots=slots,
            context_tokens=context_tokens,
            program=vllm_python,
            arguments=tuple(engine_flags or ()),
        ),
        join_token=join_token,
        drain_s=drain,
        weight=weight,
        priority=priority,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    with _open_log(log_format, log_level) as lines, _open_tracing(otlp, "chaccu-worker") as tracing:
        run_worker(config, lines.say, lines=lines, tracing=tracing)


def _share_token(join_token: str) -> None:
    """Children get the token by their environment: a command line can be read by everyone on the machine."""
    import os

    if join_token:
        os.environ["CHACCU_JOIN_TOKEN"] = join_token


def _repeat(options: Mapping[str, Any]) -> list[str]:
    """Options as they were given, for a child: a list's once for each value, a flag's where it is set."""
    arguments: list[str] = []
    for option, value in options.items():
        if value is None or value is False:
            continue
        if value is True:
            arguments.append(option)
            continue
        for one in value if isinstance(value, list) else [value]:
            arguments += [option, str(one)]
    return arguments


def _open_log(log_format: LogFormat | None, level: LogLevel | None) -> LogWriter:
    from chaccu.serve.log_writer import LogWriter

    default = LogLevel.WARNING if log_format is None else LogLevel.INFO
    return LogWriter(log_format or LogFormat.TEXT, level or default)


def _open_tracing(otlp: str, service: str) -> AbstractContextManager[Tracing | None]:
    if not otlp:
        return nullcontext()
    from chaccu.serve.tracing import Tracing

    return Tracing(otlp, service)
