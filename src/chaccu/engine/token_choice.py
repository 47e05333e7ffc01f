"""`TokenChooser`: from a model's logits to the next token of one answer, with its log-probability.

Invariants: the answer's tokens are counted from its beginning, whoever generated them; log-probabilities are the model's own,
taken before a bias, a penalty, a schema or the temperature; an answer that keeps to a schema is never given a token that could
not go on to a whole one. It ignores the model and texts.

Shapes: V vocabulary of the model's logits; 1 the one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from chaccu.engine.json_schemas import read_schema
from chaccu.engine.protocol import LEAST_LOGPROB, GenerationRequest, TokenLogprob, WrongRequestError

if TYPE_CHECKING:
    import torch
    from llguidance import LLTokenizer


class TokenChooser:
    """Chooses the tokens of the answer to `request`: greedy at temperature 0, else temperature, then top_k, top_p and min_p.

    `vocabulary` makes llguidance's view of the tokenizer, where it is needed; `end_ids` end an answer.
    """

    def __init__(
        self, request: GenerationRequest, device: torch.device, vocabulary: Callable[[], LLTokenizer], end_ids: Iterable[int]
    ) -> None:
        """Raises `WrongRequestError` for a schema that cannot be carried out, or that a begun answer does not keep to."""
        import torch

        self._request = request
        self._device = device
        self._vocabulary = vocabulary
        self._end_ids = list(end_ids)
        self._generator = torch.Generator(device=device)
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed % 2**63)
        self._warpers = _build_warpers(request)
        self._counts_V: torch.Tensor | None = None
        self._seen_V: torch.Tensor | None = None
        self._bias_V: torch.Tensor | None = None
        self._matcher: Any = None if request.json_schema is None else _begin_matcher(request, vocabulary())

    def choose(self, logits_1V: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token, and its log-probability where it is asked for."""
        import torch

        scores_1V = self._allow(self._penalize(logits_1V))
        if self._request.temperature == 0:
            token = int(scores_1V.argmax())
        else:
            no_ids_10 = torch.empty((1, 0), dtype=torch.long)  # none of the warpers looks at the text so far
            shares_1V = torch.softmax(self._warpers(no_ids_10, scores_1V), -1)
            token = int(torch.multinomial(shares_1V, 1, generator=self._generator))
        self._note(token)
        top = self._request.top_logprobs
        return token, None if top is None else self._logprob(logits_1V[0], token, top)

    @property
    def is_complete(self) -> bool:
        """Whether a schema leaves nothing to be added to the answer."""
        return self._matcher is not None and bool(self._matcher.is_stopped())

    def _penalize(self, logits_1V: torch.Tensor) -> torch.Tensor:
        """Logits with biases and penalties, as `GenerationRequest` defines them."""
        import torch

        request, size = self._request, logits_1V.shape[-1]
        if request.logit_bias:
            if self._bias_V is None:
                self._bias_V = torch.zeros(size, device=self._device)
                self._bias_V[list(request.logit_bias)] = torch.tensor(list(request.logit_bias.values()), device=self._device)
            logits_1V = logits_1V + self._bias_V
        if request.repetition_penalty != 1:
            if self._seen_V is None:
                self._seen_V = self._count(request.prompt_ids + request.reply_ids, size) > 0
            weakened_1V = torch.where(
                logits_1V > 0, logits_1V / request.repetition_penalty, logits_1V * request.repetition_penalty
            )
            logits_1V = torch.where(self._seen_V, weakened_1V, logits_1V)
        if request.frequency_penalty or request.presence_penalty:
            if self._counts_V is None:
                self._counts_V = self._count(request.reply_ids, size)
            present_V = (self._counts_V > 0).float()
            logits_1V = logits_1V - request.frequency_penalty * self._counts_V - request.presence_penalty * present_V
        return logits_1V

    def _count(self, ids: list[int], size: int) -> torch.Tensor:
        import torch

        return torch.bincount(torch.tensor(ids, dtype=torch.long, device=self._device), minlength=size).float()

    def _allow(self, scores_1V: torch.Tensor) -> torch.Tensor:
        """Scores with what a schema forbids at minus infinity."""
        import torch

        if self._matcher is None:
            return scores_1V
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed_V = torch.zeros(scores_1V.shape[-1], dtype=torch.bool)
        size = min(len(bits), len(allowed_V))
        allowed_V[:size] = torch.from_numpy(bits[:size].astype(np.bool_))
        allowed_V[self._end_ids] = bool(self._matcher.is_accepting())
        return scores_1V.masked_fill(~allowed_V.to(self._device), float("-inf"))

    def _note(self, token: int) -> None:
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._matcher is not None and token not in self._end_ids:
            self._matcher.consume_token(token)

    def _logprob(self, logits_V: torch.Tensor, token: int, top: int) -> TokenLogprob:
        import torch

        logprobs_V = torch.log_softmax(logits_V, -1)
        likeliest = torch.topk(logprobs_V, min(top, len(logprobs_V)))
        vocabulary = self._vocabulary()
        told = [
            (vocabulary.decode_bytes([one]), max(logprob, LEAST_LOGPROB))
            for one, logprob in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        ]
        return TokenLogprob(vocabulary.decode_bytes([token]), max(float(logprobs_V[token]), LEAST_LOGPROB), told)


def _build_warpers(request: GenerationRequest) -> Any:
    from transformers.generation import logits_process

    warpers: Any = logits_process.LogitsProcessorList()
    if request.temperature not in (0, 1):
        warpers.append(logits_process.TemperatureLogitsWarper(request.temperature))
    if request.top_k > 0:
        warpers.append(logits_process.TopKLogitsWarper(request.top_k))
    if request.top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(request.top_p))
    if request.min_p > 0:
        warpers.append(logits_process.MinPLogitsWarper(request.min_p))
    return warpers


def _begin_matcher(request: GenerationRequest, vocabulary: LLTokenizer) -> Any:
    """What follows an answer through its schema, behind the reply so far."""
    from llguidance import LLMatcher

    schema = msgspec.json.encode(read_schema(request.json_schema or "{}")).decode()
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(schema), log_level=0)
    if matcher.try_consume_tokens(request.reply_ids) < len(request.reply_ids):
        raise WrongRequestError(
            "the answer that was begun does not keep to the JSON schema.", parameter="response_format", remedy="begin none"
        )
    return matcher
