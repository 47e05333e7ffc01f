"""How a stream goes on that its upstream has broken off: what the next one is asked, and how its events are made to fit.

Nothing is read of a stream before it breaks off. Then the next upstream is asked in the first of these ways that is sound:

1. As before, where the client has seen no text yet.
2. To go on from the text so far: as the last message of the assistant, with the flags of vLLM and SGLang (llama.cpp and Ollama
   go on with such a message by themselves), or behind the prompt of a raw completion; for what is left of the tokens.
3. As before, with the text that the client has left out again, as long as it is the same: where `temperature` is 0 or there
   is a `seed`.

Invariant: no text is given twice or left out in silence; what cannot be gone on with is an error that says why. It ignores
connections.
"""

from __future__ import annotations

from typing import Any

import msgspec

from chaccu.serve.gateway.dialects.responses import DONE
from chaccu.serve.gateway.upstreams.continued_stream import ContinuedStream
from chaccu.serve.gateway.upstreams.sent_stream import CannotContinueError, SentStream

_CHAT, _COMPLETIONS = "chat/completions", "completions"
_LIMITS = ("max_tokens", "max_completion_tokens")

# Parameters with which the text so far can stand before the rest of it. All others may mean a state that the next upstream does
# not have: a grammar, a tool's call that has begun.
_CONTINUABLE = frozenset(
    {
        *("model", "messages", "prompt", "stream", "stream_options"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
        *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "repeat_penalty"),
        *("chat_template_kwargs", "skip_special_tokens", "cache_prompt", "prompt_cache_key", "priority"),
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
    }
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
}


class Continuation(msgspec.Struct, frozen=True):
    """`opening`: what is sent at once; `body`: what the next upstream is asked, and `stream`: what its events go through. Where
    they are None, the stream is whole with its opening."""

    opening: bytes
    body: bytes | None = None
    stream: ContinuedStream | None = None
    is_prefix: bool = False


def plan_continuation(endpoint: str, request: bytes, sent: bytes, *, may_prefix: bool) -> Continuation:
    """How the stream that answers `request` (a JSON object) goes on after `sent`, whole lines of events.

    `may_prefix`: whether the second way is open, which an upstream may have refused. Raises `CannotContinueError`.
    """
    if endpoint not in (_CHAT, _COMPLETIONS):
        raise CannotContinueError(f"answers of {endpoint} cannot be gone on with")
    chat = endpoint == _CHAT
    stream = SentStream(sent, chat=chat)
    fields: dict[str, Any] = msgspec.json.decode(request)
    # The empty line ends an event whose line was all that came.
    opening = b"" if not sent or sent.endswith((b"\n\n", b"\n\r\n")) else b"\n"
    if stream.is_done:
        return Continuation(opening)
    if stream.finish_reason is not None and stream.is_single and fields.get("n") in (None, 1):
        return _end(stream, fields, opening)
    if not stream.is_blank and not stream.is_text:
        raise CannotContinueError("what it held is more than the text of one answer")
    if stream.is_blank:
        return Continuation(opening, request, ContinuedStream(stream))
    why_not = _why_no_prefix(fields, chat=chat) if may_prefix else "the next upstream does not go on with a text"
    if why_not is None:
        return _go_on(stream, fields, opening)
    if fields.get("temperature") == 0 or fields.get("seed") is not None:
        return Continuation(opening, request, ContinuedStream(stream, repeated=stream.text))
    raise CannotContinueError(why_not)


def _why_no_prefix(fields: dict[str, Any], *, chat: bool) -> str | None:
    """Why the answer cannot be gone on with from its text, or None."""
    known = _CONTINUABLE | {"logprobs", "top_logprobs"} if chat else _CONTINUABLE
    if chat and _is_begun(fields):
        known |= {"continue_final_message", "add_generation_prompt"}
    for name, value in fields.items():
        if name not in known and value not in _NEUTRAL.get(name, (None,)):
            return f"an answer with {name!r} cannot be gone on with from its text"
    if chat:
        last = fields["messages"][-1]
        if last["role"] == "assistant" and not _is_begun(fields):
            return "upstreams differ in what they make of a last message of the assistant"
    elif not isinstance(fields.get("prompt"), str):
        return "its prompt is not one text"
    elif fields.get("max_tokens") is None:
        # Servers differ in what they take then; the present one may have been about to end.
        return "its request has no max_tokens"
    return None


def _is_begun(fields: dict[str, Any]) -> bool:
    """Whether the client itself has asked to go on with its last message, a text of the assistant."""
    last = fields["messages"][-1]
    return fields.get("continue_final_message") is True and last["role"] == "assistant" and isinstance(last.get("content"), str)


def _go_on(stream: SentStream, fields: dict[str, Any], opening: bytes) -> Continuation:
    # Templates cut spaces at the end of a message, and a model writes them together with what follows: they are asked for
    # again, and the client does not get them twice.
    text = stream.text.rstrip()
    given = stream.given_tokens
    asked = dict(fields)
    for name in _LIMITS:
        if asked.get(name) is not None:
            asked[name] -= given
            if asked[name] <= 0:
                return _end(stream, fields, opening + stream.end_event("length"))
    if isinstance(asked.get("min_tokens"), int):
        asked["min_tokens"] = max(0, asked["min_tokens"] - given)
    if text and "messages" in asked:
        messages = list(asked["messages"])
        begun = messages.pop()["content"] if _is_begun(fields) else ""
        asked["messages"] = [*messages, {"role": "assistant", "content": begun + text}]
        asked |= {"continue_final_message": True, "add_generation_prompt": False}
    elif text:
        asked["prompt"] += text
    spaces = stream.text[len(text) :]
    following = ContinuedStream(stream, spaces=spaces, given_tokens=given)
    return Continuation(opening, msgspec.json.encode(asked), following, is_prefix=True)


def _end(stream: SentStream, fields: dict[str, Any], opening: bytes) -> Continuation:
    """The answer is whole; its usage may be wanted yet."""
    options = fields.get("stream_options")
    wants_usage = isinstance(options, dict) and options.get("include_usage") is True
    if not wants_usage or stream.has_last_usage:
        return Continuation(opening + DONE)
    if stream.usage is not None:
        return Continuation(opening + stream.usage_event(stream.usage) + DONE)
    # Only an upstream can count the prompt: it is asked for one token, which nobody gets.
    asked = {**fields, **{name: 1 for name in _LIMITS if fields.get(name) is not None}}
    if not any(name in asked for name in _LIMITS):
        asked["max_tokens"] = 1
    asked.pop("min_tokens", None)
    return Continuation(opening, msgspec.json.encode(asked), ContinuedStream(stream, is_ended=True))
