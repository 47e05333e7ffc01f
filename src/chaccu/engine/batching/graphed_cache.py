"""`GraphedCache`: the keys and values of the running answers on a CUDA device, and their common step as a CUDA graph.

To start a step's kernels one by one takes the processor several times as long as they run; a graph starts all at once. What it
does is fixed, so there is one for each number of rows and columns that is a power of two, made when it has been needed as often
as makes up for the making: row r's tokens are in its columns from 0 on, each step writes behind them, and a mask over the
columns hides the rest. Invariants: what lies in hidden columns is finite; buffers stay where they are until they are too small,
for graphs know their addresses; rows are dense, the last one fills a gap. Steps that cannot be made a graph run as they are.

It ignores sliding windows: models that have them are stepped with an `AlignedCache`. R = rows, H = key heads, C = columns,
D = a head's size, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from chaccu.engine.batching.aligned_cache import AlignedCache

_LEAST_COLUMNS = 256
# To make a graph takes some steps' time. Where answers come in one after another, most sizes are passed by in fewer.
_STEPS_BEFORE = 8
_ROUNDING = 0.05  # of the largest logit, in bfloat16
# Called with the adapter of each row, or None, and a model's inputs.
Forward = Callable[..., Any]
_log = logging.getLogger(__name__)


class GraphedCache(Cache):
    """Room for any number of rows; `lengths` has the tokens that each holds."""

    def __init__(self, layers: int, steps_before: int = _STEPS_BEFORE) -> None:
        """`steps_before`: that a size is run as it is, before it is made a graph."""
        self.lengths: list[int] = []
        self._steps_before = steps_before
        self._slotted = [_SlottedLayer() for _ in range(layers)]
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None
        self._captures = True
        super().__init__(layers=[*self._slotted])

    def join(self, other: AlignedCache, row: int, padding: int) -> None:
        """Add `row` of `other`, as `AlignedCache.join` does."""
        length = other.lengths[row] - padding
        kept = [other.row_of(layer, row, padding) for layer in range(len(self._slotted))]
        self._make_room(len(self.lengths) + 1, length + 1, kept[0])
        for layer, (keys_HCD, values_HCD) in zip(self._slotted, kept, strict=True):
            layer.keys[len(self.lengths), :, :length] = keys_HCD
            layer.values[len(self.lengths), :, :length] = values_HCD
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Take `row` out; the last row is in its place then."""
        last = self.lengths.pop()
        if row < len(self.lengths):
            for layer in self._slotted:
                for buffer_RHCD in (layer.keys, layer.values):
                    buffer_RHCD[row, :, :last] = buffer_RHCD[len(self.lengths), :, :last]
            self.lengths[row] = last

    def copy_row(self, row: int) -> AlignedCache:
        """A cache of `row` alone."""
        length = self.lengths[row]
        rows = [(layer.keys[row, :, :length], layer.values[row, :, :length]) for layer in self._slotted]
        return AlignedCache.of_row(rows, length)

    def step(self, forward: Forward, ids: Sequence[int], adapters: Sequence[str | None]) -> torch.Tensor:
        """Logits (R, V) behind one new token for each row, which the cache holds then. Where it fails nothing is changed. With
        adapters it is no graph: which rows name which differs from step to step."""
        rows = len(ids)
        keys = self._slotted[0].keys
        self._make_room(rows, max(self.lengths) + 1, (keys[0], keys[0]))
        key = (_power_of_two(rows), max(_LEAST_COLUMNS, _power_of_two(max(self.lengths) + 1)))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = _Graph(self, *key, device=keys.device)
        graph.set(ids, self.lengths)
        through = partial(forward, [*adapters, *[None] * (graph.rows - rows)])
        if any(adapters):
            logits_RV = graph.step(through)
        else:
            if self._captures and keys.is_cuda and graph.logits_RV is None and graph.steps >= self._steps_before:
                self._capture(graph, through)
            logits_RV = graph.run(through)
        logits_RV = logits_RV[:rows].float()
        self.lengths = [length + 1 for length in self.lengths]
        return logits_RV

    def forget_graphs(self) -> None:
        """They hold the model as it was."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, graph: _Graph, through: Forward) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph.capture(through, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # whatever a model does that a graph cannot hold
            self._captures = False
            _log.warning("steps are not made CUDA graphs, and so are slower: %s", str(error).partition("\n")[0])

    def _make_room(self, rows: int, columns: int, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Room for as many rows of as many columns, each a power of two."""
        keys = self._slotted[0].keys
        held = (0, 0) if keys is None else (keys.shape[0], keys.shape[2])
        if rows <= held[0] and columns <= held[1]:
            return
        size = (max(held[0], _power_of_two(rows)), max(held[1], _LEAST_COLUMNS, _power_of_two(columns)))
        self.forget_graphs()
        # The first at last: by its size it is told whether all have grown, where memory did not suffice before.
        for layer in reversed(self._slotted):
            layer.grow(*size, len(self.lengths), like)


