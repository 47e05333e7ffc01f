"""`Batcher`: rounds of work on one model, in which the steps of all running answers are one.

In a round adapters are changed and new prompts are read, a chunk of them for about `_READING_S`, so that a long one holds up
the others for no longer; then each running answer gets one token, all by one pass of the model, whichever adapter each names;
then one input is embedded. Prompts of about one length are read in one pass, for few tokens take an accelerator as long as
many. An answer joins the batch when its prompt is read, and leaves it with its last token or in the round after it was
cancelled. Models that keep more than keys and values (state spaces, linear attention) are stepped answer by answer.

Invariants: what an answer says does not depend on the others but for the rounding of sums; one that fails leaves the others as
they are; where memory does not suffice, the newest answer fails. It ignores texts, and who waits for the answers.
R = rows, one an answer; T = tokens; V = vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch

from chaccu.engine.batching.aligned_cache import AlignedCache, find_windows
from chaccu.engine.batching.graphed_cache import GraphedCache, suits
from chaccu.engine.batching.model_adapters import ModelAdapters
from chaccu.engine.batching.tasks import AdapterChange, Answer, Embedding, Task, deliver
from chaccu.engine.protocol import EngineLostError
from chaccu.engine.token_choice import Choice, choose_tokens
from chaccu.errors import ChaccuError, EngineError

_READING_S = 0.25
_FIRST_CHUNK_TOKENS = 128
_LEAST_CHUNK_TOKENS = 16
_LARGEST_CHUNK_TOKENS = 4096
_PADDED = 1.25


class Batcher:
    """Everything is called by one thread. `clock` in seconds. `graphed`: whether to keep running answers as CUDA graphs need
    them; None: on a CUDA device, where there can be graphs. `adapters`: those that answers may name."""

    def __init__(
        self, model: Any, max_rows: int, clock: Callable[[], float] = time.monotonic, *, graphed: bool | None = None
    ) -> None:
        self.adapters = ModelAdapters(model)
        self._model = model
        # A model looks through its weights for it at each asking.
        self._device: torch.device = model.device
        self._max_rows = max_rows
        self._clock = clock
        self._windows = _joinable_windows(model)
        self._graphed: GraphedCache | None = None
        if (self._device.type == "cuda" if graphed is None else graphed) and _can_be_graphed(model, self._windows):
            self._graphed = GraphedCache(len(self._windows or ()))
        self._takes_positions = "position_ids" in signature(model.forward).parameters
        self._chunk_tokens = _FIRST_CHUNK_TOKENS
        self._reading: list[_Group] = []
        self._oldest_first = False
        self._running: list[_Group] = []
        self._embeddings: deque[Embedding] = deque()
        self._changes: deque[AdapterChange] = deque()

    @property
    def is_joint(self) -> bool:
        """Whether answers can be stepped in one batch."""
        return self._windows is not None

    @property
    def tasks(self) -> list[Task]:
        """All that is not done."""
        answers = [answer for group in [*self._reading, *self._running] for answer in group.answers]
        return [*answers, *self._embeddings, *self._changes]

    def add(self, task: Task) -> None:
        if isinstance(task, Embedding):
            self._embeddings.append(task)
        elif isinstance(task, AdapterChange):
            self._changes.append(task)
        elif isinstance(task, Answer):
            self._reading.append(_Group([task], self._new_cache(1)))

    @torch.inference_mode()
    def run_round(self) -> None:
        """One round. What is wrong with one task ends this task; raises `EngineLostError` when the device is lost."""
        self._leave_cancelled()
        while self._changes:
            self._change(self._changes.popleft())
        self._read()
        for group in list(self._running):
            self._step(group)
        self._running = [group for group in self._running if group.answers]
        if self._embeddings:
            self._embed(self._embeddings.popleft())

    def _leave_cancelled(self) -> None:
        self._reading = [group for group in self._reading if not group.answers[0].cancelled]
        for group in self._running:
            group.keep([not answer.cancelled for answer in group.answers])
        self._running = [group for group in self._running if group.answers]
        self._embeddings = deque(task for task in self._embeddings if not task.cancelled)

    def _read(self) -> None:
        """Read a chunk of the prompts: in one round the oldest first, in the next the shortest, so neither waits for long."""
        budget = self._chunk_tokens
        self._oldest_first = not self._oldest_first
        while budget > 0 and self._reading:
            ordered = sorted(self._reading, key=_age if self._oldest_first else _unread)
            together = self._choose_together(ordered, budget)
            read = self._read_together(together) if len(together) > 1 else self._read_chunk(together[0], budget)
            budget -= read

    def _choose_together(self, ordered: Sequence[_Group], budget: int) -> list[_Group]:
        """The first, and those that one pass can read with it from their beginnings to their ends, with little padding."""
        chosen = [ordered[0]]
        longest = tokens = _unread(ordered[0])
        if not self._reads_whole(ordered[0]):
            return chosen
        for group in ordered[1:]:
            wider, more = max(longest, _unread(group)), tokens + _unread(group)
            padded = wider * (len(chosen) + 1)
            if self._reads_whole(group) and padded <= min(budget, _PADDED * more):
                chosen.append(group)
                longest, tokens = wider, more
        return chosen

    def _reads_whole(self, group: _Group) -> bool:
        """Whether nothing of a prompt is read yet, and it can be read with others: it has a token besides the last."""
        return self.is_joint and not group.cache.lengths and _unread(group) > 1

    def _read_together(self, groups: Sequence[_Group]) -> int:
        """Read whole prompts in one pass but for their last tokens, which the running answers' next step reads; returns how
        many tokens that took, padding included. Where it fails each is read by itself.

        Padding is behind the prompts: what comes later changes nothing before it, so the pass needs no mask.
        """
        answers = [group.answers[0] for group in groups]
        longest = max(map(_unread, groups)) - 1
        padding = [longest - (len(answer.unread) - 1) for answer in answers]
        together = _Group(answers, self._new_cache(len(answers)))
        began_s = self._clock()
        try:
            for answer in answers:
                answer.chooser(self._device)
            ids = [answer.unread[:-1] + [0] * behind for answer, behind in zip(answers, padding, strict=True)]
            _wait_for(self._forward(together, ids))
            failed = False
        except Exception:  # whatever it is will be met again by the answer that it belongs to
            failed = True
        if failed:  # not in the block above, which holds what the pass has in memory
            del together
            return sum(self._read_chunk(group, _unread(group)) for group in groups)
        for answer in answers:
            answer.unread = answer.unread[-1:]
        self._join(self._begin_running(), together, padding)
        self._reading = [group for group in self._reading if group not in groups]
        self._pace(longest * len(groups), self._clock() - began_s)
        return longest * len(groups)

    def _read_chunk(self, group: _Group, budget: int) -> int:
        """Read what `budget` allows of one prompt; returns how many tokens."""
        answer = group.answers[0]
        # States of other kinds go on from more than one token in few models: their prompts are read at once.
        chunk = answer.unread[: budget if self.is_joint else None]
        began_s = self._clock()
        try:
            answer.chooser(self._device)
            logits_1V = self._forward(group, [chunk])
        except Exception as error:  # whatever the model raises must reach the answer that met it, not end the thread
            self._fail(answer, error)
            self._reading.remove(group)
        else:
            if len(chunk) < len(answer.unread):
                answer.unread = answer.unread[len(chunk) :]
                _wait_for(logits_1V)
            else:
                self._end_reading(group, logits_1V)
                self._reading.remove(group)
        self._pace(len(chunk), self._clock() - began_s)
        return len(chunk)

    def _pace(self, tokens: int, took_s: float) -> None:
        """Fit the chunk to the time that reading one took; small ones say little, for a pass has a cost of its own."""
        if 2 * tokens >= self._chunk_tokens:
            fitting = int(tokens * _READING_S / max(took_s, 1e-6))
            self._chunk_tokens = max(_LEAST_CHUNK_TOKENS, min(fitting, 2 * self._chunk_tokens, _LARGEST_CHUNK_TOKENS))

    def _end_reading(self, group: _Group, logits_1V: torch.Tensor) -> None:
        """Choose the first token of an answer whose prompt is read, and let it run with the others."""
        try:
            self._choose(group, logits_1V)
        except Exception as error:  # as above
            self._fail(group.answers[0], error)
            return
        if self.is_joint:
            self._join(self._begin_running(), group)
        else:
            self._running += [group] * len(group.answers)

    def _begin_running(self) -> _Group:
        """Those that are stepped together."""
        if not self._running:
            self._running.append(_Group([], self._graphed or self._new_cache(self._max_rows)))
        return self._running[0]

    def _join(self, running: _Group, group: _Group, padding: Sequence[int] = ()) -> None:
        """Let the answers of `group` run too, without the `padding` tokens at the ends of their rows."""
        for row, answer in enumerate(group.answers):
            try:
                running.cache.join(group.cache, row, padding[row] if padding else 0)
                running.answers.append(answer)
            except Exception as error:  # no memory for it
                self._fail(answer, error)

    def _step(self, group: _Group) -> None:
        """One token for each answer of `group`."""
        while group.answers:
            try:
                logits_RV = self._forward(group, [answer.unread for answer in group.answers])
                break
            except Exception as error:  # as above
                if len(group.answers) == 1 or _is_out_of_memory(error):
                    newest = max(group.answers, key=lambda answer: answer.number)
                    self._fail(newest, error)
                    group.keep([answer is not newest for answer in group.answers])
                else:
                    self._step_apart(group)
                    return
        if group.answers:
            self._choose(group, logits_RV)

    def _step_apart(self, group: _Group) -> None:
        """Step each answer alone, after a step of all has failed: the one at fault fails, the others go on together."""
        apart = [_Group([answer], group.cache.copy_row(row)) for row, answer in enumerate(group.answers)]
        group.keep([False] * len(apart))
        for alone in apart:
            self._step(alone)
        for alone in apart:
            self._join(group, alone)

    def _choose(self, group: _Group, logits_RV: torch.Tensor) -> None:
        answers = list(group.answers)
        choices = choose_tokens([answer.chooser(self._device) for answer in answers], logits_RV)
        group.keep([self._take(answer, choice) for answer, choice in zip(answers, choices, strict=True)])
        deliver(answers)

    def _take(self, answer: Answer, choice: Choice | Exception) -> bool:
        try:
            if isinstance(choice, Exception):
                raise choice
            return answer.take(*choice)
        except Exception as error:  # as above
            self._fail(answer, error)
            return False

    def _forward(self, group: _Group, ids: Sequence[list[int]]) -> torch.Tensor:
        """Logits behind the last of `ids`, which are as many for each row; the cache holds them then."""
        if isinstance(group.cache, GraphedCache):
            names = [answer.request.adapter for answer in group.answers]
            return group.cache.step(self.adapters.forward, [one for (one,) in ids], names)
        ids_RT = torch.tensor(ids, device=self._device)
        inputs: dict[str, Any] = {}
        if isinstance(group.cache, AlignedCache):
            positions_RT, mask_RT = group.cache.place(ids_RT)
            # Without empty columns a model's own reckoning is right, and its masks are cheaper.
            if mask_RT is not None:
                inputs["attention_mask"] = mask_RT
                if self._takes_positions:
                    inputs["position_ids"] = positions_RT
        inputs |= {"input_ids": ids_RT, "past_key_values": group.cache, "use_cache": True, "logits_to_keep": 1}
        output = self.adapters.forward([answer.request.adapter for answer in group.answers], **inputs)
        if isinstance(group.cache, AlignedCache):
            group.cache.commit(ids_RT.shape[1])
        else:
            group.cache = output.past_key_values
        logits_RV: torch.Tensor = output.logits[:, -1].float()
        return logits_RV

    def _new_cache(self, rows: int) -> Any:
        return None if self._windows is None else AlignedCache(self._windows, rows)

    def _embed(self, task: Embedding) -> None:
        try:
            with self.adapters.through(task.adapter):
                is_unfinished = task.step(self._model)
            if is_unfinished:
                self._embeddings.append(task)
        except Exception as error:  # as above
            self._fail(task, error)

    # Not in inference mode: peft's parameters are to be ordinary tensors.
    @torch.inference_mode(False)
    def _change(self, task: AdapterChange) -> None:
        try:
            task.run(self.adapters)
            if self._graphed is not None:
                self._graphed.forget_graphs()
        except Exception as error:  # as above
            self._fail(task, error)

    def _fail(self, task: Task, error: Exception) -> None:
        """Let `task` end with `error`. Raises `EngineLostError` for one that is the end of all."""
        if isinstance(error, EngineLostError):
            raise error
        # No kernel runs in this process after such an error.
        if isinstance(error, torch.AcceleratorError) and not _is_out_of_memory(error):
            raise EngineLostError(f"{self._device} has failed: {_first_line(error)}.", needs_new_process=True) from error
        if _is_out_of_memory(error):
            others = sum(other is not task for other in self.tasks)
            error = EngineError(
                f"out of memory on {self._device}: this request did not fit beside {others} others.",
                remedy="fewer --slots, or a smaller --context-tokens",
            )
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        elif not isinstance(error, ChaccuError):
            error = EngineError(f"transformers failed: {type(error).__name__}: {error}")
        task.send(error)


class _Group:
    """Answers that are stepped together, with the cache that has a row for each; one alone may have any kind of cache."""

    def __init__(self, answers: list[Answer], cache: Any) -> None:
        self.answers = answers
        self.cache = cache

    def keep(self, wanted: Sequence[bool]) -> None:
        """Let those rows leave that are not `wanted`."""
        for row in [row for row, stays in enumerate(wanted) if not stays][::-1]:
            last = self.answers.pop()
            if row < len(self.answers):
                self.answers[row] = last
            if isinstance(self.cache, (AlignedCache, GraphedCache)):
                self.cache.leave(row)


def _age(group: _Group) -> int:
    return group.answers[0].number


def _unread(group: _Group) -> int:
    return len(group.answers[0].unread)


def _joinable_windows(model: Any) -> tuple[int | None, ...] | None:
    return find_windows(model.config) if "attention_mask" in signature(model.forward).parameters else None


def _can_be_graphed(model: Any, windows: tuple[int | None, ...] | None) -> bool:
    """Whether a step can be told its positions and its mask, the same for all layers."""
    if windows is None or any(windows) or "position_ids" not in signature(model.forward).parameters:
        return False
    return model.config._attn_implementation == "sdpa" and suits(model, len(windows))


def _wait_for(logits_1V: torch.Tensor) -> None:
    """Until the device has done what it was given: else its time is not known, and chunks would pile up."""
    logits_1V[0, 0].item()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_out_of_memory(error: Exception) -> bool:
    told = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in told or "can't allocate memory" in told
    )
