"""`WebConfig`: what the pages need to know."""

from __future__ import annotations

import msgspec


class WebConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`gateway_url`: any OpenAI-compatible server. `path_prefix`: the page's own path behind a proxy, such as `/chat`.

    `share` opens a tunnel through gradio.live, the one case in which the page talks to a foreign host. `timeout_s`: the longest
    silence of a model before its answer counts as failed. `refresh_s`: how often a page asks for the list of models.
    """

    gateway_url: str
    api_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    path_prefix: str = ""
    share: bool = False
    timeout_s: float = 120.0
    refresh_s: float = 3.0
    max_tokens: int = 512
    temperature: float = 0.7
