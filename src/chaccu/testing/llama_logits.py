"""`LlamaLogits`: what llama.cpp itself makes of a GGUF file - its ids for a text, its probabilities for the next token.

It ignores chat formats, sampling and speed.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chaccu.engine.llama_server import LlamaServer, ServerSettings

_BETWEEN = 2_000_000_000


class LlamaLogits:
    """llama.cpp over one file, as a context. `context_tokens`: of one prompt."""

    def __init__(self, gguf: Path, *, context_tokens: int = 512) -> None:
        self._server = LlamaServer(ServerSettings(gguf=gguf, threads=1, slots=1, context_tokens=context_tokens))
        self._connection = http.client.HTTPConnection(self._server.url.removeprefix("http://"), timeout=300)

    def __enter__(self) -> LlamaLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        # The server ends when nobody holds it.
        self._server._server = None

    def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text, without BOS; `special`: the text of a control token becomes that token."""
        # llama.cpp takes texts and ids in turns; one that is no token's keeps the texts apart.
        content = [part for text in texts for part in (text, _BETWEEN)]
        tokens = self._post("/tokenize", {"content": content, "add_special": False, "parse_special": special})["tokens"]
        rows: list[list[int]] = [[]]
        for token in tokens:
            if token == _BETWEEN:
                rows.append([])
            else:
                rows[-1].append(token)
        return rows[:-1]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that llama.cpp's own chat makes of messages, by the template in the file."""
        return str(self._post("/apply-template", {"messages": messages})["prompt"])

    def next_logprobs(self, ids: Sequence[int], vocabulary: int, *, top: int | None = None) -> np.ndarray:
        """Log-probabilities of every token to come next (V), before sampling; with `top` of so many, and -inf of the others."""
        # llama.cpp tells none for an end or for a part of a character, so a letter is made to come; the bias is of sampling.
        letter = self.tokenize(["a"])[0][-1]
        body = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": top or vocabulary,
            "cache_prompt": False,
            "logit_bias": [[letter, 1000]],
        }
        (first,) = self._post("/completion", body)["completion_probabilities"]
        found = np.full(vocabulary, -np.inf, np.float64)
        for one in first["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self._server.key}", "Content-Type": "application/json"}
        self._connection.request("POST", path, json.dumps(body), headers)
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise AssertionError(f"llama.cpp answered {response.status} to {path}: {answer}")
        return answer


def agreement(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Of log-probabilities (prompts N × vocabulary V): the least cosine of a prompt's, each less its mean, and the share of
    prompts with the same likeliest token."""
    pairs = [(first - first.mean(), second - second.mean()) for first, second in zip(one, other, strict=True)]
    cosines = [float(first @ second / np.linalg.norm(first) / np.linalg.norm(second)) for first, second in pairs]
    return min(cosines), float(np.mean(one.argmax(1) == other.argmax(1)))
