"""The fused loss against torch's own, in value and in both gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train import loss as loss_module  # noqa: E402 (torch may be absent)
from chaccu.train.loss import summed_cross_entropy  # noqa: E402

T, D, V = 13, 8, 29


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
def test_value_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch, softcap: float, chunk: int) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 4 * V * chunk)
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float32).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float32).requires_grad_()
    labels_T = torch.randint(V, (T,), generator=generator)
    # A factor behind the sum: the gradient from above must reach both.
    ours = summed_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=softcap) / 7
    ours_grads = torch.autograd.grad(ours, (hidden_TD, weight_VD))
    logits_TV = hidden_TD @ weight_VD.T
    if softcap:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    theirs = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum") / 7
    theirs_grads = torch.autograd.grad(theirs, (hidden_TD, weight_VD))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grads, theirs_grads, rtol=1e-4, atol=1e-5)


def test_a_frozen_projection_gets_no_gradient() -> None:
    hidden_TD = torch.randn(T, D).requires_grad_()
    weight_VD = torch.randn(V, D)
    summed_cross_entropy(hidden_TD, weight_VD, torch.arange(T)).backward()
    assert weight_VD.grad is None
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.abs().sum() > 0


def test_without_gradients_the_value_is_the_same_and_inputs_are_untouched() -> None:
    hidden_TD, weight_VD = torch.randn(T, D), torch.randn(V, D)
    copies = hidden_TD.clone(), weight_VD.clone()
    labels_T = torch.arange(T)
    expected = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, labels_T, reduction="sum")
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden_TD, weight_VD, labels_T), expected)
    assert torch.equal(hidden_TD, copies[0])
    assert torch.equal(weight_VD, copies[1])


def test_an_evaluation_forms_no_gradient_of_a_projection_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(*_: object) -> None:
        raise AssertionError("a gradient of the projection was formed")

    monkeypatch.setattr(loss_module, "_sum_products", form)
    hidden_TD, weight_VD, labels_T = torch.randn(5, D), torch.nn.Parameter(torch.randn(V, D)), torch.arange(5)
    with pytest.raises(AssertionError):
        summed_cross_entropy(hidden_TD, weight_VD, labels_T)
    with torch.no_grad():
        assert summed_cross_entropy(hidden_TD, weight_VD, labels_T) > 0


def test_bfloat16_stays_near_float32() -> None:
    hidden_TD, weight_VD, labels_T = torch.randn(T, D), torch.randn(V, D), torch.arange(T)
    exact = summed_cross_entropy(hidden_TD, weight_VD, labels_T)
    coarse = summed_cross_entropy(hidden_TD.bfloat16(), weight_VD, labels_T)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0.02, atol=0.0)


def test_float16_overflows_neither_in_sums_over_tokens_nor_under_a_loss_scale() -> None:
    """600 tokens of one label whose hidden state is large: the summed gradient of the label's row passes 65,504, and so does
    the scale by itself; what is divided by the tokens does not."""
    tokens, scale = 600, 2.0**16
    hidden_TD = torch.full((tokens, D), 150.0).half().requires_grad_()
    weight_VD = torch.zeros(V, D).requires_grad_()
    (summed_cross_entropy(hidden_TD, weight_VD, torch.ones(tokens, dtype=torch.long)) * (1 / tokens)).backward()
    expected = torch.full((V, D), 150.0 / V)
    expected[1] -= 150.0
    torch.testing.assert_close(weight_VD.grad, expected, rtol=2e-3, atol=1e-3)
    hidden_1D, weight_VD = torch.zeros(1, D).half().requires_grad_(), torch.full((V, D), 2.0**-8)
    weight_VD[1] = 0.0
    (summed_cross_entropy(hidden_1D, weight_VD, torch.ones(1, dtype=torch.long)) * scale).backward()
    torch.testing.assert_close(hidden_1D.grad.float(), torch.full((1, D), scale * 2.0**-8 * (V - 1) / V), rtol=2e-3, atol=0)


def test_float16_keeps_gradients_that_are_small_beside_it() -> None:
    """A vocabulary so large that each chance is below float16's normal numbers, and weights that make the gradient so too."""
    vocabulary, scale = 50_000, 2.0**16
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(4, D, generator=generator).half()
    weight_VD = torch.randn(vocabulary, D, generator=generator).mul(1e-2).half()
    labels_T = torch.arange(4)
    grads = []
    for dtype, factor in ((torch.float32, 1.0), (torch.float16, scale)):
        hidden, weight = hidden_TD.to(dtype).requires_grad_(), weight_VD.float().requires_grad_()
        (summed_cross_entropy(hidden, weight, labels_T) * (factor / 4)).backward()
        grads.append((hidden.grad.float() / factor, weight.grad / factor))
    for exact, half in zip(*grads, strict=True):
        assert (half - exact).norm() < 2e-3 * exact.norm()
    rare_VD = (grads[1][1] - grads[0][1])[4:]
    assert rare_VD.norm() < 5e-3 * grads[0][1][4:].norm()
