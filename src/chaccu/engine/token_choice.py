"""`choose_tokens`: from a model's logits to the next token of each running answer, with its log-probability.

Answers with equal settings are chosen for together. Invariants: a seed repeats, whatever is chosen for beside it; the answer's
tokens are counted from its beginning, whoever generated them; log-probabilities are the model's own, taken before a bias, a
penalty, a schema or the temperature; an answer that keeps to a schema is never given a token that could not go on to a whole
one. It ignores the model and texts.

Shapes: V vocabulary of the model's logits; R rows, one an answer; 1 the one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from chaccu.engine.json_schemas import read_schema
from chaccu.engine.protocol import LEAST_LOGPROB, GenerationRequest, TokenLogprob, WrongRequestError
from chaccu.errors import EngineError

if TYPE_CHECKING:
    import torch
    from llguidance import LLTokenizer


Choice = tuple[int, TokenLogprob | None]


class TokenChooser:
    """What the tokens of the answer to `request` are chosen by; `choose_tokens` chooses.

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
        # On the processor: one number a token is drawn there, the same for every device, and sent with those of the others.
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed % 2**63)
        self._counts_V: torch.Tensor | None = None
        self._seen_V: torch.Tensor | None = None
        self._bias_V: torch.Tensor | None = None
        self._matcher: Any = None if request.json_schema is None else _begin_matcher(request, vocabulary())

    @property
    def settings(self) -> tuple[float, int, float, float] | None:
        """What shapes the distribution that is drawn from: temperature, top_k, top_p, min_p; None is greedy."""
        request = self._request
        return (request.temperature, request.top_k, request.top_p, request.min_p) if request.temperature else None

    @property
    def changes_logits(self) -> bool:
        """Whether `score` may give anything but the logits."""
        request = self._request
        penalizes = request.repetition_penalty != 1 or request.frequency_penalty or request.presence_penalty
        return bool(request.logit_bias or penalizes or self._matcher is not None)

    def draw(self) -> float:
        """The next random number of this answer, in [0, 1)."""
        import torch

        return float(torch.rand((), generator=self._generator))

    def score(self, logits_1V: torch.Tensor) -> torch.Tensor:
        """Logits with what the request changes of them before the temperature."""
        return self._allow(self._penalize(logits_1V))

    def settle(self, token: int, logits_RV: torch.Tensor, row: int) -> Choice:
        """Note that `token` was chosen; returns it, with its log-probability by `row` where it is asked for."""
        self._note(token)
        top = self._request.top_logprobs
        return token, None if top is None else self._logprob(logits_RV[row], token, top)

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


def choose_tokens(choosers: Sequence[TokenChooser], logits_RV: torch.Tensor) -> list[Choice | Exception]:
    """The next token of each answer: the likeliest at temperature 0, else drawn after temperature, top_k, top_p and min_p.

    Where choosing fails, the error stands in place of the choice.
    """
    choices: list[Choice | Exception] = [EngineError("no token was chosen.")] * len(choosers)
    alike: dict[tuple[float, int, float, float] | None, list[int]] = {}
    scores_RV = logits_RV
    for row, chooser in enumerate(choosers):
        try:
            # Most change nothing: an operation for each row of them would cost more than the choice.
            if chooser.changes_logits:
                if scores_RV is logits_RV:
                    scores_RV = logits_RV.clone()
                scores_RV[row : row + 1] = chooser.score(logits_RV[row : row + 1])
            alike.setdefault(chooser.settings, []).append(row)
        except Exception as error:  # whatever is wrong belongs to this answer alone
            choices[row] = error
    for settings, rows in alike.items():
        chosen_RV = scores_RV if len(rows) == len(choosers) else scores_RV[rows]
        if settings is None:
            tokens = chosen_RV.argmax(-1).tolist()
        else:
            tokens = _draw(_share(chosen_RV, settings), [choosers[row].draw() for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            try:
                if token is None:
                    raise EngineError("the model gave numbers that are none (nan).", remedy="check the weights")
                choices[row] = choosers[row].settle(token, logits_RV, row)
            except Exception as error:  # as above
                choices[row] = error
    return choices


def _share(scores_RV: torch.Tensor, settings: tuple[float, int, float, float]) -> torch.Tensor:
    """Probabilities after temperature, top_k, top_p and min_p, in this order."""
    import torch
    from transformers.generation import logits_process

    temperature, top_k, top_p, min_p = settings
    warpers: Any = logits_process.LogitsProcessorList()
    if temperature != 1:
        warpers.append(logits_process.TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(logits_process.MinPLogitsWarper(min_p))
    no_ids_R0 = torch.empty((len(scores_RV), 0), dtype=torch.long)  # none of the warpers looks at the text so far
    return torch.softmax(warpers(no_ids_R0, scores_RV), -1)


def _draw(shares_RV: torch.Tensor, numbers: list[float]) -> list[int | None]:
    """The tokens at which the sums of shares pass `numbers` (inverse transform sampling); None where shares are no numbers."""
    import torch

    if shares_RV.device.type == "mps":  # which knows no doubles
        shares_RV = shares_RV.cpu()
    sums_RV = shares_RV.double().cumsum(-1)
    sums_R1 = sums_RV[:, -1:]
    marks_R1 = torch.tensor(numbers, dtype=torch.double, device=sums_RV.device)[:, None] * sums_R1
    tokens_R1 = torch.searchsorted(sums_RV, marks_R1, right=True)
    tokens = torch.where(sums_R1.isfinite(), tokens_R1, -1)[:, 0].tolist()
    return [None if token < 0 else token for token in tokens]


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
