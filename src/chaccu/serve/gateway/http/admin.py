"""`AdminApi`: what an operator looks at and changes while the gateway runs.

Invariants: every request shows a key of scope admin, or comes from this machine where there are no keys; nothing shows a key
but the answer that makes it. Drains and aliases last as long as the gateway, keys as long as their file, adapters as long as
their worker. It ignores answers.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chaccu.errors import UsageError
from chaccu.serve.gateway.access.aliases import Aliases
from chaccu.serve.gateway.access.keys import KeyFile, describe_key
from chaccu.serve.gateway.access.limits import Limits
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.dialects.requests import read_fields
from chaccu.serve.gateway.errors import ApiError, bad_request, from_validation
from chaccu.serve.gateway.http.admission import Admission
from chaccu.serve.gateway.http.observed_app import note_of
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay
from chaccu.serve.gateway.workers.offers import refuse_name
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import OrderRefusedError, RemoteWorker, WorkerLostError
from chaccu.serve.link import LoadAdapter, Order, UnloadAdapter

T = TypeVar("T", bound=msgspec.Struct)


class _NewKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    scopes: list[str] = msgspec.field(default_factory=lambda: ["chat"])
    models: list[str] = []
    limits: Limits = Limits()


class _NewAlias(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: Annotated[dict[str, float], msgspec.Meta(min_length=1, max_length=100)]


class _AdapterToLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    adapter: str
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class _AdapterToUnload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    adapter: str


class AdminApi:
    """`/admin/…`."""

    def __init__(
        self,
        config: GatewayConfig,
        admission: Admission,
        registry: WorkerRegistry,
        upstreams: UpstreamRelay,
        aliases: Aliases,
    ) -> None:
        self._config = config
        self._admission = admission
        self._registry = registry
        self._upstreams = upstreams
        self._aliases = aliases

    def routes(self) -> list[Route]:
        """What the app serves."""
        return [
            Route("/admin/workers", self.workers),
            Route("/admin/workers/{worker:path}/drain", self.drain, methods=["POST"]),
            Route("/admin/workers/{worker:path}/undrain", self.undrain, methods=["POST"]),
            Route("/admin/workers/{worker:path}/load", self.load, methods=["POST"]),
            Route("/admin/workers/{worker:path}/unload", self.unload, methods=["POST"]),
            Route("/admin/upstreams", self.upstreams),
            Route("/admin/aliases", self.aliases),
            Route("/admin/aliases/{name:path}", self.set_alias, methods=["PUT"]),
            Route("/admin/aliases/{name:path}", self.remove_alias, methods=["DELETE"]),
            Route("/admin/keys", self.keys, methods=["GET"]),
            Route("/admin/keys", self.create_key, methods=["POST"]),
            Route("/admin/keys/{key_id}", self.revoke_key, methods=["DELETE"]),
        ]

    async def workers(self, request: Request) -> Response:
        """Every worker by model."""
        self._check(request)
        return _json(self._registry.statuses())

    async def drain(self, request: Request) -> Response:
        """Give a worker nothing new; what it has, it finishes."""
        return self._hold(request, True)

    async def undrain(self, request: Request) -> Response:
        """Give it new requests again."""
        return self._hold(request, False)

    async def load(self, request: Request) -> Response:
        """`{"adapter": "law", "path": "law-7"}`: have a worker serve an adapter from its own disk; answers when it does."""
        self._check(request)
        body = await self._read(request, _AdapterToLoad)
        worker = self._find(request)
        refusal = refuse_name(body.adapter, self._config, worker.key)
        if refusal is not None:
            raise bad_request(refusal.reason, code="invalid_value", param="adapter")
        if body.adapter in self._aliases:
            raise bad_request(f"{body.adapter!r} is an alias.", code="invalid_value", param="adapter")
        await _order(worker, LoadAdapter(order=0, name=body.adapter, path=body.path))
        return self._describe(worker)

    async def unload(self, request: Request) -> Response:
        """`{"adapter": "law"}`: have a worker serve it no more; answers when its last request has ended."""
        self._check(request)
        body = await self._read(request, _AdapterToUnload)
        worker = self._find(request)
        if body.adapter not in worker.offers:
            raise _not_found(f"the worker {worker.identity!r:.220} does not serve {body.adapter!r:.220}.")
        await _order(worker, UnloadAdapter(order=0, name=body.adapter))
        return self._describe(worker)

    async def upstreams(self, request: Request) -> Response:
        """Every upstream by model."""
        self._check(request)
        return _json(self._upstreams.statuses())

    async def aliases(self, request: Request) -> Response:
        """The aliases with their models' weights."""
        self._check(request)
        return _json(self._aliases.shares())

    async def set_alias(self, request: Request) -> Response:
        """`{"models": {"tuned": 9, "base": 1}}`."""
        self._check(request)
        body = await self._read(request, _NewAlias)
        name = request.path_params["name"]
        if self._registry.knows(name) or self._upstreams.serves(name):
            raise bad_request(f"{name!r} is a model itself.", code="invalid_value", param="name")
        try:
            self._aliases.set(name, body.models)
        except UsageError as error:
            raise _wrong(error, "models") from error
        return _json({name: body.models})

    async def remove_alias(self, request: Request) -> Response:
        """Forget an alias."""
        self._check(request)
        name = request.path_params["name"]
        if not self._aliases.remove(name):
            raise _not_found(f"there is no alias {name!r:.220}.")
        return _json({"removed": name})

    async def keys(self, request: Request) -> Response:
        """The keys, revoked ones too, without their secrets."""
        self._check(request)
        return _json([describe_key(key) for key in await asyncio.to_thread(self._file().read)])

    async def create_key(self, request: Request) -> Response:
        """Make a key; the answer alone shows it."""
        self._check(request)
        body = await self._read(request, _NewKey)
        try:
            shown, key = await asyncio.to_thread(self._file().create, body.name, body.scopes, body.models, body.limits)
        except UsageError as error:
            raise _wrong(error, None) from error
        self._look()
        return _json({"key": shown, **describe_key(key)}, status=201)

    async def revoke_key(self, request: Request) -> Response:
        """End a key, at once."""
        self._check(request)
        try:
            key = await asyncio.to_thread(self._file().revoke, request.path_params["key_id"])
        except UsageError as error:
            raise _not_found(f"there is no key {request.path_params['key_id']!r:.80}.") from error
        self._look()
        return _json(describe_key(key))

    def _check(self, request: Request) -> None:
        key = self._admission.identify(request.scope["headers"], "admin")
        note_of(request.scope).key_id = None if key is None else key.id

    def _hold(self, request: Request, held: bool) -> Response:
        self._check(request)
        worker = self._find(request)
        self._registry.hold(worker, held)
        return self._describe(worker)

    def _find(self, request: Request) -> RemoteWorker:
        identity = request.path_params["worker"]
        worker = self._registry.find(identity)
        if worker is None:
            raise _not_found(f"no worker {identity!r:.220} is joined.")
        return worker

    def _describe(self, worker: RemoteWorker) -> Response:
        return _json([status for status in self._registry.statuses() if status.worker == worker.identity])

    def _file(self) -> KeyFile:
        if self._config.keys is None:
            raise _not_found("this gateway has no file of keys; it was started without --keys.")
        return KeyFile(self._config.keys)

    def _look(self) -> None:
        if self._admission.ring is not None:
            self._admission.ring.look_now()

    async def _read(self, request: Request, body_type: type[T]) -> T:
        _, fields = await read_fields(request.stream(), self._config.max_body_bytes)
        try:
            return msgspec.convert(fields, body_type)
        except msgspec.ValidationError as error:
            raise from_validation(error, fields, body_type.__struct_fields__) from error


async def _order(worker: RemoteWorker, order: Order) -> None:
    try:
        await worker.order(order)
    except OrderRefusedError as error:
        remedy = f" ({error.remedy})" if error.remedy else ""
        raise bad_request(f"the worker refuses: {error.message}{remedy}", code="order_refused", param="adapter") from error
    except WorkerLostError as error:
        raise ApiError(503, error.message, kind="service_unavailable", code="worker_lost") from error


def _json(value: Any, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _wrong(error: UsageError, param: str | None) -> ApiError:
    return bad_request(f"{error.message} ({error.remedy})", code="invalid_value", param=param)


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, kind="invalid_request_error", code="not_found")
