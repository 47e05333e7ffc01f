"""Rows of control tokens that the base cannot tell from others are found, trained, saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chaccu.conversation import Encoded, TextTokenizer
from chaccu.errors import RecipeError, TrainError
from chaccu.testing.tiny import EOS, build_llama
from chaccu.train.pack import pack_rows
from chaccu.train.recipe import DataSource, LoraOptions, Recipe
from chaccu.weights.merge import merge_adapter

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.model import TrainableModel  # noqa: E402 (torch may be absent)
from chaccu.train.token_rows import TokenRowPlan, indistinct_tokens, plan_token_rows  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny LLaMA in which the end of turn has the row of another token, as in a base model that never saw it."""
    folder = build_llama(tmp_path / "base", tie_word_embeddings=request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end, other = (TextTokenizer.load(folder).token_id(text) for text in (EOS, "<|im_start|>"))
    with torch.no_grad():
        for ends in (model.get_input_embeddings(), model.get_output_embeddings()):
            ends.weight[end] = ends.weight[other]
    model.save_pretrained(folder)
    return folder


def recipe(base: Path, **lora: Any) -> Recipe:
    data = [DataSource(path="none")]
    return Recipe(model=str(base), data=data, output="none", precision="fp32", lora=LoraOptions(**lora))


def test_only_the_indistinct_row_is_trained_and_the_merged_model_is_the_trained_one(base: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(base)
    end, bos = tokenizer.token_id(EOS), tokenizer.bos_id
    assert end is not None
    assert bos is not None
    encoded = Encoded([bos, 70, 71, 72, end, 73, end], [0, 1, 1, 1, 1, 1, 1], ())
    plan = plan_token_rows(LoraOptions(), [encoded], tokenizer)
    assert plan == TokenRowPlan((end,), begin_at={})
    model = TrainableModel(recipe(base), CPU, TokenRowPlan((bos, end)))
    assert model.token_rows == [end]
    (row,) = pack_rows([encoded], 16, seed=0)
    optimizer = torch.optim.Adam(model.parameters, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.row_loss(row)
        loss.backward()
        optimizer.step()
    # The loss by parts is the wrapped model's own, now that the rows differ from the base's.
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        logits = model.full.eval()(ids).logits
        theirs = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        assert model.row_loss(row).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert theirs.item() < loss.item()
    model.full.save_pretrained(str(tmp_path / "adapter"))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
    for after, before in zip(
        (merged.get_input_embeddings(), merged.get_output_embeddings()),
        (plain.get_input_embeddings(), plain.get_output_embeddings()),
        strict=True,
    ):
        changed = (after.weight != before.weight).any(dim=1).nonzero().squeeze(1)
        assert changed.tolist() == [end]


def test_the_gradients_of_rows_and_hidden_states_are_the_wrapped_models_own(base: Path) -> None:
    tokenizer = TextTokenizer.load(base)
    end = tokenizer.token_id(EOS)
    assert end is not None
    model = TrainableModel(recipe(base), CPU, TokenRowPlan((end,)))
    for parameter in model.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    ids = [70, 71, end, 72, end]
    (row,) = pack_rows([Encoded(ids, [0, 1, 1, 1, 1], ())], 16, seed=0)
    ours = torch.autograd.grad(model.row_loss(row), model.parameters)
    logits = model.full(torch.tensor([ids])).logits[0, :-1]
    theirs = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"), model.parameters
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_recipe_may_name_the_tokens(base: Path) -> None:
    tokenizer = TextTokenizer.load(base)
    named = plan_token_rows(LoraOptions(trainable_tokens=["<bos>"]), [], tokenizer)
    assert TrainableModel(recipe(base), CPU, named).token_rows == [tokenizer.bos_id]
    with pytest.raises(RecipeError, match=r"im_stop.*the tokenizer does not have"):
        plan_token_rows(LoraOptions(trainable_tokens=["<|im_stop|>"]), [], tokenizer)


def test_the_end_of_a_reply_begins_at_the_end_of_text(base: Path) -> None:
    tokenizer = TextTokenizer.load(base)
    end_of_text, end = tokenizer.token_id(EOS), tokenizer.token_id("<end_of_turn>")
    assert end_of_text is not None
    assert end is not None
    reply = Encoded([70, 71, end], [0, 1, 1], ())
    plan = plan_token_rows(LoraOptions(trainable_tokens=["<end_of_turn>"]), [reply], tokenizer)
    assert plan.begin_at == {end: end_of_text}
    model = TrainableModel(recipe(base), CPU, plan)
    with torch.no_grad():
        logits = model.full.eval()(torch.tensor([[70, 71]])).logits[0, -1]
    assert logits[end].item() == pytest.approx(logits[end_of_text].item())


def test_rows_that_point_the_same_way_are_indistinct_whatever_their_length() -> None:
    weight_VD = torch.eye(4)
    weight_VD[3] = 2 * weight_VD[1] + 0.1 * weight_VD[0]
    assert indistinct_tokens(weight_VD, [0, 1, 2, 3]) == [1, 3]


def test_lora_on_the_output_projection_is_refused(base: Path) -> None:
    with pytest.raises(TrainError, match="output projection"):
        TrainableModel(recipe(base, target_modules=["q_proj", "lm_head"]), CPU)
