"""The openai engine: any OpenAI-compatible server, for one that the gateway cannot reach, with the worker beside it.

Invariants: the server gets the ids or the text that our renderer made, through `/completions`, and chats with tools as
they came; its key comes by the environment (`CHACCU_ENGINE_KEY`) and is never told. What a server cannot be held to (penalties,
log-probabilities, schemas) is not offered.
"""

from __future__ import annotations

import os

from chaccu.conversation import TextTokenizer
from chaccu.engine.completions import CompletionsServer, check_url
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import EngineOptions
from chaccu.engine.scripted import build_byte_tokenizer
from chaccu.engine.server_engine import ServerEngine, describe_server

KEY_VARIABLE = "CHACCU_ENGINE_KEY"
_DEFAULT_SLOTS = 16


class OpenAIEngine(ServerEngine):
    """One model of one server."""

    no_embeddings = "name the server as an upstream of the gateway"

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> OpenAIEngine:
        url = check_url(source.url)
        tokenizer = build_byte_tokenizer() if source.folder is None else TextTokenizer.load(source.folder)
        key = os.environ.get(KEY_VARIABLE, "")
        server = CompletionsServer(url, source.name, key, tokenizer, counts_tokens=source.folder is not None, who="the server")
        server.meet()
        info = describe_server(server, options, engine="openai", default_slots=_DEFAULT_SLOTS, device="remote")
        return cls(server, info)
