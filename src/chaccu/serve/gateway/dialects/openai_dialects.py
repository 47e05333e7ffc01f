"""OpenAI's chat completions and raw completions, as dialects.

It ignores what a body may hold (`requests`) and what an answer looks like (`responses`).
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from chaccu.serve.gateway.dialects.dialect import Asked, Dialect
from chaccu.serve.gateway.dialects.parameters import user_of
from chaccu.serve.gateway.dialects.relayed_request import RelayedChat, RelayedCompletion
from chaccu.serve.gateway.dialects.requests import UNUSED, ChatBody, CompletionBody
from chaccu.serve.gateway.dialects.responses import CompletionWriter


def _ask_chat(body: ChatBody, fields: dict[str, Any]) -> Asked:
    return _asked(body, fields, "chatcmpl-")


def _ask_completion(body: CompletionBody, fields: dict[str, Any]) -> Asked:
    return _asked(body, fields, "cmpl-")


def _asked(body: ChatBody | CompletionBody, fields: dict[str, Any], prefix: str) -> Asked:
    answer_id = prefix + secrets.token_hex(12)
    job = body.job()
    writer = CompletionWriter(
        answer_id=answer_id,
        created_s=int(time.time()),
        model=body.model,
        chat=isinstance(body, ChatBody),
        with_usage=body.wants_stream and body.wants_usage,
        n=job.choices,
        goes_on=bool(job.begun),
    )
    return Asked(
        answer_id=answer_id,
        job=job,
        writer=writer,
        streamed=body.wants_stream,
        user=user_of(fields),
    )


CHAT = Dialect(
    path="/v1/chat/completions",
    summary="OpenAI's chat completions.",
    body=ChatBody,
    unused=UNUSED,
    ask=_ask_chat,
    is_chat=True,
    relayed=RelayedChat,
)
COMPLETIONS = Dialect(
    path="/v1/completions",
    summary="OpenAI's raw completions.",
    body=CompletionBody,
    unused=UNUSED,
    ask=_ask_completion,
    is_chat=False,
    relayed=RelayedCompletion,
)
