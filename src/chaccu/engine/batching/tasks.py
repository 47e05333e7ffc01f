"""What the model's thread works on: `Answer`, a token at a time, `Embedding`, an input at a time, and `AdapterChange`.

Tasks are made on the event loop and worked on by one thread. Invariant: `sent` gets all that a task has to say, in order; a
`ChaccuError` is its last word. They ignore which tasks run beside them, and the model's cache.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from chaccu.engine.deltas import DeltaBuilder
from chaccu.engine.protocol import GenerationDelta, GenerationRequest, TokenLogprob
from chaccu.engine.token_choice import TokenChooser

if TYPE_CHECKING:
    import torch
    from llguidance import LLTokenizer

    from chaccu.engine.batching.model_adapters import ModelAdapters


_numbers = itertools.count()


class Task:
    """`number` grows from task to task; `cancelled` is set by the event loop when nobody waits any more; `sent` holds what came
    from the thread.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.cancelled = False
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self._said: list[Any] = []
        self._loop = asyncio.get_running_loop()

    def say(self, item: Any) -> None:
        """Have `item` sent by the next `deliver`; a `ChaccuError` is raised where it arrives."""
        self._said.append(item)

    def send(self, item: Any) -> None:
        """Give `item` to the event loop at once, behind what was said."""
        self.say(item)
        deliver([self])

    def take_said(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any], list[Any]]:
        """What was said since the last time, and where it goes."""
        said, self._said = self._said, []
        return self._loop, self.sent, said


def deliver(tasks: Iterable[Task]) -> None:
    """Send what tasks have said. A loop is woken once for all: each wake costs as much as a token's text, and has the threads
    change places."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], list[Any]]]] = {}
    for task in tasks:
        loop, queue, said = task.take_said()
        if said:
            loops.setdefault(loop, []).append((queue, said))
    for loop, parcels in loops.items():
        loop.call_soon_threadsafe(_put, parcels)


def _put(parcels: list[tuple[asyncio.Queue[Any], list[Any]]]) -> None:
    for queue, said in parcels:
        for item in said:
            queue.put_nowait(item)


class Answer(Task):
    """One answer. `unread`: ids that the model has not seen: of the prompt at first, then the newest token."""

    def __init__(self, request: GenerationRequest, limit: int, end_ids: set[int], words: Words) -> None:
        super().__init__()
        self.request = request
        self.unread = request.prompt_ids + request.reply_ids
        self._limit = limit
        self._end_ids = end_ids
        self._words = words
        # Begun with the reply so far: a first token would lose its leading space, which a later one keeps.
        self._decoder = DecodeStream(ids=request.reply_ids, skip_special_tokens=True)
        self._builder = DeltaBuilder(request)
        self._chooser: TokenChooser | None = None

    def chooser(self, device: torch.device) -> TokenChooser:
        """Made in the thread: a schema takes a while to read."""
        if self._chooser is None:
            self._chooser = TokenChooser(self.request, device, self._words.for_grammars, self._end_ids)
        return self._chooser

    def take(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Say what `token` adds to the answer; returns whether the answer goes on."""
        self.unread = [token]
        delta = self._add(token, logprob)
        if delta is not None:
            self.say(delta)
        return delta is None or delta.finish_reason is None

    def _add(self, token: int, logprob: TokenLogprob | None) -> GenerationDelta | None:
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
            self.say(delta)
        return builder.end("stop" if complete else "length")


class Embedding(Task):
    """Vectors of some inputs: the mean of the last hidden states over an input's tokens, scaled to length 1. `adapter`: the one
    to go through, or None."""

    def __init__(self, inputs: list[list[int]], adapter: str | None = None) -> None:
        super().__init__()
        self.adapter = adapter
        self._inputs = inputs
        self._vectors: list[list[float]] = []

    def step(self, model: Any) -> bool:
        """Make the next input's vector; returns whether there are more."""
        import torch

        ids_1T = torch.tensor([self._inputs[len(self._vectors)]], device=model.device)
        hidden_TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0].float()
        self._vectors.append(torch.nn.functional.normalize(hidden_TD.mean(0), dim=0).tolist())
        if len(self._vectors) < len(self._inputs):
            return True
        self.send(self._vectors)
        return False


class AdapterChange(Task):
    """An adapter that is loaded or unloaded: `work` is done in the thread, between two steps of the answers."""

    def __init__(self, work: Callable[[ModelAdapters], None]) -> None:
        super().__init__()
        self._work = work

    def run(self, adapters: ModelAdapters) -> None:
        """Do it, and say so."""
        self._work(adapters)
        self.send(None)


class Words:
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
