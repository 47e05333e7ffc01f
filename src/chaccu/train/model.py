"""The model to train: loaded through transformers, with LoRA through peft, and the two halves the loss needs.

Invariants: a packed row's conversations do not see each other (attention is told where each ends; for models that it does not
serve, positions restart and no cache or mask is given, so transformers builds the block mask from the positions); before the
first step the split into body and projection is compared with the model's own logits, so an architecture that does more in
between is refused instead of trained wrongly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from chaccu.errors import TrainError
from chaccu.train.attention import (
    ATTENTION,
    PackedLengths,
    attends_at_once,
    check_dropout,
    describe_attention,
    forget_lengths,
    pack_lengths,
    register_attention,
)
from chaccu.train.base_model import find_base
from chaccu.train.float8 import check_float8
from chaccu.train.layers import count_that_fit
from chaccu.train.lora import add_lora
from chaccu.train.loss import summed_cross_entropy
from chaccu.train.nf4 import adopt_packed_layers, describe_packing, loading_options
from chaccu.train.optim import optimizer_bytes
from chaccu.train.pack import PackedRow, pad_row
from chaccu.train.parallel import apply_parallel, bind_loss, build_mesh, count_transient_bytes, gather_weights
from chaccu.train.positions import load_config
from chaccu.train.processes import ALONE, Processes
from chaccu.train.recipe import Recipe, why_not_fp16
from chaccu.train.shards import local
from chaccu.train.token_rows import TokenRowPlan

# Of a GPU's free memory: the rest is lost between its blocks.
_USABLE = 0.98


def choose_precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The compute dtype: as the recipe says; `auto` is bf16 where the processor multiplies it natively or the optimizer keeps
    weights in nothing else, else fp16 on a GPU if the weights that are trained stay float32, else fp32. With fp8, whose
    products are inside the layers, what they give is bf16."""
    if recipe.precision != "auto":
        named = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return named[recipe.precision]
    if recipe.optimizer == "adamw_bf16_sr":
        return torch.bfloat16
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32 if why_not_fp16(recipe) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def weights_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The dtype in which the model is loaded."""
    return torch.float32 if recipe.keeps_masters else choose_precision(recipe, device)


def check_device(recipe: Recipe, config: Any, device: torch.device) -> None:
    """Raise `TrainError` for what the recipe asks of a device, or of a model of that `config`, that it has not."""
    if recipe.precision == "fp8":
        check_float8(device)
    if not recipe.compile:
        return
    dtype = choose_precision(recipe, device)
    if choose_attention(config) != ATTENTION or not attends_at_once(device, dtype):
        raise TrainError(
            "compile: true needs a GPU from Ampere on, 16-bit precision and a model without soft caps; this is "
            f"{config.model_type} in {str(dtype).removeprefix('torch.')} on {device.type}.",
            remedy="set compile: false",
        )
    check_dropout(config)


class RowTensors(NamedTuple):
    """A packed row of T tokens on the device; P of them are trained: `labels_P`, predicted by the hidden states at
    `places_P`. Of a row that does not `count` the loss is 0."""

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    places_P: torch.Tensor
    labels_P: torch.Tensor
    packed: PackedLengths | None
    counts: bool


class TrainableModel:
    """A causal language model with its trained parameters.

    `full`: the module as loaded (or wrapped by peft); `parameters`: what the optimizer updates; `token_rows`: ids whose rows of
    embedding and projection are trained beside LoRA; `config_changes`: what `rope_scaling` changed in the base's config;
    `packing`: how the base lies in 4 bits, None where it does not.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        rows: TokenRowPlan | None = None,
        *,
        causal: Any = None,
        processes: Processes = ALONE,
    ) -> None:
        """Load the recipe's model, or take `causal`. `rows`: control tokens whose rows are to be trained where LoRA cannot
        reach them. `processes`: who else holds a shard of it."""
        self.device = device
        self.processes = processes
        self._sum_losses: Callable[[RowTensors], torch.Tensor] = self._sum_losses_here
        self.dtype = choose_precision(recipe, device)
        torch.manual_seed(recipe.seed)
        mesh = build_mesh(processes)
        with processes.in_turns(_loads_at_once(recipe, processes) if causal is None else processes.local_count):
            causal = self._load(recipe, rows, causal)
            if processes.count == 1:
                self._check_halves()
            self.checkpoints = apply_parallel(causal, recipe, self.dtype, mesh, device)
        self._sum_losses = bind_loss(causal, self._sum_losses_here)
        self.parameters = [parameter for parameter in self.full.parameters() if parameter.requires_grad]
        if processes.count > 1:
            # Only in shards does the model have to fit the device; sixteen tokens are not worth compiling for.
            with torch.compiler.set_stance("force_eager"):
                self._check_halves()
            # What is drawn from here on differs between the processes, as their rows do.
            torch.manual_seed(recipe.seed + processes.rank)

    def _load(self, recipe: Recipe, rows: TokenRowPlan | None, causal: Any) -> Any:
        """The transformers model, as it is trained; sets what the loss needs to know of it."""
        device = self.device
        self.config_changes: dict[str, Any] = {}
        if causal is None:
            base = find_base(recipe.model)
            config, self.config_changes = load_config(base, recipe)
            check_device(recipe, config, device)
            packed_on = device if recipe.method == "qlora" else None
            causal = load_causal_lm(base, weights_dtype(recipe, device), config, packed_on=packed_on)
        else:
            check_device(recipe, causal.config, device)
        self._body = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        self.token_rows: list[int] = []
        if recipe.trains_adapter:
            rows = rows or TokenRowPlan()
            self.token_rows = rows.choose(self._head.weight.detach())
            self.full = add_lora(causal, recipe, self.token_rows)
            self._begin_rows(causal, rows.begin_at)
        else:
            self.full = causal
        # To be sharded, a model stays in the processor's memory: a device may not have room for all of it. Packed, it has.
        waits = self.processes.count > 1 and recipe.method != "qlora"
        self.full.to("cpu" if waits else device).train()
        self._softcap = float(getattr(causal.config, "final_logit_softcapping", None) or 0.0)
        self._causal = causal
        self.vocab_size = int(self._head.weight.shape[0])
        self._longest = recipe.sequence_len
        self._tells_lengths = causal.config._attn_implementation == ATTENTION
        self._row_len = recipe.row_len if recipe.compile else None
        if recipe.trains_adapter:
            for parameter in self.full.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        # Weights that are gathered come in the computation's precision.
        self._autocasts = self.processes.count == 1 and any(
            one.dtype != self.dtype for one in self.full.parameters() if one.is_floating_point()
        )
        self.packing = describe_packing(causal)
        self._ids_K = torch.tensor(self.token_rows, device=device) if self.token_rows else None
        return causal

    @property
    def causal(self) -> Any:
        """The transformers model itself, adapters in it."""
        return self._causal

    def prepare_row(self, row: PackedRow) -> RowTensors:
        """`row` on the device, copied while the device goes on with what it has.

        All is put together on the processor: to ask the device for a count would wait for everything that it still does.
        """
        if self._row_len is not None:
            row = pad_row(row, self._row_len, self._longest)
        ids_T = torch.from_numpy(np.asarray(row.ids_T, dtype=np.int64))
        starts = np.cumsum([0, *row.lengths[:-1]])
        positions_T = torch.from_numpy(np.arange(len(ids_T)) - np.repeat(starts, row.lengths))
        # Token t is predicted at t - 1; a conversation's first token (position 0) is predicted by nobody.
        trained_T = torch.from_numpy(np.asarray(row.mask_T, dtype=np.bool_)) & (positions_T > 0)
        predicted_P = trained_T.nonzero().squeeze(1)
        packed = None
        if self._tells_lengths:
            packed = pack_lengths(row.lengths, self._longest)
            packed = packed._replace(starts_N=self._send(packed.starts_N))
            packed = forget_lengths(packed) if self._row_len is not None else packed
        ids_1T, positions_1T, places_P, labels_P = map(
            self._send, (ids_T[None], positions_T[None], predicted_P - 1, ids_T[predicted_P])
        )
        return RowTensors(ids_1T, positions_1T, places_P, labels_P, packed, row.counts)

    def row_loss(self, row: PackedRow | RowTensors) -> torch.Tensor:
        """Summed cross-entropy of a row's trained tokens, a float32 scalar on the device."""
        return self._sum_losses(row if isinstance(row, RowTensors) else self.prepare_row(row))

    def _sum_losses_here(self, ready: RowTensors) -> torch.Tensor:
        told = {} if ready.packed is None else {"packed": ready.packed}
        with self.autocast():
            output = self._body(input_ids=ready.ids_1T, position_ids=ready.positions_1T, use_cache=False, **told)
            hidden_PD = output.last_hidden_state[0][ready.places_P].to(self.dtype)
        rows_KD = None
        if self.token_rows:
            rows_KD = self._causal.get_output_embeddings().token_adapter.trainable_tokens_delta["default"]
        loss = summed_cross_entropy(
            hidden_PD, self._head.weight, ready.labels_P, rows_KD=rows_KD, ids_K=self._ids_K, softcap=self._softcap
        )
        return loss if ready.counts else loss * 0

    def gather_weights(self, *, dtype: torch.dtype | None = None, trained_only: bool = False) -> dict[str, torch.Tensor] | None:
        """As `parallel.gather_weights`: what `full.save_pretrained` takes as `state_dict`."""
        return gather_weights(self.full, dtype=dtype, trained_only=trained_only)

    def describe_attention(self) -> str:
        """Which kernels attend, for people to read."""
        return describe_attention(self._causal.config, self.device, self.dtype)

    def fit_memory(self, recipe: Recipe) -> None:
        """With `activation_checkpointing: selective` on a GPU, let as few layers recompute as the memory allows.

        Measured on a full row of one conversation after another: what it keeps when all layers recompute, and what one that
        does not adds. Call it before the first step and before an optimizer holds memory.
        """
        if self.checkpoints is None or recipe.activation_checkpointing != "selective" or self.device.type != "cuda":
            return
        row = pad_row(PackedRow([1] * 8, [1] * 8, [8]), recipe.row_len, recipe.sequence_len)
        row = PackedRow(row.ids_T, [1] * recipe.row_len, row.lengths)
        held = []
        size = len(self.checkpoints)
        for count in (size, size, size - 1):
            self.checkpoints.spread(count)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = self.row_loss(row)
            held.append((torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before))
            del loss
        trained = sum(local(parameter).numel() * parameter.element_size() for parameter in self.parameters)
        moments = optimizer_bytes(recipe, self.parameters)
        fixed = torch.cuda.memory_allocated() + moments + (0 if recipe.optimizer_in_backward else trained) + max(held[1])
        fixed += count_transient_bytes(self._causal)
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fit = count_that_fit(int(free * _USABLE), fixed, held[2][0] - held[1][0], size)
        self.checkpoints.spread(size - self.processes.least(fit))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @torch.no_grad()
    def _begin_rows(self, causal: Any, begin_at: dict[int, int]) -> None:
        """Set the trained rows of `begin_at`'s keys to the base's rows of its values, in embedding and projection."""
        for wrapper in (causal.get_input_embeddings(), causal.get_output_embeddings()) if self.token_rows else ():
            adapter = wrapper.token_adapter
            for place, token in enumerate(self.token_rows):
                if token in begin_at:
                    adapter.trainable_tokens_delta["default"][place] = adapter.base_layer.weight[begin_at[token]]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the forward pass; nothing in float32."""
        if not self._autocasts:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @torch.no_grad()
    def _check_halves(self) -> None:
        self.full.eval()
        # As many as products in float8 want.
        ids = (torch.arange(16, device=self.device) * 7 + 3) % self.vocab_size
        ours = float(self.row_loss(PackedRow(ids.tolist(), [1] * 16, [16])))
        with self.autocast():
            logits_TV = self._causal(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        theirs = float(torch.nn.functional.cross_entropy(logits_TV, ids[1:], reduction="sum"))
        self.full.train()
        if not math.isfinite(theirs):
            precision = str(self.dtype).removeprefix("torch.")
            raise TrainError(
                f"{type(self._causal).__name__} loses {theirs} on sixteen tokens in {precision} before any training.",
                remedy="its weights are damaged, or reach beyond float16: set precision: bf16 or fp32",
            )
        if abs(ours - theirs) > 0.02 * abs(theirs):
            raise TrainError(
                f"{type(self._causal).__name__} does more between its body and its logits than Chaccu knows: "
                f"the loss of sixteen tokens is {ours:.4f} by parts and {theirs:.4f} by the model.",
                remedy="use another base model",
            )


def _loads_at_once(recipe: Recipe, processes: Processes) -> int:
    """How many processes of this machine may hold the whole model in its memory at once, on the way to their shards."""
    if processes.count == 1:
        return 1
    # Twice: 16 bits in the file may become 32.
    size = 2 * sum(file.stat().st_size for file in find_base(recipe.model).glob("*.safetensors"))
    fit = int(0.9 * psutil.virtual_memory().available / max(1, size))
    return processes.least(max(1, min(fit, processes.local_count)))


def load_causal_lm(base: Path, dtype: torch.dtype, config: Any, *, packed_on: torch.device | None = None) -> Any:
    """The model in the folder `base` through transformers, its attention ours where that knows all that the model asks of it.
    `config`: what `load_config` gives.

    `packed_on`: a device on which each linear weight is packed into 4 bits as it is read.

    Raises `TrainError` when it cannot be loaded.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        options = {} if packed_on is None else loading_options(config, dtype, packed_on)
        causal = transformers.AutoModelForCausalLM.from_pretrained(
            base, config=config, dtype=dtype, attn_implementation=choose_attention(config), **options
        )
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot load the model {str(base)!r}: {error}") from error
    if packed_on is not None:
        adopt_packed_layers(causal)
    return causal


def choose_attention(config: Any) -> str:
    """Our attention, or transformers' own for a model with soft caps on its attention: only `eager` applies them."""
    text = config.get_text_config()
    return "eager" if getattr(text, "attn_logit_softcapping", None) else register_attention()
