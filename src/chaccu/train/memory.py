"""How much memory a run needs on one device, by formula, and which changes of its recipe would need less.

Weights, gradients and moments follow from their number and the recipe. Activations are those of a LLaMA-like layer: so many
bytes for each token and each channel of its width D, its keys G (heads of keys times their width) and its feed-forward part F.
Uncompiled, the counts in `_KEPT` are what autograd keeps, found by looking at its saved tensors (a test does). Compiled by
PyTorch, a layer keeps its input, queries, keys, values, what attention gives, and three tensors of the feed-forward part; the
count for D and the share that `lean` compilation keeps are fitted to nine measured runs of 1.1 B to 13 B weights on an H100
(benchmarks/results/train-h100.json), which the estimate meets within 1.5 %.

Free of torch, so that a plan can be made anywhere. Ignored: the libraries' own memory (0.5 to 1 GB on a GPU), what the
allocator loses between blocks, mixtures of experts, feed-forward parts without a gate (their activations are estimated high).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from chaccu.errors import RecipeError
from chaccu.train.recipe import Recipe, parse_recipe

# Bytes that an uncompiled layer keeps for a token: for each of D, G, F. By the bytes of a weight, those of a number in the
# computation, and whether an adapter is trained on frozen weights.
_KEPT = {
    (2, 2, False): (22, 4, 8),
    (4, 2, False): (32, 4, 8),
    (4, 4, False): (36, 8, 16),
    (2, 2, True): (18, 4, 8),
    (4, 4, True): (28, 8, 16),
}
# The same of a compiled layer, in 16 bits; float32 weights make the two residuals of a layer float32.
_COMPILED, _COMPILED_MIXED, _LEAN_SHARE = (11.5, 4, 6), (15.5, 4, 6), 0.72
# For each of D: the last norm, the hidden states that are predicted from and their gradient.
_ENDS = 14
# The logits of a chunk and their derivatives in 16 bits: see `loss`.
_LOSS_BYTES = 512 * 2**20
# What each optimizer holds a weight, beside the weight (in 8 bits: with two scales of 4 bytes for a block of 256); and for the
# time of an update.
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "adamw_bf16_sr": 4.0, "adafactor": 0.0}
_ADAMW_UPDATE_BYTES = 4.0
# For each weight of the largest tensor, which is updated as a whole: float32 copies of weight and gradient, and what Adafactor
# makes of them.
ADAFACTOR_UPDATE_BYTES = 20
# NormalFloat4 with double quantisation: Dettmers et al. 2023, arXiv:2305.14314.
_NF4_BYTES = 4.127 / 8


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the formulas need of a model. `width`: D; `key_width`: G; `inner_width`: F. `linear_weights`: of the linear layers
    inside the decoder layers, `linear_ends` the sum of their inputs and outputs (an adapter of rank r has r times as many
    weights); `other_weights`: embedding, projection (once, where they are tied), norms, biases."""

    layers: int
    width: int
    key_width: int
    inner_width: int
    vocabulary: int
    linear_weights: int
    linear_ends: int
    other_weights: int

    @property
    def weights(self) -> int:
        """All of them."""
        return self.linear_weights + self.other_weights


class MemoryEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one device. `weight_bytes` has in it the 16-bit copies of float32 weights that the forward pass makes.
    `activation_bytes`: what all layers keep for the backward pass; `working_bytes`: the loss, or the one layer whose gradients
    are being computed; `update_bytes`: what an update needs while no activations are there."""

    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    activation_bytes: int
    working_bytes: int
    update_bytes: int
    keeps_gradients: bool

    @property
    def peak_bytes(self) -> int:
        """The most at any moment: gradients come as activations go, unless they are there from an earlier row."""
        backward = self.activation_bytes + self.working_bytes
        backward = backward + self.gradient_bytes if self.keeps_gradients else max(backward, self.gradient_bytes)
        return self.weight_bytes + self.moment_bytes + max(backward, self.gradient_bytes + self.update_bytes)


class Advice(NamedTuple):
    """Keys of the recipe to change, the peak after it by the same estimate, and the bytes that it saves."""

    changes: dict[str, Any]
    peak_bytes: int
    saves_bytes: int


def estimate_memory(
    recipe: Recipe, shape: ModelShape, *, half: bool = True, recomputed_layers: int | None = None
) -> MemoryEstimate:
    """The memory of the recipe's run on each of its processes. Weights, gradients and moments are divided among processes, and
    a layer's weights gathered when it runs (FSDP2); weights in 4 bits are whole on each.

    `half`: whether the computation is in 16 bits where the recipe's precision is `auto`. `recomputed_layers`: how many forget
    their activations; by default what the recipe says, `selective` counted as all, which is where it ends when memory is short.
    """
    half = recipe.precision != "fp32" and (recipe.precision != "auto" or half)
    adapter = recipe.trains_adapter
    masters = recipe.keeps_masters
    size = 2 if half else 4
    trained = recipe.lora.rank * shape.linear_ends if adapter else shape.weights
    held: float = shape.weights * (4 if masters else size)
    packed = shape.linear_weights * _NF4_BYTES if recipe.method == "qlora" else 0.0
    if packed:
        held = shape.other_weights * size
    copies = shape.weights * 2 if masters and half else 0
    gathered = 0.0
    if recipe.processes > 1:
        gathered = shape.other_weights * size + (0 if packed else 2 * shape.linear_weights * size / shape.layers)
    gradient_size = 4 if adapter or masters else size
    accumulates = recipe.gradient_accumulation_steps > 1
    if recipe.optimizer_in_backward:
        # Summed in 8 bits until the last row of a step.
        gradient_size = 1 if accumulates else 0
    kept, working = _activation_bytes(recipe, shape, half=half, masters=masters, recomputed=recomputed_layers)
    own = trained * (4 if adapter else 0)
    return MemoryEstimate(
        weight_bytes=int((held + own) / recipe.processes + packed + (gathered or copies)),
        gradient_bytes=int(trained * gradient_size / recipe.processes),
        moment_bytes=int(trained * MOMENT_BYTES[recipe.optimizer] / recipe.processes),
        activation_bytes=int(kept),
        working_bytes=int(working),
        update_bytes=int(_update_bytes(recipe, shape, trained) / recipe.processes),
        keeps_gradients=accumulates,
    )


def _update_bytes(recipe: Recipe, shape: ModelShape, trained: int) -> float:
    if recipe.optimizer == "adafactor":
        return ADAFACTOR_UPDATE_BYTES * min(trained, shape.vocabulary * shape.width)
    return _ADAMW_UPDATE_BYTES * trained if recipe.optimizer == "adamw" else 0.0


def _activation_bytes(
    recipe: Recipe, shape: ModelShape, *, half: bool, masters: bool, recomputed: int | None
) -> tuple[float, float]:
    """What the layers keep of a row, and the larger of the loss and one layer's backward pass."""
    adapter = recipe.trains_adapter
    if recipe.compile and half:
        factors: tuple[float, int, int] = _COMPILED_MIXED if masters else _COMPILED
    else:
        factors = _KEPT[4 if masters or not half else 2, 2 if half else 4, adapter]
    channels = (shape.width, shape.key_width, shape.inner_width)
    layer = sum(factor * size for factor, size in zip(factors, channels, strict=True))
    checkpoints = recipe.activation_checkpointing != "none"
    if recipe.compile and checkpoints:
        layer *= _LEAN_SHARE
    size = 2 if half else 4
    recomputed = (shape.layers if checkpoints else 0) if recomputed is None else recomputed
    entry = shape.width * (4 if masters else size)
    # One of those that recompute keeps all for the time of its own backward pass.
    kept = (shape.layers - recomputed) * layer + recomputed * entry + (layer if recomputed else 0)
    backward = (6 * shape.inner_width + 8 * shape.width) * size / 2 * recipe.row_len
    head = 0 if adapter else 6 * shape.vocabulary * shape.width
    logits = min(_LOSS_BYTES, recipe.row_len * shape.vocabulary * 4) * size / 2
    return (kept + _ENDS * shape.width * size / 2) * recipe.row_len, max(backward, logits + head)


