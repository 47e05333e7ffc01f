"""`Admission`: who asks, whether they may, and whether now.

Invariants: with keys on, nothing is answered without a good key of a fitting scope; a secret is looked up and forgotten, never
kept, logged or repeated in a message; what was admitted is counted against its key until it is closed, once; without keys
everything is as open as the address is. A call costs microseconds: one pass over the headers and one hash. It ignores bodies.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from chaccu.serve.gateway.access.keys import Key, KeyFile, KeyRing, Scope
from chaccu.serve.gateway.access.leased_meter import LeasedMeter
from chaccu.serve.gateway.access.limits import HeaderPairs, Meter
from chaccu.serve.gateway.access.shared_limits import SharedLimits
from chaccu.serve.gateway.config import GatewayConfig, is_loopback
from chaccu.serve.gateway.errors import CLIENT_LEFT, ApiError
from chaccu.serve.gateway.http.metrics import GatewayMetrics

Headers = Iterable[tuple[bytes, bytes]]

_BEARER = b"bearer "


# How many bytes of a request's body make about one token.
_BYTES_PER_TOKEN = 4


def estimate_tokens(body_bytes: int, max_tokens: int | None) -> int:
    """About how many tokens a request is for, before anybody has counted: its body's, and its longest answer's if it says."""
    return body_bytes // _BYTES_PER_TOKEN + (max_tokens or 0)


class Admitted:
    """A request that may be answered. `headers` go with its answer; `close` it when it has ended."""

    __slots__ = ("_is_open", "_meter", "_metrics", "_reserved_tokens", "_used", "headers", "key")

    def __init__(self, key: Key | None, meter: Meter | None, reserved_tokens: int, metrics: GatewayMetrics) -> None:
        self.key = key
        self.headers: HeaderPairs = [] if meter is None else meter.headers()
        self._meter = meter
        self._reserved_tokens = reserved_tokens
        self._metrics = metrics
        self._used: tuple[int, int] | None = None
        self._is_open = True

    def use(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The tokens that it really took."""
        self._used = prompt_tokens, completion_tokens

    def close(self, status: int) -> None:
        """It has ended with this HTTP status (499: the client left). Without `use` an answer costs its estimate, an error
        nothing; closing again changes nothing.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._meter is None or self.key is None:
            return
        used = None if self._used is None else sum(self._used)
        if used is None and status != CLIENT_LEFT and status >= 400:
            used = 0
        self._meter.end(self._reserved_tokens, used)
        self._metrics.count_key(self.key.id, status, *(self._used or (0, 0)))


class Admission:
    """The check before every endpoint; one per gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
        shared: SharedLimits | None = None,
    ) -> None:
        """With `shared` limits hold for all gateways together. Raises `StorageError` when the file of keys is missing or
        damaged.
        """
        self.ring = None if config.keys is None else KeyRing(KeyFile(config.keys), clock)
        self._metrics = metrics
        self._clock = clock
        self._shared = shared
        self._meters: dict[str, Meter] = {}
        self._admin_open = is_loopback(config.host)

    def identify(self, headers: Headers, scope: Scope = "chat") -> Key | None:
        """The key that a request shows (`Authorization: Bearer`, or `x-api-key`), None where no key is asked for.

        `headers` have lower-case names, as ASGI gives them. Raises `ApiError`: 401 for no or no good key, 403 for one of
        another scope. An admin's key reads metrics too.
        """
        if self.ring is None:
            if scope == "admin" and any(name == b"origin" for name, _ in headers):
                raise _forbidden("a page in a browser may not administer a gateway without keys.")
            if scope == "admin" and not self._admin_open:
                raise _forbidden("the gateway takes no administration on an open address without keys.")
            return None
        shown = _shown_key(headers)
        if shown is None:
            raise ApiError(
                401,
                "no API key was sent; send it as 'Authorization: Bearer KEY'.",
                kind="invalid_request_error",
                code="missing_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        key = self.ring.find(shown)
        if key is None:
            raise ApiError(
                401,
                "the API key that was sent is not known here, or has been revoked.",
                kind="invalid_request_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if scope not in key.scopes and not (scope == "metrics" and "admin" in key.scopes):
            raise _forbidden(f"the API key {key.id} has the scope {' and '.join(key.scopes)}; this needs {scope}.")
        return key

    def decides_now(self, key: Key | None, tokens: int) -> bool:
        """Whether `admit` knows by itself; otherwise only `admitted` may be asked."""
        return key is None or self._meter(key).decides_now(tokens)

    def admit(self, key: Key | None, model: str, tokens: int) -> Admitted:
        """A request of `key` for about `tokens` of `model` may be answered, and is counted until it is closed.

        Raises `ApiError`, and counts nothing: 403 when the key is not for this model, 429 when one of its limits is reached,
        503 when shared limits cannot be checked.
        """
        self.check_model(key, model)
        if key is None:
            return Admitted(None, None, 0, self._metrics)
        meter = self._meter(key)
        with self._counting_refusals(key):
            return Admitted(key, meter, meter.begin(tokens), self._metrics)

    async def _admit_soon(self, key: Key | None, model: str, tokens: int) -> Admitted:
        """As `admit`, after asking for what is shared."""
        meter = None if key is None else self._meter(key)
        if key is None or self._shared is None or not isinstance(meter, LeasedMeter):
            return self.admit(key, model, tokens)
        self.check_model(key, model)
        with self._counting_refusals(key):
            return Admitted(key, meter, await self._shared.begin(meter, tokens), self._metrics)

    def _meter(self, key: Key) -> Meter:
        meter = self._meters.get(key.id)
        if meter is None:
            made = Meter(key.limits, self._clock) if self._shared is None else self._shared.meter(key.id, key.limits)
            meter = self._meters[key.id] = made
        elif meter.limits != key.limits:
            meter.change(key.limits)
        return meter

    @contextlib.contextmanager
    def _counting_refusals(self, key: Key) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            self._metrics.count_key(key.id, error.status)
            raise

    @contextlib.asynccontextmanager
    async def admitted(self, key: Key | None, model: str, tokens: int) -> AsyncIterator[Admitted]:
        """`admit` for the block, which closes it: 200 at its end, else the status of its `ApiError`, or 499. Limits that are
        shared are asked for where the gateway cannot decide by itself.
        """
        admitted = await self._admit_soon(key, model, tokens)
        try:
            yield admitted
        except ApiError as error:
            admitted.close(error.status)
            raise
        except BaseException as error:
            admitted.close(500 if isinstance(error, Exception) else CLIENT_LEFT)
            raise
        admitted.close(200)

    @staticmethod
    def check_model(key: Key | None, model: str) -> None:
        """Raise `ApiError` (403) when `key` is bound to other models than `model`."""
        if key is not None and not key.may_use(model):
            message = f"the API key {key.id} may not use the model {model!r}; it is for {', '.join(key.models)}."
            raise _forbidden(message, code="model_not_allowed", param="model")

    def worker_key(self, token: str) -> Key | None:
        """The key of scope worker that a worker shows in place of a join token, if it is one."""
        key = None if self.ring is None or not token else self.ring.find(token)
        return key if key is not None and "worker" in key.scopes else None


def _shown_key(headers: Headers) -> str | None:
    for name, value in headers:
        if name == b"authorization" and value[: len(_BEARER)].lower() == _BEARER:
            return value[len(_BEARER) :].strip().decode("latin-1")
        if name == b"x-api-key":
            return value.strip().decode("latin-1")
    return None


def _forbidden(message: str, *, code: str = "insufficient_permissions", param: str | None = None) -> ApiError:
    return ApiError(403, message, kind="invalid_request_error", code=code, param=param)
