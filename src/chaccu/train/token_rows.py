"""Token rows: the vectors of control tokens that LoRA cannot reach.

A base model has rows in its embedding for tokens it never saw, such as the end of a turn. They are nearly one vector, so
whatever LoRA does to the hidden state, the projection gives all of them one score, and the model never learns to stop. The
rows of such tokens are trained themselves, as peft's trainable tokens; every other row stays as it is. The token that ends a
reply begins at the row of the base's own end of text, which the base already predicts where a text could end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import torch

from chaccu.conversation import Encoded, TextTokenizer
from chaccu.errors import RecipeError, TrainError, did_you_mean
from chaccu.train.pack import TokenSequence
from chaccu.train.recipe import LoraOptions

# Rows of seen tokens have neighbours at a cosine of 0.3 to 0.65 in Gemma 3; those of unused ones lie above 0.99.
_INDISTINCT_COSINE = 0.95


class TokenRowPlan(msgspec.Struct, frozen=True):
    """`candidates`: ids whose rows may be trained; `always`: whether they are, even where the base tells them from others.
    `begin_at`: for some of them, the id whose row theirs begins at. `left_out`: control tokens that replies generate, with
    their texts, which are not among the candidates."""

    candidates: tuple[int, ...] = ()
    always: bool = False
    begin_at: dict[int, int] = {}
    left_out: dict[int, str] = {}

    def choose(self, weight_VD: torch.Tensor) -> list[int]:
        """The ids whose rows are trained, given the base's projection.

        Raises `TrainError` when one of `left_out` has a row that the base cannot tell from another.
        """
        if unlearnable := indistinct_tokens(weight_VD, self.left_out):
            texts = ", ".join(f"{self.left_out[token]!r} (token {token})" for token in unlearnable)
            raise TrainError(
                f"replies generate {texts}, whose row in the base points where another token's does (cosine above "
                f"{_INDISTINCT_COSINE}): LoRA cannot tell them apart, and lora.trainable_tokens leaves the row untrained.",
                remedy="set lora.trainable_tokens: auto, or name them in the list too",
            )
        return list(self.candidates) if self.always else indistinct_tokens(weight_VD, self.candidates)


def plan_token_rows(options: LoraOptions, encoded: Sequence[Encoded | TokenSequence], tokenizer: TextTokenizer) -> TokenRowPlan:
    """The tokens that the recipe names, or with `auto` every control token that a reply generates.

    Raises `RecipeError` for a name that is not a token.
    """
    generated = {token for row in encoded for token, trained in zip(row.ids, row.mask, strict=True) if trained}
    generated &= tokenizer.control_ids
    if options.trainable_tokens == "auto":
        candidates = sorted(generated)
    else:
        candidates = sorted(_find_token(text, tokenizer) for text in options.trainable_tokens)
    end_of_text = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token else None
    ends = {
        row.ids[place]
        for row in encoded
        for place, bit in enumerate(row.mask)
        if bit and not any(row.mask[place + 1 : place + 2])
    }
    begin_at = {} if end_of_text is None else {token: end_of_text for token in candidates if token in ends - {end_of_text}}
    left_out = {token: tokenizer.token_text(token) for token in sorted(generated.difference(candidates))}
    return TokenRowPlan(tuple(candidates), options.trainable_tokens != "auto", begin_at, left_out)


def _find_token(text: str, tokenizer: TextTokenizer) -> int:
    token_id = tokenizer.token_id(text)
    if token_id is None:
        raise RecipeError(
            f"lora.trainable_tokens names {text!r}, which the tokenizer does not have.",
            remedy=did_you_mean(text, tokenizer.control_tokens),
        )
    return token_id


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
