"""What clients send: the bodies of the OpenAI API, checked.

Invariant: every refusal is an `ApiError` that names the parameter. It ignores models and workers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from chaccu.serve.gateway.dialects.parameters import AnyMessages, Count, Share, StopText, StopTexts, Unused
from chaccu.serve.gateway.dialects.response_format import ResponseFormat, schema_text
from chaccu.serve.gateway.dialects.tools import ToolChoice, Tools, job_with_tools
from chaccu.serve.gateway.errors import ApiError, bad_request
from chaccu.serve.gateway.workers.answer import Job
from chaccu.serve.gateway.workers.texts_or_ids import describe_texts, read_texts
from chaccu.serve.link import Sampling

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_BIAS = 100
_MAX_ID_DIGITS = 9
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
TopLogprobs = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)]
# What makes a sampling of a body checks its tokens and values.
_BIAS = {
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}
_GoesOn = Annotated[
    bool,
    msgspec.Meta(
        description="True only where the last message is the assistant's, false only where it is another's. An answer "
        "goes on with a last message of the assistant, and only what follows it is sent."
    ),
]
_BeginsAnew = Annotated[
    bool,
    msgspec.Meta(description="False only where the last message is the assistant's, true only where it is another's."),
]
UNUSED = Unused(
    neutral=MappingProxyType(
        {
            "best_of": (1,),
            "echo": (False,),
            "suffix": ("",),
            "modalities": (["text"],),
        }
    ),
    about=frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}),
)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_usage`: a last chunk tells the tokens used. `include_obfuscation` is accepted and adds nothing."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | StopTexts | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=_BIAS)] | None = None
    response_format: ResponseFormat | None = None

    def sampling(self, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
        """The sampling that the body asks for; what it leaves out has the defaults. Raises `ApiError` for a wrong bias."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=stop,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=_read_bias(self.logit_bias or {}),
            top_logprobs=top_logprobs,
            json_schema=schema_text(self.response_format),
        )

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a chat completion."""

    messages: AnyMessages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    continue_final_message: _GoesOn | None = None
    add_generation_prompt: _BeginsAnew | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def job(self) -> Job:
        """The job. A last message of the assistant is a reply to go on with. Raises `ApiError` for messages that cannot be
        one, and for flags of other servers that ask for the contrary.
        """
        goes_on = self.messages[-1].get("role") == "assistant"
        _check_flag("continue_final_message", self.continue_final_message, goes_on)
        _check_flag("add_generation_prompt", self.add_generation_prompt, not goes_on)
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        # To ask for the likeliest tokens is to ask for logprobs.
        top = (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None
        return job_with_tools(
            self.model,
            self.messages,
            self.sampling(limit, top),
            tools=self.tools,
            choice=self.tool_choice,
            parallel=self.parallel_tool_calls,
            n=self.choices,
        )


class CompletionBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a raw completion: the client writes each whole prompt, control tokens included, as text or as token ids."""

    logprobs: TopLogprobs | None = None
    prompt: Annotated[Any, msgspec.Meta(extra_json_schema=describe_texts(MAX_CHOICES))]

    def job(self) -> Job:
        """The job. Raises `ApiError` for what is no prompt, or an empty one, and for too many choices."""
        prompts = read_texts(self.prompt, "prompt", MAX_CHOICES)
        if len(prompts) * self.choices > MAX_CHOICES:
            message = f"n = {self.choices} for each of {len(prompts)} prompts; there are {MAX_CHOICES} choices at most."
            raise bad_request(message, code="invalid_value", param="n")
        # Sixteen is the API's own default for this endpoint.
        sampling = self.sampling(self.max_tokens or 16, self.logprobs)
        return Job(model=self.model, prompts=tuple(prompts), sampling=sampling, n=self.choices)


def _check_flag(name: str, value: bool | None, done: bool) -> None:
    """Raise `ApiError` where a flag asks for another thing than what is `done`, by who spoke last."""
    if value is not None and value != done:
        raise bad_request(
            f"{name} = {str(value).lower()} is not supported here: an answer goes on with a last message of the assistant, and "
            "begins anew after any other.",
            code="unsupported_parameter",
            param=name,
        )


def _read_bias(bias: dict[str, Any]) -> dict[int, float]:
    """Biases by token id. Raises `ApiError`."""
    read: dict[int, float] = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= _MAX_ID_DIGITS):
            message = f'logit_bias of {token!r:.80}: write tokens as their ids, for example {{"42": -100}}.'
            raise bad_request(message, code="invalid_value", param="logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_BIAS <= value <= MAX_BIAS:
            message = f"logit_bias of token {token} = {value!r:.80}; it must be a number from -{MAX_BIAS} to {MAX_BIAS}."
            raise bad_request(message, code="invalid_value", param="logit_bias")
        read[int(token)] = float(value)
    return read


async def read_fields(body: AsyncIterator[bytes], limit_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """A request's body, as bytes and as a JSON object. Raises `ApiError` when it is too long or no object."""
    data = bytearray()
    async for piece in body:
        data += piece
        if len(data) > limit_bytes:
            message = f"the request body is longer than {limit_bytes:,} bytes, the limit."
            raise ApiError(413, message, kind="invalid_request_error", code="body_too_large")
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the request body is no valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise bad_request(f"the request body is a JSON {_json_name(fields)}; send an object.", code="invalid_json")
    return bytes(data), fields


def model_of(fields: dict[str, Any]) -> str:
    """The model that a request names. Raises `ApiError` when it names none."""
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        known = "is missing" if model is None else f"= {model!r:.80} is no name"
        raise bad_request(f"'model' {known}; name one out of /v1/models.", code="missing_required_parameter", param="model")
    return model


def _json_name(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
