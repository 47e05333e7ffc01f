"""Conversations in a packed row get the logits that the plain model gives each of them alone, on every architecture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from chaccu.conversation import Encoded
from chaccu.testing.tiny import build_model
from chaccu.train.pack import PackedRow, pack_rows
from chaccu.train.recipe import DataSource, Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)

LENGTHS = (70, 5, 41, 33, 2)
# Weights come large, so that a token that saw another conversation, or too far, would say something else by far.
LOUD: dict[str, Any] = {"initializer_range": 0.2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LOUD),
    "llama-stretched": ("llama", {**LOUD, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", LOUD),
    "qwen2": ("qwen2", LOUD),
    "qwen2-sliding": (
        "qwen2",
        {**LOUD, "use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3": ("qwen3", LOUD),
    "gemma-3": ("gemma-3", LOUD),
    # Caps so low that leaving them out would be seen; the layers' kinds as Gemma 2 has them.
    "gemma-2": (
        "gemma-3",
        {
            **LOUD,
            "model_type": "gemma2",
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "distilgpt2": ("distilgpt2", LOUD),
}
SLIDING = ("mistral", "qwen2-sliding", "gemma-3", "gemma-2")


def build_case(case: str, folder: Path) -> TrainableModel:
    architecture, fields = CASES[case]
    build_model(folder, architecture, **fields)
    recipe = Recipe(model=str(folder), data=[DataSource(path="none")], output="none", method="full", precision="fp32")
    return TrainableModel(recipe, torch.device("cpu"))


def draw_conversations() -> list[Encoded]:
    draw = random.Random(3)
    return [
        Encoded(
            [draw.randrange(300) for _ in range(length)], [1 if at == 1 else draw.randint(0, 1) for at in range(length)], ()
        )
        for length in LENGTHS
    ]


def packed_logits(model: TrainableModel, row: PackedRow) -> Any:
    ready = model.prepare_row(row)
    with torch.no_grad():
        output = model.full.eval()(
            input_ids=ready.ids_1T, position_ids=ready.positions_1T, use_cache=False, packed=ready.packed
        )
    return output.logits[0]


def logits_alone(folder: Path, row: PackedRow, **config: Any) -> tuple[Any, float]:
    """What transformers' own attention gives each of the row's conversations by itself, and the summed loss."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **config
    ).eval()
    logits, loss, start = [], 0.0, 0
    for length in row.lengths:
        ids_T = torch.tensor(list(row.ids_T[start : start + length]))
        trained_T = torch.tensor(list(row.mask_T[start : start + length])).bool()
        with torch.no_grad():
            logits.append(plain(input_ids=ids_T[None], use_cache=False).logits[0])
        labels_T = torch.where(trained_T, ids_T, -100)[1:]
        loss += (
            torch.nn.functional.cross_entropy(logits[-1][:-1], labels_T, reduction="sum").item() if trained_T[1:].any() else 0
        )
        start += length
    return torch.cat(logits), loss


@pytest.mark.parametrize("case", CASES)
def test_packed_logits_and_loss_are_those_of_conversations_alone(case: str, tmp_path: Path) -> None:
    model = build_case(case, tmp_path)
    (row,) = pack_rows(draw_conversations(), sum(LENGTHS), seed=0)
    assert len(row.lengths) == len(LENGTHS)
    alone_TV, alone_loss = logits_alone(tmp_path, row)
    torch.testing.assert_close(packed_logits(model, row), alone_TV, rtol=1e-4, atol=1e-4)
    assert model.row_loss(row).item() == pytest.approx(alone_loss, rel=1e-5)
    # The comparison can fail: the same tokens as one conversation get other logits.
    joined = PackedRow(row.ids_T, row.mask_T, [len(row.ids_T)])
    assert (packed_logits(model, joined) - alone_TV).abs().max() > 0.1


@pytest.mark.parametrize("case", SLIDING)
def test_the_window_is_kept_in_a_packed_row(case: str, tmp_path: Path) -> None:
    """The conversations above are long enough that a model that looked further would say something else."""
    model = build_case(case, tmp_path)
    (row,) = pack_rows(draw_conversations(), sum(LENGTHS), seed=0)
    wide_TV, _ = logits_alone(tmp_path, row, sliding_window=1000)
    assert (packed_logits(model, row) - wide_TV).abs().max() > 0.1


def test_learnt_positions_restart_with_each_conversation(tmp_path: Path) -> None:
    model = build_case("distilgpt2", tmp_path)
    one = draw_conversations()[1]
    row = PackedRow([*one.ids, *one.ids], [*one.mask, *one.mask], [5, 5])
    logits_TV = packed_logits(model, row)
    torch.testing.assert_close(logits_TV[:5], logits_TV[5:], rtol=1e-5, atol=1e-5)
