"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) added to a model through peft, which names, saves and loads them."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from chaccu.errors import MissingDependencyError, TrainError
from chaccu.train.adapter_targets import check_targets
from chaccu.train.nf4 import packed_layers
from chaccu.train.recipe import Recipe


def add_lora(causal: Any, recipe: Recipe, token_rows: list[int]) -> Any:
    """`causal` wrapped by peft with the recipe's adapters, and `token_rows` of embedding and projection trained beside them.

    Raises `MissingDependencyError`, `RecipeError` where a target is no layer of the model, and `TrainError` where the adapters
    would reach into the output projection.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", extra="train", needed_for="method: lora") from error
    from chaccu.train.adapted_linear import adopt_adapters

    options = recipe.lora
    check_targets(causal, options.target_modules)
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
    adopt_adapters(adapted)
    if recipe.compile:
        _begin_gradients(adapted)
    # An adapter of a Conv1D that was packed is, for whoever loads it on the base, one of a Conv1D.
    config.fan_in_fan_out |= any(layer.from_conv1d for layer in packed_layers(causal))
    if isinstance(causal.get_output_embeddings(), peft.tuners.lora.LoraLayer):
        raise TrainError(
            "lora.target_modules takes in the output projection, which the fused loss reads as it is.",
            remedy="leave it out; lora.trainable_tokens trains single rows of it",
        )
    return adapted


def _begin_gradients(model: Any) -> None:
    """Let what the embedding gives ask for a gradient, as what each layer gives does: else the first layer would be compiled as
    one of another kind. It costs the gradient by the input of that layer's first products."""

    def ask(module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.requires_grad_() if torch.is_grad_enabled() else embedded

    model.get_input_embeddings().register_forward_hook(ask)
