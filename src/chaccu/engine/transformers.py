"""The transformers engine: any causal language model of Hugging Face, on a CPU or a CUDA device.

One thread owns the model. It gives each running request one token in turn (each has its own key-value cache), so requests share
the device fairly and a cancelled one costs at most the step it is in. Invariants: nothing but that thread touches the model;
each request samples from its own random generator, so a seed repeats whatever runs beside it.

It ignores batching: steps of different requests are not joined into one.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from chaccu.engine.model_source import ModelSource
from chaccu.engine.protocol import (
    EngineInfo,
    EngineOptions,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    Usage,
    room_for_answer,
)
from chaccu.engine.stops import StopScanner
from chaccu.errors import ChaccuError, EngineError, MissingDependencyError

if TYPE_CHECKING:
    import torch

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
        )
        self._model = model
        self._tokenizer = tokenizer
        self._eos_ids = _end_ids(model)
        self._slots = asyncio.Semaphore(self._info.slots)
        self._waiting: deque[_Run] = deque()
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
            run = _Run(request, limit, self._eos_ids | set(request.stop_ids), self._tokenizer)
            with self._wake:
                if self._closing:
                    raise EngineError("the engine is closing.", remedy="ask another worker")
                self._waiting.append(run)
                self._wake.notify()
            try:
                while True:
                    delta = await run.deltas.get()
                    if isinstance(delta, ChaccuError):
                        raise delta
                    yield delta
                    if delta.finish_reason is not None:
                        return
            finally:
                run.cancelled = True

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._model = None

    def _work(self) -> None:
        """The thread: one step for each running request, round after round, until the engine closes."""
        running: list[_Run] = []
        while True:
            with self._wake:
                while not running and not self._waiting and not self._closing:
                    self._wake.wait()
                running.extend(self._waiting)
                self._waiting.clear()
                if self._closing:
                    break
            running = [run for run in running if not run.cancelled and self._step(run)]
        for run in running:
            run.send(EngineError("the engine closed while it generated.", remedy="ask again"))

    def _step(self, run: _Run) -> bool:
        """Generate one token of `run`; returns whether it goes on."""
        import torch

        try:
            with torch.inference_mode():
                return run.take(run.next_token(self._model))
        except Exception as error:  # whatever the model raises must reach the request that met it, not end the thread
            run.send(
                error
                if isinstance(error, ChaccuError)
                else EngineError(f"transformers failed: {type(error).__name__}: {error}")
            )
            return False


class _Run:
    """One request while it is generated. Made on the event loop; stepped by the model's thread."""

    def __init__(self, request: GenerationRequest, limit: int, end_ids: set[int], tokenizer: Tokenizer) -> None:
        self.request = request
        self.cancelled = False
        self.deltas: asyncio.Queue[GenerationDelta | ChaccuError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._end_ids = end_ids
        self._tokenizer = tokenizer
        # Begun with the reply so far: a first token would lose its leading space, which a later one keeps.
        self._decoder = DecodeStream(ids=request.reply_ids, skip_special_tokens=True)
        self._scanner = StopScanner(request.stop)
        self._ids = request.prompt_ids + request.reply_ids
        self._cache: Any = None
        self._sampler: _Sampler | None = None
        self._made = 0
        self._counted = 0

    def next_token(self, model: Any) -> int:
        """Run the model over the ids it has not seen and choose the next token."""
        import torch

        if self._sampler is None:
            self._sampler = _Sampler(self.request, model.device)
        ids_1T = torch.tensor([self._ids], device=model.device)
        output = model(input_ids=ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        token = self._sampler.choose(output.logits[:, -1].float())
        self._ids = [token]
        return token

    def take(self, token: int) -> bool:
        """Send what `token` adds to the text; returns whether the answer goes on."""
        self._made += 1
        if token in self._end_ids:
            self._finish(self._scanner.flush(), "stop")
            return False
        text, stopped = self._scanner.push(self._decoder.step(self._tokenizer, token) or "")
        if stopped:
            self._finish(text, "stop")
            return False
        if self._made == self._limit:
            self._finish(text + self._scanner.flush(), "length")
            return False
        if text:
            self.send(GenerationDelta(text=text, tokens=self._made - self._counted))
            self._counted = self._made
        return True

    def send(self, item: GenerationDelta | ChaccuError) -> None:
        self._loop.call_soon_threadsafe(self.deltas.put_nowait, item)

    def _finish(self, text: str, reason: FinishReason) -> None:
        usage = Usage(len(self.request.prompt_ids), self._made)
        self.send(
            GenerationDelta(
                text=text,
                tokens=self._made - self._counted,
                finish_reason=reason,
                usage=usage,
                stopped_by=self._scanner.stopped_by,
            )
        )


class _Sampler:
    """Chooses a token from logits: greedy at temperature 0, else temperature, then top_k, top_p and min_p."""

    def __init__(self, request: GenerationRequest, device: torch.device) -> None:
        import torch
        from transformers.generation import logits_process

        self._greedy = request.temperature == 0
        self._generator = torch.Generator(device=device)
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed % 2**63)
        self._warpers: Any = logits_process.LogitsProcessorList()
        if not self._greedy and request.temperature != 1:
            self._warpers.append(logits_process.TemperatureLogitsWarper(request.temperature))
        if request.top_k > 0:
            self._warpers.append(logits_process.TopKLogitsWarper(request.top_k))
        if request.top_p < 1:
            self._warpers.append(logits_process.TopPLogitsWarper(request.top_p))
        if request.min_p > 0:
            self._warpers.append(logits_process.MinPLogitsWarper(request.min_p))

    def choose(self, logits_1V: torch.Tensor) -> int:
        import torch

        if self._greedy:
            return int(logits_1V.argmax())
        no_ids_10 = torch.empty((1, 0), dtype=torch.long)  # none of these warpers looks at the text so far
        scores_1V = self._warpers(no_ids_10, logits_1V)
        return int(torch.multinomial(torch.softmax(scores_1V, -1), 1, generator=self._generator))


def _end_ids(model: Any) -> set[int]:
    """Ids at which the model's own configuration ends an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return set()
    return {configured} if isinstance(configured, int) else set(configured)
