"""`Admission`: who asks, and whether they may.

Invariants: with keys on, nothing is answered without a good key of a fitting scope; a secret is looked up and forgotten, never
kept, logged or repeated in a message; without keys everything is as open as the address is. A call costs microseconds: one pass
over the headers and one hash. It ignores bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chaccu.serve.gateway.config import GatewayConfig, is_loopback
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.keys import Key, KeyFile, KeyRing, Scope

Headers = Iterable[tuple[bytes, bytes]]

_BEARER = b"bearer "


class Admission:
    """The check before every endpoint; one per gateway."""

    def __init__(self, config: GatewayConfig, clock: Callable[[], float]) -> None:
        """Raises `StorageError` when the file of keys is missing or damaged."""
        self.ring = None if config.keys is None else KeyRing(KeyFile(config.keys), clock)
        self._admin_open = is_loopback(config.host)

    def identify(self, headers: Headers, scope: Scope = "chat") -> Key | None:
        """The key that a request shows (`Authorization: Bearer`, or `x-api-key`), None where no key is asked for.

        `headers` have lower-case names, as ASGI gives them. Raises `ApiError`: 401 for no or no good key, 403 for one of
        another scope. An admin's key reads metrics too.
        """
        if self.ring is None:
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
