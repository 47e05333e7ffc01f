"""Token rows: the vectors of control tokens that LoRA cannot reach.

A base model has rows in its embedding for tokens it never saw, such as the end of a turn. They are nearly one vector, so
whatever LoRA does to the hidden state, the projection gives all of them one score, and the model never learns to stop. The
rows of such tokens are trained themselves, as peft's trainable tokens; every other row stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from chaccu.conversation import Encoded, TextTokenizer
from chaccu.errors import RecipeError, did_you_mean
from chaccu.train.recipe import LoraOptions

# Rows of trained tokens have neighbours at a cosine of 0.3 to 0.65 in Gemma 3; those of unused ones lie above 0.99.
_INDISTINCT_COSINE = 0.95


def candidate_tokens(options: LoraOptions, encoded: Iterable[Encoded], tokenizer: TextTokenizer) -> list[int]:
    """Ids whose rows may be trained: those the recipe names, or with `auto` every control token that a reply generates.

    Raises `RecipeError` for a name that is not a token.
    """
    if options.trainable_tokens == "auto":
        generated = {token for row in encoded for token, trained in zip(row.ids, row.mask, strict=True) if trained}
        return sorted(generated & tokenizer.control_ids)
    ids = {text: tokenizer.token_id(text) for text in options.trainable_tokens}
    for text, token_id in ids.items():
        if token_id is None:
            raise RecipeError(
                f"lora.trainable_tokens names {text!r}, which the tokenizer does not have.",
                remedy=did_you_mean(text, tokenizer.control_tokens),
            )
    return sorted(token_id for token_id in ids.values() if token_id is not None)


def indistinct_tokens(weight_VD: torch.Tensor, ids: Iterable[int]) -> list[int]:
    """Those of `ids` whose row points where another row points, so that the projection cannot tell the two apart."""
    norms_V = weight_VD.norm(dim=1).float().clamp_min(1e-12)
    found = []
    for token in ids:
        cosine_V = (weight_VD @ weight_VD[token]).float() / (norms_V * norms_V[token])
        cosine_V[token] = -1.0
        if float(cosine_V.max()) > _INDISTINCT_COSINE:
            found.append(token)
    return found
