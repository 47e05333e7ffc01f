"""`AlignedCache`: the keys and values of several sequences in one batch, their newest tokens in the same column.

Shorter sequences have empty columns before them, as left-padded prompts have; a mask over the columns says which. So a model
that transformers can give left-padded prompts can be stepped in a batch, sliding windows included, and its masks stay its own.
Invariants: a step takes effect by `commit` alone, so one that failed in any layer can be given again; what lies in empty
columns is finite, for a masked value is still multiplied, by nought; rows are dense, the last one fills a gap.

It ignores which request a row belongs to. R = rows, H = key heads, C = columns, D = a head's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_COLUMN_STEP = 64
_GROWTH = 1.25


class AlignedCache(Cache):
    """Room for up to `max_rows` sequences; `lengths` has the tokens that each row holds."""

    def __init__(self, windows: tuple[int | None, ...], max_rows: int) -> None:
        self.lengths: list[int] = []
        self._empty_R: torch.Tensor | None = None
        self._windows = windows
        self._aligned = [_AlignedLayer(window, max_rows) for window in windows]
        super().__init__(layers=[*self._aligned])

    @property
    def width(self) -> int:
        """Columns from the longest row's first token to the newest."""
        return max(self.lengths, default=0)

    def place(self, ids_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions of new tokens in their sequences, and the mask over the columns with them; None: no column is empty."""
        rows, tokens = ids_RT.shape
        if not self.lengths:
            self._begin(rows)
        if self._empty_R is None:
            self._empty_R = torch.tensor([self.width - length for length in self.lengths], device=ids_RT.device)
        columns_C = torch.arange(self.width + tokens, device=ids_RT.device)
        positions_RT = columns_C[None, self.width :] - self._empty_R[:, None]
        if min(self.lengths) == self.width:
            return positions_RT, None
        return positions_RT, (columns_C[None] >= self._empty_R[:, None]).long()

    def commit(self, tokens: int) -> None:
        """Keep the `tokens` columns that the last forward pass has written."""
        for layer in self._aligned:
            layer.commit(tokens)
        self.lengths = [length + tokens for length in self.lengths]

    def join(self, other: AlignedCache, row: int = 0, padding: int = 0) -> None:
        """Add `row` of `other` below those here, without its last `padding` tokens, which it may have only where all were
        written in one pass. Nothing is changed where memory does not suffice."""
        length = other.lengths[row] - padding
        width = max(self.width, length)
        for layer, added in zip(self._aligned, other._aligned, strict=True):
            layer.make_room(layer.rows + 1, layer.bounded(width), 0, added.keys, added.values)
        for layer, added in zip(self._aligned, other._aligned, strict=True):
            layer.join(added, row, padding, width)
        self.lengths.append(length)
        self._empty_R = None

    def leave(self, row: int) -> None:
        """Take `row` out; the last row is in its place then."""
        last = self.lengths.pop()
        if row < len(self.lengths):
            self.lengths[row] = last
        for layer in self._aligned:
            layer.leave(row, self.width)
        self._empty_R = None

    @classmethod
    def of_row(cls, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> AlignedCache:
        """A cache with one row of `length` tokens: copies of each layer's keys and values (H, C, D), none with a window."""
        alone = cls((None,) * len(layers), 1)
        alone.lengths = [length]
        for layer, (keys_HCD, values_HCD) in zip(alone._aligned, layers, strict=True):
            layer.fill(keys_HCD[None].clone(), values_HCD[None].clone(), length)
        return alone

    def row_of(self, layer: int, row: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (H, C, D) that a layer without a window holds of `row`, but for the last `padding` tokens."""
        held = self._aligned[layer]
        used = slice(held._end - self.lengths[row], held._end - padding)
        return held.keys[row, :, used], held.values[row, :, used]

    def copy_row(self, row: int) -> AlignedCache:
        """A cache of `row` alone."""
        alone = AlignedCache(self._windows, 1)
        alone.lengths = [self.lengths[row]]
        for layer, copied in zip(self._aligned, alone._aligned, strict=True):
            copied.take(layer, row, self.lengths[row])
        return alone

    def _begin(self, rows: int) -> None:
        self.lengths = [0] * rows
        for layer in self._aligned:
            layer.rows = rows


class _AlignedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: buffers of which columns [end - kept, end) of the first `rows` rows are in use.

    A layer with a window keeps `window - 1` columns, all that a new token sees besides itself.
    """

    keys: Any  # buffers of R rows or more; None before they are needed
    values: Any

    def __init__(self, window: int | None, max_rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = 0
        self.is_sliding = window is not None
        self._window = window
        self._max_rows = max_rows
        self._width = 0  # of the whole sequences, also where fewer columns are kept
        self._end = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: buffers are made where room is."""

    def bounded(self, width: int) -> int:
        """How many of `width` columns this layer keeps."""
        return width if self._window is None else min(width, self._window - 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns (R, H, C, D) behind those in use; returns all that the new tokens may see. `commit` keeps them."""
        new, kept = key_states.shape[2], self.bounded(self._width)
        self.make_room(self.rows, kept, new, key_states, value_states)
        self.keys[: self.rows, :, self._end : self._end + new] = key_states
        self.values[: self.rows, :, self._end : self._end + new] = value_states
        seen = slice(self._end - kept, self._end + new)
        return self.keys[: self.rows, :, seen], self.values[: self.rows, :, seen]

    def commit(self, tokens: int) -> None:
        self._end += tokens
        self._width += tokens

    def make_room(self, rows: int, kept: int, new: int, keys_RHCD: torch.Tensor, values_RHCD: torch.Tensor) -> None:
        """Room for `rows` rows, `kept` columns before the end and `new` ones behind it; first buffers are like the tensors."""
        held = 0
        if self.is_initialized:
            keys_RHCD, values_RHCD = self.keys, self.values
            held = keys_RHCD.shape[0]
            if rows <= held and kept <= self._end and self._end + new <= keys_RHCD.shape[2]:
                return
        grown = held if rows <= held else max(rows, min(self._max_rows, 2 * rows))
        columns = _round_up(int((kept + new) * _GROWTH))
        keys, values = _empty(keys_RHCD, grown, columns), _empty(values_RHCD, grown, columns)
        in_use = self.bounded(self._width)
        if held and in_use:
            old, place = slice(self._end - in_use, self._end), slice(kept - in_use, kept)
            keys[: self.rows, :, place] = keys_RHCD[: self.rows, :, old]
            values[: self.rows, :, place] = values_RHCD[: self.rows, :, old]
        self.keys, self.values, self._end, self.is_initialized = keys, values, kept, True

    def join(self, added: _AlignedLayer, row: int, padding: int, width: int) -> None:
        kept = added.bounded(added._width - padding)
        end = added._end - padding
        old = slice(end - kept, end)
        place = slice(self._end - kept, self._end)
        self.keys[self.rows, :, place] = added.keys[row, :, old]
        self.values[self.rows, :, place] = added.values[row, :, old]
        self.rows += 1
        self._width = width

    def leave(self, row: int, width: int) -> None:
        self.rows -= 1
        if not self.rows:
            self.keys = self.values = None
            self.is_initialized = False
            self._width = self._end = 0
            return
        if row < self.rows:
            used = slice(self._end - self.bounded(self._width), self._end)
            self.keys[row, :, used] = self.keys[self.rows, :, used]
            self.values[row, :, used] = self.values[self.rows, :, used]
        self._width = width

    def take(self, layer: _AlignedLayer, row: int, length: int) -> None:
        """Become a copy of `row` of `layer`, which holds `length` tokens."""
        used = slice(layer._end - layer.bounded(length), layer._end)
        self.fill(layer.keys[row : row + 1, :, used].clone(), layer.values[row : row + 1, :, used].clone(), length)

    def fill(self, keys_1HCD: torch.Tensor, values_1HCD: torch.Tensor, length: int) -> None:
        """Have one row with these columns, the last ones of a sequence of `length` tokens."""
        self.keys, self.values = keys_1HCD, values_1HCD
        self.rows, self._width, self._end, self.is_initialized = 1, length, keys_1HCD.shape[2], True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.bounded(self._width)
        return kept + query_length, self._width - kept

    def get_seq_length(self) -> int:
        return self._width

    def get_max_length(self) -> int:
        return -1 if self._window is None else self._window

    def get_max_cache_shape(self) -> int:
        """The same by the name of former versions."""
        return self.get_max_length()


def find_windows(config: PreTrainedConfig) -> tuple[int | None, ...] | None:
    """Each layer's sliding window, in tokens (None: it sees all); None for a model that keeps anything but keys and values.

    What a layer keeps is taken from the cache that transformers itself would make.
    """
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return tuple(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers)


def _empty(like_RHCD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return like_RHCD.new_zeros((rows, like_RHCD.shape[1], columns, like_RHCD.shape[3]))


def _round_up(columns: int) -> int:
    return -(-columns // _COLUMN_STEP) * _COLUMN_STEP
