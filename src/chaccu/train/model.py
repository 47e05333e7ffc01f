"""The model to train: loaded through transformers, with LoRA through peft, and the two halves the loss needs.

Invariants: a packed row's conversations do not see each other (positions restart and no cache or mask is given, so
transformers builds
the block mask from the positions); before the first step the split into body and projection is compared with the model's
own logits, so an architecture that does more in between is refused instead of trained wrongly.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch

from chaccu.errors import MissingDependencyError, TrainError
from chaccu.train.loss import summed_cross_entropy
from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe
from chaccu.train.token_rows import TokenRowPlan


def choose_precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The compute dtype: as the recipe says; `auto` is bf16 where the processor multiplies it natively, else fp32."""
    if recipe.precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


class TrainableModel:
    """A causal language model with its trained parameters.

    `full`: the module as loaded (or wrapped by peft); `parameters`: what the optimizer updates, in float32; `token_rows`: ids
    whose rows of embedding and projection are trained beside LoRA.
    """

    def __init__(self, recipe: Recipe, device: torch.device, rows: TokenRowPlan | None = None) -> None:
        """Load the recipe's model. `rows`: control tokens whose rows are to be trained where LoRA cannot reach them."""
        self.device = device
        self.dtype = choose_precision(recipe, device)
        torch.manual_seed(recipe.seed)
        causal = _load_causal_lm(recipe, torch.float32 if recipe.method == "full" else self.dtype)
        self._body = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        self.token_rows: list[int] = []
        if recipe.method == "lora":
            rows = rows or TokenRowPlan()
            self.token_rows = rows.choose(self._head.weight.detach())
            self.full = _add_lora(causal, recipe, self.token_rows)
            self._begin_rows(causal, rows.begin_at)
        else:
            self.full = causal
        self.full.to(device).train()
        self._softcap = float(getattr(causal.config, "final_logit_softcapping", None) or 0.0)
        self._causal = causal
        self.vocab_size = int(self._head.weight.shape[0])
        for parameter in self.full.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._rows: dict[str, torch.Tensor] = {}
        if self.token_rows:
            adapter = causal.get_output_embeddings().token_adapter
            self._rows = {
                "rows_KD": adapter.trainable_tokens_delta["default"],
                "ids_K": torch.tensor(self.token_rows, device=device),
            }
        self.parameters = [parameter for parameter in self.full.parameters() if parameter.requires_grad]
        self._check_halves()

    def row_loss(self, row: PackedRow) -> torch.Tensor:
        """Summed cross-entropy of a row's trained tokens, a float32 scalar on the device."""
        ids_1T = torch.tensor(row.ids_T, dtype=torch.long, device=self.device)[None]
        positions_1T = torch.tensor([row.positions_T], device=self.device)
        # Token t is predicted at t - 1; a conversation's first token (position 0) is predicted by nobody.
        trained_T = torch.tensor(row.mask_T, dtype=torch.bool, device=self.device) & (positions_1T[0] > 0)
        predicted = trained_T.nonzero().squeeze(1)
        with self.autocast():
            hidden_TD = self._body(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).last_hidden_state[0]
            hidden_TD = hidden_TD[predicted - 1].to(self.dtype)
        return summed_cross_entropy(hidden_TD, self._head.weight, ids_1T[0, predicted], softcap=self._softcap, **self._rows)

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
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @torch.no_grad()
    def _check_halves(self) -> None:
        self.full.eval()
        ids = (torch.arange(8, device=self.device) * 7 + 3) % self.vocab_size
        row = PackedRow(ids.tolist(), [1] * 8, [8])
        ours = float(self.row_loss(row))
        with self.autocast():
            logits_TV = self._causal(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        theirs = float(torch.nn.functional.cross_entropy(logits_TV, ids[1:], reduction="sum"))
        self.full.train()
        if abs(ours - theirs) > 0.02 * abs(theirs):
            raise TrainError(
                f"{type(self._causal).__name__} does more between its body and its logits than Chaccu knows: "
                f"the loss of eight tokens is {ours:.4f} by parts and {theirs:.4f} by the model.",
                remedy="use another base model",
            )


def _load_causal_lm(recipe: Recipe, dtype: torch.dtype) -> Any:
    import transformers

    if recipe.model.startswith((".", "/", "~")) and not Path(recipe.model).expanduser().exists():
        raise TrainError(f"there is no model at {recipe.model}.", remedy="check the path, or name a Hugging Face hub id")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(recipe.model, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot load the model {recipe.model!r}: {error}") from error


def _add_lora(causal: Any, recipe: Recipe, token_rows: list[int]) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", extra="train", needed_for="method: lora") from error
    options = recipe.lora
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    # peft ties the rows of both by itself where the weights are tied.
    ends = [embedding] if embedding.weight is head.weight else [embedding, head]
    names = {module: name.rpartition(".")[2] for name, module in causal.named_modules() if module in ends}
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        trainable_token_indices={names[module]: token_rows for module in ends} if token_rows else None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # Between two libraries: peft asks transformers by the old name.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        adapted = peft.get_peft_model(causal, config)
    if isinstance(causal.get_output_embeddings(), peft.tuners.lora.LoraLayer):
        raise TrainError(
            "lora.target_modules takes in the output projection, which the fused loss reads as it is.",
            remedy="leave it out; lora.trainable_tokens trains single rows of it",
        )
    return adapted
