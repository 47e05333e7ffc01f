"""The transformers engine: any causal language model of Hugging Face, on a CPU or a CUDA device.

One thread owns the model. It gives each running request one token in turn (each has its own key-value cache), so requests share
the device fairly and a cancelled one costs at most the step it is in. Invariants: nothing but that thread touches the model;
each request samples from its own random generator, so a seed repeats whatever runs beside it. Embeddings are the mean of the
last hidden states over an input's tokens, scaled to length 1.

It ignores batching: steps of different requests are not joined into one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.json_schemas import can_read_schemas
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import (
    Ability,
    EngineInfo,
    EngineOptions,
    GenerationDelta,
    GenerationRequest,
    TokenLogprob,
    check_inputs,
    room_for_answer,
)
from chaccu.engine.token_choice import TokenChooser
from chaccu.errors import ChaccuError, EngineError, MissingDependencyError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_DEFAULT_SLOTS = 4
_UNBOUNDED_CONTEXT_TOKENS = 4096


class TransformersEngine:
    """One model, one thread, several requests in turn."""

    def __init__(self, model: Any, tokenizer: Tokenizer, options: EngineOptions) -> None:
        trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _UNBOUNDED_CONTEXT_TOKENS
        self._info = EngineInfo(
            engine="transformers",
            context_tokens=min(options.context_tokens or trained, trained),
            slots=options.slots or _DEFAULT_SLOTS,
            device=str(model.device),
            abilities=_abilities(),
        )
        self._model = model
        self._eos_ids = _end_ids(model)
        self._words = _Words(tokenizer, self._eos_ids)
        self._slots = asyncio.Semaphore(self._info.slots)
        self._waiting: deque[_Task] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="chaccu-generate", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, source: ModelSource, options: EngineOptions) -> TransformersEngine:
        try:
            import torch
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise MissingDependencyError(
                "torch with transformers", extra="train", needed_for="the engine transformers"
            ) from error
        if source.hf is None:
            raise EngineError(f"{source.spec} holds no config.json with *.safetensors.", remedy="name a Hugging Face folder")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.is_available()
        try:
            tokenizer = Tokenizer.from_file(str(source.hf / "tokenizer.json"))
            model: Any = AutoModelForCausalLM.from_pretrained(source.hf, dtype=torch.bfloat16 if cuda else torch.float32)
        except Exception as error:  # tokenizers and transformers raise bare exceptions for whatever is wrong with the files
            raise EngineError(f"transformers cannot load {source.hf}: {error}", remedy="check the folder's files") from error
        return cls(model.to(torch.device("cuda" if cuda else "cpu")).eval(), tokenizer, options)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        limit = room_for_answer(request, self._info.context_tokens)
        async with self._slots:
            run = _Run(request, limit, self._eos_ids | set(request.stop_ids), self._words)
            async with contextlib.aclosing(self._results(run)) as deltas:
                async for delta in deltas:
                    yield delta
                    if delta.finish_reason is not None:
                        return

    async def embed(self, inputs: list[list[int]]) -> list[list[float]]:
        check_inputs(inputs, self._info.context_tokens)
        if not inputs:
            return []
        async with self._slots, contextlib.aclosing(self._results(_Embedding(inputs))) as results:
            vectors: list[list[float]] = await anext(results)
            return vectors

    async def _results(self, task: _Task) -> AsyncGenerator[Any, None]:
        """What the thread sends for `task`, until the caller leaves. Raises what it failed of."""
        with self._wake:
            if self._closing:
                raise EngineError("the engine is closing.", remedy="ask another worker")
            self._waiting.append(task)
            self._wake.notify()
        try:
            while True:
                result = await task.sent.get()
                if isinstance(result, ChaccuError):
                    raise result
                yield result
        finally:
            task.cancelled = True

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._model = None

    def _work(self) -> None:
        """The thread: one step for each running request, round after round, until the engine closes."""
        running: list[_Task] = []
        while True:
            with self._wake:
                while not running and not self._waiting and not self._closing:
                    self._wake.wait()
                running.extend(self._waiting)
                self._waiting.clear()
                if self._closing:
                    break
            running = [task for task in running if not task.cancelled and self._step(task)]
        for task in running:
            task.send(EngineError("the engine closed while it generated.", remedy="ask again"))

    def _step(self, task: _Task) -> bool:
        """One step of `task`; returns whether it goes on."""
        import torch

        try:
            with torch.inference_mode():
                return task.step(self._model)
        except Exception as error:  # whatever the model raises must reach the request that met it, not end the thread
            task.send(
                error
                if isinstance(error, ChaccuError)
                else EngineError(f"transformers failed: {type(error).__name__}: {error}")
            )
            return False


class _Task:
    """What the model's thread works on, step by step. Made on the event loop; `sent` holds what it sends there."""

    def __init__(self) -> None:
        self.cancelled = False
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def step(self, model: Any) -> bool:
        """Do a little; returns whether there is more to do."""
        raise NotImplementedError

    def send(self, item: Any) -> None:
        """Give `item` to the event loop; a `ChaccuError` is raised there."""
        self._loop.call_soon_threadsafe(self.sent.put_nowait, item)


