"""What is checked of a request that goes on to an upstream as it is.

Invariants: a value that no model can take is refused here, with the parameter's name; what is not known here passes, since the
upstream may know it. It ignores what the upstream makes of the rest.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from chaccu.serve.gateway.dialects.parameters import MAX_MESSAGES, Count, Share
from chaccu.serve.gateway.errors import bad_request, from_validation

_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]


class _Turn(msgspec.Struct, frozen=True, gc=False):
    role: str


class _Relayed(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    stream: bool | None = None
    max_tokens: Count | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class RelayedChat(_Relayed, frozen=True, kw_only=True):
    """A chat completion that an upstream gives."""

    messages: Annotated[list[_Turn], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None


class RelayedCompletion(_Relayed, frozen=True, kw_only=True):
    """A raw completion that an upstream gives."""

    prompt: str | list[Any] | None = None


class RelayedEmbeddings(msgspec.Struct, frozen=True, kw_only=True):
    """Embeddings that an upstream gives."""

    model: str
    input: str | list[Any]


def check_relayed(fields: dict[str, Any], path: str, body_type: type[msgspec.Struct] | None) -> None:
    """Raise `ApiError`, naming the parameter, for a request that no upstream need hear of, or may: there is no `body_type`
    for a `path` that upstreams are not asked by.
    """
    if body_type is None:
        message = f"the model {fields['model']!r} is an upstream's; ask for it by /v1/chat/completions, not by {path}."
        raise bad_request(message, code="unsupported_endpoint", param="model")
    try:
        msgspec.convert(fields, body_type)
    except msgspec.ValidationError as error:
        raise from_validation(error, fields, body_type.__struct_fields__) from error
