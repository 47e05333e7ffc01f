"""The dialects that a gateway speaks. A new one is one file and one name here."""

from __future__ import annotations

from chaccu.serve.gateway.dialects.dialect import Dialect
from chaccu.serve.gateway.dialects.messages import MESSAGES
from chaccu.serve.gateway.dialects.openai_dialects import CHAT, COMPLETIONS
from chaccu.serve.gateway.dialects.openai_responses import RESPONSES
from chaccu.serve.gateway.errors import ApiError

DIALECTS: tuple[Dialect, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


def write_error(path: str, error: ApiError) -> bytes:
    """The body that tells a client of `path` of `error`; OpenAI's object where the path is none of a dialect's."""
    for dialect in DIALECTS:
        if path == dialect.path or path.startswith(f"{dialect.path}/"):
            return dialect.write_error(error)
    return error.to_json()
