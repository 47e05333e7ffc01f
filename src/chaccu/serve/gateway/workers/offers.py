"""`refuse_offer`: what a gateway does not take from a worker.

A pure policy, asked when a worker joins, when it offers something else, and before it is told to load an adapter. Invariant: a
worker with a key serves only the models that the key is bound to. It ignores who else serves a model.
"""

from __future__ import annotations

from chaccu.serve.gateway.access.keys import Key
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.link import MAX_PRIORITY, MAX_WEIGHT, ModelOffer, Refused

_MAX_NAME_CHARS = 200


def refuse_offer(offer: ModelOffer, config: GatewayConfig, key: Key | None) -> Refused | None:
    """Why the gateway does not take `offer` from a worker that joined with `key`; None: it does."""
    refusal = refuse_name(offer.name, config, key)
    if refusal is not None:
        return refusal
    if offer.slots < 1 or offer.context_tokens < 1:
        return Refused(f"it offers {offer.slots} slots of {offer.context_tokens} tokens.", "both must be 1 or more")
    if not 0 < offer.weight <= MAX_WEIGHT or abs(offer.priority) > MAX_PRIORITY:
        return Refused(
            f"it has the weight {offer.weight:g} and the priority {offer.priority}.",
            f"--weight above 0, up to {MAX_WEIGHT:g}; --priority within {MAX_PRIORITY} of 0",
        )
    return None


def refuse_name(name: str, config: GatewayConfig, key: Key | None) -> Refused | None:
    """The same for the name alone."""
    if name in {upstream.name for upstream in config.upstreams}:
        return Refused(f"the gateway already serves {name!r} from an upstream.", "--name another name")
    if key is not None and not key.may_use(name):
        return Refused(
            f"its key {key.id} is not for {name!r:.200}.", f"--name {key.models[0]}, or a key that is bound to this model"
        )
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME_CHARS:
        return Refused("a model's name must have 1 to 200 printable characters.", "--name another name")
    return None
