"""OpenAI's Responses, as a dialect: `/v1/responses` for text and functions.

Invariant: the gateway keeps no answers, so `store` is false, and what would need a kept answer is refused. It ignores
how items are read and answers are written.
"""

from __future__ import annotations

import secrets
import time
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from chaccu.serve.gateway.dialects.dialect import Asked, Dialect
from chaccu.serve.gateway.dialects.parameters import Count, Share, Unused, user_of
from chaccu.serve.gateway.dialects.response_format import ObjectFormat, Schema, TextFormat, schema_text
from chaccu.serve.gateway.dialects.response_input import Items, read_items
from chaccu.serve.gateway.dialects.response_writer import ResponseObject, ResponseWriter, write_error
from chaccu.serve.gateway.dialects.tools import MAX_TOOLS, Function, Named, NamedTool, Tool, job_with_tools
from chaccu.serve.gateway.workers.answer import Job
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


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` is accepted and adds nothing."""

    include_obfuscation: bool = False


class NamedFormat(Schema, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    """JSON that keeps to a schema."""


class ResponseText(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The form that the answer's text has to have."""

    format: TextFormat | ObjectFormat | NamedFormat | None = None


class ResponseTool(Function, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="function"):
    """A function that the model may call."""


class NamedResponseTool(Named, frozen=True, forbid_unknown_fields=True, tag="function"):
    """The function that has to be called."""


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a request for a response."""

    model: str
    input: str | Items
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], msgspec.Meta(max_length=16)] | None = None
    text: ResponseText | None = None
    tools: Annotated[list[ResponseTool], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None


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
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=temperature,
        text=msgspec.to_builtins(text),
        tool_choice=msgspec.to_builtins(body.tool_choice) or "auto",
        tools=msgspec.to_builtins(body.tools or []),
        top_p=top_p,
        user=user_of(fields) or None,
    )
    return Asked(
        answer_id=begun.id,
        job=_job(body, sampling),
        writer=ResponseWriter(begun),
        streamed=bool(body.stream),
        user=begun.user or "",
    )


def _job(body: ResponsesBody, sampling: Sampling) -> Job:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += read_items(body.input)
    choice = body.tool_choice
    return job_with_tools(
        body.model,
        messages,
        sampling,
        tools=[Tool("function", Function(one.name, one.description, one.parameters, one.strict)) for one in body.tools or ()],
        choice=NamedTool("function", Named(choice.name)) if isinstance(choice, NamedResponseTool) else choice,
        parallel=body.parallel_tool_calls,
        param="input",
    )


RESPONSES = Dialect(
    path="/v1/responses",
    summary="OpenAI's Responses, for text and functions.",
    body=ResponsesBody,
    unused=_UNUSED,
    ask=_ask,
    is_chat=True,
    answer=ResponseObject,
    write_error=write_error,
)
