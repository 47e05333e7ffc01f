"""`StatusApi`: what a gateway says of itself: whether it runs and serves, its counts, its API's description.

Invariant: `/health` and `/ready` ask for no key. It ignores requests for answers.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chaccu.serve.gateway.dialects.dialects import DIALECTS
from chaccu.serve.gateway.dialects.openapi import describe_api, describe_dialect
from chaccu.serve.gateway.drain import Drain
from chaccu.serve.gateway.http.admission import Admission
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.http.question_api import QUESTIONS
from chaccu.serve.gateway.http.request_note import Observer
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay
from chaccu.serve.gateway.workers.back_pressure import BackPressure
from chaccu.serve.gateway.workers.registry import WorkerRegistry


class StatusApi:
    """The pages of one gateway. `with_keys`: requests for answers need an API key."""

    def __init__(
        self,
        admission: Admission,
        registry: WorkerRegistry,
        upstreams: UpstreamRelay,
        queues: BackPressure,
        metrics: GatewayMetrics,
        observer: Observer,
        drain: Drain,
        *,
        with_keys: bool,
    ) -> None:
        self._admission = admission
        self._registry = registry
        self._upstreams = upstreams
        self._queues = queues
        self._metrics = metrics
        self._observer = observer
        self._drain = drain
        self._description = msgspec.json.encode(
            describe_api([*map(describe_dialect, DIALECTS), *QUESTIONS], with_keys=with_keys)
        )

    def routes(self) -> list[Route]:
        """The endpoints."""
        return [
            Route("/openapi.json", self._describe),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._show_metrics),
        ]

    async def _describe(self, request: Request) -> Response:
        return Response(self._description, media_type="application/json")

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if self._drain.has_begun:
            return _json({"status": "draining"}, status=503)
        model = request.query_params.get("model")
        served = {*self._registry.models(), *self._upstreams.ready()}
        serves = bool(served) if model is None else model in served
        return _json(
            {"status": "ready" if serves else "no worker has joined, and no upstream is used"}, status=200 if serves else 503
        )

    async def _show_metrics(self, request: Request) -> Response:
        self._admission.identify(request.scope["headers"], "metrics")
        observer = self._observer
        text = self._metrics.render(self._registry, self._queues.waiting(), observer.relayed, observer.connections)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _json(value: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