def advise(recipe: Recipe, shape: ModelShape, device_bytes: int, *, half: bool = True) -> list[Advice]:
    """Changes that this recipe allows and that save memory, each by itself: first those that change only how the run is
    computed, then those that change what is trained. Rows are shortened just so far that they fit `device_bytes`, where that is
    enough. Last, where no single one of the first kind is enough, several of them that are together."""
    before = estimate_memory(recipe, shape, half=half).peak_bytes
    found = []
    for changes in [_shorter_rows(recipe, shape, device_bytes, half=half), *_candidates(recipe)]:
        changed = _changed(recipe, changes)
        if changed is None or changed == recipe:
            continue
        peak = estimate_memory(changed, shape, half=half).peak_bytes
        if peak < before:
            found.append(Advice(changes, peak, before - peak))
    computing = [advice for advice in found if "method" not in advice.changes and "sequence_len" not in advice.changes]
    if all(advice.peak_bytes > device_bytes for advice in computing):
        found += _together(recipe, [advice.changes for advice in computing], shape, device_bytes, half=half)
    return found


def _together(
    recipe: Recipe, several: list[dict[str, Any]], shape: ModelShape, device_bytes: int, *, half: bool
) -> list[Advice]:
    """`several` one on top of another, the first one last, as many as it takes to fit; none where all are not enough."""
    before = estimate_memory(recipe, shape, half=half).peak_bytes
    changes: dict[str, Any] = {}
    for number, more in enumerate(several[1:] + several[:1]):
        changes = {**changes, **more}
        changed = _changed(recipe, changes)
        if changed is None:
            continue
        peak = estimate_memory(changed, shape, half=half).peak_bytes
        if number and peak <= device_bytes:
            return [Advice(changes, peak, before - peak)]
    return []


def _candidates(recipe: Recipe) -> list[dict[str, Any]]:
    candidates: list[dict[str, Any]] = []
    if recipe.activation_checkpointing == "none":
        candidates += [{"activation_checkpointing": kind} for kind in ("selective", "full")]
    if recipe.method == "full":
        candidates += [{"optimizer": "adamw_8bit"}, {"optimizer": "adamw_8bit", "optimizer_in_backward": True}]
        candidates += [{"method": method, "optimizer": "adamw", "optimizer_in_backward": False} for method in ("lora", "qlora")]
    if recipe.method == "lora":
        candidates += [{"method": "qlora"}]
    return [{key: value for key, value in one.items() if getattr(recipe, key) != value} for one in candidates]


def _shorter_rows(recipe: Recipe, shape: ModelShape, device_bytes: int, *, half: bool) -> dict[str, Any]:
    """Rows halved until they fit, at most down to one conversation; or, where a row is one already, conversations halved."""
    length = recipe.row_len
    if length == recipe.sequence_len:
        return {"sequence_len": length // 2} if length > 1 and recipe.micro_batch_tokens is None else {}
    while length > recipe.sequence_len:
        length = max(recipe.sequence_len, length // 2)
        changed = _changed(recipe, {"micro_batch_tokens": length})
        if changed is not None and estimate_memory(changed, shape, half=half).peak_bytes <= device_bytes:
            break
    return {"micro_batch_tokens": length}


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The recipe with other values, or None where they do not go together."""
    fields = msgspec.to_builtins(recipe)
    if recipe.global_batch_size is not None:
        # It follows.
        del fields["gradient_accumulation_steps"]
    try:
        return parse_recipe({**fields, **changes})
    except RecipeError:
        return None
