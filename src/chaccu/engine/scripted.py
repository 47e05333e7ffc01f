"""The scripted engine: deterministic answers at a set pace, for tests and benchmarks.

A model spec is `scripted:NAME?text=…&tokens=…&tokens_per_s=…&first_token_s=…&context_tokens=…&slots=…&echo=1&can=…`. The answer
is the given text, or the prompt's text (`echo`), or words drawn from the prompt's ids and the seed. Invariant: it depends on
nothing else, so a reply that another worker began is gone on with to the same text, character for character. One token is one
word with the space before it.

The log-probability of every token is that of one half, and of the words told beside it of a quarter, an eighth and so on.
Embeddings are drawn from the input's ids.

It ignores temperature and the other sampling settings but the seed, and needs no model folder: its tokenizer is one token a
byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncGenerator, Iterator
from urllib.parse import parse_qsl

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chaccu.conversation import TextTokenizer
from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import (
    Ability,
    EngineInfo,
    EngineOptions,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    TokenLogprob,
    check_inputs,
    room_for_answer,
)
from chaccu.errors import UsageError, did_you_mean

_WORDS = (
    "vicuña",
    "wool",
    "river",
    "stone",
    "山",
    "llama",
    "quiet",
    "cloud",
    "über",
    "green",
    "field",
    "herd",
    "🦙",
    "evening",
    "rope",
    "señal",
    "light",
    "grass",
    "wind",
    "far",
    "naïve",
    "bridge",
    "salt",
    "水",
    "path",
    "early",
    "bright",
    "kettle",
    "answer",
    "small",
)
_VECTOR_LENGTH = 32
_TOKEN = re.compile(r"\s*\S+|\s+$")


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a scripted model behaves. `tokens_per_s` 0 waits for nothing; `tokens` is the length of a drawn answer; `can`: what
    abilities it says it has beside those that it has, by commas.
    """

    text: str | None = None
    echo: bool = False
    tokens: int = 32
    tokens_per_s: float = 0.0
    first_token_s: float = 0.0
    context_tokens: int = 8192
    slots: int = 64
    can: str = ""

    @property
    def abilities(self) -> tuple[Ability, ...]:
        """What it says that it can."""
        return msgspec.convert(["logprobs", "embeddings", "token_ids", *filter(None, self.can.split(","))], tuple[Ability, ...])


def parse_script(spec: str) -> Script:
    """The script in a `scripted:NAME?…` spec. Raises `UsageError` naming a wrong key or value."""
    fields = dict(parse_qsl(spec.partition("?")[2], keep_blank_values=True))
    unknown = [key for key in fields if key not in Script.__struct_fields__]
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} is no setting of a scripted model.", remedy=did_you_mean(unknown[0], Script.__struct_fields__)
        )
    try:
        script = msgspec.convert(fields, Script, strict=False)
        script.abilities  # noqa: B018 - checked here, where the spec can be named
        return script
    except msgspec.ValidationError as error:
        raise UsageError(f"{spec!r} has a wrong value: {error}.") from error


def build_byte_tokenizer() -> TextTokenizer:
    """What the scripted engine reads prompts with."""
    return TextTokenizer(build_byte_backend(), eos_token="<|im_end|>")


def build_byte_backend() -> Tokenizer:
    """A tokenizer of one token a byte, with ChatML's two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    return backend


class ScriptedEngine:
    """Answers from a `Script`."""

    def __init__(self, script: Script, *, slots: int | None = None, context_tokens: int | None = None) -> None:
        self._script = script
        self._info = EngineInfo(
            engine="scripted",
            context_tokens=context_tokens or script.context_tokens,
            slots=slots or script.slots,
            device="none",
            abilities=script.abilities,
        )
        self._slots = asyncio.Semaphore(self._info.slots)
        self._tokenizer = build_byte_tokenizer()

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> ScriptedEngine:
        return cls(parse_script(source.spec), slots=options.slots, context_tokens=options.context_tokens)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        if request.chat is not None:
            # It calls nothing.
            request = msgspec.structs.replace(request, prompt_ids=list(msgspec.json.encode(request.chat)))
        limit = room_for_answer(request, self._info.context_tokens)
        async with self._slots:
            builder = DeltaBuilder(request)
            clock = asyncio.get_running_loop().time
            due = clock() + self._script.first_token_s
            step = 1 / self._script.tokens_per_s if self._script.tokens_per_s else 0.0
            finish: FinishReason = "stop"
            for token in self._tokens(request):
                if builder.made == limit:
                    finish = "length"
                    break
                # Sleeping to a due time instead of for a duration keeps the pace exact under load.
                await asyncio.sleep(max(0.0, due - clock()))
                due += step
                logprob = None if request.top_logprobs is None else _logprob(token, request.top_logprobs)
                delta = builder.push(token, logprob=logprob)
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None:
                        return
            yield builder.end(finish)

    async def embed(self, inputs: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        check_inputs(inputs, self._info.context_tokens)
        return [_draw_vector(ids) for ids in inputs]

    async def close(self) -> None:
        """Nothing to free."""

    def _tokens(self, request: GenerationRequest) -> Iterator[str]:
        begun = self._tokenizer.decode(request.reply_ids)
        answer = self._answer(request)
        rest = answer[len(begun) :] if answer.startswith(begun) else answer
        return (match[0] for match in _TOKEN.finditer(rest))

    def _answer(self, request: GenerationRequest) -> str:
        if self._script.text is not None:
            return self._script.text
        if self._script.echo:
            return self._tokenizer.decode(request.prompt_ids, skip_special_tokens=True)
        draws = hashlib.shake_128(repr((request.prompt_ids, request.seed)).encode()).digest(self._script.tokens)
        return " ".join(_WORDS[draw % len(_WORDS)] for draw in draws)


def _logprob(token: str, top: int) -> TokenLogprob:
    """The token at one half, and before `top` words in all those that follow it at half of the former each."""
    others = [word for word in _WORDS if word != token.strip()]
    told = [token, *(f" {word}" for word in others)][:top]
    half = math.log(0.5)
    return TokenLogprob(token.encode(), half, [(text.encode(), half * place) for place, text in enumerate(told, 1)])


def _draw_vector(ids: list[int]) -> list[float]:
    drawn = hashlib.shake_128(repr(ids).encode()).digest(_VECTOR_LENGTH)
    values = [byte - 127.5 for byte in drawn]
    length = math.hypot(*values)
    return [value / length for value in values]