class _SlottedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's buffers (R, H, C, D); a step sees the rows, columns and places that its graph has set."""

    keys: Any
    values: Any
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = 0
        self.rows_R: Any = None
        self.places_R: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: buffers are made where room is."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens (R, H, 1, D) at their places; returns all columns that the step may see."""
        self.keys[self.rows_R, :, self.places_R] = key_states[:, :, 0]
        self.values[self.rows_R, :, self.places_R] = value_states[:, :, 0]
        rows = len(self.rows_R)
        return self.keys[:rows, :, : self.columns], self.values[:rows, :, : self.columns]

    def grow(self, rows: int, columns: int, in_use: int, like: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Larger buffers with what those have now; `like`: keys and values (H, C, D) of a row."""
        for name, like_HCD in zip(("keys", "values"), like, strict=True):
            old = getattr(self, name)
            if old is not None and rows <= old.shape[0] and columns <= old.shape[2]:
                continue
            heads, _, width = like_HCD.shape if old is None else old.shape[1:]
            new = like_HCD.new_zeros((rows, heads, columns, width))
            if old is not None:
                new[:in_use, :, : old.shape[2]] = old[:in_use]
            setattr(self, name, new)
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns, 0

    def get_seq_length(self) -> int:
        return self.columns - 1

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The same by the name of former versions."""
        return self.get_max_length()


class _Graph:
    """A step of `rows` rows that sees `columns` columns. Rows beyond those in use hold one token each."""

    def __init__(self, cache: GraphedCache, rows: int, columns: int, device: torch.device) -> None:
        self.rows = rows
        self._cache = cache
        self._columns = columns
        self._inputs_2R = torch.zeros((2, rows), dtype=torch.long, device=device)  # ids, and the tokens that rows hold
        self._rows_R = torch.arange(rows, device=device)
        self._columns_C = torch.arange(columns, device=device)
        self._graph: Any = None
        self.steps = 0  # that were run without a graph
        self.logits_RV: torch.Tensor | None = None

    def set(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """What the next run reads."""
        unused = [0] * (self._inputs_2R.shape[1] - len(ids))
        self._inputs_2R.copy_(torch.tensor([[*ids, *unused], [*lengths, *unused]]))

    def capture(self, through: Forward, pool: Any) -> None:
        """Make the graph. The run before it lets kernels be chosen and loaded for the stream; to write a token twice does not
        matter. `torch.cuda.graph` would collect Python's garbage and empty the allocator first, which takes up to a second."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.step(through)
            stream.synchronize()
            # Other threads may use the device meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                logits_RV = self.step(through)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph, self.logits_RV = graph, logits_RV

    def run(self, through: Forward) -> torch.Tensor:
        """Logits (R, V), which the next run of any graph overwrites."""
        if self.logits_RV is None:
            self.steps += 1
            return self.step(through)
        self._graph.replay()
        return self.logits_RV

    def step(self, through: Forward) -> torch.Tensor:
        """Logits (R, V) of a step that is no graph."""
        ids_R, places_R = self._inputs_2R
        for layer in self._cache._slotted:
            layer.columns, layer.rows_R, layer.places_R = self._columns, self._rows_R, places_R
        seen_R11C = (self._columns_C <= places_R[:, None])[:, None, None]
        output = through(
            input_ids=ids_R[:, None],
            position_ids=places_R[:, None],
            attention_mask=seen_R11C,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_RV: torch.Tensor = output.logits[:, -1]
        return logits_RV


@torch.inference_mode()
def suits(model: Any, layers: int) -> bool:
    """Whether steps with this cache give what the model gives by itself, as they are and, on a CUDA device, out of a graph: not
    all models take such a mask, and a graph that reads what it should not is silent about it."""
    ids = list(range(1, 13))
    begun, cache = AlignedCache((None,) * layers, 1), GraphedCache(layers, steps_before=1)
    held = len(ids) - 4
    try:
        ids_1T = torch.tensor([ids], device=model.device)
        begun.place(ids_1T[:, :held])
        model(input_ids=ids_1T[:, :held], past_key_values=begun, use_cache=True, logits_to_keep=1)
        begun.commit(held)
        cache.join(begun, 0, 0)
        # The first is run as it is, the second and those after it out of a graph.
        stepped_TV = torch.stack(
            [cache.step(lambda _, **inputs: model(**inputs), [token], [None])[0].clone() for token in ids[held:]]
        )
        whole_TV = model(input_ids=ids_1T, use_cache=False).logits[0, held:].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with a mask that it does not know
        _log.info("steps are not made CUDA graphs: %s", str(error).partition("\n")[0])
        return False
    return bool(((stepped_TV - whole_TV).abs().amax(1) <= _ROUNDING * whole_TV.abs().amax(1)).all())


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
