"""OpenAI's Responses, as a dialect: `/v1/responses` for text.

Invariant: the gateway keeps no answers, so `store` is false, and what would need a kept answer is refused. It ignores
everything that is no message.
"""

from __future__ import annotations

import secrets
import time
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from chaccu.serve.gateway.dialect import Asked, Dialect
from chaccu.serve.gateway.parameters import MAX_MESSAGES, SOMEBODY_SPEAKS, Count, Share, Unused, chat_job, user_of
from chaccu.serve.gateway.response_format import ObjectFormat, Schema, TextFormat, schema_text
from chaccu.serve.gateway.response_writer import ResponseObject, ResponseWriter, write_error
from chaccu.serve.link import Sampling

_KEEPS_NOTHING = "this gateway keeps no answers: leave it out, and send the whole conversation as input"
_UNUSED = Unused(
    neutral=MappingProxyType(
        {
            "store": (False,),
            "previous_response_id": (),
            "conversation": (),
            "background": (False,),
            "prompt": (),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
            "max_tool_calls": (),
            "include": ([],),
            "reasoning": ({},),
            "top_logprobs": (0,),
            "truncation": ("disabled",),
        }
    ),
    about=frozenset({"user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}),
    remedies=MappingProxyType(dict.fromkeys(("store", "previous_response_id", "conversation", "background"), _KEEPS_NOTHING)),
)
_MetadataKey = Annotated[str, msgspec.Meta(max_length=64)]
_MetadataValue = Annotated[str, msgspec.Meta(max_length=512)]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's text, said to the model or by it."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message; one out of an earlier answer's `output` too. Of such a one `id`, `status` and `phase` change nothing."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[TextPart], msgspec.Meta(min_length=1)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` is accepted and adds nothing."""

    include_obfuscation: bool = False


class NamedFormat(Schema, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    """JSON that keeps to a schema."""


class ResponseText(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The form that the answer's text has to have."""

    format: TextFormat | ObjectFormat | NamedFormat | None = None


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for a response."""

    model: str
    input: (
        str
        | Annotated[list[InputMessage], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES, extra_json_schema=SOMEBODY_SPEAKS)]
    )
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], msgspec.Meta(max_length=16)] | None = None
    text: ResponseText | None = None


def _ask(body: ResponsesBody, fields: dict[str, Any]) -> Asked:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    text = body.text if body.text is not None and body.text.format is not None else ResponseText(TextFormat())
    sampling = Sampling(
        max_tokens=body.max_output_tokens, temperature=temperature, top_p=top_p, json_schema=schema_text(text.format)
    )
    begun = ResponseObject(
        id=f"resp_{secrets.token_hex(12)}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=fields.get("parallel_tool_calls") is not False,
        temperature=temperature,
        text=msgspec.to_builtins(text),
        tool_choice=fields.get("tool_choice") or "auto",
        top_p=top_p,
        user=user_of(fields) or None,
    )
    return Asked(
        answer_id=begun.id,
        job=chat_job(body.model, _messages_of(body), sampling, "input"),
        writer=ResponseWriter(begun),
        streamed=bool(body.stream),
        user=begun.user or "",
    )


def _messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The request as OpenAI-style messages."""
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for message in body.input:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        messages.append({"role": message.role, "content": text})
    return messages


RESPONSES = Dialect(
    path="/v1/responses",
    summary="OpenAI's Responses, for text.",
    body=ResponsesBody,
    unused=_UNUSED,
    ask=_ask,
    is_chat=True,
    answer=ResponseObject,
    write_error=write_error,
)
