"""`create_gateway`: the gateway as an ASGI app.

Invariant: everything it holds is made here and lives in the app; two gateways in one process share nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp

from chaccu.serve.gateway.access.aliases import Aliases
from chaccu.serve.gateway.access.shared_limits import SharedLimits
from chaccu.serve.gateway.config import GatewayConfig, check_config
from chaccu.serve.gateway.cors import CorsPolicy
from chaccu.serve.gateway.dialects.dialects import DIALECTS, write_error
from chaccu.serve.gateway.drain import Drain
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.http.admin import AdminApi
from chaccu.serve.gateway.http.admission import Admission
from chaccu.serve.gateway.http.api import AnswerApi
from chaccu.serve.gateway.http.front import FastRelay
from chaccu.serve.gateway.http.joining import WorkerDoor
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.http.observed_app import ObservedApp, note_of
from chaccu.serve.gateway.http.question_api import QuestionApi
from chaccu.serve.gateway.http.reception import Reception
from chaccu.serve.gateway.http.request_note import Observer
from chaccu.serve.gateway.http.status_api import StatusApi
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay
from chaccu.serve.gateway.workers.back_pressure import BackPressure
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.link import JOIN_PATH
from chaccu.serve.log_writer import LogWriter
from chaccu.serve.tracing import Tracing

_RETRY_AFTER_S = "1"


def create_gateway(
    config: GatewayConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    log: ConversationLog | None = None,
    lines: LogWriter | None = None,
    tracing: Tracing | None = None,
) -> Starlette:
    """The app for `config`; `clock` gives seconds. Chat answers are added to `log`, which the caller closes, `lines` gets one
    line a request, and `tracing` its span.

    `app.state.fast_relay` is what a `Front` needs to answer beside the app; its `drain` tells all of it to take nothing new.

    Raises `UsageError` for a configuration that must not be served, `MissingDependencyError` where it needs a library that is
    not installed.
    """
    check_config(config)
    registry = WorkerRegistry(clock)
    metrics = GatewayMetrics(log)
    observer = Observer(metrics, lines, CorsPolicy(config.cors_origins), clock, tracing)
    upstreams = UpstreamRelay(config, lambda model: metrics.count_event(model, "continued"), clock)
    metrics.watch_upstreams(upstreams)
    shared = None
    if config.shared_state:
        shared = SharedLimits(config.shared_state, config.shared_state_down, clock)
        metrics.watch_shared_limits(shared)
    admission = Admission(config, metrics, clock, shared)
    drain = Drain()
    aliases = Aliases(config.aliases)
    queues = BackPressure(registry, size=config.queue_size, wait_s=config.queue_wait_s, clock=clock)
    reception = Reception(config, admission, aliases, registry, upstreams, drain)
    api = AnswerApi(config, reception, admission, aliases, queues, registry, upstreams, metrics, clock, log)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if shared is not None:
            shared.start()
        yield
        upstreams.close()
        if shared is not None:
            await shared.close()

    status = StatusApi(admission, registry, upstreams, queues, metrics, observer, drain, with_keys=config.keys is not None)
    app = _Gateway(
        observer,
        routes=[
            Route("/v1/models", api.models),
            *(Route(dialect.path, api.endpoint(dialect), methods=["POST"]) for dialect in DIALECTS),
            *QuestionApi(config, reception, queues, registry, api.relay).routes(),
            *status.routes(),
            *AdminApi(config, admission, registry, upstreams, aliases).routes(),
            WebSocketRoute(JOIN_PATH, WorkerDoor(config, admission, registry, clock).__call__),
        ],
        exception_handlers={ApiError: _show_api_error, HTTPException: _show_http_error, Exception: _show_crash},
        lifespan=lifespan,
    )
    app.state.fast_relay = FastRelay(config, admission, aliases, upstreams, observer, log, drain)
    return app


class _Gateway(Starlette):
    """Notes each request outside of all else that the app does, so that crashes are noted too."""

    def __init__(self, observer: Observer, **starlettes: Any) -> None:
        super().__init__(**starlettes)
        self._observer = observer

    def build_middleware_stack(self) -> ASGIApp:
        return ObservedApp(super().build_middleware_stack(), self._observer)


def _show_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"retry-after": _RETRY_AFTER_S, **error.headers} if error.status == 503 else error.headers
    return _error(request, error, headers)


def _show_http_error(request: Request, error: Exception) -> Response:
    """A wrong path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    wrong = ApiError(error.status_code, message, kind="invalid_request_error", code="unknown_url")
    return _error(request, wrong, error.headers)


def _show_crash(request: Request, error: Exception) -> Response:
    crash = ApiError(500, "the gateway failed; its log has the details.", kind="server_error", code="internal_error")
    return _error(request, crash)


def _error(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    note_of(request.scope).fail(error)
    body = write_error(request.url.path, error)
    return Response(body, status_code=error.status, media_type="application/json", headers=headers)
