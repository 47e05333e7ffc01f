"""`DeltaBuilder`: the deltas of one answer, out of what each token spells.

Invariants: text is cut at stop strings and never a part of one is sent; every token is counted once, with the text that it
belongs to or with the end; log-probabilities come with the text of their tokens, and those of tokens that lie wholly behind a
stop string's beginning do not come at all. It ignores where tokens come from.
"""

from __future__ import annotations

from chaccu.conversation import ToolCallDelta
from chaccu.engine.protocol import FinishReason, GenerationDelta, GenerationRequest, TokenLogprob, Usage
from chaccu.engine.stops import StopScanner


class DeltaBuilder:
    """Feeds on the tokens of the answer to `request`; `made` counts them."""

    def __init__(self, request: GenerationRequest) -> None:
        self.made = 0
        self._scanner = StopScanner(request.stop)
        self._prompt_tokens = len(request.prompt_ids)
        self._counted = 0
        self._pushed_chars = self._sent_chars = 0
        # With the place in the answer's text at which each token begins.
        self._logprobs: list[tuple[int, TokenLogprob]] = []

    def push(self, text: str, *, tokens: int = 1, logprob: TokenLogprob | None = None) -> GenerationDelta | None:
        """Add what the next `tokens` spell; returns what may be sent now: the last delta, when a stop string is complete."""
        self.made += tokens
        if logprob is not None:
            self._logprobs.append((self._pushed_chars, logprob))
        self._pushed_chars += len(text)
        text, stopped = self._scanner.push(text)
        self._sent_chars += len(text)
        if stopped:
            self._logprobs = [(begins, one) for begins, one in self._logprobs if begins < self._sent_chars]
            return self._last(text, "stop")
        if not text:
            return None
        delta = GenerationDelta(text=text, tokens=self.made - self._counted, logprobs=self._take_logprobs())
        self._counted = self.made
        return delta

    def push_calls(self, calls: list[ToolCallDelta], *, tokens: int = 1) -> GenerationDelta:
        """Add parts of calls, which end the text before them."""
        self.made += tokens
        delta = GenerationDelta(text=self._scanner.flush(), tokens=self.made - self._counted, tool_calls=calls)
        self._counted = self.made
        return delta

    def end(self, reason: FinishReason, *, tokens: int = 0) -> GenerationDelta:
        """The last delta, where no stop string is complete; `tokens` spell nothing, as the end of a turn does."""
        self.made += tokens
        return self._last(self._scanner.flush(), reason)

    def _last(self, text: str, reason: FinishReason) -> GenerationDelta:
        return GenerationDelta(
            text=text,
            tokens=self.made - self._counted,
            finish_reason=reason,
            usage=Usage(self._prompt_tokens, self.made),
            stopped_by=self._scanner.stopped_by,
            logprobs=self._take_logprobs(),
        )

    def _take_logprobs(self) -> list[TokenLogprob]:
        taken, self._logprobs = [one for _, one in self._logprobs], []
        return taken
