"""`check_abilities`: what no worker of a model can do is refused before one is asked.

Invariant: while no worker is joined nothing is refused; the wait for one decides. It ignores which worker will answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chaccu.serve.gateway.errors import ApiError, bad_request
from chaccu.serve.link import Generate, ModelOffer

# What parameters ask for that all engines have in another form.
_SAID = {"prompt": "a prompt of token ids"}


def check_abilities(request: Generate, offers: Sequence[ModelOffer]) -> None:
    """Raise `ApiError` when none of the `offers` of the request's model can answer it: for a parameter that is not carried
    out, or for a biased token that there is not.
    """
    needs = request.needs()
    check_needs(needs, offers)
    sizes = [offer.vocab_size for offer in offers if offer.vocab_size]
    unknown = [token for token in request.sampling.logit_bias if sizes and token >= max(sizes)]
    if unknown:
        message = f"logit_bias of token {unknown[0]}: the vocabulary of {request.model!r} has {max(sizes):,} tokens, from 0."
        raise bad_request(message, code="invalid_value", param="logit_bias")


def check_needs(needs: Mapping[str, str], offers: Sequence[ModelOffer]) -> None:
    """Raise `ApiError` when none of `offers` has all the abilities that `needs` names, each with what asks for it."""
    lacks = [[needs[ability] for ability in needs if ability not in offer.abilities] for offer in offers]
    if lacks and all(lacks):
        raise not_carried_out(min(lacks, key=len)[0], offers)


def not_carried_out(parameter: str, offers: Sequence[ModelOffer]) -> ApiError:
    """The engines of a model do not do what `parameter` asks for (400)."""
    engines = " and ".join(sorted({offer.engine for offer in offers}))
    asked = _SAID.get(parameter, parameter)
    message = f"{asked} is not carried out by the engine {engines} of {offers[0].name!r}."
    return bad_request(message, code="unsupported_parameter", param=parameter)
