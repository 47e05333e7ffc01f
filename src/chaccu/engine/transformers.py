"""The transformers engine: any causal language model of Hugging Face, on a CPU, a CUDA device or Apple's.

One thread owns the model and gives all running answers their next tokens in one step (`batcher`), so a cancelled one costs at
most the step it is in. Invariants: nothing but that thread touches the model; each request samples from its own random
generator, so a seed repeats whatever runs beside it. Embeddings are the mean of the last hidden states over an input's tokens,
scaled to length 1.

It ignores how steps are joined, and which answers begin alike: nothing of a prompt is kept for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from chaccu.engine.adapter_source import AdapterSource
from chaccu.engine.batching.tasks import AdapterChange, Answer, Embedding, Task, Words
from chaccu.engine.json_schemas import can_read_schemas
from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import (
    Ability,
    EngineInfo,
    EngineLostError,
    EngineOptions,
    GenerationDelta,
    GenerationRequest,
    check_inputs,
    room_for_answer,
)
from chaccu.errors import ChaccuError, EngineError, MissingDependencyError

if TYPE_CHECKING:
    import torch

    from chaccu.engine.batching.batcher import Batcher
    from chaccu.engine.batching.model_adapters import ModelAdapters

_SLOTS_ON_CPU = 8
_SLOTS_ON_ACCELERATOR = 64
_UNBOUNDED_CONTEXT_TOKENS = 4096


class TransformersEngine:
    """One model, one thread, several requests in one batch."""

    def __init__(self, model: Any, tokenizer: Tokenizer, options: EngineOptions) -> None:
        from chaccu.engine.batching.batcher import Batcher

        trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _UNBOUNDED_CONTEXT_TOKENS
        self._info = EngineInfo(
            engine="transformers",
            context_tokens=min(options.context_tokens or trained, trained),
            slots=options.slots or (_SLOTS_ON_CPU if model.device.type == "cpu" else _SLOTS_ON_ACCELERATOR),
            device=str(model.device),
            abilities=_abilities(),
        )
        self._batcher: Batcher | None = Batcher(model, self._info.slots)
        self._eos_ids = _end_ids(model)
        self._words = Words(tokenizer, self._eos_ids)
        self._slots = asyncio.Semaphore(self._info.slots)
        self._waiting: deque[Task] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._loss: EngineLostError | None = None
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
        device = _pick_device()
        # Halves of bfloat16 have the range of float32, which some models need; processors are slow at them.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        try:
            tokenizer = Tokenizer.from_file(str(source.hf / "tokenizer.json"))
            model: Any = AutoModelForCausalLM.from_pretrained(source.hf, dtype=dtype)
        except Exception as error:  # tokenizers and transformers raise bare exceptions for whatever is wrong with the files
            raise EngineError(f"transformers cannot load {source.hf}: {error}", remedy="check the folder's files") from error
        return cls(model.to(device).eval(), tokenizer, options)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        limit = room_for_answer(request, self._info.context_tokens)
        async with self._slots:
            answer = Answer(request, limit, self._eos_ids | set(request.stop_ids), self._words)
            async with contextlib.aclosing(self._results(answer)) as deltas:
                async for delta in deltas:
                    yield delta
                    if delta.finish_reason is not None:
                        return

    async def load_adapter(self, adapter: AdapterSource) -> None:
        await self._change(lambda adapters: adapters.load(adapter))

    async def unload_adapter(self, name: str) -> None:
        await self._change(lambda adapters: adapters.unload(name))

    async def _change(self, work: Callable[[ModelAdapters], None]) -> None:
        async with contextlib.aclosing(self._results(AdapterChange(work))) as results:
            await anext(results)

    async def embed(self, inputs: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        check_inputs(inputs, self._info.context_tokens)
        if not inputs:
            return []
        async with self._slots, contextlib.aclosing(self._results(Embedding(inputs, adapter))) as results:
            vectors: list[list[float]] = await anext(results)
            return vectors

    async def _results(self, task: Task) -> AsyncGenerator[Any, None]:
        """What the thread sends for `task`, until the caller leaves. Raises what it failed of."""
        with self._wake:
            if self._closing:
                raise EngineError("the engine is closing.", remedy="ask another worker")
            self.check()
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

    def check(self) -> None:
        """Raise `EngineLostError` when the device has failed, or the thread."""
        if self._loss is not None:
            raise self._loss

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._batcher = None

    def _work(self) -> None:
        """The thread: round after round while there is work, until the engine closes."""
        batcher = self._batcher
        assert batcher is not None
        while True:
            with self._wake:
                while not batcher.tasks and not self._waiting and not self._closing:
                    self._wake.wait()
                for task in self._waiting:
                    batcher.add(task)
                self._waiting.clear()
                if self._closing:
                    break
            try:
                batcher.run_round()
            except Exception as error:  # a thread that is gone in silence would leave all waiting
                self._lose(error, batcher)
                return
        for task in batcher.tasks:
            task.send(EngineError("the engine closed while it generated.", remedy="ask again"))

    def _lose(self, error: Exception, batcher: Batcher) -> None:
        loss = error
        if not isinstance(loss, EngineLostError):
            loss = EngineLostError(f"the model's thread has failed: {type(error).__name__}: {error}.", needs_new_process=True)
        with self._wake:
            self._loss = loss
            left = [*batcher.tasks, *self._waiting]
        for task in left:
            task.send(loss)


def _pick_device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _end_ids(model: Any) -> set[int]:
    """Ids at which the model's own configuration ends an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return set()
    return {configured} if isinstance(configured, int) else set(configured)


def _abilities() -> tuple[Ability, ...]:
    always: tuple[Ability, ...] = ("penalties", "logit_bias", "embeddings", "token_ids")
    # llguidance keeps answers to schemas, and knows the bytes of each token.
    return (*always, "logprobs", "json_schema", "json_resumed") if can_read_schemas() else always
