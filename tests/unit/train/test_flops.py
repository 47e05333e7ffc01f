"""Model FLOPs against counts by hand, and the peaks of chips by the names that they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.train.recipe import Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.flops import count_model_flops, find_device_peak, find_peak_flops  # noqa: E402 (torch may be absent)
from chaccu.train.model import TrainableModel  # noqa: E402


def build(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def build_llama(width: int, layers: int, heads: int, groups: int, inner: int, **more: Any) -> Any:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups}
    return build(transformers.LlamaConfig(**sizes, intermediate_size=inner, **more))


def test_a_small_llama_costs_what_is_counted_by_hand() -> None:
    flops = count_model_flops(build_llama(8, 2, 2, 1, 12, vocab_size=10))
    # Queries and outputs 8×8, keys and values 8×4, three matrices of the feed-forward part 8×12; the projection 8×10.
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 96) + 80
    assert flops.matrices == 6 * weights
    # Two conversations of 4 and 6 tokens: half of 16 and of 36 pairs, in two layers of width 8.
    assert flops.count([4, 6]) == 6 * weights * 10 + 12 * 2 * 8 * (8 + 18)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "groups", "inner"),
    [(2048, 22, 32, 4, 5632), (4096, 32, 32, 32, 11008), (5120, 40, 40, 40, 13824)],
)
def test_llama_shapes_cost_what_the_published_figures_were_counted_with(
    width: int, layers: int, heads: int, groups: int, inner: int
) -> None:
    flops = count_model_flops(build_llama(width, layers, heads, groups, inner, vocab_size=32000))
    matrices = 2 * width * width + 2 * width * (width * groups // heads) + 3 * width * inner
    lengths = [2048, 700, 1300]
    attended = sum(length**2 for length in lengths) / sum(lengths) / 2
    a_token = 6 * (layers * matrices + width * 32000) + 12 * layers * width * attended
    assert flops.count(lengths) / sum(lengths) == pytest.approx(a_token, rel=1e-12)


def test_a_tied_projection_counts_once_and_the_embedding_of_an_untied_model_not_at_all() -> None:
    tied, untied = (
        count_model_flops(build_llama(8, 1, 2, 1, 12, vocab_size=10, tie_word_embeddings=tie)) for tie in (True, False)
    )
    assert tied == untied


def test_a_window_bounds_what_its_layers_attend_to() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    flops = count_model_flops(build(config))
    assert (flops.width, flops.windows) == (32, (4, None, 4))
    # Ten tokens: the first four see 8 in all (half of 16), the other six four each.
    assert flops.count([10]) == 10 * flops.matrices + 12 * 32 * (50 + 2 * (8 + 24))


def test_gpt2_has_its_own_matrices_and_names() -> None:
    flops = count_model_flops(build(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=10, n_positions=16)))
    assert flops.matrices == 6 * (2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8) + 80)
    assert (flops.width, flops.windows) == (8, (None, None))


def test_of_a_mixture_those_experts_count_that_a_token_is_sent_to() -> None:
    config = transformers.MixtralConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    router, expert = 8 * 4, 3 * 8 * 12
    assert count_model_flops(build(config)).matrices == 6 * (2 * 64 + 2 * 32 + router + 2 * expert + 80)


def test_frozen_weights_have_no_gradient_of_their_own(recipe: Recipe, llama: Path) -> None:
    cpu = torch.device("cpu")
    full = count_model_flops(TrainableModel(msgspec.structs.replace(recipe, method="full"), cpu).causal)
    lora = count_model_flops(TrainableModel(recipe, cpu).causal)
    # Rank 8 on the seven matrices of both layers: 64 in and out, but for keys and values (32) and the inner width (128).
    adapters = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert lora.matrices == full.matrices * 4 // 6 + 6 * adapters
    assert lora.windows == full.windows


def test_a_packed_weight_counts_as_the_matrix_that_it_stands_for() -> None:
    causal = build_llama(8, 1, 2, 1, 12, vocab_size=10)
    plain = count_model_flops(causal.requires_grad_(False))
    layer = causal.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.empty(48, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
    assert count_model_flops(causal) == plain


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_a_chip_is_known_by_the_name_that_it_reports(name: str, tflops: float) -> None:
    assert find_peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Quadro RTX 8000",
    ],
)
def test_an_unknown_chip_has_no_peak(name: str) -> None:
    assert find_peak_flops(name) is None


def test_a_cpu_has_no_peak() -> None:
    assert find_device_peak(torch.device("cpu")) is None