class _Run(_Task):
    """One answer: a token a step."""

    def __init__(self, request: GenerationRequest, limit: int, end_ids: set[int], words: _Words) -> None:
        super().__init__()
        self._request = request
        self._limit = limit
        self._end_ids = end_ids
        self._words = words
        # Begun with the reply so far: a first token would lose its leading space, which a later one keeps.
        self._decoder = DecodeStream(ids=request.reply_ids, skip_special_tokens=True)
        self._builder = DeltaBuilder(request)
        self._ids = request.prompt_ids + request.reply_ids
        self._cache: Any = None
        self._chooser: TokenChooser | None = None

    def step(self, model: Any) -> bool:
        import torch

        if self._chooser is None:
            self._chooser = TokenChooser(self._request, model.device, self._words.for_grammars, self._end_ids)
        ids_1T = torch.tensor([self._ids], device=model.device)
        output = model(input_ids=ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        token, logprob = self._chooser.choose(output.logits[:, -1].float())
        self._ids = [token]
        delta = self._take(token, logprob)
        if delta is not None:
            self.send(delta)
        return delta is None or delta.finish_reason is None

    def _take(self, token: int, logprob: TokenLogprob | None) -> GenerationDelta | None:
        """What `token` adds to the answer."""
        builder = self._builder
        if token in self._end_ids:
            return builder.end("stop", tokens=1)
        delta = builder.push(self._decoder.step(self._words.tokenizer, token) or "", logprob=logprob)
        if delta is not None and delta.finish_reason is not None:
            return delta
        complete = self._chooser is not None and self._chooser.is_complete
        if not complete and builder.made < self._limit:
            return delta
        if delta is not None:
            self.send(delta)
        return builder.end("stop" if complete else "length")


class _Embedding(_Task):
    """Vectors of some inputs: one input a step, as the mean of the last hidden states over its tokens, scaled to length 1."""

    def __init__(self, inputs: list[list[int]]) -> None:
        super().__init__()
        self._inputs = inputs
        self._vectors: list[list[float]] = []

    def step(self, model: Any) -> bool:
        import torch

        ids_1T = torch.tensor([self._inputs[len(self._vectors)]], device=model.device)
        hidden_TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0].float()
        self._vectors.append(torch.nn.functional.normalize(hidden_TD.mean(0), dim=0).tolist())
        if len(self._vectors) < len(self._inputs):
            return True
        self.send(self._vectors)
        return False


class _Words:
    """The tokenizer, and llguidance's view of it, which is made when it is first needed (a second for a large vocabulary)."""

    def __init__(self, tokenizer: Tokenizer, end_ids: set[int]) -> None:
        self.tokenizer = tokenizer
        self._end_ids = end_ids
        self._for_grammars: LLTokenizer | None = None

    def for_grammars(self) -> LLTokenizer:
        if self._for_grammars is None:
            from llguidance import LLTokenizer

            self._for_grammars = LLTokenizer(self.tokenizer.to_str(), eos_token=sorted(self._end_ids) or None)
        return self._for_grammars


def _end_ids(model: Any) -> set[int]:
    """Ids at which the model's own configuration ends an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return set()
    return {configured} if isinstance(configured, int) else set(configured)


def _abilities() -> tuple[Ability, ...]:
    always: tuple[Ability, ...] = ("penalties", "logit_bias", "embeddings")
    # llguidance keeps answers to schemas, and knows the bytes of each token.
    return (*always, "logprobs", "json_schema", "json_resumed") if can_read_schemas() else always
