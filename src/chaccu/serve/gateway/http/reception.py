"""`Reception`: what every request of clients goes through first: its key, its body, the model that it names.

Invariants: the body of a request without a good key is not read; what is received names a model that is known here. It ignores
what is asked of the model.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
from starlette.requests import Request

from chaccu.serve.gateway.access.aliases import Aliases
from chaccu.serve.gateway.access.keys import Key
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.dialects.requests import model_of, read_fields
from chaccu.serve.gateway.drain import Drain
from chaccu.serve.gateway.http.admission import Admission, Admitted
from chaccu.serve.gateway.http.observed_app import note_of
from chaccu.serve.gateway.http.request_note import RequestNote
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay
from chaccu.serve.gateway.workers.registry import WorkerRegistry

_UNKNOWN = "(unknown)"


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A request: its body as bytes and as `fields`. Both name `model`, which stands behind the name that was asked for."""

    admission: Admission
    key: Key | None
    asked_model: str
    model: str
    is_upstream: bool
    data: bytes
    fields: dict[str, Any]
    note: RequestNote

    def admit(self, tokens: int) -> contextlib.AbstractAsyncContextManager[Admitted]:
        """The request for about `tokens` is answered now, for the block. Raises `ApiError` at a limit of its key."""
        return self.admission.admitted(self.key, self.asked_model, tokens)


class Reception:
    """One gateway's."""

    def __init__(
        self,
        config: GatewayConfig,
        admission: Admission,
        aliases: Aliases,
        registry: WorkerRegistry,
        upstreams: UpstreamRelay,
        drain: Drain,
    ) -> None:
        self._config = config
        self._admission = admission
        self._aliases = aliases
        self._registry = registry
        self._upstreams = upstreams
        self._drain = drain

    async def receive(self, request: Request) -> Received:
        """The request, read. Raises `ApiError`."""
        note = note_of(request.scope)
        note.model = _UNKNOWN
        self._drain.check()
        key = self._admission.identify(request.scope["headers"])
        note.key_id = None if key is None else key.id
        data, fields = await read_fields(request.stream(), self._config.max_body_bytes)
        asked_model = model_of(fields)
        self._admission.check_model(key, asked_model)
        model = self._aliases.resolve(asked_model, self._is_served)
        if model != asked_model:
            fields["model"] = model
            if note.span is not None:
                note.span.alias = asked_model
            data = msgspec.json.encode(fields)
        is_upstream = self._upstreams.serves(model)
        if is_upstream:
            note.relay(model)
        else:
            self._registry.check_known(model, self._upstreams.names)
            note.model = model
        return Received(
            admission=self._admission,
            key=key,
            asked_model=asked_model,
            model=model,
            is_upstream=is_upstream,
            data=data,
            fields=fields,
            note=note,
        )

    def _is_served(self, model: str) -> bool:
        return model in self._upstreams.names or self._registry.room(model) > 0
