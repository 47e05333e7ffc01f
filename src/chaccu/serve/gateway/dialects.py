"""The dialects that a gateway speaks. A new one is one file and one name here."""

from __future__ import annotations

from chaccu.serve.gateway.dialect import Dialect
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.messages import MESSAGES
from chaccu.serve.gateway.openai_dialects import CHAT, COMPLETIONS
from chaccu.serve.gateway.openai_responses import RESPONSES

DIALECTS: tuple[Dialect, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


def write_error(path: str, error: ApiError) -> bytes:
    """The body that tells a client of `path` of `error`; OpenAI's object where the path is none of a dialect's."""
    for dialect in DIALECTS:
        if path == dialect.path or path.startswith(f"{dialect.path}/"):
            return dialect.write_error(error)
    return error.to_json()
