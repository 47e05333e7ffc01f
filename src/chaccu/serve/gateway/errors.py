"""What a client is told when something is wrong: OpenAI's error object with a fitting status.

Invariant: a message names the value, the limit and what happened, and holds no path and no library's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from chaccu.errors import ServeError, did_you_mean
from chaccu.serve.link import Failure

# The status that is counted when a client leaves before its answer has ended: nginx's, of which no client ever hears.
CLIENT_LEFT = 499
_AT = re.compile(r"^(.*?)(?: - at `\$\.?(.*)`)?$", re.DOTALL)
_STEP = re.compile(r"([^.\[\]]+)|\[([^\]]*)\]")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`")
_MISSING_FIELD = re.compile(r"Object missing required field `(.*)`")


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's error object. `param`: the parameter that is wrong; `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error."""

    error: ErrorObject


class ApiError(ServeError):
    """An error for an API client: `status` is the HTTP status, `headers` go with it, the rest fills OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def to_json(self) -> bytes:
        """`{"error": {…}}`."""
        return msgspec.json.encode(ErrorBody(ErrorObject(self.message, self.kind, self.param, self.code)))


def bad_request(message: str, *, code: str | None = None, param: str | None = None) -> ApiError:
    """The request itself is wrong (400)."""
    return ApiError(400, message, kind="invalid_request_error", code=code, param=param)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """Nobody ever served this model (404), or any at all (503)."""
    names = sorted(known)
    if not names:
        message = f"No model is served yet, so {name!r} is not either. Start a worker: chaccu worker --model M --gateway URL."
        return ApiError(503, message, kind="service_unavailable", code="no_worker", param="model")
    near = did_you_mean(name, names)
    message = (
        f"The model {name!r} does not exist; {near if near.startswith('did') else 'known: ' + near.removeprefix('one of: ')}"
    )
    return ApiError(
        404, message + ("" if near.endswith("?") else "."), kind="invalid_request_error", code="model_not_found", param="model"
    )


def no_worker(model: str, waited_s: float) -> ApiError:
    """The model is known, and its last worker has gone (503)."""
    message = f"No worker serves {model!r} now; waited {waited_s:g} s for one to join."
    return ApiError(503, message, kind="service_unavailable", code="no_worker", param="model")


def worker_lost(model: str, why: str) -> ApiError:
    """An answer was begun and its worker has gone (503)."""
    message = f"The worker of {model!r} was lost while it answered, and {why}."
    return ApiError(503, message, kind="service_unavailable", code="worker_lost", param="model")


def upstreams_unreachable(model: str, count: int, waited_s: float) -> ApiError:
    """None of the `count` upstreams of a model answers (502)."""
    who = f"the upstream of {model!r} is" if count == 1 else f"all {count} upstreams of {model!r} are"
    message = f"{who} not reachable; waited {waited_s:g} s."
    return ApiError(502, message, kind="service_unavailable", code="upstream_unreachable", param="model")


def upstream_lost(model: str, why: str) -> ApiError:
    """The upstream of a model broke off an answer, which cannot go on (502)."""
    message = f"the upstream of {model!r} broke off its answer, and {why}."
    return ApiError(502, message, kind="service_unavailable", code="upstream_lost", param="model")


def from_failure(failure: Failure) -> ApiError:
    """What a worker reported."""
    if failure.kind == "context_overflow":
        return bad_request(failure.message, code="context_length_exceeded", param=failure.parameter or "messages")
    if failure.kind == "invalid_request":
        return bad_request(failure.message, code="invalid_value", param=failure.parameter or "messages")
    return ApiError(500, failure.message, kind="server_error", code="engine_failed")


def from_validation(error: msgspec.ValidationError, fields: Mapping[str, Any], known: Iterable[str]) -> ApiError:
    """A client's field that is missing, unknown, of a wrong type or out of range."""
    match = _AT.match(str(error))
    reason, path = (match[1], match[2] or "") if match else (str(error), "")
    unknown, missing = _UNKNOWN_FIELD.match(reason), _MISSING_FIELD.match(reason)
    if unknown is not None:
        name = ".".join(filter(None, (path, unknown[1])))
        hint = "" if path else f": {did_you_mean(name, known)}"
        return bad_request(f"{name!r} is no parameter of this request{hint}", code="unknown_parameter", param=name)
    if missing is not None:
        name = ".".join(filter(None, (path, missing[1])))
        return bad_request(f"{name!r} is missing.", code="missing_required_parameter", param=name)
    value = _value_at(path, fields)
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    return bad_request(f"{path} = {shown}: {_lower(reason.replace('`', ''))}.", code="invalid_value", param=path or None)


def _value_at(path: str, fields: Mapping[str, Any]) -> Any:
    """What stands at msgspec's `path`, or around it: a path does not name the keys of a mapping."""
    value: Any = fields
    for name, index in _STEP.findall(path):
        if name and isinstance(value, Mapping) and name in value:
            value = value[name]
        elif index.isdigit() and isinstance(value, list):
            value = value[int(index)]
        else:
            break
    return value


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
