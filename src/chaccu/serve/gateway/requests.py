"""What clients send: the bodies of the OpenAI API, checked.

Invariants: a parameter that would change the answer is either honoured or refused, never ignored; every refusal is an
`ApiError` that names the parameter. It ignores models and workers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import msgspec

from chaccu.conversation import Message, conversation_from_openai
from chaccu.errors import ConversationError
from chaccu.serve.gateway.answer import Job
from chaccu.serve.gateway.errors import ApiError, bad_request, from_validation
from chaccu.serve.link import Sampling

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]

# Parameters that this server does not carry out, with the values that ask for nothing.
_NEUTRAL = MappingProxyType(
    {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "modalities": (["text"],),
    }
)
# Parameters that say something about the request and nothing about the answer.
_ABOUT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_usage`: a last chunk tells the tokens used. `include_obfuscation` is accepted and adds nothing."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: _Share | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: _Share | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _StopText | Annotated[list[_StopText], msgspec.Meta(max_length=16)] | None = None

    def sampling(self, max_tokens: int | None) -> Sampling:
        """The sampling that the body asks for; what it leaves out takes the API's defaults."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=stop,
        )

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a chat completion."""

    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    max_completion_tokens: _Count | None = None

    def job(self) -> Job:
        """The job. A last message of the assistant is a reply to go on with. Raises `ApiError` for messages that cannot be
        one.
        """
        try:
            conversation = conversation_from_openai(self.messages)
        except ConversationError as error:
            raise bad_request(f"{error.message} {error.remedy}".strip(), code="invalid_value", param="messages") from error
        begun, last = "", conversation.messages[-1]
        if last.role == "assistant":
            begun = last.content or ""
            conversation = msgspec.structs.replace(
                conversation, messages=(*conversation.messages[:-1], Message("assistant", None))
            )
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return Job(model=self.model, conversation=conversation, begun=begun, sampling=self.sampling(limit))


class CompletionBody(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a raw completion: the client writes the whole prompt, control tokens included."""

    prompt: str | list[str]

    def job(self) -> Job:
        """The job. Raises `ApiError` unless there is exactly one prompt, and that is not empty."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) != 1:
            raise bad_request(
                f"there are {len(prompts)} prompts; this server takes 1 a request.", code="invalid_value", param="prompt"
            )
        if not prompts[0]:
            raise bad_request("the prompt is empty.", code="invalid_value", param="prompt")
        # Sixteen is the API's own default for this endpoint.
        return Job(model=self.model, prompt=prompts[0], sampling=self.sampling(self.max_tokens or 16))


B = TypeVar("B", bound=_Body)


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


def parse_body(fields: dict[str, Any], body_type: type[B]) -> B:
    """The checked body. Raises `ApiError` naming the parameter that is wrong."""
    kept = {}
    for name, value in fields.items():
        if name in _ABOUT:
            continue
        if name not in _NEUTRAL:
            kept[name] = value
        elif value is not None and not _is_neutral(name, value):
            message = f"{name} = {value!r:.80} is not supported; leave it out."
            raise bad_request(message, code="unsupported_parameter", param=name)
    try:
        return msgspec.convert(kept, body_type)
    except msgspec.ValidationError as error:
        known = [*body_type.__struct_fields__, *_NEUTRAL, *_ABOUT]
        raise from_validation(error, fields, known) from error


def _is_neutral(name: str, value: object) -> bool:
    """Whether `value` asks for nothing; 0 and 0.0 are the same, 1 and true are not."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name])


def _json_name(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
