"""Sample answers: what the model in training says to held-out questions, so that people read it beside the losses.

Questions are the first user turns of validation conversations, written by the run's own chat format. Answers are greedy, all of
them in one batch, and end where the format says that a turn ends.

Invariants: sampling changes nothing of the training: no weight, no random state, no mode. Nothing is compiled for it: compiled
layers, made for rows of one length, run uncompiled meanwhile; and attention, which with a cache has fewer queries than keys, is
PyTorch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from chaccu.conversation import ChatFormat, Conversation, Message, TextTokenizer, encode_conversation
from chaccu.train.attention import ATTENTION
from chaccu.train.encode import read_source
from chaccu.train.model import TrainableModel
from chaccu.train.recipe import Recipe
from chaccu.train.report import SampleAnswer


class SamplePrompt(msgspec.Struct, frozen=True):
    """A question, and the ids of the prompt that awaits its answer."""

    question: str
    ids: list[int]


def choose_prompts(recipe: Recipe, chat_format: ChatFormat, tokenizer: TextTokenizer) -> list[SamplePrompt]:
    """The first user turns of up to `sample_answers` validation conversations, chosen by the seed, no question twice.

    Questions that leave no room for an answer of `sample_tokens` in `sequence_len` are passed over.
    """
    chosen: dict[str, SamplePrompt] = {}
    wanted = recipe.sample_answers if recipe.sample_tokens else 0
    for source in recipe.validation if wanted else ():
        for conversation in read_source(source, shuffle_seed=recipe.seed):
            question = next((message.content for message in conversation.messages if message.role == "user"), None)
            if not question or question in chosen:
                continue
            asked = Conversation(messages=(Message("user", question),), system=conversation.system)
            ids = encode_conversation(asked, chat_format, tokenizer, pending=True).ids
            if len(ids) + recipe.sample_tokens <= recipe.sequence_len:
                chosen[question] = SamplePrompt(question, ids)
            if len(chosen) >= wanted:
                return list(chosen.values())
    return list(chosen.values())


class Sampler:
    """Asks one model the same questions again and again."""

    def __init__(
        self,
        model: TrainableModel,
        prompts: Sequence[SamplePrompt],
        chat_format: ChatFormat,
        tokenizer: TextTokenizer,
        *,
        max_tokens: int,
    ) -> None:
        self._model = model
        self._prompts = list(prompts)
        self._tokenizer = tokenizer
        self._ends = tuple(dict.fromkeys(text for text in (*chat_format.stop, tokenizer.eos_token) if text))
        self._max_tokens = max_tokens

    @torch.no_grad()
    def answer(self) -> tuple[SampleAnswer, ...]:
        """The model's answers as it is now, in the questions' order."""
        if not self._prompts:
            return ()
        from transformers import GenerationConfig, StoppingCriteriaList

        ids_BP, mask_BP = self._pad()
        size = ids_BP.shape[1]
        stop = StoppingCriteriaList([lambda ids_BT, _, **__: self._have_ended(ids_BT[:, size:])])
        config: Any = GenerationConfig(max_new_tokens=self._max_tokens, do_sample=False, pad_token_id=0, use_cache=True)  # type: ignore[no-untyped-call]
        with _generating(self._model):
            ids_BT = self._model.causal.generate(
                input_ids=ids_BP, attention_mask=mask_BP, generation_config=config, stopping_criteria=stop
            )
        cut = [self._cut(ids) for ids in ids_BT[:, size:].tolist()]
        return tuple(SampleAnswer(prompt.question, *one) for prompt, one in zip(self._prompts, cut, strict=True))

    def _pad(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts filled up on the left, so that all answers begin at one place; and which tokens are theirs."""
        size = max(len(prompt.ids) for prompt in self._prompts)
        ids = [[0] * (size - len(prompt.ids)) + prompt.ids for prompt in self._prompts]
        mask = [[0] * (size - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in self._prompts]
        return torch.tensor(ids, device=self._model.device), torch.tensor(mask, device=self._model.device)

    def _have_ended(self, ids_BT: torch.Tensor) -> torch.Tensor:
        # All processes end together: a step of one alone would wait for the others for ever.
        ended = self._model.processes.decide(lambda: [self._cut(ids)[1] for ids in ids_BT.tolist()])
        return torch.tensor(ended, device=ids_BT.device)

    def _cut(self, ids: list[int]) -> tuple[str, bool]:
        """The text of generated ids up to the first end of turn, and whether there was one."""
        text = self._tokenizer.decode(ids)
        places = [place for place in map(text.find, self._ends) if place >= 0]
        return (text[: min(places)].strip(), True) if places else (text.strip(), False)


@contextlib.contextmanager
def _generating(model: TrainableModel) -> Iterator[None]:
    causal: Any = model.causal
    attention = causal.config._attn_implementation
    model.full.eval()
    if attention == ATTENTION:
        causal.set_attn_implementation("sdpa")
    try:
        with model.autocast(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if attention == ATTENTION:
            causal.set_attn_implementation(attention)
        model.full.train()
