"""One step is one step: a long row, four rows one after another, or two processes with two each give one trajectory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from trajectory import Case, Outcome, run_case  # noqa: E402 (torch may be absent)
from two_processes import run_two  # noqa: E402

from chaccu.testing.tiny import build_model  # noqa: E402

NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
ARCHITECTURES = {"llama": {}, "tied-llama": {"tie_word_embeddings": True}, "gemma-3": {}, "distilgpt2": NO_DROPOUT}
NAMES = [f"{architecture}, {method}" for architecture in ARCHITECTURES for method in ("full", "lora")]
FACTORED = {"optimizer": "adafactor"}
HAS_PACKING = importlib.util.find_spec("bitsandbytes") is not None
TIMED = {"max_minutes": 0.02, "num_train_epochs": 100_000}
LEAN = {"precision": "bf16", "optimizer": "adamw_8bit", "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(build_model(folder / name, name.removeprefix("tied-"), **fields)) for name, fields in ARCHITECTURES.items()
    }


def case(models: dict[str, str], name: str, rows: int = 1, **fields: Any) -> Case:
    architecture, method = name.split(", ")
    if method != "full":
        fields = {"learning_rate": 1e-2, **fields}
    return Case(name, models[architecture], rows, {"method": method, **fields})


@pytest.fixture(scope="module")
def two_processes(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What each case comes to on two processes of two rows a step each; they do not share the last step evenly."""
    cases = [case(models, name, gradient_accumulation_steps=2) for name in NAMES]
    factored = case(models, "llama, full", gradient_accumulation_steps=2, **FACTORED)
    cases += [case(models, "llama, qlora", gradient_accumulation_steps=2)] if HAS_PACKING else []
    cases.append(msgspec.structs.replace(cases[0], name="timed", fields={**cases[0].fields, **TIMED}))
    lean = case(models, "tied-llama, full", **LEAN)
    cases += [
        msgspec.structs.replace(cases[0], name="checkpointed", fields={**cases[0].fields, "activation_checkpointing": "full"}),
        msgspec.structs.replace(factored, name="factored"),
        msgspec.structs.replace(lean, name="lean"),
        msgspec.structs.replace(lean, name="lean in backward", fields={**lean.fields, "optimizer_in_backward": True}),
    ]
    folder = tmp_path_factory.mktemp("outcomes")
    (folder / "cases.json").write_bytes(msgspec.json.encode(cases))
    script = Path(__file__).with_name("trajectory.py")
    run_two([sys.executable, str(script), str(folder / "cases.json"), str(folder / "out")])
    return {name: Outcome(**outcome) for name, outcome in torch.load(folder / "out").items()}


@pytest.mark.parametrize("name", NAMES)
def test_one_long_row_is_four_rows_is_two_processes_with_two_each(
    name: str, models: dict[str, str], two_processes: dict[str, Outcome]
) -> None:
    # Four groups of conversations a step, and three in the last of an epoch.
    long_rows = run_case(case(models, name, rows=4))
    rows = run_case(case(models, name, gradient_accumulation_steps=4))
    shared = two_processes[name]
    assert len(rows.losses) == 4
    # It learns: the comparison is of something that moves.
    assert rows.after < rows.before - 0.1
    for other in (long_rows, shared):
        assert_same(other, rows)


@pytest.mark.skipif(not HAS_PACKING, reason="bitsandbytes is not installed")
def test_an_adapter_on_a_packed_base_is_the_same_on_two_processes(
    models: dict[str, str], two_processes: dict[str, Outcome]
) -> None:
    assert_same(two_processes["llama, qlora"], run_case(case(models, "llama, qlora", gradient_accumulation_steps=4)))


def test_both_processes_end_at_one_step_when_the_time_is_up(two_processes: dict[str, Outcome]) -> None:
    # If one went on alone, it would wait for the other for ever.
    assert 4 < len(two_processes["timed"].losses) < 100_000


def test_layers_that_recompute_change_nothing_on_two_processes(two_processes: dict[str, Outcome]) -> None:
    assert_same(two_processes["checkpointed"], two_processes[NAMES[0]])


def test_moments_of_rows_and_columns_are_those_of_whole_matrices(
    models: dict[str, str], two_processes: dict[str, Outcome]
) -> None:
    assert_same(two_processes["factored"], run_case(case(models, "llama, full", gradient_accumulation_steps=4, **FACTORED)))


def test_lean_moments_train_alike_on_two_processes(models: dict[str, str], two_processes: dict[str, Outcome]) -> None:
    alone = run_case(case(models, "tied-llama, full", gradient_accumulation_steps=2, **LEAN))
    shared = two_processes["lean"]
    # Weights and moments are rounded at random, each shard's by itself.
    assert shared.losses == pytest.approx(alone.losses, rel=0.01)
    assert shared.norms == pytest.approx(alone.norms, rel=0.05)
    assert shared.after == pytest.approx(alone.after, rel=0.01)
    assert {weight.dtype for weight in shared.weights.values()} == {torch.bfloat16}


def test_an_update_in_the_backward_pass_is_the_same_update_on_two_processes(two_processes: dict[str, Outcome]) -> None:
    lean, in_backward = two_processes["lean"], two_processes["lean in backward"]
    assert in_backward.losses == lean.losses
    assert in_backward.norms == pytest.approx(lean.norms, rel=0.01)
    assert all(torch.equal(in_backward.weights[name], weight) for name, weight in lean.weights.items())


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert one.norms == pytest.approx(other.norms, rel=1e-4)
    assert (one.before, one.after) == pytest.approx((other.before, other.after), rel=1e-5)
    assert one.weights.keys() == other.weights.keys()
    # By norms: AdamW divides a gradient by its own size, so where that is next to nothing its rounding errors step too.
    for name, weight in other.weights.items():
        assert torch.dist(one.weights[name].float(), weight.float()) <= 1e-3 * weight.float().norm(), name
