"""Parameters of requests, as all dialects take them.

Invariants: a parameter that would change the answer is either honoured or refused, never ignored; every refusal is an
`ApiError` that names the parameter. It ignores what each of them means.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import msgspec

from chaccu.conversation import Message, conversation_from_openai
from chaccu.conversation.message import ROLES
from chaccu.errors import ConversationError
from chaccu.serve.gateway.errors import bad_request, from_validation
from chaccu.serve.gateway.workers.answer import Job
from chaccu.serve.link import Sampling

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], msgspec.Meta(max_length=16)]
MAX_MESSAGES = 10_000

_TEXT_PART = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", *ROLES]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
    "required": ["role", "content"],
}
# System texts alone are no conversation.
SOMEBODY_SPEAKS = {"contains": {"properties": {"role": {"enum": list(ROLES)}}, "required": ["role"]}}
# Messages that `chat_job` checks, for it says which of them is wrong.
AnyMessages = Annotated[
    list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=_MESSAGE)]],
    msgspec.Meta(min_length=1, max_length=MAX_MESSAGES, extra_json_schema=SOMEBODY_SPEAKS),
]

B = TypeVar("B", bound=msgspec.Struct)


class Unused(msgspec.Struct, frozen=True):
    """Parameters that a body's type need not have. `neutral`: those that are not carried out, with the values that ask for
    nothing; `about`: those that say something about the request and nothing about the answer; `remedies`: what to do instead.
    """

    neutral: Mapping[str, tuple[Any, ...]]
    about: frozenset[str]
    remedies: Mapping[str, str] = MappingProxyType({})


def parse_body(fields: dict[str, Any], body_type: type[B], unused: Unused) -> B:
    """The checked body. Raises `ApiError` naming the parameter that is wrong."""
    kept = {}
    for name, value in fields.items():
        if name in unused.about:
            continue
        if name not in unused.neutral:
            # JSON has one kind of number: 5.0 is 5.
            kept[name] = int(value) if isinstance(value, float) and value.is_integer() else value
        elif value is not None and not _is_one_of(value, unused.neutral[name]):
            remedy = unused.remedies.get(name, "leave it out")
            message = f"{name} = {value!r:.80} is not supported; {remedy}."
            raise bad_request(message, code="unsupported_parameter", param=name)
    try:
        return msgspec.convert(kept, body_type)
    except msgspec.ValidationError as error:
        known = [*body_type.__struct_fields__, *unused.neutral, *unused.about]
        raise from_validation(error, fields, known) from error


def user_of(fields: dict[str, Any]) -> str:
    """Who asks, as the request says it."""
    user = fields.get("user")
    return user if isinstance(user, str) else ""


def chat_job(model: str, messages: list[dict[str, Any]], sampling: Sampling, param: str = "messages", n: int = 1) -> Job:
    """The job of OpenAI-style `messages`, which `param` of the request gave. A last message of the assistant is a reply to go
    on with. Raises `ApiError` for messages that cannot be a conversation.
    """
    try:
        conversation = conversation_from_openai(messages)
    except ConversationError as error:
        raise bad_request(f"{error.message} {error.remedy}".strip(), code="invalid_value", param=param) from error
    begun, last = "", conversation.messages[-1]
    if last.role == "assistant":
        begun = last.content or ""
        conversation = msgspec.structs.replace(conversation, messages=(*conversation.messages[:-1], Message("assistant", None)))
    return Job(model=model, conversation=conversation, begun=begun, sampling=sampling, n=n)


def _is_one_of(value: object, neutral: tuple[Any, ...]) -> bool:
    """Whether `value` asks for nothing; 0 and 0.0 are the same, 1 and true are not."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
